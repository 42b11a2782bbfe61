"""TensorRT in FP8: 4-bit codes in the evenly spaced part of E4M3."""

import dataclasses
from typing import ClassVar

import onnx_ir as ir

from gplq.grid import LARGEST_SCALE, code_limits
from gplq_export.passes.agree_on_types import agree_on_types
from gplq_export.passes.common import FP8_CODES, FP8_STEP
from gplq_export.passes.drop_idle_clips import drop_idle_clips
from gplq_export.passes.fold_constants import fold_constants
from gplq_export.passes.hoist_quantizers import hoist_quantizers
from gplq_export.passes.saturate_before_clip import saturate_before_clip
from gplq_export.targets.base import GraphWriter, Pass, Quantizer, Weight, integer_weight, quantize_dequantize
from gplq_export.targets.trt_int8 import TensorRTInt8


class TensorRTFP8(TensorRTInt8):
    """Codes up to 16 carried by FP8, others by INT8. Needs compute capability 8.9: no older GPU has FP8.

    An FP8 QuantizeLinear rounds large values to few digits. With the scale 512 times as large, codes lie where E4M3 is
    evenly spaced, so that its own rounding is that of the grid, without Div and Round in front of it; those would keep
    an engine from fusing the attention.
    """

    name = "trt-fp8"
    compute_capability = 89
    passes: ClassVar[tuple[Pass, ...]] = (
        fold_constants,
        agree_on_types,
        drop_idle_clips,
        saturate_before_clip,
        hoist_quantizers,
    )

    def rounded(self, writer: GraphWriter, quantizer: Quantizer, x: ir.Value) -> ir.Value:
        """QuantizeLinear -> DequantizeLinear, with codes * 2^-9 in E4M3 under the name of the codes."""
        wide = dataclasses.replace(quantizer, scale=quantizer.scale / FP8_STEP)
        if _code_type(quantizer.bits, quantizer.signed) == ir.DataType.INT8 or wide.scale > LARGEST_SCALE:
            return super().rounded(writer, quantizer, x)
        return quantize_dequantize(writer, wide, x, ir.DataType.FLOAT8E4M3FN)

    def weight(self, writer: GraphWriter, weight: Weight) -> ir.Value:
        """Codes as E4M3 or INT8 numbers -> DequantizeLinear; convolutions in INT8."""
        linear = weight.codes.ndim == 2
        return integer_weight(writer, weight, _code_type(weight.bits, signed=True) if linear else ir.DataType.INT8)


def _code_type(bits: int, signed: bool) -> ir.DataType:
    fits = max(map(abs, code_limits(bits, signed))) <= FP8_CODES
    return ir.DataType.FLOAT8E4M3FN if fits else ir.DataType.INT8
