"""What an ONNX file promises of an engine that is built from it: the precision of everything that multiplies.

An attention becomes one kernel if it keeps these rules of the builder (all observed with TensorRT-RTX 1.7):

    INT8    q, k, v, the probabilities and the output quantised to INT8; heads of 16, 32 or 64; 2 to 512 tokens
    FP8     q, k, v and the probabilities quantised to FP8; heads of 16 to 256; 32 to 2048 tokens
    FP16    nothing quantised; heads of 16 to 256; 2 to 2048 tokens
    all     nothing between softmax and the quantiser of the probabilities; biases and masks constant; more than one
            head or window; values as wide as queries and keys

A single query is fused in INT8 in some shapes only, which is why nothing is promised of it.
"""

from collections.abc import Collection, Sequence

import onnx_ir as ir

from gplq.errors import BuildError
from gplq_export import qdq
from gplq_export.lint_rules import MHA_HEAD_DIMS, MHA_TOKENS
from gplq_export.passes.common import constant
from gplq_export.precision import ANY, Attention, Multiplication, Promise
from gplq_export.qdq import LAYOUT, Linear, QdqGraph, code_type, is_op, is_quantize
from gplq_export.targets.base import Target

_NAMES = {
    ir.DataType.FLOAT8E4M3FN: "FP8",
    ir.DataType.FLOAT16: "FP16",
    ir.DataType.BFLOAT16: "BF16",
    ir.DataType.FLOAT: "FP32",
}
_HEADS = {"INT8": MHA_HEAD_DIMS, "FP8": range(16, 257), "FP16": range(16, 257)}
_TOKENS = {"INT8": range(2, MHA_TOKENS + 1), "FP8": range(32, 2049), "FP16": range(2, 2049)}


def promise(model: ir.Model, target: Target, linears: Sequence[str]) -> Promise:
    """Everything that multiplies in ``model``, which stays as it is, as ``target`` wrote it.

    ``linears``: names of the nodes that the checkpoint's linears became; the precision of all of them is promised.
    What the checkpoint itself leaves in floating point is looked up, too, but may run in any kernel.

    Raises:
        BuildError: one of ``linears`` is not there, or not quantised by a target that quantises; or a target that is to
            multiply in FP8 finds nothing that fits there.
    """
    graph = QdqGraph(model.clone())
    floating = _name(target.float_type)
    weighted = {id(linear.node): _linear(linear, floating, linears) for linear in graph.linears}
    products = {
        id(node): _product(node, floating)
        for node in graph.nodes
        if is_op(node, "MatMul") and not any(map(graph.is_constant, node.inputs))
    }
    found = weighted | products
    multiplications = [found[id(node)] for node in graph.nodes if id(node) in found]
    kept = {it.node for it in multiplications if it.compute == floating} if target.quantizes else set()
    if lost := [name for name in linears if name in kept or name not in {it.node for it in multiplications}]:
        raise BuildError(
            f"the {target.name} graph does not multiply {lost[0]} in integers, and {len(lost) - 1} other linears. This "
            "is a defect of gplq; please report it."
        )
    if target.compute_capability >= 89 and not any(it.compute == "FP8" for it in multiplications):
        raise BuildError(
            f"{target.name}: no linear of this checkpoint has codes that fit FP8 (up to 16, on both sides). Use the "
            "INT8 target, or quantise weights and activations to 4 bits."
        )
    known = {id(attention.softmax): attention for attention in graph.attentions}
    attentions = [
        _attention(known[id(node)], floating)
        if id(node) in known
        else Attention(str(node.name), (), floating, "its softmax does not stand between two products of activations")
        for node in graph.nodes
        if is_op(node, "Softmax")
    ]
    return Promise(tuple(multiplications), tuple(attentions))


def _name(data_type: ir.DataType) -> str:
    return _NAMES.get(data_type, data_type.name)


def _linear(linear: Linear, floating: str, promised: Collection[str]) -> Multiplication:
    weight, x = linear.weight, linear.activation
    storage = _name(weight.code_type) if weight else floating
    carrier = _name(x.code_type) if x else floating
    # INT4 weights are unpacked to the type of what they are multiplied with.
    compute = carrier if weight and x and storage in (carrier, "INT4") else floating
    name = str(linear.node.name)
    return Multiplication(name, "linear", storage, carrier, compute if name in promised else ANY)


def _product(node: ir.Node, floating: str) -> Multiplication:
    operands = [qdq.dequantized(value) for value in node.inputs]
    carriers = {_name(it.code_type) if it else floating for it in operands}
    carrier = "+".join(sorted(carriers))
    return Multiplication(
        str(node.name), "product", carrier, carrier, carrier if carriers.isdisjoint({floating}) else ANY
    )


def _attention(attention: qdq.Attention, floating: str) -> Attention:
    products = str(attention.qk.name), str(attention.pv.name)
    types = {_name(it.code_type) for it in attention.quantized.values()}
    if len(attention.quantized) < 4:
        types.add(floating)
    parts = [name.split(".") for name in products]
    shared = [part for part, other in zip(*parts, strict=False) if part == other]
    carrier = "+".join(sorted(types))
    return Attention(".".join(shared) or products[0], products, carrier, _obstacle(attention, carrier))


def _obstacle(attention: qdq.Attention, carrier: str) -> str | None:
    """The first rule of the builder that an attention breaks."""
    between = [
        node.op_type for node in attention.between if not is_op(node, "QuantizeLinear", "DequantizeLinear", *LAYOUT)
    ]
    if "+" in carrier:
        quantised = ", ".join(attention.quantized)
        return f"only {quantised} of q, k, p and v are quantised, or to several types: all or none of them must be"
    if carrier == "FP32":
        return "engines fuse attentions in INT8, FP8 and FP16, not in FP32"
    if attention.head_dim is not None and attention.head_dim not in _HEADS.get(carrier, ()):
        return f"heads of {attention.head_dim}; {carrier} has kernels for {_span(_HEADS.get(carrier, ()))}"
    if attention.tokens is not None and attention.tokens not in _TOKENS.get(carrier, ()):
        return f"{attention.tokens} tokens; {carrier} has kernels for {_span(_TOKENS.get(carrier, ()))}"
    scores, width = attention.qk.outputs[0].shape, _value_dim(attention)
    if scores is not None and all(size == 1 for size in scores[1:-2]):
        return "a single head; there are kernels for more"
    if attention.head_dim is not None and width not in (None, attention.head_dim):
        return f"values of {width} beside keys of {attention.head_dim}; there are kernels for one width"
    if between:
        return (
            f"{' and '.join(between)} stands between softmax and its quantiser: the probabilities' codes end below 1. "
            "Quantise with softmax_scale: full, or for INT8 with softmax_bits: 7, and it fuses."
        )
    if not _is_fixed(attention):
        return "its bias or mask is computed from the image"
    if carrier == "INT8":
        readers = attention.readers()
        if not all(is_quantize(reader) and code_type(reader) == ir.DataType.INT8 for reader in readers):
            return f"{_listed(readers)} follows: its output must be quantised to INT8 right behind it"
        if _queries(attention) == 1:
            return "a single query; there are kernels for more"
    return None


def _span(sizes: Sequence[int]) -> str:
    return f"{sizes[0]} to {sizes[-1]}" if isinstance(sizes, range) else ", ".join(map(str, sizes)) or "none"


def _value_dim(attention: qdq.Attention) -> object:
    """The width of the values, if the shapes tell; they may stand on either side of the probabilities."""
    last = attention.between[-1] if attention.between else attention.softmax
    transposed = attention.pv.inputs[1] is last.outputs[0]
    values = attention.pv.inputs[0 if transposed else 1]
    return values.shape[-2 if transposed else -1] if values is not None and values.shape is not None else None


def _queries(attention: qdq.Attention) -> object:
    """The number of queries, if the shapes tell."""
    query = attention.operands["q"]
    return query.shape[-2] if query is not None and query.shape is not None and len(query.shape) > 1 else None


def _is_fixed(attention: qdq.Attention) -> bool:
    """Whether nothing but constants is added to the scores."""
    node = attention.softmax
    while node is not attention.qk:
        others = [value for value in node.inputs if constant(value) is None]
        producers = [value.producer() for value in others if value is not None]
        if len(producers) != 1 or producers[0] is None:
            return False
        node = producers[0]
    return True


def _listed(nodes: Sequence[ir.Node]) -> str:
    return " and ".join(sorted({node.op_type for node in nodes}))
