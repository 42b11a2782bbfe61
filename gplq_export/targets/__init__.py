"""What each target gets for the dialect's quantisers and weights. A new target is one small file here.

    target      weights                          activations                          floats
    int4        INT4 + DequantizeLinear          INT4/UINT4 Quantize + Dequantize     FP32     portable, the reference
    trt-int8    INT8 + DequantizeLinear          Clip, then INT8 Quantize + Dequant.  FP16     TensorRT, TensorRT-RTX
    trt-int4    INT4 + DequantizeLinear          as trt-int8                          FP16     half the bytes of weights
    trt-fp8     FP8 + DequantizeLinear           Clip, then FP8 Quantize + Dequant.   FP16     compute capability 8.9 on
    cpu         INT4, Cast, DequantizeLin.       UINT8 Quantize, Clip; integer matmul FP32     ONNX Runtime on CPUs
    openvino    INT4, Cast, DequantizeLin.       FakeQuantize of 16 levels            FP32     OpenVINO on CPUs
    fp32, fp16  float                            none: the same network unquantised   FP32/16  for comparison

The 8-bit edges (patch embedding, classifier) are INT8 in all quantised targets but `cpu`, which has UINT8. Weights are
laid out [K, N], scales one an output channel on axis 1 (those of convolutions [N, C, kh, kw], axis 0), never behind a
Transpose, and behind a Cast only on CPUs: TensorRT computes such a MatMul in floating point without telling.
"""

from gplq_export.targets.base import GraphWriter, Pass, Quantizer, Target, Weight, codes_name, in_float_type
from gplq_export.targets.cpu import Cpu
from gplq_export.targets.fp16 import Float16
from gplq_export.targets.fp32 import Float32
from gplq_export.targets.int4 import Int4
from gplq_export.targets.openvino import OpenVino
from gplq_export.targets.trt_fp8 import TensorRTFP8
from gplq_export.targets.trt_int4 import TensorRTInt4
from gplq_export.targets.trt_int8 import TensorRTInt8

__all__ = [
    "TARGETS",
    "Cpu",
    "Float16",
    "Float32",
    "GraphWriter",
    "Int4",
    "OpenVino",
    "Pass",
    "Quantizer",
    "Target",
    "TensorRTFP8",
    "TensorRTInt4",
    "TensorRTInt8",
    "Weight",
    "codes_name",
    "in_float_type",
]

TARGETS: dict[str, type[Target]] = {
    cls.name: cls for cls in (Int4, Cpu, OpenVino, TensorRTInt8, TensorRTInt4, TensorRTFP8, Float32, Float16)
}
