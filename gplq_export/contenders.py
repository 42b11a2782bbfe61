"""What ``gplq-export bench`` times: the files of an export and PyTorch, each loaded as it is meant to be run.

Each contender is opened with the same number of threads and becomes a function that runs it once.
"""

import importlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gplq.errors import BuildError, GplqError, UsageError
from gplq_export.manifest import exported, read_manifest
from gplq_export.runtimes import OPENVINO_OPTIONS, onnxruntime, openvino_core

_TORCH = {
    "torch": "PyTorch eager, the float model",
    "torch-compile": "torch.compile, the float model",
    "torch-quantised": "PyTorch eager, the integer model of the checkpoint",
}

Call = Callable[[], object]
Open = Callable[[int], Call]  # for a size of batch: what runs it once


@dataclass(frozen=True)
class Contender:
    """One back end with one file.

    Attributes:
        name: such as "cpu", "trt-int4.plan" or "torch". ``runs``: what runs it, and how.
        path: the file that it runs; the checkpoint for PyTorch.
        device: "cpu" or "gpu".
    """

    name: str
    path: Path
    runs: str
    device: str


@dataclass(frozen=True)
class Settings:
    """What holds for all contenders."""

    threads: int
    repeats: int
    seconds: float
    rounds: int | None
    input_shape: tuple[int, ...]


def baseline_of(contender: Contender) -> str:
    """The name of what a contender is compared with."""
    return "fp16.plan" if contender.device == "gpu" else "fp32"


def find_contenders(folder: Path, checkpoint: Path | None = None, only: Sequence[str] | None = None) -> list[Contender]:
    """What an exported folder and a checkpoint offer, baselines first.

    Raises:
        UsageError: a name in ``only`` is not among them.
    """
    found = []
    for name in sorted(read_manifest(folder)["files"]):
        path = folder / name
        stem = path.name.removeprefix("model.")
        if path.suffix == ".plan":
            found.append(Contender(stem, path, "TensorRT, CUDA graphs", "gpu"))
        elif path.suffix == ".onnx" and not stem.startswith("trt-"):  # those are read by the engine builder alone
            stem = stem.removesuffix(".onnx")
            found.append(Contender(stem, path, _RUNTIMES.get(stem, _RUNTIMES["fp32"]), "cpu"))
    if checkpoint is not None:
        device = "gpu" if _torch_sees_gpu() and any(contender.device == "gpu" for contender in found) else "cpu"
        how = "FP16 where it is float, on the GPU" if device == "gpu" else "FP32"
        found += [Contender(name, checkpoint, f"{text}, {how}", device) for name, text in _TORCH.items()]
    if only is not None:
        unknown = set(only) - {contender.name for contender in found}
        if unknown:
            names = ", ".join(contender.name for contender in found)
            raise UsageError(f"--only: there is no {', '.join(sorted(unknown))} here; there are {names}.")
        chosen = [contender for contender in found if contender.name in only]
        bases = {baseline_of(contender) for contender in chosen}
        found = [contender for contender in found if contender in chosen or contender.name in bases]
    return sorted(found, key=lambda contender: (contender.device, contender.name != baseline_of(contender)))


# How a file in ONNX is run: as it is made to be run.
_RUNTIMES = {
    "fp32": "ONNX Runtime, all optimisation",
    "int4": "ONNX Runtime, no optimisation",  # the reference; optimised, it is slower, and other numbers come out
    "openvino": "OpenVINO, FP32 where it is float",
}


def open_contender(contender: Contender, settings: Settings) -> Open:
    """Load a contender; its file must be that of the manifest beside it.

    Raises:
        UsageError: the file was altered.
        MissingError: what runs it is not on this machine.
        BuildError: what runs it cannot load it.
    """
    if contender.path.suffix == ".plan":
        return _open_plan(contender.path, settings)
    if contender.path.suffix != ".onnx":
        return _open_torch(contender, settings)
    exported(contender.path.parent, read_manifest(contender.path.parent), contender.path.name)
    open_file = _open_openvino if contender.name == "openvino" else _open_onnxruntime
    return open_file(contender, settings)


def _images(batch: int, settings: Settings) -> np.ndarray:
    """Noise: no back end is faster for some numbers than for others."""
    images: np.ndarray = np.random.default_rng(0).standard_normal((batch, *settings.input_shape), dtype=np.float32)
    return images


def _open_onnxruntime(contender: Contender, settings: Settings) -> Open:
    ort = onnxruntime()
    options = ort.SessionOptions()
    options.intra_op_num_threads = settings.threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Threads that wait actively would take the time of whoever is timed next.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if contender.name == "int4":
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    with _failing_as_build_error(contender):
        session = ort.InferenceSession(str(contender.path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def open_batch(batch: int) -> Call:
        feeds = {name: _images(batch, settings)}
        return lambda: session.run(None, feeds)

    return open_batch


def _open_openvino(contender: Contender, settings: Settings) -> Open:
    core = openvino_core()
    options = {
        **OPENVINO_OPTIONS,
        "INFERENCE_NUM_THREADS": settings.threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
    }
    with _failing_as_build_error(contender):
        request = core.compile_model(str(contender.path), "CPU", options).create_infer_request()

    def open_batch(batch: int) -> Call:
        images = _images(batch, settings)
        return lambda: request.infer([images])

    return open_batch


def _open_plan(plan: Path, settings: Settings) -> Open:
    from gplq_export.runner import Runner

    runner = Runner(plan, cuda_graphs=True)

    def open_batch(batch: int) -> Call:
        buffer = runner.input_buffer(batch)
        _fill(buffer, _images(batch, settings))

        def call() -> None:
            runner(buffer)
            runner.synchronize()

        return call

    return open_batch


def _fill(buffer: Any, images: np.ndarray) -> None:
    """Into a PyTorch tensor or pycuda's GPUArray."""
    if hasattr(buffer, "set"):
        buffer.set(images)
    else:
        buffer.copy_(importlib.import_module("torch").from_numpy(images))


def _open_torch(contender: Contender, settings: Settings) -> Open:
    import torch

    from gplq.checkpoint import load_checkpoint

    checkpoint = load_checkpoint(contender.path)
    if tuple(checkpoint.preprocessing.input_size) != settings.input_shape:
        size, theirs = list(checkpoint.preprocessing.input_size), list(settings.input_shape)
        raise UsageError(f"{contender.path} takes images of {size}, the export of {theirs}: not of one model")
    torch.set_num_threads(settings.threads)
    device = torch.device("cuda" if contender.device == "gpu" else "cpu")
    dtype = torch.float32
    model = checkpoint.model
    if contender.name != "torch-quantised":
        model = checkpoint.spec.build()  # with random weights: they take the same time
        dtype = torch.float16 if contender.device == "gpu" else dtype
    model = model.to(device, dtype)
    if contender.name == "torch-compile":
        model.compile(dynamic=False)

    def open_batch(batch: int) -> Call:
        images = torch.from_numpy(_images(batch, settings)).to(device, dtype)

        def call() -> None:
            with torch.inference_mode():
                model(images)
            if contender.device == "gpu":
                torch.cuda.synchronize()

        with _failing_as_build_error(contender):  # a compiler that is missing shows at the first call
            call()
        return call

    return open_batch


@contextmanager
def _failing_as_build_error(contender: Contender) -> Iterator[None]:
    """Libraries raise whatever they like for a file that they cannot run."""
    try:
        yield
    except (GplqError, KeyboardInterrupt):
        raise
    except Exception as error:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BuildError(f"{contender.path} does not run in {contender.runs}: {first_line}") from error


def peak_memory(contender: Contender, batch: int, settings: Settings) -> int | None:
    """Bytes that loading a contender and running one batch needs at most, in a process of its own; None if unknown."""
    fields = {**asdict(contender), "path": str(contender.path)}
    request = json.dumps({"contender": fields, "batch": batch, "settings": asdict(settings)})
    code = "from gplq_export.contenders import report_peak_memory; report_peak_memory()"
    done = subprocess.run([sys.executable, "-c", code], input=request, capture_output=True, text=True, check=False)
    return int(done.stdout) if done.returncode == 0 and done.stdout.strip().isdigit() else None


def report_peak_memory() -> None:
    """What the process of :func:`peak_memory` does: a request on standard input, bytes on standard output."""
    request = json.load(sys.stdin)
    settings = Settings(**{**request["settings"], "input_shape": tuple(request["settings"]["input_shape"])})
    contender = Contender(**{**request["contender"], "path": Path(request["contender"]["path"])})
    gpu = contender.device == "gpu"
    libraries = ["torch", "gplq.checkpoint"] if gpu or contender.name in _TORCH else ["onnxruntime"]
    for library in [*libraries, *(["openvino"] if contender.name == "openvino" else [])]:
        importlib.import_module(library)
    before = _gpu_memory() if gpu else _status("VmRSS")
    open_contender(contender, settings)(request["batch"])()
    after = _gpu_memory() if gpu else _status("VmHWM")
    if before is not None and after is not None:
        sys.stdout.write(str(after - before))


def _status(key: str) -> int | None:
    """Bytes of this process as Linux counts them; None elsewhere."""
    try:
        text = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in text.splitlines() if line.startswith(f"{key}:")), None)


def _gpu_memory() -> int:
    free, total = importlib.import_module("torch").cuda.mem_get_info()
    return int(total - free)


def _torch_sees_gpu() -> bool:
    return bool(importlib.import_module("torch").cuda.is_available())
