"""Stage 1: the loss, its PCA term, and resuming."""

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from conftest import fast_recipe, rough
from torch import Tensor, nn
from torch.utils.data import DataLoader

import gplq
from gplq import stage1
from gplq.calibrate import activation_quantizers, calibrate, calibrate_on
from gplq.convert import convert
from gplq.data import BadImage, ImageSet, draw
from gplq.errors import ConfigError, GateError, UsageError
from gplq.evaluate import Agreement, agreement
from gplq.lsq import recompute_quantized
from gplq.models import FloatModel
from gplq.pca import Features, fit_pca, pca_loss
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
    assert {f"{name}.raw_scale" for name in activation_quantizers(student)} <= moved
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
    with pytest.raises(GateError, match=r"nan at step 1 \(first in layer 'norm'\); that step was not taken"):
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
    with torch.no_grad(), Features(float_model.model) as taken:
        float_model.model(inputs)
        features = taken.value.double().numpy()
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

    def read(self, index: int) -> tuple[Tensor, int] | BadImage:
        self.asked += 1
        if self.asked == self.after:
            raise KeyboardInterrupt
        return super().read(index)

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


@pytest.mark.parametrize(
    "changes",
    [
        {"accumulate": 4},
        {"gradient_checkpointing": True},
        {"scale_parametrization": "linear", "scale_lr": 1e-4},
        {"task_weight": 0.0, "pca_dimensions": 24},
        {"teacher_precision": "bf16", "precision": "bf16"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_every_way_of_training_lowers_its_loss(
    changes: dict[str, Any], float_model: FloatModel, train_set: ImageSet
) -> None:
    recipe = rough(fast_recipe(**{"epochs": 3, "lr": 3e-4, "scale_lr": 1e-3, **changes}))
    student = make_student(float_model, train_set, recipe)
    before = objective(student, float_model, train_set, recipe)
    stage1.train(student, float_model.model, train_set, recipe, None, ignore)
    assert objective(student, float_model, train_set, recipe) < 0.9 * before
    assert all(float(quantizer.scale.detach().min()) > 0 for quantizer in activation_quantizers(student).values())


@torch.no_grad()
def objective(student: nn.Module, float_model: FloatModel, images: ImageSet, recipe: Recipe) -> float:
    """The loss over all images, from the definition."""
    settings = recipe.stage1
    inputs = torch.stack([images[index][0] for index in range(len(images))])
    with Features(student) as features, Features(float_model.model) as targets:
        logits, _ = student(inputs), float_model.model(inputs)
        directions = fit_pca(float_model.model, images, 64, 0.6, recipe.seed, settings.pca_dimensions)
        float_model.model(inputs)
        mimicry = pca_loss(features.value, targets.value, directions)
    loss = settings.task_weight * nn.functional.cross_entropy(logits, torch.tensor(images.labels)) + mimicry
    return loss.item()


def gradients(float_model: FloatModel, images: ImageSet, **changes: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Of the weights and of the scales, in the first step."""
    # Eight bits: at four, the noise of BF16 flips so many codes that two gradients have little in common.
    recipe = rough(fast_recipe(epochs=1, max_images=16, **changes).model_copy(update={"activation_bits": 8}))
    student = make_student(float_model, images, recipe)
    found: dict[str, Tensor] = {}
    for name, parameter in student.named_parameters():
        parameter.register_post_accumulate_grad_hook(
            lambda parameter, name=name: found.update({name: parameter.grad.clone()})
        )
    stage1.train(student, float_model.model, images, recipe, None, ignore)
    scales = {name: gradient for name, gradient in found.items() if name.endswith("raw_scale")}
    return {name: gradient for name, gradient in found.items() if name not in scales}, scales


@pytest.mark.parametrize(
    ("changes", "tolerance"),
    # At eight bits the student's features are the teacher's but for the noise of BF16: nothing to compare in that loss.
    [({"accumulate": 4}, 1e-4), ({"gradient_checkpointing": True}, 1e-6), ({"precision": "bf16", "alpha": 0.0}, 0.25)],
    ids=["accumulate", "checkpointing", "bf16"],
)
def test_gradients_are_those_of_the_plain_step(
    changes: dict[str, Any], tolerance: float, float_model: FloatModel, train_set: ImageSet
) -> None:
    objective = {key: value for key, value in changes.items() if key == "alpha"}
    for ours, plain in zip(
        gradients(float_model, train_set, **changes), gradients(float_model, train_set, **objective), strict=True
    ):
        assert ours.keys() == plain.keys()
        flat = [torch.cat([found[name].flatten() for name in plain]) for found in (ours, plain)]
        assert all(gradient.dtype == torch.float32 for gradient in ours.values())
        assert (flat[0] - flat[1]).norm() < tolerance * flat[1].norm()


def test_attentions_of_other_families_may_be_computed_twice() -> None:
    sizes = {"img_size": 56, "depths": (2,), "embed_dim": 32, "num_heads": (2,), "window_size": 7, "num_classes": 4}
    model = convert(timm.create_model("swin_tiny_patch4_window7_224", **sizes).eval(), Recipe(), (3, 56, 56))
    inputs = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    calibrate_on(model, model, [inputs], 1, Recipe())
    results = []
    for context in (contextlib.nullcontext(), recompute_quantized()):
        with context:
            loss = model(inputs).square().sum()
        results.append(torch.autograd.grad(loss, list(model.parameters())))
    assert all(torch.equal(ours, plain) for ours, plain in zip(*results, strict=True))


def test_teacher_says_what_autocast_says_in_half_the_memory(float_model: FloatModel, probe: Tensor) -> None:
    teacher = copy.deepcopy(float_model.model)
    stage1.make_teacher(teacher, fast_recipe(teacher_precision="bf16").stage1)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(teacher(probe), float_model.model(probe))
    sizes = [sum(p.nbytes for p in model.parameters()) for model in (teacher, float_model.model)]
    assert sizes[0] < 0.6 * sizes[1]


@pytest.mark.parametrize(
    ("changes", "native", "expected"),
    [
        ({}, True, "bf16"),
        ({}, False, "fp32"),
        ({"precision": "fp16"}, True, "fp16"),
        ({"teacher_precision": "fp32"}, True, "fp32"),
        ({"teacher_precision": "bf16"}, False, "bf16"),
    ],
)
def test_teacher_takes_bf16_where_it_is_native(
    changes: dict[str, Any], native: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage1, "computes_in_bf16", lambda _: native)
    assert stage1.teacher_precision(fast_recipe(**changes).stage1, torch.device("cpu")) == expected


def test_only_scales_learn_if_weights_do_not(float_model: FloatModel, train_set: ImageSet) -> None:
    recipe = fast_recipe(train_weights=False)
    student = make_student(float_model, train_set, recipe)
    before = copy.deepcopy(student.state_dict())
    stage1.train(student, float_model.model, train_set, recipe, None, ignore)
    moved = {name for name, tensor in student.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {f"{name}.raw_scale" for name in activation_quantizers(student)}
    assert all(parameter.requires_grad for parameter in student.parameters())


def test_attention_biases_that_timm_keeps_a_copy_of_are_trained() -> None:
    torch.manual_seed(0)
    model = timm.create_model("levit_128s", num_classes=5).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bn.weight"):
                parameter.fill_(1)  # timm starts with attentions that add nothing
    batch = torch.randn(2, 3, 224, 224), torch.tensor([1, 3])
    recipe = fast_recipe(alpha=0, lr=1e-3)
    student = convert(model, recipe)
    calibrate_on(student, lambda part: student(part[0]), [batch], 1, recipe)
    biases = {name: p.detach().clone() for name, p in student.named_parameters() if "attention_biases" in name}

    def loss(model: nn.Module, part: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        return {"task": nn.functional.cross_entropy(model(part[0]), part[1])}

    with stage1.Trainer(student, loss, recipe) as trainer:
        before = [trainer.advance([batch])["task"] for _ in range(2)][-1]
    assert any(not torch.equal(student.get_parameter(name), bias) for name, bias in biases.items())
    with torch.no_grad():  # and what it computes with now is what it has learnt
        assert float(nn.functional.cross_entropy(student(batch[0]), batch[1])) < before


def test_a_bad_gradient_stops_before_the_step(float_model: FloatModel, train_set: ImageSet) -> None:
    recipe, states = fast_recipe(checkpoint_seconds=1e-9), []
    student = make_student(float_model, train_set, recipe)
    weight = student.get_parameter("head.linear.weight")
    calls = 0

    def spoil(gradient: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return gradient * torch.nan if calls == 3 else gradient

    weight.register_hook(spoil)
    with pytest.raises(GateError, match="a gradient is not finite at step 3"):
        stage1.train(
            student, float_model.model, train_set, recipe, None, lambda state: states.append(copy.deepcopy(state))
        )
    assert [state["step"] for state in states] == [1, 2]
    assert all(torch.equal(states[-1]["student"][name], tensor) for name, tensor in student.state_dict().items())


def test_fp16_needs_a_gpu(float_model: FloatModel, train_set: ImageSet) -> None:
    recipe = fast_recipe(precision="fp16")
    with pytest.raises(ConfigError, match="fp16 needs a CUDA GPU"):
        stage1.train(make_student(float_model, train_set, recipe), float_model.model, train_set, recipe, None, ignore)


@pytest.mark.parametrize(
    ("name", "arguments", "width"),
    [
        ("vit_tiny_patch16_224", {"img_size": 32, "depth": 1}, 192),
        ("deit_tiny_distilled_patch16_224", {"img_size": 32, "depth": 1}, 2 * 192),
        ("levit_128s", {}, 2 * 384),
        ("swin_tiny_patch4_window7_224", {"depths": (1, 1, 1, 1)}, 768),
        ("vit_tiny_patch16_224", {"img_size": 32, "depth": 1, "num_classes": 0}, 192),
    ],
)
def test_features_are_what_the_classifier_is_given(name: str, arguments: dict[str, Any], width: int) -> None:
    model = timm.create_model(name, **{"num_classes": 5, **arguments}).eval()
    inputs = torch.randn(3, *model.pretrained_cfg["input_size"][:1], *([arguments.get("img_size", 224)] * 2))
    with Features(model) as features, torch.no_grad():
        logits = model(inputs)
        found = features.value
    assert found.shape == (3, width)
    heads = model.get_classifier()
    heads = heads if isinstance(heads, tuple) else (heads,)
    parts = found.chunk(len(heads), dim=1)
    with torch.no_grad():
        expected = sum(head(part) for head, part in zip(heads, parts, strict=True)) / len(heads)
    torch.testing.assert_close(expected, logits)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


class Detector(nn.Module):
    """As torchvision's: lists of images and of targets in, losses by name out, with randomness in training mode."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone, self.box = backbone, nn.Linear(4, 4)
        self.unused = nn.Linear(2, 2)

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        logits = nn.functional.dropout(self.backbone(torch.stack(images)), 0.1, self.training)
        boxes, labels = (torch.stack([target[key] for target in targets]) for key in ("box", "label"))
        return {
            "class": nn.functional.cross_entropy(logits.float(), labels),
            "box": nn.functional.l1_loss(self.box(logits).float(), boxes),
        }


def detector_run(float_model: FloatModel, data: Any, recipe: Recipe, state_file: Path | None = None) -> Detector:
    torch.manual_seed(5)
    detector = Detector(convert(copy.deepcopy(float_model.model), recipe)).train()
    gplq.train_activations(
        detector, data, loss=lambda model, batch: model(*batch), recipe=recipe, state_file=state_file
    )
    return detector


def detection_data(images: ImageSet, batch: int = 4) -> "DataLoader[Any]":
    items = [
        (images[index][0], {"box": torch.full((4,), index / 64), "label": torch.tensor(images.labels[index])})
        for index in range(64)
    ]
    return DataLoader(items, batch, shuffle=True, collate_fn=lambda rows: tuple(zip(*rows, strict=True)))  # type: ignore[arg-type]


def test_a_loss_of_ones_own_trains_and_resumes_exactly(
    float_model: FloatModel, train_set: ImageSet, tmp_path: Path
) -> None:
    recipe = fast_recipe(epochs=2, accumulate=4, checkpoint_seconds=1e-9)
    data = detection_data(train_set)
    whole = detector_run(float_model, data, recipe)
    asked = 0
    original = Detector.forward

    def press(self: Detector, *batch: Any) -> dict[str, Tensor]:
        nonlocal asked
        asked += 1
        if asked == 2 + 16 + 4 * 5 + 2:  # centring and equalising, calibration, five steps, half a step
            raise KeyboardInterrupt
        return original(self, *batch)

    state_file = tmp_path / "state"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Detector, "forward", press)
        detector_run(float_model, data, recipe, state_file)
    assert state_file.exists()
    resumed = detector_run(float_model, data, recipe, state_file)
    assert not state_file.exists()
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name
    torch.manual_seed(5)
    assert not torch.equal(Detector(nn.Identity()).box.weight, whole.box.weight)


def test_too_few_batches_for_a_step_are_refused(float_model: FloatModel, train_set: ImageSet) -> None:
    recipe = fast_recipe(batch_size=64, accumulate=16)
    with pytest.raises(UsageError, match=r"8 batches are fewer than one step takes \(stage1.accumulate is 16\)"):
        detector_run(float_model, detection_data(train_set, 8), recipe)


def test_data_without_labels_give_an_agreement(float_model: FloatModel, npz_file: Path, tmp_path: Path) -> None:
    with np.load(npz_file) as arrays:
        np.savez(tmp_path / "bare.npz", images=arrays["train_images"])
    recipe = fast_recipe(task_weight=0.0)
    results = gplq.quantize(float_model, tmp_path / "bare.npz", tmp_path / "model.pt", recipe, say=lambda _: None)
    assert list(results) == ["W32A4", "W4A4"]
    for result in results.values():
        assert isinstance(result, Agreement)
        assert result.n == 128
        assert 0.5 < result.cosine < 1
    stored = torch.load(tmp_path / "model.pt", weights_only=True)["provenance"]
    assert stored["agreement"]["W4A4"]["n"] == 128
    assert "top1" not in stored


def test_agreement_of_a_model_with_itself_is_whole(float_model: FloatModel, train_set: ImageSet) -> None:
    result = agreement(copy.deepcopy(float_model.model), float_model.model, train_set, "itself")
    assert (result.correct, result.n) == (128, 128)
    assert result.cosine == pytest.approx(1, abs=1e-6)
