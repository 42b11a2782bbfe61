"""Where deployment files run: a serialised model -> a function from arrays by input name to the outputs, in order."""

from typing import Any

import numpy as np
import onnx

from gplq.errors import MissingError
from gplq_export.parity import Run


def onnxruntime_optimised(model: bytes) -> Run:
    """ONNX Runtime on the CPU as anybody gets it, with all of its graph optimisation.

    Raises:
        MissingError: ONNX Runtime is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingError("ONNX Runtime is not installed: pip install 'gplq[cpu]'.") from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return lambda feeds: list(session.run(None, feeds))


def openvino_optimised(model: bytes) -> Run:
    """OpenVINO on the CPU; what is not quantised in FP32, where its own choice would be BF16.

    Raises:
        MissingError: OpenVINO is not installed.
    """
    try:
        import openvino
    except ImportError as error:
        raise MissingError("OpenVINO is not installed: pip install 'gplq[openvino]'.") from error
    compiled: Any = None

    def run(feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        nonlocal compiled
        if compiled is None:
            core = openvino.Core()
            compiled = core.compile_model(core.read_model(_with_shapes(model, feeds)), "CPU", OPENVINO_OPTIONS)
        answers = compiled(feeds)
        return [np.array(answers[output]) for output in compiled.outputs]

    return run


def _with_shapes(model: bytes, feeds: dict[str, np.ndarray]) -> bytes:
    """A model whose inputs have the shapes of ``feeds`` but for the batch: OpenVINO has to know their ranks."""
    proto = onnx.load_from_string(model)
    for value in proto.graph.input:
        sizes = feeds[value.name].shape[1:]
        value.CopyFrom(onnx.helper.make_tensor_value_info(value.name, value.type.tensor_type.elem_type, [None, *sizes]))
    serialised: bytes = proto.SerializeToString()
    return serialised


OPENVINO_OPTIONS = {"INFERENCE_PRECISION_HINT": "f32"}
