"""Where a file came from: versions, machine and command."""

import importlib.metadata
import platform
import sys
from datetime import UTC, datetime
from typing import Any

from gplq.files import printable

PACKAGES = ("gplq", "torch", "timm", "numpy", "onnx", "onnxruntime", "onnxruntime-gpu")


def environment() -> dict[str, Any]:
    """Versions of what was at work, the time in UTC and the command line; plain data."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "created_utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": [printable(argument) for argument in sys.argv],
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
    }
