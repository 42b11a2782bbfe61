"""What each token weighs, against gradients that are taken apart by hand."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import fast_recipe, make_model
from torch import Tensor, nn

from gplq import importance
from gplq.calibrate import calibrate
from gplq.convert import QuantLayer, convert, quant_layers
from gplq.data import ImageSet
from gplq.importance import token_importance
from gplq.layers import QuantConv, QuantPatchConv
from gplq.lsq import ActivationQuantizer
from gplq.moments import Moments
from gplq.stream import Call, input_rows

TOKENS = 17  # a class token and 4 x 4 patches


@pytest.fixture(scope="module")
def model(train_set: ImageSet) -> nn.Module:
    model = convert(make_model(), fast_recipe())
    calibrate(model, train_set, fast_recipe())
    return model


@pytest.fixture(scope="module")
def images(train_set: ImageSet) -> list[Tensor]:
    """Two batches, of which the first is too large for one backward pass."""
    inputs = torch.stack([train_set[index][0] for index in range(25)])
    return [inputs[:20], inputs[20:]]


@pytest.fixture(scope="module")
def found(model: nn.Module, images: list[Tensor]) -> dict[str, list[Tensor]]:
    with pytest.MonkeyPatch.context() as patch:
        # In BF16 some codes are others than by hand.
        patch.setattr(importance, "computes_in_bf16", lambda _: False)
        return token_importance(model, dict(quant_layers(model)), images, seed=3)


def gradient_by_hand(model: Any, linear: str, images: Tensor, projection: Tensor) -> Tensor:
    """Of the projected features by a linear's output, cut off from the graph in front of it."""
    leaves: list[Tensor] = []

    def cut(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        leaves.append(output.detach().requires_grad_())
        return leaves[-1]

    handle = model.get_submodule(linear).register_forward_hook(cut)
    features = model.forward_features(images)[:, 0]  # the class token behind the last norm
    handle.remove()
    return torch.autograd.grad((features * projection).sum(), leaves)[0]


@pytest.mark.parametrize(
    ("layer", "linears"),
    [
        ("blocks.0.mlp.fc1", ["blocks.0.mlp.fc1"]),
        ("blocks.1.attn.proj", ["blocks.1.attn.proj"]),
        ("blocks.0.attn", ["blocks.0.attn.q", "blocks.0.attn.k", "blocks.0.attn.v"]),
    ],
)
def test_importance_is_the_size_of_the_gradient(
    layer: str, linears: list[str], model: nn.Module, images: list[Tensor], found: dict[str, list[Tensor]]
) -> None:
    generator = torch.Generator().manual_seed(3)
    for batch, rows in zip(images, found[layer], strict=True):
        parts = [(part, torch.randn(len(part), 64, generator=generator)) for part in batch.split(16)]
        sizes = []
        for linear in linears:
            gradient = torch.cat([gradient_by_hand(model, linear, *part) for part in parts]).double().numpy()
            size = np.sqrt((gradient**2).mean(-1)).reshape(-1)
            sizes.append(size / size.mean())
        assert rows.shape == (len(batch) * TOKENS,)
        assert float(rows.mean()) == pytest.approx(1.1, rel=1e-5)
        np.testing.assert_allclose(rows.numpy(), np.mean(sizes, 0) + 0.1, rtol=1e-3, atol=1e-5)


def test_class_token_weighs_most_in_the_last_block(found: dict[str, list[Tensor]]) -> None:
    attention = torch.cat(found["blocks.1.attn"]).reshape(-1, TOKENS)
    assert (attention.argmax(1) == 0).all()
    assert (attention[:, 1:] > 0.1).all()  # through keys and values
    for name in ("blocks.1.attn.proj", "blocks.1.mlp.fc1", "blocks.1.mlp.fc2"):
        rows = torch.cat(found[name]).reshape(-1, TOKENS)
        assert (rows[:, 1:] == 0.1).all(), name  # no one reads what these layers make of the others
        assert (rows[:, 0] > 1).all(), name
    first = torch.cat(found["blocks.0.mlp.fc2"]).reshape(-1, TOKENS)
    assert (first[:, 1:] > 0.1).all()


def test_layer_without_a_gradient_is_left_out(model: nn.Module, found: dict[str, list[Tensor]]) -> None:
    assert {name for name, _ in quant_layers(model)} - found.keys() == {"head"}  # behind the features


def test_bf16_gives_about_the_same_weights(
    model: nn.Module, images: list[Tensor], found: dict[str, list[Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importance, "computes_in_bf16", lambda _: True)
    other = token_importance(model, dict(quant_layers(model)), images, seed=3)
    assert other.keys() == found.keys()
    for name, batches in found.items():
        ours, theirs = torch.cat(other[name]), torch.cat(batches)
        assert ours.dtype == torch.float32
        assert float((ours - theirs).norm() / theirs.norm()) < 0.2, name


def test_model_is_left_as_it_was(model: nn.Module, found: dict[str, list[Tensor]]) -> None:
    assert found
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


class Brightness(nn.Module):
    """A convolution each of whose pixels counts as much as its patch is bright."""

    def __init__(self, layer: QuantLayer, conv: nn.Conv2d) -> None:
        super().__init__()
        self.layer = layer
        self.sizes: Any = (conv.kernel_size, conv.stride, conv.padding)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, D, H', W']."""
        y: Tensor = self.layer(x)
        return y * F.avg_pool2d(x.detach(), *self.sizes).mean(1, keepdim=True)


@pytest.mark.parametrize(
    ("kind", "conv"),
    [
        (QuantPatchConv, nn.Conv2d(3, 512, 4, 4)),
        (QuantConv, nn.Conv2d(3, 512, 3, 2, 1)),
    ],
    ids=["patches", "overlapping"],
)
def test_pixels_of_a_convolution_are_in_the_order_of_its_input_rows(
    kind: type[QuantConv | QuantPatchConv], conv: nn.Conv2d
) -> None:
    generator = torch.Generator().manual_seed(0)
    model = Brightness(kind(conv, ActivationQuantizer(8, True, per_channel=False, kind="edge"), 8), conv)
    images = torch.rand(3, 3, 8, 20, generator=generator)
    images *= F.interpolate(torch.rand(3, 1, 2, 5, generator=generator), scale_factor=4)
    (rows,) = token_importance(model, {"layer": model.layer}, [images], seed=0)["layer"]
    bright = input_rows(model, model.layer, Call((images,), {})).mean(1)
    # Up to the random projection, of which each row is the mean over 512 outputs.
    torch.testing.assert_close(rows - 0.1, bright / bright.mean(), rtol=0.2, atol=0)
    assert float(bright.max() / bright.min()) > 3


class Gate(nn.Module):
    """A linear behind which nothing passes of dark images."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, 4] -> [B, N, 4]."""
        y: Tensor = self.layer(x)
        return y * (x.detach().amax((1, 2), keepdim=True) > 0)


def test_batch_in_which_nothing_matters_keeps_its_place() -> None:
    model: Any = Gate()
    batches = [torch.rand(2, 5, 4), -torch.rand(3, 5, 4), torch.rand(1, 5, 4)]
    found = token_importance(model, {"layer": model.layer}, batches, seed=0)["layer"]
    assert [len(rows) for rows in found] == [10, 15, 5]
    torch.testing.assert_close(found[1], torch.full((15,), 1.1))


class Twice(nn.Module):
    """A layer that runs on two inputs, as a detector's head on its levels."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 512)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, 4] -> [B, N, 512]."""
        first: Tensor = self.layer(x)
        other: Tensor = self.layer(x + 1)
        return first * x.detach().mean(-1, keepdim=True) + 9 * other


def test_of_several_calls_the_first_counts() -> None:
    model: Any = Twice()
    x = torch.rand(20, 5, 4, generator=torch.Generator().manual_seed(0))
    (rows,) = token_importance(model, {"layer": model.layer}, [x], seed=0)["layer"]
    expected = x.mean(-1).flatten()
    torch.testing.assert_close(rows - 0.1, expected / expected.mean(), rtol=0.2, atol=0)


def test_weighted_moments_are_those_of_the_definition() -> None:
    random = np.random.default_rng(0)
    x, d, w = random.normal(size=(300, 5)) + 3, random.normal(size=(300, 3)) - 1, random.uniform(0.1, 20, 300)
    moments = Moments()
    for part in (slice(0, 50), slice(50, 300)):
        moments.add(*(torch.from_numpy(array[part]) for array in (x, d, w)))
    one = np.c_[x, np.ones(300)]
    assert moments.weight == pytest.approx(w.sum())
    np.testing.assert_allclose(moments.xx.numpy(), (w * one.T) @ one / w.sum(), rtol=1e-12)
    np.testing.assert_allclose(moments.dx.numpy(), (w * d.T) @ one / w.sum(), rtol=1e-12)
    np.testing.assert_allclose(moments.dd.numpy(), w @ d**2 / w.sum(), rtol=1e-12)
    np.testing.assert_allclose(moments.inputs(centred=True).numpy(), np.cov(x.T, bias=True, aweights=w), atol=1e-12)
    correction = random.normal(size=(3, 6))
    expected = w @ ((d - one @ correction.T) ** 2).sum(1) / w.sum()
    assert moments.error(torch.from_numpy(correction)) == pytest.approx(expected)


def test_row_of_weight_three_is_three_rows() -> None:
    x = torch.randn(40, 5, generator=torch.Generator().manual_seed(0)) + 10
    counts = torch.arange(40) % 4 + 1
    weighted, repeated, plain = Moments(), Moments(), Moments()
    weighted.add(x, weights=counts.float())
    repeated.add(x.repeat_interleave(counts, 0))
    plain.add(x)
    torch.testing.assert_close(weighted.xx, repeated.xx, rtol=1e-6, atol=0)
    assert not torch.allclose(weighted.xx, plain.xx, rtol=1e-3, atol=0)
