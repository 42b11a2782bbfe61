"""Stage 2: second-order rounding and the choice of scales."""

import copy
from typing import Any

import numpy as np
import pytest
import reference
import torch
from conftest import fast_recipe
from torch import Tensor

from gplq import stage2
from gplq.calibrate import calibrate
from gplq.checkpoint import frozen_quantizers, integer_linears
from gplq.data import ImageSet
from gplq.integer import IntegerLinear
from gplq.layers import convert, is_edge
from gplq.models import FloatModel
from gplq.recipe import Recipe


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
    codes = stage2.gptq_codes(weight, scale, (x.T @ x).double() / len(x), 4, 0.01)
    nearest = torch.from_numpy(reference.quantize(weight.numpy(), scale[:, None].numpy(), 4, signed=True))
    assert output_error(weight, codes, scale, x) < 0.6 * output_error(weight, nearest, scale, x)
    assert codes.dtype == torch.int8
    assert codes.min() >= -8
    assert codes.max() <= 7


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_gptq_with_uncorrelated_inputs_is_nearest(bits: int) -> None:
    weight = torch.randn(24, 48, generator=torch.Generator().manual_seed(bits))
    scale = weight.abs().amax(1) / (2 ** (bits - 1) - 1) * 0.8
    expected = reference.quantize(weight.numpy(), scale[:, None].numpy(), bits, signed=True)
    for moment in (torch.eye(48), torch.diag(torch.linspace(0.1, 9, 48))):
        codes = stage2.gptq_codes(weight, scale, moment, bits, 0.01)
        np.testing.assert_array_equal(codes.numpy(), expected)


def test_gptq_survives_inputs_that_are_always_zero() -> None:
    weight, x, scale = correlated_problem(0)
    x[:, ::3] = 0
    for moment in ((x.T @ x).double(), torch.zeros(48, 48)):
        codes = stage2.gptq_codes(weight, scale, moment, 4, 0.01)
        assert codes.min() >= -8
        assert codes.max() <= 7


def frozen(float_model: FloatModel, images: ImageSet, recipe: Recipe) -> torch.nn.Module:
    model = convert(copy.deepcopy(float_model.model), recipe)
    calibrate(model, images, recipe)
    stage2.quantize_weights(model, images, recipe)
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
        limit = 128 if is_edge(name) else 8
        assert linear.bits == (8 if is_edge(name) else 4)
        assert linear.codes.dtype == torch.int8
        assert -limit <= int(linear.codes.min()) < 0 < int(linear.codes.max()) <= limit - 1
    signs = {name: q.signed for name, q in quantizers.items()}
    assert [name for name, signed in signs.items() if not signed] == [
        f"blocks.{block}.attn.pv.a_quantizer" for block in (0, 1)
    ]
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


def test_second_moment_is_that_of_the_quantised_inputs(float_model: FloatModel, train_set: ImageSet) -> None:
    recipe = fast_recipe(granularity="per_tensor")
    model = convert(copy.deepcopy(float_model.model), recipe)
    calibrate(model, train_set, recipe)
    with torch.no_grad():
        stream = stage2._BlockInputs(model, train_set, recipe, 16)
        block = stage2.blocks(model)[0][1]
        layer = block.get_submodule("attn")
        moment = stream.second_moment(block, layer.q)
        norm1 = block.get_submodule("norm1")
        inputs = torch.cat([norm1(x) for x in stream.batches]).flatten(0, 1).numpy()
    scale = layer.input_quantizer.scale.detach().numpy()
    rows = reference.quantize(inputs, scale, 4, signed=True) * scale.astype(np.float64)
    assert len(rows) == 64 * 17
    np.testing.assert_allclose(moment.numpy(), rows.T @ rows / len(rows), rtol=1e-4, atol=1e-5)
