"""TensorRT with everything in INT8: 4-bit codes in bytes."""

from typing import ClassVar

import numpy as np
import onnx_ir as ir

from gplq.grid import code_limits
from gplq_export.passes.drop_idle_clips import drop_idle_clips
from gplq_export.passes.fold_constants import fold_constants
from gplq_export.passes.hoist_quantizers import hoist_quantizers
from gplq_export.passes.saturate_before_clip import saturate_before_clip
from gplq_export.targets.base import (
    GraphWriter,
    Pass,
    Quantizer,
    Target,
    Weight,
    integer_weight,
    prepared,
    quantize_dequantize,
)


class TensorRTInt8(Target):
    """All codes carried by INT8: TensorRT has no 4-bit integer arithmetic.

    The clamp to 16 levels is an explicit Clip in front of the INT8 QuantizeLinear, whose own range is wider. Scales are
    FP16, because a Cast between DequantizeLinear and MatMul would make TensorRT multiply in FP16.
    """

    name = "trt-int8"
    float_type = ir.DataType.FLOAT16
    passes: ClassVar[tuple[Pass, ...]] = (fold_constants, drop_idle_clips, saturate_before_clip, hoist_quantizers)

    def quantizer(self, writer: GraphWriter, quantizer: Quantizer) -> ir.Value:
        """[Add ->] [Mul ->] Clip -> QuantizeLinear -> DequantizeLinear."""
        x = prepared(writer, quantizer)
        bounds = [
            writer.floating(f"{quantizer.name}.{side}", np.asarray(code * quantizer.scale))
            for side, code in zip(("low", "high"), code_limits(quantizer.bits, quantizer.signed), strict=True)
        ]
        clipped = writer.node("Clip", [x, *bounds], f"{quantizer.name}/Clip", f"{quantizer.name}.clipped")
        return self.rounded(writer, quantizer, clipped)

    def rounded(self, writer: GraphWriter, quantizer: Quantizer, x: ir.Value) -> ir.Value:
        """QuantizeLinear -> DequantizeLinear of what has been clipped."""
        return quantize_dequantize(writer, quantizer, x, ir.DataType.INT8)

    def weight(self, writer: GraphWriter, weight: Weight) -> ir.Value:
        """INT8 initialiser -> DequantizeLinear."""
        return integer_weight(writer, weight, ir.DataType.INT8)
