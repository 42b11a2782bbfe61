"""The network without quantisers, in FP16."""

import onnx_ir as ir

from gplq_export.passes.fold_constants import fold_constants
from gplq_export.targets.fp32 import Float32


class Float16(Float32):
    """As :class:`Float32`, in FP16: the honest baseline of every speed claim."""

    name = "fp16"
    float_type = ir.DataType.FLOAT16
    passes = (fold_constants,)
