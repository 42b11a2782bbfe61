"""What is multiplied together is carried by one type."""

import numpy as np
import onnx_ir as ir

from gplq_export.passes.common import constant, int8_parameters
from gplq_export.qdq import Dequantized, QdqGraph

_FP8, _INT8 = ir.DataType.FLOAT8E4M3FN, ir.DataType.INT8


def agree_on_types(model: ir.Model) -> bool:
    """Where FP8 and INT8 codes meet in a product, or in one attention, those in FP8 become INT8.

    Rule: no engine multiplies FP8 by INT8. FP8 holds codes up to 16 only, INT8 those and more: the same codes, on the
    same scale. The two products of an attention agree, too, because engines fuse it only then.
    """
    graph = QdqGraph(model)
    groups: list[list[Dequantized]] = [[x, weight] for _, x, weight in graph.quantized]
    groups += [list(attention.quantized.values()) for attention in graph.attentions]
    changed = False
    # An input that several linears share takes all their weights along, which may be in a group that was seen before.
    while mixed := [group for group in groups if {it.code_type for it in group} == {_FP8, _INT8}]:
        for operand in (it for group in mixed for it in group if it.code_type == _FP8):
            _carry_by_int8(model.graph, operand.node)
        changed = True
    return changed


def _carry_by_int8(graph: ir.Graph, dequantize: ir.Node) -> None:
    codes = dequantize.inputs[0]
    assert codes is not None  # a DequantizeLinear has an input
    array, quantize = constant(codes), codes.producer()
    if array is not None:
        codes.const_value = ir.Tensor(array.astype(np.int8), name=codes.name)
    else:
        assert quantize is not None  # a target writes the two together
        parameters = int8_parameters(graph, quantize)
        for node in (quantize, dequantize):
            for index, value in enumerate(parameters, start=1):
                node.replace_input_with(index, value)
    codes.type = ir.TensorType(_INT8)
