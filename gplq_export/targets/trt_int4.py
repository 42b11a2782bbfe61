"""TensorRT with 4-bit weights in storage."""

import onnx_ir as ir

from gplq_export.targets.base import GraphWriter, Weight, integer_weight
from gplq_export.targets.trt_int8 import TensorRTInt8


class TensorRTInt4(TensorRTInt8):
    """As :class:`TensorRTInt8`, with half the bytes of weights: a kernel in front of each linear unpacks them."""

    name = "trt-int4"

    def weight(self, writer: GraphWriter, weight: Weight) -> ir.Value:
        """INT4 initialiser -> DequantizeLinear; INT8 for more bits and for convolutions, which take no INT4."""
        packed = weight.bits <= 4 and weight.codes.ndim == 2
        return integer_weight(writer, weight, ir.DataType.INT4 if packed else ir.DataType.INT8)
