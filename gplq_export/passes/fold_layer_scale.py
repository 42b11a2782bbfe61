"""A layer's own scale goes into the weight scales and the bias of the linear in front of it."""

import numpy as np
import onnx_ir as ir

from gplq_export.passes.common import constant, only_reader

SCALED = ".scaled"  # follows the name of a scale or bias that took a layer's own scale


def fold_layer_scale(model: ir.Model) -> bool:
    """MatMul(x, Dequantize(codes, s)) [-> Add(b)] -> Mul(g) becomes the same with s * g and b * g, without the Mul.

    Rule: s, b and g are constants, one number an output channel, and nothing else reads what is between. Codes stay as
    they are, so that storage does, too; one rounding moves. A node less over every token (LayerScale of DINOv2, CaiT).
    """
    folded = [node for node in model.graph if node.op_type == "Mul" and _fold(model.graph, node)]
    for node in folded:
        model.graph.remove(node, safe=True)
    return bool(folded)


def _fold(graph: ir.Graph, mul: ir.Node) -> bool:
    """Whether a Mul was folded; nothing reads it then."""
    y, gamma = mul.inputs[0], constant(mul.inputs[1])
    if y is None or gamma is None or only_reader(y) is not mul:
        return False
    last = y.producer()
    add = last if last is not None and last.op_type == "Add" else None
    product = y if add is None else add.inputs[0]
    bias = None if add is None else constant(add.inputs[1])
    matmul = None if product is None else product.producer()
    if matmul is None or matmul.op_type != "MatMul" or (add is not None and only_reader(matmul.outputs[0]) is not add):
        return False
    weight = matmul.inputs[1]
    dequantize = None if weight is None else weight.producer()
    if (
        weight is None
        or dequantize is None
        or dequantize.op_type != "DequantizeLinear"
        or only_reader(weight) is not matmul
    ):
        return False
    scale = constant(dequantize.inputs[1])
    if scale is None or scale.shape != gamma.shape or (add is not None and (bias is None or bias.shape != gamma.shape)):
        return False
    _replace(graph, dequantize, scale * gamma)
    if add is not None and bias is not None:
        _replace(graph, add, bias * gamma)
    # Not the linear's own output any more: it takes the name of the scaled one.
    y.name = mul.outputs[0].name
    y.meta.update(mul.outputs[0].meta)
    ir.convenience.replace_all_uses_with(mul.outputs[0], y, replace_graph_outputs=True)
    return True


def _replace(graph: ir.Graph, reader: ir.Node, array: np.ndarray) -> None:
    """Give a node another constant as its second input, under the old one's name."""
    old = reader.inputs[1]
    assert old is not None and old.name is not None
    name = f"{old.name}{SCALED}"
    new = ir.Value(name=name, const_value=ir.Tensor(array, name=name), type=old.type, shape=ir.Shape(array.shape))
    graph.register_initializer(new)
    reader.replace_input_with(1, new)
