"""``gplq.json`` in a version's folder: what the file beside it is, comes from and fits; and the key to checking it.

An engine cannot be opened without a GPU, and should not be opened to be looked at: it is a program. What its tensors
and profiles are is written down here, next to its hash, when the repository is written.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gplq import __version__
from gplq.errors import UsageError
from gplq.files import write_json
from gplq_export.triton.bindings import Bindings
from gplq_export.triton.config import Profile

SIDECAR = "gplq.json"
SCHEMA_VERSION = "1.0"


@dataclass(frozen=True)
class Sidecar:
    """What is known about a version.

    Attributes:
        kind: which file of the export it is, such as "cpu" or "trt-int4.plan".
        files: SHA-256 of each file in the version's folder, by name.
        hashes: SHA-256 of what it was made from, "checkpoint_sha256" to "plan_sha256".
        bindings: of the network; None for the steps around it.
        profiles: ranges of the batch of an engine.
        engine: how it was built: builder, its version, GPUs, options.
        written: when, where and for which image.
    """

    kind: str
    files: dict[str, str]
    hashes: dict[str, str] = field(default_factory=dict)
    bindings: Bindings | None = None
    profiles: tuple[Profile, ...] = ()
    engine: dict[str, Any] | None = None
    written: dict[str, Any] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Write it into a version's folder."""
        content = {
            "schema_version": SCHEMA_VERSION,
            "tool": "gplq-export",
            "tool_version": __version__,
            "kind": self.kind,
            "files": self.files,
            **self.hashes,
            "bindings": None if self.bindings is None else self.bindings.to_dict(),
            "profiles": [list(profile) for profile in self.profiles],
            "engine": self.engine,
            "written": self.written,
        }
        write_json(folder / SIDECAR, content)


def read_sidecar(folder: Path) -> Sidecar | None:
    """That of a version's folder; None if there is none.

    Raises:
        UsageError: it is damaged, or newer than this program.
    """
    path = folder / SIDECAR
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if str(content["schema_version"]).split(".")[0] != SCHEMA_VERSION.split(".")[0]:
            raise UsageError(f"{path} has schema {content['schema_version']}: a newer gplq wrote it. Update gplq.")
        profiles = [tuple(int(size) for size in profile) for profile in content["profiles"]]
        return Sidecar(
            kind=str(content["kind"]),
            files={str(name): str(value) for name, value in content["files"].items()},
            hashes={key: str(value) for key, value in content.items() if key.endswith("_sha256")},
            bindings=None if content["bindings"] is None else Bindings.from_dict(content["bindings"]),
            profiles=tuple((low, best, high) for low, best, high in profiles),
            engine=None if content["engine"] is None else dict(content["engine"]),
            written=dict(content["written"]),
        )
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise UsageError(f"{path} is damaged: {error!r}. Write the version again.") from error
