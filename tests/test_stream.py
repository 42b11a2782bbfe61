"""The arguments of each block are those that a forward pass of the whole model would give it."""

from typing import Any

import pytest
import timm
import torch
from conftest import make_model
from torch import Tensor, nn

from gplq.errors import ModelError
from gplq.integer import FrozenQuantizer
from gplq.layers import QuantConv, QuantLinear
from gplq.lsq import ActivationQuantizer
from gplq.stream import Call, Stream, execution_order, first_tensor, input_rows


class PooledBlock(nn.Module):
    """As in MViT: takes and returns the size of the feature map."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.factor = factor

    def forward(self, x: Tensor, size: list[int], rope: Tensor | None = None) -> tuple[Tensor, list[int]]:
        y = self.linear(x) + (0 if rope is None else self.factor * rope)
        return y, [size[0] + 1, size[1]]


class PooledModel(nn.Module):
    """Blocks chained by (x, size); the rope is the same tensor for all, or another one for each."""

    def __init__(self, own_rope: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([PooledBlock(index + 1.0) for index in range(3)])
        self.own_rope = own_rope

    def forward(self, images: Tensor) -> Tensor:
        x, size = images.flatten(2).transpose(1, 2), [2, 2]
        rope = torch.ones(8)
        for index, block in enumerate(self.blocks):
            x, size = block(x, size, rope=rope * index if self.own_rope else rope)
        return x.mean(1)


def tiny_swin() -> nn.Module:
    return timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=56, embed_dim=32, depths=(2, 1), num_heads=(1, 2), window_size=7
    )


MODELS: dict[str, tuple[Any, list[str], tuple[int, ...], int]] = {
    # model, its steps, the shape of an image, how often the model runs: once to look, then once for each fresh start
    "vit": (make_model, ["blocks.0", "blocks.1"], (1, 16, 16), 1),
    "swin": (
        tiny_swin,
        ["layers.0.blocks.0", "layers.0.blocks.1", "layers.1.downsample.reduction", "layers.1.blocks.0"],
        (3, 56, 56),
        2,  # only the norm of the patch merging stands between two steps
    ),
    "shared-rope": (lambda: PooledModel(False), ["blocks.0", "blocks.1", "blocks.2"], (8, 2, 2), 1),
    "own-rope": (lambda: PooledModel(True), ["blocks.0", "blocks.1", "blocks.2"], (8, 2, 2), 3),
}


@pytest.mark.parametrize("name", MODELS)
def test_calls_are_those_of_a_whole_forward_pass(name: str) -> None:
    torch.manual_seed(0)
    make, steps, shape, starts = MODELS[name]
    model = make().eval()
    images = [torch.randn(2, *shape) for _ in range(3)]
    runs = 0

    def count(*_: object) -> None:
        nonlocal runs
        runs += 1

    handle = model.register_forward_pre_hook(count)
    found: dict[str, list[Call]] = {}
    with torch.no_grad():
        stream = Stream(model, reversed(steps), lambda: iter(images))
        assert stream.steps == steps
        for step in stream.steps:
            assert stream.step == step
            found[step] = stream.calls
            for parameter in stream.module.parameters():  # the next step sees this one as it has become
                parameter.mul_(1.5)
            stream.advance()
        assert stream.calls == []
    handle.remove()
    assert runs == 1 + starts * len(images)
    for step in steps:
        expected: list[Call] = []
        handle = model.get_submodule(step).register_forward_pre_hook(
            lambda _, args, kwargs, expected=expected: expected.append(Call(args, kwargs)), with_kwargs=True
        )
        with torch.no_grad():
            for inputs in images:
                model(inputs)
        handle.remove()
        assert len(found[step]) == len(images)
        for actual, wanted in zip(found[step], expected, strict=True):
            torch.testing.assert_close(list(actual.args), list(wanted.args), rtol=0, atol=0)
            torch.testing.assert_close(actual.kwargs, wanted.kwargs, rtol=0, atol=0)


def test_step_that_never_runs_is_an_error() -> None:
    model = make_model()
    model.spare = nn.Linear(2, 2)  # type: ignore[assignment]
    with pytest.raises(ModelError, match="'spare' of this model is never run"):
        Stream(model, ["blocks.0", "spare"], lambda: iter([torch.zeros(1, 1, 16, 16)]))


def test_execution_order_is_not_that_of_definition() -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.second, self.first = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.second(self.first(x))
            return y

    assert execution_order(Backwards(), ["second", "first"], torch.zeros(1, 2)) == ["first", "second"]


def test_rows_are_the_inputs_of_the_linear() -> None:
    block = PooledBlock(1.0)
    quantizer = ActivationQuantizer(8, signed=True, per_channel=False, kind="linear")
    layer = block.linear = QuantLinear(block.linear, quantizer, 4)  # type: ignore[assignment,arg-type]
    x = torch.arange(48.0).reshape(2, 3, 8)
    call = Call((x, [2, 2]), {})
    torch.testing.assert_close(input_rows(block, layer, call), x.reshape(6, 8))
    assert first_tensor(call.run(block)).shape == (2, 3, 8)
    # Once frozen it passes codes; a shift in front of the quantiser is none of the linear's business.
    scale, factor = torch.tensor(1.0), torch.full((8,), 0.5)
    layer.input_quantizer = FrozenQuantizer(scale, factor, 8, False, "q", pre_shift=torch.tensor(4.0))
    torch.testing.assert_close(input_rows(block, layer, call), x.reshape(6, 8) / 2, rtol=0, atol=0.5)


def test_rows_of_a_convolution_are_its_patches() -> None:
    conv = nn.Conv2d(2, 3, 3, padding=1)
    layer = QuantConv(conv, ActivationQuantizer(4, signed=True, per_channel=False, kind="linear"), 4)
    x = torch.randn(2, 2, 5, 5)
    rows = input_rows(layer, layer, Call((x,), {}))
    expected = conv(x).flatten(2).transpose(1, 2).reshape(-1, 3)
    torch.testing.assert_close(rows @ conv.weight.flatten(1).T + conv.bias, expected)
