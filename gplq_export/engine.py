"""Building a TensorRT engine from an ONNX file.

One code path for TensorRT 10 and 11 (needs an NVIDIA GPU) and TensorRT-RTX (builds on any machine). Strongly typed: the
types in the ONNX file are the types in the engine; the builder picks kernels, never precisions. What it cannot express
at the wanted type it silently computes in FP16 or FP32 instead, so the precision is read back
(:mod:`gplq_export.precision`).

Importing this module needs no TensorRT.
"""

import contextlib
import hashlib
import importlib
import re
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from gplq.errors import BuildError, MissingError, UsageError
from gplq.files import atomic_path, sha256, write_text
from gplq.progress import progress
from gplq_export.precision import EngineReport, parse_layers

_SHOWN_ERRORS = 10
_NO_REASON = "no reason given"
Batch = tuple[int, int, int]


@dataclass(frozen=True)
class BuilderOptions:
    """What can be asked of a builder besides shapes and GPUs. Each option takes effect or is refused by name.

    Attributes:
        workspace: most bytes of GPU memory that a kernel may use as scratch; None: all that the GPU has.
        profiles: further ranges of the batch, each as ``batch`` of :func:`build_engine` and with kernels of its own:
            the plan grows by about its own size for each.
        timing_cache: file of measured kernel times, read if it exists and written after the build. With the same cache
            the same kernels are chosen again. TensorRT only.
        optimization_level: 0 … 5, how long to look for kernels (TensorRT's default: 3). TensorRT only.
        version_compatible: the plan also runs on later versions, slower. It then holds code for the host, which whoever
            loads it must allow. TensorRT only.
        hardware: the plan also runs on other GPUs of the same compute capability, or on all from Ampere on, slower.
            TensorRT only.
    """

    workspace: int | None = None
    profiles: tuple[Batch, ...] = ()
    timing_cache: Path | None = None
    optimization_level: int | None = None
    version_compatible: bool = False
    hardware: Literal["same-capability", "ampere+"] | None = None

    def to_dict(self) -> dict[str, Any]:
        """The options that differ from their defaults, ready for JSON."""
        given = {name: value for name, value in asdict(self).items() if value != getattr(BuilderOptions(), name)}
        return {name: str(value) if isinstance(value, Path) else value for name, value in given.items()}


_HARDWARE = {"same-capability": "SAME_COMPUTE_CAPABILITY", "ampere+": "AMPERE_PLUS"}
# What TensorRT-RTX accepts and ignores, or refuses in words of its own.
_NOT_OF_RTX = {
    "timing_cache": "it measures no kernels while it builds, so there are no times to keep",
    "optimization_level": "it builds the same plan at every level",
    "version_compatible": "its plans run on the very version that built them",
    "hardware": "its plans are portable; name the GPUs by their compute capabilities",
}


@dataclass(frozen=True)
class Backend:
    """An importable builder that can build on this machine: "TensorRT" or "TensorRT-RTX", its version and module."""

    name: str
    version: str
    module: Any


def optional_module(name: str) -> Any | None:
    """A module, or None if it or a library that it loads is absent."""
    try:
        return importlib.import_module(name)
    except (ImportError, OSError):
        return None


def _gpu_usable() -> bool:
    """Whether CUDA works here; full TensorRT initialises it before it builds anything."""
    torch = optional_module("torch")
    return torch is not None and bool(torch.cuda.is_available())


def find_builder() -> Backend:
    """The builder for this machine: TensorRT with a GPU, else TensorRT-RTX, which builds without one.

    Raises:
        MissingError: neither can build here; says what to install.
    """
    why = "neither TensorRT nor TensorRT-RTX can be imported"
    if (trt := optional_module("tensorrt")) is not None:
        version = str(getattr(trt, "__version__", "unknown"))
        if version.split(".")[0] not in ("10", "11"):
            why = f"TensorRT {version} is installed, but version 10 or 11 is needed"
        elif not _gpu_usable():
            why = f"TensorRT {version} is installed, but it needs an NVIDIA GPU and driver to build and found none"
        else:
            return Backend("TensorRT", version, trt)
    # The wheels on PyPI ship only the second name.
    for name in ("tensorrt_rtx", "tensorrt_rtx_bindings"):
        if (trt := optional_module(name)) is not None and hasattr(trt, "Builder"):
            return Backend("TensorRT-RTX", str(trt.__version__), trt)
    raise MissingError(
        f"cannot build an engine: {why}. On a machine with an NVIDIA GPU: pip install 'gplq[trt]'; "
        "elsewhere: pip install 'gplq[trt-rtx]', which builds without a GPU."
    )


def log_recorder(trt: Any) -> Any:
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


def open_parser(backend: Backend, recorder: Any) -> tuple[Any, Any, Any]:
    """A builder, an empty network and its ONNX parser, all of which have to live as long as one of them is used.

    Raises:
        MissingError: CUDA does not start.
    """
    trt = backend.module
    # Version 11 and TensorRT-RTX are always strongly typed and ignore the flag.
    flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED) if backend.version.startswith("10.") else 0
    try:
        builder = trt.Builder(recorder)
    except TypeError as error:  # what the bindings raise if CUDA does not start; the reason is in the log
        raise MissingError(f"{backend.name} {backend.version} cannot start: {' '.join(recorder.errors())}") from error
    network = builder.create_network(flags)
    return builder, network, trt.OnnxParser(network, recorder)


def parse_errors(parser: Any, onnx_path: Path) -> list[tuple[str, str, str]]:
    """Parse from the file, so that external weights beside it are found.

    Returns:
        Name, operator and reason of every node that is refused; empty only if the file is parsed.
    """
    if parser.parse_from_file(str(onnx_path)):
        return []
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    refused = [(it.node_name(), it.node_operator(), next(iter(it.desc().splitlines()), _NO_REASON)) for it in errors]
    return refused or [("", "", _NO_REASON)]


def _parse_onnx(backend: Backend, parser: Any, onnx_path: Path) -> None:
    errors = parse_errors(parser, onnx_path)
    if not errors:
        return
    lines = [
        f"  {node or 'initialisers'} ({operator or 'no operator'}): {reason}"
        for node, operator, reason in errors[:_SHOWN_ERRORS]
    ]
    if len(errors) > _SHOWN_ERRORS:
        lines.append(f"  and {len(errors) - _SHOWN_ERRORS} more")
    listing = "\n".join(lines)
    raise BuildError(f"{backend.name} {backend.version} cannot parse {onnx_path}, {len(errors)} error(s):\n{listing}")


def _add_profile(builder: Any, network: Any, config: Any, batch: Batch) -> None:
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


def _check_options(backend: Backend, batch: Batch, options: BuilderOptions) -> None:
    for sizes in (batch, *options.profiles):
        if not 1 <= sizes[0] <= sizes[1] <= sizes[2]:
            raise UsageError(f"batch {sizes} is not (smallest, best, largest) in ascending order, each at least 1")
    if options.workspace is not None and options.workspace < 1:
        raise UsageError(f"a workspace of {options.workspace} bytes is none; give a positive number, or leave it out")
    if options.optimization_level not in (None, *range(6)):
        raise UsageError(f"there is no optimisation level {options.optimization_level}; choose 0 to 5")
    if backend.name != "TensorRT-RTX":
        return
    given = options.to_dict()
    if refused := [f"{name} ({reason})" for name, reason in _NOT_OF_RTX.items() if name in given]:
        raise UsageError(f"no effect on {backend.name} {backend.version}: {'; '.join(refused)}. Leave it out.")


def _apply(backend: Backend, config: Any, options: BuilderOptions) -> Any:
    """Set the options; returns the timing cache or None. It must live until the build is over."""
    trt = backend.module
    if options.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace)
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if options.hardware is not None:
        levels = trt.HardwareCompatibilityLevel.__members__
        if _HARDWARE[options.hardware] not in levels:  # the finer one is younger than version 10.0
            raise UsageError(f"{backend.name} {backend.version} cannot build for '{options.hardware}' hardware")
        config.hardware_compatibility_level = levels[_HARDWARE[options.hardware]]
    if options.timing_cache is None:
        return None
    content = options.timing_cache.read_bytes() if options.timing_cache.exists() else b""
    cache = config.create_timing_cache(content)
    if cache is None or not config.set_timing_cache(cache, False):
        raise UsageError(
            f"{options.timing_cache} is no timing cache of {backend.name} {backend.version} on this GPU. "
            "Name another file, or delete this one."
        )
    return cache


# The builder's words -> what to do. {0}, {1}: what the parentheses matched.
_REMEDIES = {
    r"Cannot compile for target\(s\) (.+?), because the model contains HW-specific datatypes: (\w+)": "These GPUs have "
    "no {1} arithmetic: {0}. Leave them out of the compute capabilities (FP8 needs 89 or newer, FP4 120, INT4 80), or "
    "choose another target.",
    r"no tactics to implement|[Cc]ould not find any implementation": "No kernel fits. Allow more workspace if you "
    "limited it; otherwise some node has shapes or types that no kernel takes.",
    r"[Oo]ut of memory|OutOfMemory": "The GPU's memory is full. Free some, or lower the largest batch.",
}


def _remedy(reasons: str) -> str:
    """A line that says what to do about a failed build, or nothing."""
    for pattern, advice in _REMEDIES.items():
        if found := re.search(pattern, reasons):
            return "\n" + advice.format(*found.groups())
    return ""


def _serialise(
    backend: Backend,
    recorder: Any,
    onnx_path: Path,
    batch: Batch,
    capabilities: tuple[int, ...],
    options: BuilderOptions,
) -> bytes:
    """Parse and build; the plan's bytes. The parser owns weights that the network points to: it lives until the end."""
    trt = backend.module
    builder, network, parser = open_parser(backend, recorder)
    _parse_onnx(backend, parser, onnx_path)
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    for profile in (batch, *options.profiles):
        _add_profile(builder, network, config, profile)
    _set_capabilities(backend, config, capabilities)
    cache = _apply(backend, config, options)
    with progress(0, "build", "step") as bar:
        config.progress_monitor = monitor = _progress(trt, recorder, bar)
        plan = builder.build_serialized_network(network, config)
    del monitor, parser
    if plan is None:
        reasons = "\n  ".join(recorder.errors()[-_SHOWN_ERRORS:]) or _NO_REASON
        raise BuildError(f"{backend.name} {backend.version} cannot build {onnx_path}:\n  {reasons}{_remedy(reasons)}")
    if cache is not None and options.timing_cache is not None:
        with atomic_path(options.timing_cache) as temporary:
            temporary.write_bytes(bytes(cache.serialize()))
    return bytes(plan)


def build_engine(
    onnx_path: Path,
    plan_path: Path,
    *,
    batch: Batch = (1, 8, 32),
    compute_capabilities: tuple[int, ...] = (),
    options: BuilderOptions | None = None,
    backend: Backend | None = None,
    log_path: Path | None = None,
) -> EngineReport:
    """Build ``plan_path`` from an ONNX file with explicit types, and read back what every engine layer computes in.

    ``batch``: smallest, best tuned and largest size of dimension 0. ``compute_capabilities``: e.g. (86, 89); empty
    means the builder's default (TensorRT: the GPU present; TensorRT-RTX: one portable plan from Ampere on, or from Ada
    on if it computes in FP8, which Ampere has not). ``options``: None for the defaults. ``log_path``: gets the whole
    verbose log, also when the build fails. All files are written atomically.

    Raises:
        MissingError: nothing can build here, or CUDA does not start.
        UsageError: an argument or a path is wrong, or an option has no effect on this builder.
        BuildError: a node is refused, the build fails, or the log has no layer listing.
    """
    backend, options = backend or find_builder(), options or BuilderOptions()
    _check_options(backend, batch, options)
    if not onnx_path.is_file():
        raise UsageError(f"{onnx_path} is not a file")
    onnx_hash, recorder, started = sha256(onnx_path), log_recorder(backend.module), time.perf_counter()
    try:
        with _cancelled_by_ctrl_c(recorder):
            plan = _serialise(backend, recorder, onnx_path, batch, compute_capabilities, options)
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
        options=options.to_dict(),
        layers=layers,
    )
