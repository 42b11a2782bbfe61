"""OpenVINO on CPUs: its own FakeQuantize, with as many levels as the grid has codes."""

import numpy as np
import onnx_ir as ir

from gplq.grid import code_limits
from gplq_export.passes.fold_layer_scale import fold_layer_scale
from gplq_export.passes.keep_reduced_axes import keep_reduced_axes
from gplq_export.passes.select_before_norm import select_before_norm
from gplq_export.passes.transpose_keys_last import transpose_keys_last
from gplq_export.passes.unflatten_batch_norm import unflatten_batch_norm
from gplq_export.targets.base import GraphWriter, Quantizer, Target, Weight, prepared
from gplq_export.targets.cpu import carried_weight

DOMAIN = "org.openvinotoolkit"
_BITS = (4, 8)  # a FakeQuantize of another number of levels is computed, and what it feeds multiplied, in FP32


class OpenVino(Target):
    """The deployment file for OpenVINO on CPUs, an ONNX file in which the quantisers are OpenVINO's operator.

    FakeQuantize clamps, rounds and scales in one step: OpenVINO merges it with the operator that computes its input,
    and multiplies in 8 bits. Of QuantizeLinear and a clamp of its codes it would make two kernels. The shift and the
    factors in front of a quantiser stay apart: OpenVINO merges them, too; ranges by channel it takes only where it can.
    """

    name = "openvino"
    holds_codes = False
    passes = (unflatten_batch_norm, fold_layer_scale, select_before_norm, keep_reduced_axes, transpose_keys_last)

    def quantizer(self, writer: GraphWriter, quantizer: Quantizer) -> ir.Value:
        """[Add ->] [Mul ->] [Clip ->] FakeQuantize(x, low, high, low, high)."""
        name, x = quantizer.name, prepared(writer, quantizer)
        limits = code_limits(quantizer.bits, quantizer.signed)
        ends = _ends(writer, quantizer, limits)
        if quantizer.bits not in _BITS:
            x = writer.node("Clip", [x, *ends], f"{name}/Clip", f"{name}.clipped")
            limits = code_limits(max(_BITS), quantizer.signed)
            ends = _ends(writer, quantizer, limits, "wide_")
        writer.graph.opset_imports[DOMAIN] = 1
        return writer.node(
            "FakeQuantize",
            [x, *ends, *ends],
            f"{name}/FakeQuantize",
            f"{name}.dequantized",
            domain=DOMAIN,
            levels=limits[1] - limits[0] + 1,
        )

    def weight(self, writer: GraphWriter, weight: Weight) -> ir.Value:
        """INT4 initialiser -> Cast to INT8, once, on loading -> DequantizeLinear; of more than 4 bits INT8."""
        return carried_weight(writer, weight)


def _ends(
    writer: GraphWriter, quantizer: Quantizer, limits: tuple[int, int], prefix: str = ""
) -> list[ir.Value | None]:
    """The values of the lowest and the highest code."""
    return [
        writer.floating(f"{quantizer.name}.{prefix}{side}", np.asarray(code * quantizer.scale))
        for side, code in zip(("low", "high"), limits, strict=True)
    ]
