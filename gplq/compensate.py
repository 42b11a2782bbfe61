"""Compensation beside a block (Quantization without Tears, QwT; Eq 3 of GPLQ): y = block(x) + x W^T + b.

The linear layer in floating point makes up for a part of what the block lost by its 4-bit weights. It costs memory
and a GEMM in each block, unlike a correction that is folded into the block's own linears before they are rounded.
"""

import functools
from typing import Any

import torch
from torch import Tensor, nn

from gplq.integer import IntegerLinear

CHILD = "compensation"


@functools.cache
def _compensated(base: Any) -> Any:
    """A subclass of a block's class that adds the compensation to its output."""

    class Compensated(base):  # type: ignore[misc]  # the class is known at run time only
        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            y: Tensor = super().forward(x, *args, **kwargs) + self.compensation(x)
            return y

    Compensated.__name__ = Compensated.__qualname__ = f"Compensated{base.__name__}"
    return Compensated


def attach_compensation(block: nn.Module, weight: Tensor, bias: Tensor) -> None:
    """Add ``x W^T + b`` to a block's output, in place; no submodule changes its name.

    ``weight``: [C, C], ``bias``: [C].
    """
    linear = nn.Linear(weight.shape[1], weight.shape[0], device=weight.device)
    linear.weight, linear.bias = nn.Parameter(weight, requires_grad=False), nn.Parameter(bias, requires_grad=False)
    block.add_module(CHILD, linear)
    # As torch's parametrisations do: a wrapper module would rename everything inside the block.
    base: Any = type(block)
    block.__class__ = _compensated(base)


def compensations(model: nn.Module) -> dict[str, nn.Linear]:
    """The compensation of each block that has one, by the block's name."""
    return {
        name: linear
        for name, module in model.named_modules()
        if isinstance(linear := getattr(module, CHILD, None), nn.Linear)
    }


def why_not(block: nn.Module, x: Any, y: Any) -> str | None:
    """Why a block with input ``x`` and output ``y`` cannot be compensated; None if it can."""
    if not isinstance(x, Tensor) or not isinstance(y, Tensor):
        return "it does not return one tensor"
    if x.shape != y.shape:
        return "its output is not of its input's shape"
    if not has_width(block, x.shape[-1]):
        return "its last dimension is not that of the channels"
    return None


def has_width(block: nn.Module, channels: int) -> bool:
    """Whether one of the block's linears has ``channels`` outputs."""
    return any(len(linear.codes) == channels for linear in block.modules() if isinstance(linear, IntegerLinear))


def to_half(tensor: Tensor) -> Tensor:
    """Rounded to numbers that FP16 holds exactly, as FP32."""
    limit = torch.finfo(torch.float16).max
    return tensor.clamp(-limit, limit).half().float()
