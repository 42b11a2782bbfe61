"""The first scales: one pass over a few training images with every quantiser observing."""

import torch
from torch import nn

from gplq.data import ImageSet, batches, draw
from gplq.lsq import ActivationQuantizer
from gplq.progress import progress
from gplq.recipe import Recipe


def activation_quantizers(model: nn.Module) -> dict[str, ActivationQuantizer]:
    """The learnable quantisers of a converted model, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, ActivationQuantizer)}


@torch.no_grad()
def calibrate(model: nn.Module, images: ImageSet, recipe: Recipe, batch_size: int = 64) -> None:
    """Set every quantiser's scale from training images, in place; the model quantises from then on.

    Memory: one batch and a bounded sample a quantiser, whatever ``recipe.calibration.images`` is.
    """
    settings = recipe.calibration
    quantizers = activation_quantizers(model)
    for quantizer in quantizers.values():
        quantizer.mode = "observe"
    indices = draw(len(images), settings.images, recipe.seed)
    with progress(len(indices), "Calibration", "image") as bar:
        for inputs, labels in batches(images, batch_size, indices):
            model(inputs)
            bar.update(len(labels))
    methods = {"linear": settings.linear_range, "matmul": settings.matmul_range, "edge": "minmax"}
    for quantizer in quantizers.values():
        quantizer.calibrate(methods[quantizer.kind], settings.percentile)
