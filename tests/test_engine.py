"""The engine builder and its proof of precision, on a transformer block that is built here node by node."""

import dataclasses
import hashlib
import json
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, checker, helper, numpy_helper, save

from gplq.errors import BuildError, MissingError, PrecisionError, UsageError
from gplq_export import engine
from gplq_export.precision import (
    EngineLayer,
    EngineReport,
    EngineTensor,
    Promise,
    _precision,
    _running,
    check_precision,
    fused_attentions,
    linear_precisions,
    parse_layers,
)

TOKENS, DIM, HEADS = 50, 192, 3
BATCH = (1, 4, 8)
LINEARS = [f"blocks.0.{name}" for name in ("attn.q", "attn.k", "attn.v", "attn.proj", "mlp.fc1", "mlp.fc2")] + ["head"]


@pytest.fixture(scope="module")
def backend() -> engine.Backend:
    try:
        return engine.find_builder()
    except MissingError as error:
        pytest.skip(str(error))


class Graph:
    """Nodes and initialisers; each method returns the name of the tensor that it made."""

    def __init__(self, weights: str, cast: bool, zero_point: int, reduction_axis: bool) -> None:
        self.weights, self.cast, self.zero_point, self.reduction_axis = weights, cast, zero_point, reduction_axis
        self.nodes: list[Any] = []
        self.initialisers: list[Any] = []
        self.random = np.random.default_rng(0)

    def constant(self, name: str, value: Any, dtype: type = np.float16) -> str:
        self.initialisers.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def node(self, operator: str, inputs: list[str], name: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(operator, inputs, [f"{name}.out"], name=name, **attributes))
        return f"{name}.out"

    def quantised(self, x: str, name: str, clip: bool = True, scale: float = 0.125) -> str:
        """Clip(-8s, 7s) -> INT8 QuantizeLinear -> DequantizeLinear, one scale."""
        if clip:
            bounds = [self.constant(f"{name}.low", -8 * scale), self.constant(f"{name}.high", 7 * scale)]
            x = self.node("Clip", [x, *bounds], f"{name}.clip")
        parameters = [self.constant(f"{name}.scale", scale), self.constant(f"{name}.zero", 0, np.int8)]
        codes = self.node("QuantizeLinear", [x, *parameters], f"{name}.quantize")
        return self.node("DequantizeLinear", [codes, *parameters], f"{name}.dequantize")

    def weight(self, name: str, rows: int, columns: int) -> str:
        """4-bit codes [rows, columns] with a scale per column (or per row, which engines cannot run in INT8)."""
        if self.weights == "FP16":
            return self.constant(f"{name}.weight", self.random.normal(size=(rows, columns)))
        kind = {"INT4": TensorProto.INT4, "INT8": TensorProto.INT8}[self.weights]
        codes = self.random.integers(-7, 8, size=rows * columns).tolist()
        self.initialisers.append(helper.make_tensor(f"{name}.codes", kind, (rows, columns), codes))
        scales = self.random.uniform(0.01, 0.02, rows if self.reduction_axis else columns)
        inputs = [f"{name}.codes", self.constant(f"{name}.scale", scales, np.float32 if self.cast else np.float16)]
        if self.zero_point:
            inputs.append(f"{name}.zero")
            zeros = [self.zero_point] * len(scales)
            self.initialisers.append(helper.make_tensor(f"{name}.zero", kind, (len(scales),), zeros))
        out = self.node("DequantizeLinear", inputs, f"{name}.dequantize", axis=0 if self.reduction_axis else 1)
        return self.node("Cast", [out], f"{name}.cast", to=TensorProto.FLOAT16) if self.cast else out

    def linear(self, x: str, name: str, rows: int, columns: int) -> str:
        product = self.node("MatMul", [x, self.weight(f"{name}.weights", rows, columns)], name)
        return self.node(
            "Add", [product, self.constant(f"{name}.bias", self.random.normal(size=columns))], f"{name}.add"
        )

    def norm(self, x: str, name: str) -> str:
        parameters = [self.constant(f"{name}.weight", np.ones(DIM)), self.constant(f"{name}.bias", np.zeros(DIM))]
        return self.node("LayerNormalization", [x, *parameters], name, axis=-1)

    def heads(self, x: str, name: str, order: list[int]) -> str:
        shape = self.constant(f"{name}.shape", [0, TOKENS, HEADS, DIM // HEADS], np.int64)
        return self.node("Transpose", [self.node("Reshape", [x, shape], f"{name}.split")], f"{name}.turn", perm=order)


def make_onnx(
    path: Path,
    *,
    weights: str = "INT4",
    cast: bool = False,
    zero_point: int = 0,
    reduction_axis: bool = False,
    fused_qkv: bool = False,
    int8_attention: bool = False,
    batch: str | int = "batch",
    tokens: str | int = TOKENS,
) -> Path:
    """An FP16 block and classifier: x [batch, tokens, 192] -> [batch, 10]."""
    graph = Graph(weights, cast, zero_point, reduction_axis)
    block = "blocks.0"
    x = graph.quantised(graph.norm("x", f"{block}.norm1"), f"{block}.attn.input")
    turns = {"q": [0, 2, 1, 3], "k": [0, 2, 3, 1], "v": [0, 2, 1, 3]}
    if fused_qkv:
        joined = graph.linear(x, f"{block}.attn.qkv", DIM, 3 * DIM)
        outputs = [f"{block}.{name}" for name in turns]
        graph.nodes.append(helper.make_node("Split", [joined], outputs, name=f"{block}.split", axis=2, num_outputs=3))
    else:
        outputs = [graph.linear(x, f"{block}.attn.{name}", DIM, DIM) for name in turns]
    if int8_attention:
        outputs = [graph.quantised(out, f"{block}.{name}") for out, name in zip(outputs, turns, strict=True)]
    q, k, v = (graph.heads(out, f"{block}.{name}", turns[name]) for out, name in zip(outputs, turns, strict=True))
    attention = graph.node("Softmax", [graph.node("MatMul", [q, k], f"{block}.qk")], f"{block}.softmax", axis=-1)
    if int8_attention:
        attention = graph.quantised(attention, f"{block}.p", clip=False, scale=1 / 15)
    mixed = graph.node("Transpose", [graph.node("MatMul", [attention, v], f"{block}.pv")], "back", perm=[0, 2, 1, 3])
    mixed = graph.node("Reshape", [mixed, graph.constant("shape", [0, TOKENS, DIM], np.int64)], "join")
    if int8_attention:  # the engine fuses attention only if INT8 directly follows it; Clip comes after
        mixed = graph.quantised(mixed, f"{block}.carrier", clip=False)
    mixed = graph.quantised(mixed, f"{block}.proj.input")
    x = graph.node("Add", ["x", graph.linear(mixed, f"{block}.attn.proj", DIM, DIM)], "residual1")
    hidden = graph.quantised(graph.norm(x, f"{block}.norm2"), f"{block}.fc1.input")
    hidden = graph.node("Gelu", [graph.linear(hidden, f"{block}.mlp.fc1", DIM, 4 * DIM)], "gelu")
    hidden = graph.linear(graph.quantised(hidden, f"{block}.fc2.input"), f"{block}.mlp.fc2", 4 * DIM, DIM)
    x = graph.node("Add", [x, hidden], "residual2")
    x = graph.node("Gather", [x, graph.constant("first", 0, np.int64)], "class_token", axis=1)
    codes = graph.constant("head.codes", graph.random.integers(-127, 128, size=(10, DIM)), np.int8)
    weight = graph.node("DequantizeLinear", [codes, graph.constant("head.scale", [0.002] * 10)], "head.dq", axis=0)
    x = graph.quantised(x, "head.input", clip=False, scale=0.03)
    x = graph.node("Gemm", [x, weight, graph.constant("head.bias", np.zeros(10))], "head", transB=1)
    model = helper.make_model(
        helper.make_graph(
            graph.nodes,
            "vit",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT16, [batch, tokens, DIM])],
            [helper.make_tensor_value_info(x, TensorProto.FLOAT16, [batch, 10])],
            graph.initialisers,
        ),
        opset_imports=[helper.make_opsetid("", 21)],
        ir_version=10,
    )
    checker.check_model(model)
    save(model, path)
    return path


def build(backend: engine.Backend, folder: Path, **graph: Any) -> EngineReport:
    onnx_path = make_onnx(folder / "model.onnx", **graph)
    return engine.build_engine(
        onnx_path, folder / "model.plan", batch=BATCH, backend=backend, log_path=folder / "log.txt"
    )


@pytest.mark.trt
@pytest.mark.parametrize("weights", ["INT4", "INT8"])
@pytest.mark.parametrize("int8_attention", [False, True])
def test_every_linear_multiplies_in_int8(
    backend: engine.Backend, tmp_path: Path, weights: str, int8_attention: bool
) -> None:
    report = build(backend, tmp_path, weights=weights, int8_attention=int8_attention)
    check_precision(report, Promise.of(LINEARS, "INT8"))
    assert linear_precisions(report.layers, LINEARS) == dict.fromkeys(LINEARS, "INT8")
    assert fused_attentions(report.layers) == (("INT8",) if int8_attention else ("FP16",))
    # q, k and v become one kernel from INT8 weights; INT4 weights are first cast to INT8, one kernel each.
    merged = [layer.name for layer in report.layers if layer.layer_type == "gemm" and "+" in layer.name]
    casts = [layer for layer in report.layers if [t.dtype for t in layer.constants] == ["INT4"]]
    assert (len(merged), len(casts)) == ((0, 6) if weights == "INT4" else (1, 0))


@pytest.mark.trt
def test_report_describes_the_plan(backend: engine.Backend, tmp_path: Path) -> None:
    report = build(backend, tmp_path)
    plan, onnx_bytes = (tmp_path / "model.plan").read_bytes(), (tmp_path / "model.onnx").read_bytes()
    assert report.plan_bytes == len(plan) > 100_000
    assert report.plan_sha256 == hashlib.sha256(plan).hexdigest()
    assert report.onnx_sha256 == hashlib.sha256(onnx_bytes).hexdigest()
    assert (report.backend, report.backend_version, report.batch) == (backend.name, backend.version, BATCH)
    content = json.loads(json.dumps(report.to_dict()))
    assert set(content) == {field.name for field in dataclasses.fields(report)}
    assert {"name", "type", "inputs", "constants", "outputs", "onnx_nodes"} == set(content["layers"][0])
    assert "Layers:" in (tmp_path / "log.txt").read_text(encoding="utf-8")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.txt", "model.onnx", "model.plan"]


@pytest.mark.trt
@pytest.mark.parametrize(
    ("graph", "wrong", "advice"),
    [
        ({"cast": True}, "blocks.0.attn.q", "Cast after the weights' DequantizeLinear"),
        ({"reduction_axis": True}, "blocks.0.attn.q", "along the reduction axis"),
        ({"reduction_axis": True, "weights": "INT8"}, "blocks.0.attn.q", "along the reduction axis"),
        ({"fused_qkv": True}, "blocks.0.attn.qkv", "Export q, k and v as three MatMuls"),
        ({"weights": "FP16"}, "blocks.0.attn.q", "reach it unquantised"),
    ],
    ids=["cast", "reduction axis", "reduction axis INT8", "fused qkv", "FP16 weights"],
)
def test_silent_fall_back_is_an_error(
    backend: engine.Backend, tmp_path: Path, graph: dict[str, Any], wrong: str, advice: str
) -> None:
    linears = ["blocks.0.attn.qkv", *LINEARS[3:]] if "fused_qkv" in graph else LINEARS
    report = build(backend, tmp_path, **graph)
    with pytest.raises(PrecisionError) as raised:
        check_precision(report, Promise.of(linears, "INT8"))
    count = 1 if "fused_qkv" in graph else 6
    assert f"First: {wrong} is FP16, in engine layer" in str(raised.value)
    assert f"{count} of {len(linears)} at FP16" in str(raised.value)
    assert advice in str(raised.value)


@pytest.mark.trt
def test_linear_that_no_engine_layer_names(backend: engine.Backend, tmp_path: Path) -> None:
    report = build(backend, tmp_path)
    assert linear_precisions(report.layers, ["blocks.9.attn.q"]) == {"blocks.9.attn.q": "missing"}
    with pytest.raises(
        PrecisionError, match=r"1 of 2 at missing.*First: blocks\.9\.attn\.q is missing.*unique node name"
    ):
        check_precision(report, Promise.of(["head", "blocks.9.attn.q"], "INT8"))
    with pytest.raises(PrecisionError, match="no linear was given"):
        check_precision(report, Promise.of([], "INT8"))


@pytest.mark.trt
def test_refused_graph_leaves_a_log_and_no_plan(backend: engine.Backend, tmp_path: Path) -> None:
    with pytest.raises(BuildError) as raised:
        build(backend, tmp_path, zero_point=1)
    message = str(raised.value)
    assert "  blocks.0.attn.q.weights.dequantize (DequantizeLinear): " in message
    assert "zero point is not supported" in message
    assert str(tmp_path / "log.txt") in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.txt", "model.onnx"]
    assert "zero point is not supported" in (tmp_path / "log.txt").read_text(encoding="utf-8")


@pytest.mark.trt
def test_failed_build_says_why_and_keeps_the_old_plan(backend: engine.Backend, tmp_path: Path) -> None:
    (tmp_path / "model.plan").write_bytes(b"old")
    with pytest.raises(BuildError, match=r"cannot build .*model\.onnx:\n  .*\n.*log\.txt"):
        build(backend, tmp_path, weights="INT8", cast=True)  # scales of two types meet in one matrix multiplication
    assert (tmp_path / "model.plan").read_bytes() == b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.txt", "model.onnx", "model.plan"]


@pytest.mark.trt
def test_unwritable_plan_still_leaves_the_log(
    backend: engine.Backend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UsageError, match="No space left"):
        build(backend, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.txt", "model.onnx"]


@pytest.mark.trt
def test_missing_listing_is_an_error(backend: engine.Backend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "parse_layers", lambda messages: parse_layers(messages[:3]))
    with pytest.raises(BuildError, match=r"lists no engine layers.*\n.*log\.txt"):
        build(backend, tmp_path)
    assert not (tmp_path / "model.plan").exists()


@pytest.mark.trt
def test_batch_and_shapes(backend: engine.Backend, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"fixed batch 2.*batch=\(2, 2, 2\)"):
        build(backend, tmp_path, batch=2)
    with pytest.raises(BuildError, match="only dimension 0, the batch, may be dynamic"):
        build(backend, tmp_path, tokens="tokens")
    for batch, size in (("batch", 1), (2, 2)):
        path = make_onnx(tmp_path / "model.onnx", batch=batch)
        report = engine.build_engine(path, tmp_path / "a.plan", batch=(size, size, size), backend=backend)
        check_precision(report, Promise.of(LINEARS, "INT8"))
    with pytest.raises(UsageError, match="ascending"):
        engine.build_engine(path, tmp_path / "a.plan", batch=(4, 2, 8), backend=backend)
    with pytest.raises(UsageError, match="not a file"):
        engine.build_engine(tmp_path / "absent.onnx", tmp_path / "a.plan", backend=backend)


@pytest.mark.trt
def test_compute_capabilities(backend: engine.Backend, tmp_path: Path) -> None:
    if backend.name != "TensorRT-RTX":
        pytest.skip("only TensorRT-RTX builds for GPUs that are not present")
    path = make_onnx(tmp_path / "model.onnx")
    report = engine.build_engine(path, tmp_path / "a.plan", compute_capabilities=(86, 89), backend=backend)
    check_precision(report, Promise.of(LINEARS, "INT8"))
    assert report.compute_capabilities == (86, 89)
    with pytest.raises(UsageError, match=r"cannot target SM90; it knows .*86"):
        engine.build_engine(path, tmp_path / "a.plan", compute_capabilities=(90,), backend=backend)


@pytest.mark.trt
def test_gpu_without_the_type_is_named(backend: engine.Backend, tmp_path: Path) -> None:
    if backend.name != "TensorRT-RTX":
        pytest.skip("only TensorRT-RTX builds for GPUs that are not present")
    path = make_onnx(tmp_path / "model.onnx")
    with pytest.raises(BuildError, match=r"no int4 arithmetic: sm75\. Leave them out.*INT4 80"):
        engine.build_engine(path, tmp_path / "a.plan", compute_capabilities=(75, 86), backend=backend)


@pytest.mark.trt
def test_each_profile_has_kernels_of_its_own_and_all_are_proven(backend: engine.Backend, tmp_path: Path) -> None:
    path = make_onnx(tmp_path / "model.onnx", weights="INT8")
    one = engine.build_engine(path, tmp_path / "a.plan", batch=BATCH, backend=backend)
    options = engine.BuilderOptions(profiles=((1, 1, 1),))
    two = engine.build_engine(path, tmp_path / "b.plan", batch=BATCH, options=options, backend=backend)
    assert two.plan_bytes > 1.3 * one.plan_bytes
    assert len(two.layers) > 1.8 * len(one.layers)
    assert two.options == {"profiles": ((1, 1, 1),)}
    for node in LINEARS:
        found = [len(_running(report.layers, node)) for report in (one, two)]
        assert found == [1, 2]
    check_precision(two, Promise.of(LINEARS, "INT8"))
    spoilt = [
        dataclasses.replace(layer, inputs=(tensor("FP16", -1, 8),), constants=(tensor("FP16", 8, 8),))
        if layer.name.startswith("blocks.0.mlp.fc2 [profile 1]")
        else layer
        for layer in two.layers
    ]
    with pytest.raises(PrecisionError, match=r"First: blocks\.0\.mlp\.fc2 is FP16"):
        check_precision(dataclasses.replace(two, layers=tuple(spoilt)), Promise.of(LINEARS, "INT8"))


@pytest.mark.trt
def test_workspace_limits_the_kernels(backend: engine.Backend, tmp_path: Path) -> None:
    path = make_onnx(tmp_path / "model.onnx")
    options = engine.BuilderOptions(workspace=1024)
    with pytest.raises(BuildError, match="Allow more workspace"):
        engine.build_engine(path, tmp_path / "a.plan", options=options, backend=backend)
    options = engine.BuilderOptions(workspace=1 << 30)
    assert engine.build_engine(path, tmp_path / "a.plan", options=options, backend=backend).options == {
        "workspace": 1 << 30
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timing_cache": Path("times.cache")}, r"timing_cache \(it measures no kernels"),
        ({"optimization_level": 3}, r"optimization_level \(it builds the same plan"),
        ({"version_compatible": True}, r"version_compatible \(its plans run on the very version"),
        ({"hardware": "ampere+"}, r"hardware \(its plans are portable"),
        ({"workspace": 0}, "positive"),
        ({"optimization_level": 6}, "choose 0 to 5"),
        ({"profiles": ((8, 4, 8),)}, "ascending"),
    ],
)
def test_options_without_effect_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    rtx = engine.Backend("TensorRT-RTX", "1.7.1", None)
    with pytest.raises(UsageError, match=message):
        engine.build_engine(
            tmp_path / "a.onnx", tmp_path / "a.plan", options=engine.BuilderOptions(**options), backend=rtx
        )


class FakeConfig:
    """Stands for TensorRT's builder configuration: keeps what it is told."""

    def __init__(self, takes_cache: bool = True) -> None:
        self.told: dict[str, Any] = {}
        self.takes_cache = takes_cache

    def set_memory_pool_limit(self, pool: str, size: int) -> None:
        self.told[pool] = size

    def set_flag(self, flag: str) -> None:
        self.told["flag"] = flag

    def create_timing_cache(self, content: bytes) -> bytes:
        return content

    def set_timing_cache(self, cache: bytes, ignore_mismatch: bool) -> bool:
        self.told["cache"] = cache
        return self.takes_cache and not ignore_mismatch


def test_options_reach_tensorrt(tmp_path: Path) -> None:
    levels = SimpleNamespace(__members__={"AMPERE_PLUS": "plus"})
    trt = SimpleNamespace(
        MemoryPoolType=SimpleNamespace(WORKSPACE="workspace"),
        BuilderFlag=SimpleNamespace(VERSION_COMPATIBLE="compatible"),
        HardwareCompatibilityLevel=levels,
    )
    backend, config, cache = engine.Backend("TensorRT", "10.13.2", trt), FakeConfig(), tmp_path / "times.cache"
    options = engine.BuilderOptions(1024, (), cache, 4, True, "ampere+")
    engine._check_options(backend, BATCH, options)
    assert engine._apply(backend, config, options) == b""  # a new cache
    assert config.told == {"workspace": 1024, "flag": "compatible", "cache": b""}
    assert (config.builder_optimization_level, config.hardware_compatibility_level) == (4, "plus")  # type: ignore[attr-defined]  # set from outside
    cache.write_bytes(b"times")
    assert engine._apply(backend, config, engine.BuilderOptions(timing_cache=cache)) == b"times"
    with pytest.raises(UsageError, match=r"times\.cache is no timing cache of TensorRT 10\.13\.2 on this GPU"):
        engine._apply(backend, FakeConfig(takes_cache=False), engine.BuilderOptions(timing_cache=cache))
    with pytest.raises(UsageError, match="cannot build for 'same-capability' hardware"):
        engine._apply(backend, config, engine.BuilderOptions(hardware="same-capability"))
    untouched = FakeConfig()
    assert engine._apply(backend, untouched, engine.BuilderOptions()) is None
    assert vars(untouched) == vars(FakeConfig())  # nothing is said that was not asked for


@pytest.mark.trt
def test_ctrl_c_cancels_the_build(backend: engine.Backend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parse = engine._parse_onnx

    def interrupted(*args: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        parse(*args)

    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        pytest.skip("this process handles Ctrl-C in its own way")
    monkeypatch.setattr(engine, "_parse_onnx", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build(backend, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.txt", "model.onnx"]
    assert "BuildCanceled" in (tmp_path / "log.txt").read_text(encoding="utf-8")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.trt
def test_builds_outside_the_main_thread(backend: engine.Backend, tmp_path: Path) -> None:
    reports: list[EngineReport] = []
    thread = threading.Thread(target=lambda: reports.append(build(backend, tmp_path)))
    thread.start()
    thread.join()
    assert reports[0].plan_bytes > 0


def test_import_loads_nothing_heavy() -> None:
    heavy = "{'torch', 'onnx', 'tensorrt', 'tensorrt_rtx', 'tensorrt_rtx_bindings'}"
    code = f"import sys, gplq_export.engine; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


class FakeModule:
    """Stands for an importable builder."""

    Builder = object

    def __init__(self, version: str) -> None:
        self.__version__ = version


@pytest.mark.parametrize(
    ("installed", "gpu", "expected"),
    [
        ({"tensorrt": "11.4.0", "tensorrt_rtx": "1.7.1"}, True, ("TensorRT", "11.4.0")),
        ({"tensorrt": "10.13.2", "tensorrt_rtx_bindings": "1.7.1"}, False, ("TensorRT-RTX", "1.7.1")),
        ({"tensorrt": "8.6.1", "tensorrt_rtx_bindings": "1.7.1"}, True, ("TensorRT-RTX", "1.7.1")),
        ({"tensorrt_rtx": "1.7.2", "tensorrt_rtx_bindings": "1.7.1"}, False, ("TensorRT-RTX", "1.7.2")),
        ({}, True, "neither TensorRT nor TensorRT-RTX can be imported"),
        ({"tensorrt": "10.13.2"}, False, "TensorRT 10.13.2 is installed, but it needs an NVIDIA GPU"),
        ({"tensorrt": "8.6.1"}, True, "TensorRT 8.6.1 is installed, but version 10 or 11 is needed"),
    ],
)
def test_find_builder(
    monkeypatch: pytest.MonkeyPatch, installed: dict[str, str], gpu: bool, expected: tuple[str, str] | str
) -> None:
    monkeypatch.setattr(engine, "_gpu_usable", lambda: gpu)
    monkeypatch.setattr(
        engine, "optional_module", lambda name: FakeModule(installed[name]) if name in installed else None
    )
    if isinstance(expected, tuple):
        found = engine.find_builder()
        assert (found.name, found.version) == expected
        return
    with pytest.raises(MissingError) as raised:
        engine.find_builder()
    assert expected in str(raised.value)
    assert "pip install 'gplq[trt]'" in str(raised.value)
    assert "pip install 'gplq[trt-rtx]'" in str(raised.value)


# One line in the older style of TensorRT 10: no Constants, "Format/Datatype", a Location, weights among the inputs, and
# U+001E between the nodes in the metadata. KIND is filled in.
OLDER = (
    "Layers:\nName: q + k_myl9_4, LayerType: gemm, Inputs: [ { Name: a'.1_4, Location: Device, Dimensions: [1,4096], "
    "Format/Datatype: KIND }, { Name: w, Dimensions: [4096,1000], Format/Datatype: KIND }, { Name: alpha, "
    "Dimensions: [1], Format/Datatype: Float }, { Name: bias, Dimensions: [1,1000], Format/Datatype: Half }], "
    "Outputs: [ { Name: o, Dimensions: [1,1000], Format/Datatype: Half }], TacticName: t, StreamId: 0, "
    "Metadata: [ONNX Layer: q]\x1e[ONNX Layer: k]\n\nBindings:\na\no"
)


@pytest.mark.parametrize(
    ("kind", "precision"),
    [("Int8", "INT8"), ("Half", "FP16"), ("Row major linear FP8 format", "FP8"), ("Float", "FP32"), ("Odd", "unknown")],
)
def test_older_listing(kind: str, precision: str) -> None:
    (layer,) = parse_layers(["Parsing", OLDER.replace("KIND", kind)])
    assert layer.onnx_nodes == ("q", "k")
    assert [tensor.shape for tensor in layer.inputs] == [(1, 4096), (4096, 1000), (1,), (1, 1000)]
    assert linear_precisions([layer], ["q", "k", "bias"]) == {
        "q": precision,
        "k": precision,
        "bias": "missing",
    }


def tensor(dtype: str, *shape: int, name: str = "t") -> EngineTensor:
    return EngineTensor(name, dtype, shape)


def layer(name: str, kind: str, inputs: list[Any], constants: list[Any], out: str = "FP16") -> EngineLayer:
    return EngineLayer(name, kind, tuple(inputs), tuple(constants), (tensor(out, -1, 8),), ("fc",))


def test_int8_operands_that_are_dequantised_inside_the_kernel_are_not_int8() -> None:
    int8 = [tensor("INT8", -1, 8)], [tensor("INT8", 8, 8)]
    assert _precision(layer("fc_myl0_1", "gemm", *int8)) == "INT8"
    assert _precision(layer("__myl_FcMulAdd_myl0_1", "runtime_fusion", *int8)) == "INT8"
    assert _precision(layer("__myl_CastMulCastMulFc_myl0_1", "runtime_fusion", *int8)) == "FP16"
    assert _precision(layer("__myl_CastMulFcMulCast_myl0_1", "runtime_fusion", *int8, out="INT8")) == "unknown"


def test_residual_is_no_factor_and_kernels_around_do_not_count() -> None:
    gemm = layer("fc_myl0_1", "gemm", [tensor("INT8", -1, 8), tensor("FP16", -1, 8)], [tensor("INT8", 8, 8)])
    scale = layer("__myl_MulAdd_myl0_2", "kgen", [tensor("FP16", -1, 8)], [tensor("FP16", 1, 8)])
    assert linear_precisions([scale, gemm], ["fc"]) == {"fc": "INT8"}
    assert linear_precisions([scale], ["fc"]) == {"fc": "missing"}
