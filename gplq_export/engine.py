"""Building a TensorRT engine from an ONNX file, and proving at which precision each of its linears runs.

One code path for TensorRT 10 and 11 (needs an NVIDIA GPU) and TensorRT-RTX (builds on any machine). Rules it relies on:

- Strongly typed: the types in the ONNX file are the types in the engine; the builder picks kernels, never precisions.
- What the builder cannot express at the wanted type it silently computes in FP16 or FP32 instead, without a warning.
  So the precision is read back. With detailed profiling verbosity and a verbose logger the builder prints "Layers:" and
  one line for each engine layer with its tensors' types and the ONNX nodes in it, also on a machine without a GPU.
- Matrix multiplications appear as ``gemm`` (operands as stored, epilogue apart) or as a fusion ``__myl_<ops>Fc<ops>``
  whose operations before ``Fc`` convert the operands: a ``Cast`` there means that 8-bit operands are dequantised
  inside the kernel and multiplied in floating point, although the layer's inputs say Int8.

Importing this module needs no TensorRT.
"""

import contextlib
import hashlib
import importlib
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gplq.errors import BuildError, MissingError, PrecisionError, UsageError
from gplq.files import atomic_path, sha256, write_text
from gplq.progress import progress

# TensorRT's names for types, in either style of listing: "Datatype: Half" or "Row major linear FP16 format".
_DTYPES = {
    "int4": "INT4", "fp4e2m1": "FP4", "fp4": "FP4", "int8": "INT8", "fp8e4m3": "FP8", "fp8": "FP8",
    "half": "FP16", "fp16": "FP16", "bfloat16": "BF16", "bf16": "BF16", "float": "FP32", "fp32": "FP32",
}  # fmt: skip
_WIDTH = {name: rank for rank, name in enumerate(["INT4", "FP4", "INT8", "FP8", "FP16", "BF16", "FP32", "unknown"])}
_FLOATS = ("FP16", "BF16", "FP32")
_SHOWN_ERRORS = 10


@dataclass(frozen=True)
class Backend:
    """An importable builder that can build on this machine: "TensorRT" or "TensorRT-RTX", its version and module."""

    name: str
    version: str
    module: Any


@dataclass(frozen=True)
class EngineTensor:
    """An operand of an engine layer: builder's name, dtype ("INT8", "FP16", …) and shape, -1 where dynamic."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def is_matrix(self) -> bool:
        """Whether two dimensions or more are not 1: no scalar factor, scale or bias."""
        return sum(size != 1 for size in self.shape) > 1


@dataclass(frozen=True)
class EngineLayer:
    """One kernel of an engine, with the ONNX nodes that it computes wholly or in part."""

    name: str
    layer_type: str
    inputs: tuple[EngineTensor, ...]
    constants: tuple[EngineTensor, ...]
    outputs: tuple[EngineTensor, ...]
    onnx_nodes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Name, type, dtypes and nodes, ready for JSON."""
        dtypes = {key: [t.dtype for t in getattr(self, key)] for key in ("inputs", "constants", "outputs")}
        return {"name": self.name, "type": self.layer_type, **dtypes, "onnx_nodes": list(self.onnx_nodes)}


@dataclass(frozen=True)
class EngineReport:
    """What was built, from what, and what is in it. ``batch`` is (smallest, best tuned, largest)."""

    backend: str
    backend_version: str
    build_seconds: float
    plan_bytes: int
    plan_sha256: str
    onnx_sha256: str
    batch: tuple[int, int, int]
    compute_capabilities: tuple[int, ...]
    layers: tuple[EngineLayer, ...]

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        lists = {"batch": list(self.batch), "compute_capabilities": list(self.compute_capabilities)}
        return {**vars(self), **lists, "layers": [layer.to_dict() for layer in self.layers]}


def _import(name: str) -> Any | None:
    """A module, or None if it or a library that it loads is absent."""
    try:
        return importlib.import_module(name)
    except (ImportError, OSError):
        return None


def _gpu_usable() -> bool:
    """Whether CUDA works here; full TensorRT initialises it before it builds anything."""
    torch = _import("torch")
    return torch is not None and bool(torch.cuda.is_available())


def find_builder() -> Backend:
    """The builder for this machine: TensorRT with a GPU, else TensorRT-RTX, which builds without one.

    Raises:
        MissingError: neither can build here; says what to install.
    """
    why = "neither TensorRT nor TensorRT-RTX can be imported"
    if (trt := _import("tensorrt")) is not None:
        version = str(getattr(trt, "__version__", "unknown"))
        if version.split(".")[0] not in ("10", "11"):
            why = f"TensorRT {version} is installed, but version 10 or 11 is needed"
        elif not _gpu_usable():
            why = f"TensorRT {version} is installed, but it needs an NVIDIA GPU and driver to build and found none"
        else:
            return Backend("TensorRT", version, trt)
    # The wheels on PyPI ship only the second name.
    for name in ("tensorrt_rtx", "tensorrt_rtx_bindings"):
        if (trt := _import(name)) is not None and hasattr(trt, "Builder"):
            return Backend("TensorRT-RTX", str(trt.__version__), trt)
    raise MissingError(
        f"cannot build an engine: {why}. On a machine with an NVIDIA GPU: pip install 'gplq[trt]'; "
        "elsewhere: pip install 'gplq[trt-rtx]', which builds without a GPU."
    )


def _recorder(trt: Any) -> Any:
    """A logger that keeps every message with its severity, and remembers a request to cancel."""

    class Recorder(trt.ILogger):  # type: ignore[misc]  # the base class is only known at run time
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.messages: list[tuple[str, str]] = []
            self.cancelled = False

        def log(self, severity: Any, message: str) -> None:
            self.messages.append((severity.name, message))

        def errors(self) -> list[str]:
            """Error messages, without the lines about a missing GPU that TensorRT appends to unrelated errors."""
            texts = [text for severity, text in self.messages if severity in ("ERROR", "INTERNAL_ERROR")]
            return [" ".join(line for line in text.splitlines() if "cudaError" not in line) for text in texts]

    return Recorder()


def _progress(trt: Any, recorder: Any, bar: Any) -> Any:
    """A monitor that advances ``bar``, and the only way to stop a build: ``step_complete`` returns False."""

    class Progress(trt.IProgressMonitor):  # type: ignore[misc]  # the base class is only known at run time
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            bar.total += steps  # phases are nested, and known only when they begin
            bar.set_description(phase, refresh=False)

        def step_complete(self, phase: str, step: int) -> bool:
            bar.update()
            return not recorder.cancelled

        def phase_finish(self, phase: str) -> None: ...

    return Progress()


@contextlib.contextmanager
def _cancelled_by_ctrl_c(recorder: Any) -> Iterator[None]:
    """Turn Ctrl-C during a build into a clean cancellation: an exception inside a callback never reaches Python."""
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, lambda *_: setattr(recorder, "cancelled", True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if recorder.cancelled:
            raise KeyboardInterrupt


def _parse_onnx(backend: Backend, parser: Any, onnx_path: Path) -> None:
    """Parse from the file, so that external weights beside it are found; every refused node goes into the error."""
    if parser.parse_from_file(str(onnx_path)):
        return
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    lines = [
        f"  {error.node_name() or 'initialisers'} ({error.node_operator() or 'no operator'}): "
        + next(iter(error.desc().splitlines()), "no reason given")
        for error in errors[:_SHOWN_ERRORS]
    ]
    if len(errors) > _SHOWN_ERRORS:
        lines.append(f"  and {len(errors) - _SHOWN_ERRORS} more")
    listing = "\n".join(lines)
    raise BuildError(f"{backend.name} {backend.version} cannot parse {onnx_path}, {len(errors)} error(s):\n{listing}")


def _add_profile(builder: Any, network: Any, config: Any, batch: tuple[int, int, int]) -> None:
    """One optimisation profile: dimension 0 of each input ranges over ``batch``, all others are static."""
    profile, dynamic = builder.create_optimization_profile(), False
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        first, *rest = tuple(tensor.shape) or (None,)
        if first is None or -1 in rest:
            raise BuildError(
                f"input {tensor.name} has shape {tuple(tensor.shape)}; only dimension 0, the batch, may be dynamic. "
                "Export with fixed image size and channels."
            )
        if first == -1:
            dynamic = True
            profile.set_shape(tensor.name, *[(size, *rest) for size in batch])
        elif batch != (first, first, first):
            raise BuildError(
                f"input {tensor.name} has the fixed batch {first}, but the range {batch} was asked for. Export with a "
                f"dynamic batch, or build with batch=({first}, {first}, {first})."
            )
    if dynamic and config.add_optimization_profile(profile) < 0:
        raise BuildError(f"the builder refused the optimisation profile for batch {batch}")


def _set_capabilities(backend: Backend, config: Any, capabilities: tuple[int, ...]) -> None:
    """Target GPU generations, e.g. (86, 89). Only TensorRT-RTX builds for other GPUs than the one present."""
    if not capabilities:
        return
    if backend.name != "TensorRT-RTX":
        present = int("{}{}".format(*importlib.import_module("torch").cuda.get_device_capability()))
        if capabilities != (present,):
            raise UsageError(
                f"TensorRT builds for the GPU in this machine (SM{present}), not for {capabilities}; leave the compute "
                "capabilities out, build on the target, or use TensorRT-RTX."
            )
        return
    known = backend.module.ComputeCapability
    config.num_compute_capabilities = len(capabilities)
    for index, capability in enumerate(capabilities):
        if f"SM{capability}" not in known.__members__:
            choice = ", ".join(name[2:] for name in known.__members__ if name.startswith("SM"))
            raise UsageError(f"{backend.name} {backend.version} cannot target SM{capability}; it knows {choice}")
        config.set_compute_capability(known.__members__[f"SM{capability}"], index)


def _serialise(
    backend: Backend, recorder: Any, onnx_path: Path, batch: tuple[int, int, int], capabilities: tuple[int, ...]
) -> bytes:
    """Parse and build; the plan's bytes. The parser owns weights that the network points to: it lives until the end."""
    trt = backend.module
    # Version 11 and TensorRT-RTX are always strongly typed and ignore the flag.
    flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED) if backend.version.startswith("10.") else 0
    try:
        builder = trt.Builder(recorder)
    except TypeError as error:  # what the bindings raise if CUDA does not start; the reason is in the log
        raise MissingError(f"{backend.name} {backend.version} cannot start: {' '.join(recorder.errors())}") from error
    network = builder.create_network(flags)
    parser = trt.OnnxParser(network, recorder)
    _parse_onnx(backend, parser, onnx_path)
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    _add_profile(builder, network, config, batch)
    _set_capabilities(backend, config, capabilities)
    with progress(0, "build", "step") as bar:
        config.progress_monitor = monitor = _progress(trt, recorder, bar)
        plan = builder.build_serialized_network(network, config)
    del monitor, parser
    if plan is None:
        reasons = "\n  ".join(recorder.errors()[-_SHOWN_ERRORS:]) or "no reason given"
        raise BuildError(f"{backend.name} {backend.version} cannot build {onnx_path}:\n  {reasons}")
    return bytes(plan)


def build_engine(
    onnx_path: Path,
    plan_path: Path,
    *,
    batch: tuple[int, int, int] = (1, 8, 32),
    compute_capabilities: tuple[int, ...] = (),
    backend: Backend | None = None,
    log_path: Path | None = None,
) -> EngineReport:
    """Build ``plan_path`` from an ONNX file with explicit types, and read back what every engine layer computes in.

    ``batch``: smallest, best tuned and largest size of dimension 0. ``compute_capabilities``: e.g. (86, 89); empty
    means the builder's default (TensorRT: the GPU present; TensorRT-RTX: one portable plan from Ampere on).
    ``log_path``: gets the whole verbose log, also when the build fails. Both files are written atomically.

    Raises:
        MissingError: nothing can build here, or CUDA does not start.
        UsageError: an argument or a path is wrong.
        BuildError: a node is refused, the build fails, or the log has no layer listing.
    """
    backend = backend or find_builder()
    if not 1 <= batch[0] <= batch[1] <= batch[2]:
        raise UsageError(f"batch {batch} is not (smallest, best, largest) in ascending order, each at least 1")
    if not onnx_path.is_file():
        raise UsageError(f"{onnx_path} is not a file")
    onnx_hash, recorder, started = sha256(onnx_path), _recorder(backend.module), time.perf_counter()
    try:
        with _cancelled_by_ctrl_c(recorder):
            plan = _serialise(backend, recorder, onnx_path, batch, compute_capabilities)
        seconds = time.perf_counter() - started
        layers = parse_layers([message for _, message in recorder.messages])
        with atomic_path(plan_path) as temporary:
            temporary.write_bytes(plan)
    except BuildError as error:
        hint = f"the builder's log is {log_path}" if log_path else "pass a log path to keep the builder's log"
        raise BuildError(f"{error}\n{hint}") from error
    finally:
        if log_path:
            write_text(log_path, "".join(f"[{severity}] {message}\n" for severity, message in recorder.messages))
    return EngineReport(
        backend=backend.name,
        backend_version=backend.version,
        build_seconds=seconds,
        plan_bytes=len(plan),
        plan_sha256=hashlib.sha256(plan).hexdigest(),
        onnx_sha256=onnx_hash,
        batch=batch,
        compute_capabilities=compute_capabilities,
        layers=layers,
    )


def _dtype(text: str) -> str:
    """The type named in a "Datatype" or "Format/Datatype" field.

    >>> _dtype("Half"), _dtype("Thirty-two wide channel vectorized row major Int8 format"), _dtype("Bool")
    ('FP16', 'INT8', 'BOOL')
    """
    known = [_DTYPES[word] for word in re.findall(r"\w+", text.lower()) if word in _DTYPES]
    return known[-1] if known else text.strip().upper()


def _tensors(line: str, label: str) -> tuple[EngineTensor, ...]:
    """The tensors in ``label: [ { Name: …, Dimensions: […], …Datatype: … }, … ]``; none if the label is absent."""
    section = re.search(rf", {label}: \[\s*((?:\{{[^{{}}]*\}}(?:, )?)*)\]", line)
    fields = r"\{ Name: (.*?), (?:Location: \w+, )?Dimensions: \[([^\]]*)\].*?Datatype: ([^,}]+)"
    found = re.findall(fields, section[1]) if section else []
    return tuple(
        EngineTensor(name, _dtype(dtype), tuple(int(size) for size in re.findall(r"-?\d+", shape)))
        for name, shape, dtype in found
    )


def parse_layers(messages: Sequence[str]) -> tuple[EngineLayer, ...]:
    """The engine layers from the builder's log messages.

    The listing is one message: "Layers:", one line for each layer, an empty line, then the engine's inputs and outputs.

    Raises:
        BuildError: there is no listing, so nothing can be said about precision.
    """
    listings = [message.split("\n\n")[0] for message in messages if message.startswith("Layers:")]
    layers = []
    # Not splitlines(): nodes in the metadata may be separated by U+001E, at which it would split too.
    for line in "\n".join(listings).split("\n"):
        if head := re.match(r"Name: (.+?), LayerType: (\w+)", line):
            _, _, metadata = line.rpartition(", Metadata: ")
            inputs, constants, outputs = (_tensors(line, label) for label in ("Inputs", "Constants", "Outputs"))
            nodes = tuple(re.findall(r"\[ONNX Layer: ([^\]]*)", metadata))
            layers.append(EngineLayer(head[1], head[2], inputs, constants, outputs, nodes))
    if not layers:
        raise BuildError("the builder's log lists no engine layers, so the engine's precision cannot be proven")
    return tuple(layers)


def _prologue(layer: EngineLayer) -> str | None:
    """Operations that a fusion applies before its matrix multiplication; None if it multiplies no matrices.

    >>> [_prologue(EngineLayer(n, "", (), (), (), ())) for n in ("__myl_CastMulFc_myl0_3", "__myl_MulAdd_myl0_4")]
    ['CastMul', None]
    """
    found = re.match(r"__myl_([A-Za-z]*?)Fc", layer.name)
    return found[1] if found else None


def _running(layers: Sequence[EngineLayer], node: str) -> list[EngineLayer]:
    """The engine layers that do the multiplication of an ONNX MatMul or Gemm.

    A ``gemm`` carries the names of its nodes: "q+k+v_myl0_2" when siblings were merged. A fusion carries them only in
    its metadata, as do the kernels before and after it, which move or scale but do not multiply.
    """
    for layer in layers:
        if node in (name.strip() for name in re.sub(r"_myl\d+_\d+$", "", layer.name).split("+")):
            return [layer]
    return [
        layer
        for layer in layers
        if node in layer.onnx_nodes and (layer.layer_type == "gemm" or _prologue(layer) is not None)
    ]


def _precision(layer: EngineLayer) -> str:
    """The type in which a layer multiplies.

    Matrices: the first input, and whichever other input or constant is no scalar, scale or bias. The two factors have
    one type; a third matrix is a residual added afterwards, so a type that occurs twice is that of the factors.
    """
    if "Cast" in (_prologue(layer) or ""):
        floats = [t.dtype for t in (*layer.inputs, *layer.constants, *layer.outputs) if t.dtype in _FLOATS]
        return max(floats, key=_WIDTH.__getitem__, default="unknown")
    others = [tensor for tensor in (*layer.inputs[1:], *layer.constants) if tensor.is_matrix]
    counts = Counter(t.dtype if t.dtype in _WIDTH else "unknown" for t in (*layer.inputs[:1], *others))
    twice = [dtype for dtype, count in counts.items() if count > 1]
    return min(twice, key=_WIDTH.__getitem__) if twice else max(counts, key=_WIDTH.__getitem__, default="unknown")


def linear_precisions(layers: Sequence[EngineLayer], linears: Sequence[str]) -> dict[str, str]:
    """For each ONNX MatMul or Gemm node name, the type in which the engine multiplies its operands.

    "INT8", "FP8", "FP16", "BF16", "FP32", …; "missing" if no engine layer names the node; "unknown" if the builder does
    not say. Of several layers that share a node the widest counts.
    """
    running = {node: _running(layers, node) for node in linears}
    return {n: max(map(_precision, by), key=_WIDTH.__getitem__, default="missing") for n, by in running.items()}


def fused_attentions(layers: Sequence[EngineLayer]) -> tuple[str, ...]:
    """The operand type of each fused attention kernel; an unfused attention has none."""
    fused = [layer for layer in layers if "_mha" in layer.name and layer.inputs]
    return tuple(max((t.dtype for t in layer.inputs), key=lambda name: _WIDTH.get(name, 99)) for layer in fused)


# The lowering rules whose breach sends a linear to floating point without a word, and the remedies.
_ADVICE = {
    "missing": "No engine layer names it: give each MatMul and Gemm a unique node name, without '+' or ']', and see "
    "that it is not folded into a constant.",
    "unquantised": "Its weights reach it unquantised: connect a DequantizeLinear directly to the weight operand.",
    "fused qkv": "Likely a fused qkv with per-channel scales: the engine slices the weights, which the scales cannot "
    "follow. Export q, k and v as three MatMuls that share one quantised input.",
    "fp32 scales": "Likely FP32 weight scales or a Cast after the weights' DequantizeLinear: use FP16 scales and "
    "connect DequantizeLinear directly to the MatMul.",
    "reduction axis": "Likely weight scales along the reduction axis: quantise per output channel, axis=1 for a [K, N] "
    "weight of a MatMul, axis=0 for the [N, K] weight of a Gemm with transB=1.",
    "other": "Its weights are dequantised before the multiplication: check that QuantizeLinear and DequantizeLinear "
    "with one constant scale stand directly before its input, and that weights have one scale per output channel.",
}


def _broken_rule(layers: Sequence[EngineLayer], layer: EngineLayer | None) -> str:
    """The key in ``_ADVICE`` of the rule that a linear run by ``layer`` most likely breaks.

    Read off the kernel that holds the packed weights beside their scales: ``layer`` itself, or the one that feeds it.
    """
    if layer is None:
        return "missing"
    sources = {tensor.name for tensor in layer.inputs}
    feeding = [layer, *(other for other in layers if sources & {tensor.name for tensor in other.outputs})]
    packed = [it for it in feeding if any(t.is_matrix and t.dtype in ("INT4", "INT8", "FP8") for t in it.constants)]
    scales = [t for it in packed for t in it.constants if not t.is_matrix and len(t.shape) > 1]
    if not packed:
        return "unquantised"
    if any("Slic" in it.name for it in packed):
        return "fused qkv"
    if any(t.dtype == "FP32" for t in scales):
        return "fp32 scales"
    return "reduction axis" if any(t.shape[-1] == 1 for t in scales) else "other"


def check_precision(report: EngineReport, linears: Sequence[str], expected: str) -> None:
    """Require that every linear (ONNX node name) multiplies in ``expected``, e.g. "INT8".

    Raises:
        PrecisionError: one does not, or there is none to check; names the first, the likely rule broken and the remedy.
    """
    found = linear_precisions(report.layers, linears)
    wrong = [node for node, precision in found.items() if precision != expected]
    if found and not wrong:
        return
    if not found:
        raise PrecisionError(f"no linear was given to check for {expected}; a check of nothing proves nothing")
    counts = Counter(found.values())
    tally = ", ".join(f"{count} of {len(found)} at {precision}" for precision, count in counts.most_common())
    layer = max(_running(report.layers, wrong[0]), key=lambda it: _WIDTH[_precision(it)], default=None)
    by = f", in engine layer {layer.name} ({layer.layer_type})" if layer else ""
    raise PrecisionError(
        f"not all linears run at {expected}: {tally}. First: {wrong[0]} is {found[wrong[0]]}{by}. "
        f"{_ADVICE[_broken_rule(report.layers, layer)]}"
    )
