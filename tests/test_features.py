"""Models without a classifier: features [B, D], and backbones that return several feature maps."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import timm
import timm.models
import torch
from check_fixture import check_graph, replaced
from conftest import ARCHITECTURE, MODEL_ARGS, Quantised, fast_recipe, make_arrays, make_model, write_model
from numpy.typing import NDArray
from torch import Tensor, nn

from gplq import stage2
from gplq.calibrate import calibrate_on
from gplq.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from gplq.cli import main as gplq_main
from gplq.convert import convert, structure_of
from gplq.errors import CheckpointError, ConfigError, ModelError
from gplq.evaluate import Similarity, cosines
from gplq.models import ModelSpec, load_model
from gplq.pipeline import quantize
from gplq.preprocessing import Preprocessing
from gplq.survey import input_size
from gplq_export.check.report import read_report
from gplq_export.cli import main as export_main
from gplq_export.lowering import lower
from gplq_export.runtimes import reference_session
from gplq_export.targets import TARGETS
from gplq_export.trace import trace

Array = NDArray[Any]
SWIN = {"img_size": (32, 48), "window_size": 4, "patch_size": 4, "embed_dim": 32, "depths": (1, 1), "num_heads": (1, 2)}
BACKBONE = {"features_only": True, "out_indices": (0, 1)}
BACKBONES = {
    "list": ModelSpec("swin_tiny_patch4_window7_224", {**SWIN, **BACKBONE}, 0),
    "getter": ModelSpec("swin_tiny_patch4_window7_224", {**SWIN, **BACKBONE, "feature_cls": "getter"}, 0),
    "vit": ModelSpec(ARCHITECTURE, {**MODEL_ARGS, **BACKBONE, "depth": 3}, 0),
}
# By hand: 32 x 48 pixels in patches of 4; the second stage halves them and doubles the channels. The ViT keeps 2 of 3
# blocks.
SHAPES = {
    "list": [(8, 12, 32), (4, 6, 64)],
    "getter": [(32, 8, 12), (64, 4, 6)],
    "vit": [(64, 4, 4), (64, 4, 4)],
}
each_backbone = pytest.mark.parametrize("kind", BACKBONES)


# Features [B, D]


@pytest.fixture(scope="module")
def bare_npz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images without labels."""
    path = tmp_path_factory.mktemp("bare") / "bare.npz"
    np.savez(path, train_images=make_arrays(64, seed=1)[0], test_images=make_arrays(32, seed=2)[0])
    return path


@pytest.fixture(scope="module")
def features(bare_npz: Path, model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the tiny ViT without its classifier, made by the command line."""
    folder = tmp_path_factory.mktemp("features")
    recipe = folder / "recipe.yaml"
    recipe.write_text(fast_recipe(task_weight=0.0).to_yaml())
    arguments = [model_folder, "--data", bare_npz, "--recipe", recipe, "--out", folder / "model.pt"]
    assert gplq_main(["quantize", *map(str, arguments), "--num-classes", "0"]) == 0
    return folder / "model.pt"


def test_features_without_labels_from_command_to_report(
    features: Path, bare_npz: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = load_checkpoint(features)
    assert (checkpoint.spec.num_classes, checkpoint.label_names) == (0, None)
    stored = checkpoint.provenance["similarity"]
    assert list(stored) == ["W32A4", "W4A4"]
    assert all(entry["n"] == 32 and 0.8 < entry["cosine"] < 1 for entry in stored.values())

    out = tmp_path / "dist"
    assert export_main([str(features), "--int4", "--data", str(bare_npz), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "cosine p01 0.9" in said or "cosine p01 1.0" in said
    assert "top-1" not in said and "same label" not in said
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["outputs"] == [{"name": "features", "shape": ["batch", 64], "dtype": "float32"}]
    report = read_report(out / "reports" / "parity.json")
    assert report.failed == []
    pair = report.pair("int4")
    assert pair is not None and pair.found is not None and pair.forced is not None
    assert (pair.reference_top, pair.candidate_top, pair.flips) == (None, None, [])
    assert (pair.found.n, pair.found.agreement, pair.found.kl) == (32, None, None)
    assert float(pair.forced.outputs["features"]) < 1e-5


def test_features_of_the_file_are_those_of_the_model(features: Path, probe: Tensor) -> None:
    """Both against the float model, an independent one: timm's own, without its classifier."""
    checkpoint = load_checkpoint(features)
    float_model: Any = make_model()
    float_model.reset_classifier(0)
    session = reference_session(ir.to_proto(lower(trace(checkpoint), TARGETS["int4"](), {})).SerializeToString())
    [found] = session.run(["features"], {"images": probe.numpy()})
    with torch.no_grad():
        expected, quantised = float_model(probe), checkpoint.model(probe)
    assert found.shape == (16, 64)
    assert float(cosines(torch.from_numpy(found), quantised).min()) > 0.99
    assert float(cosines(torch.from_numpy(found), expected).min()) > 0.8


def test_features_have_no_accuracy(features: Path, npz_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gplq_main(["eval", str(features), "--data", str(npz_file)]) == 2
    assert "has no classifier, and so no accuracy" in capsys.readouterr().err


def test_labels_for_a_model_without_a_classifier_are_refused(
    model_folder: Path, npz_file: Path, tmp_path: Path
) -> None:
    source = load_model(str(model_folder), num_classes=0)
    with pytest.raises(ConfigError, match=r"no classifier that could learn from labels: set stage1\.task_weight to 0"):
        quantize(source, npz_file, tmp_path / "model.pt", fast_recipe(), say=lambda _: None)


def test_classifier_is_exported_without_labels(quantised: Quantised, bare_npz: Path, tmp_path: Path) -> None:
    arguments = [str(quantised.path), "--int4", "--data", str(bare_npz), "--out", str(tmp_path / "dist")]
    assert export_main(arguments) == 2
    assert export_main([*arguments, "--no-labels"]) == 0
    pair = read_report(tmp_path / "dist" / "reports" / "parity.json").pair("int4")
    assert pair is not None and pair.found is not None and pair.found.agreement is not None
    assert (pair.found.agreement.n, pair.candidate_top) == (32, None)


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_classifier_is_left_away(kind: str, model_folder: Path, probe: Tensor) -> None:
    file = str(model_folder / "model.safetensors")
    if kind == "folder":
        source = load_model(str(model_folder), num_classes=0)
    else:
        source = load_model(file, arch=ARCHITECTURE, model_args=dict(MODEL_ARGS), num_classes=0)
    expected = make_model()
    with torch.no_grad():
        assert torch.equal(
            source.model(probe), expected.forward_head(expected.forward_features(probe), pre_logits=True)
        )  # type: ignore[operator]
    assert (source.spec.num_classes, source.label_names) == (0, None)


def test_other_numbers_of_classes_belong_to_a_file(model_folder: Path) -> None:
    with pytest.raises(ModelError, match="belong to a weights file"):
        load_model(str(model_folder), num_classes=4)


def test_pretrained_name_without_its_classifier(monkeypatch: pytest.MonkeyPatch) -> None:
    create: Callable[..., nn.Module] = timm.create_model
    asked: list[dict[str, Any]] = []

    def offline(name: str, pretrained: bool = False, **arguments: Any) -> nn.Module:
        asked.append({"pretrained": pretrained, **arguments})
        return create(name, **arguments)

    monkeypatch.setattr(timm, "create_model", offline)
    source = load_model("test_vit.r160_in1k", num_classes=0)
    assert {"pretrained": True, "num_classes": 0} in asked
    assert source.spec == ModelSpec("test_vit", {}, 0)
    backbone = load_model("test_vit.r160_in1k", model_args={"features_only": True, "out_indices": (0, 1)})
    assert backbone.spec.num_classes == 0
    assert isinstance(backbone.model(torch.zeros(1, *backbone.preprocessing.input_size)), list)


# Backbones


def random_backbone(kind: str) -> tuple[ModelSpec, nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    spec = BACKBONES[kind]
    model = spec.build()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn(parameter.shape) * 0.05)
    channels, height, width = input_size(model)
    coarse = torch.randn(5, 4, channels, height // 4, width // 4)
    return spec, model, [images.repeat_interleave(4, 2).repeat_interleave(4, 3) for images in coarse]


@pytest.fixture(scope="module")
def backbones() -> Callable[[str], tuple[Checkpoint, list[Tensor]]]:
    """Frozen backbones with the batches that they were calibrated on; each is made once."""
    made: dict[str, tuple[Checkpoint, list[Tensor]]] = {}

    def make(kind: str) -> tuple[Checkpoint, list[Tensor]]:
        if kind not in made:
            spec, model, images = random_backbone(kind)
            recipe = fast_recipe()
            convert(model, recipe)
            calibrate_on(model, model, images, len(images), recipe)
            stage2.quantize_weights(model, images, recipe)
            size = structure_of(model).image_size
            mean = (0.5,) * size[0]
            made[kind] = (
                Checkpoint(model, spec, Preprocessing(size, "bicubic", 1.0, "center", mean, mean), None, recipe, {}),
                images,
            )
        return made[kind]

    return make


Backbones = Callable[[str], tuple[Checkpoint, list[Tensor]]]


@each_backbone
def test_backbone_goes_to_onnx_and_back(kind: str, backbones: Backbones, tmp_path: Path) -> None:
    checkpoint, images = backbones(kind)
    save_checkpoint(checkpoint, tmp_path / "model.pt")
    loaded = load_checkpoint(tmp_path / "model.pt")
    with torch.no_grad():
        expected = checkpoint.model(images[0])
        assert all(map(torch.equal, loaded.model(images[0]), expected))
    assert [tuple(x.shape[1:]) for x in expected] == SHAPES[kind]

    dialect = trace(loaded)
    for target in ("int4", "fp16", "trt-int4"):
        lowered = lower(dialect, TARGETS[target](), {})
        assert [value.name for value in lowered.graph.outputs] == ["features_0", "features_1"]
        # What is marked has the name that it has in the file, also where it is an output.
        names = {value.name for node in lowered.graph for value in node.outputs}
        assert set(json.loads(lowered.metadata_props["gplq.marks"]).values()) <= names
    lowered = lower(dialect, TARGETS["int4"](), {})
    session = reference_session(ir.to_proto(lowered).SerializeToString())
    found = session.run(None, {"images": images[0].numpy()})
    assert [x.shape[1:] for x in found] == SHAPES[kind]
    assert all(
        float(cosines(torch.from_numpy(ours), theirs).min()) > 0.99
        for ours, theirs in zip(found, expected, strict=True)
    )
    report = check_graph(loaded, lowered, images, tmp_path)
    assert report.failed == []
    pair = report.pair("int4")
    assert pair is not None and pair.found is not None and pair.forced is not None
    assert sum(layer.different for layer in pair.forced.quantizers) == 0
    assert (pair.found.n, pair.found.agreement) == (20, None)
    assert pair.forced.outputs.keys() == {"features_0", "features_1"}


@each_backbone
def test_weights_of_the_whole_network_fit_its_backbone(kind: str, tmp_path: Path) -> None:
    spec = BACKBONES[kind]
    arguments = {key: value for key, value in spec.model_args.items() if key in {**SWIN, **MODEL_ARGS}}
    torch.manual_seed(1)
    whole: Any = timm.create_model(spec.architecture, num_classes=4, **arguments).eval()
    torch.save(whole.state_dict(), tmp_path / "weights.pt")
    source = load_model(str(tmp_path / "weights.pt"), arch=spec.architecture, model_args=spec.model_args)
    assert source.spec == spec
    x = torch.randn(2, *source.preprocessing.input_size)
    with torch.no_grad():
        expected = whole.forward_intermediates(x, indices=(0, 1), intermediates_only=True)
        if kind == "list":  # these are NHWC, as a Swin computes
            expected = [maps.permute(0, 2, 3, 1) for maps in expected]
        torch.testing.assert_close(source.model(x), expected)


def test_float_tensor_behind_the_last_quantiser_is_seen(features: Path, tmp_path: Path, probe: Tensor) -> None:
    """Without a classifier no quantiser stands behind the last norm."""
    checkpoint = load_checkpoint(features)
    model = lower(trace(checkpoint), TARGETS["int4"](), {})

    def reverse(bias: Array) -> None:
        bias[:] = bias[::-1].copy()

    def spoil(bias: Array) -> None:
        bias[:] = np.nan

    for change in (reverse, spoil):
        report = check_graph(checkpoint, replaced(model, "norm.bias", change), [probe], tmp_path)
        pair = report.pair("int4")
        assert pair is not None and pair.forced is not None
        assert all(layer.different == 0 for layer in (*pair.forced.quantizers, *pair.forced.blocks))
        forced = [gate.id for gate in report.failed if ".forced." in gate.id]
        assert forced == ["int4.forced.outputs", "int4-optimised.forced.outputs"]
        assert report.failed[0].layer == "features"
    assert np.isnan(pair.forced.outputs["features"])


def test_cosines_and_their_interval() -> None:
    a = [torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.tensor([[[2.0, 0.0]], [[0.0, 3.0]]])]
    b = [torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[[0.0, 5.0]], [[0.0, 1.0]]])]
    torch.testing.assert_close(cosines(a, b), torch.tensor([0.5, (0.5**0.5 + 1) / 2], dtype=torch.float64))
    found = Similarity.of(4, sum([0.2, 0.4, 0.6, 0.8]), sum(x * x for x in (0.2, 0.4, 0.6, 0.8)))
    assert found.n == 4
    assert found.mean == pytest.approx(0.5)
    assert found.deviation == pytest.approx(np.std([0.2, 0.4, 0.6, 0.8]))


def test_mimicry_of_feature_maps_is_refused(npz_file: Path, tmp_path: Path) -> None:
    source = load_model(str(write_model(tmp_path / "model")), model_args={**MODEL_ARGS, **BACKBONE})
    recipe = fast_recipe(task_weight=0.0)
    with pytest.raises(ModelError, match=r"give gplq\.train_activations a loss of your own"):
        quantize(source, npz_file, tmp_path / "model.pt", recipe, say=lambda _: None)
    results = quantize(source, npz_file, tmp_path / "model.pt", fast_recipe(enabled=False), say=lambda _: None)
    assert all(isinstance(result, Similarity) and 0.8 < result.mean < 1 for result in results.values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"checkpoint_path": "/x.pth"}, "checkpoint_path"),
        ({"embed_dim": 12_000, "num_heads": 2, "depth": 12, "out_indices": (0,)}, "as a whole|parameters"),
        ({"depth": 10**9}, "depth"),
        ({"out_indices": (0, 7)}, "cannot build"),
    ],
)
def test_altered_backbone_is_refused(
    changes: dict[str, Any], message: str, backbones: Backbones, tmp_path: Path
) -> None:
    checkpoint, _ = backbones("vit")
    save_checkpoint(checkpoint, tmp_path / "model.pt")
    content = torch.load(tmp_path / "model.pt", weights_only=True)
    content["model"]["model_args"].update(changes)
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path / "model.pt")


def test_backbone_that_is_huge_before_it_is_cut_is_refused(backbones: Backbones, tmp_path: Path) -> None:
    """Only the first block is kept, and fits the file; the others would fill the memory while it is built."""
    spec = ModelSpec(ARCHITECTURE, {**MODEL_ARGS, "features_only": True, "out_indices": (0,), "embed_dim": 2048}, 0)
    with torch.device("meta"):
        kept = sum(parameter.numel() for parameter in spec.build().parameters())
    checkpoint, _ = backbones("vit")
    save_checkpoint(checkpoint, tmp_path / "model.pt")
    content = torch.load(tmp_path / "model.pt", weights_only=True)
    content["model"]["model_args"] = {**spec.model_args, "depth": 40}
    content["linears"] = {}
    content["floats"] = {"x": torch.zeros(kept)}
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="parameters as a whole"):
        load_checkpoint(tmp_path / "model.pt")
