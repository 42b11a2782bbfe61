"""The repository of an export for Triton Inference Server: written whole or not at all, checked before it appears.

::

    OUT/
      README.md                    what is served, the exact command that serves it, how to update it
      Dockerfile, compose.yaml     the production image and how to run it; .dockerignore
      gplq.json                    what was written, for which image
      models/                      what the server gets as --model-repository
        NAME-cpu/                  model.cpu.onnx in ONNX Runtime on the CPU; likewise NAME-fp32, NAME-int4
          config.pbtxt             input `images` FP32 [C, H, W]; output as the ONNX file's, `logits` FP32 [classes]
          labels.txt               a label a line, for the server's classification extension (`logits` has it)
          warmup/images            FP32 [C, H, W], raw: a test image after preprocessing (if images are given)
          1/model.onnx
          1/gplq.json              sidecar: hashes from checkpoint to file, bindings, builder, image
        NAME-trt-int4/             model.trt-int4.plan in TensorRT on the GPU; NAME-fp16: its FP16 twin, for A/B
          … as above, with 1/model.plan
        NAME-fp16-onnx/            model.fp16.onnx in ONNX Runtime's TensorRT provider, which builds an engine itself
        NAME/                      end to end, an ensemble of the next two around the first network
          config.pbtxt             input `image` UINT8 [-1]: one JPEG, PNG, …, encoded (max_batch_size 0);
                                   outputs `labels` STRING [-1, k], `scores` FP32 [-1, k], `logits` FP32 [-1, classes]
          1/gplq.json
        NAME-preprocess/           python: `image` UINT8 [-1] -> `images` FP32 [-1, C, H, W] (max_batch_size 0)
          1/model.py, 1/preprocess.py, 1/preprocessing.json, 1/gplq.json
        NAME-top/                  onnxruntime: `logits` -> `labels`, `scores`; softmax, the k largest, their names
          1/model.onnx, 1/gplq.json

An ensemble asks for the latest version of each step. All networks batch dynamically; encoded images differ in length,
so that one comes with each request, and the network's batcher puts them together.
"""

import contextlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gplq.errors import UsageError
from gplq.files import atomic_folder, write_json
from gplq_export.triton.check import MODELS, check_repository, read_config
from gplq_export.triton.config import CONFIG, LABELS, ServingOptions
from gplq_export.triton.deploy import write_deployment
from gplq_export.triton.export_folder import Export, Network
from gplq_export.triton.images import TritonImage, newest_image, triton_image
from gplq_export.triton.models import ModelWriter, write_version, written_here
from gplq_export.triton.problem import Problem
from gplq_export.triton.sidecar import SIDECAR, read_sidecar
from gplq_export.triton.version_rules import find_versions, version_problems

SCHEMA_VERSION = "1.0"
Say = Callable[[str], None]


@dataclass(frozen=True)
class Repository:
    """What was written. ``models``: the names that clients ask for, the end-to-end model first if there is one."""

    folder: Path
    image: TritonImage
    models: list[str] = field(default_factory=list)
    warnings: list[Problem] = field(default_factory=list)


def write_repository(
    export_folder: Path,
    out: Path,
    *,
    serve: Sequence[str] = (),
    name: str = "classifier",
    options: ServingOptions | None = None,
    image: TritonImage | None = None,
    warm_up: NDArray[np.float32] | None = None,
    force: bool = False,
    say: Say = print,
) -> Repository:
    """Write a repository; see the module's text for the files.

    Args:
        export_folder: what gplq-export wrote.
        out: the folder to write.
        serve: which of its files, as :class:`gplq_export.triton.export_folder.Network` names them; the end-to-end model
            uses the first. Empty: the CPU's, and every engine that Triton loads.
        name: what the models' names begin with.
        options: what else can be chosen.
        image: the server's; None: the newest that fits.
        warm_up: an image after preprocessing, [C, H, W], for the server to warm up with; None: noise.
        force: replace ``out`` if it is a repository that gplq-export wrote.
        say: where progress messages go.

    Raises:
        UsageError: a path or name is wrong, the export is damaged or does not fit the server, or nothing can be served.
        MissingError: tritonclient is not installed.
    """
    options = options or ServingOptions()
    _check_name(name)
    if out.exists():
        if not force:
            raise UsageError(f"{out} exists. Choose another --out, or overwrite it with --force.")
        _check_replaceable(out)
    export = Export(export_folder)
    networks = [export.network(kind) for kind in serve or export.default_kinds()]
    if len({network.kind for network in networks}) < len(networks):
        raise UsageError(f"--serve names a file twice: {', '.join(serve)}.")
    image = image or _image_for(networks, say)
    written = written_here(image)
    with atomic_folder(out) as folder:
        writer = ModelWriter(folder / MODELS, name, export, options, written)
        models = [writer.network(network, warm_up) for network in networks]
        if export.labels is None:
            say("end to end: skipped, the network returns features, not classes")
        else:
            models.insert(0, writer.end_to_end(networks[0]))
        problems = check_repository(folder / MODELS, image)
        _refuse(problems, f"{export_folder} cannot be served so")
        end_to_end = export.labels is not None
        write_deployment(folder, name, image, networks, batch_max=options.batch_max, end_to_end=end_to_end)
        folders = sorted(path.name for path in (folder / MODELS).iterdir())
        content = {"schema_version": SCHEMA_VERSION, "tool": "gplq-export", "name": name, "folders": folders, **written}
        write_json(folder / SIDECAR, content)
    for model in models:
        say(f"{out / MODELS / model}")
    return Repository(out, image, models, problems)


def add_version(export_folder: Path, out: Path, *, say: Say = print) -> list[Path]:
    """Add an export to a repository that gplq-export wrote, as a new version of each of its networks.

    What is served stays as it is: a version's folder appears by one renaming, when all of it is written and checked.

    Returns:
        The new folders.

    Raises:
        UsageError: ``out`` is no such repository, or the export has other inputs, outputs, labels or preprocessing.
    """
    content = _read_ours(out)
    export, image = Export(export_folder), triton_image(content["release"])
    written = written_here(image)
    models = [folder for folder in sorted((out / MODELS).iterdir()) if _kind(folder) is not None]
    networks = {folder: export.network(str(_kind(folder))) for folder in models}
    for folder, network in networks.items():
        _check_same(folder, network, export, out / MODELS / f"{content['name']}-preprocess")
    targets = {folder: folder / str(max(find_versions(folder)) + 1) for folder in networks}
    with contextlib.ExitStack() as stack:  # all are written and checked before the first one appears
        for folder, network in networks.items():
            temporary = stack.enter_context(atomic_folder(targets[folder]))
            write_version(temporary, network, export, written)
            problems = list(version_problems(read_config(folder), temporary, image))
            _refuse(problems, f"{export_folder} cannot be served as {targets[folder]}")
    for target in targets.values():
        say(f"{target}")
    return list(targets.values())


def _check_same(folder: Path, network: Network, export: Export, preprocess: Path) -> None:
    """That a new version can take the place of the others: clients see one model."""
    latest = folder / str(max(find_versions(folder)))
    sidecar = read_sidecar(latest)
    labels = folder / LABELS
    ours = labels.read_text(encoding="utf-8").splitlines() if labels.is_file() else None
    settings = preprocess / "1" / "preprocessing.json"
    theirs = json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else export.preprocessing
    bindings = None if sidecar is None else sidecar.bindings
    different = {
        "inputs or outputs": bindings is None
        or (bindings.inputs, bindings.outputs) != (network.bindings.inputs, network.bindings.outputs),
        "labels": ours != export.labels,
        "preprocessing": theirs != export.preprocessing,
    }
    if wrong := [what for what, is_different in different.items() if is_different]:
        raise UsageError(
            f"{export.folder} has other {' and '.join(wrong)} than {folder}: it is another model, not a new version of "
            "it. Write a repository of its own, with another --name."
        )


def _kind(folder: Path) -> str | None:
    """Which file of an export a model's folder serves; None for the steps around it, and for strangers."""
    versions = find_versions(folder) if (folder / CONFIG).is_file() else []
    sidecar = read_sidecar(folder / str(versions[-1])) if versions else None
    return None if sidecar is None or sidecar.bindings is None else sidecar.kind


def _image_for(networks: Sequence[Network], say: Say) -> TritonImage:
    """The newest image whose TensorRT loads the engines, if there are any."""
    versions = {str(network.engine["backend_version"]) for network in networks if network.engine is not None}
    version = min(versions, default=None)
    found = newest_image(version)
    if found is None:
        found = newest_image()
        say(
            f"warning: no release of Triton in the table has TensorRT {version}; see README.md, and choose with --image"
        )
    assert found is not None
    return found


def _check_name(name: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
        raise UsageError(f"--name {name}: models have names of letters, digits, '_', '.' and '-'; they stand in URLs.")


def _read_ours(out: Path) -> dict[str, Any]:
    """Of a repository: "name", "folders" and "release", the image's."""
    path = out / SIDECAR
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["tool"] != "gplq-export":
            raise ValueError("tool")
        image = content["image"]
        return {
            "name": str(content["name"]),
            "folders": [str(name) for name in content["folders"]],
            "release": f"{image['release']}-{image['flavour']}",
        }
    except (OSError, ValueError, TypeError, LookupError, RecursionError) as error:
        raise UsageError(f"{out} is no repository that gplq-export wrote: it has no readable {SIDECAR}.") from error


def _check_replaceable(out: Path) -> None:
    known = _read_ours(out)["folders"]
    if strangers := [path for path in (out / MODELS).iterdir() if path.name not in known]:
        raise UsageError(f"{strangers[0]} was not written by gplq-export: --force would delete it. Move it elsewhere.")


def _refuse(problems: Sequence[Problem], what: str) -> None:
    if errors := [problem for problem in problems if problem.severity == "error"]:
        raise UsageError(f"{what}:\n" + "\n".join(map(str, errors)))
