"""Which channels of a model can be mixed: a data flow that is found by watching one forward pass.

Every activation belongs to a *stream*: the tensors whose channels must be the same ones because the model adds,
concatenates or otherwise combines them, such as a residual stream. A stream can be expressed in another basis if
whatever writes to it and whatever reads it can take the change of basis into its weights.

Watched are PyTorch's functions, through a ``TorchFunctionMode``. Linears, convolutions, norms and multiplications by a
parameter (LayerScale) begin a new stream. Of every other function it is tried out whether it commutes with a change of
basis, ``f(x A) = f(x) A``, on the very tensors that it is called with: a slice, a sum, a mean over tokens, a shift of
windows all do. One that does not *pins* the streams that it reads, with a sentence that says which function it was.
No family of models needs code of its own, and no function has to be listed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from torch.utils.weak import WeakIdKeyDictionary

from gplq.fold import norm_channels
from gplq.survey import bind_linear, hooked
from gplq.transforms.orthogonal import reflect

# Two results in FP64 that differ by more than this share of the largest value are two. Sums in another order differ by
# 1e-15; what has been through FP32 inside (some norms and rotary embeddings) by 1e-7.
TOLERANCE = 1e-6
_MULTIPLY = frozenset({"mul", "mul_", "multiply", "__mul__", "__rmul__", "__imul__"})


@dataclass(eq=False)
class Stream:
    """Tensors that share their channels. All names are those of ``named_modules`` or ``named_parameters``.

    Attributes:
        size: C, the number of channels.
        writers: linears and convolutions whose output is part of it.
        readers: linears and convolutions whose input is part of it.
        embeddings: parameters that are part of it, with the axis of their channels, counted from the end.
        norms: norms that read it.
        normed_by: norms whose output is part of it.
        scaled_by: parameters [C] that multiply it channel by channel, with the stream of the product.
        scaled_to: parameters [C] a product with which is part of it, with the stream of the other factor.
        pins: why its basis cannot change.
    """

    size: int
    writers: set[str] = field(default_factory=set)
    readers: set[str] = field(default_factory=set)
    embeddings: dict[str, int] = field(default_factory=dict)
    norms: dict[str, "Stream"] = field(default_factory=dict)
    normed_by: set[str] = field(default_factory=set)
    scaled_by: dict[str, "Stream"] = field(default_factory=dict)
    scaled_to: dict[str, "Stream"] = field(default_factory=dict)
    pins: list[str] = field(default_factory=list)
    merged: "Stream | None" = None

    @property
    def is_residual(self) -> bool:
        """Whether several layers add up in it."""
        return len(self.writers) + len(self.embeddings) + len(self.normed_by) + len(self.scaled_to) > 1

    def root(self) -> "Stream":
        """The stream that this one has been merged into, or itself."""
        return self if self.merged is None else self.merged.root()

    def merge(self, other: "Stream") -> "Stream":
        """Make one stream of two; returns it."""
        one, two = self.root(), other.root()
        if one is two:
            return one
        for name in ("writers", "readers", "embeddings", "norms", "normed_by", "scaled_by", "scaled_to"):
            getattr(one, name).update(getattr(two, name))
        one.pins += [pin for pin in two.pins if pin not in one.pins]
        two.merged = one
        return one


def find_streams(model: nn.Module, images: Tensor) -> list[Stream]:
    """The residual streams of ``model``, in evaluation mode and FP64, in the order of the first norm that reads each.

    The model's weights should not be special (no zeros where trained ones are not zero): what they hide is not seen.
    """
    watch = _Watch(model)
    with torch.no_grad(), watch.watching():
        output = model(images)
    for leaf in tree_leaves(output):
        watch.pin(leaf, "the model returns it")
    return [stream for stream in dict.fromkeys(stream.root() for stream in watch.normed) if stream.is_residual]


# A stream and the axis of its channels in a tensor.
_Place = tuple[Stream, int]


class _Watch(TorchFunctionMode):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.modules = {id(module): name for name, module in model.named_modules()}
        self.parameters = {id(parameter): name for name, parameter in model.named_parameters()}
        layers = [module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
        self.layers: dict[int, nn.Module] = {id(layer.weight): layer for layer in layers}
        self.places: Any = WeakIdKeyDictionary()
        self.inputs: dict[str, Stream] = {}
        self.outputs: dict[str, Stream] = {}
        self.embeddings: dict[str, _Place] = {}
        self.normed: list[Stream] = []
        self.stack: list[nn.Module] = [model]
        self.paused = False

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Install the mode and a hook on every module."""
        with hooked(self.model, self._enter, self._leave), self:
            yield

    def pin(self, tensor: Any, reason: str) -> None:
        """Note that the basis of a tensor's stream cannot change."""
        place = self._place(tensor)
        if place is not None and reason not in place[0].pins:
            place[0].pins.append(reason)

    def _place(self, tensor: Any) -> _Place | None:
        place: _Place | None = self.places.get(tensor) if isinstance(tensor, Tensor) else None
        return None if place is None else (place[0].root(), place[1])

    def _enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self.paused:
            return
        self.stack.append(module)
        self.paused = _is_norm(module)  # its inside is its own affair

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.stack[-1] is not module:
            return
        self.stack.pop()
        if _is_norm(module):
            self._see_norm(module, args[0], output)
            self.paused = False

    def _see_norm(self, norm: nn.Module, x: Tensor, output: Any) -> None:
        name, place = self.modules[id(norm)], self._place(x)
        if not isinstance(output, Tensor):
            return
        after = self.outputs.setdefault(name, Stream(norm_channels(norm) or 0))
        after.root().normed_by.add(name)
        if place is None:
            return
        before, axis = place
        plain = {key: torch.full_like(p, float(key == "weight")) for key, p in norm.named_parameters()}
        expected = reflect(torch.func.functional_call(norm, plain, (x,)), axis)
        found = torch.func.functional_call(norm, plain, (reflect(x, axis),))
        if before.size != after.size or found.shape != expected.shape or not agree(found, expected):
            self.pin(x, f"'{name}' ({type(norm).__name__}) is no norm over its channels")
            return
        before.norms[name] = after.root()
        self.normed.append(before)
        self.places[output] = (after.root(), axis)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Do the call, and note which streams it joins, ends or begins."""
        kwargs = kwargs or {}
        if self.paused:
            return func(*args, **kwargs)
        if func is F.linear or func is torch.conv2d:
            x, weight, bias = bind_linear(*args[:3], **kwargs) if func is F.linear else _bind_conv(*args, **kwargs)
            if id(weight) in self.layers:
                y = func(*args, **kwargs)
                self._see_layer(self.layers[id(weight)], x, bias, y)
                return y
        if getattr(func, "__name__", "") in _MULTIPLY:
            scale = next((x for x in args if id(x) in self.parameters and x.ndim == 1), None)
            factors = [(x, self._place(x)) for x in args if x is not scale]
            place = factors[0][1]
            if scale is not None and place is not None and (place[0].size, place[1]) == (len(scale), -1):
                return self._see_scale(func, args, scale, place)
        return self._see_other(func, args, kwargs)

    def _see_layer(self, layer: nn.Module, x: Tensor, bias: Tensor | None, y: Tensor) -> None:
        name, axis = self.modules[id(layer)], -1 if isinstance(layer, nn.Linear) else -3
        place = self._place(x)
        if place is not None:
            stream = place[0].merge(self.inputs.setdefault(name, Stream(place[0].size)))
            stream.readers.add(name)
            if place[1] != axis:
                self.pin(x, f"'{name}' reads it across another axis than its channels")
            elif getattr(layer, "groups", 1) != 1:
                self.pin(x, f"'{name}', a convolution in groups, reads it")
        written = self.outputs.setdefault(name, Stream(y.shape[axis])).root()
        written.writers.add(name)
        self.places[y] = (written, axis)
        if getattr(layer, "groups", 1) != 1:
            self.pin(y, f"'{name}', a convolution in groups, writes it")
        if bias is not layer.bias:
            self.pin(y, f"'{name}', which writes it, gets its bias from elsewhere")

    def _see_scale(self, func: Any, args: Any, scale: Tensor, place: _Place) -> Tensor:
        """LayerScale: each channel has its own factor, which no change of basis commutes with."""
        y: Tensor = func(*args)
        before, axis = place
        name = self.parameters[id(scale)]
        after = self.outputs.setdefault(name, Stream(before.size)).root()
        before.scaled_by[name] = after
        after.scaled_to[name] = before
        self.places[y] = (after, axis)
        return y

    def _see_other(self, func: Any, args: Any, kwargs: Any) -> Any:
        name = getattr(func, "__name__", str(func))
        in_place = name.startswith("__i") or name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))
        result = None if in_place else func(*args, **kwargs)
        if not in_place and not any(isinstance(leaf, Tensor) for leaf in tree_leaves(result)):
            return result  # a shape, a data type
        leaves, spec = tree_flatten((args, kwargs))
        places = self._places_of(leaves)
        if not places:
            return func(*args, **kwargs) if in_place else result
        copies = [leaf.clone() if in_place and isinstance(leaf, Tensor) else leaf for leaf in leaves]
        for index, (_, axis) in places.items():
            copies[index] = reflect(copies[index], axis)
        streams = [stream for stream, _ in places.values()]
        same = len({stream.size for stream in streams}) == 1 and not any(stream.pins for stream in streams)
        found = None
        if same:
            turned_args, turned_kwargs = tree_unflatten(copies, spec)
            found = func(*turned_args, **turned_kwargs)
        result = func(*args, **kwargs) if in_place else result
        if not (same and self._follow(streams[0].size, streams, found, result)):
            self._pin_all([leaves[index] for index in places], name.strip("_"), streams)
        return result

    def _pin_all(self, tensors: list[Tensor], func: str, streams: list[Stream]) -> None:
        where = self.modules[id(self.stack[-1])] or type(self.model).__name__
        known = next((pin for stream in streams for pin in stream.pins), None)
        for tensor in tensors:
            place = self._place(tensor)
            if place is not None and not place[0].pins:
                cause = "does not commute with a rotation" if known is None else f"joins it with a stream where {known}"
                self.pin(tensor, f"{func}() in '{where}' {cause}")

    def _places_of(self, leaves: list[Any]) -> dict[int, _Place]:
        """Streams of the arguments, by their index; parameters join at the same axis as the activation beside them."""
        places = {index: place for index, leaf in enumerate(leaves) if (place := self._place(leaf)) is not None}
        known = next(iter(places.values()), None)
        for index, leaf in enumerate(leaves):
            name = self.parameters.get(id(leaf))
            if name is None or leaf.ndim == 0:
                continue
            axis = -1
            if known is not None and leaf.ndim >= -known[1] and leaf.shape[known[1]] == known[0].size:
                axis = known[1]
            if leaf.shape[axis] > 1:
                stream, axis = self.embeddings.setdefault(
                    name, (Stream(leaf.shape[axis], embeddings={name: axis}), axis)
                )
                places[index] = (stream.root(), axis)
        return places

    def _follow(self, size: int, streams: list[Stream], found: Any, result: Any) -> bool:
        """Whether all tensors in ``result`` have their channels somewhere; then they and the streams are one."""
        new: list[tuple[Tensor, int]] = []
        for turned, straight in zip(tree_leaves(found), tree_leaves(result), strict=True):
            if isinstance(straight, Tensor):
                if turned.shape == straight.shape and torch.equal(turned, straight):
                    continue  # zeros_like() and the like: does not depend on the values
                axes = [axis for axis in range(-1, -straight.ndim - 1, -1) if straight.shape[axis] == size]
                axis = next((axis for axis in axes if agree(turned, reflect(straight, axis))), None)
                if axis is None:
                    return False
                new.append((straight, axis))
        if not new and result is None:
            return False  # __setitem__
        stream = streams[0]
        for other in streams[1:] if new else []:
            stream = stream.merge(other)
        for tensor, axis in new:
            self.places[tensor] = (stream.root(), axis)
        return True


def _is_norm(module: nn.Module) -> bool:
    # One with buffers (a BatchNorm with its statistics) treats channels differently even without its weight.
    parts = [*module.children(), *module.buffers()]
    return norm_channels(module) is not None and not parts


def _bind_conv(input: Tensor, weight: Tensor, bias: Tensor | None = None, *_: Any) -> tuple[Tensor, Tensor, Any]:
    return input, weight, bias


def agree(found: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> bool:
    """Whether two tensors of one shape differ by at most ``tolerance`` times the largest value."""
    if found.shape != expected.shape or not expected.is_floating_point():
        return False
    if expected.numel() == 0:
        return True
    error, scale = float((found - expected).abs().max()), float(expected.abs().max())
    return error <= tolerance * scale  # not so if one is NaN
