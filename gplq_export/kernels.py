"""Which kernel each multiplication of a deployment file runs in, read back from the runtime that is to run it.

A file asks for integer arithmetic; whether it happens is decided by the runtime's optimiser, on the machine at hand,
and it says nothing if it does not. Here it is asked. The counterpart for TensorRT is :mod:`gplq_export.precision`.
"""

import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from gplq.errors import PrecisionError
from gplq_export.passes.common import constant, source
from gplq_export.runtimes import OPENVINO_OPTIONS, onnxruntime, openvino_core

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
# What OpenVINO executes: what multiplies, and what only moves elements on the way there.
_OPENVINO_MULTIPLIES = ("Convolution", "FullyConnected", "MatMul", "ScaledDotProductAttention", "Subgraph")
_OPENVINO_MOVES = ("Reorder", "Reshape", "Transpose")
# Why quantised factors are multiplied in floating point: the runtimes have no other kernels.
_FLOAT_OUTPUT = "ONNX Runtime convolves codes only where the output is quantised, too"
_NO_SIGN = "OpenVINO multiplies codes only where those of the second factor have a sign"


@dataclass(frozen=True)
class Kernel:
    """What a multiplication runs in.

    Attributes:
        kernel: the runtime's own name for it; empty if it does not say.
        integer: whether it multiplies 8-bit codes.
        promised: whether it has to: both factors are quantised, and the runtime has such a kernel.
        note: why it is not promised although both factors are quantised.
    """

    kernel: str
    integer: bool
    promised: bool
    note: str = ""


def onnxruntime_kernels(path: Path) -> dict[str, Kernel]:
    """Every multiplication of a file by name, as ONNX Runtime on this CPU will run it.

    Raises:
        MissingError: ONNX Runtime is not installed.
        PrecisionError: ONNX Runtime cannot load the file.
    """
    package = onnxruntime()
    options = package.SessionOptions()
    options.log_severity_level = 4  # it warns that the optimised file is for this machine only
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = str(Path(folder) / "optimised.onnx")
        try:
            package.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its errors have no base in common
            raise PrecisionError(f"ONNX Runtime cannot load {path.name}: {error}") from error
        optimised = ir.load(options.optimized_model_filepath).graph
    by_name = {node.name: node for node in optimised}
    by_output = {value.name: node for node in optimised for value in node.outputs}

    def find(node: ir.Node) -> tuple[str, bool]:
        # A fusion may have a name of its own, but returns the tensor that the last of its nodes did.
        found = by_name.get(node.name) or by_output.get(node.outputs[0].name)
        return ("", False) if found is None else (found.op_type, found.op_type in _INTEGER_OPERATORS)

    return _kernels(path, find, lambda node: _FLOAT_OUTPUT if node.op_type == "Conv" else "")


def openvino_kernels(path: Path) -> dict[str, Kernel]:
    """Every multiplication of a file by name, as OpenVINO on this CPU will run it.

    Raises:
        MissingError: OpenVINO is not installed.
        PrecisionError: OpenVINO cannot compile the file.
    """
    core = openvino_core()
    try:
        compiled = core.compile_model(path, "CPU", OPENVINO_OPTIONS)
    except RuntimeError as error:
        reason = next((line for line in str(error).splitlines() if not line.startswith("Exception from")), "")
        raise PrecisionError(f"OpenVINO cannot compile {path.name}: {reason}") from error
    primitives: dict[str, str] = {}
    for operation in compiled.get_runtime_model().get_ordered_ops():
        layer, primitive, names = _described(operation)
        if layer not in _OPENVINO_MULTIPLIES:
            continue
        for value in operation.input_values():
            # Its own name may be that of a scale it was merged with; what it multiplies still has the right one.
            names += _described(_moved(value.get_node()))[2]
        for name in names:
            known = name.partition("/")[0].removesuffix(".codes")
            primitives.setdefault(known, f"{layer} {primitive}")

    def find(node: ir.Node) -> tuple[str, bool]:
        factors = (source(value) for value in node.inputs[:2])
        names = [str(node.name), *(str(it.name).partition("/")[0] for it in factors if it is not None)]
        kernel = next((primitives[name] for name in names if name in primitives), "")
        return kernel, re.search(r"_[iu]8$", kernel, re.IGNORECASE) is not None

    return _kernels(path, find, _unsigned_second)


def _described(operation: Any) -> tuple[str, str, list[str]]:
    """An executed operation of OpenVINO: its type, what runs it, and the nodes that it was made of."""
    info = operation.get_rt_info()
    layer, primitive, names = (
        info[key].astype(str) if key in info else "" for key in ("layerType", "primitiveType", "originalLayersNames")
    )
    return layer, primitive, names.split(",") if names else [operation.get_friendly_name()]


def _moved(operation: Any) -> Any:
    """The operation that computes what another one gets, behind those that only move elements."""
    while operation.get_input_size() and _described(operation)[0] in _OPENVINO_MOVES:
        operation = operation.input_value(0).get_node()
    return operation


def _unsigned_second(node: ir.Node) -> str:
    """Why OpenVINO multiplies two activations in floating point, if it does."""
    quantize = source(node.inputs[1])
    low = None if quantize is None or quantize.op_type != "FakeQuantize" else constant(quantize.inputs[1])
    return _NO_SIGN if low is not None and low.min() >= 0 else ""


def check_kernels(kernels: dict[str, Kernel]) -> None:
    """Make sure that what is promised is multiplied in integers.

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


def _kernels(
    path: Path, find: Callable[[ir.Node], tuple[str, bool]], obstacle: Callable[[ir.Node], str]
) -> dict[str, Kernel]:
    """``find``: kernel, and whether it is one of integers; ``obstacle``: why the runtime has none of these."""
    found = {}
    for node in ir.load(path).graph:
        if node.op_type in _MULTIPLIES:
            quantised = node.op_type in _INTEGER_OPERATORS or all(map(_is_quantised, node.inputs[:2]))
            note = obstacle(node) if quantised else ""
            found[str(node.name)] = Kernel(*find(node), quantised and not note, note)
    return found


def _is_quantised(value: ir.Value | None) -> bool:
    node = source(value)
    return node is not None and node.op_type in ("DequantizeLinear", "FakeQuantize")


# By deployment file.
KERNELS: dict[str, Callable[[Path], dict[str, Kernel]]] = {"cpu": onnxruntime_kernels, "openvino": openvino_kernels}
