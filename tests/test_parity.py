"""The proof: it passes a faithful graph, and finds each planted fault at the place where it was planted."""

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import timm
import timm.models
import torch
from conftest import fast_recipe, make_arrays
from numpy.typing import NDArray

from gplq.checkpoint import Checkpoint, load_checkpoint
from gplq.data import ImageSet, open_images
from gplq.errors import MissingError
from gplq.evaluate import Accuracy
from gplq.models import FloatModel, load_model
from gplq.pipeline import quantize
from gplq.recipe import Recipe
from gplq_export.lowering import lower
from gplq_export.parity import (
    BLOCK_LIMIT,
    LINEAR_LIMIT,
    AnotherSummationOrder,
    CodeCount,
    ParityReport,
    compare,
)
from gplq_export.runtimes import onnxruntime_optimised, onnxruntime_reference
from gplq_export.targets import Cpu, GraphWriter, Int4, Quantizer
from gplq_export.trace import trace

Array = NDArray[Any]


@pytest.fixture(scope="module")
def images(checkpoint: Checkpoint, npz_file: Path) -> ImageSet:
    return open_images(npz_file, "test", checkpoint.preprocessing)


@pytest.fixture(scope="module")
def clean(checkpoint: Checkpoint, dialect: ir.Model, images: ImageSet) -> ParityReport:
    # 24 + 24 + 16 images: batches that differ in size, and a forced part that ends within the set.
    return compare(checkpoint.model, lower(dialect, Int4(), {}), images, forced_images=30, batch_size=24)


def changed(dialect: ir.Model, changes: dict[str, Callable[[Array], Any]], target: Int4 | None = None) -> ir.Model:
    """The lowered graph with some initialisers changed in place."""
    model = lower(dialect, target or Int4(), {})
    for name, change in changes.items():
        value = model.graph.initializers[name]
        assert value.const_value is not None
        array = value.const_value.numpy().copy()
        change(array)
        assert not np.array_equal(array, value.const_value.numpy())
        value.const_value = ir.Tensor(array, name=name)
    return model


def test_faithful_graph_passes(clean: ParityReport, checkpoint: Checkpoint) -> None:
    assert clean.failures() == []
    assert clean.forced_equal().different == 0
    # By hand, for one image: 17 tokens of 64 channels, 2 heads, an MLP of 256.
    block = 5 * 17 * 64 + 2 * 17 * 17 + 17 * 64 + 17 * 256
    assert clean.free_equal().total == 64 * (16 * 16 + 2 * block + 64)
    assert clean.forced_equal().total == 48 * (16 * 16 + 2 * block + 64)  # two batches of 24 hold 30 images
    assert {name: count.total for name, count in clean.blocks.items()} == {
        "stem": 48 * (16 * 16 + 17 * 64),
        "blocks.0": 48 * (block + 17 * 64),
        "blocks.1": 48 * (block + 64),
        "head": 48 * 64,
    }
    assert all(count.share <= BLOCK_LIMIT for count in clean.blocks.values())
    assert 0 < max(clean.linears.values()) < LINEAR_LIMIT / 10
    assert clean.max_output_difference < 0.05
    assert clean.agreement.n == clean.noise_floor.n == clean.torch_top1.n == 64
    assert clean.agreement.correct >= 62
    assert all(5 < decibels < 60 for decibels in clean.sqnr_db.values())
    assert json.loads(json.dumps(clean.to_dict()))["failures"] == []


@pytest.mark.parametrize(("activations", "softmax"), [(2, 3), (3, 4), (6, 5), (8, 7)])
def test_codes_of_any_width_fit_into_types_that_hold_more(
    float_model: FloatModel, npz_file: Path, tmp_path: Path, activations: int, softmax: int
) -> None:
    bits = {"activation_bits": activations, "softmax_bits": softmax}
    recipe = Recipe.from_dict({**fast_recipe(enabled=False).to_dict(), **bits})
    quantize(float_model, npz_file, tmp_path / "model.pt", recipe, eval_images=1, say=lambda _: None)
    checkpoint = load_checkpoint(tmp_path / "model.pt")
    dialect = trace(checkpoint)
    # Far beyond what was seen in training: every quantiser clamps, and values in front of some are lower than zero.
    images = [4 * torch.randn(8, 1, 16, 16, generator=torch.Generator().manual_seed(0))]
    for target, runtime in ((Int4(), onnxruntime_reference), (Cpu(), onnxruntime_optimised)):
        report = compare(checkpoint.model, lower(dialect, target, {}), images, runtime=runtime)
        assert (report.forced_equal().different, report.failures()) == (0, []), target.name


def test_another_summation_order_is_the_same_network(checkpoint: Checkpoint, probe: torch.Tensor) -> None:
    model = copy.deepcopy(checkpoint.model).double()
    with torch.inference_mode():
        plain = model(probe.double())
        with AnotherSummationOrder():
            other = model(probe.double())
    torch.testing.assert_close(other, plain, rtol=0, atol=1e-9)


def test_another_summation_order_is_another_one(checkpoint: Checkpoint, probe: torch.Tensor) -> None:
    with torch.inference_mode():
        plain = checkpoint.model(probe)
        with AnotherSummationOrder():
            other = checkpoint.model(probe)
        assert torch.equal(checkpoint.model(probe), plain)  # and it is off again
    assert not torch.equal(other, plain)
    assert int((other.argmax(1) != plain.argmax(1)).sum()) <= 1


@pytest.mark.parametrize(
    "name",
    [
        "patch_embed.proj.input_quantizer",
        "blocks.0.attn.pv.a_quantizer",
        "blocks.1.mlp.fc2.input_quantizer",
        "head.input_quantizer",
    ],
)
def test_activation_scale_two_per_cent_off(
    checkpoint: Checkpoint, dialect: ir.Model, images: ImageSet, name: str
) -> None:
    def scale(array: Array) -> None:
        array *= np.float32(1.02)

    report = compare(checkpoint.model, changed(dialect, {f"{name}.scale": scale}), images)
    assert report.failures()[0].startswith(f"quantiser {name}: ")
    assert [key for key, count in report.quantizers.items() if count.different] == [name]


class OneLevelShort(Int4):
    """Clamps one quantiser at 14 or 6 instead of 15 or 7."""

    victim = ""

    def quantizer(self, writer: GraphWriter, quantizer: Quantizer) -> ir.Value:
        if quantizer.name == self.victim:
            highest = (14 if not quantizer.signed else 6) * quantizer.scale
            bounds = [writer.floating(f"fault.{i}", np.asarray(x)) for i, x in enumerate((-1e30, highest))]
            assert quantizer.pre_scale is None  # or the Clip would stand on the wrong side of the multiplication
            clipped = writer.node("Clip", [quantizer.x, *bounds], f"{quantizer.name}/Fault", "fault.clipped")
            quantizer = Quantizer(**{**vars(quantizer), "x": clipped})
        return super().quantizer(writer, quantizer)


class HalfUp(Int4):
    """Rounds one quantiser's halves up instead of to even: floor(x / scale + 1/2)."""

    victim = ""

    def quantizer(self, writer: GraphWriter, quantizer: Quantizer) -> ir.Value:
        if quantizer.name == self.victim:
            scale, half = (
                writer.floating("fault.scale", quantizer.scale),
                writer.floating("fault.half", np.asarray(0.5)),
            )
            x = writer.node("Div", [quantizer.x, scale], f"{quantizer.name}/Fault0", "fault.x0")
            x = writer.node("Add", [x, half], f"{quantizer.name}/Fault1", "fault.x1")
            x = writer.node("Floor", [x], f"{quantizer.name}/Fault2", "fault.x2")
            x = writer.node("Mul", [x, scale], f"{quantizer.name}/Fault3", "fault.x3")
            quantizer = Quantizer(**{**vars(quantizer), "x": x})
        return super().quantizer(writer, quantizer)


@pytest.mark.parametrize("victim", ["blocks.0.attn.pv.a_quantizer", "blocks.1.attn.qk.b_quantizer"])
def test_clamp_one_level_short(checkpoint: Checkpoint, dialect: ir.Model, images: ImageSet, victim: str) -> None:
    fault = OneLevelShort()
    fault.victim = victim
    report = compare(checkpoint.model, lower(dialect, fault, {}), images)
    assert report.failures()[0].startswith(f"quantiser {victim}: ")
    assert [key for key, count in report.quantizers.items() if count.different] == [victim]


def test_rounding_half_up(checkpoint: Checkpoint, dialect: ir.Model, images: ImageSet) -> None:
    """Only exact halves tell the two apart; the pixels of an image have some at a scale that divides their steps."""
    fault, victim = HalfUp(), "patch_embed.proj.input_quantizer"
    fault.victim = victim
    faulty = copy.deepcopy(checkpoint.model)
    scale = torch.tensor(
        1 / 255 / 0.25
    )  # the middle of the pixel values, 127.5, is zero: every pixel is half a code off
    faulty.get_submodule(victim).scale.copy_(scale)
    model = trace(Checkpoint(**{**vars(checkpoint), "model": faulty}))
    assert compare(faulty, lower(model, Int4(), {}), images).failures() == []
    report = compare(faulty, lower(model, fault, {}), images)
    assert report.failures()[0].startswith(f"quantiser {victim}: ")


def flip_one(codes: Array) -> None:
    """The sign of the largest code of the first output channel, [K, N]."""
    row = np.abs(codes[:, 0].astype(np.int64)).argmax()
    codes[row, 0] = np.clip(-codes[row, 0].astype(np.int64), -8, 7)


def swap_two(bias: Array) -> None:
    bias[[0, 1]] = bias[[1, 0]]


WEIGHTS = [
    "patch_embed.proj.linear",
    "blocks.0.attn.q",
    "blocks.0.attn.v",
    "blocks.0.attn.proj.linear",
    "blocks.1.mlp.fc1.linear",
    "blocks.1.mlp.fc2.linear",
    "head.linear",
]


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize(("tensor", "change"), [("codes", flip_one), ("bias", swap_two)])
def test_one_code_or_two_channels_of_a_bias_wrong(
    checkpoint: Checkpoint,
    dialect: ir.Model,
    images: ImageSet,
    name: str,
    tensor: str,
    change: Callable[[Array], None],
) -> None:
    report = compare(checkpoint.model, changed(dialect, {f"{name}.{tensor}": change}), images.head(16))
    assert report.failures()[0].startswith(f"linear {name}: ")
    assert report.forced_equal().different == 0  # it is not the quantisers' fault


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("patch_embed.proj.linear", "stem"),
        ("blocks.0.attn.q", "blocks.0"),
        ("blocks.0.mlp.fc2.linear", "blocks.0"),
        ("blocks.1.attn.proj.linear", "blocks.1"),
        ("blocks.1.mlp.fc2.linear", "blocks.1"),
    ],
)
def test_wrong_weight_fails_its_own_block_only(
    checkpoint: Checkpoint, dialect: ir.Model, images: ImageSet, name: str, block: str
) -> None:
    def negate(codes: Array) -> None:
        codes[...] = np.clip(-codes.astype(np.int64), -8, 7)

    report = compare(checkpoint.model, changed(dialect, {f"{name}.codes": negate}), images)
    assert [key for key, count in report.blocks.items() if count.share > BLOCK_LIMIT] == [block]
    assert any(failure.startswith(f"{block}: ") for failure in report.failures())


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("pos_embed", "stem"),
        ("blocks.0.norm1.weight", "blocks.0"),
        ("blocks.0.norm2.bias", "blocks.0"),
        ("norm.weight", "head"),
    ],
)
def test_wrong_float_tensor_fails_its_block(
    checkpoint: Checkpoint, dialect: ir.Model, images: ImageSet, name: str, block: str
) -> None:
    def reverse(array: Array) -> None:
        array[...] = array[..., ::-1].copy()

    report = compare(checkpoint.model, changed(dialect, {name: reverse}), images)
    assert max(report.blocks, key=lambda key: report.blocks[key].share) == block
    assert any(failure.startswith(f"{block}: ") for failure in report.failures())


def test_query_and_key_exchanged(checkpoint: Checkpoint, dialect: ir.Model, images: ImageSet) -> None:
    model = lower(dialect, Int4(), {})
    for tensor in ("codes", "weight_scale", "bias"):
        q, k = (model.graph.initializers[f"blocks.1.attn.{name}.{tensor}"] for name in "qk")
        q.const_value, k.const_value = k.const_value, q.const_value
    report = compare(checkpoint.model, model, images)
    assert report.failures()[0].startswith("linear blocks.1.attn.q, blocks.1.attn.k: ")
    assert report.failures()[1].startswith("blocks.1: ")


def test_answers_that_are_not_numbers_fail(checkpoint: Checkpoint, dialect: ir.Model, images: ImageSet) -> None:
    def spoil(bias: Array) -> None:
        bias[0] = np.nan

    report = compare(checkpoint.model, changed(dialect, {"head.linear.bias": spoil}), images)
    assert report.failures()[0].startswith("linear head.linear: ")
    assert np.isnan(report.max_output_difference)


def by_hand(**changes: Any) -> ParityReport:
    content: dict[str, Any] = {
        "forced_images": 10,
        "quantizers": {"a": CodeCount(0, 1000), "b": CodeCount(0, 1000)},
        "linears": {"l": 1e-6, "m": 1e-4},
        "blocks": {"blocks.0": CodeCount(0, 1000), "blocks.1": CodeCount(5, 1000)},
        "agreement": Accuracy(90, 100),
        "noise_floor": Accuracy(95, 100),
    }
    return ParityReport(**{**content, **changes})


def test_gates_at_their_limits() -> None:
    assert by_hand().failures() == []
    [failure] = by_hand(quantizers={"a": CodeCount(0, 1000), "b": CodeCount(1, 10**9)}).failures()
    assert failure.startswith("quantiser b: 1 of 1,000,000,000 codes differ")
    [failure] = by_hand(blocks={"blocks.0": CodeCount(0, 1000), "blocks.1": CodeCount(6, 1000)}).failures()
    assert failure.startswith("blocks.1: 0.60 % of its codes differ for the same input (limit 0.5 %, n = 10)")
    [failure] = by_hand(linears={"l": 1.01e-4, "m": 0.0}).failures()
    assert failure.startswith("linear l: ")
    # 80 of 100: [71.1, 86.7] %; 90 of 100: [82.6, 94.5] %; 98 of 100: [93.0, 99.5] %.
    assert by_hand(agreement=Accuracy(80, 100), noise_floor=Accuracy(90, 100)).failures() == []
    [failure] = by_hand(agreement=Accuracy(80, 100), noise_floor=Accuracy(98, 100)).failures()
    assert failure.startswith("labels equal: 80.00 %")


def test_code_count() -> None:
    count = CodeCount()
    assert count.share == 0
    count.add(np.array([[1, -8], [7, 0]], np.int8), np.array([[1, -8], [6, 0]], np.int8))
    count.add(np.array([3, 4], np.int8), np.array([4, 3], np.int8))
    assert (count.different, count.total, count.share) == (3, 6, 0.5)


def test_without_onnx_runtime(
    checkpoint: Checkpoint, dialect: ir.Model, images: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = lower(dialect, Int4(), {})
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingError, match=r"pip install 'gplq\[cpu\]'"):
        compare(checkpoint.model, model, images)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_dinov2_in_colour_with_layer_scale(tmp_path: Path, qk_norm: bool) -> None:
    """Quantise, save, load, trace, lower, compare: nothing in the chain is tied to the shape of the tiny ViT."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model: Any = timm.create_model(
            "vit_small_patch14_dinov2",
            num_classes=4,
            img_size=28,
            embed_dim=64,
            depth=2,
            num_heads=2,
            init_values=0.5,
            qk_norm=qk_norm,
        ).eval()
        for parameter in model.parameters():
            parameter.data.add_(torch.randn(parameter.shape) * 0.05)
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": [3, 28, 28], "crop_pct": 1.0}
    arguments = {"img_size": 28, "embed_dim": 64, "depth": 2, "num_heads": 2, "init_values": 0.5, "qk_norm": qk_norm}
    timm.models.save_for_hf(model, tmp_path / "model", model_config={"model_args": arguments}, safe_serialization=True)
    data = {}
    for split, count in (("train", 64), ("test", 32)):
        grey, labels = make_arrays(count, seed=count)
        data[f"{split}_images"] = np.stack([grey, grey[:, ::-1], grey[:, :, ::-1]], axis=-1)
        data[f"{split}_labels"] = labels
    np.savez(tmp_path / "data.npz", **data)
    source = load_model(str(tmp_path / "model"))
    quantize(source, tmp_path / "data.npz", tmp_path / "model.pt", fast_recipe(), say=lambda _: None)
    checkpoint = load_checkpoint(tmp_path / "model.pt")
    assert checkpoint.preprocessing.input_size == (3, 28, 28)
    graph = lower(trace(checkpoint), Int4(), {})
    images = open_images(tmp_path / "data.npz", "test", checkpoint.preprocessing)
    report = compare(checkpoint.model, graph, images)
    assert report.failures() == []
    assert report.forced_equal().total > 0
    assert set(report.blocks) == {"stem", "blocks.0", "blocks.1", "head"}
