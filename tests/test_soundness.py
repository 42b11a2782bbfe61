"""A model is converted only if what it computes stays the same: what a layer does beyond its weights is not lost."""

import copy
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import make_model
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torchvision.models import SwinTransformer

from gplq.calibrate import calibrate_on
from gplq.convert import convert, quant_layers, structure_of
from gplq.errors import ModelError
from gplq.layers import QuantLinear
from gplq.recipe import Recipe
from gplq.stage2 import quantize_weights


class Adapter(nn.Module):
    """As PEFT's LoRA: it shows the weight and bias of the layer that it adapts."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.a = nn.Linear(base.in_features, 20, bias=False)
        self.b = nn.Linear(20, base.out_features, bias=False)

    weight = property(lambda self: self.base_layer.weight)
    bias = property(lambda self: self.base_layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.b(self.a(x))


class Scaled(nn.Linear):
    """A linear that computes more than its weight says."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 1.5


def images() -> Tensor:
    return torch.rand(4, 1, 16, 16, generator=torch.Generator().manual_seed(1))


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(images())
    return result


def part(model: nn.Module, name: str) -> Any:
    return model.get_submodule(name)


def replace(model: nn.Module, name: str, by: Callable[[Any], nn.Module]) -> nn.Module:
    model.set_submodule(name, by(part(model, name)))
    return model


def as_class(cls: Any) -> Callable[[Any], nn.Module]:
    def change(module: nn.Module) -> nn.Module:
        module.__class__ = cls
        return module

    return change


@pytest.mark.parametrize("name", ["blocks.0.attn.qkv", "blocks.0.attn.proj", "blocks.1.mlp.fc1", "head"])
def test_adapter_that_is_not_merged_is_kept(name: str) -> None:
    model = replace(make_model(), name, Adapter).eval()
    expected = outputs(model)
    converted = convert(model, Recipe())
    torch.testing.assert_close(outputs(converted), expected)
    assert {f"{name}.a", f"{name}.b", f"{name}.base_layer"} <= {found for found, _ in quant_layers(converted)}


@pytest.mark.parametrize("name", ["blocks.0.attn.qkv", "blocks.1.mlp.fc1"])
def test_parametrised_weights_become_plain_and_copies_stay_as_they_are(name: str) -> None:
    model = make_model()
    parametrizations.weight_norm(part(model, name))
    teacher, expected = copy.deepcopy(model), outputs(model)
    torch.testing.assert_close(outputs(convert(model, Recipe())), expected)
    assert torch.equal(outputs(teacher), expected)
    assert not any("parametrizations" in parameter for parameter, _ in model.named_parameters())


def test_layers_that_share_a_weight_get_one_each() -> None:
    model = make_model()
    part(model, "blocks.1.mlp.fc1").weight = part(model, "blocks.0.mlp.fc1").weight
    expected = outputs(model)
    recipe = Recipe.from_dict({"calibration": {"images": 16}, "stage2": {"images": 16}})
    torch.testing.assert_close(outputs(convert(model, recipe)), expected)
    first, second = (part(model, f"blocks.{index}.mlp.fc1").linear.weight for index in range(2))
    assert first is not second
    # Folding the scales of one into the weight does not change the other.
    batches = [images() for _ in range(4)]
    calibrate_on(model, lambda batch: model(batch), batches, 4, recipe)
    quantize_weights(model, batches, recipe)
    assert (outputs(model) - expected).norm() < 0.5 * expected.norm()


class Twice(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Any:
        return self.module(self.module(x))


@pytest.mark.parametrize(
    ("name", "layer"),
    [("blocks.0", r"blocks\.0\.module\.attn"), ("blocks.1.attn.proj", r"blocks\.1\.attn\.proj\.module")],
)
def test_what_runs_twice_is_refused_by_name(name: str, layer: str) -> None:
    with pytest.raises(ModelError, match=rf"layer '{layer}.*' .* runs more than once for an image"):
        convert(replace(make_model(), name, Twice), Recipe())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_layers_that_are_quantised_already_are_refused() -> None:
    model = torch.ao.quantization.quantize_dynamic(make_model(), {nn.Linear})
    with pytest.raises(ModelError, match=r"layer 'blocks\.0\.attn\.qkv' .* is quantised already"):
        convert(model, Recipe())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(value: float) -> None:
    model = make_model()
    part(model, "blocks.0.norm1").weight.data[3] = value
    with pytest.raises(ModelError, match=r"blocks\.0\.norm1\.weight of this model is not finite"):
        convert(model, Recipe())


def test_pruned_layers_are_refused_with_the_remedy() -> None:
    model = make_model()
    prune.l1_unstructured(part(model, "blocks.0.mlp.fc1"), "weight", 0.5)
    with pytest.raises(ModelError, match=r"'blocks\.0\.mlp\.fc1' is computed when it runs.*prune\.remove"):
        convert(model, Recipe())


def test_block_in_two_places_is_refused() -> None:
    model = make_model()
    model.blocks[1] = model.blocks[0]  # type: ignore[index,operator]
    with pytest.raises(ModelError, match=r"layer 'blocks\.0\.attn.*' .* runs more than once"):
        convert(model, Recipe())


def test_layer_with_two_names_is_replaced_under_both() -> None:
    model = make_model()
    model.another = model.head  # the network itself calls it by the first
    model.classify = types.MethodType(
        lambda self, x: self.another(self.forward_head(self.forward_features(x), True)), model
    )  # type: ignore[assignment]
    convert(model, Recipe())
    assert isinstance(model.head, QuantLinear)
    assert model.another is model.head


def hooked(layer: nn.Module) -> nn.Module:
    layer.register_forward_hook(lambda _, __, output: output * 2)
    return layer


def computed(layer: nn.Linear) -> nn.Module:
    half = layer.weight.detach() / 2
    del layer.weight
    layer.register_buffer("halved", half)
    layer.register_forward_pre_hook(lambda module, _: setattr(module, "weight", module.halved * 2))
    layer.weight = half * 2
    return layer


def patched(module: nn.Module) -> nn.Module:
    original = module.forward
    module.forward = lambda *args, **kwargs: original(*args, **kwargs) * 1.5  # type: ignore[method-assign]
    return module


@pytest.mark.parametrize("name", ["blocks.0.attn.qkv", "blocks.0.mlp.fc2", "head"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (hooked, "has a hook"),
        (computed, "the weight of layer '.*' is computed when it runs"),
        (patched, "the forward of layer '.*' was replaced"),
        (as_class(Scaled), r"\(Scaled\) computes in a way of its own"),
    ],
)
def test_layer_that_computes_more_than_its_weights_say_is_refused(
    name: str, change: Callable[[Any], nn.Module], message: str
) -> None:
    model = replace(make_model(), name, change)
    with pytest.raises(ModelError, match=message) as caught:
        convert(model, Recipe())
    assert name in str(caught.value)
    assert not quant_layers(model)  # before any work


@pytest.mark.parametrize("change", [hooked, patched])
def test_attention_that_computes_more_is_refused(change: Callable[[Any], nn.Module]) -> None:
    with pytest.raises(ModelError, match=r"'blocks\.1\.attn'"):
        convert(replace(make_model(), "blocks.1.attn", change), Recipe())


def test_difference_after_conversion_names_the_first_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever else goes wrong: what nobody foresaw shows in the outputs."""
    forward = QuantLinear.forward

    def wrong(self: QuantLinear, x: Tensor) -> Tensor:
        return forward(self, x) * (1.02 if self.linear.out_features == 256 else 1)

    monkeypatch.setattr(QuantLinear, "forward", wrong)
    with pytest.raises(ModelError, match=r"computes something else.* that of 'blocks\.0\.mlp\.fc1', by 0\.02 of its"):
        convert(make_model(), Recipe())


def test_torchvisions_swin_reads_the_weights_of_its_layers() -> None:
    torch.manual_seed(0)
    model = SwinTransformer(
        patch_size=[4, 4], embed_dim=32, depths=[2, 2], num_heads=[2, 4], window_size=[4, 4], num_classes=10
    ).eval()
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(convert(model, Recipe(), (3, 64, 64))(x), expected)


def test_head_of_a_model_of_ones_own_is_an_edge() -> None:
    class Regressor(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = make_model()
            self.backbone.reset_classifier(0)  # type: ignore[operator]
            self.head = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 1))

        def forward(self, x: Tensor) -> Any:
            return self.head(self.backbone(x))

    structure = structure_of(convert(Regressor(), Recipe(), (1, 16, 16)))
    assert structure.edges == {"backbone.patch_embed.proj", "head.0", "head.2"}
    assert structure.units == ["backbone.blocks.0", "backbone.blocks.1"]
