"""Which kernel each multiplication of a deployment file runs in, read back from the runtime that is to run it.

A file asks for integer arithmetic; whether it happens is decided by the runtime's optimiser, on the machine at hand,
and it says nothing if it does not. Here it is asked. The counterpart for TensorRT is :mod:`gplq_export.precision`.
"""

import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from gplq.errors import MissingError, PrecisionError
from gplq_export.passes.common import source
from gplq_export.runtimes import OPENVINO_OPTIONS

_MULTIPLIES = ("MatMul", "Gemm", "Conv", "MatMulIntegerToFloat")
_INTEGER_OPERATORS = (
    "ConvInteger",
    "DynamicQuantizeMatMul",
    "MatMulInteger",
    "MatMulIntegerToFloat",
    "QGemm",
    "QLinearConv",
    "QLinearMatMul",
)


@dataclass(frozen=True)
class Kernel:
    """What a multiplication runs in.

    Attributes:
        kernel: the runtime's own name for it; empty if it does not say.
        integer: whether it multiplies 8-bit codes.
        promised: whether the file asks for that: both factors are quantised.
    """

    kernel: str
    integer: bool
    promised: bool


def onnxruntime_kernels(path: Path) -> dict[str, Kernel]:
    """Every multiplication of a file by name, as ONNX Runtime on this CPU will run it.

    Raises:
        MissingError: ONNX Runtime is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingError("ONNX Runtime is not installed: pip install 'gplq[cpu]'.") from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # it warns that the optimised file is for this machine only
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = str(Path(folder) / "optimised.onnx")
        onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        optimised = ir.load(options.optimized_model_filepath).graph
    by_name = {node.name: node for node in optimised}
    by_output = {value.name: node for node in optimised for value in node.outputs}

    def find(node: ir.Node) -> tuple[str, bool]:
        # A fusion may have a name of its own, but returns the tensor that the last of its nodes did.
        found = by_name.get(node.name) or by_output.get(node.outputs[0].name)
        return ("", False) if found is None else (found.op_type, found.op_type in _INTEGER_OPERATORS)

    return _kernels(path, find)


def openvino_kernels(path: Path) -> dict[str, Kernel]:
    """Every multiplication of a file by name, as OpenVINO on this CPU will run it.

    Raises:
        MissingError: OpenVINO is not installed.
    """
    try:
        import openvino
    except ImportError as error:
        raise MissingError("OpenVINO is not installed: pip install 'gplq[openvino]'.") from error
    compiled = openvino.Core().compile_model(path, "CPU", OPENVINO_OPTIONS)
    primitives: dict[str, str] = {}
    for operation in compiled.get_runtime_model().get_ordered_ops():
        info = operation.get_rt_info()
        layer, primitive = (info[key].astype(str) for key in ("layerType", "primitiveType"))
        if layer in ("Const", "Transpose", "Reshape", "Reorder"):
            continue
        names = info["originalLayersNames"].astype(str).split(",")
        if layer == "FullyConnected":
            # Its own name may be that of a scale it was merged with; its weight still has the linear's.
            weight = operation.input_value(1).get_node()
            while weight.get_input_size():
                weight = weight.input_value(0).get_node()
            names.append(weight.get_friendly_name())
        for name in names:
            primitives.setdefault(name.partition("/")[0].removesuffix(".codes"), f"{layer} {primitive}")

    def find(node: ir.Node) -> tuple[str, bool]:
        kernel = primitives.get(str(node.name), "")
        return kernel, re.search(r"_[iu]8$", kernel, re.IGNORECASE) is not None

    return _kernels(path, find)


def check_kernels(kernels: dict[str, Kernel]) -> None:
    """Make sure that whatever a file quantises is multiplied in integers.

    Raises:
        PrecisionError: something is not; the message names the first, and says how many there are.
    """
    wrong = [name for name, kernel in kernels.items() if kernel.promised and not kernel.integer]
    if wrong:
        kernel = kernels[wrong[0]].kernel or "no kernel that it names"
        promised = sum(kernel.promised for kernel in kernels.values())
        raise PrecisionError(
            f"{len(wrong)} of {promised} multiplications do not run in integers on this CPU, the first is {wrong[0]} "
            f"({kernel}). The runtime's optimiser did not recognise them: results are right, but slower than in FP32. "
            "Update the runtime, and leave its graph optimisation on and the batch size dynamic."
        )


def _kernels(path: Path, find: Callable[[ir.Node], tuple[str, bool]]) -> dict[str, Kernel]:
    found = {}
    for node in ir.load(path).graph:
        if node.op_type in _MULTIPLIES:
            promised = node.op_type in _INTEGER_OPERATORS or all(map(_is_quantised, node.inputs[:2]))
            found[str(node.name)] = Kernel(*find(node), promised)
    return found


def _is_quantised(value: ir.Value | None) -> bool:
    node = source(value)
    return node is not None and node.op_type in ("DequantizeLinear", "FakeQuantize")
