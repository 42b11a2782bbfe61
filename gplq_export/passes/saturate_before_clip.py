"""A Clip behind a product of activations moves between two quantisers."""

import onnx_ir as ir

from gplq_export.passes.common import MOVES, int8_parameters, is_product, only_reader, source
from gplq_export.qdq import code_type


def saturate_before_clip(model: ir.Model) -> bool:
    """Clip -> QuantizeLinear behind a product of activations becomes Quantize -> Dequantize -> Clip -> Quantize.

    Rule: with one scale, rounding in a type that is wider than the Clip and clamping the codes afterwards gives the
    same codes as clamping before. Engines fuse an attention in INT8 only if an INT8 quantiser directly follows it; the
    clamp then becomes part of the kernel behind.
    """
    changed = False
    for clip in list(model.graph):
        quantize = only_reader(clip.outputs[0]) if clip.op_type == "Clip" else None
        if quantize is None or quantize.op_type != "QuantizeLinear" or not is_product(source(clip.inputs[0])):
            continue
        value, parameters = clip.inputs[0], quantize.inputs[1:]
        if _multiplies_int8(clip) and code_type(quantize) == ir.DataType.FLOAT8E4M3FN:
            parameters = int8_parameters(model.graph, quantize)
        for op_type in ("QuantizeLinear", "DequantizeLinear"):
            node = ir.node(op_type, [value, *parameters], name=f"{clip.name}/{op_type}")
            value = node.outputs[0]
            value.name = f"{clip.outputs[0].name}.{'saturated' if op_type == 'QuantizeLinear' else 'wide'}"
            model.graph.insert_before(clip, node)
        clip.replace_input_with(0, value)
        changed = True
    return changed


def _multiplies_int8(clip: ir.Node) -> bool:
    """Whether the product in front of a Clip is one of INT8 codes."""
    product = source(clip.inputs[0])
    codes = source(product.inputs[0], (*MOVES, "DequantizeLinear")) if product is not None else None
    return codes is not None and codes.op_type == "QuantizeLinear" and code_type(codes) == ir.DataType.INT8
