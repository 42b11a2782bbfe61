"""Teacher-forced: a faithful graph passes, and each planted fault is found at the place where it was planted."""

import copy
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
from check_fixture import Array, check_graph, failed, feed, judged, replaced, smooth_noise
from conftest import fast_recipe, make_arrays

from gplq.checkpoint import Checkpoint, frozen_quantizers, integer_linears, load_checkpoint
from gplq.data import ImageSet, open_images
from gplq.errors import MissingError
from gplq.models import FloatModel, load_model
from gplq.pipeline import quantize
from gplq.recipe import Recipe
from gplq_export.check.report import Forced
from gplq_export.lowering import lower
from gplq_export.runtimes import onnxruntime_optimised, onnxruntime_reference
from gplq_export.targets import Cpu, GraphWriter, Int4, Quantizer, Target
from gplq_export.trace import trace


@pytest.fixture(scope="module")
def images(checkpoint: Checkpoint, npz_file: Path) -> ImageSet:
    return open_images(npz_file, "test", checkpoint.preprocessing)


@pytest.fixture(scope="module")
def clean(checkpoint: Checkpoint, dialect: ir.Model, images: ImageSet) -> Forced:
    return feed(checkpoint.model, lower(dialect, Int4(), {}), images, batch_size=24)  # 24 + 24 + 16


def changed(dialect: ir.Model, name: str, change: Callable[[Array], Any], target: Target | None = None) -> ir.Model:
    """The lowered graph with one initialiser changed."""
    return replaced(lower(dialect, target or Int4(), {}), name, change)


def different(forced: Forced) -> list[str]:
    """Quantisers of which codes differ."""
    return [layer.name for layer in forced.quantizers if layer.different]


def test_faithful_graph_passes(clean: Forced, checkpoint: Checkpoint) -> None:
    assert failed(clean) == []
    assert list(judged(clean)) == ["codes", "grid", "linears", "floats", "outputs", "blocks"]
    assert clean.images == 64
    # By hand, for one image: 17 tokens of 64 channels, 2 heads, an MLP of 256.
    block = 5 * 17 * 64 + 2 * 17 * 17 + 17 * 64 + 17 * 256
    assert sum(layer.total for layer in clean.quantizers) == 64 * (16 * 16 + 2 * block + 64)
    assert {layer.name: layer.total for layer in clean.blocks} == {
        "stem": 64 * (16 * 16 + 17 * 64),
        "blocks.0": 64 * (block + 17 * 64),
        "blocks.1": 64 * (block + 64),
        "head": 64 * 64,
    }
    assert all(layer.inside and layer.kind == "block" for layer in clean.blocks)
    # Nothing is left out: what is not compared is NaN, and fails.
    quantizers, linears = frozen_quantizers(checkpoint.model), integer_linears(checkpoint.model)
    assert {layer.name for layer in clean.quantizers} == clean.grid.keys() == quantizers.keys()
    assert clean.linears.keys() == linears.keys()
    assert clean.floats.keys() == quantizers.keys()
    assert clean.outputs.keys() == {"logits"}
    assert 0 < max(clean.linears.values()) < 1e-5
    assert 0 < max(clean.floats.values()) < 2e-5
    assert 0 < clean.outputs["logits"] < 1e-5


@pytest.mark.parametrize(
    ("activations", "products", "softmax"), [(2, 3, 3), (3, 8, 4), (6, 6, 5), (8, 8, 7), (4, 16, 7)]
)
def test_codes_of_any_width_fit_into_types_that_hold_more(
    float_model: FloatModel, npz_file: Path, tmp_path: Path, activations: int, products: int, softmax: int
) -> None:
    bits = {"activation_bits": activations, "matmul_bits": products, "softmax_bits": softmax}
    recipe = Recipe.from_dict({**fast_recipe(enabled=False).to_dict(), **bits})
    quantize(float_model, npz_file, tmp_path / "model.pt", recipe, eval_images=1, say=lambda _: None)
    checkpoint = load_checkpoint(tmp_path / "model.pt")
    dialect = trace(checkpoint)
    # Far beyond what was seen in training: every quantiser clamps, and values in front of some are lower than zero.
    far = [4 * smooth_noise(8)]
    for target in (Int4(), Cpu()):
        report = check_graph(checkpoint, lower(dialect, target, {}), far, tmp_path)
        assert report.failed == []
        pair = report.pair(target.name)
        assert pair is not None and pair.forced is not None
        assert different(pair.forced) == []


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

    forced = feed(checkpoint.model, changed(dialect, f"{name}.scale", scale), images)
    assert failed(forced)[:2] == [("codes", name), ("grid", name)]
    assert different(forced) == [name]
    assert [key for key, count in forced.grid.items() if count] == [name]


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
            assert quantizer.pre_scale is None
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
    forced = feed(checkpoint.model, lower(dialect, fault, {}), images)
    assert failed(forced)[0] == ("codes", victim)
    assert different(forced) == [victim]


@pytest.mark.parametrize("fault", [OneLevelShort(), HalfUp()], ids=lambda fault: type(fault).__name__)
def test_what_no_image_reaches_is_found_on_the_grid(
    checkpoint: Checkpoint, dialect: ir.Model, images: ImageSet, fault: Any
) -> None:
    """Images that are nearly grey reach no limit, and an exact half of an activation never comes by chance."""
    fault.victim = "blocks.1.attn.qk.a_quantizer"
    pale = [1e-3 * smooth_noise(4)] if isinstance(fault, OneLevelShort) else images
    forced = feed(checkpoint.model, lower(dialect, fault, {}), pale)
    if isinstance(fault, HalfUp):
        assert different(forced) == []
    assert ("grid", fault.victim) in failed(forced)
    assert [key for key, count in forced.grid.items() if count] == [fault.victim]


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
    assert failed(feed(faulty, lower(model, Int4(), {}), images)) == []
    assert failed(feed(faulty, lower(model, fault, {}), images))[:2] == [("codes", victim), ("grid", victim)]


def flip_one(codes: Array) -> None:
    """The sign of the largest code of the first output channel, [K, N]."""
    row = np.abs(codes[:, 0].astype(np.int64)).argmax()
    codes[row, 0] = np.clip(-codes[row, 0].astype(np.int64), -8, 7)


def swap_two(bias: Array) -> None:
    bias[[0, 1]] = bias[[1, 0]]


def scale_one(scales: Array) -> None:
    scales[3] *= np.float32(1.001)


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
@pytest.mark.parametrize(("tensor", "change"), [("codes", flip_one), ("bias", swap_two), ("weight_scale", scale_one)])
def test_one_code_or_two_channels_of_a_bias_or_a_scale_wrong(
    checkpoint: Checkpoint,
    dialect: ir.Model,
    images: ImageSet,
    name: str,
    tensor: str,
    change: Callable[[Array], None],
) -> None:
    forced = feed(checkpoint.model, changed(dialect, f"{name}.{tensor}", change), images.head(16))
    assert failed(forced)[0] == ("linears", name)  # and it is not the quantisers' fault
    assert [key for key, difference in forced.linears.items() if difference > 1e-4] == [name]


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

    forced = feed(checkpoint.model, changed(dialect, f"{name}.codes", negate), images)
    assert [layer.name for layer in forced.blocks if not layer.inside] == [block]
    assert ("blocks", block) in failed(forced)


@pytest.mark.parametrize(
    ("name", "reader", "block"),
    [
        ("pos_embed", "blocks.0.attn.input_quantizer", "stem"),
        ("blocks.0.norm1.weight", "blocks.0.attn.input_quantizer", "blocks.0"),
        ("blocks.0.norm2.bias", "blocks.0.mlp.fc1.input_quantizer", "blocks.0"),
        ("norm.weight", "head.input_quantizer", "head"),
    ],
)
def test_wrong_float_tensor_fails_where_it_is_read_first_and_its_block(
    checkpoint: Checkpoint, dialect: ir.Model, images: ImageSet, name: str, reader: str, block: str
) -> None:
    def reverse(array: Array) -> None:
        array[...] = array[..., ::-1].copy()

    forced = feed(checkpoint.model, changed(dialect, name, reverse), images)
    assert failed(forced)[0] == ("floats", reader)
    worst = max(forced.blocks, key=lambda layer: layer.share.value if layer.share else 0)
    assert (worst.name, worst.inside) == (block, False)


def test_query_and_key_exchanged(checkpoint: Checkpoint, dialect: ir.Model, images: ImageSet) -> None:
    model = lower(dialect, Int4(), {})
    for tensor in ("codes", "weight_scale", "bias"):
        q, k = (model.graph.initializers[f"blocks.1.attn.{name}.{tensor}"] for name in "qk")
        q.const_value, k.const_value = k.const_value, q.const_value
    gates = judged(feed(checkpoint.model, model, images))
    assert gates["codes"].status == gates["grid"].status == "passed"
    assert "first: blocks.1.attn.q, blocks.1.attn.k: " in gates["linears"].sentence
    assert (gates["blocks"].status, gates["blocks"].layer) == ("failed", "blocks.1")


def test_answers_that_are_not_numbers_fail(checkpoint: Checkpoint, dialect: ir.Model, images: ImageSet) -> None:
    def spoil(bias: Array) -> None:
        bias[0] = np.nan

    forced = feed(checkpoint.model, changed(dialect, "head.linear.bias", spoil), images)
    assert failed(forced) == [("linears", "head.linear"), ("outputs", "logits")]
    assert np.isnan(forced.linears["head.linear"]) and np.isnan(forced.outputs["logits"])


def test_a_number_that_is_not_one_in_the_first_batch_stays_one(
    checkpoint: Checkpoint, dialect: ir.Model, images: ImageSet
) -> None:
    """A later batch is right: the fault must not be forgotten."""
    spoilt = []

    def runtime(model: bytes) -> Any:
        run = onnxruntime_reference(model)
        first = True

        def spoiling(feeds: dict[str, Array]) -> list[Array]:
            nonlocal first
            answers = run(feeds)
            for index, array in enumerate(answers if first else ()):
                if array.shape[1:] == (4,):  # logits
                    answers[index] = np.full_like(array, np.nan)
                    spoilt.append(index)
            first = False
            return answers

        return spoiling

    forced = feed(checkpoint.model, lower(dialect, Int4(), {}), images, runtime=runtime)
    assert len(spoilt) == 1
    assert failed(forced) == [("linears", "head.linear"), ("outputs", "logits")]
    assert np.isnan(forced.outputs["logits"])


def test_without_onnx_runtime(
    checkpoint: Checkpoint, dialect: ir.Model, images: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = lower(dialect, Int4(), {})
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingError, match=r"pip install 'gplq\[cpu\]'"):
        feed(checkpoint.model, model, images)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_dinov2_in_colour_with_layer_scale(tmp_path: Path, qk_norm: bool) -> None:
    """Quantise, save, load, trace, lower, compare: nothing in the chain is tied to the shape of the tiny ViT."""
    arguments = {"img_size": 28, "embed_dim": 64, "depth": 2, "num_heads": 2, "init_values": 0.5, "qk_norm": qk_norm}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model: Any = timm.create_model("vit_small_patch14_dinov2", num_classes=4, **arguments).eval()
        for parameter in model.parameters():
            parameter.data.add_(torch.randn(parameter.shape) * 0.05)
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": [3, 28, 28], "crop_pct": 1.0}
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
    images = open_images(tmp_path / "data.npz", "test", checkpoint.preprocessing)
    for target in (Int4(), Cpu()):
        report = check_graph(checkpoint, lower(trace(checkpoint), target, {}), images, tmp_path)
        assert report.failed == []
        pair = report.pair(target.name)
        assert pair is not None and pair.forced is not None and pair.candidate_top is not None
        assert {layer.name for layer in pair.forced.blocks} == {"stem", "blocks.0", "blocks.1", "head"}


def test_optimised_file_is_fed_as_it_runs(checkpoint: Checkpoint, dialect: ir.Model, images: ImageSet) -> None:
    forced = feed(checkpoint.model, lower(dialect, Cpu(), {}), images.head(16), runtime=onnxruntime_optimised)
    assert failed(forced) == []
    assert sum(forced.grid.values()) == 0
