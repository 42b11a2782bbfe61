"""A Clip that cannot bind is dropped."""

import numpy as np
import onnx_ir as ir

from gplq_export.passes.common import CODE_LIMITS, MARKED, constant, reachable


def drop_idle_clips(model: ir.Model) -> bool:
    """A Clip in front of QuantizeLinear goes if no value that can come has a code beyond those of its bounds.

    Rule: rounding is monotone and saturates at the limits of its type, so that the codes of all x in [low, high] lie
    between those of low and high. What Softmax computes lies in [0, 1]: with 16 codes a Clip behind it is idle if
    15.5 * scale >= 1, with the 128 codes that INT8 has without a sign it is idle always. Engines fuse an attention only
    if the quantiser follows the softmax with nothing between.
    """
    idle = [node for node in model.graph if node.op_type == "Clip" and _is_idle(node)]
    for node in idle:
        x = node.inputs[0]
        assert x is not None  # Clip has one
        ir.convenience.replace_all_uses_with(node.outputs[0], x)
        model.graph.remove(node, safe=True)
    return bool(idle)


def _is_idle(clip: ir.Node) -> bool:
    output = clip.outputs[0]
    readers = [use.node for use in output.uses()]
    bounds = [constant(value) for value in clip.inputs[1:]]
    if output.is_graph_output() or MARKED in output.meta or not readers or len(bounds) != 2:
        return False
    lowest, highest = reachable(clip.inputs[0])
    for reader in readers:
        scale = constant(reader.inputs[1]) if reader.op_type == "QuantizeLinear" else None
        zero_point = reader.inputs[2] if len(reader.inputs) > 2 else None
        if scale is None or scale.size != 1 or zero_point is None or zero_point.dtype not in CODE_LIMITS:
            return False
        codes = [_code(bound, scale, zero_point.dtype) for bound in (bounds[0], lowest, highest, bounds[1])]
        if not codes[0] <= codes[1] <= codes[2] <= codes[3]:
            return False
    return True


def _code(x: float | np.ndarray | None, scale: np.ndarray, code_type: ir.DataType) -> float:
    """The code of one value; NaN, which is in no range, if the value is unknown."""
    if x is None:
        return np.nan
    code = np.clip(np.float32(x) / scale.astype(np.float32), *CODE_LIMITS[code_type])
    return float(np.rint(code) if code_type.is_integer() else code.astype(code_type.numpy()))
