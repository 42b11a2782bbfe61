"""Rounding learned by gradient (Nagel et al., AdaRound, 2020; per block as in Li et al., BRECQ, 2021).

Each weight goes down or up to one of two neighbouring codes, low + h with h = clamp(1.2 sigmoid(v) - 0.1, 0, 1). The
v of all linears of a block are learned together: the block's output comes close to a target, while a second term,
sum 1 - |2 h - 1|^beta, drives each h to 0 or 1 as beta falls.
"""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gplq.grid import code_limits, quantize
from gplq.integer import FrozenQuantizer, IntegerLinear
from gplq.recipe import LearnedRounding
from gplq.stream import Call, first_tensor

_STRETCH, _SHIFT = 1.2, 0.1
_START = 0.8  # weight of the present code in the first h; the rest is the exact weight's


class _SoftLinear(nn.Module):
    """A linear whose weights lie between two codes each."""

    def __init__(self, linear: IntegerLinear, weight: Tensor, offset: Tensor | None) -> None:
        """``weight``: [N, K], the float weight that ``linear``'s codes were made from; ``offset``: of its input."""
        super().__init__()
        low, high = code_limits(linear.bits, signed=True)
        codes, exact = linear.codes.float(), weight / linear.weight_scale[:, None]
        # The present code and its neighbour on the side of the exact weight.
        self.low = (codes - (exact < codes).float()).clamp(low, high - 1)
        # Close to the present codes, so that a good rounding is improved and not forgotten.
        share = (1 - _START) * (exact - self.low).clamp(0, 1) + _START * (codes - self.low)
        share = share.clamp(0.01, 0.99)
        self.v = nn.Parameter(torch.logit((share + _SHIFT) / _STRETCH))
        self.scale, self.bias, self.offset = linear.weight_scale, linear.bias, None
        if offset is not None and linear.bias is not None:
            # The present bias takes away what the offset adds with the present codes.
            self.offset = offset.expand(weight.shape[1])
            self.bias = linear.bias + (codes * self.scale[:, None]) @ self.offset

    def share(self) -> Tensor:
        """h, [N, K], in 0 … 1."""
        return (_STRETCH * torch.sigmoid(self.v) - _SHIFT).clamp(0, 1)

    def forward(self, x: Tensor) -> Tensor:
        weight = (self.low + self.share()) * self.scale[:, None]
        return F.linear(x if self.offset is None else x - self.offset, weight, self.bias)

    def codes(self) -> Tensor:
        """The code that each weight is nearest to by now, int8 [N, K]."""
        return (self.low + (self.v >= 0)).to(torch.int8)


class _SoftQuantizer(nn.Module):
    """A frozen quantiser with the straight-through gradient; returns values, not codes."""

    def __init__(self, quantizer: FrozenQuantizer) -> None:
        super().__init__()
        self.scale, self.pre_scale, self.pre_shift = quantizer.scale, quantizer.pre_scale, quantizer.pre_shift
        self.bits, self.signed = quantizer.bits, quantizer.signed

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.pre_shift is None else x + self.pre_shift
        x = x if self.pre_scale is None else x * self.pre_scale
        low, high = code_limits(self.bits, self.signed)
        inside = x.clamp(low * self.scale, high * self.scale)
        return inside + (quantize(x, self.scale, self.bits, self.signed) * self.scale - inside).detach()


def learn_codes(
    block: nn.Module,
    weights: dict[str, Tensor],
    calls: Sequence[Call],
    targets: Sequence[Tensor],
    settings: LearnedRounding,
    seed: int,
    step: Callable[[], Any],
) -> dict[str, Tensor]:
    """New codes, int8 [N, K], for the linears of a frozen block; the block stays as it is.

    Args:
        block: frozen; its codes are where the learning starts.
        weights: the float weight [N, K] of each linear, by its name within the block.
        calls: arguments of the block.
        targets: what it should return, for each call.
        settings: iterations and the like.
        seed: of the order of calls.
        step: called after each iteration.
    """
    soft = copy.deepcopy(block)
    for name, module in block.named_modules():
        if isinstance(module, FrozenQuantizer):
            soft = _replace(soft, name, _SoftQuantizer(module))
        elif isinstance(module, IntegerLinear):
            layer: Any = block.get_submodule(name.rpartition(".")[0]) if "." in name else block
            soft = _replace(soft, name, _SoftLinear(module, weights[name], layer.input_quantizer.offset))
    linears = {name: module for name, module in soft.named_modules() if isinstance(module, _SoftLinear)}
    for parameter in soft.parameters():
        parameter.requires_grad_(False)
    learned = [linear.v.requires_grad_() for linear in linears.values()]
    optimizer = torch.optim.Adam(learned, lr=settings.lr)
    power = sum(float(target.square().mean()) for target in targets) / len(targets)
    generator = torch.Generator().manual_seed(seed)
    with torch.enable_grad():
        for iteration in range(settings.iterations):
            index = int(torch.randint(len(calls), (), generator=generator))
            loss = F.mse_loss(first_tensor(calls[index].run(soft)), targets[index]) / max(power, 1e-12)
            beta = _beta(iteration / settings.iterations)
            if beta is not None:
                terms = [(1 - (2 * linear.share() - 1).abs().pow(beta)).mean() for linear in linears.values()]
                loss = loss + settings.regularisation * torch.stack(terms).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step()
    return {name: linear.codes() for name, linear in linears.items()}


def _beta(progress: float) -> float | None:
    """From 20 to 2 along half a cosine, after a fifth of the time without the second term."""
    if progress < 0.2:
        return None
    return 2 + 9 * (1 + math.cos(math.pi * (progress - 0.2) / 0.8))


def _replace(root: nn.Module, name: str, module: nn.Module) -> nn.Module:
    """``root`` with its submodule ``name`` replaced; the module itself if the name is empty."""
    if not name:
        return module
    root.set_submodule(name, module)
    return root
