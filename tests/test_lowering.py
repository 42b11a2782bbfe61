"""The graphs: what is in them, how it is stored, and that each computes what the checkpoint does."""

import json
from collections import Counter
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import reference
import torch
from numpy.typing import NDArray
from onnx import TensorProto

from gplq.checkpoint import Checkpoint, frozen_quantizers, integer_linears
from gplq.errors import UsageError
from gplq.integer import set_rounding
from gplq_export.lowering import lower
from gplq_export.runtimes import reference_session
from gplq_export.targets import TARGETS, GraphWriter, Quantizer
from gplq_export.trace import OPSET

METADATA = {"gplq.architecture": "tiny", "gplq.label_names": '["a", "b"]'}
TENSORRT = ["trt-int8", "trt-int4", "trt-fp8"]
QUANTISED = ["int4", *TENSORRT]
DOMAINS = {"cpu": "com.microsoft", "openvino": "org.openvinotoolkit"}  # of the one operator that is not standard


@pytest.fixture(scope="module")
def protos(dialect: ir.Model) -> dict[str, Any]:
    return {name: ir.to_proto(lower(dialect, TARGETS[name](), METADATA)) for name in TARGETS}


def nodes_of(proto: Any, op_type: str) -> list[Any]:
    return [node for node in proto.graph.node if node.op_type == op_type]


def tensors_of(proto: Any) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in proto.graph.initializer}


def run(proto: Any, images: torch.Tensor) -> NDArray[np.float32]:
    logits: NDArray[np.float32] = reference_session(proto.SerializeToString()).run(None, {"images": images.numpy()})[0]
    return logits


@pytest.mark.parametrize("target", QUANTISED)
def test_every_quantiser_and_linear_is_one_node_and_the_other_way_round(
    protos: dict[str, Any], checkpoint: Checkpoint, target: str
) -> None:
    quantizers, linears = set(frozen_quantizers(checkpoint.model)), set(integer_linears(checkpoint.model))
    # TensorRT gets one pair more at an attention's output, which saturates in 8 bits in front of the Clip.
    extra = [] if target == "int4" else [f"blocks.{block}.attn.proj.input_quantizer/Clip" for block in (0, 1)]
    found = Counter(node.name for node in nodes_of(protos[target], "QuantizeLinear"))
    assert found == Counter(f"{name}/QuantizeLinear" for name in [*quantizers, *extra])
    dequantizers = Counter(node.name for node in nodes_of(protos[target], "DequantizeLinear"))
    assert dequantizers == Counter(f"{name}/DequantizeLinear" for name in [*quantizers, *linears, *extra])
    matmuls = Counter(node.name for node in nodes_of(protos[target], "MatMul"))
    attention = [f"blocks.{block}.attn.{product}" for block in (0, 1) for product in ("qk", "pv")]
    assert matmuls == Counter([*linears, *attention])


@pytest.mark.parametrize("target", list(TARGETS))
def test_graph_is_standard_onnx_but_for_one_operator_of_the_cpu_runtimes(protos: dict[str, Any], target: str) -> None:
    proto = protos[target]
    onnx.checker.check_model(proto, full_check=True)
    own = {target: (domain, 1) for target, domain in DOMAINS.items()}
    wanted = {("", OPSET), own.get(target, ("", OPSET))}
    assert {(entry.domain, entry.version) for entry in proto.opset_import} == wanted
    assert OPSET == 21
    assert proto.ir_version <= 11
    assert {node.domain for node in proto.graph.node} == {"", DOMAINS.get(target, "")}
    assert not proto.functions


@pytest.mark.parametrize("target", ["fp32", "fp16"])
def test_float_twins_hold_no_quantiser(protos: dict[str, Any], target: str) -> None:
    assert not nodes_of(protos[target], "QuantizeLinear")
    assert not nodes_of(protos[target], "DequantizeLinear")
    wanted = TensorProto.FLOAT if target == "fp32" else TensorProto.FLOAT16
    assert {tensor.data_type for tensor in protos[target].graph.initializer} == {wanted, TensorProto.INT64}


@pytest.mark.parametrize("target", QUANTISED)
def test_weights_are_packed_and_laid_out_for_int8_kernels(
    protos: dict[str, Any], checkpoint: Checkpoint, target: str
) -> None:
    tensors = tensors_of(protos[target])
    nodes = {node.name: node for node in protos[target].graph.node}
    for name, linear in integer_linears(checkpoint.model).items():
        rows, columns = linear.codes.shape
        tensor = tensors[f"{name}.codes"]
        edge = name.startswith(("patch_embed", "head"))
        four_bits = {"trt-int8": TensorProto.INT8, "trt-fp8": TensorProto.FLOAT8E4M3FN}.get(target, TensorProto.INT4)
        assert tensor.data_type == (TensorProto.INT8 if edge else four_bits)
        assert list(tensor.dims) == [columns, rows]  # [K, N]
        codes = linear.codes.numpy().T
        if tensor.data_type == TensorProto.INT8:
            assert tensor.raw_data == codes.tobytes()
        elif tensor.data_type == TensorProto.FLOAT8E4M3FN:
            assert np.array_equal(onnx.numpy_helper.to_array(tensor).astype(np.int8), codes)
        else:
            assert len(tensor.raw_data) == rows * columns // 2
            assert tensor.raw_data == reference.pack_int4(codes)
        dequantize = nodes[f"{name}/DequantizeLinear"]
        assert list(dequantize.input) == [f"{name}.codes", f"{name}.weight_scale"]
        assert [(attribute.name, attribute.i) for attribute in dequantize.attribute] == [("axis", 1)]
        assert nodes[name].input[1] == dequantize.output[0]  # no Transpose and no Cast between
        scale = onnx.numpy_helper.to_array(tensors[f"{name}.weight_scale"])
        assert np.array_equal(scale.astype(np.float32), linear.weight_scale.numpy())


def test_activation_types_follow_bits_and_sign(protos: dict[str, Any], checkpoint: Checkpoint) -> None:
    for target in QUANTISED:
        tensors = tensors_of(protos[target])
        nodes = {node.name: node for node in protos[target].graph.node}
        for name, quantizer in frozen_quantizers(checkpoint.model).items():
            four_bits = TensorProto.INT4 if quantizer.signed else TensorProto.UINT4
            carrier = {"int4": four_bits, "trt-fp8": TensorProto.FLOAT8E4M3FN}.get(target, TensorProto.INT8)
            # In FP8, what meets the codes of a softmax, which are too large for it, is carried by INT8 as they are.
            inside = target == "trt-fp8" and name.split(".")[-2] in ("qk", "pv")
            wanted = carrier if quantizer.bits == 4 and not inside else TensorProto.INT8
            assert tensors[nodes[f"{name}/QuantizeLinear"].input[2]].data_type == wanted, (target, name)


@pytest.mark.parametrize("target", [name for name in TARGETS if name != "openvino"])
def test_any_batch_runs(protos: dict[str, Any], probe: torch.Tensor, target: str) -> None:
    whole = run(protos[target], probe[:8])
    for batch in (1, 3, 8):
        logits = run(protos[target], probe[:batch])
        assert logits.shape == (batch, 4)
        assert logits.dtype == np.float32
        if target == "fp32":
            np.testing.assert_allclose(logits, whole[:batch], atol=1e-5)


@pytest.mark.parametrize("target", list(TARGETS))
def test_metadata(protos: dict[str, Any], checkpoint: Checkpoint, target: str) -> None:
    found = {entry.key: entry.value for entry in protos[target].metadata_props}
    assert found.keys() == {*METADATA, "gplq.target", "gplq.quantizers", "gplq.marks"}
    assert found["gplq.target"] == target
    assert json.loads(found["gplq.label_names"]) == ["a", "b"]
    quantizers = frozen_quantizers(checkpoint.model) if TARGETS[target]().quantizes else {}
    held = "dequantized" if target == "openvino" else "codes"
    assert json.loads(found["gplq.quantizers"]) == {name: f"{name}.{held}" for name in quantizers}
    outputs = {output for node in protos[target].graph.node for output in node.output}
    assert set(json.loads(found["gplq.quantizers"]).values()) <= outputs
    assert protos[target].producer_name == "gplq"


@pytest.mark.parametrize("first", list(TARGETS))
def test_lowering_does_not_change_the_dialect(dialect: ir.Model, protos: dict[str, Any], first: str) -> None:
    before = ir.to_proto(dialect).SerializeToString(deterministic=True)
    lower(dialect, TARGETS[first](), {})
    assert ir.to_proto(dialect).SerializeToString(deterministic=True) == before
    again = ir.to_proto(lower(dialect, TARGETS["int4"](), METADATA))
    assert again.SerializeToString(deterministic=True) == protos["int4"].SerializeToString(deterministic=True)


@pytest.mark.parametrize("target", TENSORRT)
def test_eight_bit_container_computes_the_same_bits(
    dialect: ir.Model, protos: dict[str, Any], probe: torch.Tensor, target: str
) -> None:
    container = ir.to_proto(lower(dialect, TARGETS[target](ir.DataType.FLOAT), METADATA))
    # Times 3: codes beyond 8 levels, without which the Clip could be missing.
    for images in (probe, 3 * probe):
        expected, found = (multiplied(proto, images) for proto in (protos["int4"], container))
        assert expected.keys() == found.keys()
        for name, value in expected.items():
            assert np.array_equal(value, found[name]), name
        assert np.array_equal(run(container, images), run(protos["int4"], images))
    unclipped = onnx.ModelProto.FromString(container.SerializeToString())
    for node in nodes_of(unclipped, "Clip"):
        node.op_type = "Identity"
        del node.input[1:]
    assert not np.array_equal(run(unclipped, 3 * probe), run(protos["int4"], 3 * probe))


def multiplied(proto: Any, images: torch.Tensor) -> dict[str, NDArray[np.float32]]:
    """Whatever a MatMul reads: all codes, times their scales, in the layout in which they are multiplied."""
    proto = onnx.ModelProto.FromString(proto.SerializeToString())
    operands = {f"{node.name}[{index}]": node.input[index] for node in nodes_of(proto, "MatMul") for index in (0, 1)}
    del proto.graph.output[:]
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in dict.fromkeys(operands.values()))
    session = reference_session(proto.SerializeToString())
    answers = dict(zip(dict.fromkeys(operands.values()), session.run(None, {"images": images.numpy()}), strict=True))
    return {node: answers[name] for node, name in operands.items()}


@pytest.mark.parametrize("target", TENSORRT)
def test_tensorrt_graph_clips_four_bits_and_casts_nothing_in_front_of_a_matmul(
    protos: dict[str, Any], checkpoint: Checkpoint, target: str
) -> None:
    proto = protos[target]
    tensors = tensors_of(proto)
    producer = {output: node for node in proto.graph.node for output in node.output}
    for name, quantizer in frozen_quantizers(checkpoint.model).items():
        quantize = producer[f"{name}.codes"]
        before = producer.get(quantize.input[0])
        assert (before is not None and before.op_type == "Clip") == (quantizer.bits == 4), name
        if before is not None and quantizer.bits == 4:
            low, high = (float(onnx.numpy_helper.to_array(tensors[bound])) for bound in before.input[1:])
            scale = float(quantizer.scale)
            lowest, highest = (-8, 7) if quantizer.signed else (0, 15)
            assert low == lowest * scale
            assert high == pytest.approx(highest * scale, rel=1e-3)  # FP16
            assert round(high / scale) == highest
    linears = integer_linears(checkpoint.model)
    for matmul in nodes_of(proto, "MatMul"):
        for name in matmul.input:
            while producer[name].op_type in ("Reshape", "Transpose"):
                name = producer[name].input[0]
            assert producer[name].op_type == "DequantizeLinear", matmul.name
        if matmul.name in linears:
            assert producer[matmul.input[1]].op_type == "DequantizeLinear", matmul.name
    assert [node.name for node in nodes_of(proto, "Cast")] == ["images/Cast", "logits/Cast"]


def test_twins_compute_the_unquantised_network(
    protos: dict[str, Any], checkpoint: Checkpoint, probe: torch.Tensor
) -> None:
    set_rounding(checkpoint.model, rounding=False)
    try:
        with torch.inference_mode():
            expected = checkpoint.model(probe).numpy()
    finally:
        set_rounding(checkpoint.model, rounding=True)
    np.testing.assert_allclose(run(protos["fp32"], probe), expected, rtol=0, atol=1e-4)
    np.testing.assert_allclose(run(protos["fp16"], probe), expected, rtol=0, atol=0.02)
    with torch.inference_mode():
        quantised = checkpoint.model(probe).numpy()
    assert np.abs(quantised - expected).max() > 0.03  # or the tolerances above would prove nothing


def test_codes_are_those_of_the_formula(protos: dict[str, Any], checkpoint: Checkpoint, probe: torch.Tensor) -> None:
    """What stands in front of each quantiser in ONNX, quantised by NumPy, is what the ONNX quantiser gives."""
    proto = onnx.ModelProto.FromString(protos["int4"].SerializeToString())
    producer = {output: node for node in proto.graph.node for output in node.output}
    quantizers = frozen_quantizers(checkpoint.model)
    del proto.graph.output[:]
    for name in quantizers:
        source = producer[f"{name}.codes"].input[0]
        proto.graph.node.append(onnx.helper.make_node("Cast", [f"{name}.codes"], [f"{name}.int8"], to=TensorProto.INT8))
        proto.graph.output.append(onnx.helper.make_tensor_value_info(source, TensorProto.FLOAT, None))
        proto.graph.output.append(onnx.helper.make_tensor_value_info(f"{name}.int8", TensorProto.INT8, None))
    answers = reference_session(proto.SerializeToString()).run(None, {"images": probe.numpy()})
    for (name, quantizer), (x, codes) in zip(
        quantizers.items(), zip(answers[::2], answers[1::2], strict=True), strict=True
    ):
        expected = reference.quantize(x, quantizer.scale.numpy(), quantizer.bits, quantizer.signed)
        assert np.array_equal(codes, expected), name
        assert len(np.unique(codes)) > 4, name


@pytest.mark.parametrize(
    ("scale", "bits", "signed", "carrier"),
    [
        (0.1, 4, True, "FLOAT8E4M3FN"),
        (0.1, 5, True, "FLOAT8E4M3FN"),
        (0.1, 5, False, "INT8"),  # codes up to 31
        (0.1, 8, True, "INT8"),
        (127.0, 4, True, "FLOAT8E4M3FN"),
        (128.0, 4, True, "INT8"),  # 512 times as large, FP16 could not hold it
    ],
)
def test_fp8_carries_what_it_holds_exactly(scale: float, bits: int, signed: bool, carrier: str) -> None:
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT16), shape=ir.Shape([4]))
    anchor = ir.node("Identity", [x])
    graph = ir.Graph([x], anchor.outputs, nodes=[anchor], opset_imports={"": OPSET})
    writer = GraphWriter(graph, ir.DataType.FLOAT16).at(anchor)
    TARGETS["trt-fp8"]().quantizer(writer, Quantizer("q", x, np.asarray(scale, np.float32), None, None, bits, signed))
    (quantize,) = (node for node in graph if node.op_type == "QuantizeLinear")
    zero: Any = quantize.inputs[2]
    assert zero.dtype == ir.DataType[carrier]
    stored: Any = quantize.inputs[1]
    assert float(stored.const_value.numpy()) == float(np.float16(scale)) * (1 if carrier == "INT8" else 512)


def test_fp8_names_the_gpus_that_have_none() -> None:
    TARGETS["trt-fp8"]().check_gpus((89, 120))
    TARGETS["trt-int8"]().check_gpus((75,))
    with pytest.raises(UsageError, match=r"trt-fp8 needs compute capability 89 or higher.*, but 75, 86 was asked for"):
        TARGETS["trt-fp8"]().check_gpus((86, 120, 75))


@pytest.mark.parametrize("target", ["fp16", "trt-int8"])
def test_constants_beyond_fp16_are_infinite_without_a_word(dialect: ir.Model, target: str) -> None:
    """The probe of the range names them; a warning of NumPy's would be an error here."""
    graph = dialect.clone()
    value = graph.graph.initializers["blocks.1.norm2.bias"]
    assert value.const_value is not None
    value.const_value = ir.Tensor(np.full_like(value.const_value.numpy(), 1e6), name=value.name)
    found = lower(graph, TARGETS[target](), {}).graph.initializers["blocks.1.norm2.bias"].const_value
    assert found is not None
    assert found.dtype == ir.DataType.FLOAT16
    assert np.isinf(found.numpy()).all()
