"""The passes that prepare a graph for engines: what each changes, what it leaves, that the numbers stay the same."""

from collections import Counter
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from gplq_export.passes.agree_on_types import agree_on_types
from gplq_export.passes.common import FP8_CODES, FP8_STEP, MARKED
from gplq_export.passes.drop_idle_clips import drop_idle_clips
from gplq_export.passes.fold_constants import fold_constants
from gplq_export.passes.hoist_quantizers import hoist_quantizers
from gplq_export.passes.saturate_before_clip import saturate_before_clip
from gplq_export.runtimes import reference_session
from gplq_export.targets import Pass

HEADER = '<ir_version: 10, opset_import: ["": 21]> g (float[2, 6, 8] x) => (float[shape] y) '


def parse(constants: str, nodes: str, shape: str = "a, b, c") -> ir.Model:
    model = onnx.parser.parse_model(f"{HEADER.replace('shape', shape)} <{constants}> {{ {nodes} }}")
    for index, node in enumerate(model.graph.node):
        node.name = f"{node.op_type}_{index}"
    return ir.from_proto(model)


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def run(model: ir.Model, x: NDArray[np.float32]) -> NDArray[np.float32]:
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    y: NDArray[np.float32] = reference_session(proto.SerializeToString()).run(None, {"x": x})[0]
    return y


def inputs() -> NDArray[np.float32]:
    """Within and beyond all ranges, with ties of the scales used here."""
    x = np.random.default_rng(0).normal(size=(2, 6, 8)).astype(np.float32) * 3
    x[0, 0] = np.arange(-4, 4) / 8 + 1 / 16
    return x


def apply(graph_pass: Pass, model: ir.Model) -> bool:
    """Apply a pass; what the graph computes must stay the same, bit by bit, and the second time nothing changes."""
    expected = run(model, inputs())
    changed = graph_pass(model)
    np.testing.assert_array_equal(run(model, inputs()), expected)
    nodes = operators(model)
    assert not graph_pass(model)
    assert operators(model) == nodes
    return changed


CONSTANTS = "float s = {0.125}, int8 z = {0}, float lo = {-1.0}, float hi = {0.875}, float two = {2.0}, "
QUANTIZED = "c = Clip(q, lo, hi) d = QuantizeLinear(c, s, z) e = DequantizeLinear(d, s, z) "


def test_quantiser_moves_in_front_of_reshape_and_transpose() -> None:
    model = parse(
        CONSTANTS + "int64[4] shape = {0, 6, 2, 4}",
        "r = Reshape(x, shape) t = Transpose <perm = [0, 2, 1, 3]> (r) q = Mul(t, two) " + QUANTIZED + "y = Relu(e)",
        "a, b, c, d",
    )
    assert apply(hoist_quantizers, model)
    assert operators(model) == ["Mul", "Clip", "QuantizeLinear", "DequantizeLinear", "Reshape", "Transpose", "Relu"]


@pytest.mark.parametrize("why", ["another reader", "marked", "a factor for each channel", "a scale for each channel"])
def test_quantiser_stays(why: str) -> None:
    constants, nodes, scale = CONSTANTS, "q = Transpose(x) ", "s"
    if why == "a factor for each channel":
        constants, nodes = constants + "float[2] each = {1.0, 2.0}, ", "t = Transpose(x) q = Mul(t, each) "
    if why == "a scale for each channel":
        constants, scale = constants + "float[2] many = {0.125, 0.25}, int8[2] zeros = {0, 0}, ", "many"
    body = QUANTIZED.replace("s, z", f"{scale}, zeros" if scale == "many" else "s, z").replace(
        "(d, many", "<axis = 2> (d, many"
    )
    body = body.replace("QuantizeLinear(c, many", "QuantizeLinear <axis = 2> (c, many")
    end = "y = Add(e, q)" if why == "another reader" else "y = Relu(e)"
    model = parse(constants.rstrip(", "), nodes + body + end)
    if why == "marked":
        next(node for node in model.graph if node.op_type == "Transpose").outputs[0].meta[MARKED] = True
    assert not apply(hoist_quantizers, model)


def softmax(scale: float, high: float, low: float = 0.0, before: str = "Softmax") -> ir.Model:
    constants = f"float s = {{{scale!r}}}, int8 z = {{0}}, float lo = {{{low!r}}}, float hi = {{{high!r}}}"
    return parse(constants, f"q = {before}(x) " + QUANTIZED + "y = Relu(e)")


@pytest.mark.parametrize(
    ("scale", "codes", "idle"),
    [
        (1 / 15, 15, True),
        (0.0646, 15, True),  # 1 / 0.0646 = 15.48 rounds to 15
        (0.0644, 15, False),  # 15.53 rounds to 16
        (0.01, 15, False),
        (1 / 127, 127, True),
        (0.0001, 127, True),  # probabilities above 127 codes saturate by themselves
    ],
)
def test_clip_behind_softmax(scale: float, codes: int, idle: bool) -> None:
    model = softmax(scale, codes * scale)
    assert apply(drop_idle_clips, model) == idle
    assert ("Clip" not in operators(model)) == idle


def test_clip_stays_where_it_may_bind() -> None:
    assert not apply(drop_idle_clips, softmax(1 / 127, 1.0, before="Gelu"))  # values below zero
    assert not apply(drop_idle_clips, softmax(0.125, 0.875, -1.0, before="Relu"))
    assert apply(drop_idle_clips, softmax(0.125, 127 * 0.125, -16.0, before="Relu"))  # the limits of INT8
    both = parse(
        "float s = {0.1}, int8 z = {0}, float lo = {0.0}, float hi = {1.5}",
        "q = Softmax(x) " + QUANTIZED + "y = Add(e, c)",
    )
    assert not apply(drop_idle_clips, both)  # the Clip has another reader, that does not saturate


PRODUCT = (
    "a = QuantizeLinear(x, s, z) b = DequantizeLinear(a, s, z) t = Transpose <perm = [0, 2, 1]> (b) "
    "p = MatMul(b, t) q = Reshape(p, shape) "
)


def test_product_saturates_before_it_is_clipped() -> None:
    model = parse(CONSTANTS + "int64[2] shape = {2, 36}", PRODUCT + QUANTIZED + "y = Relu(e)", "a, b")
    assert apply(saturate_before_clip, model)
    quantizers = ["QuantizeLinear", "DequantizeLinear"]
    assert operators(model)[5:] == [*quantizers, "Clip", *quantizers, "Relu"]
    linear = parse(
        CONSTANTS + "int8[8, 1] w = {1, 2, 3, 4, 5, 6, 7, 8}",
        "v = DequantizeLinear(w, s) q = MatMul(x, v) " + QUANTIZED + "y = Relu(e)",
    )
    assert not apply(saturate_before_clip, linear)


FP8 = "float wide = {64.0}, float8e4m3fn f = {0}, "


def fp8(clip: bool = True) -> str:
    return QUANTIZED.replace("s, z", "wide, f") if clip else QUANTIZED.replace("c = Clip(q, lo, hi)", "")


def test_product_in_int8_saturates_in_int8_in_front_of_fp8() -> None:
    model = parse(CONSTANTS + FP8 + "int64[2] shape = {2, 36}", PRODUCT + fp8() + "y = Relu(e)", "a, b")
    assert apply(saturate_before_clip, model)
    zeros = [node.inputs[2].dtype for node in model.graph if node.op_type == "QuantizeLinear"]
    assert zeros == [ir.DataType.INT8, ir.DataType.INT8, ir.DataType.FLOAT8E4M3FN]


def test_factors_agree_on_int8() -> None:
    """FP8 probabilities of an attention whose values are INT8; what is FP8 on both sides stays so."""
    model = parse(
        CONSTANTS + FP8.rstrip(", "),
        "cx = Clip(x, lo, hi) qx = QuantizeLinear(cx, wide, f) dx = DequantizeLinear(qx, wide, f) "
        "tx = Transpose <perm = [0, 2, 1]> (dx) scores = MatMul(dx, tx) soft = Softmax(scores) "
        "cp = Clip(soft, lo, hi) qp = QuantizeLinear(cp, wide, f) dp = DequantizeLinear(qp, wide, f) "
        "qv = QuantizeLinear(x, s, z) dv = DequantizeLinear(qv, s, z) y = MatMul(dp, dv)",
    )
    assert apply(agree_on_types, model)
    # The scores' factors, too: the two products of an attention become one kernel or none.
    quantizers = [node for node in model.graph if node.op_type == "QuantizeLinear"]
    assert [node.inputs[2].dtype for node in quantizers] == [ir.DataType.INT8] * 3
    assert [float(node.inputs[1].const_value.numpy()) for node in quantizers] == [0.125] * 3


@pytest.mark.parametrize("weight", ["float8e4m3fn", "int8"])
def test_weight_follows_its_activation(weight: str) -> None:
    """An FP8 weight becomes INT8 behind INT8 activations, and an FP8 activation in front of INT8 weights."""
    codes = np.random.default_rng(0).integers(-8, 8, (8, 3))
    stored, x_type = (ml_dtypes.float8_e4m3fn, "s, z") if weight != "int8" else (np.int8, "wide, f")
    model = parse(
        CONSTANTS + FP8.rstrip(", "),
        f"c = Clip(x, lo, hi) d = QuantizeLinear(c, {x_type}) e = DequantizeLinear(d, {x_type}) y = MatMul(e, hi)",
    )
    array = ir.Tensor(codes.astype(stored), name="w")
    value = ir.Value(name="w", const_value=array, type=ir.TensorType(array.dtype), shape=ir.Shape(codes.shape))
    model.graph.register_initializer(value)
    matmul = model.graph.node(-1)
    dequantize = ir.node("DequantizeLinear", [value, model.graph.initializers["s"]], name="w/DequantizeLinear")
    dequantize.outputs[0].name = "v"
    model.graph.insert_before(matmul, dequantize)
    matmul.replace_input_with(1, dequantize.outputs[0])
    assert apply(agree_on_types, model)
    assert value.dtype == ir.DataType.INT8
    assert np.array_equal(value.const_value.numpy(), codes)  # type: ignore[union-attr]
    assert matmul.inputs[0].producer().inputs[2].dtype == ir.DataType.INT8  # type: ignore[union-attr]


def test_fp8_rounds_to_the_grid_where_it_is_evenly_spaced() -> None:
    x = np.concatenate([np.linspace(-FP8_CODES, FP8_CODES, 100_001), np.arange(-31, 32) / 2]).astype(np.float32)
    codes = (x * np.float32(FP8_STEP)).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) / FP8_STEP
    assert np.array_equal(codes, np.rint(x))
    beyond = np.float32((FP8_CODES + 1) * FP8_STEP).astype(ml_dtypes.float8_e4m3fn)
    assert float(beyond) != (FP8_CODES + 1) * FP8_STEP


def test_what_is_constant_is_folded_and_codes_stay_codes() -> None:
    model = parse(
        CONSTANTS
        + "float[3, 1] table = {1.0, 2.0, 3.0}, int64[6] index = {0, 2, 1, 1, 2, 0}, int8[8, 8] w = {"
        + ", ".join(str(number % 16 - 8) for number in range(64))
        + "}",
        "g = Gather(table, index) v = DequantizeLinear(w, s) m = MatMul(x, v) y = Add(m, g)",
    )
    assert apply(fold_constants, model)
    assert Counter(operators(model)) == Counter(["DequantizeLinear", "MatMul", "Add"])
    added: Any = model.graph.node(-1).inputs[1]
    assert added.const_value.numpy().ravel().tolist() == [1, 3, 2, 2, 3, 1]
