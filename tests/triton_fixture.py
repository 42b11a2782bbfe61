"""Exports to serve: of the tiny checkpoint, with engines that are only headers, for what reads no more of them."""

import hashlib
import json
import os
import platform
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import triton_server

from gplq_export.triton.check import read_config
from gplq_export.triton.config import CONFIG, print_config


def require_server() -> None:
    """Skip the tests that ask where no server can be started; in CI that is a failure."""
    reason = triton_server.missing()
    if reason is not None and "CI" in os.environ and (platform.system(), platform.machine()) == ("Linux", "x86_64"):
        pytest.fail(reason)
    if reason is not None:
        pytest.skip(reason)


def change_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def change_config(model: Path, change: Callable[[Any], object]) -> None:
    config = read_config(model)
    change(config)
    (model / CONFIG).write_text(print_config(config))


def add_plan(
    export: Path,
    name: str = "fp16",
    *,
    magic: bytes = b"ftrt",
    version: tuple[int, int, int, int] = (10, 14, 1, 48),
    batch: tuple[int, int, int] = (1, 4, 16),
    **options: Any,
) -> None:
    """Put an engine into an exported folder, and what its manifest would say about it."""
    plan = magic + bytes(20) + bytes(version) + b"machine code"
    (export / f"model.{name}.plan").write_bytes(plan)
    digest = hashlib.sha256(plan).hexdigest()

    def change(manifest: dict[str, Any]) -> None:
        manifest["files"][f"model.{name}.plan"] = {"bytes": len(plan), "sha256": digest}
        manifest["engines"][name] = {
            "backend": "TensorRT" if magic == b"ftrt" else "TensorRT-RTX",
            "backend_version": ".".join(map(str, version)),
            "plan_sha256": digest,
            "onnx_sha256": manifest["files"][f"model.{name}.onnx"]["sha256"],
            "batch": list(batch),
            "compute_capabilities": [],
            "options": options,
        }

    change_json(export / "manifest.json", change)


def copy(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to))
