"""ONNX Runtime on CPUs: 4-bit codes carried by 8 bits, in integer kernels."""

import ml_dtypes
import numpy as np
import onnx_ir as ir

from gplq.grid import code_limits
from gplq_export.passes.common import reachable
from gplq_export.passes.fold_layer_scale import fold_layer_scale
from gplq_export.passes.hold_quantizers import hold_quantizers
from gplq_export.passes.integer_matmuls import integer_matmuls
from gplq_export.passes.select_before_norm import select_before_norm
from gplq_export.targets.base import GraphWriter, Quantizer, Target, Weight, codes_name, prepared

_TOP = 255


class Cpu(Target):
    """The deployment file for ONNX Runtime on CPUs, which have no 4-bit arithmetic.

    Activations are UINT8: UINT4 would be converted element by element, and INT8 does not load where a Transpose
    follows. Their zero point places the highest code at 255, so that the type itself clamps above; below, a Clip of the
    codes does (Max has a kernel for UINT8 since ONNX Runtime 1.24 only). Without the passes the graph computes bit by
    bit what that of ``int4`` does.
    """

    name = "cpu"
    passes = (fold_layer_scale, select_before_norm, integer_matmuls, hold_quantizers)

    def quantizer(self, writer: GraphWriter, quantizer: Quantizer) -> ir.Value:
        """[Add ->] [Mul ->] QuantizeLinear [-> Clip] -> DequantizeLinear."""
        name = quantizer.name
        low, high = code_limits(quantizer.bits, quantizer.signed)
        zero, lowest = _TOP - high, _TOP - high + low
        x = prepared(writer, quantizer)
        scale, zero_point = writer.floating(f"{name}.scale", quantizer.scale), _uint8(writer, zero)
        codes = writer.node("QuantizeLinear", [x, scale, zero_point], f"{name}/QuantizeLinear", codes_name(name))
        if lowest > 0 and _reaches_below(quantizer, low):
            codes.name = f"{name}.unclamped"
            codes = writer.node("Clip", [codes, _uint8(writer, lowest)], f"{name}/Clip", codes_name(name))
        inputs: list[ir.Value | None] = [codes, scale, zero_point]
        return writer.node("DequantizeLinear", inputs, f"{name}/DequantizeLinear", f"{name}.dequantized")

    def weight(self, writer: GraphWriter, weight: Weight) -> ir.Value:
        """INT4 initialiser -> Cast to INT8, once, on loading -> DequantizeLinear; of more than 4 bits UINT8.

        Processors without VNNI add two products of UINT8 and INT8 in 16 bits: enough for 4-bit weights, not for 8.
        """
        return carried_weight(writer, weight, offset=0 if weight.bits <= 4 else 128)


def carried_weight(writer: GraphWriter, weight: Weight, offset: int = 0) -> ir.Value:
    """A weight [K, N], or [N, C, kh, kw] of a convolution, stored in as few bits as it has, computed with in 8.

    ``offset``: what is added to the codes, which are UINT8 then, with it as their zero point.
    """
    name, linear = weight.name, weight.codes.ndim == 2
    array = weight.codes.T if linear else weight.codes
    if weight.bits <= 4:
        stored = writer.constant(f"{name}.codes", array.astype(ml_dtypes.int4))
        codes = writer.node("Cast", [stored], f"{name}/Cast", f"{name}.codes_int8", to=ir.DataType.INT8)
    else:
        shifted = (array.astype(np.int16) + offset).astype(np.uint8 if offset else np.int8)
        codes = writer.constant(f"{name}.codes", shifted)
    inputs: list[ir.Value | None] = [codes, writer.floating(f"{name}.weight_scale", weight.scale)]
    if offset:
        inputs.append(writer.constant(f"{name}.weight_zero_point", np.full(weight.scale.shape, offset, np.uint8)))
    axis = 1 if linear else 0
    return writer.node("DequantizeLinear", inputs, f"{name}/DequantizeLinear", f"{name}.weight", axis=axis)


def _uint8(writer: GraphWriter, value: int) -> ir.Value:
    return writer.constant(f"uint8_{value}", np.asarray(value, np.uint8))


def _reaches_below(quantizer: Quantizer, low: int) -> bool:
    """Whether a value may come whose code is lower than ``low``."""
    lowest, _ = reachable(quantizer.x)
    shift = 0.0 if quantizer.pre_shift is None else float(quantizer.pre_shift)
    factor = 1.0 if quantizer.pre_scale is None else float(quantizer.pre_scale.max())
    code = (lowest + shift) * factor / float(quantizer.scale)
    return code <= low - 0.49  # rounds to low, however it is computed
