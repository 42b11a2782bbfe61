"""Weight files as people have them: read safely, and found wherever in the file they lie.

A file may wrap the weights of an architecture in dicts (``state_dict``), in prefixes (``module._orig_mod.``), or in
both (``teacher`` and ``backbone.``). All of these are one thing here: a *place*, the path of keys and prefixes in front
of the architecture's own names. :func:`find_weights` looks for those names, so that no kind of checkpoint needs code of
its own. :mod:`gplq.fitting` loads what was found into a model.
"""

import argparse
import pathlib
import pickletools
import re
import sys
import warnings
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import timm.models
import torch
from torch import Tensor
from tqdm import tqdm

from gplq.errors import ModelError

Weights = dict[str, Tensor]

# Averages of the weights over the training, which are the better ones: timm takes them if it is not told otherwise.
_AVERAGED = re.compile(r"(^|[._])(ema|teacher|swa)($|[._])")
# Where weights lie whose names tell nothing; in timm's order.
_USUAL = ("state_dict_ema", "model_ema", "state_dict", "model", "model_state_dict")
# What torch.compile, FSDP and activation checkpointing put in front of a module's names, wherever in the network it is.
_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
_DEEPEST = 8  # dicts within dicts; of a real checkpoint's weights at most four
# Plain data that training scripts store beside the weights: timm allows the first, and NumPy's numbers run no code.
_SAFE_GLOBALS: list[Any] = [
    argparse.Namespace,
    pathlib.PosixPath,
    np.dtype,
    np.ndarray,
    *sorted({type(np.dtype(kind)) for kind in np.typecodes["AllInteger"] + "?efdUS"}, key=str),
    *((np.float64(0).__reduce__()[0], f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    *((np.empty(0).__reduce__()[0], f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
]


@dataclass(frozen=True)
class Found:
    """What a file holds for an architecture.

    Attributes:
        weights: under the architecture's names, or under those that timm's filter for the family may know.
        place: where in the file they were; empty if they lay open.
        beside: tensors at no place, by their path in the file, without those of an optimiser; and those at another
            place that are lacking at this one, such as the classifier of raw weights beside EMA of a backbone.
    """

    weights: Weights
    place: str
    beside: Weights


def find_weights(path: Path, names: Collection[str], key: str | None = None) -> Found:
    """The weights in a file that have an architecture's names.

    What is done and not obvious is printed: which of several copies is taken, and what is not used.

    Args:
        path: safetensors, or what ``torch.save`` wrote.
        names: of the architecture's parameters and buffers, of its classifier too.
        key: the place, where there are several, such as ``state_dict``; by default averaged weights before raw ones.

    Raises:
        ModelError: the file is damaged, loading it would run code, or it is not clear which weights are meant.
    """
    tensors = dict(_tensors(read_plain_data(path)))
    if not tensors:
        raise ModelError(f"{path} does not hold a state dict (names of parameters and their tensors).")
    places = _places(tensors, names)
    foreign = not places  # not today's names of timm: its filter for the family may know them
    if foreign:
        places = [place for place in _USUAL if any(_is_inside(name, place) for name in tensors)] or [""]
        places = places if key is not None else places[:1]
    place = _choose(places, tensors, path, key)
    beside = {name: tensor for name, tensor in tensors.items() if not any(_is_inside(name, each) for each in places)}
    others = [each for each in places if each != place]
    _say_where(path, place, others, beside)
    weights = _inside(tensors, place)
    beside = {name: tensor for name, tensor in beside.items() if "optim" not in name.split(".")[0]}
    for other in others:
        lacking = {name: tensor for name, tensor in _inside(tensors, other).items() if name not in weights}
        beside |= {f"{other}.{name}" if other else name: tensor for name, tensor in lacking.items()}
    return Found(timm.models.clean_state_dict(weights) if foreign else weights, place, beside)


def read_plain_data(path: Path) -> Any:
    """What a safetensors file or a torch file holds, if that is tensors and plain data.

    Raises:
        ModelError: the file is damaged, or loading it would run code; the message names what is in the way.
    """
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}.") from error
    try:
        with warnings.catch_warnings(action="ignore"):  # what they say of a file, the message says
            if start[8:9] == b"{":  # whatever the name ends in: the length of a header, and the header
                return safetensors.torch.load_file(path)
            with torch.serialization.safe_globals(_SAFE_GLOBALS), path.open("rb") as file:
                return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # both readers raise types of their own for a damaged or hostile file, OSError too
        raise ModelError(f"{path} cannot be loaded safely: {_why_unreadable(path, start, error)}") from error


def _why_unreadable(path: Path, start: bytes, error: Exception) -> str:
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
        return re.findall(r"GLOBAL ([\w.]+)", text)[:1] or _called_first(path)


def _called_first(path: Path) -> list[str]:
    """The first class or function that a bare pickle (``pickle.dump``) of a later protocol asks for; runs nothing."""
    texts: list[str] = []
    try:
        with path.open("rb") as file:
            for operation, argument, _ in pickletools.genops(file):
                if operation.name == "STACK_GLOBAL":
                    return [".".join(texts[-2:])]
                if isinstance(argument, str):
                    texts.append(argument)
    except Exception:  # what it raises for whatever is no pickle
        pass
    return []


def _tensors(content: Any, path: str = "", depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    """All tensors in nested dicts and lists, by their path, such as ``state_dict.head.weight``."""
    if isinstance(content, Tensor) and path:
        yield ".".join(part for part in path.split(".") if part not in _WRAPPERS), content
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


def _say_where(path: Path, place: str, others: list[str], beside: Weights) -> None:
    rest = [f"'{other}'" for other in others]
    rest += [f"{name} ({count} tensors)" for name, count in Counter(name.split(".")[0] for name in beside).items()]
    averaged = ", averaged ones" if _AVERAGED.search(place) else ""
    if rest or averaged:
        unused = f"; not used: {', '.join(rest)}" if rest else ""
        tqdm.write(f"{path}: the weights at '{place}'{averaged}{unused}", file=sys.stderr)
