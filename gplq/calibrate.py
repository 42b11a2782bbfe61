"""The first scales: one pass over a few training images with every quantiser observing."""

import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from gplq.data import ImageSet, batches, draw
from gplq.layers import QuantAttention
from gplq.lsq import ActivationQuantizer
from gplq.processes import device_of, share, total
from gplq.progress import progress
from gplq.recipe import Recipe


def activation_quantizers(model: nn.Module) -> dict[str, ActivationQuantizer]:
    """The learnable quantisers of a converted model, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, ActivationQuantizer)}


def calibrate(model: nn.Module, images: ImageSet, recipe: Recipe, batch_size: int = 64) -> None:
    """Set every quantiser's scale from training images, in place; the model quantises from then on.

    Memory: one batch and a bounded sample a quantiser, whatever ``recipe.calibration.images`` is. Several processes
    share the images and end with the same scales.
    """
    indices = share(draw(len(images), recipe.calibration.images, recipe.seed))
    count = math.ceil(len(indices) / batch_size)
    calibrate_on(model, lambda batch: model(batch[0]), batches(images, batch_size, indices), count, recipe)


@torch.no_grad()
def calibrate_on(
    model: nn.Module, run: Callable[[Any], object], data: Iterable[Any], count: int, recipe: Recipe
) -> None:
    """Set every quantiser's scale from what passes through it while ``run`` gets the first ``count`` batches."""
    settings = recipe.calibration
    quantizers = activation_quantizers(model)
    device = device_of(model)
    if settings.equalize:
        data = iter(data)
        first = list(itertools.islice(data, 1))
        _equalize(model, lambda: [run(send_to_device(batch, device)) for batch in first])
        data = itertools.chain(first, data)
    for quantizer in quantizers.values():
        quantizer.mode = "observe"
        quantizer.parametrization = recipe.stage1.scale_parametrization
        quantizer.gradient_scale = recipe.stage1.scale_gradient_factor
    with progress(count, "Calibration", "batch") as bar:
        for batch in itertools.islice(data, count):
            run(send_to_device(batch, device))
            bar.update()
    methods = {"linear": settings.linear_range, "matmul": settings.matmul_range, "edge": "minmax"}
    for quantizer in quantizers.values():
        quantizer.calibrate(methods[quantizer.kind], settings.percentile)


def _equalize(model: nn.Module, run: Callable[[], object]) -> None:
    """Equalise queries and keys of plain attentions by their ranges on one batch; several processes agree on them."""
    ranges: dict[str, tuple[Tensor, Tensor]] = {}

    def see(name: str, q: Tensor, k: Tensor) -> None:
        # [B, H, N, D] and [B, H, D, N] -> [H * D]
        ranges[name] = q.abs().amax((0, 2)).flatten(), k.abs().amax((0, 3)).flatten()

    attentions = {name: module for name, module in model.named_modules() if isinstance(module, QuantAttention)}
    handles = [
        attention.qk.register_forward_pre_hook(lambda _, args, name=name: see(name, *args))
        for name, attention in attentions.items()
    ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    for name, attention in attentions.items():
        if name in ranges:
            query, key = (total(largest) for largest in ranges[name])
            attention.equalize(query, key)
