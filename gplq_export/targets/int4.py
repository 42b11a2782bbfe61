"""The portable file, and the reference for all others."""

from typing import ClassVar

import onnx_ir as ir

from gplq_export.passes.drop_idle_clips import drop_idle_clips
from gplq_export.passes.hold_quantizers import hold_quantizers
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


class Int4(Target):
    """Everything explicit in the standard's own 4-bit types: the portable file, and the reference for all others."""

    name = "int4"
    passes: ClassVar[tuple[Pass, ...]] = (drop_idle_clips, hold_quantizers)

    def quantizer(self, writer: GraphWriter, quantizer: Quantizer) -> ir.Value:
        """[Add ->] [Mul ->] [Clip | Max ->] QuantizeLinear -> DequantizeLinear; Clip if the type holds more codes."""
        # Fewer than 4 bits need a Clip, which ONNX Runtime's optimisation cannot load in front of a 4-bit type.
        code_type = ir.DataType.INT8
        if quantizer.bits == 4:
            code_type = ir.DataType.INT4 if quantizer.signed else ir.DataType.UINT4
        return quantize_dequantize(writer, quantizer, clipped(writer, quantizer), code_type)

    def weight(self, writer: GraphWriter, weight: Weight) -> ir.Value:
        """INT4 (or INT8) initialiser -> DequantizeLinear."""
        return integer_weight(writer, weight, ir.DataType.INT4 if weight.bits <= 4 else ir.DataType.INT8)
