"""A Max stands between a quantiser and what ONNX Runtime would merge it with, and then compute otherwise."""

import numpy as np
import onnx_ir as ir

from gplq_export.passes.common import CODE_LIMITS, MOVES, constant

_FOUR_BITS = (ir.DataType.INT4, ir.DataType.UINT4)
# Across these ONNX Runtime moves a quantiser, or looks. ReluQuantRewrite drops a Relu in front of INT4, as if that held
# no negative codes; ClipQuantRewrite cannot read 4-bit types, and no kernel pools them: no session is created.
_CROSSED = (*MOVES, "Slice", "Relu", "Clip", "MaxPool")


def hold_quantizers(model: ir.Model) -> bool:
    """QuantizeLinear(x) becomes QuantizeLinear(Max(x, the value of the type's lowest code)).

    Rule: what is lower gets that code anyway, so that no code changes, and none of ONNX Runtime's passes knows a Max.
    It is put in front of 4 bits behind Relu, Clip or MaxPool, or behind data movement that leads there; and in front of
    any quantiser that such a way, however short, connects with a convolution or a linear that has a bias, which
    WeightBiasQuantization would round to multiples of input scale times weight scale: coarse ones, with 4 bits.
    """
    held = [node for node in model.graph if node.op_type == "QuantizeLinear" and _is_merged(node)]
    for quantize in held:
        _hold(model.graph, quantize)
    return bool(held)


def _is_merged(quantize: ir.Node) -> bool:
    x, crossed = quantize.inputs[0], False
    before = None if x is None else x.producer()
    while before is not None and before.op_type in _CROSSED:
        crossed, x = True, before.inputs[0]
        before = None if x is None else x.producer()
    return (crossed and _zero_point(quantize).dtype in _FOUR_BITS) or _has_bias(before)


def _has_bias(node: ir.Node | None) -> bool:
    """Whether a node is a convolution with a bias, or adds one to a linear's product."""
    if node is None or node.op_type == "Conv":
        return node is not None and len(node.inputs) > 2
    product = node.inputs[0].producer() if node.op_type == "Add" and node.inputs[0] is not None else None
    return product is not None and product.op_type == "MatMul" and constant(node.inputs[1]) is not None


def _hold(graph: ir.Graph, quantize: ir.Node) -> None:
    scale, zero_point = constant(quantize.inputs[1]), constant(_zero_point(quantize))
    assert scale is not None and zero_point is not None and quantize.name is not None  # targets write constants
    lowest, _ = CODE_LIMITS[ir.DataType.from_numpy(zero_point.dtype)]
    name = quantize.name.replace("/QuantizeLinear", "/Max")
    tensor = ir.Tensor(np.asarray((lowest - int(zero_point)) * scale, scale.dtype), name=f"{name}.lowest")
    value = ir.Value(name=tensor.name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=ir.Shape(()))
    graph.register_initializer(value)
    held = ir.node("Max", [quantize.inputs[0], value], name=name)
    held.outputs[0].name = f"{name}.output"
    graph.insert_before(quantize, held)
    quantize.replace_input_with(0, held.outputs[0])


def _zero_point(quantize: ir.Node) -> ir.Value:
    zero_point = quantize.inputs[2]
    assert zero_point is not None  # it names the type of the codes
    return zero_point
