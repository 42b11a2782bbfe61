"""What an export says about itself: ``manifest.json``, which every command that takes its folder begins with."""

import json
from pathlib import Path
from typing import Any

from gplq.errors import UsageError
from gplq.files import sha256

SCHEMA_VERSION = "2.1"
TOOL = "gplq-export"
CHECKPOINT = "model.pt"  # the checkpoint, in the folder of an export


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an export; its ``files`` are names in the folder itself, each with a hash.

    Raises:
        UsageError: there is none that gplq-export wrote, or it was altered, or it is from a newer version.
    """
    path = folder / "manifest.json"
    try:
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
