"""A reduction keeps its axes, which are squeezed away behind it."""

import onnx_ir as ir


def keep_reduced_axes(model: ir.Model) -> bool:
    """ReduceMax or ReduceMean that drops its axes becomes one that keeps them, and a Squeeze.

    Rule: the two are the same. OpenVINO merges a quantiser into the reduction in front of it, and computes wrong
    numbers if the reduction drops axes (observed with 2026.4 on AVX-512); nothing is merged across a Squeeze.
    """
    changed = False
    for reduce in [node for node in model.graph if node.op_type in ("ReduceMax", "ReduceMean")]:
        keeps = reduce.attributes.get_int("keepdims", 1)
        if keeps or len(reduce.inputs) < 2 or reduce.inputs[1] is None:
            continue
        output = reduce.outputs[0]
        squeeze = ir.node("Squeeze", [output, reduce.inputs[1]], name=f"{reduce.name}/Squeeze")
        ir.convenience.replace_all_uses_with(output, squeeze.outputs[0], replace_graph_outputs=True)
        squeeze.replace_input_with(0, output)
        squeeze.outputs[0].name, output.name = output.name, f"{output.name}.kept"
        squeeze.outputs[0].meta.update(output.meta)
        squeeze.outputs[0].type, squeeze.outputs[0].shape = output.type, output.shape
        output.meta.clear()
        output.shape = None
        reduce.attributes["keepdims"] = ir.AttrInt64("keepdims", 1)
        model.graph.insert_after(reduce, squeeze)
        changed = True
    return changed
