"""What an export says about itself: ``manifest.json``, which every command that takes its folder begins with."""

import json
from pathlib import Path
from typing import Any

from gplq.errors import UsageError
from gplq.files import sha256

SCHEMA_VERSION = "3.0"
TOOL = "gplq-export"
MANIFEST = "manifest.json"
_LARGEST = 256 * 2**20  # bytes; ours have a few hundred kilobytes
CHECKPOINT = "model.pt"  # the checkpoint, in the folder of an export


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an export; its ``files`` are names in the folder itself, each with a hash.

    Raises:
        UsageError: there is none that gplq-export wrote, or it was altered, or it is from a newer version.
    """
    path = folder / MANIFEST
    try:
        if path.stat().st_size > _LARGEST:
            raise UsageError(f"{path} has {path.stat().st_size:,} bytes: gplq-export wrote no such manifest.")
        manifest = json.loads(path.read_text(encoding="utf-8"))
        ours = manifest["tool"] == TOOL
        inside = all(Path(name).name == name and str(entry["sha256"]) for name, entry in manifest["files"].items())
        major = str(manifest["schema_version"]).partition(".")[0]
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise UsageError(f"{folder} is no folder that gplq-export wrote: it has no readable manifest.json.") from error
    if not ours or not inside:
        raise UsageError(f"{path} was not written by gplq-export, or was altered.")
    if major != SCHEMA_VERSION.partition(".")[0]:
        raise UsageError(
            f"{path} has schema version {manifest['schema_version']}, this gplq reads "
            f"{SCHEMA_VERSION.partition('.')[0]}.x: export again with this version."
        )
    return dict(manifest)


def is_intact(folder: Path, manifest: dict[str, Any], name: str) -> bool:
    """Whether a file is the one that was exported."""
    path = folder / name
    return path.is_file() and sha256(path) == manifest["files"][name]["sha256"]


def exported(folder: Path, manifest: dict[str, Any], name: str) -> Path:
    """A file of an export.

    Raises:
        UsageError: it is missing, or is not the one that was exported.
    """
    if name not in manifest["files"] or not is_intact(folder, manifest, name):
        raise UsageError(f"{folder / name} is not the file that was exported: it is missing or altered. Export again.")
    return folder / name


def input_shape(folder: Path, manifest: dict[str, Any]) -> tuple[int, ...]:
    """Of one image, (C, H, W).

    Raises:
        UsageError: the manifest does not say.
    """
    try:
        return tuple(int(size) for size in manifest["input"]["shape"][1:])
    except (LookupError, TypeError, ValueError) as error:
        raise UsageError(f"{folder / 'manifest.json'} does not say the shape of the images: it is damaged.") from error
