"""Quantisers move in front of what only moves elements."""

import onnx_ir as ir

from gplq_export.passes.common import MOVES, is_scalar_constant, only_reader

_BEFORE = ("Clip", "Mul", "Div", "Add", "Sub")  # what may stand in front of a quantiser and moves with it


def hoist_quantizers(model: ir.Model) -> bool:
    """[Clip, Mul, … by scalars ->] QuantizeLinear -> DequantizeLinear moves in front of Reshape, Transpose and such.

    Rule: what does the same to each element commutes with what only gives elements other places. Engines then move one
    byte an element instead of two, quantise in the kernel that adds the bias of the linear before, and merge the
    queries', keys' and values' linears.
    """
    changed = False
    for node in list(model.graph):
        while node.op_type == "QuantizeLinear" and _hoist(model.graph, node):
            changed = True
    return changed


def _hoist(graph: ir.Graph, quantize: ir.Node) -> bool:
    """Move one node from in front of the quantiser to behind it; False if there is none."""
    dequantize = only_reader(quantize.outputs[0])
    if dequantize is None or dequantize.op_type != "DequantizeLinear" or not _is_scalar(quantize):
        return False
    first, before = quantize, _feeding(quantize)
    while before is not None and before.op_type in _BEFORE and _is_scalar(before):
        first, before = before, _feeding(before)
    if before is None or before.op_type not in MOVES:
        return False
    first.replace_input_with(0, before.inputs[0])
    moved = ir.node(before.op_type, [None, *before.inputs[1:]], before.attributes, name=before.name)
    moved.outputs[0].name = before.outputs[0].name
    ir.convenience.replace_all_uses_with(dequantize.outputs[0], moved.outputs[0], replace_graph_outputs=True)
    moved.replace_input_with(0, dequantize.outputs[0])
    graph.insert_after(dequantize, moved)
    graph.remove(before, safe=True)
    return True


def _feeding(node: ir.Node) -> ir.Node | None:
    """The node that computes the first input, if it does so for ``node`` alone."""
    value = node.inputs[0]
    return value.producer() if value is not None and only_reader(value) is node else None


def _is_scalar(node: ir.Node) -> bool:
    """Whether all inputs but the first are constants of one element."""
    return all(is_scalar_constant(value) for value in node.inputs[1:])
