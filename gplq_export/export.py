"""The export of a checkpoint: files, proof and manifest in one folder that appears whole or not at all.

::

    OUT/
      model.int4.onnx         the portable reference: explicit INT4 on weights and activations
      model.cpu.onnx          the same numbers, laid out for ONNX Runtime on CPUs
      model.openvino.onnx     the same numbers, laid out for OpenVINO on CPUs   (openvino)
      model.fp32.onnx         the same network without quantisers: the twin to compare with
      model.fp16.onnx         the twin in FP16
      model.trt-int4.onnx     what an engine is built from, for each kind       (engines)
      model.trt-int4.plan     the engine; model.fp16.plan: its FP16 twin        (engines, if a builder is installed)
      build.*.log             the builder's own words                           (engines)
      model.pt                the checkpoint that all of it was made from
      reports/                what 'gplq-export check' found, see gplq_export.reports   (with images)
      reports/precision.*.txt what every linear and attention of an engine multiplies in
      reproduce.sh            the commands that make all of it again            (from the command line)
      manifest.json           versions, hashes, bytes, precisions
"""

import json
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir as ir
from torch import Tensor

from gplq import __version__
from gplq.checkpoint import Checkpoint, integer_linears, save_checkpoint
from gplq.data import ImageSet
from gplq.errors import BuildError, GateError, MissingError, PrecisionError, UsageError
from gplq.files import atomic_folder, sha256, write_json, write_text
from gplq.provenance import environment
from gplq_export.check.chain import Settings, check
from gplq_export.check.report import Report, failure
from gplq_export.check.subject import Files, find_float_model
from gplq_export.engine import Backend, BuilderOptions, build_engine, find_builder
from gplq_export.inspect import storage
from gplq_export.kernels import KERNELS, Kernel, check_kernels
from gplq_export.lowering import linear_nodes, lower
from gplq_export.manifest import CHECKPOINT, MANIFEST, SCHEMA_VERSION, TOOL, is_intact
from gplq_export.precision import EngineReport, PrecisionTable, check_precision, precision_table
from gplq_export.promise import promise
from gplq_export.qdq import QdqGraph
from gplq_export.reports import write_reports
from gplq_export.reports.console import console
from gplq_export.targets import TARGETS, Target
from gplq_export.trace import trace

REPRODUCE = "reproduce.sh"
Say = Callable[[str], None]


@dataclass
class ExportResult:
    """What an export produced.

    Attributes:
        files: name -> {bytes, sha256}.
        storage: bytes of the INT4 file by what they hold.
        kernels: of each deployment file, what its multiplications run in on this CPU.
        report: what the check found, if images were given.
        engines: name -> report.
        precision: name -> what multiplies in which type in that engine, read back.
        outputs: name, shape and dtype of each.
        linears: names of the nodes that the checkpoint's linears became.
        problems: what did not work out, most severe first; each an error with its exit code.
    """

    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    storage: dict[str, int] = field(default_factory=dict)
    report: Report | None = None
    kernels: dict[str, dict[str, Kernel]] = field(default_factory=dict)
    engines: dict[str, EngineReport] = field(default_factory=dict)
    precision: dict[str, PrecisionTable] = field(default_factory=dict)
    outputs: list[dict[str, Any]] = field(default_factory=list)
    linears: list[str] = field(default_factory=list)
    problems: list[GateError | MissingError | BuildError | PrecisionError] = field(default_factory=list)


def export(
    checkpoint: Checkpoint,
    out: Path,
    *,
    openvino: bool = False,
    engines: Sequence[str] = (),
    images: ImageSet | Sequence[Tensor] | None = None,
    forced_images: int = 256,
    batch: tuple[int, int, int] = (1, 8, 32),
    compute_capabilities: tuple[int, ...] = (),
    options: BuilderOptions | None = None,
    reproduce: str | None = None,
    force: bool = False,
    say: Say = print,
) -> ExportResult:
    """Write the ONNX files, prove them, build engines; see the module's text for the files.

    A gate that fails, a builder that is missing or a build that fails does not stop the rest: the folder is written,
    the manifest says so, and ``problems`` holds the errors.

    Args:
        checkpoint: what to export.
        out: the folder to write.
        openvino: also write the file for OpenVINO.
        engines: also write TensorRT's files and build these engines, of "int4", "int8", "fp8" and "fp16", the last of
            which is built with any.
        images: test images for the check, with labels or without; or batches, just as the model gets them.
        forced_images: see :class:`gplq_export.check.chain.Settings`.
        batch: smallest, most likely and largest batch of the engines.
        compute_capabilities: GPUs to build for, such as (86, 89); empty: the builder's default.
        options: what else to ask of the builder.
        reproduce: text of ``reproduce.sh``, see :mod:`gplq_export.reproduce`.
        force: replace ``out`` if it is the folder of an earlier export, or empty.
        say: where progress messages go.

    Raises:
        UsageError: ``out`` exists and ``force`` is not given, or cannot be written; or an engine cannot run on one of
            ``compute_capabilities``.
        BuildError: the network cannot be exported at all.
    """
    if out.exists() and not force:
        raise UsageError(f"{out} exists. Choose another --out, or overwrite it with --force.")
    if out.exists() and not _is_ours(out):
        raise UsageError(
            f"{out} was not written by gplq-export (it has no manifest.json of ours): --force does not delete it."
        )
    built = [f"trt-{name}" for name in engines if name != "fp16"] + ["fp16"] * bool(engines)
    for name in built:
        TARGETS[name]().check_gpus(compute_capabilities)
    with atomic_folder(out) as folder:
        result = ExportResult()
        say("exporting from PyTorch")
        dialect = trace(checkpoint)
        result.linears = linear_nodes(dialect)
        result.outputs = [_output(value) for value in dialect.graph.outputs]
        metadata = _metadata(checkpoint)
        deployments = ["cpu", *(["openvino"] if openvino else [])]
        names = dict.fromkeys(["int4", *deployments, "fp32", "fp16", *built])
        models = {name: lower(dialect, TARGETS[name](), metadata) for name in names}
        for name, model in models.items():
            path = folder / f"model.{name}.onnx"
            ir.save(model, path)
            result.files[path.name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
            say(f"{path.name}: {path.stat().st_size:,} bytes")
        int4, fp32 = (result.files[f"model.{name}.onnx"]["bytes"] for name in ("int4", "fp32"))
        result.storage = storage(QdqGraph(models["int4"].clone()), int4)
        _check_storage(checkpoint, result.storage)
        say(f"model.int4.onnx: {int4 / fp32:.3f} x FP32; no weight code takes more than its bits")
        for name in deployments:
            _read_kernels(name, folder, result, say)
        if built:
            settings = EngineSettings(batch, compute_capabilities, options or BuilderOptions())
            _build(folder, {name: models[name] for name in built}, settings, result, say)
        _keep_checkpoint(checkpoint, folder, result)
        if reproduce is not None:
            write_text(folder / REPRODUCE, reproduce)
            (folder / REPRODUCE).chmod(0o755)
        write_json(folder / MANIFEST, _manifest(checkpoint, result))
        if images is not None:
            _check(checkpoint, folder, images, forced_images, result, say)
            write_json(folder / MANIFEST, _manifest(checkpoint, result))  # with the problems that were found
    result.problems.sort(key=lambda error: _SEVERITY.index(type(error)))
    return result


# Which error ends the command if there are several: wrong numbers first, an absent builder last.
_SEVERITY = [GateError, PrecisionError, BuildError, MissingError]


def _is_ours(out: Path) -> bool:
    """Whether a folder holds an earlier export, or nothing. Other tools write a manifest.json, too."""
    if not out.is_dir():
        return False
    try:
        manifest = json.loads((out / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return not any(out.iterdir())
    if not isinstance(manifest, dict) or manifest.get("tool") != TOOL:
        return False
    written = {MANIFEST, "reports", REPRODUCE, *manifest.get("files", {})}
    for path in out.iterdir():
        # A checkpoint that was moved in here would be lost with the rest.
        ours = path.name in written and (path.name != CHECKPOINT or is_intact(out, manifest, CHECKPOINT))
        if not ours and not path.match("build.*.log"):
            raise UsageError(f"{path} was not written by gplq-export: --force would delete it. Move it elsewhere.")
    return True


def _metadata(checkpoint: Checkpoint) -> dict[str, str]:
    return {
        "gplq.version": __version__,
        "gplq.checkpoint_sha256": checkpoint.sha256,
        "gplq.source_sha256": str(checkpoint.provenance.get("source_sha256", "")),
        "gplq.architecture": checkpoint.spec.architecture,
        "gplq.preprocessing": json.dumps(checkpoint.preprocessing.to_dict()),
        "gplq.label_names": json.dumps(checkpoint.label_names),
        "gplq.recipe": json.dumps(checkpoint.recipe.to_dict()),
        "gplq.versions": json.dumps(environment()["versions"]),
    }


def _output(value: ir.Value) -> dict[str, Any]:
    assert value.shape is not None
    size = [dim if isinstance(dim, int) else str(dim) for dim in value.shape]
    return {"name": value.name, "shape": size, "dtype": "float32"}


def _check_storage(checkpoint: Checkpoint, storage: dict[str, int]) -> None:
    """Two 4-bit codes a byte, and no weight folded back to floating point."""
    layers = integer_linears(checkpoint.model).values()
    expected = sum((layer.codes.numel() + 1) // 2 if layer.bits <= 4 else layer.codes.numel() for layer in layers)
    found = sum(size for kind, size in storage.items() if kind.startswith("weight codes"))
    if found != expected:
        raise BuildError(
            f"model.int4.onnx holds {found:,} bytes of weight codes, the checkpoint {expected:,}. This is a defect of "
            "gplq; please report it."
        )


def _read_kernels(name: str, folder: Path, result: ExportResult, say: Say) -> None:
    """Which kernels a deployment file's multiplications run in on this CPU."""
    try:
        kernels = result.kernels[name] = KERNELS[name](folder / f"model.{name}.onnx")
        check_kernels(kernels)
    except MissingError as error:
        say(f"kernels of model.{name}.onnx: skipped. {error}")
    except PrecisionError as error:
        say(f"model.{name}.onnx: {error}")
        result.problems.append(error)
    else:
        share = f"{sum(kernel.integer for kernel in kernels.values())} of {len(kernels)}"
        say(f"model.{name}.onnx: {share} multiplications run in 8-bit integers on this CPU (read back)")


def _keep_checkpoint(checkpoint: Checkpoint, folder: Path, result: ExportResult) -> None:
    """The checkpoint beside what was made from it, so that the folder can be checked wherever it is."""
    path = folder / CHECKPOINT
    if checkpoint.path is not None and checkpoint.path.is_file() and sha256(checkpoint.path) == checkpoint.sha256:
        shutil.copyfile(checkpoint.path, path)
    else:
        save_checkpoint(checkpoint, path)
    result.files[path.name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}


def _check(
    checkpoint: Checkpoint,
    folder: Path,
    images: ImageSet | Sequence[Tensor],
    forced_images: int,
    result: ExportResult,
    say: Say,
) -> None:
    """What 'gplq-export check' does, on the folder as it is."""
    settings = Settings(forced_images=forced_images, float_model=find_float_model(checkpoint))
    report = result.report = check(checkpoint, Files.of([folder]), images, settings, say=say)
    write_reports(report, folder / "reports")
    for line in console(report):
        say(line)
    if report.failed:
        result.problems.append(GateError(failure(report)))
    reference = report.pair("int4")
    if reference is not None and reference.skipped is not None:
        result.problems.append(MissingError(reference.skipped))


@dataclass(frozen=True)
class EngineSettings:
    """What all engines of an export have in common."""

    batch: tuple[int, int, int]
    compute_capabilities: tuple[int, ...]
    options: BuilderOptions


def _build(folder: Path, models: dict[str, ir.Model], settings: EngineSettings, result: ExportResult, say: Say) -> None:
    try:
        backend = find_builder()
    except MissingError as error:
        say(f"engine: skipped. {error}")
        result.problems.append(error)
        return
    for name, model in models.items():
        try:
            target = TARGETS[name]()
            promised = promise(model, target, result.linears)
            report = build_engine(
                folder / f"model.{name}.onnx",
                folder / f"model.{name}.plan",
                batch=settings.batch,
                compute_capabilities=settings.compute_capabilities or _default_capabilities(target, backend),
                backend=backend,
                options=settings.options,
                log_path=folder / f"build.{name}.log",
            )
            result.engines[name] = report
            result.files[f"model.{name}.plan"] = {"bytes": report.plan_bytes, "sha256": report.plan_sha256}
            result.precision[name] = precision_table(report, promised)
            write_text(folder / "reports" / f"precision.{name}.txt", f"{result.precision[name]}\n")
            check_precision(report, promised)
        except (BuildError, PrecisionError) as error:
            say(f"engine {name}: {error}")
            result.problems.append(error)
        else:
            say(
                f"model.{name}.plan: {report.plan_bytes:,} bytes, {backend.name} {backend.version}, "
                f"{report.build_seconds:.1f} s; read back: {result.precision[name].summary()}"
            )
            if name != "fp16":
                for note in unfused(result.precision[name]):
                    say(note)


def _default_capabilities(target: Target, backend: Backend) -> tuple[int, ...]:
    """The builder's default, empty, unless TensorRT-RTX would silently leave GPUs out of it that lack a type."""
    portable = backend.name == "TensorRT-RTX" and target.compute_capability > 80
    return tuple(sm for sm in (86, 89, 120) if sm >= target.compute_capability) if portable else ()


def unfused(table: PrecisionTable) -> list[str]:
    """One line for each reason for which attentions are not fused."""
    reasons = Counter(row.note for row in table.of("attention") if row.found == "unfused")
    return [f"attention: {count} unfused: {reason or 'unknown'}" for reason, count in reasons.items()]


def _manifest(checkpoint: Checkpoint, result: ExportResult) -> dict[str, Any]:
    bits = checkpoint.recipe
    # What is golden is long, and stands in the checkpoint beside.
    provenance = {key: value for key, value in checkpoint.provenance.items() if key != "golden"}
    return {
        "schema_version": SCHEMA_VERSION,
        "tool": TOOL,
        "tool_version": __version__,
        **environment(),
        "checkpoint": {"sha256": checkpoint.sha256, "provenance": provenance},
        "input": {"name": "images", "shape": ["batch", *checkpoint.preprocessing.input_size], "dtype": "float32"},
        "outputs": result.outputs,
        "preprocessing": checkpoint.preprocessing.to_dict(),
        "label_names": checkpoint.label_names,
        "precision": {
            "weights": f"INT{bits.weight_bits} storage; INT{bits.first_last_bits} in the first and last layer",
            "activations": (
                f"{bits.activation_bits}-bit grid, queries, keys and values {bits.matmul_bits}-bit; carried by INT4 "
                "or INT8 in the reference, by INT8 in TensorRT"
            ),
            "compute": "floating point in the reference; INT8 linears in TensorRT, proven per layer under engines",
        },
        "files": result.files,
        "int4_onnx_bytes": result.storage,
        "kernels": {
            name: {node: vars(kernel) for node, kernel in kernels.items()} for name, kernels in result.kernels.items()
        },
        "engines": {
            name: {
                **report.to_dict(),
                "precision": table.to_dict() if (table := result.precision.get(name)) else None,
            }
            for name, report in result.engines.items()
        },
        "problems": [{"exit_code": error.exit_code, "message": str(error)} for error in result.problems],
    }
