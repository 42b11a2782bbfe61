"""The arguments of one block after the other, for all calibration images, as a model computes them at that moment.

Stage 2 changes a block and then wants the inputs of the next one as the changed blocks produce them. Where the next
block takes what this one returns, the outputs are simply passed on; where something stands in between (a patch
merging, a re-arrangement of tokens, position embeddings of each block's own), the model is run anew from the images
up to that block.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gplq.errors import ModelError
from gplq.fold import readers
from gplq.ops import Codes


class _EnoughError(Exception):
    """Ends a forward pass early: what was wanted of it has been seen."""


@dataclass(frozen=True)
class Call:
    """The arguments of one call of a module, for one batch."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, module: nn.Module) -> Any:
        """What ``module`` returns for them."""
        return module(*self.args, **self.kwargs)


class Stream:
    """Walks through the steps of a model with all calibration batches at once.

    Memory: the inputs of one step, for all images.

    Attributes:
        steps: names of the modules to stop at (blocks, and layers between blocks), in the order in which they run.
        calls: the arguments of the current step, one for each batch.
    """

    def __init__(self, model: nn.Module, steps: Iterable[str], images: Callable[[], Iterable[Tensor]]) -> None:
        """``images``: gives the batches [B, C, H, W], the same ones at each call, on the model's device.

        Raises:
            ModelError: a step is never run.
        """
        self.model, self._images = model, images
        # One image shows how the steps hang together.
        record = _record(model, steps, next(iter(images()))[:1])
        self.steps = list(record)
        self._chained = [
            _takes_over(*record[step], record[following][0])
            for step, following in zip(self.steps, self.steps[1:], strict=False)
        ]
        self._position = 0
        self.calls = self._capture()

    @property
    def step(self) -> str:
        """The name of the current step."""
        return self.steps[self._position]

    @property
    def module(self) -> nn.Module:
        """The current step."""
        return self.model.get_submodule(self.step)

    def advance(self) -> None:
        """Go on to the next step, through the current one as it is now; behind the last step there are no calls."""
        module, chained = self.module, self._position < len(self._chained) and self._chained[self._position]
        self._position += 1
        if chained:
            self.calls = [_following(call, call.run(module)) for call in self.calls]
        else:
            self.calls = []  # free them first
            self.calls = self._capture() if self._position < len(self.steps) else []

    def _capture(self) -> list[Call]:
        found: list[Call] = []

        def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.append(Call(args, kwargs))
            raise _EnoughError

        handle = self.module.register_forward_pre_hook(keep, with_kwargs=True)
        try:
            for inputs in self._images():
                _run_until_enough(functools.partial(self.model, inputs))
        finally:
            handle.remove()
        return found


def execution_order(model: nn.Module, names: Iterable[str], inputs: Tensor) -> list[str]:
    """``names`` of modules in the order in which a forward pass enters them.

    Raises:
        ModelError: one of them is never run.
    """
    return list(_record(model, names, inputs))


def input_rows(step: nn.Module, layer: nn.Module, call: Call) -> Tensor:
    """What the linears of ``layer`` get while ``step`` runs, dequantised and without a shift.

    [rows, K]; of a convolution the patches, K = C * kh * kw.
    """
    found: list[Tensor] = []
    quantizer: Any = layer.input_quantizer
    linear: Any = readers(layer)[0]

    def keep(_: nn.Module, __: Any, output: Tensor | Codes) -> None:
        if isinstance(output, Codes):
            x = output.values * output.scale
            x = x if quantizer.offset is None else x - quantizer.offset
        else:
            x = output - quantizer.shift
        if isinstance(linear, nn.Conv2d):
            assert not isinstance(linear.padding, str)  # QuantConv.fits
            x = F.unfold(x, linear.kernel_size, linear.dilation, linear.padding, linear.stride).transpose(1, 2)
        found.append(x.reshape(-1, x.shape[-1]))
        raise _EnoughError

    handle = quantizer.register_forward_hook(keep)
    try:
        _run_until_enough(lambda: call.run(step))
    finally:
        handle.remove()
    return found[0]


def first_tensor(output: Any) -> Tensor:
    """A block's output, without what some blocks return beside it (the size of their feature map)."""
    tensor = output[0] if isinstance(output, tuple | list) else output
    assert isinstance(tensor, Tensor)
    return tensor


def _run_until_enough(run: Callable[[], Any]) -> None:
    try:
        run()
    except _EnoughError:
        return


@torch.no_grad()
def _record(model: nn.Module, names: Iterable[str], inputs: Tensor) -> dict[str, tuple[Call, Any]]:
    """The first call of each module, and what it returned, in the order in which they are entered."""
    calls: dict[str, Call] = {}
    outputs: dict[str, Any] = {}
    wanted = list(names)
    handles = []
    for name in wanted:
        module = model.get_submodule(name)

        def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str = name) -> None:
            calls.setdefault(name, Call(args, kwargs))

        def leave(_: nn.Module, __: Any, output: Any, name: str = name) -> None:
            outputs.setdefault(name, output)

        handles += [module.register_forward_pre_hook(enter, with_kwargs=True), module.register_forward_hook(leave)]
    try:
        model(inputs)
    finally:
        for handle in handles:
            handle.remove()
    unused = [name for name in wanted if name not in calls]
    if unused:
        raise ModelError(f"'{unused[0]}' of this model is never run for an image, so that nothing can be calibrated.")
    return {name: (call, outputs[name]) for name, call in calls.items()}


def _takes_over(call: Call, output: Any, following: Call) -> bool:
    """Whether ``following`` has the arguments of ``call``, but for the first ones, which are ``output``."""
    expected = _following(call, output)
    if expected.kwargs.keys() != following.kwargs.keys():
        return False
    return _all_same(expected.args, following.args) and all(
        _same(value, following.kwargs[key]) for key, value in expected.kwargs.items()
    )


def _following(call: Call, output: Any) -> Call:
    outputs = output if isinstance(output, tuple) else (output,)
    return Call((*outputs, *call.args[len(outputs) :]), call.kwargs)


def _all_same(a: Sequence[Any], b: Sequence[Any]) -> bool:
    return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))


def _same(a: Any, b: Any) -> bool:
    """The same tensor object, or equal plain data."""
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return _all_same(a, b)
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return a is b
    return bool(a == b)
