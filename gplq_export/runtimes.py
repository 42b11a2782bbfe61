"""Where ONNX files run on a CPU: a serialised model -> a function from arrays by input name to its outputs in order.

That function, or what makes it, raises a UsageError if the runtime cannot run the model, or not on these arrays.
"""

import functools
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import onnx

from gplq.errors import BuildError, MissingError, UsageError
from gplq_export.onnx_file import printable

_LONGEST = 500  # characters of what a runtime says

Run = Callable[[dict[str, np.ndarray]], list[np.ndarray]]
Runtime = Callable[[bytes], Run]
OPENVINO_OPTIONS = {
    "INFERENCE_PRECISION_HINT": "f32",  # its own choice would be BF16 where the CPU has it
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,  # nor may it round to 8 bits what the graph leaves in floating point
}


def onnxruntime() -> Any:
    """The package.

    Raises:
        MissingError: it is not installed.
    """
    return package(
        "onnxruntime",
        "ONNX Runtime is not installed: pip install 'gplq[cpu]', or 'gplq[gpu]' on a machine with an NVIDIA GPU; "
        "never both, they share a folder.",
    )


@functools.cache
def openvino_core() -> Any:
    """OpenVINO's ``Core``, one for the life of the process.

    When the last one goes, the CPU plug-in is unloaded, but not the handlers that it has told the system to call on a
    fork: the next data loader with processes would crash.

    Raises:
        MissingError: OpenVINO is not installed.
    """
    return package("openvino", "OpenVINO is not installed: pip install 'gplq[openvino]'.").Core()


def package(name: str, otherwise: str) -> Any:
    """An optional package.

    Raises:
        MissingError: it is not installed; ``otherwise`` says how to.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingError(otherwise) from error


def onnxruntime_session(model: bytes | str, level: Literal["DISABLE_ALL", "ENABLE_BASIC", "ENABLE_ALL"]) -> Any:
    """An ONNX Runtime session on the CPU with that much of its graph optimisation.

    Raises:
        MissingError: ONNX Runtime is not installed. BuildError: it cannot load the model.
    """
    ort = onnxruntime()
    options = ort.SessionOptions()
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, f"ORT_{level}")
    options.log_severity_level = 3
    # Threads that wait actively take the time of whoever is next: PyTorch, or another session.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.enable_cpu_mem_arena = False  # it never gives memory back, and a check has a dozen sessions
    try:
        return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # a type of its own for each status code
        reason = printable(str(error) or type(error).__name__)[:_LONGEST]
        raise BuildError(f"ONNX Runtime {ort.__version__} cannot load the file: {reason}") from error


def reference_session(model: bytes | str) -> Any:
    """An :func:`onnxruntime_session` that runs the graph as it is written."""
    return onnxruntime_session(model, "DISABLE_ALL")


def onnxruntime_reference(model: bytes) -> Run:
    """ONNX Runtime on the CPU, which runs the graph as it is written; see :func:`reference_session`."""
    return _onnxruntime(model, "DISABLE_ALL")


def onnxruntime_optimised(model: bytes) -> Run:
    """ONNX Runtime on the CPU as anybody gets it; see :func:`onnxruntime_session`."""
    return _onnxruntime(model, "ENABLE_ALL")


def _onnxruntime(model: bytes, level: Literal["DISABLE_ALL", "ENABLE_ALL"]) -> Run:
    with _explained("ONNX Runtime"):
        session = onnxruntime_session(model, level)

    def run(feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        with _explained("ONNX Runtime"):
            return list(session.run(None, feeds))

    return run


def openvino_optimised(model: bytes) -> Run:
    """OpenVINO on the CPU; what is not quantised in FP32.

    Raises:
        MissingError: OpenVINO is not installed.
    """
    core = openvino_core()
    compiled: Any = None

    def run(feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        nonlocal compiled
        with _explained("OpenVINO"):
            if compiled is None:
                compiled = core.compile_model(core.read_model(_with_shapes(model, feeds)), "CPU", OPENVINO_OPTIONS)
            answers = compiled(feeds)
        return [np.array(answers[output]) for output in compiled.outputs]

    return run


@contextmanager
def _explained(runtime: str) -> Iterator[None]:
    """Whatever a runtime raises about a graph or its inputs, as an error of ours: theirs have no base in common."""
    try:
        yield
    except MissingError:
        raise
    except Exception as error:
        lines = [line for line in str(error).splitlines() if not line.startswith("Exception from")]
        reason = printable(" ".join(lines) or type(error).__name__)[:_LONGEST]
        raise UsageError(f"{runtime} cannot run the graph: {reason}") from error


def _with_shapes(model: bytes, feeds: dict[str, np.ndarray]) -> bytes:
    """A model whose inputs have the shapes of ``feeds`` but for the batch: OpenVINO has to know their ranks."""
    proto = onnx.load_from_string(model)
    for value in proto.graph.input:
        sizes = feeds[value.name].shape[1:]
        value.CopyFrom(onnx.helper.make_tensor_value_info(value.name, value.type.tensor_type.elem_type, [None, *sizes]))
    serialised: bytes = proto.SerializeToString()
    return serialised
