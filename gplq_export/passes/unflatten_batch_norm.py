"""A batch norm behind a linear becomes a scale and a shift, without the Reshape around it."""

import numpy as np
import onnx_ir as ir

from gplq_export.passes.common import constant, only_reader


def unflatten_batch_norm(model: ir.Model) -> bool:
    """MatMul(x, w) -> Reshape to [-1, N] -> BatchNormalization -> Reshape becomes MatMul -> Mul -> Add -> Reshape.

    Rule: with constant statistics the norm multiplies and shifts each of the N channels, which are the last axis of
    what a weight [K, N] returns, however many are in front. LeViT flattens tokens for the norm's sake; OpenVINO fails
    to load a linear whose scales are followed by such a Reshape.
    """
    changed = False
    for norm in [node for node in model.graph if node.op_type == "BatchNormalization"]:
        flatten = norm.inputs[0].producer() if norm.inputs[0] is not None else None
        if flatten is None or not _only_flattens(flatten, norm):
            continue
        weight, bias, mean, variance = (constant(value) for value in norm.inputs[1:])
        if weight is None or bias is None or mean is None or variance is None:
            continue
        scale = weight / np.sqrt(variance + np.float32(norm.attributes["epsilon"].as_float()))
        value = flatten.inputs[0]
        for op_type, array in (("Mul", scale), ("Add", bias - mean * scale)):
            name = f"{norm.name}/{op_type}"
            factor = ir.Value(
                name=f"{name}.value",
                const_value=ir.Tensor(array, name=f"{name}.value"),
                type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
                shape=ir.Shape(array.shape),
            )
            model.graph.register_initializer(factor)
            node = ir.node(op_type, [value, factor], name=name)
            value = node.outputs[0]
            value.name = f"{name}.output"
            model.graph.insert_before(norm, node)
        assert value is not None
        ir.convenience.replace_all_uses_with(norm.outputs[0], value)
        model.graph.remove([norm, flatten], safe=True)
        changed = True
    return changed


def _only_flattens(flatten: ir.Node, norm: ir.Node) -> bool:
    """Whether a Reshape stands between a linear and a norm, keeps its channels, and another Reshape follows."""
    if flatten.op_type != "Reshape" or only_reader(flatten.outputs[0]) is not norm:
        return False
    shape, behind = constant(flatten.inputs[1]), only_reader(norm.outputs[0])
    linear = flatten.inputs[0].producer() if flatten.inputs[0] is not None else None
    if linear is not None and linear.op_type == "Add" and constant(linear.inputs[1]) is not None:
        linear = linear.inputs[0].producer() if linear.inputs[0] is not None else None
    dequantize = linear.inputs[1].producer() if linear is not None and linear.op_type == "MatMul" else None  # type: ignore[union-attr]
    scale = None if dequantize is None or dequantize.op_type != "DequantizeLinear" else constant(dequantize.inputs[1])
    back = behind is not None and behind.op_type == "Reshape" and constant(behind.inputs[1]) is not None
    return back and shape is not None and scale is not None and shape.tolist() == [-1, *scale.shape]
