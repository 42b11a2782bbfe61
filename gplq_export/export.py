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
      reports/parity.json     PyTorch against each of the first three, in its runtime
      reports/precision.*.txt what every linear and attention of an engine multiplies in
      reports/layers.svg      error and unequal codes, block by block           (with matplotlib)
      manifest.json           versions, hashes, bytes, precisions
"""

import itertools
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import onnx_ir as ir
from torch import Tensor

from gplq import __version__
from gplq.checkpoint import Checkpoint, integer_linears
from gplq.data import ImageSet
from gplq.errors import BuildError, GateError, MissingError, PrecisionError, UsageError
from gplq.files import sha256, write_json, write_text, writing_error
from gplq.provenance import environment
from gplq_export.engine import Backend, BuilderOptions, build_engine, find_builder
from gplq_export.inspect import storage
from gplq_export.kernels import Kernel, check_kernels, onnxruntime_kernels, openvino_kernels
from gplq_export.lowering import linear_nodes, lower
from gplq_export.overflow import OverflowReport, probe
from gplq_export.parity import ParityReport, compare
from gplq_export.plot import plot_layers
from gplq_export.precision import EngineReport, PrecisionTable, check_precision, precision_table
from gplq_export.promise import promise
from gplq_export.qdq import QdqGraph
from gplq_export.runtimes import Runtime, onnxruntime_optimised, openvino_optimised
from gplq_export.targets import TARGETS, Target
from gplq_export.trace import trace

MANIFEST_SCHEMA_VERSION = "2.0"
_TOOL = "gplq-export"
Say = Callable[[str], None]


@dataclass(frozen=True)
class _Deployment:
    """Where a deployment file runs: what opens it, what says which kernels it got, see :func:`compare` for ``ties``."""

    runtime: Runtime
    kernels: Callable[[Path], dict[str, Kernel]]
    ties: bool


_DEPLOYMENTS = {
    "cpu": _Deployment(onnxruntime_optimised, onnxruntime_kernels, ties=False),
    "openvino": _Deployment(openvino_optimised, openvino_kernels, ties=True),
}


@dataclass
class ExportResult:
    """What an export produced.

    Attributes:
        files: name -> {bytes, sha256}.
        storage: bytes of the INT4 file by what they hold.
        kernels: of each deployment file, what its multiplications run in on this CPU.
        parity: of the reference and of each deployment file, if images were given.
        engines: name -> report.
        precision: name -> what multiplies in which type in that engine, read back.
        ranges: name -> whether the floating point tensors of that engine fit into FP16.
        outputs: name, shape and dtype of each.
        linears: names of the nodes that the checkpoint's linears became.
        problems: what did not work out, most severe first; each an error with its exit code.
    """

    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    storage: dict[str, int] = field(default_factory=dict)
    parity: dict[str, ParityReport] = field(default_factory=dict)
    kernels: dict[str, dict[str, Kernel]] = field(default_factory=dict)
    engines: dict[str, EngineReport] = field(default_factory=dict)
    precision: dict[str, PrecisionTable] = field(default_factory=dict)
    ranges: dict[str, OverflowReport] = field(default_factory=dict)
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
        images: test images for the parity check, with labels or without; or batches, just as the model gets them.
        forced_images: so many of them for its teacher-forced part, and for all of it of deployment files.
        batch: smallest, most likely and largest batch of the engines.
        compute_capabilities: GPUs to build for, such as (86, 89); empty: the builder's default.
        options: what else to ask of the builder.
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
    with _folder(out) as folder:
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
        if images is not None:
            _prove(
                checkpoint, {name: models[name] for name in ("int4", *deployments)}, images, forced_images, result, say
            )
            _write_parity(result, folder, say)
        if built:
            _probe_ranges(dialect, built, images, result, say)
            settings = EngineSettings(batch, compute_capabilities, options or BuilderOptions())
            _build(folder, {name: models[name] for name in built}, settings, result, say)
        write_json(folder / "manifest.json", _manifest(checkpoint, result))
    result.problems.sort(key=lambda error: _SEVERITY.index(type(error)))
    return result


# Which error ends the command if there are several: wrong numbers first, an absent builder last.
_SEVERITY = [GateError, PrecisionError, BuildError, MissingError]


def _is_ours(out: Path) -> bool:
    """Whether a folder holds an earlier export, or nothing. Other tools write a manifest.json, too."""
    if not out.is_dir():
        return False
    try:
        manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return not any(out.iterdir())
    if not isinstance(manifest, dict) or manifest.get("tool") != _TOOL:
        return False
    written = {"manifest.json", "reports", *manifest.get("files", {})}
    for path in out.iterdir():
        # A checkpoint that was moved in here would be lost with the rest.
        if path.name not in written and not path.match("build.*.log"):
            raise UsageError(f"{path} was not written by gplq-export: --force would delete it. Move it elsewhere.")
    return True


class _folder:  # noqa: N801  a context manager that reads like a function
    """A folder that is filled under a temporary name and renamed when it is complete."""

    def __init__(self, out: Path) -> None:
        self.out = out

    def __enter__(self) -> Path:
        try:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self.temporary = Path(tempfile.mkdtemp(prefix=f".{self.out.name}.", suffix=".tmp", dir=self.out.parent))
            self.temporary.chmod(0o755)
        except OSError as error:
            raise writing_error(self.out, error) from error
        return self.temporary

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            shutil.rmtree(self.temporary, ignore_errors=True)
            if isinstance(error, OSError):
                raise writing_error(self.out, error) from error
            return
        old = self.temporary.with_suffix(".old")
        try:
            if self.out.exists():
                self.out.rename(old)
            self.temporary.rename(self.out)
            shutil.rmtree(old, ignore_errors=True)
        except OSError as failure:
            if old.exists() and not self.out.exists():
                old.rename(self.out)
            shutil.rmtree(self.temporary, ignore_errors=True)
            raise writing_error(self.out, failure) from failure


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
        kernels = result.kernels[name] = _DEPLOYMENTS[name].kernels(folder / f"model.{name}.onnx")
        check_kernels(kernels)
    except MissingError as error:
        say(f"kernels of model.{name}.onnx: skipped. {error}")
    except PrecisionError as error:
        say(f"model.{name}.onnx: {error}")
        result.problems.append(error)
    else:
        share = f"{sum(kernel.integer for kernel in kernels.values())} of {len(kernels)}"
        say(f"model.{name}.onnx: {share} multiplications run in 8-bit integers on this CPU (read back)")


def _prove(
    checkpoint: Checkpoint,
    models: dict[str, ir.Model],
    images: ImageSet | Sequence[Tensor],
    forced_images: int,
    result: ExportResult,
    say: Say,
) -> None:
    for name, model in models.items():
        settings: dict[str, Any] = {"forced_images": forced_images}
        if deployment := _DEPLOYMENTS.get(name):
            settings |= {"runtime": deployment.runtime, "ties": deployment.ties}
        try:
            chosen = _first(images, forced_images) if deployment else images
            parity = result.parity[name] = compare(checkpoint.model, model, chosen, **settings)
        except MissingError as error:
            say(f"parity of model.{name}.onnx: skipped. {error}")
            if error.args not in [other.args for other in result.problems]:
                result.problems.append(error)
            continue
        say(f"model.{name}.onnx against PyTorch: {parity.summary()}")
        if failures := parity.failures():
            result.problems.append(GateError(f"model.{name}.onnx: {'; '.join(failures)}"))


def _first(images: ImageSet | Sequence[Tensor], count: int) -> ImageSet | Sequence[Tensor]:
    """At least so many images, if there are."""
    if isinstance(images, ImageSet):
        return images.head(count)
    sizes = itertools.accumulate(map(len, images))
    return images[: sum(size < count for size in sizes) + 1]


def _write_parity(result: ExportResult, folder: Path, say: Say) -> None:
    if not result.parity:
        return
    reports = {name: parity.to_dict() for name, parity in result.parity.items()}
    write_json(folder / "reports" / "parity.json", {"schema_version": "2.0", **environment(), "files": reports})
    if "int4" in result.parity:
        pictures = (folder / "reports" / f"layers.{suffix}" for suffix in ("svg", "png"))
        if not plot_layers(result.parity["int4"], *pictures):
            say("picture: skipped, matplotlib is not installed (pip install 'gplq[report]')")


def _probe_ranges(
    dialect: ir.Model, names: Sequence[str], images: ImageSet | Sequence[Tensor] | None, result: ExportResult, say: Say
) -> None:
    """Whether what an FP16 engine computes fits into FP16, on a few images, before it is built."""
    if images is None:
        say("FP16 range: skipped, no images given (--data)")
        return
    for name in names:
        try:
            found = probe(lower(dialect, TARGETS[name](ir.DataType.FLOAT), {}), images)
        except MissingError as error:
            say(f"FP16 range: skipped. {error}")
            result.problems.append(error)
            return
        result.ranges[name] = found
        for text in (f"{name}: {found.summary()}", *(f"warning: {name}: {text}" for text in found.warnings())):
            say(text)
        if failures := found.failures():
            result.problems.append(GateError("; ".join(failures)))


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
    return {
        "schema_version": MANIFEST_SCHEMA_VERSION,
        "tool": _TOOL,
        "tool_version": __version__,
        **environment(),
        "checkpoint": {"sha256": checkpoint.sha256, "provenance": checkpoint.provenance},
        "input": {"name": "images", "shape": ["batch", *checkpoint.preprocessing.input_size], "dtype": "float32"},
        "outputs": result.outputs,
        "preprocessing": checkpoint.preprocessing.to_dict(),
        "label_names": checkpoint.label_names,
        "precision": {
            "weights": f"INT{bits.weight_bits} storage; INT{bits.first_last_bits} in the first and last layer",
            "activations": f"{bits.activation_bits}-bit grid; carried by INT4 in the reference, INT8 in TensorRT",
            "compute": "floating point in the reference; INT8 linears in TensorRT, proven per layer under engines",
        },
        "files": result.files,
        "int4_onnx_bytes": result.storage,
        "parity": {name: parity.to_dict() for name, parity in result.parity.items()},
        "kernels": {
            name: {node: vars(kernel) for node, kernel in kernels.items()} for name, kernels in result.kernels.items()
        },
        "engines": {
            name: {
                **report.to_dict(),
                "precision": table.to_dict() if (table := result.precision.get(name)) else None,
                "fp16_range": found.to_dict() if (found := result.ranges.get(name)) else None,
            }
            for name, report in result.engines.items()
        },
        "problems": [{"exit_code": error.exit_code, "message": str(error)} for error in result.problems],
    }
