"""What calibration does beside choosing scales: centring, equalising, and shifting what a GELU returns."""

import copy
from collections import Counter
from typing import Any

import numpy as np
import pytest
import reference
import timm
import torch
import torch.nn.functional as F
from conftest import fast_recipe, make_model
from torch import Tensor, nn

from gplq.calibrate import activation_quantizers, calibrate, calibrate_on
from gplq.convert import convert
from gplq.data import ImageSet
from gplq.layers import QuantAttention, QuantLinear, QuantMatMul
from gplq.lsq import ActivationQuantizer
from gplq.recipe import Recipe


def ranges(attention: QuantAttention, run: object) -> tuple[Tensor, Tensor]:
    """Largest absolute values of each channel of queries and keys."""
    found: list[tuple[Tensor, Tensor]] = []
    handle = attention.qk.register_forward_pre_hook(lambda _, args: found.append(args))
    run()  # type: ignore[operator]
    handle.remove()
    q, k = found[0]
    return q.abs().amax((0, 2)).flatten(), k.abs().amax((0, 3)).flatten()


def test_equalising_changes_no_score_and_makes_ranges_equal(probe: Tensor) -> None:
    model = convert(make_model(), Recipe())
    attention = model.get_submodule("blocks.0.attn")
    assert isinstance(attention, QuantAttention)
    with torch.no_grad():
        attention.k.weight[3] *= 50  # an outlier channel
        expected = model(probe)
        query, key = ranges(attention, lambda: model(probe))
        assert float(key.max() / key.median()) > 10
        attention.equalize(query, key)
        torch.testing.assert_close(model(probe), expected, rtol=1e-4, atol=1e-5)
        query, key = ranges(attention, lambda: model(probe))
    torch.testing.assert_close(query, key, rtol=1e-4, atol=0)


def test_norms_of_queries_are_left_alone(probe: Tensor) -> None:
    model = convert(make_model(qk_norm=True), Recipe())
    attention = model.get_submodule("blocks.0.attn")
    assert isinstance(attention, QuantAttention)
    before = attention.q.weight.clone()
    attention.equalize(torch.ones(64), torch.full((64,), 4.0))
    assert torch.equal(attention.q.weight, before)


@pytest.mark.parametrize("equalize", [True, False])
def test_recipe_decides_about_equalising(equalize: bool, train_set: ImageSet) -> None:
    recipe = fast_recipe().to_dict()
    recipe["calibration"]["equalize"] = equalize
    model = convert(make_model(), Recipe.from_dict(recipe))
    attention = model.get_submodule("blocks.0.attn")
    assert isinstance(attention, QuantAttention)
    before = attention.q.weight.clone()
    calibrate(model, train_set, Recipe.from_dict(recipe))
    assert torch.equal(attention.q.weight, before) != equalize


def exact_attention(**changes: Any) -> tuple[nn.Module, QuantAttention]:
    """A converted model in FP64 and float mode, keys and values of which are far from zero; and an attention of it."""
    model = convert(make_model(**changes), Recipe()).double()
    attention = model.get_submodule("blocks.0.attn")
    assert isinstance(attention, QuantAttention)
    with torch.no_grad():
        for linear in (attention.k, attention.v):
            if linear.bias is not None:
                linear.bias += torch.arange(64) / 8 - 3
    return model, attention


@torch.no_grad()
def operands(model: nn.Module, attention: QuantAttention, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keys, values and what is projected, each [tokens of all images, heads * head_dim]; and the model's output."""
    found: dict[str, Tensor] = {}
    handles = [
        attention.qk.register_forward_pre_hook(lambda _, args: found.update(k=args[1].transpose(-2, -1))),
        attention.pv.register_forward_pre_hook(lambda _, args: found.update(v=args[1])),
        attention.proj.register_forward_pre_hook(lambda _, args: found.update(x=args[0])),
    ]
    output = model(inputs)
    for handle in handles:
        handle.remove()
    keys, values = (found[name].transpose(1, 2).reshape(-1, 64) for name in "kv")
    return keys, values, found["x"].reshape(-1, 64), output


def test_centring_changes_no_output_and_takes_the_means_away(probe: Tensor) -> None:
    model, attention = exact_attention()
    keys, values, _, expected = operands(model, attention, probe.double())
    assert min(float(x.mean(0).abs().max()) for x in (keys, values)) > 1
    attention.centre(keys.mean(0), values.mean(0))
    new_keys, new_values, _, output = operands(model, attention, probe.double())
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-9)
    for new, old in ((new_keys, keys), (new_values, values)):
        torch.testing.assert_close(new, old - old.mean(0), rtol=0, atol=1e-9)


@pytest.mark.parametrize("changes", [{}, {"qkv_bias": False}, {"qk_norm": True}])
def test_spreading_changes_no_output_and_makes_channels_of_one_size(changes: dict[str, Any], probe: Tensor) -> None:
    model, attention = exact_attention(**changes)
    with torch.no_grad():
        attention.v.weight[5] *= 30  # an outlier channel
        attention.v.weight[6:8] = 0  # and one that is never used
        if attention.v.bias is not None:
            attention.v.bias[6:8] = 0
    _, _, inputs, expected = operands(model, attention, probe.double())
    size = inputs.square().mean(0).sqrt()
    assert float(size.max() / size.median()) > 2
    attention.spread(size)
    _, _, inputs, output = operands(model, attention, probe.double())
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-9)
    after = inputs.square().mean(0).sqrt()
    used = size > 0
    assert int(used.sum()) == 62
    torch.testing.assert_close(after[used], size.mean().expand(62), rtol=1e-9, atol=0)
    assert (after[~used] == 0).all()


@pytest.mark.parametrize("size", [1e-9, 1e9])
def test_spreading_by_any_size_changes_no_output(size: float, probe: Tensor) -> None:
    model, attention = exact_attention()
    expected = operands(model, attention, probe.double())[-1]
    attention.spread(torch.where(torch.arange(64) == 9, size, 1.0).double())
    torch.testing.assert_close(operands(model, attention, probe.double())[-1], expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("changes", "centred"),
    [
        ({}, {"k.bias", "v.bias", "proj.linear.bias"}),
        ({"qk_norm": True}, {"v.bias", "proj.linear.bias"}),  # of what a norm returns nothing can be taken away
        ({"scale_attn_norm": True}, {"k.bias"}),  # nor added behind one
        ({"proj_bias": False}, {"k.bias"}),
        ({"qkv_bias": False}, set()),
    ],
    ids=lambda changes: next(iter(changes), "plain") if isinstance(changes, dict) else "",
)
def test_only_what_a_bias_can_take_is_centred(changes: dict[str, Any], centred: set[str], probe: Tensor) -> None:
    model, attention = exact_attention(**changes)
    before = {name: parameter.clone() for name, parameter in attention.named_parameters()}
    keys, values, _, expected = operands(model, attention, probe.double())
    attention.centre(keys.mean(0), values.mean(0))
    moved = {name for name, parameter in attention.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == centred
    torch.testing.assert_close(operands(model, attention, probe.double())[-1], expected, rtol=0, atol=1e-9)


def test_values_behind_a_norm_are_not_spread(probe: Tensor) -> None:
    _, attention = exact_attention(scale_attn_norm=True)
    before = copy.deepcopy(attention.state_dict())
    attention.spread(torch.arange(1.0, 65).double())
    assert all(torch.equal(tensor, before[name]) for name, tensor in attention.state_dict().items())


def calibration_with(**changes: Any) -> Recipe:
    recipe = fast_recipe()
    return recipe.model_copy(update={"calibration": recipe.calibration.model_copy(update=changes)})


@pytest.mark.parametrize("centre", [True, False])
def test_recipe_decides_about_centring(centre: bool, train_set: ImageSet, probe: Tensor) -> None:
    recipe = calibration_with(centre=centre, equalize=False)
    model = convert(make_model(), recipe)
    attention = model.get_submodule("blocks.1.attn")
    assert isinstance(attention, QuantAttention)
    with torch.no_grad():
        attention.k.bias.add_(3)
        attention.v.bias.add_(3)
    calibrate(model, train_set, recipe)
    keys, values, *_ = operands(model, attention, probe)
    assert [float(x.mean(0).abs().max()) < 0.5 for x in (keys, values)] == [centre, centre]


@pytest.mark.parametrize("importance", ["none", "gradient"])
def test_calibration_leaves_the_function_and_the_gradients_alone(
    importance: str, train_set: ImageSet, probe: Tensor
) -> None:
    recipe = calibration_with(importance=importance)
    model = convert(make_model(), recipe)
    with torch.no_grad():
        expected = model(probe)
    calibrate(model, train_set, recipe)
    for quantizer in activation_quantizers(model).values():
        assert quantizer.mode == "quantize"
        quantizer.mode = "float"
    with torch.no_grad():
        torch.testing.assert_close(model(probe), expected, rtol=1e-4, atol=1e-5)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def gelu_layer(channels: int = 16, per_channel: bool = True) -> tuple[QuantLinear, Tensor]:
    """A linear behind a GELU, calibrated, and what it was calibrated on."""
    torch.manual_seed(0)
    x = F.gelu(torch.randn(4096, channels) * torch.linspace(0.5, 2, channels))
    quantizer = ActivationQuantizer(4, signed=True, per_channel=per_channel, kind="linear")
    quantizer.shiftable = True
    layer = QuantLinear(nn.Linear(channels, 5), quantizer, 4)
    quantizer.mode = "observe"
    layer(x)
    quantizer.calibrate("mse", 1.0)
    return layer, x


@pytest.mark.parametrize("per_channel", [True, False])
def test_output_of_a_gelu_is_shifted_onto_the_unsigned_grid(per_channel: bool) -> None:
    layer, x = gelu_layer(per_channel=per_channel)
    quantizer = layer.input_quantizer
    assert isinstance(quantizer, ActivationQuantizer)
    assert quantizer.signed is False
    assert quantizer.shift == pytest.approx(0.17, abs=1e-3)
    assert np.float16(quantizer.shift) == quantizer.shift
    with torch.no_grad():
        found = layer(x)
        scale = quantizer.scale.numpy().astype(np.float64)
        shifted = x.numpy().astype(np.float64) + quantizer.shift
        codes = np.clip(np.rint(shifted.astype(np.float32) / scale.astype(np.float32)), 0, 15)
        weight, bias = (p.numpy().astype(np.float64) for p in (layer.linear.weight, layer.linear.bias))  # type: ignore[union-attr]
        expected = (codes * scale - quantizer.shift) @ weight.T + bias
    np.testing.assert_allclose(found.double().numpy(), expected, rtol=0, atol=1e-4)


def test_shift_halves_the_error_at_least() -> None:
    layer, x = gelu_layer()
    quantizer = layer.input_quantizer
    assert isinstance(quantizer, ActivationQuantizer)
    signed = ActivationQuantizer(4, signed=True, per_channel=True, kind="linear")
    signed.mode = "observe"
    signed(x)
    signed.calibrate("mse", 1.0)
    with torch.no_grad():
        error = (quantizer(x + quantizer.shift) - quantizer.shift - x).square().mean()
        assert error < 0.5 * (signed(x) - x).square().mean()
    # The independent grid agrees on what the signed one returns.
    codes = reference.quantize(x.numpy(), signed.scale.detach().numpy(), 4, signed=True)
    np.testing.assert_allclose(signed(x).detach().numpy(), codes * signed.scale.detach().numpy(), rtol=1e-6)


def test_only_inputs_that_hardly_go_below_zero_are_shifted(train_set: ImageSet) -> None:
    model = convert(make_model(), fast_recipe())
    calibrate(model, train_set, fast_recipe())
    shifted = [name for name, quantizer in activation_quantizers(model).items() if quantizer.shift]
    assert shifted == [f"blocks.{block}.mlp.fc2.input_quantizer" for block in (0, 1)]


def test_recipe_can_leave_the_shift_out(train_set: ImageSet) -> None:
    recipe = fast_recipe().to_dict()
    recipe["calibration"]["shift"] = False
    model = convert(make_model(), Recipe.from_dict(recipe))
    calibrate(model, train_set, Recipe.from_dict(recipe))
    assert not any(quantizer.shift for quantizer in activation_quantizers(model).values())


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("scale", "top"), [("learned", 0.8), ("full", 1.0)])
def test_probabilities_have_their_own_bits_and_scale(scale: str, top: float, transposed: bool) -> None:
    quantizer = ActivationQuantizer(8, signed=None, per_channel=False, kind="matmul")
    quantizer.softmax_bits, quantizer.softmax_scale, quantizer.mode = 5, scale, "observe"
    x = torch.linspace(0.2, 0.8, 64)
    quantizer(torch.stack([x, 1 - x], -2 if transposed else -1))
    quantizer.calibrate("minmax", 1.0)
    assert (quantizer.bits, quantizer.signed) == (5, False)
    assert float(quantizer.scale.detach()) == pytest.approx(top / 31, rel=1e-2)
    assert quantizer.raw_scale.requires_grad == (scale == "learned")


def test_probabilities_are_found_on_either_side_of_a_product() -> None:
    """LeViT multiplies p v, its convolutional twin v p^T."""
    for name in ("levit_128s", "levit_conv_128s"):
        torch.manual_seed(0)
        model = timm.create_model(name).eval()
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if key.endswith("attention_biases"):
                    parameter.normal_(std=3)  # else all tokens weigh the same, and columns sum to 1 as rows do
        recipe = Recipe.from_dict({"activation_bits": 4, "softmax_bits": 6})
        model = convert(model, recipe)
        calibrate_on(model, model, [torch.randn(1, 3, 224, 224)], 1, recipe)
        side = "a" if name == "levit_128s" else "b"
        found = {key for key, quantizer in activation_quantizers(model).items() if quantizer.bits == 6}
        assert found == {f"{key}.product_1.{side}_quantizer" for key, count in products(model).items() if count == 2}


def products(model: nn.Module) -> Counter[str]:
    """How many products each module has."""
    return Counter(key.rpartition(".")[0] for key, part in model.named_modules() if isinstance(part, QuantMatMul))


def test_what_is_not_a_probability_keeps_its_bits_and_unsigned_codes_fit_int8() -> None:
    quantizer = ActivationQuantizer(8, signed=None, per_channel=False, kind="matmul")
    quantizer.softmax_bits, quantizer.mode = 4, "observe"
    quantizer(torch.tensor([[0.25, 0.75]]))
    quantizer(torch.tensor([[0.25, 0.5]]))
    quantizer.calibrate("minmax", 1.0)
    assert (quantizer.bits, quantizer.signed) == (7, False)
    assert float(quantizer.scale.detach()) == pytest.approx(0.75 / 127)
