"""Activation quantisers while they are being calibrated and trained (LSQ: Esser et al. 2020, used by GPLQ, Eq 1).

Mixed precision: the arithmetic of a quantiser (division, rounding, the gradient of its scale) is in FP32 whatever the
type of its input; only what it returns is in the type in which the matmul behind it runs.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from gplq import grid
from gplq.errors import DataError

# How far below zero, as a share of the highest value, a tensor may go that is shifted onto the unsigned grid.
_SHIFTABLE = 0.25

# INT8 holds no more without a sign, and neither ONNX nor engines multiply UINT8 by a signed type on every target.
_UNSIGNED_BITS = 7

# Values that are quantised at a time: on a CPU as many as its cache holds, elsewhere so many that kernels are busy.
_PART_ON_CPU, _PART = 2**17, 2**24

# What a quantiser keeps for percentiles and least errors, whatever the number of images and of channels: so many rows
# where each channel has a scale, so many values where there is one scale. With fewer rows (85 a batch were kept once)
# each channel's scale is decided by a handful of values, and at 257 tokens the network is lost.
SAMPLE_ROWS, SAMPLE_VALUES = 2**12, 2**19
# Scales that are tried, as shares of the one that clips nothing: first each 22 % above the one before, then, around the
# best, each 4 %. A softmax over many tokens has its best one far below the largest probability.
_SMALLEST_SHARE, _SHARES, _FINE = 0.02, 21, 5


class _Quantization:
    """One fake quantisation of x, with what it takes to do it again in the backward pass."""

    def __init__(self, x: Tensor, scale: Tensor, bits: int, signed: bool, dtype: torch.dtype) -> None:
        """``x``: [..., C]; ``scale``: [] or [C], FP32 or FP64; ``dtype``: of the output."""
        # The function that made x, if it may be called again (see recompute_quantized); x itself is then not kept.
        self._x: Callable[[], Tensor] = getattr(x, "_remake", lambda: x)
        self.scale, self.dtype = scale, dtype
        self.low, self.high = grid.code_limits(bits, signed)
        self._again: tuple[Tensor, Tensor] | None = None

    def output(self, x: Tensor) -> Tensor:
        """x_hat: the codes of :func:`gplq.grid.quantize`, times the scale."""
        x_hat = torch.empty(x.shape, dtype=self.dtype, device=x.device)  # contiguous: a batched matmul would copy it
        for part, out in _parts(x, x_hat):
            torch.mul(_ratio(part, self.scale).round_().clamp_(self.low, self.high), self.scale, out=out)
        return x_hat

    def again(self) -> tuple[Tensor, Tensor]:
        """(x, x_hat) for the backward pass, computed once, until :meth:`clear`."""
        if self._again is None:
            x = self._x()
            self._again = x, self.output(x)
        return self._again

    def clear(self) -> None:
        """Free the tensors; the graph that refers to this object may live on for a while."""
        del self._x, self.scale
        self._again = None


def _ratio(x: Tensor, scale: Tensor) -> Tensor:
    """A new tensor x / scale."""
    dtype = torch.promote_types(x.dtype, scale.dtype)
    return x / scale if x.dtype == dtype else x.to(dtype).div_(scale)


def _parts(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Tensors [B, …] of one shape, cut alike into parts [b, …]: what is computed of each on the way is small."""
    first = tensors[0]
    values = _PART_ON_CPU if first.device.type == "cpu" else _PART
    rows = max(1, values * len(first) // max(first.numel(), 1))
    return zip(*(tensor.split(rows) for tensor in tensors), strict=True)


class _FakeQuantize(torch.autograd.Function):
    """Fake quantisation with a straight-through gradient for x and LSQ's gradient for the scale.

    d x_hat / d x     = 1 inside the range, 0 outside
    d x_hat / d scale = code - x / scale inside, the limit outside; then times LSQ's 1 / sqrt(values * highest code),
                        with the values of one image that share the scale (the paper's N_F, whatever the batch)

    Time goes into passes over memory, so they go over parts that a CPU's cache holds.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, bits: int, signed: bool, gradient_scale: bool, dtype: torch.dtype
    ) -> Tensor:
        quantization = _Quantization(x, scale, bits, signed, dtype)
        x_hat = quantization.output(x)
        ctx.gradient_scale, ctx.limits = gradient_scale, (quantization.low, quantization.high)
        ctx.values, ctx.input_dtype = x[0].numel() / scale.numel(), x.dtype
        ctx.quantization = quantization if _recomputing else None
        if not _recomputing:  # the matmul keeps x_hat too; checkpointing sees, and frees, only what is saved like this
            ctx.save_for_backward(x, scale, x_hat)
        return x_hat

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        low, high = ctx.limits
        if ctx.quantization is None:
            x, scale, x_hat = ctx.saved_tensors
        else:
            scale = ctx.quantization.scale
            x, x_hat = ctx.quantization.again()
            ctx.quantization.clear()
        grad_x = torch.empty(x.shape, dtype=ctx.input_dtype, device=x.device)
        slopes = []
        for x_part, x_hat_part, grad_part, out in _parts(x, x_hat, grads[0], grad_x):
            ratio = _ratio(x_part, scale)
            grad = grad_part.to(ratio.dtype)
            # The gradient of clamp() in one pass. It counts the limits themselves as outside.
            inside = out if out.dtype == ratio.dtype else torch.empty_like(ratio)
            torch.ops.aten.hardtanh_backward.grad_input(grad, ratio, low, high, grad_input=inside)
            # scale * d x_hat / d scale is x_hat outside the range, and x_hat - x inside.
            slope = grad * x_hat_part if grad is grad_part else grad.mul_(x_hat_part)
            slope.addcmul_(inside, ratio.mul_(scale), value=-1)
            # Reduce over everything that the scale is broadcast along.
            slopes.append(slope.sum() if scale.ndim == 0 else slope.flatten(0, -2).sum(0))
            if inside is not out:
                out.copy_(inside)
        grad_scale = torch.stack(slopes).sum(0) / scale
        if ctx.gradient_scale:
            grad_scale /= (ctx.values * high) ** 0.5
        return (grad_x if ctx.needs_input_grad[0] else None), grad_scale, None, None, None, None


_recomputing = False
# Cheap functions, that keep their input for their own gradient anyway.
_REMADE = frozenset({F.gelu, F.layer_norm})


class _Remember(TorchFunctionMode):
    """Notes with the output of a cheap function how to make it again."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the function."""
        y = func(*args, **(kwargs or {}))
        # Only if autocast, which is off in the backward pass, has not changed the type.
        if func in _REMADE and y.dtype == args[0].dtype:
            y._remake = functools.partial(func, *args, **(kwargs or {}))
        return y


def _maker(base: Any) -> Callable[[], Tensor] | None:
    """What makes a matmul's operand again: a quantised activation, or the low-precision copy of a weight."""
    quantization = getattr(base, "_quantization", None)
    if quantization is not None:
        return lambda: quantization.again()[1]
    if type(base.grad_fn).__name__ == "ToCopyBackward0":
        weight = getattr(base.grad_fn.next_functions[0][0], "variable", None)  # of a leaf only
        if weight is not None:
            return functools.partial(weight.detach().to, base.dtype)
    return None


@contextlib.contextmanager
def recompute_quantized() -> Iterator[None]:
    """Within the block, what is cheap to make again is not kept for the backward pass.

    A matmul keeps its quantised operand, for the gradient of the weight; the quantiser its input, for that of the
    scale; and GELU or LayerNorm in front of it theirs. Of the three only the last is kept: the others are a few passes
    over memory away. So is the copy of a weight that autocast made in a lower precision. With the attentions, see
    :func:`recomputed`, a training step keeps less than one of the float model. Not together with gradient
    checkpointing, which keeps none of them.
    """
    global _recomputing

    def pack(tensor: Tensor) -> Any:
        # What a matmul keeps is often a view of its operand.
        base = tensor._base if tensor._is_view() else tensor
        make = _maker(base)
        return tensor if make is None else (make, tensor.size(), tensor.stride(), tensor.storage_offset())

    def unpack(kept: Any) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        make, *layout = kept
        result: Tensor = make().as_strided(*layout)
        return result

    _recomputing = True
    try:
        with _Remember(), torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield
    finally:
        _recomputing = False


def shifted(x: Tensor, shift: float) -> Tensor:
    """``x + shift``; made again with x, if x is (see :func:`recompute_quantized`)."""
    y = x + shift
    remake: Callable[[], Tensor] | None = getattr(x, "_remake", None)
    if remake is not None:
        y._remake = lambda: remake() + shift  # type: ignore[attr-defined]
    return y


def recomputed(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """``function(*tensors)``; within :func:`recompute_quantized` of all that it computes nothing is kept.

    For an attention: its scores grow with the square of the number of tokens, but take little time.
    """
    global _recomputing
    if not _recomputing:
        return function(*tensors)
    _recomputing = False
    try:
        result: Tensor = checkpoint(function, *tensors, use_reentrant=False)
        return result
    finally:
        _recomputing = True


class ActivationQuantizer(nn.Module):
    """Learnable fake quantiser of an activation [..., C]; the scale is [] (per tensor) or [C] (per channel).

    What is learned is by default the logarithm of the scale: the scale stays positive without a guard, and an
    optimiser's step of 1e-3 is 0.1 % of every scale, whether it is large or small.

    Attributes:
        mode: "float" passes the input through, "observe" does too and collects ranges (see :meth:`observe`),
            "quantize" quantises.
        signed: whether codes below zero exist; None until :meth:`calibrate` has seen whether values below zero do.
        shiftable: whether :meth:`calibrate` may choose a shift.
        softmax_bits: the number of bits if :meth:`calibrate` has seen nothing but probabilities that sum to 1.
        softmax_scale: "full": probabilities then have the scale that spans 0 … 1, and it is not learned.
        shift: what the caller adds in front of the quantiser, and has to take away behind it (see
            :class:`gplq.layers.QuantLinear`): a GELU's output hardly goes below zero, so that half of a signed grid
            would lie idle; shifted by 0.17 it fits an unsigned one. FP16-exact.
        parametrization: "log" or "linear": what :attr:`raw_scale` holds. Set it before :meth:`calibrate`.
        gradient_scale: whether the gradient of the scale has LSQ's factor.
        raw_scale: the parameter that is learned, FP32.
    """

    def __init__(self, bits: int, signed: bool | None, per_channel: bool, kind: str) -> None:
        """``kind``: "linear", "matmul" or "edge" (first and last layer); decides which calibration range is used."""
        super().__init__()
        self.bits, self.signed, self.per_channel, self.kind = bits, signed, per_channel, kind
        self.mode = "float"
        self.shiftable, self.shift = False, 0.0
        self.softmax_bits, self.softmax_scale = bits, "learned"
        self.parametrization, self.gradient_scale = "log", True
        # One value until calibration knows the number of channels.
        self.raw_scale = nn.Parameter(torch.zeros(()))
        self._low: Tensor | None = None
        self._high: Tensor | None = None
        # Of each batch: rows [R, C], and the importance [R, C] of each value once a backward pass has come by.
        self._samples: list[tuple[Tensor, Tensor | None]] = []
        self._batches = 1
        self._probabilities = True  # until something else is observed

    def possible_bits(self) -> set[int]:
        """What :meth:`calibrate` may make of ``bits``."""
        return {self.bits, min(self.bits, _UNSIGNED_BITS), self.softmax_bits}

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
        return self._observe(x) if self.mode == "observe" else x

    def observe(self, batches: int) -> None:
        """Collect ranges from now on, from so many batches; see :meth:`calibrate`.

        Memory: SAMPLE_ROWS x C (or SAMPLE_VALUES) numbers, twice if the batches are run backwards.
        """
        self.mode, self._batches = "observe", batches

    def _observe(self, x: Tensor) -> Tensor:
        values = x.detach()
        self._probabilities = self._probabilities and self.kind == "matmul" and _sums_to_one(values)
        rows = values.reshape(-1, x.shape[-1]) if self.per_channel else values.reshape(-1, 1)
        rows = rows.float()
        low, high = rows.amin(0), rows.amax(0)
        self._low = low if self._low is None else torch.minimum(self._low, low)
        self._high = high if self._high is None else torch.maximum(self._high, high)
        # Random rows of each batch, always the same ones: a fixed stride would meet some channels only, if it shares a
        # factor with their number.
        keep = math.ceil((SAMPLE_ROWS if self.per_channel else SAMPLE_VALUES) / self._batches)
        generator = torch.Generator().manual_seed(len(self._samples))
        if x.requires_grad:
            # What counts is the gradient that comes through here: a residual stream has others beside it.
            x = x.view_as(x)
            x.register_hook(functools.partial(self._weigh, len(self._samples), values, keep, generator))
        if rows.shape[0] > keep:
            rows = rows[torch.randint(rows.shape[0], (keep,), generator=generator).to(rows.device)]
        self._samples.append((rows.clone(), None))
        return x

    def _weigh(self, index: int, x: Tensor, keep: int, generator: torch.Generator, gradient: Tensor) -> None:
        """When the backward pass comes by: take sample ``index`` again, by how much its rows matter.

        Half of the rows are drawn by the size of their gradients. In a last block nothing but the class token's row of
        scores does anything: of a uniform sample one in 257, too few to meet a large probability.
        """
        if index >= len(self._samples):
            return  # calibrate() has been called meanwhile
        width = self._samples[index][0].shape[1]
        rows, weight = x.reshape(-1, width).float(), gradient.detach().reshape(-1, width).float().abs()
        sizes = weight.double().sum(1)
        if float(sizes.sum()) <= 0:
            return
        if len(rows) > keep:
            density = 0.5 / len(rows) + 0.5 * sizes / sizes.sum()
            places = (torch.arange(keep, dtype=torch.float64) + torch.rand(keep, generator=generator)) / keep
            chosen = torch.searchsorted(density.cumsum(0), places.to(density.device)).clamp(max=len(rows) - 1)
            rows, weight = rows[chosen], weight[chosen] / (density[chosen, None] * len(rows)).float()
        self._samples[index] = rows.clone(), weight

    @torch.no_grad()
    def calibrate(self, method: str, percentile: float) -> None:
        """Set the scale from what was observed, by all processes together, and quantise from now on.

        ``method``: "minmax", over everything observed; "percentile" (``percentile`` in per cent) or "mse" (least
        squared error), over a bounded random sample of it: either would cost a second pass over all images, the
        second with a hundred times the work. Where a backward pass has followed, the squared error of each value is
        weighted by the size of its gradient g: of that pass, or of one through a random projection of the features
        (E g^2 is then the diagonal of the Gauss-Newton matrix). Its root, |g|, is what works: by the squares a few
        values decide about a scale, without weights the many that change nothing.

        Raises:
            DataError: an observed value is not finite.
        """
        if self._low is None or self._high is None:
            raise RuntimeError("calibrate() before anything was observed")
        weighted = [(rows, weight) for rows, weight in self._samples if weight is not None]
        # Of a batch without weights among others nothing mattered.
        sample = torch.cat([rows for rows, _ in weighted or self._samples])
        importance = torch.cat([weight for _, weight in weighted]).cpu() if weighted else None
        ours = self._low.cpu(), self._high.cpu(), sample.cpu(), importance
        lows, highs, samples, weights = zip(*gather_object([ours]), strict=True)
        low, high, sample = torch.stack(lows).amin(0), torch.stack(highs).amax(0), torch.cat(samples)
        weight = None if any(part is None for part in weights) else torch.cat(weights)
        if not bool(torch.isfinite(low).all() and torch.isfinite(high).all()):
            raise DataError("the FP32 model produces NaN or infinite activations on the calibration images.")
        lowest, highest = float(low.min()), float(high.max())
        if self.shiftable and -_SHIFTABLE * highest < lowest < 0:
            self.shift = float(grid.round_scale(torch.tensor(-lowest), "fp16"))
            self.signed = False
            low, high, sample = low + self.shift, high + self.shift, sample + self.shift
        if self.signed is None:
            self.signed = lowest < 0
        if self._probabilities:
            self.bits = self.softmax_bits
        if not self.signed:
            self.bits = min(self.bits, _UNSIGNED_BITS)
        low_code, high_code = grid.code_limits(self.bits, self.signed)
        if method == "percentile":
            low = torch.quantile(sample, percentile / 100, dim=0)
            high = torch.quantile(sample, 1 - percentile / 100, dim=0)
        scale = high / high_code if low_code == 0 else torch.maximum(high / high_code, low / low_code)
        scale = scale.clamp_min(grid.SMALLEST_SCALE)
        if method == "mse":
            scale = best_scale(sample, scale, self.bits, self.signed, weight).clamp_min(grid.SMALLEST_SCALE)
        full = self._probabilities and self.softmax_scale == "full"
        if full:
            scale = torch.full_like(scale, 1 / high_code)
        self.set_scale(scale if self.per_channel else scale.reshape(()))
        self.raw_scale.requires_grad_(not full)
        self._low = self._high = None
        self._samples = []
        self.mode = "quantize"


def _sums_to_one(x: Tensor) -> bool:
    """Whether the rows of ``x`` [..., M, N] are what a softmax returns; or the columns, as in v @ p^T."""
    sums = x.float().sum(-1), x.float().sum(-2)
    return bool((x >= 0).all()) and any(torch.allclose(s, torch.ones_like(s), atol=0.01) for s in sums)


def best_scale(rows: Tensor, largest: Tensor, bits: int, signed: bool, weight: Tensor | None = None) -> Tensor:
    """Per column, the scale in 2 … 100 % of ``largest`` with the least (weighted) squared error.

    ``rows``: [R, C]; ``largest``: [C]; ``weight``: [R, 1] or [R, C], the importance of each value. A column in which
    nothing matters counts all values alike. Returns [C].
    """
    if weight is not None:
        weight = torch.where(weight.sum(0) > 0, weight, torch.ones_like(weight))
    best, best_error = largest, torch.full_like(largest, torch.inf)
    parts = list(_parts(rows) if weight is None else _parts(rows, weight))

    def attempt(scale: Tensor) -> None:
        nonlocal best, best_error
        error = torch.zeros_like(largest)
        for part, *matters in parts:
            squares = (grid.quantize(part, scale, bits, signed) * scale).sub_(part).square_()
            error += (squares.mul_(matters[0]) if matters else squares).sum(0)
        better = error < best_error
        best, best_error = torch.where(better, scale, best), torch.where(better, error, best_error)

    step = _SMALLEST_SHARE ** (-1 / (_SHARES - 1))
    for number in range(_SHARES):
        attempt(largest * _SMALLEST_SHARE * step**number)
    middle = best
    for number in range(1 - _FINE, _FINE):
        if number != 0:
            attempt(torch.minimum(middle * step ** (number / _FINE), largest))
    return best
