"""Keys are transposed behind their quantiser, where OpenVINO reads them transposed."""

import onnx_ir as ir

from gplq_export.passes.common import is_scalar_constant, only_reader

_BOTH, _HEADS, _KEYS = [0, 2, 3, 1], [0, 2, 1, 3], [0, 1, 3, 2]


def transpose_keys_last(model: ir.Model) -> bool:
    """Transpose by [0, 2, 3, 1] -> FakeQuantize becomes Transpose by [0, 2, 1, 3] -> FakeQuantize -> by [0, 1, 3, 2].

    Rule: one transposition after the other moves each element as both at once do, and a quantiser with one range treats
    each alike. Keys [B, N, H, D] become [B, H, N, D] as queries and values do; the second transposition, by name of the
    quantiser, is what OpenVINO's attention reads out of memory in that order instead of writing the keys anew.
    """
    changed = False
    for quantize in [node for node in model.graph if node.op_type == "FakeQuantize"]:
        before = quantize.inputs[0].producer() if quantize.inputs[0] is not None else None
        if before is None or not _is_movable(before, quantize):
            continue
        before.attributes["perm"] = ir.AttrInt64s("perm", _HEADS)
        before.outputs[0].shape = None
        quantized = quantize.outputs[0]
        assert quantize.name is not None
        name = quantize.name.replace("/FakeQuantize", "/Transpose")
        after = ir.node("Transpose", [quantized], {"perm": _KEYS}, name=name)
        after.outputs[0].name = f"{quantized.name}.transposed"
        ir.convenience.replace_all_uses_with(quantized, after.outputs[0])
        after.replace_input_with(0, quantized)
        model.graph.insert_after(quantize, after)
        changed = True
    return changed


def _is_movable(before: ir.Node, quantize: ir.Node) -> bool:
    perm = before.attributes["perm"] if before.op_type == "Transpose" and "perm" in before.attributes else None
    if perm is None or list(perm.as_ints()) != _BOTH or only_reader(before.outputs[0]) is not quantize:
        return False
    return all(is_scalar_constant(value) for value in quantize.inputs[1:])
