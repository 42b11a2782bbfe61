"""What calibration does beside choosing scales: equalising queries and keys, and shifting what a GELU returns."""

from collections import Counter

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
