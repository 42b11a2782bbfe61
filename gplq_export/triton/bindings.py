"""What goes into a network and comes out of it, in Triton's words; read from the file, or from its sidecar."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from gplq.errors import UsageError
from gplq_export.onnx_file import read_onnx
from gplq_export.qdq import is_dequantize, is_quantize

_TYPES = {
    ir.DataType.BOOL: "TYPE_BOOL",
    ir.DataType.UINT8: "TYPE_UINT8",
    ir.DataType.UINT16: "TYPE_UINT16",
    ir.DataType.UINT32: "TYPE_UINT32",
    ir.DataType.UINT64: "TYPE_UINT64",
    ir.DataType.INT8: "TYPE_INT8",
    ir.DataType.INT16: "TYPE_INT16",
    ir.DataType.INT32: "TYPE_INT32",
    ir.DataType.INT64: "TYPE_INT64",
    ir.DataType.FLOAT16: "TYPE_FP16",
    ir.DataType.FLOAT: "TYPE_FP32",
    ir.DataType.DOUBLE: "TYPE_FP64",
    ir.DataType.STRING: "TYPE_STRING",
    ir.DataType.BFLOAT16: "TYPE_BF16",
}


@dataclass(frozen=True)
class TensorInfo:
    """A tensor: ``dtype`` as Triton names it, such as "TYPE_FP32"; ``shape`` with the batch, -1 where it may vary."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Bindings:
    """Inputs and outputs of a file, in its order, and whether it holds quantised numbers."""

    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    quantised: bool

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "inputs": [{**vars(tensor), "shape": list(tensor.shape)} for tensor in self.inputs],
            "outputs": [{**vars(tensor), "shape": list(tensor.shape)} for tensor in self.outputs],
            "quantised": self.quantised,
        }

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "Bindings":
        """Inverse of :meth:`to_dict`. Raises LookupError, TypeError or ValueError for anything else."""
        inputs, outputs = (
            tuple(
                TensorInfo(str(it["name"]), str(it["dtype"]), tuple(int(size) for size in it["shape"]))
                for it in content[key]
            )
            for key in ("inputs", "outputs")
        )
        return cls(inputs, outputs, bool(content["quantised"]))


def onnx_bindings(path: Path) -> Bindings:
    """Of an ONNX file.

    Raises:
        UsageError: the file is missing or damaged, or it has an input or output that Triton cannot carry.
    """
    model = read_onnx(path)
    constants = model.graph.initializers
    inputs = [value for value in model.graph.inputs if value.name not in constants]
    return Bindings(
        tuple(_tensor(value, path) for value in inputs),
        tuple(_tensor(value, path) for value in model.graph.outputs),
        any(is_quantize(node) or is_dequantize(node) for node in model.graph.all_nodes()),
    )


def _tensor(value: ir.Value, path: Path) -> TensorInfo:
    dtype = None if value.dtype is None else _TYPES.get(value.dtype)
    if dtype is None or value.shape is None:
        found = "no type or shape" if value.dtype is None or value.shape is None else f"type {value.dtype.name}"
        raise UsageError(f"{path}: tensor '{value.name}' has {found}, which Triton cannot serve.")
    return TensorInfo(str(value.name), dtype, tuple(size if isinstance(size, int) else -1 for size in value.shape))
