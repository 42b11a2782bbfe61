"""Activation quantisers while they are being calibrated and trained (LSQ: Esser et al. 2020, used by GPLQ, Eq 1).

Mixed precision: the arithmetic of a quantiser (division, rounding, the gradient of its scale) is in FP32 whatever the
type of its input; only what it returns is in the type in which the matmul behind it runs.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from gplq import grid
from gplq.errors import DataError

# Values per quantiser that are kept for percentiles and MSE, whatever the number of calibration images.
SAMPLE_VALUES = 2**18


class _Quantization:
    """One fake quantisation of x, with what it takes to do it again in the backward pass."""

    def __init__(self, x: Tensor, scale: Tensor, bits: int, signed: bool, dtype: torch.dtype) -> None:
        """``x``: [..., C]; ``scale``: [] or [C], FP32 or FP64; ``dtype``: of the output."""
        self.x, self.scale, self.dtype = x, scale, dtype
        self.low, self.high = grid.code_limits(bits, signed)
        self._again: tuple[Tensor, Tensor] | None = None

    def ratio(self) -> Tensor:
        """A new tensor x / scale. Contiguous: a batched matmul would copy a transposed operand otherwise."""
        x = self.x.to(torch.promote_types(self.x.dtype, self.scale.dtype))
        return (x / self.scale).contiguous()

    def output(self) -> Tensor:
        """x_hat: the codes of :func:`gplq.grid.quantize`, times the scale."""
        return self._output(self.ratio().round_())

    def again(self) -> tuple[Tensor, Tensor]:
        """(x / scale, x_hat) for the backward pass, computed once, until :meth:`clear`."""
        if self._again is None:
            ratio = self.ratio()
            self._again = ratio, self._output(ratio.round())
        return self._again

    def _output(self, rounded: Tensor) -> Tensor:
        return rounded.clamp_(self.low, self.high).mul_(self.scale).to(self.dtype)

    def clear(self) -> None:
        """Free the tensors; the graph that refers to this object may live on for a while."""
        del self.x, self.scale
        self._again = None


class _FakeQuantize(torch.autograd.Function):
    """Fake quantisation with a straight-through gradient for x and LSQ's gradient for the scale.

    d x_hat / d x     = 1 inside the range, 0 outside
    d x_hat / d scale = code - x / scale inside, the limit outside; then times LSQ's 1 / sqrt(values * highest code),
                        with the values of one image that share the scale (the paper's N_F, whatever the batch)

    Time goes into passes over memory, so there are as few as PyTorch's operators allow: four forward. Backward uses
    that scale * d x_hat / d scale = x_hat - x inside and x_hat outside.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, bits: int, signed: bool, gradient_scale: bool, dtype: torch.dtype
    ) -> Tensor:
        quantization = _Quantization(x, scale, bits, signed, dtype)
        ctx.settings = bits, signed, gradient_scale, dtype
        ctx.quantization = quantization if _recomputing else None
        if not _recomputing:  # gradient checkpointing sees, and frees, only what is saved in this way
            ctx.save_for_backward(x, scale)
        return quantization.output()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        bits, signed, gradient_scale, dtype = ctx.settings
        quantization = ctx.quantization
        if quantization is None:
            x, scale = ctx.saved_tensors
            quantization = _Quantization(x, scale, bits, signed, dtype)
        x, scale = quantization.x, quantization.scale
        ratio, x_hat = quantization.again()
        quantization.clear()
        grad = grads[0].to(ratio.dtype)
        # The gradient of clamp() in one pass. It counts the limits themselves as outside.
        grad_x = torch.ops.aten.hardtanh_backward(grad, ratio, quantization.low, quantization.high)
        del ratio
        slope = x_hat.mul_(grad) if x_hat.dtype == grad.dtype else grad * x_hat
        slope.addcmul_(grad_x, x.to(grad.dtype), value=-1)
        # Reduce over everything that the scale is broadcast along.
        grad_scale = (slope.sum() if scale.ndim == 0 else slope.flatten(0, -2).sum(0)) / scale
        if gradient_scale:
            grad_scale /= (x[0].numel() / scale.numel() * quantization.high) ** 0.5
        grad_input = grad_x.to(x.dtype) if ctx.needs_input_grad[0] else None
        return grad_input, grad_scale, None, None, None, None


_recomputing = False


@contextlib.contextmanager
def recompute_quantized() -> Iterator[None]:
    """Within the block, a matmul that keeps a quantised operand for its backward pass keeps the unquantised one.

    Autograd would keep both: the quantiser's input, for the gradient of the scale, and its output, for that of the
    weight. The output is four cheap passes away from the input, so it is made again when it is needed; a training
    step then keeps as much as one of the float model. Not together with gradient checkpointing, which keeps neither.
    """
    global _recomputing

    def pack(tensor: Tensor) -> Any:
        # What a matmul keeps is often a view of its operand.
        base = tensor._base if tensor._is_view() else tensor
        quantization = getattr(base, "_quantization", None)
        if quantization is None or tensor.dtype != quantization.dtype:
            return tensor
        return quantization, tensor.size(), tensor.stride(), tensor.storage_offset()

    def unpack(kept: Any) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        quantization, size, stride, offset = kept
        x_hat: Tensor = quantization.again()[1]
        return x_hat.as_strided(size, stride, offset)

    _recomputing = True
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield
    finally:
        _recomputing = False


class ActivationQuantizer(nn.Module):
    """Learnable fake quantiser of an activation [..., C]; the scale is [] (per tensor) or [C] (per channel).

    What is learned is by default the logarithm of the scale: the scale stays positive without a guard, and an
    optimiser's step of 1e-3 is 0.1 % of every scale, whether it is large or small.

    Attributes:
        mode: "float" passes the input through, "observe" does too and collects ranges, "quantize" quantises.
        signed: whether codes below zero exist; None until :meth:`calibrate` has seen whether values below zero do.
        parametrization: "log" or "linear": what :attr:`raw_scale` holds. Set it before :meth:`calibrate`.
        gradient_scale: whether the gradient of the scale has LSQ's factor.
        raw_scale: the parameter that is learned, FP32.
    """

    def __init__(self, bits: int, signed: bool | None, per_channel: bool, kind: str) -> None:
        """``kind``: "linear", "matmul" or "edge" (first and last layer); decides which calibration range is used."""
        super().__init__()
        self.bits, self.signed, self.per_channel, self.kind = bits, signed, per_channel, kind
        self.mode = "float"
        self.parametrization, self.gradient_scale = "log", True
        # One value until calibration knows the number of channels.
        self.raw_scale = nn.Parameter(torch.zeros(()))
        self._low: Tensor | None = None
        self._high: Tensor | None = None
        self._samples: list[Tensor] = []

    @property
    def scale(self) -> Tensor:
        """The scale, [] or [C], > 0."""
        return self.raw_scale.exp() if self.parametrization == "log" else self.raw_scale

    @torch.no_grad()
    def set_scale(self, scale: Tensor) -> None:
        """Take ``scale``, [] or [C], > 0, as a new parameter."""
        scale = scale.to(self.raw_scale.device, copy=True)
        self.raw_scale = nn.Parameter(scale.log() if self.parametrization == "log" else scale)

    @torch.no_grad()
    def guard(self) -> None:
        """Keep a linear scale positive; to be called after each step of an optimiser."""
        if self.parametrization == "linear":
            self.raw_scale.clamp_(min=grid.SMALLEST_SCALE)

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., C]; under autocast in the type that matmuls run in."""
        if self.mode == "quantize":
            device = x.device.type
            dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
            arguments = (self.bits, bool(self.signed), self.gradient_scale, dtype)
            result: Tensor = _FakeQuantize.apply(x, self.scale, *arguments)
            if _recomputing and result.grad_fn is not None:
                result._quantization = result.grad_fn.quantization  # type: ignore[attr-defined]  # see recompute_quantized
            return result
        if self.mode == "observe":
            self._observe(x.detach())
        return x

    def _observe(self, x: Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1]) if self.per_channel else x.reshape(-1, 1)
        rows = rows.float()
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
        """Set the scale from what was observed, by all processes together, and quantise from now on.

        ``method``: "minmax", over everything observed; "percentile" (``percentile`` in per cent) or "mse" (least
        squared error), over a bounded random sample of it: either would cost a second pass over all images, the
        second with a hundred times the work.

        Raises:
            DataError: an observed value is not finite.
        """
        if self._low is None or self._high is None:
            raise RuntimeError("calibrate() before anything was observed")
        ours = self._low.cpu(), self._high.cpu(), torch.cat(self._samples).cpu()
        lows, highs, samples = zip(*gather_object([ours]), strict=True)
        low, high, sample = torch.stack(lows).amin(0), torch.stack(highs).amax(0), torch.cat(samples)
        if not bool(torch.isfinite(low).all() and torch.isfinite(high).all()):
            raise DataError("the FP32 model produces NaN or infinite activations on the calibration images.")
        if self.signed is None:
            self.signed = bool((low < 0).any())
        low_code, high_code = grid.code_limits(self.bits, self.signed)
        if method == "percentile":
            low = torch.quantile(sample, percentile / 100, dim=0)
            high = torch.quantile(sample, 1 - percentile / 100, dim=0)
        scale = high / high_code if low_code == 0 else torch.maximum(high / high_code, low / low_code)
        scale = scale.clamp_min(grid.SMALLEST_SCALE)
        if method == "mse":
            scale = best_scale(sample, scale, self.bits, self.signed)
        self.set_scale(scale if self.per_channel else scale.reshape(()))
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
