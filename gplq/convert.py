"""Putting quantisers into a model by its structure: every linear, convolution and product of activations gets one.

:func:`convert` needs no code for a family of models: :mod:`gplq.survey` finds what a model multiplies. What stays in
floating point is listed with the reason (``Structure.floats``); norms, activations, embeddings and biases always do.

A converted model is divided into *units*, in the order in which they run: transformer blocks, and whatever multiplies
between them, such as Swin's patch merging. Stage 2 works unit by unit, and so does the proof of an export.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from timm.layers.attention import Attention
from torch import Tensor, nn

from gplq import ops
from gplq.errors import ModelError
from gplq.layers import QuantAttention, QuantConv, QuantLinear, QuantPatchConv, route_products
from gplq.lsq import ActivationQuantizer
from gplq.recipe import Recipe
from gplq.soundness import check_finite, check_layers, check_unchanged, make_plain
from gplq.survey import Survey, classifiers, input_size, output_samples, survey

QuantLayer = QuantLinear | QuantPatchConv | QuantConv | QuantAttention

# A linear from and to at most so many features (the heads that CaiT mixes) costs nothing, and has no redundancy that
# would forgive 4 bits.
_SMALL = 16


@dataclass
class Structure:
    """What :func:`convert` found and decided; names are those of ``named_modules``.

    Attributes:
        units: in order of execution.
        edges: layers of the first stage and the classifier, which get more bits.
        floats: linears and convolutions that stay in floating point, with the reason.
        order: all modules of the float model, in order of execution.
        image_size: channels, height and width of the images, in pixels.
    """

    units: list[str] = field(default_factory=list)
    edges: set[str] = field(default_factory=set)
    floats: dict[str, str] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)
    image_size: tuple[int, int, int] = (3, 224, 224)


def convert(model: nn.Module, recipe: Recipe, image_size: tuple[int, int, int] | None = None) -> nn.Module:
    """Replace, in place, whatever multiplies in a timm model by its quantised form; quantisers still pass through.

    Two images go through the model before and after: what a replaced layer computed beyond its weight and bias would
    otherwise be lost without a word.

    Args:
        model: any classifier or backbone whose products are linears, convolutions and attention.
        recipe: bits and granularity.
        image_size: channels, height and width of its images; what timm says, if None.

    Raises:
        ModelError: the model has a layer that is not supported or weights that are not finite, or computes something
            else once it is converted; the message names the layer. In the last case ``model`` has been changed.
    """
    model.eval()
    check_finite(model)
    make_plain(model)
    image_size = image_size or input_size(model)
    seen = survey(model, image_size)
    structure = plan(model, seen)
    check_layers(model, seen, structure.floats)
    aliases = _aliases(model)
    structure.image_size = image_size
    factory = _QuantizerFactory(recipe)
    for name, bias in seen.biases.items():
        _take_bias(model.get_submodule(name), bias)
    for name, count in seen.products.items():
        module = model.get_submodule(name)
        if is_plain_attention(module):
            _replace(model, aliases[name], factory.attention(module))
        else:
            route_products(module, count, factory.operand)
    whole = [name for name in seen.products if isinstance(model.get_submodule(name), QuantAttention)]
    for name in seen.layers:
        if name not in structure.floats and not any(name.startswith(f"{attention}.") for attention in whole):
            quantised = factory.layer(model.get_submodule(name), name in structure.edges, name in seen.behind_products)
            if isinstance(quantised, QuantLinear):
                quantised.applied_by_parent = name in seen.biases
            _replace(model, aliases[name], quantised)
    for name, module in model.named_modules():
        if hasattr(module, "name"):
            module.name = name
        if getattr(module, "inplace", False):  # would change what has been seen of a layer's output, or kept of it
            module.inplace = False
    model.gplq_structure = structure  # type: ignore[assignment]  # plain data beside the parameters
    inside = tuple(f"{name}." for name in whole)  # where the factor of the scores moves
    outside = {name: sample for name, sample in seen.samples.items() if not name.startswith(inside)}
    check_unchanged(outside, output_samples(model, image_size))
    return model


def _aliases(model: nn.Module) -> dict[str, list[str]]:
    """All names that a module has, by the first of them."""
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    return {found[0]: found for found in names.values()}


def _replace(model: nn.Module, names: list[str], by: nn.Module) -> None:
    for name in names:
        model.set_submodule(name, by)


def structure_of(model: nn.Module) -> Structure:
    """The structure of a converted model."""
    structure: Any = model.gplq_structure
    assert isinstance(structure, Structure)
    return structure


def units(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The units of a converted model in the order in which they run, with their names."""
    return [(name, model.get_submodule(name)) for name in structure_of(model).units]


def quant_layers(model: nn.Module) -> list[tuple[str, QuantLayer]]:
    """The layers of a converted model that own weights, with their names."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, QuantLayer)]


def is_plain_attention(module: nn.Module) -> bool:
    """Whether a module is the attention of a plain ViT, which becomes one that engines can fuse."""
    if type(module) is not Attention or module.gate is not None:
        return False
    # An adapter (LoRA) in the place of a linear computes more than the weight that it shows; its parts are quantised.
    if not all(isinstance(linear, nn.Linear) for linear in (module.qkv, module.proj)):
        return False
    # 1/sqrt(head_dim) goes into the query's weights, or into those of its norm.
    return isinstance(module.q_norm, nn.Identity) or isinstance(getattr(module.q_norm, "weight", None), Tensor)


def plan(model: nn.Module, seen: Survey) -> Structure:
    """Decide what is quantised and how the model is divided."""
    structure = Structure(order=seen.order)
    structure.edges = _edges(model, seen)
    for name in seen.layers:
        reason = _reason_to_stay_float(model.get_submodule(name), name in seen.constant, name in structure.edges)
        if reason is not None:
            structure.floats[name] = reason
    working = [name for name in seen.layers if name not in structure.floats and name not in structure.edges]
    found = _units(list(seen.products), working, structure.edges)
    position = {name: index for index, name in enumerate(seen.order)}
    structure.units = sorted(found, key=lambda name: position[name])
    return structure


def _reason_to_stay_float(layer: nn.Module, constant: bool, edge: bool) -> str | None:
    if constant:
        return "its input does not depend on the image, so that an export computes it once and for all"
    if isinstance(layer, nn.Linear):
        small = max(layer.in_features, layer.out_features) <= _SMALL and not edge
        return f"only {layer.in_features} inputs and {layer.out_features} outputs" if small else None
    assert isinstance(layer, nn.Conv2d)
    if layer.groups > 1:
        return f"a convolution in {layer.groups} groups: few multiplications, and no integer kernel that is faster"
    if QuantPatchConv.fits(layer) or QuantConv.fits(layer):
        return None
    return f"{type(layer).__name__} computes its weight or its padding anew on every call"


def _edges(model: nn.Module, seen: Survey) -> set[str]:
    """The layers that share a top-level module with the very first one, and those of the classifier."""
    edges: set[str] = set()
    if seen.layers:
        # A wrapper (a detector's body, a feature list) holds the whole network: descend until a stage is left.
        first = seen.layers[0].split(".")
        for depth in range(1, len(first) + 1):
            prefix = ".".join(first[:depth])
            if not any(name == prefix or name.startswith(f"{prefix}.") for name in seen.products):
                break
        edges |= {name for name in seen.layers if name == prefix or name.startswith(f"{prefix}.")}
    parts = {id(part) for head in classifiers(model) for part in head.modules()}
    edges |= {name for name in seen.layers if id(model.get_submodule(name)) in parts}
    if seen.layers and not hasattr(model, "get_classifier"):
        # A model of one's own does not tell its head; it is what runs last, outside of whatever has an attention.
        last = seen.layers[-1].split(".")[0]
        if not any(name.split(".")[0] == last for name in seen.products):
            edges |= {name for name in seen.layers if name.split(".")[0] == last}
    return edges


def _units(products: list[str], layers: list[str], edges: set[str]) -> set[str]:
    """Disjoint modules that together hold all ``products`` and ``layers`` and none of the ``edges``."""
    repeated = {f"{name}." for name in (_repeated(product) for product in products) if name}
    # A stage whose down-sampling has an attention of its own is no block.
    blocks = {name for name in repeated if not any(other != name and other.startswith(name) for other in repeated)}

    def covered(name: str, parts: set[str]) -> bool:
        return any(f"{name}.".startswith(part) for part in parts)

    others = blocks | {f"{edge}." for edge in edges}
    loose: set[str] = set()
    for name in [*products, *layers]:
        if not covered(name, blocks):
            part = f"{_repeated(name)}."
            if part == "." or any(other.startswith(part) for other in others):
                part = _largest_without(name, others)
            loose.add(part)
    outermost = {part for part in loose if not any(other != part and part.startswith(other) for other in loose)}
    return {part.removesuffix(".") for part in blocks | outermost}


def _repeated(name: str) -> str:
    """The nearest module around ``name`` that is an item of a list, such as ``blocks.3`` for ``blocks.3.mlp.fc1``."""
    parts = name.split(".")
    while parts and not parts[-1].isdigit():
        parts.pop()
    return ".".join(parts)


def _largest_without(name: str, others: set[str]) -> str:
    parts = name.split(".")
    for depth in range(1, len(parts)):
        part = ".".join(parts[:depth]) + "."
        if not any(other.startswith(part) for other in others):
            return part
    return f"{name}."


class _QuantizerFactory:
    """Makes quantisers and quantised layers as a recipe wants them."""

    def __init__(self, recipe: Recipe) -> None:
        self.bits, self.weight_bits, self.edge_bits = (
            recipe.activation_bits,
            recipe.weight_bits,
            recipe.first_last_bits,
        )
        self.matmul_bits = recipe.matmul_bits if recipe.quantizes_products() else None
        self.softmax_bits, self.softmax_scale = recipe.softmax_bits, recipe.softmax_scale
        self.per_channel = recipe.stage1.granularity == "per_channel"
        self.shift = recipe.calibration.shift

    def operand(self, signed: bool | None) -> nn.Module:
        """For a factor of a product: one scale; or nothing, if the recipe leaves products in floating point."""
        if self.matmul_bits is None:
            return nn.Identity()
        quantizer = ActivationQuantizer(self.matmul_bits, signed, per_channel=False, kind="matmul")
        quantizer.softmax_bits, quantizer.softmax_scale = self.softmax_bits, self.softmax_scale
        return quantizer

    def input(self, per_channel: bool = True) -> ActivationQuantizer:
        """For the input of a linear; one scale a channel only if the recipe wants it."""
        return ActivationQuantizer(self.bits, True, self.per_channel and per_channel, "linear")

    def attention(self, attention: Any) -> QuantAttention:
        """For a plain ViT's attention."""
        return QuantAttention(attention, self.input(), self.input(per_channel=False), self.operand, self.weight_bits)

    def layer(self, layer: nn.Module, edge: bool, behind_products: bool) -> QuantLayer:
        """For a linear or a convolution."""
        bits = self.edge_bits if edge else self.weight_bits
        if edge:
            quantizer = ActivationQuantizer(self.edge_bits, signed=True, per_channel=False, kind="edge")
        else:
            # Behind an attention's products no norm stands that could take a per-channel scale for free, and engines
            # fuse an attention only with one scale at its output.
            quantizer = self.input(per_channel=isinstance(layer, nn.Linear) and not behind_products)
        if isinstance(layer, nn.Linear):
            # What a shift adds, the bias takes away.
            quantizer.shiftable = self.shift and not edge and layer.bias is not None
            return QuantLinear(layer, quantizer, bits)
        assert isinstance(layer, nn.Conv2d)
        return (QuantPatchConv if QuantPatchConv.fits(layer) else QuantConv)(layer, quantizer, bits)


@torch.no_grad()
def _take_bias(linear: nn.Module, bias: Tensor | None) -> None:
    """Give a linear the bias that its parent would have added."""
    assert isinstance(linear, nn.Linear)
    linear.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach().clone()))


def check_supported(model: nn.Module) -> None:
    """Raise a :class:`ModelError` that names what of ``model`` cannot be quantised. Works on the meta device."""
    seen = survey(model.eval(), input_size(model))
    structure = plan(model, seen)
    check_layers(model, seen, structure.floats)
    if not structure.units:
        raise ModelError(
            f"{type(model).__name__} has neither attention nor linears inside: there is nothing to quantise."
        )


def mark_units(model: nn.Module) -> list[torch.utils.hooks.RemovableHandle]:
    """Name tensors for an export: what units are called with, and what the last one returns (:func:`input_name`)."""

    def mark(name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(
            ops.mark(arg, input_name(name, index)) if isinstance(arg, Tensor) else arg for index, arg in enumerate(args)
        )

    named = units(model)
    handles = [unit.register_forward_pre_hook(lambda _, args, name=name: mark(name, args)) for name, unit in named]
    name, last = named[-1]
    handles.append(last.register_forward_hook(lambda _, __, output: _mark_first(output, output_name(name))))
    return handles


def _mark_first(output: Any, name: str) -> Any:
    if isinstance(output, Tensor):
        return ops.mark(output, name)
    return type(output)((ops.mark(output[0], name), *output[1:]))


def input_name(unit: str, index: int = 0) -> str:
    """The exported name of a unit's tensor argument ``index``: ``<unit>.input``, ``<unit>.input_1`` and so on."""
    return f"{unit}.input_{index}" if index else f"{unit}.input"


def output_name(unit: str) -> str:
    """The exported name of what the last unit returns (of the first tensor, if it returns several)."""
    return f"{unit}.output"
