"""Activation quantisers while they are being calibrated and trained (LSQ: Esser et al. 2020, used by GPLQ, Eq 1)."""

from typing import Any

import torch
from torch import Tensor, nn

from gplq import grid
from gplq.errors import DataError

# Values per quantiser that are kept for percentiles and MSE, whatever the number of calibration images.
SAMPLE_VALUES = 2**18


class _FakeQuantize(torch.autograd.Function):
    """Fake quantisation with a straight-through gradient for x and LSQ's gradient for the scale.

    d x_hat / d x     = 1 inside the range, 0 outside
    d x_hat / d scale = code - x / scale inside, the limit outside; then times LSQ's 1 / sqrt(values * highest code)
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, bits: int, signed: bool) -> Tensor:
        ctx.save_for_backward(x, scale)
        ctx.bits, ctx.signed = bits, signed
        return grid.quantize(x, scale, bits, signed) * scale

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (grad,) = grads
        x, scale = ctx.saved_tensors
        low, high = grid.code_limits(ctx.bits, ctx.signed)
        ratio = x / scale
        clamped = ratio.clamp(low, high)
        inside = ratio == clamped
        # Outside the range the clamped ratio is the limit itself and the rounding term vanishes, so that one
        # expression serves both cases: code - ratio inside, limit outside.
        slope = torch.round(clamped).sub_(ratio.masked_fill_(~inside, 0.0)).mul_(grad)
        # Reduce over everything that the scale is broadcast along.
        grad_scale = slope.sum() if scale.ndim == 0 else slope.flatten(0, -2).sum(0)
        values_per_scale = x.numel() / scale.numel()
        return grad * inside, grad_scale / (values_per_scale * high) ** 0.5, None, None


class ActivationQuantizer(nn.Module):
    """Learnable fake quantiser of an activation [..., C]; the scale is [] (per tensor) or [C] (per channel).

    What is learned is the logarithm of the scale: the scale stays positive without a guard, and an optimiser's step
    of 1e-3 is 0.1 % of every scale, whether it is large or small.

    Attributes:
        mode: "float" passes the input through, "observe" does too and collects ranges, "quantize" quantises.
    """

    def __init__(self, bits: int, signed: bool, per_channel: bool, kind: str) -> None:
        """``kind``: "linear", "matmul" or "edge" (first and last layer); decides which calibration range is used."""
        super().__init__()
        self.bits, self.signed, self.per_channel, self.kind = bits, signed, per_channel, kind
        self.mode = "float"
        # One value until calibration knows the number of channels.
        self.log_scale = nn.Parameter(torch.zeros(()))
        self._low: Tensor | None = None
        self._high: Tensor | None = None
        self._samples: list[Tensor] = []

    @property
    def scale(self) -> Tensor:
        """The scale, [] or [C], > 0."""
        return self.log_scale.exp()

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., C]."""
        if self.mode == "quantize":
            result: Tensor = _FakeQuantize.apply(x, self.scale, self.bits, self.signed)
            return result
        if self.mode == "observe":
            self._observe(x.detach())
        return x

    def _observe(self, x: Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1]) if self.per_channel else x.reshape(-1, 1)
        low, high = rows.amin(0), rows.amax(0)
        self._low = low if self._low is None else torch.minimum(self._low, low)
        self._high = high if self._high is None else torch.maximum(self._high, high)
        # Random rows of each batch, always the same ones: a fixed stride would meet some channels only, if it shares a
        # factor with their number. The list is thinned by half when it outgrows its bound, so that memory does not
        # grow with the number of batches.
        keep = max(1, SAMPLE_VALUES // 8 // rows.shape[1])
        if rows.shape[0] > keep:
            generator = torch.Generator().manual_seed(len(self._samples))
            rows = rows[torch.randint(rows.shape[0], (keep,), generator=generator).to(rows.device)]
        self._samples.append(rows.clone())
        if sum(sample.numel() for sample in self._samples) > SAMPLE_VALUES:
            self._samples = [torch.cat(self._samples)[::2]]

    @torch.no_grad()
    def calibrate(self, method: str, percentile: float) -> None:
        """Set the scale from what was observed, and quantise from now on.

        ``method``: "minmax"; "percentile" (of the sample, ``percentile`` in per cent); "mse" (least squared error).

        Raises:
            DataError: an observed value is not finite.
        """
        if self._low is None or self._high is None:
            raise RuntimeError("calibrate() before anything was observed")
        if not bool(torch.isfinite(self._low).all() and torch.isfinite(self._high).all()):
            raise DataError("the FP32 model produces NaN or infinite activations on the calibration images.")
        low_code, high_code = grid.code_limits(self.bits, self.signed)
        sample = torch.cat(self._samples)
        low, high = self._low, self._high
        if method == "percentile":
            low = torch.quantile(sample, percentile / 100, dim=0)
            high = torch.quantile(sample, 1 - percentile / 100, dim=0)
        scale = high / high_code if low_code == 0 else torch.maximum(high / high_code, low / low_code)
        scale = scale.clamp_min(grid.SMALLEST_SCALE)
        if method == "mse":
            scale = best_scale(sample, scale, self.bits, self.signed)
        self.log_scale = nn.Parameter((scale if self.per_channel else scale.reshape(())).log())
        self._low = self._high = None
        self._samples = []
        self.mode = "quantize"


def best_scale(rows: Tensor, largest: Tensor, bits: int, signed: bool, weight: Tensor | None = None) -> Tensor:
    """Per column, the scale in 20 … 100 % of ``largest`` with the least (weighted) squared error.

    ``rows``: [R, C]; ``largest``: [C]; ``weight``: [R, 1] or [R, C], the importance of each value. Returns [C].
    """
    best, best_error = largest, torch.full_like(largest, torch.inf)
    for share in torch.linspace(0.2, 1.0, 81).tolist():
        scale = largest * share
        error = (grid.quantize(rows, scale, bits, signed) * scale - rows).square()
        error = (error if weight is None else error * weight).sum(0)
        better = error < best_error
        best, best_error = torch.where(better, scale, best), torch.where(better, error, best_error)
    return best
