"""The rules of ``gplq-export lint``: what each runtime refuses, computes otherwise or runs slower without telling.

A rule yields the nodes that break it. Each was confirmed with the runtime itself, TensorRT-RTX 1.7.1 or ONNX Runtime
1.31.1, unless its source says otherwise; tests/test_lint.py repeats most of that.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir

from gplq_export.qdq import (
    ROUNDING,
    STANDARD,
    Attention,
    QdqGraph,
    behind,
    block_size,
    channels,
    code_type,
    constant,
    is_dequantize,
    is_op,
    is_quantize,
    operand,
    producer,
    scale_of,
)

Severity = Literal["error", "warning", "note"]
Runtime = Literal["trt", "ort"]
Found = Iterator[tuple[ir.Node | None, str]]  # the node, or None for the model as a whole, and what was found there

ORT_OPSET, ORT_IR_VERSION = 26, 13  # what ONNX Runtime 1.31 reads
MHA_HEAD_DIMS, MHA_TOKENS = (16, 32, 64), 512  # what TensorRT fuses in INT8
FP16_SMALLEST, FP16_LARGEST = 2.0**-14, 65504.0

_TRT, _ORT = "observed with TensorRT-RTX 1.7.1", "observed with ONNX Runtime 1.31.1 on a CPU"
_EIGHT = (ir.DataType.INT8, ir.DataType.UINT8)
_FOUR = (ir.DataType.INT4, ir.DataType.UINT4)
_FP8 = (ir.DataType.FLOAT8E4M3FN,)
_TRT_CODES = (ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.INT4, ir.DataType.FLOAT4E2M1, *_FP8)
_TRT_REFUSES = (
    "DynamicQuantizeLinear", "MatMulInteger", "ConvInteger", "QLinearMatMul", "QLinearConv", "QLinearAdd", "QGemm",
    "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "QAttention", "SkipLayerNormalization", "BiasGelu", "FastGelu",
    "FusedMatMul",
)  # fmt: skip
_MOVED_BY_ORT = ("Transpose", "Reshape", "Squeeze", "Unsqueeze", "Slice")  # PropagateQDQ passes them
_KNOWN_DOMAINS = (*STANDARD, "ai.onnx.ml", "com.microsoft", "trt", "trt.plugins")


@dataclass(frozen=True)
class Rule:
    """A rule. ``runtimes``: which it concerns. ``consequence`` and ``fix``: a sentence each. ``find``: its check."""

    id: str
    severity: Severity
    runtimes: tuple[Runtime, ...]
    consequence: str
    fix: str
    source: str
    find: Callable[[QdqGraph], Found]


RULES: dict[str, Rule] = {}


def _rule(
    id_: str, severity: Severity, *runtimes: Runtime, consequence: str, fix: str, source: str
) -> Callable[[Callable[[QdqGraph], Found]], Callable[[QdqGraph], Found]]:
    def register(find: Callable[[QdqGraph], Found]) -> Callable[[QdqGraph], Found]:
        RULES[id_] = Rule(id_, severity, runtimes, consequence, fix, source, find)
        return find

    return register


# What a runtime cannot read at all.


@_rule(
    "opset-too-new",
    "error",
    "ort",
    consequence="ONNX Runtime 1.31 and older refuse the file.",
    fix="Export with opset 21 and IR version 10, which every ONNX Runtime since 1.18 reads.",
    source=f"{_ORT}: it reads up to opset {ORT_OPSET} and IR version {ORT_IR_VERSION}",
)
def _opset_too_new(graph: QdqGraph) -> Found:
    if graph.opset > ORT_OPSET:
        yield None, f"opset {graph.opset}"
    if graph.model.ir_version > ORT_IR_VERSION:
        yield None, f"IR version {graph.model.ir_version}"


@_rule(
    "opset-too-old",
    "error",
    "ort",
    consequence="ONNX Runtime refuses 4-bit codes in an older opset (TensorRT takes them).",
    fix="Export with opset 21 or newer.",
    source=_ORT,
)
def _opset_too_old(graph: QdqGraph) -> Found:
    for node in graph.qdq:
        if node.domain in STANDARD and code_type(node) in _FOUR and graph.opset < 21:
            yield node, f"{code_type(node).name} in opset {graph.opset}"


@_rule(
    "type-conflict",
    "error",
    "ort",
    consequence="ONNX Runtime refuses a file that states another type than the operator computes (TensorRT ignores "
    "the statement).",
    fix="Drop value_info from the file, and state what is computed for outputs; then run the simplifier again that "
    "wrote it, in a newer version, or leave it out.",
    source=f"{_ORT}; https://github.com/microsoft/onnxruntime/issues/21576",
)
def _type_conflict(graph: QdqGraph) -> Found:
    for node, value, stated in graph.contradictions:
        computed = "unknown" if value.dtype is None else value.dtype.name
        yield node, f"{value.name} is stated to be {stated.name}, and is {computed}"


@_rule(
    "unknown-domain",
    "error",
    "trt",
    "ort",
    consequence="Neither TensorRT nor ONNX Runtime knows the operator, unless a library of its maker is loaded.",
    fix="Export with standard operators, or load the library before the model.",
    source="the ONNX standard: what an operator of a custom domain means is up to its maker",
)
def _unknown_domain(graph: QdqGraph) -> Found:
    local = {(function.domain, function.name) for function in graph.model.functions.values()}
    for node in graph.nodes:
        if node.domain not in _KNOWN_DOMAINS and (node.domain, node.op_type) not in local:
            yield node, f"{node.domain}::{node.op_type}"


@_rule(
    "integer-operator",
    "error",
    "trt",
    consequence="TensorRT has no such operator: the file does not parse.",
    fix="Write quantisation as QuantizeLinear and DequantizeLinear, everything else in the standard's operators.",
    source=f"{_TRT} (OnnxParser.supports_operator)",
)
def _integer_operator(graph: QdqGraph) -> Found:
    for node in graph.nodes:
        if node.op_type in _TRT_REFUSES:
            yield node, node.op_type


@_rule(
    "weight-only-operator",
    "error",
    "trt",
    consequence="It is an operator of ONNX Runtime. TensorRT hands it to a plug-in, which has to be loaded, and takes "
    "FP16 inputs of 2 or 3 dimensions and blocks of 32, 64 or 128 only: else the file does not parse.",
    fix="For TensorRT store the weights as INT4 with DequantizeLinear in blocks of 64 or 128 (ONNX Runtime's "
    "quantiser: quant_format=QuantFormat.QDQ).",
    source=_TRT,
)
def _weight_only_operator(graph: QdqGraph) -> Found:
    for node in graph.nodes:
        if node.domain == "com.microsoft" and node.op_type == "MatMulNBits":
            x, size = operand(node, 0), node.attributes.get_int("block_size", 0)
            kind = "unknown type" if x is None or x.dtype is None else x.dtype.name
            rank = "" if x is None or x.shape is None else f" of {len(x.shape)} dimensions"
            yield node, f"{kind}{rank} by {node.attributes.get_int('bits', 4)}-bit weights in blocks of {size}"


@_rule(
    "codes-computed",
    "error",
    "trt",
    consequence="TensorRT takes constant codes only directly in front of DequantizeLinear: the engine does not build.",
    fix="Compute the codes before they are stored, by folding constants (Brevitas clips the codes of narrow weights in "
    "the graph).",
    source=f"{_TRT}: Quantized constant is only allowed before DQ",
)
def _codes_computed(graph: QdqGraph) -> Found:
    for node in graph.nodes:
        if is_quantize(node) or is_dequantize(node):
            continue
        value = operand(node, 0)
        if value is not None and value.dtype in _TRT_CODES and graph.is_constant(value):
            yield node, f"{value.dtype.name} codes go through {node.op_type}"


@_rule(
    "zero-point",
    "error",
    "trt",
    consequence="TensorRT takes symmetric quantisation only: the file does not parse.",
    fix="Quantise symmetrically; an asymmetric 4-bit grid fits INT8 with zero point 0 and shifted Clip bounds.",
    source=f"{_TRT}; https://docs.nvidia.com/deeplearning/tensorrt/11.0.0/inference-library/work-quantized-types.html",
)
def _zero_point(graph: QdqGraph) -> Found:
    for node in graph.qdq:
        zeros = constant(operand(node, 2))
        if zeros is not None and np.any(zeros.astype(np.float32)):
            yield node, f"zero point {zeros.astype(np.float32).ravel()[0]:g}"


@_rule(
    "code-type",
    "error",
    "trt",
    consequence="TensorRT knows no such codes: the file does not parse.",
    fix="Use INT8, FP8, or INT4 for weights; keep biases in floating point.",
    source=_TRT,
)
def _code_type(graph: QdqGraph) -> Found:
    for node in graph.qdq:
        if code_type(node) not in (*_TRT_CODES, ir.DataType.UNDEFINED, ir.DataType.INT32):
            yield node, code_type(node).name


@_rule(
    "int32-bias",
    "error",
    "trt",
    consequence="TensorRT dequantises no INT32: the file does not parse.",
    fix="Keep biases in floating point (ONNX Runtime's quantiser: QuantizeBias=False).",
    source=_TRT,
)
def _int32_bias(graph: QdqGraph) -> Found:
    for node in graph.qdq:
        if code_type(node) == ir.DataType.INT32:
            yield node, "INT32"


@_rule(
    "uint8-codes",
    "warning",
    "trt",
    consequence="TensorRT reads UINT8 as INT8: codes above 127 saturate, with a warning in its log only.",
    fix="Use INT8.",
    source=_TRT,
)
def _uint8_codes(graph: QdqGraph) -> Found:
    for node in graph.qdq:
        if code_type(node) == ir.DataType.UINT8 and constant(operand(node, 2)) is not None:
            yield node, "UINT8"


@_rule(
    "int4-activation",
    "error",
    "trt",
    consequence="TensorRT's INT4 is for weights: this may build, but no INT4 kernel is documented to run it, and "
    "attention does not build.",
    fix="Carry 4-bit activations in INT8: Clip(-8s, 7s), then INT8 QuantizeLinear with the same scale.",
    source=f"{_TRT} (builds, kernels not run); documentation, Working with Quantized Types",
)
def _int4_activation(graph: QdqGraph) -> Found:
    for node in graph.activation_quantizers:
        if code_type(node) == ir.DataType.INT4:
            yield node, "INT4"


@_rule(
    "block-weight",
    "error",
    "trt",
    consequence="TensorRT cannot build blocks of weights that meet quantised activations.",
    fix="One scale for each output channel, or activations in floating point.",
    source=_TRT,
)
def _block_weight(graph: QdqGraph) -> Found:
    for linear, _, weight in graph.quantized:
        if block_size(weight.node):
            yield linear.node, f"blocks of {block_size(weight.node)}"


@_rule(
    "mixed-code-types",
    "error",
    "trt",
    consequence="TensorRT multiplies an 8-bit type only by its own kind: the engine does not build.",
    fix="Use FP8 for both factors, or INT8 activations with INT8 or INT4 weights.",
    source=_TRT,
)
def _mixed_code_types(graph: QdqGraph) -> Found:
    for linear, x, weight in graph.quantized:
        types = x.code_type, weight.code_type
        if (types[0] in _FP8) != (types[1] in _FP8) and ir.DataType.UNDEFINED not in types:
            yield linear.node, f"{types[0].name} by {types[1].name}"


@_rule(
    "mixed-float-types",
    "error",
    "trt",
    "ort",
    consequence="The result of DequantizeLinear has the type of its scale, and the factors of a product must agree: "
    "the file does not load.",
    fix="Use scales of the tensor's own type, or a Cast around QuantizeLinear and DequantizeLinear.",
    source=f"{_TRT}; {_ORT}",
)
def _mixed_float_types(graph: QdqGraph) -> Found:
    for node in graph.nodes:
        if is_op(node, "MatMul", "Gemm", "Conv") or (is_quantize(node) and graph.opset < 23):
            types = [value.dtype for value in node.inputs[:2] if value is not None and value.dtype is not None]
            if len(set(types)) > 1:
                yield node, f"{types[0].name} and {types[1].name}"


@_rule(
    "output-dtype",
    "error",
    "ort",
    consequence="ONNX Runtime does not load a DequantizeLinear whose type differs from its scale's.",
    fix="Leave output_dtype out and use scales of the wanted type.",
    source=_ORT,
)
def _output_dtype(graph: QdqGraph) -> Found:
    for node in graph.qdq:
        wanted, scale = node.attributes.get_int("output_dtype", 0), operand(node, 1)
        found = None if scale is None else scale.dtype
        if is_dequantize(node) and wanted and found is not None and found != wanted:
            yield node, f"output_dtype {ir.DataType(wanted).name}, scale {found.name}"


@_rule(
    "bfloat16-codes",
    "error",
    "ort",
    consequence="ONNX Runtime's CPU provider has no kernel for it.",
    fix="Use FP32 scales and tensors on CPUs.",
    source=_ORT,
)
def _bfloat16_codes(graph: QdqGraph) -> Found:
    for node in graph.qdq:
        scale = operand(node, 1)
        if scale is not None and scale.dtype == ir.DataType.BFLOAT16:
            yield node, "BFLOAT16"


# Scales.


@_rule(
    "scale-not-positive",
    "error",
    "trt",
    consequence="TensorRT refuses it.",
    fix="Give every scale a positive finite number: an all-zero channel may have any, such as 1.",
    source=f"{_TRT}: Scale coefficients must all be positive",
)
def _scale_not_positive(graph: QdqGraph) -> Found:
    for node in graph.qdq:
        yield from _scales(node, _not_positive)


@_rule(
    "scale-divides-by-zero",
    "error",
    "ort",
    consequence="ONNX Runtime computes with it all the same, and returns infinities, NaN or saturated codes.",
    fix="Give every scale a positive finite number: an all-zero channel may have any, such as 1.",
    source=_ORT,
)
def _scale_divides_by_zero(graph: QdqGraph) -> Found:
    for node in graph.qdq:
        # A negative scale of a weight flips its sign, which may be meant.
        yield from _scales(node, _not_positive if is_quantize(node) else _not_finite)


def _not_finite(values: np.ndarray) -> np.ndarray:
    finite: np.ndarray = np.isfinite(values)
    return ~finite


def _not_positive(values: np.ndarray) -> np.ndarray:
    return _not_finite(values) | (values <= 0)


def _scales(node: ir.Node, wrong: Callable[[np.ndarray], np.ndarray]) -> Found:
    scale = scale_of(node)
    if scale is not None:
        values = scale.astype(np.float64).ravel()
        found = values[wrong(values)]
        if found.size:
            yield node, f"{found.size} of {values.size} scales, such as {found[0]:.3g}"


@_rule(
    "fp16-scale-range",
    "warning",
    "trt",
    consequence="FP16 holds it with few bits, as zero or as infinity: an FP16 engine computes with another number.",
    fix="Keep scales within 6.1e-5 and 65504: rescale the tensor, or fold a factor into the weights before it.",
    source="IEEE 754 binary16; TensorRT refuses zero and infinity",
)
def _fp16_scale_range(graph: QdqGraph) -> Found:
    for node in graph.qdq:
        yield from _scales(node, lambda s: (s > 0) & np.isfinite(s) & ((s < FP16_SMALLEST) | (s > FP16_LARGEST)))


@_rule(
    "dynamic-scale",
    "warning",
    "trt",
    consequence="TensorRT needs constant scales, and multiplies in floating point without telling.",
    fix="Calibrate the scale and store it in the file.",
    source=_TRT,
)
def _dynamic_scale(graph: QdqGraph) -> Found:
    for node in graph.activation_quantizers:
        if not graph.is_constant(operand(node, 1)):
            yield node, "its scale is computed"


@_rule(
    "per-channel-activation",
    "warning",
    "trt",
    consequence="An INT8 product takes one activation scale: TensorRT multiplies in floating point without telling.",
    fix="Fold the factors into the norm before it and the weights behind it, and keep one scale.",
    source=_TRT,
)
def _per_channel_activation(graph: QdqGraph) -> Found:
    for node in graph.activation_quantizers:
        if channels(node) > 1:
            yield node, f"{channels(node)} scales"


@_rule(
    "per-channel-activation-8-bit",
    "error",
    "ort",
    consequence="ONNX Runtime fuses it to MatMulIntegerToFloat, which throws at run time.",
    fix="Fold the factors into the norm before it and the weights behind it, and keep one scale.",
    source=_ORT,
)
def _per_channel_activation_8_bit(graph: QdqGraph) -> Found:
    for linear, x, weight in graph.quantized:
        if (
            is_op(linear.node, "MatMul")
            and x.code_type in _EIGHT
            and weight.code_type in _EIGHT
            and channels(x.node) > 1
        ):
            yield linear.node, f"{channels(x.node)} scales"


@_rule(
    "reduction-axis",
    "warning",
    "trt",
    consequence="Scales along the axis that is summed over cannot leave the sum: TensorRT multiplies in floating point "
    "without telling.",
    fix="One scale for each output channel: axis 1 of a MatMul's [K, N], axis 0 of a Conv's [N, C, kh, kw].",
    source=_TRT,
)
def _reduction_axis(graph: QdqGraph) -> Found:
    for linear in graph.linears:
        if linear.scales_the_reduction():
            yield linear.node, "weight scales on the reduction axis"


# Linears.


@_rule(
    "fused-qkv",
    "warning",
    "trt",
    consequence="TensorRT slices the weights instead of the result, which the scales of channels cannot follow: it "
    "multiplies in floating point without telling.",
    fix="Export q, k and v as three MatMuls that share one quantised input, or give the weight a single scale.",
    source=_TRT,
)
def _fused_qkv(graph: QdqGraph) -> Found:
    weights = {id(linear.node): weight for linear, _, weight in graph.quantized}
    for attention in graph.attentions:
        sources = list(graph.projections(attention).values())
        for node in {id(source): source for source, _ in sources}.values():
            weight, parts = weights.get(id(node)), [quantised for source, quantised in sources if source is node]
            # A quantiser on any of them keeps the slices where they are, behind the product.
            if len(parts) > 1 and not any(parts) and weight is not None and channels(weight.node) > 1:
                yield node, f"feeds {len(parts)} of q, k and v; a scale for each channel"


@_rule(
    "cast-after-int4",
    "warning",
    "trt",
    consequence="TensorRT dequantises the weight in a kernel of its own and multiplies in floating point.",
    fix="Give INT4 weights scales of the graph's own type and connect DequantizeLinear to the MatMul.",
    source=_TRT,
)
def _cast_after_int4(graph: QdqGraph) -> Found:
    for linear in graph.linears:
        weight = linear.weight
        casts = weight is not None and any(is_op(node, "Cast") for node in weight.between)
        if casts and weight is not None and weight.code_type == ir.DataType.INT4:
            yield linear.node, "Cast between DequantizeLinear and its weight operand"


@_rule(
    "int4-per-channel-weight-only",
    "warning",
    "trt",
    consequence="Without blocks, TensorRT dequantises INT4 weights in a kernel of its own: no traffic is saved.",
    fix="Blocks of 64 or 128 along K, with each channel's scale repeated, are dequantised inside the product.",
    source=_TRT,
)
def _int4_weight_only(graph: QdqGraph) -> Found:
    for linear, weight in graph.weight_only:
        if weight.code_type == ir.DataType.INT4 and not block_size(weight.node):
            yield linear.node, "INT4 weight without blocks, activation in floating point"


@_rule(
    "weight-only",
    "warning",
    "ort",
    consequence="ONNX Runtime makes it MatMulNBits, which rounds activations to 8 bits: other numbers without telling.",
    fix="Set the session option session.qdq_matmulnbits_accuracy_level to 1, or quantise the activation as well.",
    source=_ORT,
)
def _weight_only(graph: QdqGraph) -> Found:
    for linear, weight in graph.weight_only:
        direct = is_op(linear.node, "MatMul") and linear.weight_index == 1 and not weight.between
        if direct and weight.code_type in (*_EIGHT, *_FOUR):
            yield linear.node, f"{weight.code_type.name} weight, activation in floating point"


@_rule(
    "float-weight",
    "warning",
    "trt",
    "ort",
    consequence="The activation is rounded for nothing: the product is in floating point.",
    fix="Quantise the weight as well, or drop the activation's quantiser.",
    source=f"{_TRT}; {_ORT}",
)
def _float_weight(graph: QdqGraph) -> Found:
    for linear in graph.linears:
        if linear.activation is not None and linear.weight is None:
            yield linear.node, "quantised activation, weight in floating point"


@_rule(
    "product-requantised",
    "warning",
    "ort",
    consequence="The result is rounded to 8 bits before its bias is added: other numbers, and half as fast again.",
    fix="Quantise inputs only (ONNX Runtime's quantiser: OpTypesToExcludeOutputQuantization=['MatMul']).",
    source=_ORT,
)
def _product_requantised(graph: QdqGraph) -> Found:
    for linear, _, _ in graph.quantized:
        for quantize in filter(is_quantize, linear.node.outputs[0].consumers()):
            if any(is_op(reader, "Add") for it in quantize.outputs[0].consumers() for reader in behind(it, ())):
                yield linear.node, "quantised again before Add"


@_rule(
    "unquantised-linear",
    "note",
    "trt",
    "ort",
    consequence="It runs in floating point beside quantised ones.",
    fix="Quantise it as well, unless accuracy forbids.",
    source="counted in the file",
)
def _unquantised_linear(graph: QdqGraph) -> Found:
    for linear in graph.linears if graph.quantized else []:
        if linear.activation is None and linear.weight is None:
            yield linear.node, "neither factor is quantised"


@_rule(
    "float32-network",
    "warning",
    "trt",
    consequence="TensorRT keeps the types of the file: what is between the quantised products runs in FP32, often "
    "slower than all of it in FP16.",
    fix="Convert the floating point part to FP16 before the build.",
    source=f"{_TRT}; https://github.com/NVIDIA/Model-Optimizer/issues/167",
)
def _float32_network(graph: QdqGraph) -> Found:
    if graph.qdq:
        for node in graph.nodes:
            if is_op(node, "LayerNormalization", "Softmax", "Gelu") and node.outputs[0].dtype == ir.DataType.FLOAT:
                yield node, f"{node.op_type} in FP32"


# Attention.


def _int8_attentions(graph: QdqGraph) -> Iterator[Attention]:
    """Those of which q, k, p and v all are INT8."""
    for attention in graph.attentions:
        found = attention.quantized.values()
        if len(found) == 4 and all(source.code_type in _EIGHT for source in found):
            yield attention


@_rule(
    "partial-attention",
    "warning",
    "trt",
    consequence="TensorRT fuses attention when all of q, k, v and the softmax output are quantised, or none: it runs "
    "unfused, slower than in FP16.",
    fix="Quantise all four (and the output, for INT8), or none.",
    source=f"{_TRT}; https://github.com/NVIDIA/TensorRT/issues/4167",
)
def _partial_attention(graph: QdqGraph) -> Found:
    for attention in graph.attentions:
        names = set(attention.quantized)
        # Others are rounded in front of the FP16 kernel, which is for nothing, but harmless.
        if len(names) < 4 and ("p" in names or names >= {"q", "k"}):
            missing = ", ".join(name for name in "qkvp" if name not in names)
            yield attention.softmax, f"not quantised: {missing}"


@_rule(
    "clip-after-softmax",
    "warning",
    "trt",
    consequence="TensorRT does not fuse the attention: every score is written to memory.",
    fix="Drop it: softmax is at most 1, so that no clamp is needed if the scale is at least 1/15 (recipe: "
    "softmax_scale: full); 8 bits: 1/127.",
    source=_TRT,
)
def _clip_after_softmax(graph: QdqGraph) -> Found:
    for attention in graph.attentions:
        if any(is_quantize(node) for node in attention.between):
            for node in attention.between:
                if node.op_type in ROUNDING:
                    yield node, f"{node.op_type} between softmax and its QuantizeLinear"


@_rule(
    "clip-on-attention-output",
    "warning",
    "trt",
    consequence="TensorRT does not fuse an INT8 attention whose output is not quantised at once.",
    fix="QuantizeLinear, DequantizeLinear, Clip, QuantizeLinear, DequantizeLinear with one scale compute the same.",
    source=_TRT,
)
def _clip_on_attention_output(graph: QdqGraph) -> Found:
    for attention in _int8_attentions(graph):
        for node in attention.readers():
            if is_op(node, *ROUNDING):
                yield node, f"{node.op_type} between attention and the QuantizeLinear of its output"


@_rule(
    "attention-output",
    "warning",
    "trt",
    consequence="TensorRT does not fuse an INT8 attention whose output is not quantised.",
    fix="Quantise the input of the output projection.",
    source=f"{_TRT}; https://github.com/NVIDIA/TensorRT/issues/2981",
)
def _attention_output(graph: QdqGraph) -> Found:
    for attention in _int8_attentions(graph):
        if not any(is_quantize(node) or is_op(node, *ROUNDING) for node in attention.readers()):
            yield attention.pv, "q, k, v and p are INT8, the output is not quantised"


@_rule(
    "attention-shape",
    "warning",
    "trt",
    consequence="TensorRT fuses INT8 attention for heads of 16, 32 or 64 and up to 512 tokens only: it runs unfused, "
    "slower than in FP16.",
    fix="Leave q, k, v and the softmax output of this attention in FP16, or use FP8.",
    source=f"{_TRT}; https://github.com/NVIDIA/TensorRT/issues/3714",
)
def _attention_shape(graph: QdqGraph) -> Found:
    for attention in _int8_attentions(graph):
        width, tokens = attention.head_dim, attention.tokens
        if (width is not None and width not in MHA_HEAD_DIMS) or (tokens is not None and tokens > MHA_TOKENS):
            yield attention.softmax, f"heads of {width}, {tokens} tokens"


# What ONNX Runtime's optimiser does.


@_rule(
    "consecutive-qdq",
    "warning",
    "ort",
    consequence="ONNX Runtime merges two pairs of 8-bit codes in a row into one: other numbers without telling.",
    fix="One pair; for a narrower grid a Clip of the codes between QuantizeLinear and DequantizeLinear.",
    source=f"{_ORT} (DoubleQDQPairsRemover)",
)
def _consecutive_qdq(graph: QdqGraph) -> Found:
    for second in graph.activation_quantizers:
        dequantize = producer(operand(second, 0))
        first = producer(operand(dequantize, 0)) if dequantize is not None and is_dequantize(dequantize) else None
        if first is None or not is_quantize(first) or not {code_type(first), code_type(second)} <= set(_EIGHT):
            continue
        before, after = scale_of(first), scale_of(second)
        if before is not None and after is not None and not np.array_equal(before, after):
            yield second, f"scales {before.ravel()[0]:g}, then {after.ravel()[0]:g}"


@_rule(
    "int8-transpose",
    "error",
    "ort",
    consequence="ONNX Runtime's optimiser moves the pair and changes half of its types: the session is not created.",
    fix="UINT8 with zero point 128, or QuantizeLinear behind the Transpose (session.qdqisint8allowed=1 also helps).",
    source=f"{_ORT}; https://github.com/microsoft/onnxruntime/issues/25526",
)
def _int8_transpose(graph: QdqGraph) -> Found:
    for node in graph.qdq if graph.opset >= 21 else []:
        if is_dequantize(node) and code_type(node) == ir.DataType.INT8 and is_quantize(producer(operand(node, 0))):
            moved = [reader for reader in node.outputs[0].consumers() if is_op(reader, *_MOVED_BY_ORT)]
            requantized = all(is_quantize(reader) for mover in moved for reader in behind(mover, _MOVED_BY_ORT))
            if moved and not requantized and not graph.is_constant(operand(node, 0)):
                yield node, f"INT8 in front of {moved[0].op_type}"


@_rule(
    "merged-quantizer",
    "error",
    "ort",
    consequence="ONNX Runtime's optimiser drops the Relu or rounds the bias: other numbers; the others it cannot load.",
    fix="A Max with the value of the lowest code in front of QuantizeLinear: codes stay, and nothing merges it.",
    source=f"{_ORT} (ReluQuantRewrite, ClipQuantRewrite, WeightBiasQuantization)",
)
def _merged_quantizer(graph: QdqGraph) -> Found:
    crossed = (*_MOVED_BY_ORT, "Relu", "Clip", "MaxPool")
    for node in graph.activation_quantizers:
        merged = {"INT4": ("Relu", "Clip", "MaxPool"), "UINT4": ("Clip", "MaxPool")}.get(code_type(node).name, ())
        before = producer(operand(node, 0))
        while before is not None and is_op(before, *crossed):
            if is_op(before, *merged):
                yield node, f"{code_type(node).name} behind {before.op_type}"
                break
            before = producer(operand(before, 0))
        if before is not None and is_op(before, "Conv") and operand(before, 2) is not None and _has_four_bits(before):
            yield node, "behind a Conv of 4-bit codes with a bias"


def _has_four_bits(conv: ir.Node) -> bool:
    """Whether both factors are quantised, and one of them to 4 bits."""
    factors = [producer(operand(conv, index)) for index in (0, 1)]
    return all(map(is_dequantize, factors)) and any(it is not None and code_type(it) in _FOUR for it in factors)


@_rule(
    "static-batch",
    "warning",
    "ort",
    consequence="With static shapes ONNX Runtime makes MatMul and Add a Gemm in FP32: slower than without INT8.",
    fix="Export with a symbolic batch, or disable the optimiser MatMulAddFusion.",
    source=_ORT,
)
def _static_batch(graph: QdqGraph) -> Found:
    for linear, _, _ in graph.quantized:
        x = operand(linear.node, 0)
        shape = None if x is None else x.shape
        readers = linear.node.outputs[0].consumers()
        added = len(readers) == 1 and is_op(readers[0], "Add") and any(map(graph.is_constant, readers[0].inputs))
        if added and is_op(linear.node, "MatMul") and shape is not None and shape.is_static():
            yield linear.node, f"input {list(shape)}"


@_rule(
    "skip-layer-normalization",
    "warning",
    "ort",
    consequence="Its CPU kernel is ten times slower than Add and LayerNormalization.",
    fix="Do not run onnxruntime.transformers.optimizer on the file.",
    source=_ORT,
)
def _skip_layer_normalization(graph: QdqGraph) -> Found:
    for node in graph.nodes:
        if node.domain == "com.microsoft" and node.op_type == "SkipLayerNormalization":
            yield node, node.op_type


@_rule(
    "fp16-codes",
    "warning",
    "ort",
    consequence="ONNX Runtime's CPU provider fuses quantised products with FP32 scales only: many times slower.",
    fix="Keep FP32 on CPUs.",
    source=_ORT,
)
def _fp16_codes(graph: QdqGraph) -> Found:
    for linear, _, _ in graph.quantized:
        if linear.node.outputs[0].dtype == ir.DataType.FLOAT16:
            yield linear.node, "product in FP16"


@_rule(
    "four-bit-arithmetic",
    "note",
    "ort",
    consequence="CPUs have no 4-bit products: ONNX Runtime dequantises, and runs about twice as long as in FP32.",
    fix="Fine as a reference; for speed, carry the codes in 8 bits (export for the CPU).",
    source=_ORT,
)
def _four_bit_arithmetic(graph: QdqGraph) -> Found:
    for linear, x, _ in graph.quantized:
        if x.code_type in _FOUR:
            yield linear.node, f"{x.code_type.name} activation"
