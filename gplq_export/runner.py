"""Running a plan on a GPU: on PyTorch's tensors where PyTorch is installed, else through pycuda.

    runner = Runner(Path("dist/model.trt-int4.plan"), cuda_graphs=True)
    logits = runner(images)["logits"]  # [B, C, H, W] on the GPU -> [B, classes] on the GPU

A plan is a program: it is run only if its SHA-256 is that in the manifest.json beside it, or the one given. It fits one
version of TensorRT and one kind of GPU; any other is refused in words, before or while it is loaded.

Importing this module needs neither TensorRT nor a GPU.
"""

import contextlib
import hashlib
import importlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gplq.errors import BuildError, MissingError, UsageError
from gplq_export.engine import Batch, log_recorder, optional_module
from gplq_export.manifest import MANIFEST, read_manifest

_ALIGNMENT = 256  # bytes; TensorRT reads and writes tensors from such addresses
_HEADER = 28  # bytes up to the version's end
_MAGIC = {b"ftrt": "TensorRT", b"vtrt": "TensorRT-RTX"}
_MODULES = {"TensorRT": ("tensorrt",), "TensorRT-RTX": ("tensorrt_rtx", "tensorrt_rtx_bindings")}
_EXTRAS = {"TensorRT": "gplq[trt]", "TensorRT-RTX": "gplq[trt-rtx]"}


@dataclass(frozen=True)
class PlanHeader:
    """Which builder made a plan: "TensorRT" or "TensorRT-RTX", and its version, such as "10.13.2.6"."""

    backend: str
    version: str


@dataclass(frozen=True)
class TensorSpec:
    """An input or output of a plan; the batch, dimension 0, is -1 if it may vary."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]


def read_header(plan: Path) -> PlanHeader:
    """Which builder made ``plan``, read from its first bytes; needs neither TensorRT nor a GPU.

    Raises:
        UsageError: the file is missing, empty, truncated or no plan.
    """
    if not plan.is_file():
        raise UsageError(f"{plan} is not a file")
    with plan.open("rb") as file:
        return _header(file.read(_HEADER), plan)


def _header(content: bytes, plan: Path) -> PlanHeader:
    backend = _MAGIC.get(content[:4])
    if backend is None or len(content) < _HEADER:
        raise UsageError(f"{plan} is no TensorRT plan, or it is truncated. 'gplq-export --trt' writes plans.")
    # major, minor, patch, build: one byte each, where NVIDIA's trtexec --getPlanVersionOnly looks for them.
    return PlanHeader(backend, ".".join(str(number) for number in content[24:28]))


def read_plan(plan: Path, sha256: str | None = None) -> bytes:
    """A plan's bytes, if they are the ones that were built.

    ``sha256``: what they must hash to, hexadecimal; None: what the manifest.json in the same folder says.

    Raises:
        UsageError: the file is missing, altered, no plan, or nothing readable says what it should hash to.
    """
    read_header(plan)  # says what is wrong in better words than a wrong hash would
    expected = sha256 or _from_manifest(plan)
    content = plan.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != expected.lower():
        raise UsageError(
            f"{plan} is not the plan that was built: its SHA-256 is {found[:16]}…, expected {expected[:16]}…. It was "
            "altered, damaged or replaced, and a plan is a program: not run. Export again."
        )
    return content


def _from_manifest(plan: Path) -> str:
    if not (plan.parent / MANIFEST).is_file():
        raise UsageError(
            f"{plan} has no {MANIFEST} beside it that says what its SHA-256 must be, and a plan is a program. Keep the "
            "two together, or pass the SHA-256 that you trust."
        )
    files = read_manifest(plan.parent)["files"]
    if plan.name not in files:
        raise UsageError(f"{plan.parent / MANIFEST} does not list {plan.name}: it is of another export.")
    return str(files[plan.name]["sha256"])


class Runner:
    """A plan, loaded and ready; for one input, the images, and any number of outputs. Not for several threads at once.

    Attributes:
        input: of the plan. ``outputs``: of the plan, by name.
        profiles: the ranges of the batch, (smallest, best, largest) each, for which the plan has kernels.
        memory: what holds the tensors, "PyTorch" or "pycuda".
    """

    def __init__(
        self,
        plan: Path,
        *,
        sha256: str | None = None,
        cuda_graphs: bool = False,
        version_compatible: bool = False,
        device: int = 0,
    ) -> None:
        """Load ``plan`` onto a GPU.

        Args:
            plan: what :func:`gplq_export.engine.build_engine` wrote.
            sha256: what it must hash to; None: what the manifest.json beside it says.
            cuda_graphs: launch all kernels at once, captured at the first call with each size of batch. With TensorRT
                this needs PyTorch; TensorRT-RTX has it built in.
            version_compatible: the plan was built so, and the code for the host that it then holds may run.
            device: index of the GPU.

        Raises:
            UsageError: the plan is missing, altered or no plan; or CUDA graphs are not possible here.
            MissingError: no GPU, no TensorRT of the plan's version, or the plan is for another kind of GPU.
        """
        content = read_plan(plan, sha256)
        header = _header(content, plan)
        trt = _runtime(header, plan, version_compatible)
        self._memory = _find_memory(device)
        self.memory = self._memory.name
        self._in_place = not cuda_graphs  # a graph reads from the address that it was captured with
        self._own_graphs = cuda_graphs and header.backend == "TensorRT"
        if self._own_graphs and not self._memory.captures:
            raise UsageError(
                "CUDA graphs with TensorRT need PyTorch, since pycuda cannot capture a stream: install it."
            )
        with self._memory.working():
            # Each of them must outlive those after it.
            self._log = log_recorder(trt)
            self._runtime = trt.Runtime(self._log)
            if version_compatible:
                self._runtime.engine_host_code_allowed = True
            self._engine = _deserialise(trt, self._runtime, self._log, content, plan)
            self._config = None
            if cuda_graphs and not self._own_graphs:
                self._config = self._engine.create_runtime_config()
                self._config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
                # Compile the kernels of a size of batch when it first comes, not some time after: they are captured.
                strategies = trt.DynamicShapesKernelSpecializationStrategy
                self._config.dynamic_shapes_kernel_specialization_strategy = strategies.EAGER
        self.input, self.outputs = _tensors(trt, self._engine, plan)
        self.profiles = _profiles(self._engine, self.input)
        largest = max(profile[2] for profile in self.profiles)
        with self._memory.working():
            self._buffers = {
                tensor.name: self._memory.empty((largest, *tensor.shape[1:]), tensor.dtype)
                for tensor in (self.input, *self.outputs.values())
            }
        self._contexts: dict[int, Any] = {}  # of a profile; of a batch if graphs are captured
        self._graphs: dict[int, Callable[[], None]] = {}

    def __call__(self, images: Any) -> dict[str, Any]:
        """Images [B, …] -> the outputs by name, on the GPU; they hold until the next call.

        An array on the GPU is read where it lies (with CUDA graphs: copied on the GPU, unless it is
        :meth:`input_buffer`); one in main memory is copied to the GPU. Returns before the GPU is done: whatever uses
        the outputs on PyTorch's current stream, or through pycuda, waits for them.

        Raises:
            UsageError: the shape or type is not the plan's, or the batch is outside of all profiles.
            BuildError: TensorRT failed; says how.
        """
        batch = self._check(images)
        with self._memory.working():
            address = _address(images)
            if address is None or address % _ALIGNMENT or not self._in_place:
                buffer = self._buffers[self.input.name][:batch]
                if address != _address(buffer):
                    self._memory.fill(buffer, images)
                address = _address(buffer)
            if self._own_graphs:
                if batch not in self._graphs:
                    self._graphs[batch] = self._capture(batch, address)
                self._graphs[batch]()
            else:
                self._enqueue(self._context(batch), batch, address)
        return {name: self._buffers[name][:batch] for name in self.outputs}

    def input_buffer(self, batch: int) -> Any:
        """Where to write ``batch`` images, so that nothing is copied; a PyTorch tensor or pycuda's GPUArray."""
        self._profile(batch)
        return self._buffers[self.input.name][:batch]

    def synchronize(self) -> None:
        """Wait until the GPU has done everything asked of this runner."""
        self._memory.synchronize()

    def _check(self, images: Any) -> int:
        shape, wanted = tuple(images.shape), self.input.shape
        if len(shape) != len(wanted) or shape[1:] != wanted[1:]:
            raise UsageError(f"images have the shape {list(shape)}, the plan takes {['batch', *wanted[1:]]}")
        found = str(images.dtype).removeprefix("torch.")
        if found != self.input.dtype.name:
            raise UsageError(f"images are {found}, the plan takes {self.input.dtype.name}")
        self._profile(shape[0])
        return int(shape[0])

    def _profile(self, batch: int) -> int:
        """The profile whose best batch is nearest."""
        fitting = [index for index, (low, _, high) in enumerate(self.profiles) if low <= batch <= high]
        if not fitting:
            ranges = ", ".join(f"{low} to {high}" for low, _, high in self.profiles)
            raise UsageError(f"a batch of {batch} is outside of what the plan was built for: {ranges}")
        return min(fitting, key=lambda index: abs(math.log(self.profiles[index][1] / batch)))

    def _context(self, batch: int) -> Any:
        """The execution context for a batch: one for each profile; one for each graph, which is bound to its state."""
        profile = self._profile(batch)
        key = batch if self._own_graphs else profile
        if key not in self._contexts:
            arguments = [] if self._config is None else [self._config]
            context = self._engine.create_execution_context(*arguments)
            if context is None or not context.set_optimization_profile_async(profile, self._memory.handle):
                raise self._failure("cannot create an execution context")
            self._memory.synchronize()
            for name in self.outputs:
                context.set_tensor_address(name, _address(self._buffers[name]))
            self._contexts[key] = context
        return self._contexts[key]

    def _enqueue(self, context: Any, batch: int, address: int | None) -> None:
        name = self.input.name
        done = (
            context.set_input_shape(name, (batch, *self.input.shape[1:]))
            and context.set_tensor_address(name, address)
            and context.execute_async_v3(self._memory.handle)
        )
        if not done:
            raise self._failure(f"cannot run a batch of {batch}")

    def _capture(self, batch: int, address: int | None) -> Callable[[], None]:
        context = self._context(batch)
        self._enqueue(context, batch, address)  # what is set up at the first run of a shape must not be captured
        self._memory.synchronize()
        replay: Callable[[], None] = self._memory.capture(lambda: self._enqueue(context, batch, address))
        return replay

    def _failure(self, what: str) -> BuildError:
        return BuildError(f"TensorRT {what}: {'; '.join(self._log.errors()[-3:]) or 'no reason given'}")


def _address(array: Any) -> int | None:
    """The address of a contiguous array on the GPU; None for any other."""
    interface = getattr(array, "__cuda_array_interface__", None)
    if interface is None:
        return None
    expected, step = [], np.dtype(interface["typestr"]).itemsize
    for size in reversed(interface["shape"]):
        expected.append(step)
        step *= size
    strides = interface.get("strides")
    contiguous = strides is None or tuple(strides) == tuple(reversed(expected))
    return int(interface["data"][0]) if contiguous else None


def _runtime(header: PlanHeader, plan: Path, version_compatible: bool) -> Any:
    """The module that runs a plan, in the plan's version."""
    trt = next(filter(None, map(optional_module, _MODULES[header.backend])), None)
    if trt is None:
        raise MissingError(
            f"{plan} was built by {header.backend} {header.version}, which is not installed: pip install "
            f"'{_EXTRAS[header.backend]}'"
        )
    if version_compatible and header.backend != "TensorRT":
        raise UsageError(f"{plan}: plans of {header.backend} are not version-compatible; leave that out")
    installed = str(trt.__version__)
    same = all(a == b for a, b in zip(installed.split("."), header.version.split("."), strict=False))
    if not (same or version_compatible):
        raise MissingError(
            f"{plan} was built by {header.backend} {header.version}, but {installed} is installed, and a plan runs on "
            "the version that built it alone. Install that one, or export again on this machine."
        )
    return trt


# What get_engine_validity() finds -> what to do.
_INVALID = {
    "VERSION_MISMATCH": "it was built by another version; export again with the installed one",
    "UNSUPPORTED_CC": "it was not built for this GPU; add the GPU to --sm",
    "OLD_CUDA_DRIVER": "the GPU's driver is too old for it; update the driver",
    "OLD_CUDA_RUNTIME": "the CUDA runtime is too old for it; update it",
    "INSUFFICIENT_GPU_MEMORY": "the GPU's memory is too small for it; build for smaller batches",
    "CUDA_ERROR": "CUDA does not work",
}


def _deserialise(trt: Any, runtime: Any, log: Any, content: bytes, plan: Path) -> Any:
    """The engine in a plan.

    Raises:
        UsageError: the plan is damaged.
        MissingError: it is not for this machine; says why.
    """
    if hasattr(runtime, "get_engine_validity"):  # TensorRT-RTX
        validity, diagnostics = runtime.get_engine_validity(content[: runtime.engine_header_size])
        if validity == trt.EngineValidity.INVALID:
            bits = trt.EngineInvalidityDiagnostics.__members__
            found = [name for name in bits if int(diagnostics) & int(bits[name])]
            if "MALFORMED_ENGINE" in found:
                raise UsageError(f"{plan} is damaged: {trt.__name__} cannot read it. Export again.")
            reasons = [_INVALID[name] for name in found] or log.errors() or ["no reason given"]
            raise MissingError(f"{plan} cannot run here: {'; '.join(reasons)}.")
    engine = runtime.deserialize_cuda_engine(content)
    if engine is not None:
        return engine
    reasons = "; ".join(log.errors()) or "no reason given"
    if "incompatible device" in reasons or "compute capability" in reasons:
        raise MissingError(f"{plan} was built for another kind of GPU; export again on this one. TensorRT: {reasons}")
    raise MissingError(f"{plan} cannot be loaded: {reasons}")


def _tensors(trt: Any, engine: Any, plan: Path) -> tuple[TensorSpec, dict[str, TensorSpec]]:
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    specs = [
        TensorSpec(name, tuple(engine.get_tensor_shape(name)), np.dtype(trt.nptype(engine.get_tensor_dtype(name))))
        for name in names
    ]
    inputs = [spec for spec in specs if engine.get_tensor_mode(spec.name) == trt.TensorIOMode.INPUT]
    if len(inputs) != 1 or any(-1 in spec.shape[1:] for spec in specs):
        raise UsageError(
            f"{plan} is not of an image model: it has {len(inputs)} inputs, or sizes other than the batch vary"
        )
    return inputs[0], {spec.name: spec for spec in specs if spec is not inputs[0]}


def _profiles(engine: Any, images: TensorSpec) -> tuple[Batch, ...]:
    if images.shape[0] != -1:
        return ((images.shape[0],) * 3,)
    shapes = [engine.get_tensor_profile_shape(images.name, index) for index in range(engine.num_optimization_profiles)]
    return tuple((low[0], best[0], high[0]) for low, best, high in shapes)


class _Torch:
    """GPU memory and a stream of PyTorch's."""

    name = "PyTorch"
    captures = True

    def __init__(self, torch: Any, device: int) -> None:
        self._torch, self._device = torch, torch.device("cuda", device)
        # TensorRT synchronises the whole device on the default stream.
        self._stream = torch.cuda.Stream(self._device)
        self.handle = self._stream.cuda_stream

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Behind all work on the caller's stream, and in front of all that follows there."""
        current = self._torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with self._torch.cuda.device(self._device), self._torch.cuda.stream(self._stream):
            yield
        current.wait_stream(self._stream)

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
        return self._torch.empty(shape, dtype=getattr(self._torch, dtype.name), device=self._device)

    def fill(self, buffer: Any, array: Any) -> None:
        buffer.copy_(self._torch.as_tensor(array), non_blocking=True)

    def capture(self, enqueue: Callable[[], None]) -> Callable[[], None]:
        graph = self._torch.cuda.CUDAGraph()
        with self._torch.cuda.graph(graph, stream=self._stream):
            enqueue()
        replay: Callable[[], None] = graph.replay
        return replay

    def synchronize(self) -> None:
        self._stream.synchronize()


class _PyCuda:
    """GPU memory and a stream of pycuda's, in the context that TensorRT uses, too."""

    name = "pycuda"
    captures = False

    def __init__(self, driver: Any, gpuarray: Any, device: int) -> None:
        self._gpuarray = gpuarray
        self._context = driver.Device(device).retain_primary_context()
        with self.working():
            self._stream = driver.Stream()  # waits for the default stream, and is waited for, as CUDA's streams are
        self.handle = self._stream.handle

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        self._context.push()
        try:
            yield
        finally:
            self._context.pop()

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
        return self._gpuarray.empty(shape, dtype)

    def fill(self, buffer: Any, array: Any) -> None:
        source = array if isinstance(array, self._gpuarray.GPUArray) else np.ascontiguousarray(array)
        buffer.set_async(source, stream=self._stream)

    def synchronize(self) -> None:
        with self.working():
            self._stream.synchronize()


def _find_memory(device: int) -> Any:
    """PyTorch's memory if it sees a GPU, else pycuda's.

    Raises:
        MissingError: neither does, or there is no GPU of that index.
    """
    torch = optional_module("torch")
    if torch is not None and torch.cuda.is_available():
        _check_device(device, torch.cuda.device_count())
        return _Torch(torch, device)
    driver = optional_module("pycuda.driver")
    if driver is None:
        raise MissingError(
            "running a plan needs an NVIDIA GPU with its driver, and PyTorch or pycuda (pip install 'gplq[pycuda]') to "
            "reach it; found none. The plan itself is fine: copy its folder to a machine with a GPU."
        )
    try:
        driver.init()
    except driver.Error as error:
        raise MissingError(f"running a plan needs an NVIDIA GPU with its driver: {error}") from error
    _check_device(device, driver.Device.count())
    return _PyCuda(driver, importlib.import_module("pycuda.gpuarray"), device)


def _check_device(device: int, count: int) -> None:
    if not 0 <= device < count:
        raise MissingError(f"there is no GPU {device}: this machine has {count}, counted from 0")
