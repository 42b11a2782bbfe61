"""Stage 1: the loss, its PCA term, and resuming."""

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from conftest import fast_recipe
from torch import Tensor, nn

from gplq import stage1
from gplq.calibrate import activation_quantizers, calibrate
from gplq.data import ImageSet, draw
from gplq.errors import GateError
from gplq.layers import convert
from gplq.models import FloatModel
from gplq.pca import fit_pca, pca_loss, penultimate
from gplq.recipe import Recipe


def make_student(float_model: FloatModel, images: ImageSet, recipe: Recipe) -> nn.Module:
    student = convert(copy.deepcopy(float_model.model), recipe)
    calibrate(student, images, recipe)
    return student


def ignore(_: dict[str, Any]) -> None:
    """A ``save`` that saves nothing."""


@torch.no_grad()
def cross_entropy(model: nn.Module, images: ImageSet) -> float:
    inputs = torch.stack([images[index][0] for index in range(len(images))])
    return nn.functional.cross_entropy(model(inputs), torch.tensor(images.labels)).item()


def test_training_lowers_the_loss_and_moves_weights_and_scales(float_model: FloatModel, train_set: ImageSet) -> None:
    recipe = fast_recipe(epochs=10, alpha=0, lr=3e-3)
    student = make_student(float_model, train_set, recipe)
    before, loss = copy.deepcopy(student.state_dict()), cross_entropy(student, train_set)
    stage1.train(student, float_model.model, train_set, recipe, None, ignore)
    assert cross_entropy(student, train_set) < loss - 0.1
    moved = {name for name, tensor in student.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {f"{name}.log_scale" for name in activation_quantizers(student)} <= moved
    assert {"blocks.0.attn.q.weight", "blocks.1.mlp.fc2.linear.weight", "head.linear.weight"} <= moved


def test_teacher_is_not_changed(float_model: FloatModel, train_set: ImageSet) -> None:
    before = copy.deepcopy(float_model.model.state_dict())
    recipe = fast_recipe(max_images=32)
    student = make_student(float_model, train_set, recipe)
    stage1.train(student, float_model.model, train_set, recipe, None, ignore)
    assert all(torch.equal(tensor, before[name]) for name, tensor in float_model.model.state_dict().items())


def test_a_loss_that_is_not_finite_is_a_failed_gate(float_model: FloatModel, train_set: ImageSet) -> None:
    recipe = fast_recipe()
    student = make_student(float_model, train_set, recipe)
    with torch.no_grad():
        student.get_parameter("norm.bias").fill_(torch.nan)
    with pytest.raises(GateError, match=r"nan at step 1\. Lower stage1\.lr"):
        stage1.train(student, float_model.model, train_set, recipe, None, ignore)


def test_order_is_distinct_in_an_epoch_and_drops_the_incomplete_batch() -> None:
    order = stage1._order(100, fast_recipe(epochs=2))
    assert len(order) == 2 * 96
    assert len(set(order[:96])) == len(set(order[96:])) == 96
    assert order[:96] != order[96:]
    assert len(stage1._order(100, fast_recipe(max_images=40))) == 32
    assert len(stage1._order(10, fast_recipe())) == 16  # smaller than one batch: repeated


def test_pca_loss_is_equation_2_with_the_mean_kept_in() -> None:
    random = np.random.default_rng(0)
    student, teacher = random.normal(size=(2, 16, 64)) + 5
    directions = np.linalg.qr(random.normal(size=(64, 32)))[0]
    mean = teacher.mean(0)
    projected = (student - mean) @ directions, (teacher - mean) @ directions
    expected = ((projected[0] - projected[1]) ** 2).sum(1).mean()
    actual = pca_loss(*(torch.from_numpy(x) for x in (student, teacher, directions)))
    assert actual.item() == pytest.approx(expected, rel=1e-12)
    assert pca_loss(*(torch.from_numpy(x) for x in (teacher, teacher, directions))).item() == 0


@pytest.mark.parametrize("variance", [0.3, 0.999, 1.0])
def test_pca_directions_are_the_eigenvectors_of_the_covariance(
    variance: float, float_model: FloatModel, train_set: ImageSet
) -> None:
    directions = fit_pca(float_model.model, train_set, 100, variance, seed=3)
    inputs = torch.stack([train_set[index][0] for index in draw(len(train_set), 100, 3)])
    with torch.no_grad():
        features = penultimate(float_model.model, inputs).double().numpy()
    centred = features - features.mean(0)
    singular, right = np.linalg.svd(centred, full_matrices=False)[1:]
    shares = (singular**2).cumsum() / (singular**2).sum()
    needed = int((shares < variance - 1e-12).sum()) + 1
    assert directions.shape == (64, 32 if needed < 48 else 64)
    ours = directions.double().numpy()
    np.testing.assert_allclose(ours.T @ ours, np.eye(ours.shape[1]), atol=1e-5)
    # The space is unique where the eigenvalues are distinct: compare the variance that is caught.
    caught = ((centred @ ours) ** 2).sum() / (centred**2).sum()
    assert caught == pytest.approx(shares[ours.shape[1] - 1], abs=1e-6)
    assert np.abs(ours[:, 0] @ right[0]) == pytest.approx(1, abs=1e-4)


class Interrupted(ImageSet):
    """Ctrl-C is pressed when image number ``after`` is asked for."""

    after = 0
    asked = 0

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        self.asked += 1
        if self.asked == self.after:
            raise KeyboardInterrupt
        return super().__getitem__(index)

    @classmethod
    def of(cls, images: ImageSet, after: int) -> "Interrupted":
        copied = cls.__new__(cls)
        copied.__dict__ = {**images.__dict__, "after": after, "asked": 0}
        return copied


def assert_equal_states(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours.keys() == theirs.keys()
    assert ours["step"] == theirs["step"]
    assert torch.equal(ours["directions"], theirs["directions"])
    for name, tensor in theirs["student"].items():
        assert torch.equal(ours["student"][name], tensor), name
    for index, moments in theirs["optimizer"]["state"].items():
        for name, tensor in moments.items():
            assert torch.equal(ours["optimizer"]["state"][index][name], tensor), (index, name)


@pytest.fixture
def uninterrupted(float_model: FloatModel, train_set: ImageSet) -> Iterator[dict[str, Any]]:
    recipe, states = fast_recipe(epochs=2), []
    student = make_student(float_model, train_set, recipe)
    stage1.train(student, float_model.model, train_set, recipe, None, lambda state: states.append(copy.deepcopy(state)))
    assert [state["step"] for state in states] == [16]
    yield states[-1]


@pytest.mark.parametrize("after", [64 + 1, 64 + 16 * 5, 64 + 16 * 9 + 7])
def test_resuming_after_an_interruption_is_exact(
    after: int, uninterrupted: dict[str, Any], float_model: FloatModel, train_set: ImageSet
) -> None:
    recipe, states = fast_recipe(epochs=2), []

    def save(state: dict[str, Any]) -> None:
        states.append(copy.deepcopy(state))

    student = make_student(float_model, train_set, recipe)
    with pytest.raises(KeyboardInterrupt):  # the first 64 images are those of the PCA
        stage1.train(student, float_model.model, Interrupted.of(train_set, after), recipe, None, save)
    assert states[-1]["step"] == (after - 65) // 16
    student = make_student(float_model, train_set, recipe)
    stage1.train(student, float_model.model, train_set, recipe, states[-1], save)
    assert_equal_states(states[-1], uninterrupted)


def test_resuming_after_an_interrupted_save_is_exact(
    uninterrupted: dict[str, Any], float_model: FloatModel, train_set: ImageSet
) -> None:
    recipe, states = fast_recipe(epochs=2, checkpoint_seconds=1e-6), []

    def save(state: dict[str, Any]) -> None:
        states.append(copy.deepcopy(state))
        if len(states) == 5:
            raise KeyboardInterrupt

    student = make_student(float_model, train_set, recipe)
    with pytest.raises(KeyboardInterrupt):
        stage1.train(student, float_model.model, train_set, recipe, None, save)
    assert states[-1]["step"] == 5
    student = make_student(float_model, train_set, recipe)
    stage1.train(student, float_model.model, train_set, recipe, states[-1], save)
    assert_equal_states(states[-1], uninterrupted)


def test_ctrl_c_within_a_step_waits_for_its_end(
    uninterrupted: dict[str, Any], float_model: FloatModel, train_set: ImageSet
) -> None:
    import signal

    recipe, states = fast_recipe(epochs=2), []

    def save(state: dict[str, Any]) -> None:
        states.append(copy.deepcopy(state))

    student = make_student(float_model, train_set, recipe)
    calls = 0

    def press(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 7:  # in the seventh forward pass
            signal.raise_signal(signal.SIGINT)

    student.get_submodule("norm").register_forward_hook(press)
    with pytest.raises(KeyboardInterrupt):
        stage1.train(student, float_model.model, train_set, recipe, None, save)
    assert [state["step"] for state in states] == [7]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    student = make_student(float_model, train_set, recipe)
    stage1.train(student, float_model.model, train_set, recipe, states[-1], save)
    assert_equal_states(states[-1], uninterrupted)


def test_finished_state_trains_no_further(
    uninterrupted: dict[str, Any], float_model: FloatModel, train_set: ImageSet
) -> None:
    recipe, states = fast_recipe(epochs=2), []
    student = make_student(float_model, train_set, recipe)
    stage1.train(student, float_model.model, train_set, recipe, copy.deepcopy(uninterrupted), states.append)
    assert_equal_states(states[-1], uninterrupted)
