"""The first scales: one pass over a few training images with every quantiser observing."""

import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import nn

from gplq.data import ImageSet, batches, draw
from gplq.lsq import ActivationQuantizer
from gplq.processes import device_of, share
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
    for quantizer in quantizers.values():
        quantizer.mode = "observe"
        quantizer.parametrization = recipe.stage1.scale_parametrization
        quantizer.gradient_scale = recipe.stage1.scale_gradient_factor
    device = device_of(model)
    with progress(count, "Calibration", "batch") as bar:
        for batch in itertools.islice(data, count):
            run(send_to_device(batch, device))
            bar.update()
    methods = {"linear": settings.linear_range, "matmul": settings.matmul_range, "edge": "minmax"}
    for quantizer in quantizers.values():
        quantizer.calibrate(methods[quantizer.kind], settings.percentile)
