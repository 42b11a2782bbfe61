"""The first scales: a few training images run through the float model, with every quantiser observing.

Before that, whatever changes no output is arranged so that it can be quantised well (``calibration.centre`` and
``calibration.equalize``); before the conversion, :mod:`gplq.transforms.rotate` has done the same to the whole network.
"""

import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from gplq.data import ImageSet, batches, draw
from gplq.importance import IMAGES_AT_ONCE, projected
from gplq.layers import QuantAttention
from gplq.lsq import ActivationQuantizer
from gplq.pca import Features
from gplq.processes import device_of, share, total
from gplq.progress import progress
from gplq.recipe import Recipe
from gplq.survey import frozen_parameters

# Images of the statistics that centring and equalising need.
_FIRST_IMAGES = 64


def activation_quantizers(model: nn.Module) -> dict[str, ActivationQuantizer]:
    """The learnable quantisers of a converted model, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, ActivationQuantizer)}


def calibrate(model: nn.Module, images: ImageSet, recipe: Recipe, batch_size: int = 64) -> None:
    """Set every quantiser's scale from training images, in place; the model quantises from then on.

    Importance, if the recipe wants it, is how much the features (what the classifier reads, or else the outputs)
    depend on a value: of each image one random projection of them is run backwards.

    Memory: one batch, for importance of at most 16 images, and a bounded sample a quantiser, whatever
    ``recipe.calibration.images`` is. Several processes share the images and end with the same scales.
    """
    weighs = recipe.calibration.importance == "gradient"
    batch_size = min(batch_size, IMAGES_AT_ONCE) if weighs else batch_size
    indices = share(draw(len(images), recipe.calibration.images, recipe.seed))
    count = math.ceil(len(indices) / batch_size)
    generator = torch.Generator().manual_seed(recipe.seed)
    with Features(model) as features, frozen_parameters(model):

        def run(batch: tuple[Tensor, Tensor]) -> Tensor:
            model(batch[0].clone().requires_grad_() if weighs else batch[0])
            return projected(features, generator)

        calibrate_on(model, run, batches(images, batch_size, indices), count, recipe)


def calibrate_on(
    model: nn.Module, run: Callable[[Any], object], data: Iterable[Any], count: int, recipe: Recipe
) -> None:
    """Set every quantiser's scale from what passes through it while ``run`` gets the first ``count`` batches.

    ``run`` may return a scalar, such as a loss: its gradient then says how much each value matters, if the recipe asks
    for importance. No parameter keeps a gradient.
    """
    settings = recipe.calibration
    quantizers = activation_quantizers(model)
    device = device_of(model)
    weighs = settings.importance == "gradient"
    data = itertools.islice(data, count)
    if settings.centre or settings.equalize:
        first = _first(data)
        _arrange(model, lambda: [run(send_to_device(batch, device)) for batch in first], recipe)
        data = itertools.chain(first, data)
    for quantizer in quantizers.values():
        quantizer.observe(count)
        quantizer.parametrization = recipe.stage1.scale_parametrization
        quantizer.gradient_scale = recipe.stage1.scale_gradient_factor
    with progress(count, "Calibration", "batch") as bar:
        for batch in data:
            with torch.set_grad_enabled(weighs):
                found = run(send_to_device(batch, device))
            if weighs and isinstance(found, Tensor) and found.requires_grad and found.numel() == 1:
                found.backward()
                model.zero_grad(set_to_none=True)
            bar.update()
    methods = {"linear": settings.linear_range, "matmul": settings.matmul_range, "edge": "minmax"}
    with progress(len(quantizers), "Ranges", "quantiser") as bar:
        for quantizer in quantizers.values():
            quantizer.calibrate(methods[quantizer.kind], settings.percentile)
            bar.update()


def _first(data: Iterable[Any]) -> list[Any]:
    """The first batches: of (images, …) as many as hold 64 images, of anything else one."""
    found: list[Any] = []
    seen = 0
    for batch in data:
        found.append(batch)
        images = batch[0] if isinstance(batch, tuple | list) and batch else batch
        seen += len(images) if isinstance(images, Tensor) and images.ndim == 4 else _FIRST_IMAGES
        if seen >= _FIRST_IMAGES:
            break
    return found


class _Statistics:
    """Of the operands of one attention, over some batches; sums over all processes once they are asked for."""

    def __init__(self) -> None:
        self.query = self.key = self.key_sum = self.value_sum = self.squares = torch.zeros(())
        self.tokens = torch.zeros((), dtype=torch.float64)

    def see_scores(self, q: Tensor, k: Tensor) -> None:
        """q: [B, H, N, D]; k: [B, H, D, N]."""
        self.query = torch.maximum(self.query.to(q.device), q.abs().amax((0, 2)).flatten())  # [H * D]
        self.key = torch.maximum(self.key.to(k.device), k.abs().amax((0, 3)).flatten())
        self.key_sum = self.key_sum.to(k.device) + k.double().sum((0, 3)).flatten()
        self.tokens = self.tokens.to(k.device) + k.shape[0] * k.shape[3]

    def see_values(self, v: Tensor) -> None:
        """v: [B, H, N, D]."""
        self.value_sum = self.value_sum.to(v.device) + v.double().sum((0, 2)).flatten()

    def see_projected(self, x: Tensor) -> None:
        """x: [B, N, H * D]."""
        self.squares = self.squares.to(x.device) + x.double().square().sum((0, 1))


@torch.no_grad()
def _arrange(model: nn.Module, run: Callable[[], object], recipe: Recipe) -> None:
    """Centre and equalise plain attentions by what they see while ``run`` runs; several processes agree on it."""
    attentions = {name: module for name, module in model.named_modules() if isinstance(module, QuantAttention)}
    if recipe.calibration.centre:
        for name, seen in _watched(attentions, run).items():
            tokens = total(seen.tokens)
            means = (total(part) / tokens for part in (seen.key_sum, seen.value_sum))
            attentions[name].centre(*(mean.to(attentions[name].k.weight.dtype) for mean in means))
    if recipe.calibration.equalize:
        for name, seen in _watched(attentions, run).items():
            query, key = total(seen.query), total(seen.key)
            attentions[name].equalize(query, key)
            attentions[name].spread((total(seen.squares) / total(seen.tokens)).sqrt().to(query.dtype))


def _watched(attentions: dict[str, QuantAttention], run: Callable[[], object]) -> dict[str, _Statistics]:
    """What the attentions that run see."""
    seen = {name: _Statistics() for name in attentions}
    handles = []
    for name, attention in attentions.items():
        note = seen[name]
        handles += [
            attention.qk.register_forward_pre_hook(lambda _, args, note=note: note.see_scores(*args)),
            attention.pv.register_forward_pre_hook(lambda _, args, note=note: note.see_values(args[1])),
            attention.proj.register_forward_pre_hook(lambda _, args, note=note: note.see_projected(args[0])),
        ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return {name: note for name, note in seen.items() if note.tokens > 0}
