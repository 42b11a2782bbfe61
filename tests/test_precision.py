"""What engines promise and keep: real shapes of four families, at two blocks, in every precision that there is."""

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from test_lowering import multiplied, run

from gplq import stage2
from gplq.calibrate import calibrate
from gplq.checkpoint import Checkpoint
from gplq.convert import convert
from gplq.data import open_images
from gplq.errors import BuildError, MissingError, PrecisionError
from gplq.models import ModelSpec
from gplq.preprocessing import Preprocessing
from gplq.recipe import Recipe
from gplq.survey import input_size
from gplq_export.engine import Backend, build_engine, find_builder
from gplq_export.lowering import linear_nodes, lower
from gplq_export.precision import (
    Attention,
    EngineLayer,
    EngineReport,
    EngineTensor,
    Multiplication,
    Promise,
    check_precision,
    precision_table,
)
from gplq_export.promise import promise
from gplq_export.targets import TARGETS, Target, TensorRTInt8
from gplq_export.trace import trace

# Real widths, heads, tokens and windows; two blocks (of Swin: one plain, one shifted, one behind the patch merging).
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "ViT-S": ("vit_small_patch16_224", {"depth": 2}),
    "DeiT-T": ("deit_tiny_patch16_224", {"depth": 2}),
    "Swin-T": ("swin_tiny_patch4_window7_224", {"depths": (2, 1), "num_heads": (3, 6)}),
    "DINOv2-S": ("vit_small_patch14_dinov2", {"img_size": 224, "depth": 2}),
    "heads of 48": ("vit_tiny_patch16_224", {"img_size": 96, "depth": 1, "embed_dim": 96, "num_heads": 2}),
    "577 tokens": (
        "vit_tiny_patch16_224",
        {"img_size": 96, "patch_size": 4, "depth": 1, "embed_dim": 32, "num_heads": 1},
    ),
}
FULL: dict[str, Any] = {"softmax_bits": 4, "softmax_scale": "full"}
LEARNED: dict[str, Any] = {"softmax_bits": 4}
EIGHT: dict[str, Any] = {"weight_bits": 8, "activation_bits": 8, "softmax_bits": 7}
# What FP8 holds of queries, keys and values; engines for INT8 do not care.
FITS_FP8: dict[str, Any] = {"matmul_bits": 4}
GPUS = {"trt-fp8": (89,)}
Dialects = Callable[..., ir.Model]


@pytest.fixture(scope="module")
def dialects(tmp_path_factory: pytest.TempPathFactory) -> Dialects:
    """Random models quantised on two images and traced, each once: a name in MODELS and changes of the recipe."""
    folder = tmp_path_factory.mktemp("images")

    @functools.cache
    def make(name: str, changes: str) -> ir.Model:
        architecture, arguments = MODELS[name]
        spec = ModelSpec(architecture, arguments, 10)
        torch.manual_seed(0)
        model = spec.build()
        size = input_size(model)
        images = np.random.default_rng(0).integers(0, 256, (2, size[1] // 2, size[2] // 2, 3), dtype=np.uint8)
        np.savez(folder / "images.npz", images=images.repeat(2, 1).repeat(2, 2), labels=np.zeros(2, np.int64))
        preprocessing = Preprocessing(size, "bicubic", 1.0, "center", (0.5,) * 3, (0.5,) * 3)
        data = open_images(folder / "images.npz", "test", preprocessing)
        stages = {"stage1": {"enabled": False}, "stage2": {"images": 2, "range": "minmax", "rounding": "nearest"}}
        calibration = {"images": 2, "matmul_range": "minmax"}
        recipe = Recipe.from_dict({**json.loads(changes), "calibration": calibration, **stages})
        convert(model, recipe)
        calibrate(model, data, recipe)
        stage2.quantize_weights(model, data, recipe)
        return trace(Checkpoint(model, spec, preprocessing, None, recipe, {}))

    return lambda name, **changes: make(name, json.dumps(changes))


@pytest.fixture(scope="module")
def backend() -> Backend:
    try:
        return find_builder()
    except MissingError as error:
        pytest.skip(str(error))


def build(backend: Backend, folder: Path, dialect: ir.Model, target: Target) -> tuple[EngineReport, Promise]:
    model = lower(dialect, target, {})
    ir.save(model, folder / "model.onnx")
    report = build_engine(
        folder / "model.onnx",
        folder / "model.plan",
        batch=(1, 4, 8),
        compute_capabilities=GPUS.get(target.name, (86,)) if backend.name == "TensorRT-RTX" else (),
        backend=backend,
    )
    return report, promise(model, target, linear_nodes(dialect))


@pytest.mark.trt
@pytest.mark.parametrize("name", ["ViT-S", "DeiT-T", "Swin-T", "DINOv2-S"])
@pytest.mark.parametrize(
    ("target", "precision"), [("trt-int8", "INT8"), ("trt-int4", "INT8"), ("trt-fp8", "FP8"), ("fp16", "FP16")]
)
def test_all_linears_and_attentions_run_as_promised(
    backend: Backend, tmp_path: Path, dialects: Dialects, name: str, target: str, precision: str
) -> None:
    dialect = dialects(name, **FULL, **(FITS_FP8 if precision == "FP8" else {}))
    report, promised = build(backend, tmp_path, dialect, TARGETS[target]())
    table = check_precision(report, promised)
    linears = {row.name: row.found for row in table.of("linear")}
    edges = [name for name in linears if name.startswith(("patch_embed", "head"))]
    assert linears.keys() == set(linear_nodes(dialect))
    assert len(edges) == 2
    assert {linears.pop(edge) for edge in edges} == {"INT8" if precision == "FP8" else precision}
    assert set(linears.values()) == {precision}
    attentions = table.of("attention")
    assert len(attentions) == (3 if name == "Swin-T" else 2)
    assert {row.found for row in attentions} == {f"{precision} fused"}
    storage = {row.storage for row in table.of("linear")}
    assert storage == (
        {"INT4", "INT8"} if target == "trt-int4" else {precision, "INT8"} if precision == "FP8" else {precision}
    )
    if target == "trt-int8" and name != "Swin-T":  # q, k and v became one kernel
        q = next(row for row in table.rows if row.name == "blocks.0.attn.q")
        assert {"blocks.0.attn.k", "blocks.0.attn.v"} <= set(q.merged)


@pytest.mark.trt
@pytest.mark.parametrize("name", ["ViT-S", "Swin-T"])
def test_eight_bits(backend: Backend, tmp_path: Path, dialects: Dialects, name: str) -> None:
    dialect = dialects(name, **EIGHT)
    table = check_precision(*build(backend, tmp_path, dialect, TARGETS["trt-int8"]()))
    assert {row.found for row in table.of("linear")} == {"INT8"}
    assert {row.found for row in table.of("attention")} == {"INT8 fused"}  # although the softmax scale is a learned one
    with pytest.raises(BuildError, match="no linear of this checkpoint has codes that fit FP8"):
        target = TARGETS["trt-fp8"]()
        promise(lower(dialect, target, {}), target, linear_nodes(dialect))


@pytest.mark.trt
@pytest.mark.parametrize("changes", [{"softmax_bits": 7, **FITS_FP8}, FULL], ids=["softmax", "operands"])
def test_fp8_linears_around_an_int8_attention(
    backend: Backend, tmp_path: Path, dialects: Dialects, changes: dict[str, Any]
) -> None:
    """Probabilities of 7 bits do not fit FP8, nor do queries of 8: the attention runs in INT8."""
    report, promised = build(backend, tmp_path, dialects("ViT-S", **changes), TARGETS["trt-fp8"]())
    table = check_precision(report, promised)
    assert {row.found for row in table.of("linear")} == {"FP8", "INT8"}
    assert {row.found for row in table.of("attention")} == {"INT8 fused"}


@pytest.mark.trt
@pytest.mark.parametrize(
    ("name", "target", "changes", "reason"),
    [
        ("DeiT-T", "trt-int8", LEARNED, "Clip stands between softmax and its quantiser"),
        ("DeiT-T", "trt-fp8", {**LEARNED, **FITS_FP8}, "Clip stands between softmax and its quantiser"),
        ("DeiT-T", "trt-int8", {}, None),
        ("DeiT-T", "fp32", {}, "not in FP32"),
        ("heads of 48", "trt-int8", FULL, "heads of 48; INT8 has kernels for 16, 32, 64"),
        ("577 tokens", "trt-int8", FULL, "577 tokens; INT8 has kernels for 2 to 512"),
        ("heads of 48", "trt-fp8", {**FULL, **FITS_FP8}, None),
        ("577 tokens", "trt-fp8", {**FULL, **FITS_FP8}, None),
        ("577 tokens", "trt-fp8", FULL, "577 tokens; INT8 has kernels for 2 to 512"),
        ("577 tokens", "fp16", FULL, None),
    ],
)
def test_attention_that_cannot_be_fused_is_listed_with_the_reason(
    backend: Backend,
    tmp_path: Path,
    dialects: Dialects,
    name: str,
    target: str,
    changes: dict[str, Any],
    reason: str | None,
) -> None:
    report, promised = build(backend, tmp_path, dialects(name, **changes), TARGETS[target]())
    table = check_precision(report, promised)
    for row in table.of("attention"):
        assert row.found.endswith(" fused") if reason is None else row.found == "unfused", row
        assert reason is None or reason in row.note
    if reason is not None:
        assert f"blocks.0.attn: {table.of('attention')[0].note}" in str(table)
        # Its products are looked up one by one instead.
        precision = "FP32" if target == "fp32" else "FP8" if changes.items() >= FITS_FP8.items() else "INT8"
        assert {row.found for row in table.of("product")} == {precision}


@pytest.mark.trt
def test_attention_that_is_not_fused_though_promised_is_an_error(
    backend: Backend, tmp_path: Path, dialects: Dialects
) -> None:
    class Plain(TensorRTInt8):
        passes = ()

    dialect = dialects("DeiT-T", **FULL)
    report, without = build(backend, tmp_path, dialect, Plain())
    target = TensorRTInt8()
    promised = promise(lower(dialect, target, {}), target, linear_nodes(dialect))
    with pytest.raises(PrecisionError) as raised:
        check_precision(report, promised)
    text = str(raised.value)
    assert "not all attentions run at INT8 fused: 2 of 2 at unfused. First: blocks.0.attn is unfused" in text
    assert "look at what stands between its products" in text
    assert raised.value.exit_code == 5
    assert all(row.note for row in check_precision(report, without).of("attention"))


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("target", ["trt-int8", "trt-fp8"])
def test_lowering_keeps_every_code(dialects: Dialects, name: str, target: str) -> None:
    """The same passes in FP32: whatever is multiplied is what the reference multiplies, bit by bit."""
    changes: dict[str, Any] = {"DeiT-T": LEARNED, "Swin-T": {}}.get(name, FULL)
    dialect = dialects(name, **changes, **(FITS_FP8 if target == "trt-fp8" else {}))
    reference, lowered = (
        ir.to_proto(lower(dialect, TARGETS[target](ir.DataType.FLOAT), {})) for target in ("int4", target)
    )
    size = dialect.graph.inputs[0].shape
    assert size is not None
    images = 2 * torch.randn(1, *[int(dim) for dim in size[1:]], generator=torch.Generator().manual_seed(0))  # type: ignore[arg-type]
    expected, found = multiplied(reference, images), multiplied(lowered, images)
    assert expected.keys() == found.keys()
    for operand, value in expected.items():
        assert np.array_equal(value, found[operand]), operand
    assert np.array_equal(run(reference, images), run(lowered, images))


def test_linear_that_is_lost_or_left_in_floating_point_is_a_defect(dialects: Dialects) -> None:
    dialect = dialects("heads of 48", **FULL)
    target = TensorRTInt8()
    model = lower(dialect, target, {})
    with pytest.raises(BuildError, match=r"does not multiply blocks\.7\.lost in integers"):
        promise(model, target, [*linear_nodes(dialect), "blocks.7.lost"])
    floats = lower(dialect, TARGETS["fp16"](), {})
    with pytest.raises(BuildError, match=r"does not multiply patch_embed\.proj\.linear in integers"):
        promise(floats, target, linear_nodes(dialect))


def layer(name: str, *nodes: str, dtype: str = "INT8", kind: str = "gemm") -> EngineLayer:
    tensor = EngineTensor("x", dtype, (-1, 8, 8))
    return EngineLayer(name, kind, (tensor, tensor), (), (tensor,), nodes)


def report_of(*layers: EngineLayer) -> EngineReport:
    return EngineReport("TensorRT-RTX", "1.7", 1.0, 1, "", "", (1, 1, 1), (), layers)


QKV = tuple(Multiplication(name, "linear", "INT4", "INT8", "INT8") for name in ("q", "k"))
PRODUCTS = tuple(Multiplication(name, "product", "INT8", "INT8", "INT8") for name in ("a.qk", "a.pv"))
MHA = layer("_gemm_mha_v2_myl0_3", "a.qk", "a.pv", "softmax", kind="kgen")


def test_table() -> None:
    promised = Promise((*QKV, *PRODUCTS), (Attention("a", ("a.qk", "a.pv"), "INT8"),))
    table = check_precision(report_of(layer("q+k_myl0_2", "q", "k"), MHA), promised)
    assert table.summary() == "linears: 2 INT8; products: 2 INT8 fused; attentions: 1 INT8 fused"
    content = json.loads(json.dumps(table.to_dict()))
    assert content["rows"][0] == {
        "name": "q", "kind": "linear", "storage": "INT4", "carrier": "INT8", "promised": "INT8", "found": "INT8",
        "layers": ["q+k_myl0_2"], "merged": ["k"], "note": "", "kept": True,
    }  # fmt: skip
    assert str(table).splitlines()[-1].split() == [
        "a",
        "attention",
        "INT8",
        "INT8",
        "INT8",
        "fused",
        "INT8",
        "fused",
        MHA.name,
    ]


def test_nothing_is_skipped() -> None:
    promised = Promise((*QKV, *PRODUCTS), (Attention("a", ("a.qk", "a.pv"), "INT8"),))
    gemm = layer("q+k_myl0_2", "q", "k")
    with pytest.raises(PrecisionError, match=r"not all products run at INT8: 2 of 2 at missing\. First: a\.qk"):
        check_precision(report_of(gemm), promised)
    with pytest.raises(PrecisionError, match=r"not all linears run at INT8: 2 of 2 at missing\. First: q is missing"):
        check_precision(report_of(MHA), promised)
    halves = [layer(f"{name}_myl0_4", name) for name in ("a.qk", "a.pv")]
    with pytest.raises(PrecisionError, match=r"not all attentions run at INT8 fused: 1 of 1 at unfused\. First: a"):
        check_precision(report_of(gemm, *halves), promised)
    wide = dataclasses.replace(MHA, inputs=layer("", dtype="FP16").inputs)
    with pytest.raises(PrecisionError, match=r"First: a is FP16 fused"):
        check_precision(report_of(gemm, wide), promised)
    with pytest.raises(PrecisionError, match="a check of nothing"):
        check_precision(report_of(gemm), Promise(()))
    unfused = dataclasses.replace(promised, attentions=(Attention("a", ("a.qk", "a.pv"), "INT8", "too long"),))
    assert check_precision(report_of(gemm, *halves), unfused).of("attention")[0].note == "too long"
    assert precision_table(report_of(gemm), unfused).of("attention")[0].found == "missing"
