"""Converting a timm model, folding scales, and multiplying codes."""

import copy

import numpy as np
import pytest
import timm
import torch
from conftest import fast_recipe, make_model
from timm.layers import Conv2dSame
from timm.models import vision_transformer
from torch import Tensor, nn

from gplq import ops, stage2
from gplq.calibrate import calibrate
from gplq.convert import check_supported, convert
from gplq.data import ImageSet
from gplq.errors import ModelError
from gplq.fold import fold_channels
from gplq.integer import FrozenQuantizer, IntegerLinear, integer_layer, set_rounding
from gplq.layers import QuantConv, QuantPatchConv
from gplq.recipe import Recipe

VARIANTS = {
    "class-token": {},
    "average-pool": {"global_pool": "avg"},
    "qk-norm": {"qk_norm": True},
    "layer-scale": {"init_values": 0.1},
    "no-qkv-bias": {"qkv_bias": False},
    "pre-norm": {"pre_norm": True},
    "registers": {"reg_tokens": 2, "no_embed_class": True},
    "three-channels": {"in_chans": 3},
    "parallel-blocks": {"block_fn": vision_transformer.ParallelThingsBlock},
    "fused-blocks": {"block_fn": vision_transformer.ParallelScalingBlock},
    "post-norm-blocks": {"block_fn": vision_transformer.ResPostBlock},
    "attention-pool": {"global_pool": "map", "class_token": False},
    "rms-norm": {"norm_layer": "rmsnorm"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_converted_model_gives_the_float_logits(variant: str) -> None:
    model = make_model(**VARIANTS[variant])
    x = torch.randn(3, VARIANTS[variant].get("in_chans", 1), 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(x)
        actual = convert(copy.deepcopy(model), Recipe())(x)
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("variant", ["class-token", "qk-norm", "no-qkv-bias", "average-pool"])
@pytest.mark.parametrize("granularity", ["per_channel", "per_tensor"])
def test_folding_and_freezing_keep_the_logits_without_rounding(
    variant: str, granularity: str, train_set: ImageSet, probe: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The real freezing, but weights stay unrounded, so that nothing except the fold can change the logits.
    model = convert(make_model(**VARIANTS[variant]), fast_recipe(granularity=granularity))
    calibrate(model, train_set, fast_recipe())
    with torch.no_grad():
        for module in model.modules():
            if hasattr(module, "mode"):
                module.mode = "float"
        expected = model(probe)
        weights = {}

        def keep_float(
            _: object, name: str, __: object, weight: Tensor, bias: Tensor | None, ___: object
        ) -> IntegerLinear:
            weights[name] = weight.detach().clone()
            bias = None if bias is None else bias.detach().clone()
            return IntegerLinear(weights[name], torch.ones(len(weight)), bias, 8, name)

        # The fold is tested, not the rounding.
        monkeypatch.setattr(stage2._Stage2, "_rounded", keep_float)
        monkeypatch.setattr(stage2, "quantize_rows", lambda weight, scale, _: weight.detach() / scale[:, None])
        stage2.quantize_weights(model, train_set, fast_recipe())
        set_rounding(model, False)
        actual = model(probe)
    assert len(weights) == 12
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


def test_fold_moves_scales_exactly_when_they_are_powers_of_two() -> None:
    torch.manual_seed(0)
    norm, linear = nn.LayerNorm(8), nn.Linear(8, 3)
    scale = 2.0 ** torch.arange(-4, 4)
    x = torch.randn(5, 8)
    with torch.no_grad():
        before = linear(norm(x))
        assert fold_channels(scale, [linear], norm) is None
        torch.testing.assert_close(norm.weight, 1 / scale, rtol=0, atol=0)
        torch.testing.assert_close(linear(norm(x)), before, rtol=1e-6, atol=1e-6)
        factor = fold_channels(scale, [linear], None)
    assert factor is not None
    assert torch.equal(factor, 1 / scale)


def test_code_matmuls_are_exact() -> None:
    random = np.random.default_rng(0)
    a, b = random.integers(-8, 8, (2, 50, 2048)), random.integers(-8, 8, (40, 2048))
    weight_scale = np.exp2(random.integers(-6, 6, 40).astype(np.float64))  # products with powers of two do not round
    a32, b8 = torch.from_numpy(a).float(), torch.from_numpy(b).to(torch.int8)
    y = ops.linear(a32, torch.tensor(0.5), b8, torch.from_numpy(weight_scale).float(), None, 4, "y")
    np.testing.assert_array_equal(y.double().numpy(), (a @ b.T) * 0.5 * weight_scale)
    y = ops.matmul(a32, torch.tensor(0.5), torch.from_numpy(b.T).float().expand(2, -1, -1), torch.tensor(0.25), "y")
    np.testing.assert_array_equal(y.double().numpy(), (a @ b.T) * 0.125)


def test_frozen_leaves_compute_what_their_formula_says() -> None:
    random = np.random.default_rng(1)
    x = random.normal(size=(6, 32)).astype(np.float32)
    codes = random.integers(-8, 8, (5, 32))
    quantizer = FrozenQuantizer(torch.tensor(0.25), torch.full((32,), 2.0), 4, signed=True, name="q")
    linear = IntegerLinear(torch.from_numpy(codes).to(torch.int8), torch.full((5,), 0.5), torch.ones(5), 4, "l")
    expected = (np.clip(np.rint(x.astype(np.float64) * 2 / 0.25), -8, 7) @ codes.T) * 0.125 + 1
    np.testing.assert_array_equal(linear(quantizer(torch.from_numpy(x))).double().numpy(), expected)


@pytest.mark.parametrize(("kernel", "size"), [(4, 16), (4, 18), (3, 16)])
def test_patch_layer_is_the_convolution(kernel: int, size: int) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 8, kernel, stride=kernel)
    x = torch.randn(2, 3, size, size)
    with torch.no_grad():
        torch.testing.assert_close(QuantPatchConv(conv, nn.Identity(), 8)(x), conv(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("settings", [{"padding": 1}, {"stride": 2, "padding": 2, "dilation": 2}, {"bias": False}])
def test_convolution_on_codes_is_the_convolution(settings: dict[str, int]) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 8, 3, **settings)  # type: ignore[arg-type]
    codes = torch.randint(-8, 8, (2, 3, 12, 12)).float()
    conv.weight.data = torch.randint(-8, 8, conv.weight.shape).float()
    frozen = integer_layer(conv, conv.weight.to(torch.int8), torch.full((8,), 0.25), conv.bias, 4, "conv")
    with torch.no_grad():
        assert torch.equal(QuantConv(conv, nn.Identity(), 4)(codes), conv(codes))
        bias = 0 if conv.bias is None else conv.bias[:, None, None]
        expected = (conv(codes) - bias) * 0.125 + bias
        torch.testing.assert_close(frozen(ops.Codes(codes, torch.tensor(0.5))), expected, rtol=0, atol=1e-4)


def test_convolution_padded_as_tensorflow_does() -> None:
    torch.manual_seed(0)
    conv, x = Conv2dSame(3, 8, 3, stride=2), torch.randn(2, 3, 13, 13)
    with torch.no_grad():
        assert torch.equal(QuantConv(conv, nn.Identity(), 4)(x), conv(x))


@pytest.mark.parametrize(
    ("layer", "what"),
    [(nn.MultiheadAttention(64, 2), "MultiheadAttention"), (nn.ConvTranspose2d(4, 4, 2), "ConvTranspose2d")],
)
def test_unsupported_layer_is_refused_by_name(layer: nn.Module, what: str) -> None:
    model = make_model()
    model.blocks[1].mlp.extra = layer  # type: ignore[index,union-attr]
    with pytest.raises(ModelError, match=rf"layer 'blocks\.1\.mlp\.extra' \({what}\)"):
        convert(model, Recipe())


def test_product_that_cannot_be_routed_is_refused_by_name() -> None:
    class Einsum(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("bnc,bmc->bnm", x, x) @ x

    model = make_model()
    model.blocks[1].mlp.norm = Einsum()  # type: ignore[index,union-attr]
    with pytest.raises(ModelError, match=r"layer 'blocks\.1\.mlp\.norm' \(Einsum\) multiplies activations with einsum"):
        check_supported(model)


def test_model_without_products_and_linears_is_refused() -> None:
    with pytest.raises(ModelError, match="nothing to quantise"):
        check_supported(timm.create_model("test_vit", depth=0, num_classes=2, img_size=32))


def test_attention_mask_is_refused() -> None:
    model = convert(make_model(), Recipe())
    with pytest.raises(ModelError, match="attention masks"):
        model.blocks[0].attn(torch.zeros(1, 17, 64), attn_mask=torch.zeros(17, 17))  # type: ignore[index,union-attr]
