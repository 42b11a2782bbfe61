"""One scale an output channel, and integer codes, for the weight of one linear layer.

Rounding is to nearest, or second-order (Frantar et al., GPTQ, 2023): columns are rounded one after the other and each
column's error is undone as far as possible by the columns that follow, which minimises || (W - W_q) X ||^2 for the
inputs X at no cost at run time.
"""

import torch
from torch import Tensor

from gplq.grid import code_limits, quantize, round_scale
from gplq.integer import quantize_rows
from gplq.lsq import best_scale
from gplq.recipe import Recipe

_COLUMNS_AT_ONCE = 64
# Scales that are tried, as shares of the one that clips nothing.
_SHARES = (0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 1.0)


def round_weight(weight: Tensor, moment: Tensor, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """Codes, int8 [N, K], and scales [N] of a weight [N, K] for inputs of second moment [K, K]."""
    if recipe.stage2.range == "output":
        return _round_best(weight, moment, recipe)
    scale = _range_scale(weight, moment, recipe)
    if recipe.stage2.rounding == "nearest":
        return quantize_rows(weight, scale, recipe.weight_bits), scale
    return gptq_codes(weight, scale, moment, recipe.weight_bits, recipe.stage2.damping)[0], scale


def _range_scale(weight: Tensor, moment: Tensor, recipe: Recipe) -> Tensor:
    """Scales from the weights alone (or weighted by the inputs' power), before anything is rounded."""
    settings, bits = recipe.stage2, recipe.weight_bits
    rows = weight if settings.granularity == "per_channel" else weight.reshape(1, -1)
    columns = rows.T  # best_scale chooses one scale a column
    if settings.range == "percentile":
        largest = torch.quantile(columns.abs(), 1 - settings.percentile / 100, dim=0)
    else:
        largest = columns.abs().amax(0)
    scale = (largest / code_limits(bits, signed=True)[1]).clamp_min(1e-8)
    if settings.range == "mse":
        importance = moment.diagonal().float().repeat(columns.shape[0] // len(moment))[:, None]
        scale = best_scale(columns, scale, bits, signed=True, weight=importance)
    return round_scale(scale, recipe.scale_grid).expand(len(weight)).clone()


def _round_best(weight: Tensor, moment: Tensor, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """Rounded with each of several scales; the codes whose output has the least error."""
    rows, columns = weight.shape
    largest = weight.abs().amax(1) if recipe.stage2.granularity == "per_channel" else weight.abs().max().expand(rows)
    widest = (largest / code_limits(recipe.weight_bits, signed=True)[1]).clamp_min(1e-8)
    shares = torch.tensor(_SHARES, device=weight.device)
    scale = round_scale(shares[:, None] * widest, recipe.scale_grid)  # [S, N]
    # All scales in one call, as if they were more output channels.
    many, scales = weight.repeat(len(shares), 1), scale.flatten()
    if recipe.stage2.rounding == "nearest":
        codes = quantize_rows(many, scales, recipe.weight_bits)
        difference = many.double() - codes * scales[:, None].double()
        error = ((difference @ moment.double()) * difference).sum(1)
    else:  # what its codes cost falls off on the way
        codes, error = gptq_codes(many, scales, moment, recipe.weight_bits, recipe.stage2.damping)
    codes, error = codes.reshape(-1, rows, columns), error.reshape(-1, rows)
    if recipe.stage2.granularity == "per_tensor":
        error = error.sum(1, keepdim=True).expand_as(error)
    best = error.argmin(0)
    channel = torch.arange(rows, device=weight.device)
    return codes[best, channel].clone(), scale[best, channel].clone()


def gptq_codes(weight: Tensor, scale: Tensor, moment: Tensor, bits: int, damping: float) -> tuple[Tensor, Tensor]:
    """Second-order rounding of a weight [N, K] for inputs of second moment [K, K].

    Columns are taken by falling importance. ``damping`` is the share of the mean diagonal that is added to the
    diagonal, for inputs of low rank.

    Returns:
        The codes, int8 [N, K], and (W - W_q) moment (W - W_q)^T of each row, FP64 [N].
    """
    hessian = moment.double().clone()
    diagonal = hessian.diagonal()
    ridge = damping * diagonal.mean().clamp_min(1e-12)
    diagonal += ridge
    order = diagonal.argsort(descending=True)
    hessian = hessian[order][:, order]
    # Row k of the upper Cholesky factor of the inverse tells how column k's error is undone by the later columns.
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True).float()
    # Transposed, so that a column of the weight lies in one piece.
    columns = weight.detach().T[order]
    codes, errors = torch.empty_like(columns), torch.empty_like(columns)
    lost = torch.zeros(len(weight), dtype=torch.float64, device=weight.device)
    for start in range(0, len(columns), _COLUMNS_AT_ONCE):
        # A group hears of the errors before it once, as one matmul, and each of its columns of those within it.
        group = slice(start, start + _COLUMNS_AT_ONCE)
        within, missed = factor[group, group], errors[group]
        now = columns[group] - factor[:start, group].T @ errors[:start]
        for k, column in enumerate(now):
            column -= within[:k, k] @ missed[:k]
            codes[start + k] = quantize(column, scale, bits, signed=True)
            missed[k] = (column - codes[start + k] * scale) / within[k, k]
        # The factor makes the damped error a sum of squares.
        difference = columns[group] - codes[group] * scale
        lost += missed.double().square().sum(0) - ridge * difference.double().square().sum(0)
    return codes[order.argsort()].T.to(torch.int8).contiguous(), lost
