"""Weights into a model: as they are if they fit, else through timm's own filter for their family.

timm keeps for most families a function that gives older and original weights today's names, and resamples what depends
on the size of the image. It is the only judge here of what weights mean; what it changed in size is printed.
"""

import contextlib
import inspect
import re
import sys
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import timm.models
import torch
from timm.models import _builder
from torch import nn
from tqdm import tqdm

from gplq.errors import ModelError, first_line
from gplq.weights import Weights

# Of names that no model of timm has: whose they are, and what helps.
_FOREIGN = {
    r"(^|\.)lora_[AB]\b|\.base_layer\.": "an adapter (LoRA) that is not merged: call merge_and_unload(), then save",
    r"parametrizations\.": "weights under a parametrisation: call remove_parametrizations() of "
    "torch.nn.utils.parametrize, then save",
    r"\.weight_[gv]$": "weights under weight_norm: call torch.nn.utils.remove_weight_norm(), then save",
    r"\.weight_mask$": "weights under pruning: call torch.nn.utils.prune.remove(), then save",
    r"\.(weight_scale|weight_scale_inv|qweight|qzeros|SCB|absmax|quant_map)$": "weights that are quantised already: "
    "start from the float ones",
    r"^fc_norm\.": "those of a model with average pooling: --model-arg global_pool=avg",
    r"^reg_token$": "those of a model with registers: --model-arg reg_tokens=N",
    r"^dist_token$": "those of a distilled model: an --arch with 'distilled' in its name",
    r"\.ls1\.gamma$": "those of a model with layer scale: --model-arg init_values=1 (the weights replace the number)",
    r"encoder\.layer\.\d+\.|embeddings\.patch_embeddings\.": "the names of the package transformers: timm publishes "
    "the same weights under its own names (timm.list_pretrained())",
    r"encoder\.layers\.encoder_layer_\d+\.|^features\.\d+\.\d+\.": "the names of torchvision, whose weights do not fit "
    "timm's architectures",
}


@dataclass(frozen=True)
class Misfit:
    """How weights differ from what a model takes; empty if they fit."""

    missing: list[str]
    unexpected: list[str]
    reshaped: list[str]

    @classmethod
    def between(cls, model: nn.Module, weights: Weights) -> "Misfit":
        """Compare names and shapes."""
        expected = model.state_dict()
        return cls(
            sorted(expected.keys() - weights.keys()),
            sorted(weights.keys() - expected.keys()),
            sorted(key for key in expected.keys() & weights.keys() if expected[key].shape != weights[key].shape),
        )

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.reshaped)

    def sentence(self, model: nn.Module, weights: Weights) -> str:
        """What differs, the first of each kind by name."""
        details = [
            f"{len(names)} {what} (first: {names[0]})"
            for names, what in ((self.missing, "missing"), (self.unexpected, "unexpected"))
            if names
        ]
        if self.reshaped:
            name = self.reshaped[0]
            shapes = f"{list(weights[name].shape)}, the architecture's {list(model.state_dict()[name].shape)}"
            details.append(f"{len(self.reshaped)} of another shape (first: {name} {shapes})")
        for pattern, what in _FOREIGN.items():
            if any(re.search(pattern, name) for name in self.unexpected):
                return f"{', '.join(details)}. They are {what}."
        return f"{', '.join(details)}. Check --arch, --num-classes and --model-arg (for instance img_size=70)."


def load_weights(
    build: Callable[..., nn.Module], weights: Weights, where: str, sizes_given: Collection[str] = ()
) -> nn.Module:
    """A model with these weights: as they are if they fit, else through timm's own filter for their family.

    The filter knows older and original names of its family and resamples what depends on the size of the image. What
    it resampled is printed.

    Args:
        weights: by name, of any floating type.
        build: makes the model; with ``pretrained=True`` timm calls its loader, of which the filter is an argument.
        where: the file, for messages.
        sizes_given: the arguments of the architecture that the user named: without ``img_size``, weights for another
            size are refused rather than resampled.

    Raises:
        ModelError: the weights do not fit, or hold numbers that are not finite.
    """
    model = build()
    own = _without_left_over(model, weights)
    if not Misfit.between(model, own):
        _fill(model, own, where)
        return model
    return _through_filter(build, weights, where, sizes_given)


def _through_filter(
    build: Callable[..., nn.Module], weights: Weights, where: str, sizes_given: Collection[str]
) -> nn.Module:
    def load(model: nn.Module, *_: Any, filter_fn: Callable[..., Weights] | None = None, **__: Any) -> None:
        filtered = _filtered(model, weights, filter_fn, where)
        fitting = _without_left_over(model, _with_channels(model, filtered, where, sizes_given))
        misfit = Misfit.between(model, fitting)
        if misfit:
            raise ModelError(f"the weights in {where} do not fit the architecture: {misfit.sentence(model, fitting)}")
        resampled = {
            name: (list(weights[name].shape), list(tensor.shape))
            for name, tensor in filtered.items()
            if name in weights and weights[name].numel() != tensor.numel()
        }
        _allow(resampled, model, where, sizes_given)
        _fill(model, fitting, where)

    # No function of timm tells the filter of an architecture: it is an argument of this call.
    with _replaced(_builder, "load_pretrained", load):
        return build(pretrained=True)


@contextlib.contextmanager
def _replaced(module: Any, name: str, by: Any) -> Iterator[None]:
    original = getattr(module, name)
    setattr(module, name, by)
    try:
        yield
    finally:
        setattr(module, name, original)


def _filtered(model: nn.Module, weights: Weights, filter_fn: Callable[..., Weights] | None, where: str) -> Weights:
    if filter_fn is None:
        return weights
    takes_model = len(inspect.signature(filter_fn).parameters) > 1
    try:
        return dict(filter_fn(dict(weights), model) if takes_model else filter_fn(dict(weights)))
    except Exception as error:  # a filter stumbles over names and shapes that it does not expect in any way there is
        misfit = Misfit.between(model, weights)
        raise ModelError(
            f"the weights in {where} do not fit the architecture: {misfit.sentence(model, weights)} timm's own "
            f"conversion of them fails, too: {first_line(error).rstrip('.')}."
        ) from error


def _first_convs(model: nn.Module) -> list[str]:
    """Names of the weights that see the channels of an image."""
    named = _pretrained(model).get("first_conv") or ()
    return [f"{name}.weight" for name in ((named,) if isinstance(named, str) else named)]


def _pretrained(model: nn.Module) -> dict[str, Any]:
    found: Any = getattr(model, "pretrained_cfg", None) or {}
    return dict(found)


def classifier_names(model: nn.Module) -> list[str]:
    """Names of the modules that timm calls the classifier of an architecture."""
    named = _pretrained(model).get("classifier") or ()
    return [named] if isinstance(named, str) else list(named)


def classes_in(weights: Weights, model: nn.Module) -> int:
    """Of the classifier among ``weights``; 0 if there is none. Older files call a head's ``fc`` just ``head``."""
    for name in (*classifier_names(model), "head", "head.fc", "fc", "classifier"):
        for kind in ("weight", "bias"):
            if f"{name}.{kind}" in weights and weights[f"{name}.{kind}"].ndim:
                return int(weights[f"{name}.{kind}"].shape[0])
    return 0


def channels_in(weights: Weights, model: nn.Module) -> int | None:
    """Channels of the images that ``weights`` are for; None if that cannot be told."""
    expected = model.state_dict()
    for name in _first_convs(model):
        weight = weights.get(name)
        if weight is not None and name in expected and weight.ndim == expected[name].ndim == 4:
            return int(weight.shape[1])
    return None


def _with_channels(model: nn.Module, weights: Weights, where: str, given: Collection[str]) -> Weights:
    """Weights of three channels for another number of them, as timm makes them of its own; only if that was asked."""
    expected, adapted = model.state_dict(), dict(weights)
    for name in _first_convs(model):
        old, new = weights.get(name), expected.get(name)
        if old is None or new is None or old.ndim != 4 or new.ndim != 4 or "in_chans" not in given:
            continue
        if old.shape[1] == 3 != new.shape[1] and old.shape[2:] == new.shape[2:]:
            adapted[name] = timm.models.adapt_input_conv(new.shape[1], old.float())
            how = "the sum of the three" if new.shape[1] == 1 else "the three repeated"
            tqdm.write(f"{where}: {name} has 3 channels, the model {new.shape[1]}: {how}, as in timm", file=sys.stderr)
    return adapted


def _without_left_over(model: nn.Module, weights: Weights) -> Weights:
    """Weights without those of a classifier that ``model`` does not have, and without what timm computes itself."""
    expected = model.state_dict()
    heads = tuple(f"{name}." for name in classifier_names(model))
    if any(name.startswith(heads) for name in expected):
        heads = ()
    computed = dict(model.named_buffers()).keys() - expected.keys()
    return {name: tensor for name, tensor in weights.items() if not name.startswith(heads) and name not in computed}


def _allow(
    resampled: dict[str, tuple[list[int], list[int]]], model: nn.Module, where: str, given: Collection[str]
) -> None:
    for name, (old, new) in resampled.items():
        wanted = "patch_size" if name.startswith("patch_embed") else "img_size"
        if wanted in given or (wanted == "img_size" and "window_size" in given):
            continue
        size = _pixels(model, name, old)
        raise ModelError(
            f"{name} in {where} is {old}, the architecture's {new}: it was trained for another {wanted}. Give "
            f"--model-arg {wanted}={size or '…'} to use it as it was trained, or another size to have timm resample it."
        )
    for name, (old, new) in list(resampled.items())[:1]:
        more = f", and {len(resampled) - 1} more tensors" if len(resampled) > 1 else ""
        tqdm.write(f"{where}: {name} {old} resampled to {new} by timm{more}", file=sys.stderr)


def _pixels(model: Any, name: str, shape: list[int]) -> int | None:
    """The size of the square images that a position embedding [1, tokens, C] belongs to, if it can be told."""
    patch: Any = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    if name != "pos_embed" or len(shape) != 3 or not patch:
        return None
    prefix = 0 if getattr(model, "no_embed_class", False) else int(getattr(model, "num_prefix_tokens", 0))
    side = round((shape[1] - prefix) ** 0.5) if shape[1] > prefix else 0
    return side * int(patch[0]) if side and side * side == shape[1] - prefix else None


@torch.no_grad()
def _fill(model: nn.Module, weights: Weights, where: str) -> None:
    """Load, in FP32, what fits by name and shape.

    Raises:
        ModelError: a tensor is not one of finite numbers.
    """
    for name, target in model.state_dict().items():
        tensor = weights[name]
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta or tensor.is_complex():
            raise ModelError(f"{where}: {name} is no plain tensor of numbers ({tensor.dtype}, {tensor.layout}).")
        if not target.is_floating_point():
            continue
        if not tensor.is_floating_point():
            raise ModelError(f"{where}: {name} holds {tensor.dtype}: weights that are quantised already do not load.")
        values = tensor.float()
        wrong = int((~values.isfinite()).sum())
        if wrong:
            kind = "NaN" if bool(values.isnan().any()) else "infinite"
            raise ModelError(
                f"{where}: {wrong:,} of the {values.numel():,} numbers of {name} are {kind}. The training that wrote "
                "it diverged: take an earlier checkpoint."
            )
    model.load_state_dict(
        {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in weights.items()}
    )
