"""Weight files as people have them: read safely, found wherever in the file they lie, loaded as timm would load them.

A file may wrap the weights of an architecture in dicts (``state_dict``), in prefixes of names (``module._orig_mod.``), or
in both (``teacher`` / ``backbone.``). All of these are one thing here: a *place*, the path of keys and prefixes that
stands in front of the architecture's own names. :func:`find_weights` looks for it by those names, so that no kind of
checkpoint needs code of its own.
"""

import argparse
import contextlib
import inspect
import pathlib
import re
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import timm.models
import torch
from timm.models import _builder
from torch import Tensor, nn
from tqdm import tqdm

from gplq.errors import ModelError

Weights = dict[str, Tensor]

# Averages of the weights over the training, which are the better ones: timm takes them if it is not told otherwise.
_AVERAGED = re.compile(r"(^|[._])(ema|teacher|swa)($|[._])")
_DEEPEST = 8  # dicts within dicts; of a real checkpoint's weights at most four
# Plain data that training scripts store beside the weights: timm allows the first, and NumPy's numbers run no code.
_SAFE_GLOBALS: list[Any] = [
    argparse.Namespace,
    pathlib.PosixPath,
    np.dtype,
    np.ndarray,
    *sorted({type(np.dtype(kind)) for kind in np.typecodes["AllInteger"] + "?efd"}, key=str),
    *((np.float64(0).__reduce__()[0], f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    *((np.empty(0).__reduce__()[0], f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
]
# Of names that no model of timm has: whose they are, and what helps.
_FOREIGN = {
    r"(^|\.)lora_[AB]\b|\.base_layer\.": "an adapter (LoRA) that is not merged: call merge_and_unload(), then save",
    r"parametrizations\.": "weights under a parametrisation: call torch.nn.utils.parametrize.remove_parametrizations(), "
    "then save",
    r"\.weight_[gv]$": "weights under weight_norm: call torch.nn.utils.remove_weight_norm(), then save",
    r"\.(weight_scale|weight_scale_inv|qweight|qzeros|SCB|absmax|quant_map)$": "weights that are quantised already: "
    "start from the float ones",
    r"encoder\.layer\.\d+\.|embeddings\.patch_embeddings\.": "the names of the package transformers: timm publishes the "
    "same weights under its own names (timm.list_pretrained())",
    r"encoder\.layers\.encoder_layer_\d+\.|^features\.\d+\.\d+\.": "the names of torchvision, whose weights do not fit "
    "timm's architectures",
}


def find_weights(path: Path, names: Collection[str], key: str | None = None) -> tuple[Weights, str]:
    """The weights in a file, under an architecture's names, and the place in the file where they were.

    What is done and not obvious is printed: which of several copies is taken, and what is not used.

    Args:
        path: safetensors, or what ``torch.save`` wrote.
        names: of the architecture's parameters and buffers, of its classifier too.
        key: the place, where there are several, such as ``state_dict``; by default averaged weights before raw ones.

    Raises:
        ModelError: the file is damaged, loading it would run code, or it is not clear which weights are meant.
    """
    content = read_plain_data(path)
    tensors = dict(_tensors(content))
    if not tensors:
        raise ModelError(f"{path} does not hold a state dict (names of parameters and their tensors).")
    places = _places(tensors, names)
    if not places:  # none of timm's names of today: its filter for the family may know them
        if key is not None:
            raise ModelError(f"{path} has no weights of this architecture at '{key}', nor anywhere else.")
        known = {"state_dict_ema", "model_ema", "state_dict", "model", "model_state_dict"}
        places = [place for place in dict.fromkeys(name.split(".")[0] for name in tensors) if place in known][:1] or [
            ""
        ]
    place = _choose(places, tensors, path, key)
    found = _inside(tensors, place)
    if places == [""] and not found.keys() & set(names):
        found = timm.models.clean_state_dict(found)
    _say_where(path, place, places, tensors)
    return found, place


def read_plain_data(path: Path) -> Any:
    """What a safetensors file or a torch file holds, if that is tensors and plain data.

    Raises:
        ModelError: the file is damaged, or loading it would run code; the message names what is in the way.
    """
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        with torch.serialization.safe_globals(_SAFE_GLOBALS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}.") from error
    except Exception as error:  # both readers raise types of their own for a damaged or hostile file
        raise ModelError(f"{path} cannot be loaded safely: {_why_unreadable(path, error)}") from error


def _why_unreadable(path: Path, error: Exception) -> str:
    with path.open("rb") as file:
        start = file.read(64)
    if not start:
        return "it is empty."
    if start.startswith(b"version https://git-lfs"):
        return "it is the placeholder of Git LFS, not the file itself: fetch it with 'git lfs pull'."
    if start.lstrip()[:1] == b"<":
        return "it is a web page, not what was to be downloaded."
    text = str(error)
    if "TorchScript" in text:
        return "it is a TorchScript program. Save its weights alone: torch.save(model.state_dict(), 'weights.pth')."
    blocked = _blocked(path, text)
    if any(name.startswith(("torch.nn.modules.", "timm.")) for name in blocked):
        return (
            f"it holds a whole model ({blocked[0]} …), which is code. Where it was made, save its weights alone: "
            "torch.save(model.state_dict(), 'weights.pth')."
        )
    if blocked:
        return (
            f"beside tensors and plain data it holds {', '.join(blocked)}, which only running code could restore. If "
            f"you trust the file, keep its weights alone: content = torch.load('{path.name}', weights_only=False); "
            "torch.save(content['state_dict'], 'weights.pth')."
        )
    return (
        "it is damaged, not complete, or of another kind. Only safetensors, and torch files of tensors and plain data, "
        "are accepted."
    )


def _blocked(path: Path, text: str) -> list[str]:
    """Names of the classes and functions that a torch file asks for and that are not allowed."""
    try:
        with torch.serialization.safe_globals(_SAFE_GLOBALS):
            found = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
        return sorted(found)
    except Exception:  # what it raises for a file of before 2020, or a damaged one; then the message names the first
        return re.findall(r"GLOBAL ([\w.]+)", text)[:1]


def _tensors(content: Any, path: str = "", depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    """All tensors in nested dicts and lists, by their path, such as ``state_dict.head.weight``."""
    if isinstance(content, Tensor) and path:
        yield path, content
    elif isinstance(content, dict | list | tuple) and depth < _DEEPEST:
        for key, value in content.items() if isinstance(content, dict) else enumerate(content):
            yield from _tensors(value, f"{path}.{key}" if path else str(key), depth + 1)


def _inside(tensors: Weights, place: str) -> Weights:
    return {name.removeprefix(f"{place}."): tensor for name, tensor in tensors.items() if _is_inside(name, place)}


def _is_inside(name: str, place: str) -> bool:
    return not place or name.startswith(f"{place}.")


def _places(tensors: Weights, names: Collection[str]) -> list[str]:
    """Where the architecture's names are found, nearly as many as anywhere; none if these are few."""
    names = set(names)
    counts: Counter[str] = Counter()
    for name in tensors:
        parts = name.split(".")
        for depth in range(len(parts)):
            if ".".join(parts[depth:]) in names:
                counts[".".join(parts[:depth])] += 1
    most = max(counts.values(), default=0)
    if most < len(names) / 3:
        return []
    return [place for place, count in counts.items() if count >= 0.9 * most]


def _choose(places: list[str], tensors: Weights, path: Path, key: str | None) -> str:
    if key is not None:
        matching = [place for place in places if place == key or place.startswith(f"{key}.")]
        if len(matching) == 1:
            return matching[0]
        found = ", ".join(f"'{place}'" for place in places)
        raise ModelError(
            f"{path} has {len(matching) or 'no'} weights of this architecture at '{key}'; it has: {found}."
        )
    averaged = [place for place in places if _AVERAGED.search(place)]
    best = averaged or places
    # The same tensors under two names are no question.
    different = [place for place in best[1:] if not _same(_inside(tensors, place), _inside(tensors, best[0]))]
    if different:
        found = ", ".join(f"'{place}'" for place in best)
        raise ModelError(f"{path} has weights of this architecture at {found}: choose one with --checkpoint-key.")
    return best[0]


def _same(one: Weights, other: Weights) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def _say_where(path: Path, place: str, places: list[str], tensors: Weights) -> None:
    rest = Counter(
        next((f"'{other}'" for other in places if other != place and _is_inside(name, other)), name.split(".")[0])
        for name in tensors
        if not _is_inside(name, place)
    )
    beside = f"; not used: {', '.join(f'{name} ({count} tensors)' for name, count in rest.items())}" if rest else ""
    averaged = ", averaged ones" if _AVERAGED.search(place) else ""
    if beside or averaged:
        tqdm.write(f"{path}: the weights at '{place}'{averaged}{beside}", file=sys.stderr)


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
            for name, tensor in fitting.items()
            if name in weights and weights[name].numel() != tensor.numel() and name not in _first_convs(model)
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
            f"conversion of them fails, too: {error or type(error).__name__}."
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
                f"{where}: {wrong:,} of the {values.numel():,} numbers of {name} are {kind}. The training that wrote it "
                "diverged: take an earlier checkpoint."
            )
    model.load_state_dict(
        {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in weights.items()}
    )
