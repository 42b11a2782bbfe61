"""The pass that keeps ONNX Runtime's optimiser from computing something else, put to ONNX Runtime itself."""

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from gplq.errors import BuildError
from gplq_export.passes.hold_quantizers import hold_quantizers
from gplq_export.runtimes import onnxruntime_session

RANDOM = np.random.default_rng(0)
IMAGES = RANDOM.standard_normal((2, 8, 4, 4)).astype(np.float32) * 2
ROWS = RANDOM.standard_normal((5, 8)).astype(np.float32) * 2
CONSTANTS: dict[str, NDArray[Any]] = {
    "scale": np.float32(0.3),
    "coarse": np.float32(0.8),
    "zero": np.float32(0),
    "six": np.float32(6),
    "flat": np.array([0, 8, 16], np.int64),
    "axis": np.array([1], np.int64),
    "start": np.array([0], np.int64),
    "end": np.array([6], np.int64),
    "kernel": RANDOM.standard_normal((8, 8, 1, 1)).astype(np.float32),
    "codes": RANDOM.integers(-8, 8, (8, 8)).astype(np.int8),
    "kernel_codes": RANDOM.integers(-8, 8, (8, 8, 1, 1)).astype(np.int8),
    "scales": RANDOM.uniform(0.2, 0.4, 8).astype(np.float32),
    "bias": RANDOM.standard_normal(8).astype(np.float32),
}
QUANTISED = "xq = QuantizeLinear(x, coarse, xz)\n xd = DequantizeLinear(xq, coarse, xz)\n "
CONV = f"{QUANTISED} w = DequantizeLinear<axis=0>(kernel_codes, scales)\n c = Conv(xd, w, bias)\n "
LINEAR = f"{QUANTISED} w = DequantizeLinear<axis=1>(codes, scales)\n p = MatMul(xd, w)\n c = Add(p, bias)\n "
# What stands in front of the quantiser, and returns v.
FOUR_BITS = {
    "Relu": "v = Relu(x)",
    "Relu, Reshape": "r = Relu(x)\n v = Reshape(r, flat)",
    "Relu, Transpose, Reshape": "r = Relu(x)\n t = Transpose<perm=[0, 2, 3, 1]>(r)\n v = Reshape(t, flat)",
    "Transpose, Relu": "t = Transpose<perm=[0, 2, 3, 1]>(x)\n v = Relu(t)",
    "Relu, Unsqueeze": "r = Relu(x)\n v = Unsqueeze(r, axis)",
    "Relu, Slice": "r = Relu(x)\n v = Slice(r, start, end, axis)",
    "Relu, MaxPool": "r = Relu(x)\n v = MaxPool<kernel_shape=[2, 2]>(r)",
    "Clip": "v = Clip(x, zero, six)",
    "Clip, Transpose": "r = Clip(x, zero, six)\n v = Transpose<perm=[0, 2, 3, 1]>(r)",
    "MaxPool": "v = MaxPool<kernel_shape=[2, 2]>(x)",
    "MaxPool, Reshape": "r = MaxPool<kernel_shape=[1, 1]>(x)\n v = Reshape(r, flat)",
}
WITH_BIAS = {
    "Conv": CONV.replace("c = ", "v = "),
    "Conv, Relu": f"{CONV} v = Relu(c)",
    "Conv, Clip": f"{CONV} v = Clip(c, zero, six)",
    "Conv, MaxPool": f"{CONV} v = MaxPool<kernel_shape=[2, 2]>(c)",
    "Conv, Reshape": f"{CONV} v = Reshape(c, flat)",
    "Linear": LINEAR.replace("c = ", "v = "),
    "Linear, Transpose": f"{LINEAR} v = Transpose<perm=[1, 0]>(c)",
}
CASES = [
    *((name, kind) for name in FOUR_BITS for kind in ("INT4", "UINT4")),
    *((name, kind) for name in WITH_BIAS for kind in ("INT4", "INT8", "UINT8")),
]
each_case = pytest.mark.parametrize(("before", "code_type"), CASES)
# ONNX Runtime is right about these by itself: the lowest code of UINT4 is that of 0, which Relu returns, too.
HARMLESS = {(name, "UINT4") for name in FOUR_BITS if "Relu" in name and "MaxPool" not in name}
# These it computes otherwise in 1.31, and not in 1.23.
HARMLESS |= {(name, kind) for name in WITH_BIAS if "Linear" in name for kind in ("INT8", "UINT8")}


def graph(before: str, code_type: str) -> ir.Model:
    """A quantiser behind ``before``, a name or nodes that return v, and something that reads its values."""
    nodes = {**FOUR_BITS, **WITH_BIAS}.get(before, before)
    nodes += "\n q = QuantizeLinear(v, scale, z)\n d = DequantizeLinear(q, scale, z)\n y = Tanh(d)"
    rows = before.startswith("Linear")
    shape = "B, 8" if rows else "B, 8, 4, 4"
    header = f'<ir_version: 10, opset_import: ["": 21]> g (float[{shape}] images) => (float[] y)'
    model = ir.from_onnx_text(f"{header} {{ x = Neg(images)\n {nodes} }}")
    model.graph.outputs[0].shape = None
    arrays = {**CONSTANTS, "z": np.zeros((), ir.DataType[code_type].numpy()), "xz": np.zeros((), np.int8)}
    values = {value.name: value for node in model.graph for value in node.inputs if value is not None}
    for name, array in arrays.items():
        if name in values:
            values[name].const_value = ir.Tensor(np.asarray(array), name=name)
            values[name].type = ir.TensorType(ir.DataType.from_numpy(np.asarray(array).dtype))
            model.graph.register_initializer(values[name])
    for node in model.graph:
        node.name = f"{node.outputs[0].name}/{node.op_type}"
    return model


def run(model: ir.Model, level: Any) -> NDArray[np.float32]:
    shape = model.graph.inputs[0].shape
    session = onnxruntime_session(ir.to_proto(model).SerializeToString(), level)
    found: NDArray[np.float32] = session.run(
        None, {"images": ROWS if shape is not None and len(shape) == 2 else IMAGES}
    )[0]
    return found


@each_case
def test_default_session_computes_what_is_written(before: str, code_type: str) -> None:
    expected = run(graph(before, code_type), "DISABLE_ALL")
    held = graph(before, code_type)
    assert hold_quantizers(held)
    assert [node.op_type for node in held.graph][-4:] == ["Max", "QuantizeLinear", "DequantizeLinear", "Tanh"]
    for level in ("DISABLE_ALL", "ENABLE_BASIC", "ENABLE_ALL"):
        np.testing.assert_array_equal(run(held, level), expected)
    assert not hold_quantizers(held)


@pytest.mark.parametrize(("before", "code_type"), [case for case in CASES if case not in HARMLESS])
def test_without_the_pass_it_does_not(before: str, code_type: str) -> None:
    """Should a newer ONNX Runtime compute what is written, this fails, and the pass can become smaller."""
    model = graph(before, code_type)
    try:
        found = run(model, "ENABLE_ALL")
    except BuildError:
        return
    assert np.abs(found - run(model, "DISABLE_ALL")).max() > 0.02


@pytest.mark.parametrize(
    ("before", "code_type"),
    [
        ("v = Gelu(x)", "INT4"),
        ("v = Softmax(x)", "UINT4"),
        ("v = Add(x, six)", "INT4"),
        ("v = Relu(x)", "INT8"),
        ("v = Transpose<perm=[0, 2, 3, 1]>(x)", "INT8"),
        (f"{CONV} v = Gelu(c)", "INT4"),
        (CONV.replace(", bias", "").replace("c = ", "v = "), "INT4"),
    ],
)
def test_what_is_merged_with_nothing_stays_as_it_is(before: str, code_type: str) -> None:
    model = graph(before, code_type)
    assert not hold_quantizers(model)
    np.testing.assert_array_equal(run(model, "ENABLE_ALL"), run(model, "DISABLE_ALL"))
