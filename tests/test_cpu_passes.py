"""The passes of the CPU targets: each rule on the smallest graph it applies to, and on those that it must leave."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from numpy.typing import NDArray

from gplq_export.passes.fold_layer_scale import fold_layer_scale
from gplq_export.passes.integer_matmuls import integer_matmuls
from gplq_export.passes.keep_reduced_axes import keep_reduced_axes
from gplq_export.passes.select_before_norm import select_before_norm
from gplq_export.passes.transpose_keys_last import transpose_keys_last
from gplq_export.passes.unflatten_batch_norm import unflatten_batch_norm
from gplq_export.runtimes import openvino_core

RANDOM = np.random.default_rng(0)
CODES = RANDOM.integers(-8, 8, (6, 5)).astype(np.int8)
CONSTANTS: dict[str, NDArray[Any]] = {
    "codes": CODES,
    "scale": np.linspace(0.1, 0.5, 5, dtype=np.float32),
    "bias": RANDOM.standard_normal(5).astype(np.float32),
    "gamma": np.array([0.5, -2.0, 0.0, 3.0, 1.0], np.float32),
    "rows": np.ones((4, 5), np.float32),
    "a_scale": np.array(0.125, np.float32),
    "a_scales": np.full(6, 0.125, np.float32),
    "a_zero": np.array(248, np.uint8),
    "a_zeros": np.full(6, 248, np.uint8),
    "first": np.array(0, np.int64),
    "second": np.array([1], np.int64),
    "flat": np.array([-1, 5], np.int64),
    "narrow": np.array([-1, 5, 1], np.int64),
    "back": np.array([-1, 4, 5], np.int64),
    "variance": np.linspace(0.5, 2.0, 5, dtype=np.float32),
    "norm_weight": RANDOM.standard_normal(6).astype(np.float32),
    "norm_bias": RANDOM.standard_normal(6).astype(np.float32),
    "low": np.array(-0.8, np.float32),
    "high": np.array(0.7, np.float32),
    "lows": np.full((4, 1), -0.8, np.float32),
}
# DequantizeLinear of a weight, and what integer_matmuls is about.
WEIGHT = "w = DequantizeLinear<axis=1>(codes, scale)"
QUANTISED = "q = QuantizeLinear(x, a_scale, a_zero)\n a = DequantizeLinear(q, a_scale, a_zero)"


def model_of(nodes: str, shape: str = "B,4,6", out: str = "B,4,5") -> ir.Model:
    """A model of nodes in ONNX's text form; its constants are those of CONSTANTS that they read."""
    text = f'<ir_version: 10, opset_import: ["": 21]> g (float[{shape}] x) => (float[{out}] y) {{ {nodes} }}'
    model = ir.from_onnx_text(_add_constants(text))
    for node in model.graph:
        node.name = f"node_{node.outputs[0].name}"
    return model


def _add_constants(text: str) -> str:
    kinds = {"float32": "float", "int8": "int8", "uint8": "uint8", "int64": "int64"}
    used = [name for name in CONSTANTS if re.search(rf"\b{name}[,)]", text)]
    declared = []
    for name in used:
        array = CONSTANTS[name]
        values = ", ".join(str(float(v)) if array.dtype == np.float32 else str(int(v)) for v in array.ravel())
        shape = f"[{','.join(map(str, array.shape))}]" if array.ndim else ""
        declared.append(f"{kinds[str(array.dtype)]}{shape} {name} = {{{values}}}")
    return text.replace(" { ", f" <{', '.join(declared)}> {{ ", 1)


def run(model: ir.Model, x: NDArray[np.float32]) -> NDArray[np.float32]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    y: NDArray[np.float32] = session.run(None, {"x": x})[0]
    return y


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def check(graph_pass: Callable[[ir.Model], bool], model: ir.Model, expected: list[str]) -> None:
    """The pass gives the operators expected, keeps the numbers, and does nothing the second time."""
    x = np.random.default_rng(1).standard_normal((3, 4, 6)).astype(np.float32)
    before = run(model, x)
    assert graph_pass(model)
    assert operators(model) == expected
    np.testing.assert_allclose(run(model, x), before, rtol=1e-5, atol=1e-6)
    assert [value.name for value in model.graph.outputs] == ["y"]
    assert not graph_pass(model)
    assert operators(model) == expected


def check_left(graph_pass: Callable[[ir.Model], bool], model: ir.Model) -> None:
    before = ir.to_proto(model).SerializeToString()
    assert not graph_pass(model)
    assert ir.to_proto(model).SerializeToString() == before


@pytest.mark.parametrize("bias", ["p = MatMul(x, w)\n s = Add(p, bias)", "s = MatMul(x, w)"])
def test_layer_scale_goes_into_the_linear(bias: str) -> None:
    model = model_of(f"{WEIGHT}\n {bias}\n y = Mul(s, gamma)")
    check(fold_layer_scale, model, ["DequantizeLinear", "MatMul", *(["Add"] if "Add" in bias else [])])
    codes = model.graph.initializers["codes"].const_value
    assert codes is not None
    assert np.array_equal(codes.numpy(), CODES)


@pytest.mark.parametrize(
    "nodes",
    [
        f"{WEIGHT}\n s = MatMul(x, w)\n z = Mul(s, gamma)\n y = Add(z, s)",  # something else reads the linear
        f"{WEIGHT}\n s = MatMul(x, w)\n y = Mul(s, rows)",  # a factor for each token
        f"{WEIGHT}\n s = MatMul(x, w)\n t = MatMul(x, w)\n u = Mul(s, gamma)\n y = Add(t, u)",  # a shared weight
        f"{WEIGHT}\n p = MatMul(x, w)\n s = Add(p, rows)\n y = Mul(s, gamma)",  # no bias
        "w = Cast<to=1>(codes)\n s = MatMul(x, w)\n y = Mul(s, gamma)",  # no scale
    ],
)
def test_layer_scale_stays(nodes: str) -> None:
    check_left(fold_layer_scale, model_of(nodes))


BATCH_NORM = "n = BatchNormalization<epsilon=0.25>(f, scale, bias, gamma, variance)\n y = Reshape(n, back)"


@pytest.mark.parametrize("linear", ["p = MatMul(x, w)", "m = MatMul(x, w)\n p = Add(m, bias)"])
def test_batch_norm_becomes_a_scale_and_a_shift(linear: str) -> None:
    model = model_of(f"{WEIGHT}\n {linear}\n f = Reshape(p, flat)\n {BATCH_NORM}")
    biased = ["Add"] if "Add" in linear else []
    check(unflatten_batch_norm, model, ["DequantizeLinear", "MatMul", *biased, "Mul", "Add", "Reshape"])


@pytest.mark.parametrize(
    "nodes",
    [
        f"f = Reshape(x, flat)\n {BATCH_NORM}",  # other channels than those of the linear
        f"{WEIGHT}\n p = MatMul(x, w)\n f = Reshape(p, narrow)\n {BATCH_NORM}",
        f"{WEIGHT}\n p = MatMul(x, w)\n f = Reshape(p, flat)\n {BATCH_NORM.replace('y =', 'r =')}\n y = Add(r, n)",
    ],
)
def test_batch_norm_stays(nodes: str) -> None:
    check_left(unflatten_batch_norm, model_of(nodes))


@pytest.mark.parametrize("op_type", ["ReduceMax", "ReduceMean"])
def test_reduction_keeps_its_axes(op_type: str) -> None:
    model = model_of(f"r = {op_type}<keepdims=0>(x, second)\n y = Relu(r)", out="B,6")
    check(keep_reduced_axes, model, [op_type, "Squeeze", "Relu"])
    check_left(keep_reduced_axes, model_of(f"y = {op_type}<keepdims=1>(x, second)", out="B,1,6"))


NORM = "n = LayerNormalization<axis=-1>(x, norm_weight, norm_bias)"


def test_token_is_selected_in_front_of_the_norm() -> None:
    model = model_of(f"{NORM}\n y = Gather<axis=1>(n, first)", out="B,6")
    check(select_before_norm, model, ["Gather", "LayerNormalization"])


@pytest.mark.parametrize(
    "nodes",
    [
        f"{NORM}\n y = Gather<axis=2>(n, first)",  # one channel: the norm needs all
        f"{NORM}\n y = Gather<axis=-1>(n, first)",
        f"{NORM}\n t = Gather<axis=1>(n, first)\n u = ReduceMean(n)\n y = Add(t, u)",  # all tokens are read, too
    ],
)
def test_norm_stays_in_front(nodes: str) -> None:
    check_left(select_before_norm, model_of(nodes, out="B,6" if "Mean" in nodes else "B,4"))


def test_linear_becomes_one_integer_operator() -> None:
    nodes = f"{QUANTISED}\n {WEIGHT}\n p = MatMul(a, w)\n y = Add(p, bias)"
    model = model_of(nodes)
    check(integer_matmuls, model, ["QuantizeLinear", "MatMulIntegerToFloat"])
    assert [node.name for node in model.graph][1] == "node_p"  # the linear's own name
    model = model_of(nodes.replace("\n y = Add(p, bias)", "").replace("p = ", "y = "))
    check(integer_matmuls, model, ["QuantizeLinear", "MatMulIntegerToFloat"])


def test_product_of_activations_becomes_one_integer_operator() -> None:
    nodes = f"{QUANTISED}\n k = Transpose<perm=[0,2,1]>(x)\n r = QuantizeLinear(k, a_scale, a_zero)\n"
    model = model_of(f"{nodes} b = DequantizeLinear(r, a_scale, a_zero)\n y = MatMul(a, b)", out="B,4,4")
    check(integer_matmuls, model, ["QuantizeLinear", "Transpose", "QuantizeLinear", "MatMulIntegerToFloat"])


def test_codes_that_another_node_dequantises_too_stay_for_it() -> None:
    model = model_of(f"{QUANTISED}\n {WEIGHT}\n p = MatMul(a, w)\n r = ReduceMean(a)\n y = Add(p, r)")
    expected = ["QuantizeLinear", "DequantizeLinear", "MatMulIntegerToFloat", "ReduceMean", "Add"]
    check(integer_matmuls, model, expected)


@pytest.mark.parametrize(
    "nodes",
    [
        f"{WEIGHT}\n y = MatMul(x, w)",  # only the weight is quantised
        # One scale a channel of the input: the operator takes one for all.
        "q = QuantizeLinear<axis=-1>(x, a_scales, a_zeros)\n a = DequantizeLinear<axis=-1>(q, a_scales, a_zeros)\n "
        f"{WEIGHT}\n y = MatMul(a, w)",
        # One scale a row of the weight.
        f"{QUANTISED}\n w = DequantizeLinear<axis=0>(codes, a_scales)\n y = MatMul(a, w)",
    ],
)
def test_product_stays_in_floating_point(nodes: str) -> None:
    check_left(integer_matmuls, model_of(nodes))


def keys(low: str, perm: str = "0,2,3,1") -> ir.Model:
    model = model_of(
        f"t = Transpose<perm=[{perm}]>(x)\n y = Relu(t)", shape="2,3,4,5", out="2,4,5,3" if low != "lows" else "2,4,3,5"
    )
    relu = model.graph[1]
    names = [low, "high", low, "high"]
    for name in dict.fromkeys(names):
        value = ir.Value(name=name, const_value=ir.Tensor(CONSTANTS[name], name=name))
        model.graph.register_initializer(value)
    inputs = [relu.inputs[0], *(model.graph.initializers[name] for name in names)]
    quantize = ir.node("FakeQuantize", inputs, {"levels": 16}, domain="org.openvinotoolkit", name="k/FakeQuantize")
    quantize.outputs[0].name = "k.dequantized"
    model.graph.insert_before(relu, quantize)
    relu.replace_input_with(0, quantize.outputs[0])
    model.opset_imports["org.openvinotoolkit"] = 1
    return model


def test_keys_are_transposed_behind_their_quantiser() -> None:
    pytest.importorskip("openvino")

    def run_openvino(model: ir.Model, x: NDArray[np.float32]) -> NDArray[np.float32]:
        network = openvino_core().read_model(ir.to_proto(model).SerializeToString())
        result: NDArray[np.float32] = openvino_core().compile_model(network, "CPU")(x)[0]
        return result

    x = np.random.default_rng(1).standard_normal((2, 3, 4, 5)).astype(np.float32)
    model = keys("low")
    before = run_openvino(model, x)
    assert transpose_keys_last(model)
    assert operators(model) == ["Transpose", "FakeQuantize", "Transpose", "Relu"]
    assert [node.name for node in model.graph][2] == "k/Transpose"
    assert np.array_equal(run_openvino(model, x), before)
    assert not transpose_keys_last(model)


def test_other_transposes_and_ranges_by_channel_stay() -> None:
    check_left(transpose_keys_last, keys("low", perm="0,2,1,3"))
    check_left(transpose_keys_last, keys("lows"))
