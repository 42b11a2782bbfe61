"""A view of any ONNX graph with QuantizeLinear and DequantizeLinear: what multiplies what, and quantised how.

Nothing here relies on names. A *linear* multiplies an activation with a constant weight, a *product* two activations;
an *attention* is a softmax between two products. Operators that only move values are looked through.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

# Where shapes cannot be inferred, onnx_ir logs a traceback; without them fewer rules can be judged, that is all.
logging.getLogger("onnx_ir").addHandler(logging.NullHandler())

STANDARD = ("", "ai.onnx")
_QDQ_DOMAINS = (*STANDARD, "com.microsoft", "trt")  # the last two had 4 bits before the standard had
LAYOUT = ("Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity")
ROUNDING = ("Clip", "Max", "Min", "Round", "Floor", "Ceil")
_SCORES = (*LAYOUT, "Add", "Sub", "Mul", "Div", "Where", "Cast")  # between q·kᵀ and softmax: scale, bias, mask
_PROBABILITIES = (*LAYOUT, *ROUNDING, "QuantizeLinear", "DequantizeLinear", "Cast", "Mul", "Div", "Add", "Dropout")
_PROJECTED = (*_PROBABILITIES, "Split", "Slice", "Gather", "LayerNormalization", "RMSNormalization", "Concat", "Neg")


def is_op(node: ir.Node | None, *op_types: str) -> bool:
    """Whether a node is one of the standard's ``op_types``."""
    return node is not None and node.domain in STANDARD and node.op_type in op_types


def is_quantize(node: ir.Node | None) -> bool:
    """Whether a node is a QuantizeLinear of any domain."""
    return node is not None and node.op_type == "QuantizeLinear" and node.domain in _QDQ_DOMAINS


def is_dequantize(node: ir.Node | None) -> bool:
    """Whether a node is a DequantizeLinear of any domain."""
    return node is not None and node.op_type == "DequantizeLinear" and node.domain in _QDQ_DOMAINS


def operand(node: ir.Node, index: int) -> ir.Value | None:
    """An input of a node; None if it is left out."""
    return node.inputs[index] if index < len(node.inputs) else None


def producer(value: ir.Value | None) -> ir.Node | None:
    """The node that computes a value; None for inputs and initialisers."""
    return None if value is None else value.producer()


def constant(value: ir.Value | None) -> np.ndarray | None:
    """The content of an initialiser or a Constant node, which a Cast or Identity may follow."""
    while value is not None and is_op(producer(value), "Cast", "Identity"):
        value = operand(value.producer(), 0)  # type: ignore[arg-type]  # is_op said that there is one
    tensor = None if value is None else _tensor(value)
    return None if tensor is None else tensor.numpy()


def _tensor(value: ir.Value) -> ir.TensorProtocol | None:
    node = value.producer()
    if node is not None and (node.op_type != "Constant" or len(node.attributes) != 1):
        return None
    return ir.convenience.get_const_tensor(value)


def code_type(node: ir.Node) -> ir.DataType:
    """The type of the codes that a Quantize or DequantizeLinear writes or reads."""
    if is_dequantize(node):
        codes = operand(node, 0)
        return codes.dtype if codes is not None and codes.dtype is not None else ir.DataType.UNDEFINED
    zero = operand(node, 2)
    if zero is not None and zero.dtype is not None:
        return zero.dtype
    return ir.DataType(node.attributes.get_int("output_dtype", 0) or ir.DataType.UINT8)


def scale_of(node: ir.Node) -> np.ndarray | None:
    """The constant scale of a Quantize or DequantizeLinear; None if it is computed."""
    return constant(operand(node, 1))


def channels(node: ir.Node) -> int:
    """The number of scales of a Quantize or DequantizeLinear if there is one for each index of an axis, else 1."""
    scale = scale_of(node)
    return scale.size if scale is not None and scale.ndim == 1 and not block_size(node) else 1


def block_size(node: ir.Node) -> int:
    """Elements that share a scale along the axis; 0 without blocks."""
    return node.attributes.get_int("block_size", 0) or 0


@dataclass(frozen=True)
class Dequantized:
    """What reaches an operand from a DequantizeLinear. ``between``: casts and layout, from the operand backwards."""

    node: ir.Node
    between: tuple[ir.Node, ...]

    @property
    def code_type(self) -> ir.DataType:
        """The type of the codes."""
        return code_type(self.node)


def dequantized(value: ir.Value | None) -> Dequantized | None:
    """The DequantizeLinear that a value comes from, through casts and layout only."""
    between = []
    node = producer(value)
    while node is not None and is_op(node, "Cast", *LAYOUT):
        between.append(node)
        node = producer(operand(node, 0))
    return Dequantized(node, tuple(between)) if node is not None and is_dequantize(node) else None


@dataclass(frozen=True)
class Linear:
    """A MatMul, Gemm or Conv of an activation and a weight. ``weight_index``: which operand is the weight."""

    node: ir.Node
    weight_index: int

    @property
    def weight(self) -> Dequantized | None:
        """Where the weight comes from; None if it is in floating point."""
        return dequantized(operand(self.node, self.weight_index))

    @property
    def activation(self) -> Dequantized | None:
        """Where the activation comes from; None if it is not quantised."""
        return dequantized(operand(self.node, 1 - self.weight_index))

    def scales_the_reduction(self) -> bool:
        """Whether the weight has one scale for each index that the multiplication sums over."""
        found = self.weight
        if found is None or channels(found.node) == 1:
            return False
        codes, axis = operand(found.node, 0), found.node.attributes.get_int("axis", 1) or 0
        rank = len(codes.shape) if codes is not None and codes.shape is not None else 0
        axis = axis + rank if axis < 0 else axis
        for node in reversed(found.between):
            if is_op(node, "Transpose"):
                axis = list(node.attributes.get_ints("perm") or range(rank)[::-1]).index(axis)
            elif not is_op(node, "Cast", "Identity"):
                return False  # a Reshape: not known
        if self.node.op_type == "Conv":
            return axis != 0
        transposed = self.node.op_type == "Gemm" and bool(self.node.attributes.get_int("transB", 0))
        return axis == (rank - 1 if transposed or self.weight_index == 0 else rank - 2)


@dataclass(frozen=True)
class Attention:
    """softmax(q·kᵀ)·v: ``qk`` and ``pv`` are the products, ``between`` stands from softmax to ``pv``."""

    qk: ir.Node
    softmax: ir.Node
    between: tuple[ir.Node, ...]
    pv: ir.Node

    @property
    def operands(self) -> dict[str, ir.Value | None]:
        """q, k, p and v as they are multiplied."""
        return dict(zip("qkpv", (*self.qk.inputs[:2], *self.pv.inputs[:2]), strict=True))

    @property
    def quantized(self) -> dict[str, Dequantized]:
        """Those of q, k, p and v that are quantised."""
        found = {name: dequantized(value) for name, value in self.operands.items()}
        return {name: source for name, source in found.items() if source is not None}

    def readers(self) -> list[ir.Node]:
        """What reads the output, behind casts and layout."""
        return behind(self.pv, (*LAYOUT, "Cast"))

    @property
    def head_dim(self) -> int | None:
        """The width of a head, if the shapes tell."""
        return next((size[-1] for size in map(_sizes, self.qk.inputs[:1]) if size and size[-1] is not None), None)

    @property
    def tokens(self) -> int | None:
        """The number of keys, if the shapes tell."""
        values = (self.qk.outputs[0], self.softmax.outputs[0])
        return next((size[-1] for size in map(_sizes, values) if size and size[-1] is not None), None)


class QdqGraph:
    """A model with what the rules ask about it; everything is found once."""

    def __init__(self, model: ir.Model) -> None:
        """``model`` gets the shapes and types that can be inferred."""
        self.contradictions = _infer(model)
        self.model = model
        self.nodes = list(model.graph.all_nodes())
        self._constants = self._find_constants()
        self.opset = max((model.opset_imports.get(domain, 0) for domain in STANDARD), default=0)

    def _find_constants(self) -> set[int]:
        """Identities of the values that are constants, or constants that were cast, moved or quantised."""
        found = {id(value) for graph in self.model.graphs() for value in graph.initializers.values()}
        for node in self.nodes:  # in their order, each behind those that it reads
            moved = is_quantize(node) or is_dequantize(node) or is_op(node, "Cast", *LAYOUT)
            if is_op(node, "Constant") or (moved and node.inputs and id(node.inputs[0]) in found):
                found.update(map(id, node.outputs))
        return found

    def is_constant(self, value: ir.Value | None) -> bool:
        """Whether a value is a constant that was at most cast, moved or quantised. Reads no tensor."""
        return id(value) in self._constants

    @cached_property
    def qdq(self) -> list[ir.Node]:
        """Every QuantizeLinear and DequantizeLinear."""
        return [node for node in self.nodes if is_quantize(node) or is_dequantize(node)]

    @cached_property
    def activation_quantizers(self) -> list[ir.Node]:
        """Every QuantizeLinear of something that is no constant."""
        return [node for node in self.qdq if is_quantize(node) and not self.is_constant(operand(node, 0))]

    @cached_property
    def linears(self) -> list[Linear]:
        """Every multiplication by a constant."""
        found = []
        for node in self.nodes:
            if is_op(node, "MatMul", "Gemm", "Conv"):
                weights = [index for index in (1, 0) if self.is_constant(operand(node, index))]
                if len(weights) == 1:
                    found.append(Linear(node, weights[0]))
        return found

    @cached_property
    def quantized(self) -> list[tuple[Linear, Dequantized, Dequantized]]:
        """The linears both of whose factors are quantised: linear, activation, weight."""
        pairs = [(linear, linear.activation, linear.weight) for linear in self.linears]
        return [(linear, x, weight) for linear, x, weight in pairs if x is not None and weight is not None]

    @cached_property
    def weight_only(self) -> list[tuple[Linear, Dequantized]]:
        """The linears of which only the weight is quantised: linear, weight."""
        pairs = [(linear, linear.weight) for linear in self.linears if linear.activation is None]
        return [(linear, weight) for linear, weight in pairs if weight is not None]

    @cached_property
    def attentions(self) -> list[Attention]:
        """Every softmax between two products."""
        return [attention for node in self.nodes if is_op(node, "Softmax") for attention in self._attention(node)]

    def _attention(self, softmax: ir.Node) -> Iterator[Attention]:
        qk = self._product_before(operand(softmax, 0))
        pv, between = softmax, []
        while not is_op(pv, "MatMul"):
            readers = pv.outputs[0].consumers()
            if len(readers) != 1 or readers[0].op_type not in ("MatMul", *_PROBABILITIES):
                return
            pv = readers[0]
            between.append(pv)
        if qk is not None:
            yield Attention(qk, softmax, tuple(between[:-1]), pv)

    def _product_before(self, value: ir.Value | None) -> ir.Node | None:
        """The product that a softmax normalises; what is scaled, biased or masked is searched in every input."""
        waiting, seen = [value], set[int]()
        while waiting:
            node = producer(waiting.pop())
            if node is None or id(node) in seen:
                continue
            seen.add(id(node))
            if is_op(node, "MatMul") and not any(map(self.is_constant, node.inputs)):
                return node
            if is_op(node, *_SCORES):
                waiting += reversed(node.inputs)
        return None

    def projections(self, attention: Attention) -> dict[str, tuple[ir.Node, bool]]:
        """The linears that q, k and v come from, as far as they are found; and whether a quantiser is on the way."""
        weighted = {id(linear.node) for linear in self.linears}
        found = {}
        for name, value in attention.operands.items():
            node, quantised = producer(value), False
            while node is not None and id(node) not in weighted and is_op(node, *_PROJECTED):
                quantised = quantised or is_quantize(node)
                inputs = [value for value in node.inputs if not self.is_constant(value)]
                node = producer(inputs[0]) if inputs else None
            if name != "p" and node is not None and id(node) in weighted:
                found[name] = node, quantised
        return found


def _infer(model: ir.Model) -> list[tuple[ir.Node, ir.Value, ir.DataType]]:
    """Infer shapes and types, in place; returns where the file states another type: node, output, stated type.

    Types are inferred anew: what a file states of a value in between is what a reader may rely on, not what it is. But
    what an operator outside the standard computes, the file alone can say.
    """
    nodes = [node for node in model.graph.all_nodes() if node.domain in STANDARD]
    outputs = [(node, value) for node in nodes for value in node.outputs]
    stated = [(node, value, value.type) for node, value in outputs if value.type is not None]
    for _, value, _ in stated:
        value.type = None
    ShapeInferencePass(check_type=False, strict_mode=False)(model)
    contradictions = []
    for node, value, type_ in stated:
        if value.dtype is not None and value.dtype != type_.dtype:
            contradictions.append((node, value, type_.dtype))
        if value.dtype is None:
            value.type = type_
    return contradictions


def behind(node: ir.Node, through: tuple[str, ...]) -> list[ir.Node]:
    """The nodes that read a node's first output, directly or through operators of ``through``."""
    waiting, seen, found = [node], set[int](), list[ir.Node]()
    while waiting:
        for reader in waiting.pop().outputs[0].consumers():
            if id(reader) in seen:
                continue
            seen.add(id(reader))
            (waiting if is_op(reader, *through) else found).append(reader)
    return found


def _sizes(value: ir.Value | None) -> list[int | None]:
    if value is None or value.shape is None:
        return []
    return [size if isinstance(size, int) else None for size in value.shape]
