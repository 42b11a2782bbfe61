"""Stage 2: weights to 4 bits without training.

Block after block, linear after linear, each on the inputs that it will really get, quantised and coming out of the
layers that are already quantised. Per linear: fold the activation scales (:mod:`gplq.fold`), choose one scale an
output channel, round. Rounding is either to nearest, or second-order (Frantar et al., GPTQ, 2023): columns are rounded
one after the other and each column's error is undone as far as possible by the columns that follow, which minimises
|| (W - W_q) X ||^2 for the inputs X at no cost at run time.
"""

import torch
from torch import Tensor, nn

from gplq.data import ImageSet, batches, draw
from gplq.fold import fold_channels, norm_before, readers
from gplq.grid import code_limits, quantize, round_scale
from gplq.integer import FrozenQuantizer, IntegerLinear, quantize_rows
from gplq.layers import QuantAttention, QuantLinear, QuantPatchConv, blocks, is_edge
from gplq.lsq import ActivationQuantizer, best_scale
from gplq.ops import Codes
from gplq.progress import progress
from gplq.recipe import Recipe


@torch.no_grad()
def quantize_weights(model: nn.Module, images: ImageSet, recipe: Recipe, batch_size: int = 64) -> None:
    """Freeze a trained model in place: every quantiser and weight becomes integer."""
    quantizer = _WeightQuantizer(recipe)
    edges = [(name, module) for name, module in _layers(model) if is_edge(name)]
    for name, layer in edges:
        quantizer.freeze_edge(name, layer)
    stream = _BlockInputs(model, images, recipe, batch_size)
    named = blocks(model)
    with progress(len(named), "Stage 2: weights", "block") as bar:
        for block_name, block in named:
            layers = [(name, layer) for name, layer in _layers(model) if name.startswith(f"{block_name}.")]
            for name, layer in layers:
                norm = norm_before(block, name.removeprefix(f"{block_name}."))
                quantizer.freeze(name, layer, norm, block, stream)
            stream.advance(block)
            bar.update()


def _layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The layers that own weights, in the order in which they run (the order of definition, in timm's ViTs)."""
    found: list[tuple[str, nn.Module]] = []
    for name, module in model.named_modules():
        if isinstance(module, QuantAttention | QuantLinear | QuantPatchConv):
            found.append((name, module))
    return found


class _BlockInputs:
    """The inputs of the current block, for the calibration images, as the quantised model computes them."""

    def __init__(self, model: nn.Module, images: ImageSet, recipe: Recipe, batch_size: int) -> None:
        self.batches: list[Tensor] = []
        first = blocks(model)[0][1]

        def keep(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            self.batches.append(args[0])
            raise _EnoughError

        handle = first.register_forward_pre_hook(keep)
        for inputs, _ in batches(images, batch_size, draw(len(images), recipe.stage2.images, recipe.seed)):
            try:
                model(inputs)
            except _EnoughError:
                continue
        handle.remove()

    def advance(self, block: nn.Module) -> None:
        self.batches = [block(x) for x in self.batches]

    def second_moment(self, block: nn.Module, linear: nn.Module) -> Tensor:
        """X X^T / rows of a linear's quantised inputs while ``block`` runs, FP64 -> [K, K]."""
        moment = torch.zeros(())
        rows = 0

        def collect(_: nn.Module, args: tuple[Tensor | Codes]) -> None:
            nonlocal moment, rows
            x = args[0].values * args[0].scale if isinstance(args[0], Codes) else args[0]
            x = x.reshape(-1, x.shape[-1])
            moment = moment + (x.T @ x).double()
            rows += len(x)
            raise _EnoughError

        handle = linear.register_forward_pre_hook(collect)
        for x in self.batches:
            try:
                block(x)
            except _EnoughError:
                continue
        handle.remove()
        return moment / rows


class _EnoughError(Exception):
    """Ends a forward pass early: what was wanted of it has been seen."""


class _WeightQuantizer:
    """Freezes one layer after the other as a recipe wants it."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.settings = recipe.stage2

    def freeze(
        self, name: str, layer: nn.Module, norm: nn.Module | None, block: nn.Module, stream: _BlockInputs
    ) -> None:
        """Fold, then freeze a layer inside a block: its quantisers first, then its linears."""
        linears = readers(layer)
        self._freeze_input(name, layer, linears, norm)
        # The linears of one layer read the same input, so one matrix serves all of them.
        moment = stream.second_moment(block, linears[0])
        names = {id(module): child for child, module in layer.named_children()}
        for linear in linears:
            child = names[id(linear)]
            setattr(layer, child, self._round(linear, moment, f"{name}.{child}"))
        if isinstance(layer, QuantAttention):
            for matmul in ("qk", "pv"):
                for operand in ("a_quantizer", "b_quantizer"):
                    holder = getattr(layer, matmul)
                    self._freeze_quantizer(holder, operand, f"{name}.{matmul}.{operand}", None)

    def freeze_edge(self, name: str, layer: nn.Module) -> None:
        """First and last layer: more bits, rounded to nearest."""
        self._freeze_input(name, layer, readers(layer), None)
        linear = readers(layer)[0]
        bits = self.recipe.first_last_bits
        scale = round_scale(linear.weight.abs().amax(1) / code_limits(bits, signed=True)[1], self.recipe.scale_grid)
        codes = quantize_rows(linear.weight, scale, bits)
        layer.linear = IntegerLinear(codes, scale, _data(linear.bias), bits, f"{name}.linear")

    def _freeze_input(self, name: str, layer: nn.Module, linears: list[nn.Linear], norm: nn.Module | None) -> None:
        quantizer = layer.input_quantizer
        assert isinstance(quantizer, ActivationQuantizer)
        factor = None
        if quantizer.per_channel:
            factor = fold_channels(quantizer.scale, linears, norm)
            quantizer.log_scale = nn.Parameter(torch.zeros(()))
        self._freeze_quantizer(layer, "input_quantizer", f"{name}.input_quantizer", factor)

    def _freeze_quantizer(self, holder: nn.Module, child: str, name: str, factor: Tensor | None) -> None:
        quantizer = getattr(holder, child)
        scale = round_scale(quantizer.scale.detach(), self.recipe.scale_grid)
        frozen = FrozenQuantizer(scale, factor, quantizer.bits, quantizer.signed, name)
        setattr(holder, child, frozen)

    def _round(self, linear: nn.Linear, moment: Tensor, name: str) -> IntegerLinear:
        bits = self.recipe.weight_bits
        scale = self._weight_scale(linear.weight, moment)
        if self.settings.rounding == "gptq":
            codes = gptq_codes(linear.weight, scale, moment, bits, self.settings.damping)
        else:
            codes = quantize_rows(linear.weight, scale, bits)
        return IntegerLinear(codes, scale, _data(linear.bias), bits, name)

    def _weight_scale(self, weight: Tensor, moment: Tensor) -> Tensor:
        """One scale an output channel [N]; the same for all channels if the recipe wants one a tensor."""
        bits = self.recipe.weight_bits
        rows = weight if self.settings.granularity == "per_channel" else weight.reshape(1, -1)
        columns = rows.T  # best_scale chooses one scale a column
        importance = moment.diagonal().float().repeat(columns.shape[0] // len(moment))[:, None]
        if self.settings.range == "percentile":
            largest = torch.quantile(columns.abs(), 1 - self.settings.percentile / 100, dim=0)
        else:
            largest = columns.abs().amax(0)
        scale = (largest / code_limits(bits, signed=True)[1]).clamp_min(1e-8)
        if self.settings.range == "mse":
            scale = best_scale(columns, scale, bits, signed=True, weight=importance)
        return round_scale(scale, self.recipe.scale_grid).expand(len(weight)).clone()


def _data(bias: nn.Parameter | None) -> Tensor | None:
    return None if bias is None else bias.detach().clone()


def gptq_codes(weight: Tensor, scale: Tensor, moment: Tensor, bits: int, damping: float) -> Tensor:
    """Second-order rounding of a weight [N, K] for inputs of second moment [K, K]; int8 codes [N, K].

    Columns are taken by falling importance. ``damping`` is the share of the mean diagonal that is added to the
    diagonal, for inputs of low rank.
    """
    hessian = moment.double().clone()
    diagonal = hessian.diagonal()
    diagonal += damping * diagonal.mean().clamp_min(1e-12)
    order = diagonal.argsort(descending=True)
    hessian = hessian[order][:, order]
    # Row k of the upper Cholesky factor of the inverse tells how column k's error is undone by the later columns.
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True).float()
    remaining = weight.detach()[:, order].clone()
    codes = torch.empty_like(remaining)
    for k in range(remaining.shape[1]):
        column = remaining[:, k]
        codes[:, k] = quantize(column, scale, bits, signed=True)
        error = (column - codes[:, k] * scale) / factor[k, k]
        remaining[:, k + 1 :] -= torch.outer(error, factor[k, k + 1 :])
    return codes[:, order.argsort()].to(torch.int8)
