"""The whole run: what is quantised, what teaches, and when the result is refused."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import fast_recipe
from torch import Tensor, nn

from gplq import pipeline, stage1
from gplq.calibrate import activation_quantizers
from gplq.data import ImageSet
from gplq.errors import GateError
from gplq.evaluate import Accuracy, Agreement, Similarity, agreement
from gplq.models import FloatModel
from gplq.pca import Features
from gplq.pipeline import quantize, too_far
from gplq.recipe import Recipe


def untrained() -> Recipe:
    """The fastest way to a checkpoint, without labels."""
    recipe = fast_recipe(task_weight=0.0, enabled=False).to_dict()
    return Recipe.from_dict({**recipe, "stage2": {"images": 16, "rounding": "nearest"}})


def with_limits(recipe: Recipe, agreement: float, cosine: float) -> Recipe:
    return Recipe.from_dict({**recipe.to_dict(), "limits": {"agreement": agreement, "cosine": cosine}})


@pytest.mark.parametrize(
    ("found", "why"),
    [
        (Agreement(80, 100, 0.8), None),
        (Agreement(75, 100, 0.9), None),  # of so few images as good as 80 %: their interval ends at 82.5
        (Agreement(600, 1000, 0.9), "60.0 % of its labels agree, limit 80.0 % (n = 1000)"),
        (Agreement(990, 1000, 0.7), "cosine of its features 0.7000, limit 0.8 (n = 1000)"),
        (
            Agreement(100, 1000, 0.2),
            "10.0 % of its labels agree, limit 80.0 %, cosine of its features 0.2000, limit 0.8 (n = 1000)",
        ),
        (Agreement(990, 1000, float("nan")), "cosine of its features nan, limit 0.8 (n = 1000)"),
        (Similarity(0.8, 0.1, 50), None),
        (Similarity(0.75, 0.1, 50), "cosine of its outputs 0.7500, limit 0.8 (n = 50)"),
        (Similarity(float("nan"), 0.1, 50), "cosine of its outputs nan, limit 0.8 (n = 50)"),
    ],
)
def test_limits_are_held_against_what_was_measured(found: Accuracy | Similarity, why: str | None) -> None:
    assert too_far(found, with_limits(Recipe(), 80, 0.8)) == why


def test_limits_of_zero_let_anything_pass() -> None:
    recipe = with_limits(Recipe(), 0, 0)
    assert too_far(Agreement(0, 10_000, 0.0), recipe) is too_far(Similarity(0.0, 0.0, 9), recipe) is None


def test_result_that_misses_its_limits_is_an_error_and_kept(
    float_model: FloatModel, npz_file: Path, tmp_path: Path
) -> None:
    recipe = with_limits(untrained(), 0, 1.0)
    out, said = tmp_path / "model.pt", []
    with pytest.raises(
        GateError, match=r"cosine of its features 0\.\d{4}, limit 1\.0 \(n = 64\)\. .*model\.pt is kept"
    ):
        quantize(float_model, npz_file, out, recipe, say=said.append)
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]
    (warning,) = (line for line in said if line.startswith("WARNING"))
    assert "nothing trains it, as the recipe wants" in warning


def test_result_within_its_limits_is_no_warning(float_model: FloatModel, npz_file: Path, tmp_path: Path) -> None:
    said: list[str] = []
    recipe = with_limits(untrained(), 0, 0.5)
    quantize(float_model, npz_file, tmp_path / "model.pt", recipe, say=said.append)
    assert not any(line.startswith("WARNING") for line in said)
    stored = torch.load(tmp_path / "model.pt", weights_only=True)["provenance"]["closeness"]
    assert stored.keys() == {"calibrated", "W4A4"}
    assert all(0.5 < found["cosine"] <= 1 and found["n"] == 64 for found in stored.values())


def test_what_is_as_accurate_may_differ_from_the_float_model(
    float_model: FloatModel, npz_file: Path, tmp_path: Path
) -> None:
    # With labels it learns what the random float model does not know.
    recipe = with_limits(fast_recipe(epochs=2), 100, 1.0)
    results = quantize(float_model, npz_file, tmp_path / "model.pt", recipe, say=lambda _: None)
    exact, found = results["FP32"], results["W4A4"]
    assert isinstance(exact, Accuracy)
    assert isinstance(found, Accuracy)
    assert found.percent >= exact.percent - 1
    stored = torch.load(tmp_path / "model.pt", weights_only=True)["provenance"]["closeness"]["W4A4"]
    assert stored["cosine"] < 1  # it does miss the limits


class SeenError(Exception):
    """Ends a run where enough has been seen."""


@pytest.mark.parametrize("rotates", [True, False])
def test_teacher_is_what_the_student_was_made_of(
    rotates: bool,
    float_model: FloatModel,
    npz_file: Path,
    probe: Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def see(student: nn.Module, teacher: nn.Module, *_: Any) -> None:
        for quantizer in activation_quantizers(student).values():
            quantizer.mode = "float"
        outputs, values = [], []
        for model in (student, teacher, float_model.model):
            with torch.no_grad(), Features(model) as features:
                outputs.append(model(probe))
                values.append(features.value)
        torch.testing.assert_close(values[0], values[1], rtol=1e-4, atol=1e-4)
        assert torch.allclose(values[1], values[2], rtol=1e-2, atol=1e-2) != rotates
        for output in outputs[:2]:
            torch.testing.assert_close(output, outputs[2], rtol=1e-4, atol=1e-4)
        raise SeenError

    monkeypatch.setattr(stage1, "train", see)
    before = copy.deepcopy(float_model.model.state_dict())
    recipe = fast_recipe()
    recipe = recipe.model_copy(update={"calibration": recipe.calibration.model_copy(update={"rotate": rotates})})
    said: list[str] = []
    with pytest.raises(SeenError):
        quantize(float_model, npz_file, tmp_path / "model.pt", recipe, say=said.append)
    assert any(line.startswith("rotated: residual streams: 1, ") for line in said) == rotates
    assert all(torch.equal(tensor, before[name]) for name, tensor in float_model.model.state_dict().items())


def test_run_that_is_interrupted_behind_stage_1_ends_with_the_same_bits(
    float_model: FloatModel, npz_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = fast_recipe(max_images=32)
    assert recipe.calibration.rotate
    quantize(float_model, npz_file, tmp_path / "whole.pt", recipe, say=lambda _: None)

    def press(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pipeline.stage2, "quantize_weights", press)
        quantize(float_model, npz_file, tmp_path / "model.pt", recipe, say=lambda _: None)
    said: list[str] = []
    quantize(float_model, npz_file, tmp_path / "model.pt", recipe, say=said.append)
    assert "resuming Stage 1 at step 2" in said
    whole, resumed = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("whole", "model"))
    assert resumed["provenance"]["rotation"]["residual"]
    for name, linear in whole["linears"].items():
        assert torch.equal(resumed["linears"][name]["codes"], linear["codes"]), name
        assert torch.equal(resumed["linears"][name]["scale"], linear["scale"]), name
    for name, tensor in whole["floats"].items():
        assert torch.equal(resumed["floats"][name], tensor), name
    assert resumed["provenance"]["closeness"] == whole["provenance"]["closeness"]


class ConvClassifier(nn.Module):
    """Its classifier is a convolution, on features [B, C, 1, 1]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.fc = nn.Conv2d(1, 8, 4, 4), nn.Conv2d(8, 4, 1)

    def get_classifier(self) -> nn.Module:
        """As timm's."""
        return self.fc

    def forward(self, x: Tensor) -> Tensor:
        """[B, 1, H, W] -> [B, 4]."""
        y: Tensor = self.fc(self.stem(x).mean((2, 3), keepdim=True))
        return y.flatten(1)


def test_features_of_any_shape_are_compared(train_set: ImageSet) -> None:
    torch.manual_seed(0)
    model = ConvClassifier()
    assert agreement(model, copy.deepcopy(model), train_set, "itself").cosine == pytest.approx(1)
