"""What the targets share: how graphs are written, and what a target has to say."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import ml_dtypes
import numpy as np
import onnx_ir as ir

from gplq.errors import UsageError
from gplq.grid import code_limits

Pass = Callable[[ir.Model], bool]

_NUMPY: dict[ir.DataType, Any] = {
    ir.DataType.INT4: ml_dtypes.int4,
    ir.DataType.UINT4: ml_dtypes.uint4,
    ir.DataType.INT8: np.int8,
    ir.DataType.FLOAT8E4M3FN: ml_dtypes.float8_e4m3fn,
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

    def node(
        self,
        op_type: str,
        inputs: list[ir.Value | None],
        name: str,
        output: str,
        *,
        domain: str = "",
        **attributes: Any,
    ) -> ir.Value:
        """One node with one output, of the standard domain if no other is given."""
        node = ir.node(op_type, inputs, attributes=attributes, domain=domain, name=name)
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
        return self.constant(name, in_float_type(array, self.float_type))

    def zero_point(self, code_type: ir.DataType) -> ir.Value:
        """The zero that names the type of codes; there are no others, all grids are symmetric."""
        return self.constant(f"zero_{code_type.name.lower()}", np.zeros((), _NUMPY[code_type]))


def in_float_type(array: np.ndarray, float_type: ir.DataType) -> np.ndarray:
    """``array`` in FP32 or FP16; beyond FP16's range infinite: the probe of the range says more than NumPy."""
    with np.errstate(over="ignore"):
        return array.astype(float_type.numpy())


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
    """How a target writes quantisers and weights.

    Attributes:
        float_type: of everything that is not quantised.
        quantizes: whether it writes quantisers at all.
        holds_codes: whether a quantiser's codes are a tensor of the graph; if not, codes * scale is.
        compute_capability: the lowest that a GPU must have for its types, such as 89; 0: any.
        passes: what the graph goes through once all quantisers and weights are written, in this order
            (:mod:`gplq_export.passes`).
    """

    name: ClassVar[str]
    float_type: ir.DataType = ir.DataType.FLOAT
    quantizes: ClassVar[bool] = True
    holds_codes: ClassVar[bool] = True
    compute_capability: ClassVar[int] = 0
    passes: ClassVar[tuple[Pass, ...]] = ()

    def __init__(self, float_type: ir.DataType | None = None) -> None:
        """``float_type``: another one than the target's own, to compare the same graph at that precision."""
        if float_type is not None:
            self.float_type = float_type

    def check_gpus(self, capabilities: Iterable[int]) -> None:
        """Raise a UsageError that names the compute capabilities, such as 86, that are too low for the target."""
        if low := sorted(each for each in capabilities if each < self.compute_capability):
            raise UsageError(
                f"{self.name} needs compute capability {self.compute_capability} or higher, for arithmetic in its "
                f"types, but {', '.join(map(str, low))} was asked for. Leave that out, or choose another target."
            )

    def quantizer(self, writer: GraphWriter, quantizer: Quantizer) -> ir.Value:
        """Write a quantiser; returns the tensor that its readers multiply."""
        raise NotImplementedError

    def weight(self, writer: GraphWriter, weight: Weight) -> ir.Value:
        """Write a weight; returns a floating point tensor [K, N], or [N, C, kh, kw] of a convolution."""
        raise NotImplementedError


def prepared(writer: GraphWriter, quantizer: Quantizer) -> ir.Value:
    """What a quantiser rounds: its input behind the shift and the factor, if it has them; [..., C]."""
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


def clipped(writer: GraphWriter, quantizer: Quantizer) -> ir.Value:
    """What a quantiser rounds, behind a Clip to its lowest and highest code: a type often holds more of them."""
    name = quantizer.name
    bounds = [
        writer.floating(f"{name}.{side}", np.asarray(code * quantizer.scale))
        for side, code in zip(("low", "high"), code_limits(quantizer.bits, quantizer.signed), strict=True)
    ]
    return writer.node("Clip", [prepared(writer, quantizer), *bounds], f"{name}/Clip", f"{name}.clipped")


def quantize_dequantize(writer: GraphWriter, quantizer: Quantizer, x: ir.Value, code_type: ir.DataType) -> ir.Value:
    """QuantizeLinear -> DequantizeLinear of ``x`` with the quantiser's one scale; its codes get their own name."""
    name = quantizer.name
    scale = writer.floating(f"{name}.scale", quantizer.scale)
    zero = writer.zero_point(code_type)
    codes = writer.node("QuantizeLinear", [x, scale, zero], f"{name}/QuantizeLinear", codes_name(name))
    return writer.node("DequantizeLinear", [codes, scale, zero], f"{name}/DequantizeLinear", f"{name}.dequantized")


def integer_weight(writer: GraphWriter, weight: Weight, code_type: ir.DataType) -> ir.Value:
    """DequantizeLinear of codes [K, N], or [N, C, kh, kw] of a convolution, with one scale an output channel."""
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
