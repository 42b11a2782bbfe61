"""What each target gets for the dialect's quantisers and weights. A new target is one small class here.

    target      weights                          activations                          floats
    int4        INT4 + DequantizeLinear          INT4/UINT4 Quantize + Dequantize     FP32     portable, the reference
    trt-int4    INT4 + DequantizeLinear          Clip, then INT8 Quantize + Dequant.  FP16     TensorRT, TensorRT-RTX
    fp32, fp16  float                            none: the same network unquantised   FP32/16  for comparison

The 8-bit edges (patch embedding, classifier) are INT8 in both quantised targets. Weights are laid out [K, N], scales
one an output channel on axis 1 (those of convolutions [N, C, kh, kw], axis 0), never behind a Transpose or Cast:
TensorRT computes such a MatMul in floating point without telling.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import ml_dtypes
import numpy as np
import onnx_ir as ir

from gplq.grid import code_limits

_NUMPY: dict[ir.DataType, Any] = {
    ir.DataType.INT4: ml_dtypes.int4,
    ir.DataType.UINT4: ml_dtypes.uint4,
    ir.DataType.INT8: np.int8,
}


class GraphWriter:
    """Appends nodes and initialisers to a graph, each under a name that tells where it comes from."""

    def __init__(self, graph: ir.Graph, float_type: ir.DataType) -> None:
        self.graph = graph
        self.float_type = float_type
        self._anchor: ir.Node | None = None
        self._written: dict[str, ir.Value] = {}

    def at(self, anchor: ir.Node) -> "GraphWriter":
        """Insert what follows in front of ``anchor``."""
        self._anchor = anchor
        return self

    def node(self, op_type: str, inputs: list[ir.Value | None], name: str, output: str, **attributes: Any) -> ir.Value:
        """One node of the standard domain with one output."""
        node = ir.node(op_type, inputs, attributes=attributes, name=name)
        node.outputs[0].name = output
        assert self._anchor is not None
        self.graph.insert_before(self._anchor, node)
        return node.outputs[0]

    def constant(self, name: str, array: np.ndarray) -> ir.Value:
        """An initialiser; the same name gives the same one."""
        if name in self._written:
            return self._written[name]
        if name in self.graph.initializers:
            # The dialect's own tensor of that name; nothing reads it once its node is replaced.
            self.graph.initializers[name].name = f"{name}.replaced"
        value = ir.Value(
            name=name,
            const_value=ir.Tensor(np.array(array, order="C"), name=name),
            type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
            shape=ir.Shape(array.shape),
        )
        self.graph.register_initializer(value)
        self._written[name] = value
        return value

    def floating(self, name: str, array: np.ndarray) -> ir.Value:
        """A floating point initialiser of the graph's own type."""
        return self.constant(name, array.astype(self.float_type.numpy()))

    def zero_point(self, code_type: ir.DataType) -> ir.Value:
        """The zero that names the type of codes; there are no others, all grids are symmetric."""
        return self.constant(f"zero_{code_type.name.lower()}", np.zeros((), _NUMPY[code_type]))


@dataclass(frozen=True)
class Quantizer:
    """A Quantize node: ``x`` [..., C]; ``scale``: []; ``pre_shift``: [] or None; ``pre_scale``: [C] or None."""

    name: str
    x: ir.Value
    scale: np.ndarray
    pre_shift: np.ndarray | None
    pre_scale: np.ndarray | None
    bits: int
    signed: bool


@dataclass(frozen=True)
class Weight:
    """A Linear's or Conv's weight.

    ``codes``: int8 [N, K], or [N, C, kh, kw] of a convolution; ``scale``: [N]; ``pre_scale``: [K] of the quantiser
    before it, or None.
    """

    name: str
    codes: np.ndarray
    scale: np.ndarray
    bits: int
    pre_scale: np.ndarray | None

    def floating(self) -> np.ndarray:
        """What the codes stand for, for an input in front of ``pre_scale``; float32, the shape of ``codes``."""
        values: np.ndarray = self.codes.astype(np.float32) * self.scale.reshape(-1, *[1] * (self.codes.ndim - 1))
        return values if self.pre_scale is None else values * self.pre_scale


class Target:
    """How a target writes quantisers and weights."""

    name: ClassVar[str]
    float_type: ClassVar[ir.DataType] = ir.DataType.FLOAT
    quantizes: ClassVar[bool] = True

    def quantizer(self, writer: GraphWriter, quantizer: Quantizer) -> ir.Value:
        """Write a quantiser; returns the tensor that its readers multiply."""
        raise NotImplementedError

    def weight(self, writer: GraphWriter, weight: Weight) -> ir.Value:
        """Write a weight; returns a floating point tensor [K, N], or [N, C, kh, kw] of a convolution."""
        raise NotImplementedError


class Int4(Target):
    """Everything explicit in the standard's own 4-bit types: the portable file, and the reference for all others."""

    name = "int4"

    def quantizer(self, writer: GraphWriter, quantizer: Quantizer) -> ir.Value:
        """[Add ->] [Mul ->] QuantizeLinear -> DequantizeLinear."""
        code_type = ir.DataType.INT8
        if quantizer.bits <= 4:
            code_type = ir.DataType.INT4 if quantizer.signed else ir.DataType.UINT4
        x = _prepared(writer, quantizer)
        return _quantize_dequantize(writer, quantizer, x, code_type)

    def weight(self, writer: GraphWriter, weight: Weight) -> ir.Value:
        """INT4 (or INT8) initialiser -> DequantizeLinear."""
        return _integer_weight(writer, weight, ir.DataType.INT4 if weight.bits <= 4 else ir.DataType.INT8)


class TensorRTInt4(Int4):
    """INT4 weights in storage, 4-bit activations carried by INT8: TensorRT has no 4-bit integer arithmetic.

    The clamp to 16 levels is an explicit Clip in front of the INT8 QuantizeLinear, whose own range is wider. Scales are
    FP16, because a Cast between DequantizeLinear and MatMul would make TensorRT multiply in FP16.
    """

    name = "trt-int4"
    float_type = ir.DataType.FLOAT16

    def quantizer(self, writer: GraphWriter, quantizer: Quantizer) -> ir.Value:
        """[Add ->] [Mul ->] Clip -> QuantizeLinear -> DequantizeLinear."""
        x = _prepared(writer, quantizer)
        if quantizer.bits < 8:
            low, high = code_limits(quantizer.bits, quantizer.signed)
            bounds = [
                writer.floating(f"{quantizer.name}.{side}", np.asarray(code * quantizer.scale))
                for side, code in (("low", low), ("high", high))
            ]
            x = writer.node("Clip", [x, *bounds], f"{quantizer.name}/Clip", f"{quantizer.name}.clipped")
        return _quantize_dequantize(writer, quantizer, x, ir.DataType.INT8)

    def weight(self, writer: GraphWriter, weight: Weight) -> ir.Value:
        """As ``int4``; a convolution's in INT8, because TensorRT takes INT4 for matmuls only."""
        if weight.codes.ndim == 2:
            return super().weight(writer, weight)
        return _integer_weight(writer, weight, ir.DataType.INT8)


class Float32(Target):
    """The same network without quantisers: what the same engine costs, and computes, in floating point."""

    name = "fp32"
    quantizes = False

    def quantizer(self, writer: GraphWriter, quantizer: Quantizer) -> ir.Value:
        """Nothing: the input itself. A factor in front of the quantiser goes into the weight behind it."""
        return quantizer.x

    def weight(self, writer: GraphWriter, weight: Weight) -> ir.Value:
        """The weight that the codes stand for."""
        values = weight.floating()
        return writer.floating(f"{weight.name}.weight", values.T if values.ndim == 2 else values)


class Float16(Float32):
    """As :class:`Float32`, in FP16: the honest baseline of every speed claim."""

    name = "fp16"
    float_type = ir.DataType.FLOAT16


TARGETS: dict[str, Callable[[], Target]] = {cls.name: cls for cls in (Int4, TensorRTInt4, Float32, Float16)}


def _prepared(writer: GraphWriter, quantizer: Quantizer) -> ir.Value:
    name, x = quantizer.name, quantizer.x
    if quantizer.pre_shift is not None:
        x = writer.node(
            "Add", [x, writer.floating(f"{name}.pre_shift", quantizer.pre_shift)], f"{name}/Add", f"{name}.shifted"
        )
    if quantizer.pre_scale is not None:
        x = writer.node(
            "Mul", [x, writer.floating(f"{name}.pre_scale", quantizer.pre_scale)], f"{name}/Mul", f"{name}.scaled"
        )
    return x


def _quantize_dequantize(writer: GraphWriter, quantizer: Quantizer, x: ir.Value, code_type: ir.DataType) -> ir.Value:
    name = quantizer.name
    scale = writer.floating(f"{name}.scale", quantizer.scale)
    zero = writer.zero_point(code_type)
    codes = writer.node("QuantizeLinear", [x, scale, zero], f"{name}/QuantizeLinear", codes_name(name))
    return writer.node("DequantizeLinear", [codes, scale, zero], f"{name}/DequantizeLinear", f"{name}.dequantized")


def _integer_weight(writer: GraphWriter, weight: Weight, code_type: ir.DataType) -> ir.Value:
    linear = weight.codes.ndim == 2
    codes = (weight.codes.T if linear else weight.codes).astype(_NUMPY[code_type])
    inputs: list[ir.Value | None] = [
        writer.constant(f"{weight.name}.codes", codes),
        writer.floating(f"{weight.name}.weight_scale", weight.scale),
    ]
    return writer.node(
        "DequantizeLinear", inputs, f"{weight.name}/DequantizeLinear", f"{weight.name}.weight", axis=1 if linear else 0
    )


def codes_name(quantizer: str) -> str:
    """The name of the tensor that holds a quantiser's codes."""
    return f"{quantizer}.codes"
