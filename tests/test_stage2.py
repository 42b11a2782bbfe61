"""Stage 2: second-order rounding and the choice of scales."""

import copy
from typing import Any

import numpy as np
import pytest
import reference
import torch
from conftest import fast_recipe
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from gplq import stage2
from gplq.adaround import learn_codes
from gplq.calibrate import calibrate
from gplq.checkpoint import frozen_quantizers, integer_linears
from gplq.compensate import compensations, why_not
from gplq.convert import convert
from gplq.data import ImageSet, draw
from gplq.errors import UsageError
from gplq.integer import FrozenQuantizer, IntegerLinear
from gplq.layers import QuantLinear
from gplq.models import FloatModel
from gplq.moments import Moments, ridge_regression
from gplq.recipe import LearnedRounding, Recipe
from gplq.rounding import gptq_codes, round_weight
from gplq.stage2 import quantize_weights
from gplq.stream import Call


def correlated_problem(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """A weight [24, 48], inputs [2000, 48] of strongly correlated columns, and min-max scales [24]."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2000, 6, generator=generator) @ torch.randn(6, 48, generator=generator)
    x += 0.1 * torch.randn(2000, 48, generator=generator)
    weight = torch.randn(24, 48, generator=generator)
    return weight, x, weight.abs().amax(1) / 7


def output_error(weight: Tensor, codes: Tensor, scale: Tensor, x: Tensor) -> float:
    difference = weight.double() - codes.double() * scale.double()[:, None]
    return float((difference @ x.double().T).norm())


@pytest.mark.parametrize("seed", range(4))
def test_gptq_beats_nearest_on_correlated_inputs(seed: int) -> None:
    weight, x, scale = correlated_problem(seed)
    codes, _ = gptq_codes(weight, scale, (x.T @ x).double() / len(x), 4, 0.01)
    nearest = torch.from_numpy(reference.quantize(weight.numpy(), scale[:, None].numpy(), 4, signed=True))
    assert output_error(weight, codes, scale, x) < 0.6 * output_error(weight, nearest, scale, x)
    assert codes.dtype == torch.int8
    assert codes.min() >= -8
    assert codes.max() <= 7


def naive_gptq(weight: np.ndarray, scale: np.ndarray, hessian: np.ndarray) -> np.ndarray:
    """GPTQ as its paper tells it: after each column the others take the best of what they can make good, in FP64."""
    weight, inverse = weight.astype(np.float64), np.linalg.inv(hessian)
    codes = np.zeros(weight.shape)
    left = list(np.argsort(-hessian.diagonal()))
    while left:
        k = left.pop(0)
        codes[:, k] = np.clip(np.round(weight[:, k] / scale), -8, 7)
        error = (weight[:, k] - codes[:, k] * scale) / inverse[k, k]
        weight -= np.outer(error, inverse[k])
        inverse -= np.outer(inverse[:, k], inverse[k]) / inverse[k, k]
    return codes


def test_gptq_is_what_its_paper_says() -> None:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(3000, 20, generator=generator) @ torch.randn(20, 150, generator=generator)
    x += 0.3 * torch.randn(3000, 150, generator=generator)
    weight = torch.randn(40, 150, generator=generator)  # 150 columns: groups of columns, and a rest
    scale = weight.abs().amax(1) / 7
    moment = (x.T @ x).double() / len(x)
    codes, error = gptq_codes(weight, scale, moment, 4, 0.02)
    damped = moment.numpy() + 0.02 * float(moment.diagonal().mean()) * np.eye(150)
    expected = naive_gptq(weight.numpy(), scale.numpy().astype(np.float64), damped)
    assert (codes.numpy() == expected).mean() > 0.99  # a tie that falls the other way moves what follows in its row
    assert (codes.numpy() == expected).all(1).mean() > 0.9
    difference = (weight.double() - codes * scale.double()[:, None]).numpy()
    np.testing.assert_allclose(
        error.numpy(), np.einsum("nk,kl,nl->n", difference, moment.numpy(), difference), rtol=1e-4
    )


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_gptq_with_uncorrelated_inputs_is_nearest(bits: int) -> None:
    weight = torch.randn(24, 48, generator=torch.Generator().manual_seed(bits))
    scale = weight.abs().amax(1) / (2 ** (bits - 1) - 1) * 0.8
    expected = reference.quantize(weight.numpy(), scale[:, None].numpy(), bits, signed=True)
    for moment in (torch.eye(48), torch.diag(torch.linspace(0.1, 9, 48))):
        codes, _ = gptq_codes(weight, scale, moment, bits, 0.01)
        np.testing.assert_array_equal(codes.numpy(), expected)


def test_gptq_survives_inputs_that_are_always_zero() -> None:
    weight, x, scale = correlated_problem(0)
    x[:, ::3] = 0
    for moment in ((x.T @ x).double(), torch.zeros(48, 48)):
        codes, _ = gptq_codes(weight, scale, moment, 4, 0.01)
        assert codes.min() >= -8
        assert codes.max() <= 7


def frozen(float_model: FloatModel, images: ImageSet, recipe: Recipe) -> torch.nn.Module:
    model = convert(copy.deepcopy(float_model.model), recipe)
    calibrate(model, images, recipe)
    quantize_weights(model, images, recipe)
    return model


@pytest.mark.parametrize("scale_grid", ["fp16", "exact"])
@pytest.mark.parametrize("activations", ["per_channel", "per_tensor"])
def test_everything_frozen_lies_on_the_grid(
    scale_grid: str, activations: str, float_model: FloatModel, train_set: ImageSet, probe: Tensor
) -> None:
    content = fast_recipe(granularity=activations).to_dict() | {"scale_grid": scale_grid}
    model = frozen(float_model, train_set, Recipe.from_dict(content))
    linears, quantizers = integer_linears(model), frozen_quantizers(model)
    assert len(linears) == 2 + 2 * 6
    assert len(quantizers) == 2 + 2 * 8
    scales = [linear.weight_scale for linear in linears.values()] + [q.scale for q in quantizers.values()]
    for scale in scales:
        numbers = scale.double().numpy()
        assert (numbers.astype(np.float16).astype(np.float64) == numbers).all()
        assert (numbers > 0).all()
        if scale_grid == "exact":
            significand = np.frexp(numbers)[0] * 16
            assert (significand == np.rint(significand)).all()
    for name, linear in linears.items():
        edge = name.startswith(("patch_embed", "head"))
        limit = 128 if edge else 8
        assert linear.bits == (8 if edge else 4)
        assert linear.codes.dtype == torch.int8
        assert -limit <= int(linear.codes.min()) < 0 < int(linear.codes.max()) <= limit - 1
    signs = {name: q.signed for name, q in quantizers.items()}
    # A softmax, and behind a GELU what has been shifted.
    assert [name for name, signed in signs.items() if not signed] == [
        f"blocks.{block}.{name}" for block in (0, 1) for name in ("attn.pv.a_quantizer", "mlp.fc2.input_quantizer")
    ]
    shifts = {name: float(q.pre_shift) for name, q in quantizers.items() if q.pre_shift is not None}
    assert shifts == {name: pytest.approx(0.17, abs=1e-3) for name in signs if name.endswith("mlp.fc2.input_quantizer")}
    with_factor = [name for name, q in quantizers.items() if q.pre_scale is not None]
    expected = [f"blocks.{block}.mlp.fc2.input_quantizer" for block in (0, 1)] if activations == "per_channel" else []
    assert with_factor == expected
    with torch.no_grad():
        assert model(probe).isfinite().all()


def test_per_tensor_weights_have_one_scale(float_model: FloatModel, train_set: ImageSet) -> None:
    for range_ in ("minmax", "percentile", "mse"):
        content: dict[str, Any] = fast_recipe().to_dict()
        content["stage2"] |= {"granularity": "per_tensor", "rounding": "nearest", "range": range_}
        linear = frozen(float_model, train_set, Recipe.from_dict(content)).get_submodule("blocks.0.mlp.fc1.linear")
        assert isinstance(linear, IntegerLinear)
        assert linear.weight_scale.shape == (256,)
        assert linear.weight_scale.unique().numel() == 1


def with_stage2(**changes: Any) -> Recipe:
    content = fast_recipe(granularity="per_tensor").to_dict()
    content["stage2"] |= changes
    return Recipe.from_dict(content)


def calibrated(float_model: FloatModel, images: ImageSet, recipe: Recipe) -> nn.Module:
    model = convert(copy.deepcopy(float_model.model), recipe)
    calibrate(model, images, recipe)
    return model


def input_of(model: nn.Module, name: str, x: Tensor) -> Tensor:
    """What the submodule ``name`` gets in a forward pass."""
    found: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: found.append(args[0]))
    with torch.no_grad():
        model(x)
    handle.remove()
    return found[0]


def output_of(model: nn.Module, name: str, x: Tensor) -> Tensor:
    found: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_hook(lambda _, __, output: found.append(output))
    with torch.no_grad():
        model(x)
    handle.remove()
    return found[0]


def split(images: ImageSet, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """The images that Stage 2 fits on, and those that it judges by: batches of a fifth each."""
    chosen = draw(len(images), recipe.stage2.images, recipe.seed)
    inputs = torch.stack([images[index][0] for index in chosen])
    size = len(chosen) // 5
    judged = -(-len(chosen) // size) // 5
    start = (-(-len(chosen) // size) - judged) * size
    return inputs[:start], inputs[start:]


def test_moments_are_those_of_the_quantised_inputs_of_the_images_to_fit_on(
    float_model: FloatModel, train_set: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = with_stage2(bias_correction=False, importance="none")
    model = calibrated(float_model, train_set, recipe)
    norm_inputs, scale = None, model.get_submodule("blocks.0.attn").input_quantizer.scale  # type: ignore[union-attr]
    seen: list[Tensor] = []

    def spy(weight: Tensor, moment: Tensor, recipe: Recipe) -> tuple[Tensor, Tensor]:
        seen.append(moment)
        return round_weight(weight, moment, recipe)

    monkeypatch.setattr(stage2, "round_weight", spy)
    quantize_weights(model, train_set, recipe)
    fitted, judged = split(train_set, recipe)
    assert (len(fitted), len(judged)) == (60, 4)  # the last batch is a small one: 64 images, 12 a batch
    norm_inputs = output_of(model, "blocks.0.norm1", fitted).flatten(0, 1).numpy()
    numbers = scale.detach().numpy().astype(np.float16).astype(np.float32)
    rows = reference.quantize(norm_inputs, numbers, 4, signed=True) * numbers.astype(np.float64)
    np.testing.assert_allclose(seen[0].numpy(), rows.T @ rows / len(rows), rtol=1e-4, atol=1e-5)


def test_moments_know_the_error_of_any_correction() -> None:
    random = np.random.default_rng(0)
    x, d, correction = random.normal(size=(300, 5)) + 1, random.normal(size=(300, 3)), random.normal(size=(3, 6))
    moments = Moments()
    for part in (slice(0, 50), slice(50, 300)):
        moments.add(torch.from_numpy(x[part]), torch.from_numpy(d[part]))
    expected = ((d - x @ correction[:, :5].T - correction[:, 5]) ** 2).sum(1).mean()
    assert moments.error(torch.from_numpy(correction)) == pytest.approx(expected)
    assert moments.error() == pytest.approx((d**2).sum(1).mean())
    one = moments.outputs(slice(1, 2))
    expected = ((d[:, 1] - x @ correction[1, :5] - correction[1, 5]) ** 2).mean()
    assert one.error(torch.from_numpy(correction[1:2])) == pytest.approx(expected)
    np.testing.assert_allclose(moments.inputs(centred=True).numpy(), np.cov(x.T, bias=True), atol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
def test_ridge_regression_is_least_squares_with_extra_rows(bias: bool) -> None:
    random = np.random.default_rng(1)
    x, d = random.normal(size=(200, 4)) + 2, random.normal(size=(200, 3)) + 1
    moments = Moments()
    moments.add(torch.from_numpy(x), torch.from_numpy(d))
    power = (x.var(0) if bias else (x**2).mean(0)).mean()
    # Ridge as ordinary least squares: penalties are four more observations of zero, without a bias.
    rows = np.concatenate([np.c_[x, np.ones(200)], np.c_[np.sqrt(0.3 * power * 200) * np.eye(4), np.zeros(4)]])
    columns = slice(0, 5 if bias else 4)
    expected = np.linalg.lstsq(rows[:, columns], np.concatenate([d, np.zeros((4, 3))]), rcond=None)[0].T
    actual = ridge_regression(moments, 0.3, bias).numpy()
    np.testing.assert_allclose(actual[:, columns], expected, atol=1e-10)
    assert bias or (actual[:, 4] == 0).all()


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
@pytest.mark.parametrize("granularity", ["per_channel", "per_tensor"])
def test_range_by_output_has_the_least_output_error(rounding: str, granularity: str) -> None:
    weight, x, _ = correlated_problem(1)
    weight[:, 0] *= 4  # an outlier that is worth clipping
    moment = (x.T @ x).double() / len(x)
    errors = {}
    for name in ("output", "minmax", "mse", "percentile"):
        recipe = with_stage2(range=name, rounding=rounding, granularity=granularity)
        codes, scale = round_weight(weight, moment, recipe)
        errors[name] = output_error(weight, codes, scale, x)
        assert scale.shape == (24,)
        assert (scale == scale.half().float()).all()
        assert granularity == "per_channel" or scale.unique().numel() == 1
    assert errors["output"] < errors["minmax"]
    assert errors["output"] <= 1.05 * min(errors.values())


def test_bias_correction_removes_the_mean_error(float_model: FloatModel, train_set: ImageSet) -> None:
    means = {}
    for correct in (True, False):
        recipe = with_stage2(bias_correction=correct, rounding="nearest", importance="none")
        before = calibrated(float_model, train_set, recipe)
        after = copy.deepcopy(before)
        quantize_weights(after, train_set, recipe)
        fitted, _ = split(train_set, recipe)
        codes: Any = input_of(after, "blocks.0.attn.v", fitted)
        with torch.no_grad():
            expected = before.get_submodule("blocks.0.attn.v")(codes.values * codes.scale)
            lost = after.get_submodule("blocks.0.attn.v")(codes) - expected
        means[correct] = float(lost.mean((0, 1)).abs().max() / lost.std())
    assert means[True] < 1e-4 < 0.05 < means[False]


def squared_error(model: nn.Module, target: nn.Module, name: str, x: Tensor) -> float:
    return float((output_of(model, name, x) - output_of(target, name, x)).double().square().sum())


def test_ridge_lowers_the_error_of_outputs_and_adds_nothing(
    float_model: FloatModel, train_set: ImageSet, probe: Tensor
) -> None:
    before = calibrated(float_model, train_set, with_stage2())
    errors, names, reports = {}, {}, {}
    for compensation in ("none", "ridge"):
        model = copy.deepcopy(before)
        reports[compensation] = quantize_weights(model, train_set, with_stage2(compensation=compensation))
        errors[compensation] = squared_error(model, before, "blocks.1", probe)
        names[compensation] = [name for name, _ in model.named_modules()]
    assert errors["ridge"] < errors["none"]
    assert names["ridge"] == names["none"]
    assert [report.name for report in reports["ridge"]] == ["blocks.0", "blocks.1"]
    tried = [entry for report in reports["ridge"] for entry in report.compensations]
    assert len(tried) == 12
    assert all(entry.kept == (entry.r2 > 0) for entry in tried if entry.r2 is not None)
    assert any(entry.kept for entry in tried)
    assert all(report.compensations == () for report in reports["none"])


def test_reported_error_is_that_of_the_images_to_judge_by(float_model: FloatModel, train_set: ImageSet) -> None:
    recipe = with_stage2()
    before = calibrated(float_model, train_set, recipe)
    model = copy.deepcopy(before)
    reports = quantize_weights(model, train_set, recipe)
    _, judged = split(train_set, recipe)
    for report in reports:
        size = float(output_of(before, report.name, judged).double().square().sum())
        assert report.error == pytest.approx(squared_error(model, before, report.name, judged) / size, rel=1e-3)
        assert str(report) == f"{report.name}: relative output error {report.error:.2%}"


def test_qwt_is_the_regression_of_each_block(float_model: FloatModel, train_set: ImageSet, probe: Tensor) -> None:
    recipe = with_stage2(compensation="qwt", rounding="nearest", ridge=0.1)
    before = calibrated(float_model, train_set, recipe)
    model = copy.deepcopy(before)
    reports = quantize_weights(model, train_set, recipe)
    assert [entry.kept for report in reports for entry in report.compensations] == [True, True]
    fitted, judged = split(train_set, recipe)
    without = copy.deepcopy(model)
    for linear in compensations(without).values():
        linear.weight.data.zero_(), linear.bias.data.zero_()
    # The first block's inputs are the same with and without its compensation.
    block, block_before = without.get_submodule("blocks.0"), before.get_submodule("blocks.0")
    sides = {}
    for name, images in (("fit", fitted), ("judge", judged)):
        with torch.no_grad():
            x = input_of(model, "blocks.0", images)
            lack = (block_before(x) - block(x)).flatten(0, 1).double().numpy()
        sides[name] = (x.flatten(0, 1).double().numpy(), lack)
    x, d = sides["fit"]
    rows = np.concatenate([np.c_[x, np.ones(len(x))], np.sqrt(0.1 * x.var(0).mean() * len(x)) * np.eye(64, 65)])
    expected = np.linalg.lstsq(rows, np.concatenate([d, np.zeros((64, 64))]), rcond=None)[0].T
    linear = compensations(model)["blocks.0"]
    np.testing.assert_allclose(linear.weight.numpy(), expected[:, :64], atol=2e-3 * np.abs(expected).max())
    x, d = sides["judge"]
    left = d - x @ linear.weight.double().numpy().T - linear.bias.double().numpy()
    entry = reports[0].compensations[0]
    assert entry.r2 == pytest.approx(1 - (left**2).sum() / (d**2).sum(), abs=1e-3)
    assert entry.r2 > 0
    assert entry.added_bytes == 2 * (64 * 64 + 64)
    for parameter in linear.parameters():
        assert torch.equal(parameter, parameter.half().float())
    x = input_of(model, "blocks.1", probe)
    with torch.no_grad():
        plain = without.get_submodule("blocks.1")(x)
        torch.testing.assert_close(
            model.get_submodule("blocks.1")(x), plain + compensations(model)["blocks.1"](x), rtol=0, atol=0
        )
    assert type(model.get_submodule("blocks.1")).__name__ == "CompensatedBlock"
    assert isinstance(model.get_submodule("blocks.1"), Block)


def test_compensation_that_does_not_help_is_dropped(
    float_model: FloatModel, train_set: ImageSet, probe: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = calibrated(float_model, train_set, with_stage2())
    plain = copy.deepcopy(before)
    quantize_weights(plain, train_set, with_stage2())

    def wrong(moments: Moments, strength: float, bias: bool) -> Tensor:
        return -ridge_regression(moments, strength, bias)

    monkeypatch.setattr(stage2, "ridge_regression", wrong)
    for compensation in ("qwt", "ridge"):
        model = copy.deepcopy(before)
        reports = quantize_weights(model, train_set, with_stage2(compensation=compensation))
        entries = [entry for report in reports for entry in report.compensations]
        dropped = [entry for entry in entries if not entry.kept]
        assert all(entry.r2 is not None and entry.r2 <= 0 and entry.added_bytes == 0 for entry in dropped)
        if compensation == "qwt":
            assert len(dropped) == len(entries) == 2
            assert compensations(model) == {}
            with torch.no_grad():
                assert torch.equal(model(probe), plain(probe))


def test_block_of_another_shape_is_left_alone() -> None:
    x = torch.zeros(1, 4, 8)
    block = nn.Module()
    assert why_not(block, x, (x, [2, 2])) == "it does not return one tensor"
    assert why_not(block, x, x[:, :2]) == "its output is not of its input's shape"
    assert why_not(block, x, x) == "its last dimension is not that of the channels"
    block.linear = IntegerLinear(torch.zeros(8, 3, dtype=torch.int8), torch.ones(8), None, 4, "linear")
    assert why_not(block, x, x) is None


def test_learned_rounding_lowers_the_error_of_nearest_codes() -> None:
    weight, x, scale = correlated_problem(2)
    scale = scale.half().float()
    nearest = torch.from_numpy(reference.quantize(weight.numpy(), scale[:, None].numpy(), 4, signed=True)).to(
        torch.int8
    )
    quantizer = FrozenQuantizer(torch.tensor(0.5), None, 8, signed=True, name="q")
    layer = QuantLinear(nn.Linear(1, 1), quantizer, 4)
    layer.set_submodule("linear", IntegerLinear(nearest, scale, None, 4, "l"))
    before = layer.linear.codes.clone()  # type: ignore[operator,union-attr]
    codes = quantizer(x)
    x_hat = codes.values * codes.scale
    calls = [Call((part,), {}) for part in x.split(250)]
    targets = [part @ weight.T for part in x_hat.split(250)]
    steps: list[None] = []
    settings = LearnedRounding(iterations=300, lr=0.02)
    with torch.no_grad():  # as Stage 2 does
        result = learn_codes(layer, {"linear": weight}, calls, targets, settings, 0, lambda: steps.append(None))
    assert len(steps) == 300
    assert output_error(weight, result["linear"], scale, x_hat) < 0.8 * output_error(weight, nearest, scale, x_hat)
    assert (result["linear"] - nearest).abs().max() == 1
    assert torch.equal(layer.linear.codes, before)  # type: ignore[arg-type,union-attr]


@pytest.mark.parametrize("iterations", [3, 40])
def test_learned_rounding_is_kept_only_where_it_helps(
    iterations: int, float_model: FloatModel, train_set: ImageSet
) -> None:
    before = calibrated(float_model, train_set, with_stage2())
    recipe = with_stage2(rounding="adaround", adaround={"iterations": iterations, "lr": 0.1})
    start, end = copy.deepcopy(before), copy.deepcopy(before)
    quantize_weights(start, train_set, with_stage2(rounding="gptq"))
    entry = quantize_weights(end, train_set, recipe)[0].compensations[0]
    assert (entry.method, entry.where) == ("adaround", "blocks.0")
    assert entry.r2 is not None
    assert entry.kept == (entry.r2 > 0)
    pairs = zip(*(integer_linears(model.get_submodule("blocks.0")).values() for model in (start, end)), strict=True)
    changed = sum(int((a.codes != b.codes).sum()) for a, b in pairs)
    assert (changed > 0) == entry.kept


@pytest.mark.parametrize("count", [1, 2, 7])
def test_few_images_are_enough(count: int, float_model: FloatModel, train_set: ImageSet, probe: Tensor) -> None:
    model = calibrated(float_model, train_set, with_stage2())
    quantize_weights(model, train_set, with_stage2(images=count, compensation="ridge"))
    with torch.no_grad():
        assert model(probe).isfinite().all()


def test_batches_of_ones_own_do_what_an_image_set_does(float_model: FloatModel, train_set: ImageSet) -> None:
    recipe = with_stage2(images=10)
    model = convert(copy.deepcopy(float_model.model), recipe)
    calibrate(model, train_set, recipe)
    own = copy.deepcopy(model)
    # As documented: as many images as the recipe says, drawn with its seed, in five batches.
    chosen = draw(len(train_set), 10, recipe.seed)
    batches = [torch.stack([train_set[index][0] for index in chosen[start : start + 2]]) for start in range(0, 10, 2)]
    assert quantize_weights(own, batches, recipe) == quantize_weights(model, train_set, recipe)
    for name, linear in integer_linears(model).items():
        assert torch.equal(integer_linears(own)[name].codes, linear.codes)


def test_batches_that_can_be_read_only_once_are_refused(float_model: FloatModel) -> None:
    for images in ([], iter([torch.zeros(1, 1, 16, 16)])):
        with pytest.raises(UsageError, match="several times: give it a list, with at least one batch"):
            quantize_weights(copy.deepcopy(float_model.model), images, with_stage2())
