"""Stage 2: weights to 4 bits without training.

Block after block, linear after linear, each on the inputs that it will really get, quantised and coming out of the
layers that are already quantised. Per linear: fold the activation scales (:mod:`gplq.fold`), correct, choose one scale
an output channel and round (:mod:`gplq.rounding`). What is lost can be compensated in three ways, next to
second-order rounding itself; the first two cost nothing at run time:

    ridge      a regression of what the linear's output lacks, compared with the Stage 1 model's, on its inputs
               (Zhong et al., ERQ, 2024); added to the weight before it is rounded
    adaround   the codes of a block learned by gradient (:mod:`gplq.adaround`)
    qwt        a linear layer beside the block (:mod:`gplq.compensate`)

Each is fitted on four fifths of the calibration images, judged on the others, and dropped where it does not help.
"""

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gplq.adaround import learn_codes
from gplq.compensate import attach_compensation, to_half, why_not
from gplq.convert import quant_layers, units
from gplq.data import ImageSet, batches, draw
from gplq.errors import UsageError
from gplq.fold import fold_channels, foldable_norms, readers
from gplq.grid import code_limits, round_scale
from gplq.importance import token_importance
from gplq.integer import FrozenQuantizer, IntegerConv, IntegerLinear, integer_layer, quantize_rows
from gplq.layers import QuantMatMul
from gplq.lsq import ActivationQuantizer
from gplq.moments import Moments, ridge_regression
from gplq.progress import progress
from gplq.recipe import Recipe
from gplq.rounding import round_weight
from gplq.stream import Call, Stream, execution_order, first_tensor, input_rows

T = TypeVar("T")


@dataclass(frozen=True)
class Compensation:
    """One attempt at making up for what rounding loses.

    Attributes:
        method: "ridge", "adaround" or "qwt".
        where: name of the linear (ridge) or block.
        r2: share of the output's squared error, on images that were not fitted, that it removes; negative if it adds
            some, None if it could not be tried.
        kept: whether it is part of the result.
        added_bytes: what it adds to the model, in FP16.
        note: why it could not be tried.
    """

    method: str
    where: str
    r2: float | None
    kept: bool
    added_bytes: int = 0
    note: str = ""


@dataclass(frozen=True)
class BlockReport:
    """What Stage 2 did to one block.

    Attributes:
        name: of the block.
        error: squared error of its output by its squared size, against the model before Stage 2 and with whatever the
            blocks before have added, on images that were not fitted.
        compensations: in the order in which they were tried.
    """

    name: str
    error: float
    compensations: tuple[Compensation, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "compensations": [asdict(entry) for entry in self.compensations]}

    def __str__(self) -> str:
        parts = [f"{self.name}: relative output error {self.error:.2%}"]
        for method in dict.fromkeys(entry.method for entry in self.compensations):
            entries = [entry for entry in self.compensations if entry.method == method]
            shares = [entry.r2 for entry in entries if entry.r2 is not None]
            kept = sum(entry.kept for entry in entries)
            mean = f", R² {sum(shares) / len(shares):.3f}" if shares else f", {entries[0].note}"
            parts.append(f"{method} kept {kept} of {len(entries)}{mean}")
        return "; ".join(parts)


@torch.no_grad()
def quantize_weights(
    model: nn.Module, images: ImageSet | Iterable[Tensor], recipe: Recipe, batch_size: int = 64
) -> list[BlockReport]:
    """Freeze a trained model in place: every quantiser and weight becomes integer.

    Memory: a second copy of the model, and the inputs of one block of each for all calibration images.

    Args:
        model: what :func:`gplq.convert.convert` was given and Stage 1 has trained; of a detector, its backbone.
        images: of which ``recipe.stage2.images`` are drawn. Or a list (or a loader that does not shuffle) of batches,
            float32 [B, C, H, W], just as the model gets them: all are taken, several times, always the same ones; of
            five or more, the last fifth judges.
        recipe: every setting.
        batch_size: images at once, of an image set.

    Returns:
        One report for each block.

    Raises:
        UsageError: there are no batches, or they can be run through only once.
    """
    if isinstance(images, ImageSet):
        images = _Drawn(images, recipe, batch_size)
    if iter(images) is images or next(iter(images), None) is None:  # a generator; nothing at all
        raise UsageError("Stage 2 runs through its batches several times: give it a list, with at least one batch.")
    work = _Stage2(model, images, recipe)
    reports = []
    with progress(len(work.stream.steps), "Stage 2: weights", "block") as bar:
        for step in work.stream.steps:
            reports.append(work.freeze_step(step))
            bar.update()
    return reports


class _Drawn:
    """Batches of some images of a set, the same ones at each iteration."""

    def __init__(self, images: ImageSet, recipe: Recipe, batch_size: int) -> None:
        self.images = images
        self.chosen = draw(len(images), recipe.stage2.images, recipe.seed)
        # At least five batches, if there are as many images: the last fifth of them judges.
        self.batch_size = max(1, min(batch_size, len(self.chosen) // 5))

    def __iter__(self) -> Iterator[Tensor]:
        return (inputs for inputs, _ in batches(self.images, self.batch_size, self.chosen))


class _Stage2:
    """Two models walked through side by side: the one that is frozen, and a copy of it from before."""

    def __init__(self, model: nn.Module, images: Iterable[Tensor], recipe: Recipe) -> None:
        self.model, self.recipe, self.settings = model, recipe, recipe.stage2
        reference = copy.deepcopy(model)
        layers = [name for name, _ in quant_layers(model)]
        self.norms = foldable_norms(model)
        inside = tuple(f"{name}." for name, _ in units(model))
        inner = [name for name in layers if f"{name}.".startswith(inside)]
        for name in layers:
            if name not in inner:
                self._freeze_edge(name)
        device = next(model.parameters()).device

        def load() -> Iterator[Tensor]:
            return (inputs.to(device) for inputs in images)

        self.stream = Stream(model, [name for name, _ in units(model)], load)
        self.reference = Stream(reference, self.stream.steps, load)
        self.layers = execution_order(model, inner, next(load())[:1])
        self.importance: dict[str, list[Tensor]] = {}
        if self.settings.importance == "gradient":
            owners = {name: layer for name, layer in quant_layers(reference) if name in inner}
            count = len(images.chosen) if isinstance(images, _Drawn) else None
            self.importance = token_importance(reference, owners, load(), recipe.seed, count)

    def freeze_step(self, step: str) -> BlockReport:
        """Freeze the layers of a step, one after the other, then the step as a whole; go on to the next one."""
        tried: list[Compensation] = []
        weights: dict[str, Tensor] = {}
        for name in self.layers:
            if name == step or name.startswith(f"{step}."):
                tried += self._freeze_layer(name, weights)
        self._freeze_products(step)
        if self.settings.rounding == "adaround":
            tried.append(self._learn_rounding(step, weights))
        if self.settings.compensation == "qwt":
            tried.append(self._compensate(step))
        report = BlockReport(step, self._relative_error(), tuple(tried))
        self.stream.advance()
        self.reference.advance()
        return report

    def _split(self, calls: list[T]) -> tuple[list[T], list[T]]:
        """Calls to fit on and calls to judge by; the same ones, if there is only one."""
        judged = max(1, len(calls) // 5)
        return calls[:-judged] or calls, calls[-judged:]

    def _pairs(self, judge: bool) -> list[tuple[Call, Call]]:
        """Calls of the current step in both models, for the same images."""
        return list(zip(*(self._split(stream.calls)[judge] for stream in (self.stream, self.reference)), strict=True))

    def _freeze_layer(self, name: str, weights: dict[str, Tensor]) -> list[Compensation]:
        """Fold, then freeze a layer: its quantisers first, then its linears, whose float weights go to ``weights``."""
        layer: Any = self.model.get_submodule(name)
        linears = readers(layer)
        self._freeze_input(name, layer, linears, self.norms.get(name))
        children = {id(module): f"{name}.{child}" for child, module in layer.named_modules()}
        names = [children[id(linear)] for linear in linears]
        # The linears of one layer read the same input, so one pass serves all of them.
        fitted = self._moments(name, names, judge=False)
        judged = self._moments(name, names, judge=True) if self.settings.compensation == "ridge" else Moments()
        tried: list[Compensation] = []
        start = 0
        for child, linear in zip(names, linears, strict=True):
            part = slice(start, start + len(linear.weight))
            start = part.stop
            weights[child] = _matrix(linear).clone()
            frozen, attempt = self._round(child, linear, fitted, judged, part)
            tried += [] if attempt is None else [attempt]
            _absorb(frozen, layer.input_quantizer.offset)
            self.model.set_submodule(child, frozen)
        return tried

    def _freeze_products(self, step: str) -> None:
        for name, product in self.model.get_submodule(step).named_modules(prefix=step):
            if isinstance(product, QuantMatMul):
                for operand in ("a_quantizer", "b_quantizer"):
                    quantizer = getattr(product, operand)
                    if isinstance(quantizer, ActivationQuantizer):  # else the product stays in floating point
                        scale = quantizer.scale.detach()
                        setattr(product, operand, self._frozen(quantizer, scale, None, f"{name}.{operand}"))

    def _moments(self, layer: str, names: list[str], judge: bool) -> Moments:
        """Of the input that the linears of a layer share, and of what their outputs lack if that is wanted."""
        here, there = (model.get_submodule(layer) for model in (self.model, self.reference.model))
        linears = [self.model.get_submodule(name) for name in names]
        wanted = [self.reference.model.get_submodule(name) for name in names]
        moments = Moments()
        pairs = self._pairs(judge)
        matters: Sequence[Tensor | None] = self._split(self.importance.get(layer, []))[judge] or [None] * len(pairs)
        for (call, reference), weights in zip(pairs, matters, strict=True):
            x = input_rows(self.stream.module, here, call)
            if self.settings.compensation == "ridge":
                x_wanted = input_rows(self.reference.module, there, reference)
                lack = [_applied(b, x_wanted) - _applied(a, x) for a, b in zip(linears, wanted, strict=True)]
                moments.add(x, torch.cat(lack, 1), weights)
            else:
                moments.add(x, weights=weights)
        return moments

    def _round(
        self, name: str, linear: nn.Linear, fitted: Moments, judged: Moments, part: slice
    ) -> tuple[IntegerLinear, Compensation | None]:
        plain = self._rounded(name, linear, _matrix(linear), linear.bias, fitted)
        if self.settings.compensation != "ridge":
            return plain, None
        fitted, judged = fitted.outputs(part), judged.outputs(part)
        correction = ridge_regression(fitted, self.settings.ridge, bias=linear.bias is not None).to(linear.weight.dtype)
        bias = None if linear.bias is None else linear.bias + correction[:, -1]
        corrected = self._rounded(name, linear, _matrix(linear) + correction[:, :-1], bias, fitted)
        before, after = (judged.error(_change(linear, result)) for result in (plain, corrected))
        kept = after < before
        attempt = Compensation("ridge", name, 1 - after / before if before > 0 else 0.0, kept)
        return (corrected if kept else plain), attempt

    def _rounded(
        self, name: str, linear: nn.Module, weight: Tensor, bias: Tensor | None, moments: Moments
    ) -> IntegerLinear:
        """``linear`` with codes for ``weight`` [N, K]; the bias absorbs the mean of the error."""
        correct = self.settings.bias_correction and bias is not None
        codes, scale = round_weight(weight, moments.inputs(centred=correct), self.recipe)
        if correct and bias is not None:
            lost = weight.double() - codes * scale[:, None].double()
            bias = bias + (lost @ moments.xx[:-1, -1]).to(bias.dtype)
        bias = None if bias is None else bias.detach().clone()
        shaped = codes.reshape(linear.weight.shape)  # type: ignore[arg-type]
        return integer_layer(linear, shaped, scale, bias, self.recipe.weight_bits, name)

    def _learn_rounding(self, step: str, weights: dict[str, Tensor]) -> Compensation:
        module, settings = self.stream.module, self.settings.adaround
        if any(isinstance(part, IntegerConv) for part in module.modules()):
            return Compensation("adaround", step, None, kept=False, note="it holds convolutions")
        calls = [call for call, _ in self._pairs(judge=False)]
        # From the same input, as for the compensation beside a block: what the blocks before have lost is noise here.
        targets = [first_tensor(call.run(self.reference.module)) for call in calls]
        inner = {name.removeprefix(step).removeprefix("."): weight for name, weight in weights.items()}
        with progress(settings.iterations, f"Rounding of {step}", "step") as bar:
            learned = learn_codes(module, inner, calls, targets, settings, self.recipe.seed, bar.update)
        linears: dict[str, Any] = {name: module.get_submodule(name) for name in learned}
        kept_back = {name: (linear.codes, linear.bias) for name, linear in linears.items()}
        before = self._own_error(module)
        for name, codes in learned.items():
            layer: Any = module.get_submodule(name.rpartition(".")[0])
            _recode(linears[name], codes, layer.input_quantizer.offset)
        after = self._own_error(module)
        kept = after < before
        if not kept:
            for name, (codes, bias) in kept_back.items():
                linears[name].codes, linears[name].bias = codes, bias
        return Compensation("adaround", step, 1 - after / before if before > 0 else 0.0, kept)

    def _compensate(self, step: str) -> Compensation:
        block, block_before = self.stream.module, self.reference.module
        first = self.stream.calls[0]
        note = why_not(block, first.args[0], first.run(block))
        if note is not None:
            return Compensation("qwt", step, None, kept=False, note=note)
        fitted, judged = Moments(), Moments()
        for moments, judge in ((fitted, False), (judged, True)):
            for call, _ in self._pairs(judge):
                # Both from the same input: what this block loses, not what those before have lost.
                lack = call.run(block_before) - call.run(block)
                moments.add(call.args[0].flatten(0, -2), lack.flatten(0, -2))
        correction = to_half(ridge_regression(fitted, self.settings.ridge, bias=True))
        before, after = judged.error(), judged.error(correction)
        kept = after < before
        if kept:
            attach_compensation(block, correction[:, :-1].contiguous(), correction[:, -1].clone())
        r2 = 1 - after / before if before > 0 else 0.0
        return Compensation("qwt", step, r2, kept, added_bytes=2 * correction.numel() if kept else 0)

    def _own_error(self, module: nn.Module) -> float:
        """Squared error of a step's output against the other model's, both from this model's input; images to judge."""
        return sum(
            float((first_tensor(call.run(module)) - first_tensor(call.run(self.reference.module))).square().sum())
            for call, _ in self._pairs(judge=True)
        )

    def _relative_error(self) -> float:
        """As ``_own_error``, but each model with its own input, and by the squared size of the output."""
        error = size = 0.0
        for call, reference in self._pairs(judge=True):
            wanted = first_tensor(reference.run(self.reference.module))
            error += float((first_tensor(call.run(self.stream.module)) - wanted).square().sum())
            size += float(wanted.square().sum())
        return error / max(size, 1e-30)

    def _freeze_edge(self, name: str) -> None:
        """First and last layer: more bits, rounded to nearest."""
        layer = self.model.get_submodule(name)
        self._freeze_input(name, layer, readers(layer), None)
        linear = readers(layer)[0]
        bits, weight = self.recipe.first_last_bits, _matrix(linear)
        scale = round_scale(weight.abs().amax(1) / code_limits(bits, signed=True)[1], self.recipe.scale_grid)
        codes = quantize_rows(weight, scale, bits).reshape(linear.weight.shape)
        bias = None if linear.bias is None else linear.bias.detach().clone()
        layer.linear = integer_layer(linear, codes, scale, bias, bits, f"{name}.linear")

    def _freeze_input(self, name: str, layer: nn.Module, linears: list[nn.Linear], norm: nn.Module | None) -> None:
        quantizer = layer.input_quantizer
        assert isinstance(quantizer, ActivationQuantizer)
        factor, scale = None, quantizer.scale.detach()
        if quantizer.per_channel:
            factor, scale = fold_channels(scale, linears, None if quantizer.shift else norm), torch.ones_like(scale[0])
        layer.input_quantizer = self._frozen(quantizer, scale, factor, f"{name}.input_quantizer")

    def _frozen(
        self, quantizer: ActivationQuantizer, scale: Tensor, factor: Tensor | None, name: str
    ) -> FrozenQuantizer:
        rounded = round_scale(scale, self.recipe.scale_grid)
        shift = torch.tensor(quantizer.shift, device=rounded.device) if quantizer.shift else None
        return FrozenQuantizer(rounded, factor, quantizer.bits, bool(quantizer.signed), name, shift)


def _absorb(linear: IntegerLinear, offset: Tensor | None, sign: int = -1) -> None:
    """Take out of the bias what the offset of the input adds to the output, with the very weights that it meets."""
    if offset is not None:
        assert linear.bias is not None  # convert() lets no other be shifted
        weight = (linear.codes * linear.weight_scale[:, None]).double()
        added = weight @ offset.double().expand(weight.shape[1])
        linear.bias = (linear.bias.double() + sign * added).to(linear.bias.dtype)


def _recode(linear: IntegerLinear, codes: Tensor, offset: Tensor | None) -> None:
    """Other codes, and what follows from them for the bias."""
    _absorb(linear, offset, sign=1)
    linear.codes = codes
    _absorb(linear, offset)


def _matrix(linear: Any) -> Tensor:
    """The weight [N, K]; of a convolution with K = C * kh * kw."""
    weight: Tensor = linear.weight
    return weight.detach().flatten(1)


def _applied(linear: Any, rows: Tensor) -> Tensor:
    return F.linear(rows, _matrix(linear), linear.bias)


def _change(linear: nn.Linear, result: IntegerLinear) -> Tensor:
    """What freezing has added to a linear's output, as a correction [N, K + 1] of [x, 1]."""
    weight = result.codes.flatten(1) * result.weight_scale[:, None].double() - _matrix(linear).double()
    bias = torch.zeros_like(weight[:, 0])
    if linear.bias is not None and result.bias is not None:
        bias = result.bias.double() - linear.bias.double()
    return torch.cat([weight, bias[:, None]], 1)
