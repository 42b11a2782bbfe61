"""How much each token matters: the size of its gradient, where a layer computes it.

A class token is one of 257, and in the last block the only one that counts. Errors that are averaged over all tokens
alike spend the codes on those that no one reads. What is run backwards is a random projection of the features, so that
no label and no loss is needed: the mean of the squared gradients over projections is the diagonal of the Gauss-Newton
matrix (Fisher's, for the features' squared error).
"""

import itertools
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from gplq.convert import QuantLayer
from gplq.layers import QuantAttention, QuantConv, QuantPatchConv
from gplq.pca import Features
from gplq.processes import computes_in_bf16
from gplq.progress import progress
from gplq.survey import frozen_parameters

# Images at a time where a backward pass follows: memory.
IMAGES_AT_ONCE = 16
# What a token counts at least, as a share of the mean: those that matter alone do not fill a Hessian.
_LEAST = 0.1


def projected(features: Features, generator: torch.Generator) -> Tensor:
    """A random projection of the features of the last forward pass, a scalar; drawn alike on every device."""
    parts = [(x.float() * torch.randn(x.shape, generator=generator).to(x.device)).sum() for x in features.tensors]
    return torch.stack(parts).sum()


def token_importance(
    model: nn.Module, layers: dict[str, QuantLayer], images: Iterable[Tensor], seed: int, count: int | None = None
) -> dict[str, list[Tensor]]:
    """For each layer that has a gradient, the weight of each row of its output, batch by batch.

    Args:
        model: converted and calibrated, not frozen.
        layers: by name; of an attention the rows of queries, keys and values are averaged.
        images: batches [B, C, H, W] on the model's device.
        seed: of the random projections.
        count: of the images, if it is known, for the progress bar.

    Returns:
        By name: for each batch float32 [rows] on the CPU, of mean 1.1; rows are tokens, or a
        convolution's pixels.
    """
    generator = torch.Generator().manual_seed(seed)
    notes: dict[str, list[_Note]] = {}
    handles = []
    for name, layer in layers.items():
        outputs = [layer.q, layer.k, layer.v] if isinstance(layer, QuantAttention) else [layer]
        notes[name] = [_Note(pixels=isinstance(layer, QuantConv | QuantPatchConv)) for _ in outputs]
        handles += [output.register_forward_hook(note) for note, output in zip(notes[name], outputs, strict=True)]
    found: dict[str, list[Tensor]] = {name: [] for name in layers}
    try:
        with (
            torch.enable_grad(),
            frozen_parameters(model),
            Features(model) as features,
            progress(count, "Importance of tokens", "image") as bar,
        ):
            for batch in images:
                for part in batch.split(IMAGES_AT_ONCE):
                    for note in itertools.chain.from_iterable(notes.values()):
                        note.called = False
                    # BF16 is exact enough for a weight, and twice as fast where it is computed in.
                    with torch.autocast(part.device.type, torch.bfloat16, enabled=computes_in_bf16(part.device)):
                        model(part.clone().requires_grad_())
                    scalar = projected(features, generator)
                    if scalar.requires_grad:
                        scalar.backward()
                    bar.update(len(part))
                for name, parts in notes.items():
                    found[name] += _together([note.take() for note in parts])
    finally:
        for handle in handles:
            handle.remove()
    return {name: [rows + _LEAST for rows in batches] for name, batches in found.items() if batches}


def _together(parts: list[Tensor]) -> list[Tensor]:
    """The mean of several outputs' rows, each of mean 1; nothing if no gradient reaches them.

    Where one does and is zero throughout, in a batch of which nothing passes, all rows count alike.
    """
    reached = [rows for rows in parts if len(rows)]
    each = [rows / rows.mean() for rows in reached if float(rows.sum()) > 0] or [torch.ones_like(x) for x in reached]
    return [torch.stack(each).mean(0)] if each else []


class _Note:
    """Keeps the size of an output's gradient, one number a row; of several calls in a forward pass, of the first."""

    def __init__(self, pixels: bool) -> None:
        self.pixels, self.called = pixels, False
        self._found: list[Tensor] = []

    def __call__(self, _: nn.Module, __: object, output: Tensor) -> None:
        if output.requires_grad and not self.called:  # as gplq.stream.input_rows
            output.register_hook(self._keep)
        self.called = True

    def _keep(self, gradient: Tensor) -> None:
        rows = gradient.permute(0, 2, 3, 1) if self.pixels else gradient  # [B, N, H, W] -> [B, H, W, N]
        self._found.append(rows.reshape(-1, rows.shape[-1]).float().square().mean(1).sqrt().cpu())

    def take(self) -> Tensor:
        """What has been kept since the last time, [rows]."""
        rows = torch.cat(self._found) if self._found else torch.zeros(0)
        self._found = []
        return rows
