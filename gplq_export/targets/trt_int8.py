"""TensorRT with everything in INT8: 4-bit codes in bytes."""

from typing import ClassVar

import onnx_ir as ir

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
    clipped,
    integer_weight,
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
        return self.rounded(writer, quantizer, clipped(writer, quantizer))

    def rounded(self, writer: GraphWriter, quantizer: Quantizer, x: ir.Value) -> ir.Value:
        """QuantizeLinear -> DequantizeLinear of what has been clipped."""
        return quantize_dequantize(writer, quantizer, x, ir.DataType.INT8)

    def weight(self, writer: GraphWriter, weight: Weight) -> ir.Value:
        """INT8 initialiser -> DequantizeLinear."""
        return integer_weight(writer, weight, ir.DataType.INT8)
