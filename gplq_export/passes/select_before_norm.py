"""A token is selected in front of the norm, not behind it."""

import onnx_ir as ir

from gplq_export.passes.common import MARKED, constant, only_reader


def select_before_norm(model: ir.Model) -> bool:
    """LayerNormalization -> Gather becomes Gather -> LayerNormalization.

    Rule: the norm treats each position alike, so that selecting along another axis than those it reduces commutes with
    it. A classifier that reads one token then normalises one token; and ONNX Runtime does not merge the last residual
    with the norm into its SkipLayerNormalization, which takes ten times as long on a CPU.
    """
    changed = False
    for gather in [node for node in model.graph if node.op_type == "Gather"]:
        norm = gather.inputs[0].producer() if gather.inputs[0] is not None else None
        if norm is None or norm.op_type != "LayerNormalization" or not _commutes(norm, gather):
            continue
        selected, normed = gather.outputs[0], norm.outputs[0]
        ir.convenience.replace_all_uses_with(selected, normed, replace_graph_outputs=True)
        gather.replace_input_with(0, norm.inputs[0])
        norm.replace_input_with(0, selected)
        model.graph.remove(norm)
        model.graph.insert_after(gather, norm)
        selected.name, normed.name = normed.name, selected.name
        normed.type, normed.shape = selected.type, selected.shape
        changed = True
    return changed


def _commutes(norm: ir.Node, gather: ir.Node) -> bool:
    index = constant(gather.inputs[1])
    axis = gather.attributes["axis"].as_int() if "axis" in gather.attributes else 0
    last = "axis" not in norm.attributes or norm.attributes["axis"].as_int() == -1
    rank = None if norm.inputs[0] is None or norm.inputs[0].shape is None else norm.inputs[0].shape.rank()
    # From the other end it might be the normalised axis, if the rank is unknown.
    selects = index is not None and axis >= 0 and rank is not None and axis < rank - 1
    wanted = MARKED in gather.outputs[0].meta
    return selects and last and only_reader(norm.outputs[0]) is gather and len(norm.outputs) == 1 and not wanted
