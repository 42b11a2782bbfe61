"""Every rule of the linter on a graph that breaks it and on one that does not, and what the runtimes then really do."""

import argparse
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from gplq.checkpoint import Checkpoint
from gplq.errors import BuildError, GateError, MissingError, UsageError
from gplq_export import engine
from gplq_export.lint import RUNTIMES, add_arguments, lint, run
from gplq_export.lint_rules import RULES
from gplq_export.lowering import lower
from gplq_export.precision import EngineReport, fused_attentions, linear_precisions
from gplq_export.targets import TARGETS

TOKENS, WIDTH, HEADS = 8, 128, 2
TYPES: dict[str, Any] = {
    "INT8": np.int8,
    "UINT8": np.uint8,
    "INT16": np.int16,
    "INT32": np.int32,
    "INT64": np.int64,
    "INT4": ml_dtypes.int4,
    "UINT4": ml_dtypes.uint4,
    "FP8": ml_dtypes.float8_e4m3fn,
    "FP32": np.float32,
    "FP16": np.float16,
    "BF16": ml_dtypes.bfloat16,
}


class Graph:
    """Nodes and initialisers from x [batch, TOKENS, WIDTH]; each method returns the name of the tensor that it made."""

    def __init__(
        self, floats: str = "FP16", opset: int = 21, ir_version: int = 10, batch: Any = "batch", tokens: int = TOKENS
    ) -> None:
        self.floats, self.opset, self.ir_version, self.batch, self.tokens = floats, opset, ir_version, batch, tokens
        self.nodes: list[Any] = []
        self.initialisers: dict[str, Any] = {}
        self.random = np.random.default_rng(0)

    def constant(self, name: str, value: Any, dtype: str = "") -> str:
        self.initialisers[name] = numpy_helper.from_array(np.asarray(value).astype(TYPES[dtype or self.floats]), name)
        return name

    def node(self, operator: str, inputs: list[str], name: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(operator, inputs, [f"{name}.out"], name=name, **attributes))
        return f"{name}.out"

    def quantised(
        self,
        x: str,
        name: str,
        scale: Any = 0.125,
        code: str = "INT8",
        zero: int = 0,
        scale_type: str = "",
        **axis: Any,
    ) -> str:
        parameters = [
            scale if isinstance(scale, str) else self.constant(f"{name}.scale", scale, scale_type),
            self.constant(f"{name}.zero", np.full(np.shape(scale) if not isinstance(scale, str) else (), zero), code),
        ]
        codes = self.node("QuantizeLinear", [x, *parameters], f"{name}.quantize", **axis)
        return self.node("DequantizeLinear", [codes, *parameters], f"{name}.dequantize", **axis)

    def weight(
        self, name: str, code: str = "INT8", columns: int = WIDTH, per: str = "column", scale: float = 0.01, **more: Any
    ) -> str:
        """[WIDTH, columns] with a scale for each column, for each row, for blocks of 32 rows, or a single one."""
        codes = self.constant(f"{name}.codes", self.random.integers(-7, 8, (WIDTH, columns)), code)
        shape = {"column": (columns,), "row": (WIDTH,), "block": (WIDTH // 32, columns), "tensor": ()}[per]
        scales = self.constant(f"{name}.scale", np.full(shape, scale), more.pop("scale_type", ""))
        zero = more.pop("zero", None)
        zeros = [] if zero is None else [self.constant(f"{name}.zero", np.full(shape, zero), code)]
        if per != "tensor":
            more["axis"] = 1 if per == "column" else 0
        if per == "block":
            more["block_size"] = 32
        return self.node("DequantizeLinear", [codes, scales, *zeros], f"{name}.weight", **more)

    def linear(self, x: str, name: str, weight: str | None = None, bias: str | None = None, **more: Any) -> str:
        w = weight or self.weight(name, **more)
        y = self.node("MatMul", [x, w], name)
        columns = more.get("columns", WIDTH)
        return self.node("Add", [y, bias or self.constant(f"{name}.bias", np.zeros(columns))], f"{name}.add")

    def proto(self, output: str, columns: int = WIDTH) -> Any:
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(TYPES[self.floats]))
        x = helper.make_tensor_value_info("x", kind, [self.batch, self.tokens, WIDTH])
        y = helper.make_tensor_value_info(output, kind, [self.batch, self.tokens, columns])
        graph = helper.make_graph(self.nodes, "test", [x], [y], list(self.initialisers.values()))
        domains = {node.domain for node in self.nodes} | {""}
        imports = [helper.make_opsetid(domain, 1 if domain else self.opset) for domain in sorted(domains)]
        return helper.make_model(graph, opset_imports=imports, ir_version=self.ir_version)


def linear(
    activation: Any = (), weight: Any = (), before: Callable[[Graph, str], str] | None = None, **graph: Any
) -> Any:
    """One linear. ``activation`` and ``weight``: options of their quantisers, or None for floating point."""
    g = Graph(**graph)
    x = "x" if before is None else before(g, "x")
    if activation is not None:
        x = g.quantised(x, "fc.x", **dict(activation))
    floating = g.constant("fc.float", g.random.normal(size=(WIDTH, WIDTH))) if weight is None else None
    return g.proto(g.linear(x, "fc", floating, **dict(weight or {})))


def cpu(**options: Any) -> Any:
    """A linear as ONNX Runtime likes it."""
    return linear(**{"floats": "FP32", "activation": {"code": "UINT8", "zero": 128}, **options})


def attention(
    quantise: str = "qkvpo",
    clip: str = "",
    fused: bool = False,
    heads: int = HEADS,
    tokens: int = TOKENS,
    batch: Any = "batch",
    **weight: Any,
) -> Any:
    """A pre-norm attention. ``quantise``: which of q, k, v, p and the output; ``clip``: which are clamped before."""
    g = Graph(tokens=tokens, batch=batch)
    norm = [g.constant("norm.weight", np.ones(WIDTH)), g.constant("norm.bias", np.zeros(WIDTH))]
    x = g.quantised(g.node("LayerNormalization", ["x", *norm], "norm", axis=-1), "norm.x")

    def quantised(value: str, name: str, scale: float = 0.125) -> str:
        if name in clip:
            bounds = [g.constant(f"{name}.low", -8 * scale), g.constant(f"{name}.high", 7 * scale)]
            value = g.node("Clip", [value, *bounds], f"{name}.clip")
        return g.quantised(value, name, scale) if name in quantise else value

    def moved(value: str, name: str) -> str:
        shape = g.constant(f"{name}.shape", [0, 0, heads, -1], "INT32")
        g.initialisers[shape] = numpy_helper.from_array(np.array([0, 0, heads, -1]), shape)
        order = [0, 2, 3, 1] if name == "k" else [0, 2, 1, 3]
        return g.node("Transpose", [g.node("Reshape", [value, shape], f"{name}.reshape")], f"{name}.move", perm=order)

    if fused:
        qkv = g.linear(x, "qkv", columns=3 * WIDTH, **weight)
        g.initialisers["thirds"] = numpy_helper.from_array(np.full(3, WIDTH), "thirds")
        names = [f"{name}.part" for name in "qkv"]
        g.nodes.append(helper.make_node("Split", [qkv, "thirds"], names, name="split", axis=2))
        parts = dict(zip("qkv", names, strict=True))
    else:
        parts = {name: g.linear(x, f"linear_{name}", **weight) for name in "qkv"}
    q, k, v = (moved(quantised(value, name), name) for name, value in parts.items())
    p = quantised(g.node("Softmax", [g.node("MatMul", [q, k], "qk")], "softmax", axis=-1), "p", 1 / 15)
    y = g.node("Transpose", [g.node("MatMul", [p, v], "pv")], "merge", perm=[0, 2, 1, 3])
    g.initialisers["merge.shape"] = numpy_helper.from_array(np.array([0, 0, WIDTH]), "merge.shape")
    y = quantised(g.node("Reshape", [y, "merge.shape"], "merge.reshape"), "o")
    return g.proto(g.linear(y, "proj"))


def with_node(operator: str, domain: str = "", **attributes: Any) -> Any:
    """A linear behind an operator of x alone, which need not exist."""
    return linear(before=lambda g, x: g.node(operator, [x], "extra", domain=domain, **attributes))


def twice(second: float, code: str = "UINT8") -> Any:
    """Two pairs of quantisers in a row."""
    return cpu(
        before=lambda g, x: g.quantised(x, "first", 0.25, code, 128 if code == "UINT8" else 0),
        activation={"code": code, "zero": 128 if code == "UINT8" else 0, "scale": second},
    )


def moved_codes(code: str, zero: int = 0, opset: int = 21, behind: str = "Relu") -> Any:
    """QuantizeLinear, DequantizeLinear, Transpose, and then something."""
    g = Graph("FP32", opset=opset, tokens=WIDTH)
    x = g.node("Transpose", [g.quantised("x", "fc.x", code=code, zero=zero)], "move", perm=[0, 2, 1])
    y = g.quantised(x, "again", code=code, zero=zero) if behind == "QuantizeLinear" else g.node(behind, [x], "behind")
    return g.proto(g.linear(y, "fc"))


def behind_relu(*held: str, code: str = "INT4") -> Any:
    """A linear whose input is quantised behind a Relu and a Reshape, with or without what holds the quantiser."""

    def before(g: Graph, x: str) -> str:
        shape = g.constant("shape", [0, TOKENS, WIDTH], "INT64")
        moved = g.node("Reshape", [g.node("Relu", [x], "relu"), shape], "reshape")
        return g.node("Max", [moved, g.constant("lowest", -8 * 0.125)], "held") if held else moved

    return linear({"code": code}, {"code": "INT4"}, before, floats="FP32")


def convolution(bias: bool) -> Any:
    """A convolution over tokens, of 4-bit codes, which is quantised again."""
    g = Graph("FP32")
    codes = g.constant("codes", g.random.integers(-7, 8, (TOKENS, TOKENS, 1)), "INT4")
    weight = g.node("DequantizeLinear", [codes, g.constant("scale", np.full(TOKENS, 0.3))], "weight", axis=0)
    inputs = [g.quantised("x", "conv.x", 0.5, "INT4"), weight]
    inputs += [g.constant("bias", g.random.normal(size=TOKENS))] if bias else []
    return g.proto(g.linear(g.quantised(g.node("Conv", inputs, "conv"), "fc.x", code="UINT8"), "fc"))


def dynamic_scale() -> Any:
    g = Graph()
    largest = g.node("ReduceMax", ["x"], "largest", keepdims=0)
    scale = g.node("Div", [largest, g.constant("127", 127)], "scale")
    return g.proto(g.linear(g.quantised("x", "fc.x", scale), "fc"))


def int32_bias() -> Any:
    g = Graph()
    codes, scale = g.constant("bias.codes", np.zeros(WIDTH), "INT32"), g.constant("bias.scale", 0.01)
    bias = g.node("DequantizeLinear", [codes, scale], "fc.bias")
    return g.proto(g.linear(g.quantised("x", "fc.x"), "fc", bias=bias))


def cast_weight(code: str = "INT4") -> Any:
    g = Graph()
    weight = g.node("Cast", [g.weight("fc", code, scale_type="FP32")], "fc.cast", to=TensorProto.FLOAT16)
    return g.proto(g.linear(g.quantised("x", "fc.x"), "fc", weight))


def skip_norm() -> Any:
    g = Graph("FP32")
    norm = [g.constant("norm.weight", np.ones(WIDTH)), g.constant("norm.bias", np.zeros(WIDTH))]
    y = g.node("SkipLayerNormalization", ["x", "x", *norm], "norm", domain="com.microsoft")
    return g.proto(g.linear(g.quantised(y, "fc.x", code="UINT8", zero=128), "fc"))


def half_quantised() -> Any:
    """A quantised linear, then one in floating point."""
    g = Graph()
    y = g.linear(g.quantised("x", "fc.x"), "fc")
    return g.proto(g.linear(y, "fc2", g.constant("fc2.float", g.random.normal(size=(WIDTH, WIDTH)))))


def requantised(again: bool = True) -> Any:
    """A product that is quantised before its bias is added, or not."""
    g = Graph("FP32")
    y = g.node("MatMul", [g.quantised("x", "fc.x", code="UINT8", zero=128), g.weight("fc")], "fc")
    y = g.quantised(y, "fc.y", code="UINT8", zero=128) if again else y
    return g.proto(g.node("Add", [y, g.constant("fc.bias", np.ones(WIDTH))], "fc.add"))


def stated(value: str, kind: str) -> Any:
    """A linear whose file states the type of a value in between."""
    proto = cpu()
    dtype = helper.np_dtype_to_tensor_dtype(np.dtype(TYPES[kind]))
    proto.graph.value_info.append(helper.make_tensor_value_info(value, dtype, ["batch", TOKENS, WIDTH]))
    return proto


def moved_weight(operator: str, code: str = "INT8") -> Any:
    """A linear whose weight's codes go through an operator before they are dequantised."""
    g = Graph()
    codes = g.constant("fc.codes", g.random.integers(-7, 8, (WIDTH, WIDTH)), code)
    if operator == "Clip":
        codes = g.node("Clip", [codes, g.constant("low", -7, code), g.constant("high", 7, code)], "fc.moved")
    elif operator:
        codes = g.node(operator, [codes], "fc.moved")
    w = g.node("DequantizeLinear", [codes, g.constant("fc.scale", np.full(WIDTH, 0.01))], "fc.weight", axis=1)
    return g.proto(g.linear(g.quantised("x", "fc.x"), "fc", w))


def matmul_nbits(rank: int = 3, floats: str = "FP32", block: int = 32) -> Any:
    """What ONNX Runtime's own quantiser writes for weights of 4 bits."""
    quantizer = pytest.importorskip("onnxruntime.quantization.matmul_nbits_quantizer")
    g = Graph(floats)
    x = "x" if rank == 3 else g.node("Unsqueeze", ["x", "one"], "more")
    g.initialisers["one"] = numpy_helper.from_array(np.array([1]), "one")
    y = g.node("MatMul", [x, g.constant("fc.float", g.random.normal(size=(WIDTH, WIDTH)))], "fc")
    y = y if rank == 3 else g.node("Squeeze", [y, "one"], "less")
    work = quantizer.MatMulNBitsQuantizer(g.proto(y), block_size=block, is_symmetric=True)
    work.process()
    return work.model.model


def norm(floats: str) -> Any:
    g = Graph(floats)
    scale = [g.constant("norm.weight", np.ones(WIDTH)), g.constant("norm.bias", np.zeros(WIDTH))]
    y = g.node("LayerNormalization", ["x", *scale], "norm", axis=-1)
    return g.proto(g.linear(g.quantised(y, "fc.x"), "fc"))


def output_dtype(scale: str) -> Any:
    return linear(weight={"scale_type": scale, "output_dtype": TensorProto.FLOAT16}, opset=23, activation=None)


# rule: (a graph that breaks it, the node that is to blame, the nearest graph that does not)
CASES: dict[str, tuple[Any, str, Any]] = {
    "opset-too-new": (cpu(opset=27), "the model", cpu(opset=26)),
    "opset-too-old": (linear(weight={"code": "INT4"}, opset=19), "fc.weight", linear(weight={"code": "INT4"})),
    "type-conflict": (stated("fc.x.quantize.out", "INT8"), "fc.x.quantize", stated("fc.x.quantize.out", "UINT8")),
    "unknown-domain": (with_node("Quantise", "acme"), "extra", with_node("Relu")),
    "integer-operator": (skip_norm(), "norm", norm("FP16")),
    "weight-only-operator": (matmul_nbits(), "fc_Q4", linear(None, {"code": "INT4", "per": "block"})),
    "codes-computed": (moved_weight("Clip"), "fc.moved", moved_weight("")),
    "zero-point": (linear({"zero": 3}), "fc.x.quantize", linear({"zero": 0})),
    "code-type": (linear({"code": "UINT4"}), "fc.x.quantize", linear({"code": "INT8"})),
    "int32-bias": (int32_bias(), "fc.bias", linear()),
    "uint8-codes": (linear({"code": "UINT8"}), "fc.x.quantize", linear()),
    "int4-activation": (linear({"code": "INT4"}), "fc.x.quantize", linear(weight={"code": "INT4"})),
    "block-weight": (
        linear(weight={"code": "INT4", "per": "block"}),
        "fc",
        linear(None, {"code": "INT4", "per": "block"}),
    ),
    "mixed-code-types": (linear({"code": "FP8"}, {"code": "INT4"}), "fc", linear({"code": "FP8"}, {"code": "FP8"})),
    "mixed-float-types": (linear(weight={"scale_type": "FP32"}), "fc", linear()),
    "output-dtype": (output_dtype("FP32"), "fc.weight", output_dtype("FP16")),
    "bfloat16-codes": (linear(floats="BF16"), "fc.x.quantize", linear()),
    "scale-not-positive": (linear({"scale": 0.0}), "fc.x.quantize", linear({"scale": 1e-3})),
    "scale-divides-by-zero": (linear({"scale": 0.0}), "fc.x.quantize", linear(weight={"scale": -0.01})),
    "fp16-scale-range": (linear(weight={"scale": 1e-6}), "fc.weight", linear(weight={"scale": 7e-5})),
    "dynamic-scale": (dynamic_scale(), "fc.x.quantize", linear()),
    "per-channel-activation": (linear({"scale": np.full(WIDTH, 0.1), "axis": 2}), "fc.x.quantize", linear()),
    "per-channel-activation-8-bit": (
        cpu(activation={"scale": np.full(WIDTH, 0.1), "axis": 2, "code": "UINT8", "zero": 128}),
        "fc",
        cpu(),
    ),
    "reduction-axis": (linear(weight={"per": "row"}), "fc", linear(weight={"per": "column"})),
    "fused-qkv": (attention("", fused=True), "qkv", attention("", fused=True, per="tensor")),
    "cast-after-int4": (cast_weight(), "fc", linear(weight={"code": "INT4"})),
    "int4-per-channel-weight-only": (
        linear(None, {"code": "INT4"}),
        "fc",
        linear(None, {"code": "INT4", "per": "block"}),
    ),
    "weight-only": (cpu(activation=None), "fc", cpu()),
    "float-weight": (linear(weight=None), "fc", linear()),
    "product-requantised": (requantised(), "fc", requantised(False)),
    "unquantised-linear": (half_quantised(), "fc2", linear(None, None)),
    "float32-network": (norm("FP32"), "norm", norm("FP16")),
    "partial-attention": (attention("qko"), "softmax", attention("")),
    "clip-after-softmax": (attention(clip="p"), "p.clip", attention(clip="qkv")),
    "clip-on-attention-output": (attention(clip="o"), "o.clip", attention(clip="qkv")),
    "attention-output": (attention("qkvp"), "pv", attention("qkvpo")),
    "attention-shape": (attention(tokens=513), "softmax", attention(tokens=512)),
    "consecutive-qdq": (twice(0.1), "fc.x.quantize", twice(0.25)),
    "int8-transpose": (moved_codes("INT8"), "fc.x.dequantize", moved_codes("UINT8", 128)),
    "merged-quantizer": (behind_relu(), "fc.x.quantize", behind_relu("held")),
    "static-batch": (cpu(batch=2), "fc", cpu()),
    "skip-layer-normalization": (skip_norm(), "norm", cpu()),
    "fp16-codes": (linear({"code": "UINT8", "zero": 128}), "fc", cpu()),
    "four-bit-arithmetic": (linear({"code": "UINT4"}, {"code": "INT4"}, floats="FP32"), "fc", cpu()),
}


def found(proto: Any, runtime: str = "all") -> dict[str, list[str]]:
    """Rule -> the nodes that break it."""
    return {finding.rule.id: [node for node, _ in finding.places] for finding in lint(ir.from_proto(proto), runtime)}


def test_every_rule_has_a_case() -> None:
    assert list(CASES) == list(RULES)


@pytest.mark.parametrize("rule", list(CASES))
def test_rule_finds_what_breaks_it_and_nothing_else(rule: str) -> None:
    broken, node, clean = CASES[rule]
    onnx.checker.check_model(clean)
    assert found(broken).get(rule, [])[:1] == [node]
    assert rule not in found(clean)


def test_good_graphs_are_clean() -> None:
    assert found(linear(), "trt") == {}
    assert found(attention(clip="qkv"), "trt") == {}
    assert found(cpu(), "ort") == {}


# What the runtimes really do.


@pytest.fixture(scope="module")
def builder() -> engine.Backend:
    try:
        return engine.find_builder()
    except MissingError as error:
        pytest.skip(str(error))


@pytest.fixture
def build(builder: engine.Backend, tmp_path: Path) -> Callable[[Any], EngineReport]:
    """Builds an engine from a proto."""

    def build_proto(proto: Any) -> EngineReport:
        onnx.save(proto, tmp_path / "model.onnx")
        return engine.build_engine(tmp_path / "model.onnx", tmp_path / "plan", batch=(1, 2, 4), backend=builder)

    return build_proto


REFUSED = [
    "integer-operator", "weight-only-operator", "codes-computed", "zero-point", "code-type", "int32-bias",
    "block-weight", "mixed-code-types",
    "mixed-float-types", "scale-not-positive",
]  # fmt: skip
IN_FLOATING_POINT = [
    "dynamic-scale", "per-channel-activation", "reduction-axis", "fused-qkv", "cast-after-int4", "float-weight",
]  # fmt: skip
UNFUSED = ["partial-attention", "clip-after-softmax", "clip-on-attention-output", "attention-output", "attention-shape"]


@pytest.mark.trt
@pytest.mark.parametrize("rule", REFUSED)
def test_tensorrt_refuses_what_the_rule_calls_an_error(rule: str, build: Callable[[Any], EngineReport]) -> None:
    broken, _, clean = CASES[rule]
    assert RULES[rule].severity == "error"
    with pytest.raises(BuildError):
        build(broken)
    build(clean)


@pytest.mark.trt
@pytest.mark.parametrize("rule", IN_FLOATING_POINT)
def test_tensorrt_leaves_int8_without_telling(rule: str, build: Callable[[Any], EngineReport]) -> None:
    broken, node, clean = CASES[rule]
    linear_node = node.split(".")[0]
    assert linear_precisions(build(broken).layers, [linear_node])[linear_node] in ("FP16", "FP32")
    assert linear_precisions(build(clean).layers, [linear_node])[linear_node] == "INT8"


@pytest.mark.trt
@pytest.mark.parametrize("rule", UNFUSED)
def test_tensorrt_does_not_fuse_the_attention(rule: str, build: Callable[[Any], EngineReport]) -> None:
    broken, _, clean = CASES[rule]
    assert fused_attentions(build(broken).layers) == ()
    assert fused_attentions(build(clean).layers) == (("FP16",) if rule == "partial-attention" else ("INT8",))


@pytest.mark.trt
@pytest.mark.parametrize(("heads", "fuses"), [(2, True), (4, True), (8, True), (16, False)])
def test_tensorrt_fuses_the_heads_that_the_rule_says(
    heads: int, fuses: bool, build: Callable[[Any], EngineReport]
) -> None:
    proto = attention(heads=heads)
    assert ("attention-shape" not in found(proto)) == fuses
    assert (fused_attentions(build(proto).layers) == ("INT8",)) == fuses


PARTS = [subset for size in range(4) for subset in itertools.combinations("qkvp", size)]


@pytest.mark.trt
@pytest.mark.parametrize("parts", PARTS, ids="".join)
def test_tensorrt_fuses_the_parts_that_the_rule_says(
    parts: tuple[str, ...], build: Callable[[Any], EngineReport]
) -> None:
    proto = attention("".join(parts) + "o")
    unfused = fused_attentions(build(proto).layers) == ()
    assert ("partial-attention" in found(proto)) == unfused


@pytest.mark.trt
@pytest.mark.parametrize(
    ("rank", "floats", "block"), [(3, "FP32", 32), (4, "FP16", 32), (3, "FP16", 16), (3, "FP16", 64)]
)
def test_tensorrt_refuses_every_weight_only_operator_without_its_plug_in(
    rank: int, floats: str, block: int, build: Callable[[Any], EngineReport]
) -> None:
    proto = matmul_nbits(rank, floats, block)
    assert list(found(proto, "trt")) == ["weight-only-operator"]
    with pytest.raises(BuildError, match=r"MatMulNBits"):
        build(proto)


@pytest.mark.trt
@pytest.mark.parametrize(
    ("operator", "code"),
    [("Clip", "INT8"), ("Identity", "INT8"), ("Transpose", "INT8"), ("Transpose", "FP8"), ("Transpose", "INT4")],
)
def test_tensorrt_takes_constant_codes_only_in_front_of_dequantize(
    operator: str, code: str, build: Callable[[Any], EngineReport]
) -> None:
    proto = moved_weight(operator, code)
    assert "codes-computed" in found(proto, "trt")
    with pytest.raises(BuildError):
        build(proto)


@pytest.mark.trt
@pytest.mark.parametrize("quantised", ["", "o", "v", "qk", "qkvpo"])
@pytest.mark.parametrize("batch", ["batch", 2])
def test_one_linear_for_q_k_and_v_is_in_int8_exactly_if_the_rule_is_silent(
    quantised: str, batch: Any, tmp_path: Path, builder: engine.Backend
) -> None:
    proto = attention(quantised, fused=True, batch=batch)
    onnx.save(proto, tmp_path / "model.onnx")
    sizes = (2, 2, 2) if batch == 2 else (1, 2, 4)
    report = engine.build_engine(tmp_path / "model.onnx", tmp_path / "plan", batch=sizes, backend=builder)
    in_int8 = linear_precisions(report.layers, ["qkv"])["qkv"] == "INT8"
    assert in_int8 == ("fused-qkv" not in found(proto, "trt"))


@pytest.mark.trt
def test_tensorrt_reads_uint8_as_int8(build: Callable[[Any], EngineReport], tmp_path: Path) -> None:
    assert linear_precisions(build(CASES["uint8-codes"][0]).layers, ["fc"])["fc"] == "INT8"


@pytest.mark.trt
def test_tensorrt_dequantises_int4_without_blocks_apart(build: Callable[[Any], EngineReport]) -> None:
    broken, _, clean = CASES["int4-per-channel-weight-only"]
    packed = [any(t.dtype == "INT4" for t in layer.constants) for layer in build(broken).layers]
    assert "Fc" not in build(broken).layers[packed.index(True)].name
    assert "Fc" in next(layer.name for layer in build(clean).layers if any(t.dtype == "INT4" for t in layer.constants))


def session(proto: Any, level: str = "ORT_ENABLE_ALL", **entries: str) -> Any:
    """An ONNX Runtime session on the CPU."""
    onnxruntime = pytest.importorskip("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    for key, value in entries.items():
        options.add_session_config_entry(key.replace("__", "."), value)
    return onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


def compute(proto: Any, level: str = "ORT_ENABLE_ALL") -> Any:
    """The output of a session for fixed random numbers."""
    x = np.random.default_rng(1).normal(size=(2, TOKENS, WIDTH)).astype(np.float32)
    return session(proto, level).run(None, {"x": x})[0]


def operators(proto: Any, tmp_path: Path) -> set[str]:
    """The operators that ONNX Runtime really runs."""
    onnxruntime = pytest.importorskip("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 4
    onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return {node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node}


@pytest.mark.parametrize(
    "rule",
    [
        "opset-too-new", "opset-too-old", "type-conflict", "unknown-domain", "mixed-float-types", "output-dtype",
        "bfloat16-codes",
        "int8-transpose",
    ],
)  # fmt: skip
def test_onnx_runtime_refuses_what_the_rule_calls_an_error(rule: str) -> None:
    broken, _, clean = CASES[rule]
    assert RULES[rule].severity == "error"
    with pytest.raises(Exception, match="ONNXRuntimeError"):
        session(broken)
    session(clean)


@pytest.mark.parametrize(
    "proto",
    [moved_codes("INT8"), moved_codes("INT8", opset=20), moved_codes("INT8", behind="QuantizeLinear"),
     moved_codes("INT8", behind="Gelu"), moved_codes("UINT8", 128), attention()],
)  # fmt: skip
def test_int8_transpose_is_an_error_exactly_if_onnx_runtime_says_so(proto: Any) -> None:
    try:
        session(proto)
    except Exception as error:  # a type of its own for each status
        assert "output_dtype INT8 does not match" in str(error)
        assert "int8-transpose" in found(proto)
    else:
        assert "int8-transpose" not in found(proto)


def test_onnx_runtime_throws_at_run_time_on_scales_for_channels() -> None:
    broken, _, clean = CASES["per-channel-activation-8-bit"]
    with pytest.raises(Exception, match="must be a scalar"):
        compute(broken)
    compute(clean)


def test_onnx_runtime_computes_with_any_scale() -> None:
    usual = compute(cpu())
    assert not np.isfinite(compute(cpu(weight={"scale": np.inf}))).all()
    assert np.allclose(compute(cpu(weight={"scale": -0.01})), -usual, atol=1e-5)  # which the rule lets pass
    zero = {"code": "UINT8", "zero": 128, "scale": 0.0}
    assert len(np.unique(compute(cpu(activation=zero)))) < 3  # every input is lost


@pytest.mark.parametrize("rule", ["consecutive-qdq", "merged-quantizer", "weight-only"])
def test_onnx_runtime_computes_other_numbers(rule: str) -> None:
    for proto, same in ((CASES[rule][0], False), (CASES[rule][2], True)):
        assert np.allclose(compute(proto), compute(proto, "ORT_DISABLE_ALL"), atol=1e-4) == same


@pytest.mark.parametrize("proto", [convolution(True), convolution(False), behind_relu(code="UINT4"), behind_relu()])
def test_quantisers_are_merged_exactly_if_onnx_runtime_computes_other_numbers(proto: Any) -> None:
    same = np.allclose(compute(proto), compute(proto, "ORT_DISABLE_ALL"), atol=1e-3)
    assert ("merged-quantizer" in found(proto)) == (not same)


def test_onnx_runtime_rounds_a_product_that_is_quantised_again(tmp_path: Path) -> None:
    broken, _, clean = CASES["product-requantised"]
    assert "QLinearMatMul" in operators(broken, tmp_path)
    assert "MatMulIntegerToFloat" in operators(clean, tmp_path)
    assert not np.allclose(compute(broken), compute(clean), atol=0.01)


@pytest.mark.parametrize("rule", ["static-batch", "fp16-codes", "four-bit-arithmetic", "float-weight"])
def test_onnx_runtime_does_not_fuse(rule: str, tmp_path: Path) -> None:
    broken, _, clean = CASES[rule]
    assert "DequantizeLinear" in operators(broken, tmp_path)
    if rule != "float-weight":
        assert "DequantizeLinear" not in operators(clean, tmp_path)


# Files that others write.


SYMMETRIC = {"ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False}


@pytest.mark.trt
@pytest.mark.parametrize(
    ("activation", "weight", "form", "options"),
    [
        ("QInt8", "QInt8", "QDQ", {}),
        ("QUInt8", "QInt8", "QDQ", {}),
        ("QUInt8", "QInt4", "QDQ", {}),
        ("QInt16", "QInt8", "QDQ", {}),
        ("QInt8", "QInt8", "QOperator", {}),
        ("QInt8", "QInt8", "QDQ", SYMMETRIC),
        ("QInt8", "QInt8", "QDQ", {**SYMMETRIC, "AddQDQPairToWeight": True}),
        ("QInt8", "QInt4", "QDQ", SYMMETRIC),
    ],
)
def test_files_of_onnx_runtimes_quantiser_have_errors_exactly_if_they_are_refused(
    activation: str,
    weight: str,
    form: str,
    options: dict[str, bool],
    tmp_path: Path,
    build: Callable[[Any], EngineReport],
) -> None:
    quantization = pytest.importorskip("onnxruntime.quantization")
    g = Graph("FP32")
    norm = [g.constant("norm.weight", np.ones(WIDTH)), g.constant("norm.bias", np.zeros(WIDTH))]
    x = g.node("LayerNormalization", ["x", *norm], "norm", axis=-1)
    for name in ("fc1", "fc2"):
        x = g.node("Gelu", [g.linear(x, name, g.constant(name, g.random.normal(size=(WIDTH, WIDTH))))], f"{name}.gelu")
    onnx.save(g.proto(x), tmp_path / "float.onnx")

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc, name-defined]  # the package is optional
        batches = iter(np.random.default_rng(0).normal(size=(2, 2, TOKENS, WIDTH)).astype(np.float32))

        def get_next(self) -> Any:
            return next(({"x": batch} for batch in self.batches), None)

    quantization.quantize_static(
        tmp_path / "float.onnx",
        tmp_path / "quantised.onnx",
        Reader(),
        quant_format=quantization.QuantFormat[form],
        activation_type=quantization.QuantType[activation],
        weight_type=quantization.QuantType[weight],
        per_channel=True,
        extra_options=options,
    )
    proto = onnx.load(tmp_path / "quantised.onnx")
    errors = {
        runtime: [it.rule.id for it in lint(ir.from_proto(proto), runtime) if it.rule.severity == "error"]
        for runtime in RUNTIMES
    }
    compute(proto)
    assert errors["ort"] == []
    if errors["trt"]:
        with pytest.raises(BuildError):
            build(proto)
    else:
        build(proto)
    assert (errors["trt"] == []) == (options != {})


# Our own files, and the command.


@pytest.mark.parametrize(
    ("target", "runtime"),
    [(name, "trt" if name.startswith("trt") or name == "fp16" else "ort") for name in TARGETS if name != "openvino"],
)
def test_what_we_export_is_clean_for_its_runtime(
    dialect: ir.Model, checkpoint: Checkpoint, target: str, runtime: str
) -> None:
    findings = lint(lower(dialect, TARGETS[target](), {}), runtime)
    assert [it.rule.id for it in findings if it.rule.severity != "note"] == []


def test_clamped_softmax_codes_are_found_in_what_we_export(dialect: ir.Model) -> None:
    few = dialect.clone()
    for node in few.graph:
        if node.op_type == "Quantize" and node.attributes["name"].as_string().endswith("attn.pv.a_quantizer"):
            node.attributes["bits"] = ir.AttrInt64("bits", 4)
    findings = lint(lower(few, TARGETS["trt-int8"](), {}), "trt")
    assert [(it.rule.id, len(it.places)) for it in findings if it.rule.severity != "note"] == [
        ("clip-after-softmax", 2)
    ]


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(arguments)


@pytest.fixture
def bad_file(tmp_path: Path) -> Path:
    """A zero point on two nodes: an error for TensorRT, nothing for ONNX Runtime; and warnings for both."""
    path = tmp_path / "bad.onnx"
    onnx.save(linear({"zero": 3}), path)
    return path


def test_text_is_grouped_with_counts(bad_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(GateError, match=r"breaks 1 rule\(s\): zero-point\.$"):
        run(parse(str(bad_file), "--rules-only"))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (
        f"{bad_file}: 1 error(s), 1 warning(s), 0 note(s); {len(RULES)} rules of TensorRT and ONNX Runtime CPU"
    )
    where = lines.index("error: zero-point [TensorRT]")
    assert lines[where + 1] == "  where   2 nodes, first fc.x.quantize: zero point 3"
    assert len([line for line in lines if "zero point 3" in line]) == 1


def test_json_has_every_node(bad_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(GateError):
        run(parse(str(bad_file), "--json", "--rules-only"))
    content = json.loads(capsys.readouterr().out)
    assert content["schema_version"] == "1.1"
    assert content["asked"] == []
    assert [(finding["rule"], finding["count"]) for finding in content["findings"]] == [
        ("zero-point", 2),
        ("fp16-codes", 1),
    ]
    assert content["findings"][0]["places"] == [
        {"node": "fc.x.quantize", "found": "zero point 3"},
        {"node": "fc.x.dequantize", "found": "zero point 3"},
    ]


def test_runtime_and_strict_decide_what_fails(bad_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(parse(str(bad_file), "--runtime", "ort", "--rules-only"))
    assert "zero-point" not in capsys.readouterr().out
    with pytest.raises(GateError, match="fp16-codes"):
        run(parse(str(bad_file), "--runtime", "ort", "--strict"))


@pytest.mark.trt
def test_runtimes_are_asked_and_their_refusal_is_an_error(
    bad_file: Path, builder: engine.Backend, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(GateError, match=r"breaks 2 rule\(s\): trt-refuses, zero-point\.$"):
        run(parse(str(bad_file)))
    lines = capsys.readouterr().out.splitlines()
    assert f"  {builder.name} {builder.version} refuses the file" in lines
    assert any(line.startswith("  ONNX Runtime ") and line.endswith(" loads the file") for line in lines)
    where = lines.index("error: trt-refuses [TensorRT]")
    assert lines[where + 1].startswith("  where   fc.x.quantize: ") and "zero" in lines[where + 1]


def test_refusal_that_no_rule_foresees_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxruntime")
    proto = with_node("Attention", "com.microsoft")  # it exists, with more inputs
    onnx.save(proto, tmp_path / "model.onnx")
    run(parse(str(tmp_path / "model.onnx"), "--runtime", "ort", "--rules-only"))
    capsys.readouterr()
    with pytest.raises(GateError, match=r"breaks 1 rule\(s\): ort-refuses"):
        run(parse(str(tmp_path / "model.onnx"), "--runtime", "ort", "--json"))
    content = json.loads(capsys.readouterr().out)
    (answer,) = content["asked"]
    assert answer["runtime"] == "ort" and answer["silent"] == "" and len(answer["refusals"]) == 1
    assert answer["refusals"][0]["words"] in content["findings"][0]["places"][0]["found"]


def test_a_file_that_is_no_model_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "text.onnx").write_text("hello")
    with pytest.raises(UsageError, match="cannot be read as ONNX"):
        run(parse(str(tmp_path / "text.onnx")))


def test_long_chains_and_many_paths_are_searched_in_no_time() -> None:
    g = Graph("FP32")
    x, scores = "x", g.node("MatMul", ["x", "x.t"], "qk")
    g.nodes.insert(0, helper.make_node("Transpose", ["x"], ["x.t"], name="t", perm=[0, 2, 1]))
    for index in range(5000):
        scores = g.node("Add", [scores, scores], f"double{index}")  # 2**5000 paths
        x = g.node("Transpose", [x], f"move{index}", perm=[0, 1, 2])
    y = g.node("MatMul", [g.node("Softmax", [scores], "softmax", axis=-1), x], "pv")
    assert "unquantised-linear" not in found(g.proto(y))


def test_every_rule_says_what_follows_what_to_do_and_who_says_so() -> None:
    for rule in RULES.values():
        assert rule.id == rule.id.lower() and " " not in rule.id
        assert set(rule.runtimes) <= set(RUNTIMES) and rule.runtimes
        for text in (rule.consequence, rule.fix):
            assert text[0].isupper() and text.endswith(".")
        assert rule.source
