"""Rotation of a float model, before it is quantised: other bases that leave the function as it is, but no outliers.

What 4 bits cannot hold is a few channels that are far larger than the others. An orthogonal change of basis spreads
them over all channels, and weights can take it in exactly, so that neither the architecture nor its cost changes:

    R1   the residual streams                   gplq.transforms.residual
    R2   queries and keys of each head          gplq.transforms.heads
    R3   values of each head                    gplq.transforms.heads

After SpinQuant (arXiv 2405.16406) and QuaRot (arXiv 2404.00456), with an own R1 that LayerNorm commutes with. Where
each applies is found by watching the model, not by its name; and whatever has been rewritten is proven by experiment:
if it changes the outputs, in FP64, it is taken back.
"""

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from gplq.errors import ModelError
from gplq.survey import input_size
from gplq.transforms.heads import find_heads, rotate_scores, rotate_values
from gplq.transforms.orthogonal import head_rotations, mean_keeping_rotation
from gplq.transforms.residual import change_basis, obstacle
from gplq.transforms.streams import agree, find_streams

RESIDUAL, SCORES, VALUES = "residual stream", "queries and keys", "values"


@dataclass(frozen=True)
class Rotation:
    """What :func:`rotate` did; names are those of ``named_modules``.

    Attributes:
        seed: of the random matrices.
        residual: rotated residual streams, by the norm that reads each of them first, with their channels.
        scores: attentions whose queries and keys have been rotated.
        values: attentions whose values have been rotated.
        skipped: what has not been, as ``<module>: <what>``, with the reason.
    """

    seed: int
    residual: dict[str, int]
    scores: list[str]
    values: list[str]
    skipped: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Plain data: nested dicts and lists of numbers and strings."""
        return asdict(self)

    def __str__(self) -> str:
        """One line, and a second one if something has been skipped."""
        streams, scores, values = len(self.residual), len(self.scores), len(self.values)
        line = f"rotated: residual streams: {streams}, {SCORES}: {scores}, {VALUES}: {values} (seed {self.seed})"
        if not self.skipped:
            return line
        (name, reason), more = next(iter(self.skipped.items())), len(self.skipped) - 1
        return f"{line}\nnot rotated: {name}: {reason}" + (f"; and {more} more" if more else "")


@dataclass(frozen=True)
class _Edit:
    """A rewrite of a model, in place, that should not change what it computes."""

    name: str
    kind: str
    apply: Callable[[nn.Module], None]
    size: int = 0


def rotate(model: nn.Module, image_size: tuple[int, int, int] | None = None, *, seed: int = 0) -> Rotation:
    """Rotate a float timm model, in place, wherever that leaves its outputs as they are.

    Module types, names and shapes of parameters stay; computed is in FP64, whatever the parameters' type.

    Args:
        model: not yet converted.
        image_size: channels, height and width of its images; what timm says, if None.
        seed: of the random orthogonal matrices; the same seed gives the same rotation.

    Raises:
        ModelError: the model has been converted already.
    """
    if hasattr(model, "gplq_structure"):
        raise ModelError("this model has quantisers already: rotate() belongs before convert().")
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(2, *(image_size or input_size(model)), generator=generator, dtype=torch.float64).to(device)
    work = copy.deepcopy(model).double().eval()
    edits, skipped = _plan(work, images, generator)
    done = _Trial(work, images).keep_exact(edits, skipped)
    _copy_changed(work, model)
    return Rotation(
        seed,
        residual={edit.name: edit.size for edit in done if edit.kind == RESIDUAL},
        scores=list(dict.fromkeys(edit.name for edit in done if edit.kind == SCORES)),
        values=list(dict.fromkeys(edit.name for edit in done if edit.kind == VALUES)),
        skipped=skipped,
    )


def _plan(model: nn.Module, images: Tensor, generator: torch.Generator) -> tuple[list[_Edit], dict[str, str]]:
    """What could be rotated, and why the rest cannot."""
    edits: list[_Edit] = []
    skipped: dict[str, str] = {}
    streams = find_streams(_perturbed(model), images)
    if not streams:
        skipped[f"model: {RESIDUAL}"] = "no norm reads a sum of layers whose channels can be followed"
    for stream in streams:
        name = next(iter(stream.norms))
        why = obstacle(model, stream)
        if why is None:
            matrix = mean_keeping_rotation(stream.size, generator)
            change = partial(change_basis, stream=stream, rotation=matrix)
            edits.append(_Edit(name, RESIDUAL, change, stream.size))
        else:
            skipped[f"{name}: {RESIDUAL}"] = why
    for name, heads in find_heads(copy.deepcopy(model), images[:1]).items():
        skipped.update({f"{name}: {kind}": why for kind, why in heads.reasons.items()})
        for query, key in heads.scores:
            matrices = head_rotations(query.indices.shape, generator)
            change = partial(rotate_scores, query=query, key=key, rotations=matrices)
            edits.append(_Edit(name, SCORES, change))
        for value, columns in heads.values:
            matrices = head_rotations(value.indices.shape, generator)
            change = partial(rotate_values, value=value, columns=columns, rotations=matrices)
            edits.append(_Edit(name, VALUES, change))
    return edits, skipped


@torch.no_grad()
def _perturbed(model: nn.Module) -> nn.Module:
    """A copy without zeros and ones that happen to hide what a parameter does."""
    generator = torch.Generator().manual_seed(0)
    model = copy.deepcopy(model)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter)
        parameter.add_(0.1 * noise * (parameter.square().mean().sqrt() + 0.1))
    return model


class _Trial:
    """Applies rewrites to a model in FP64 and takes those back that change its outputs."""

    # Of the largest output. Correct rewrites differ by 1e-13, but by 1e-8 if a model computes something in FP32
    # whatever it gets. A wrong one of an attention that LayerScale makes small, 1e-5, is still far above.
    limit = 1e-7

    def __init__(self, model: nn.Module, images: Tensor) -> None:
        self.model, self.images = model, images
        self.expected = self._outputs()

    def keep_exact(self, edits: list[_Edit], skipped: dict[str, str]) -> list[_Edit]:
        """Apply all; if that changes the outputs, halve them until those that do are alone and in ``skipped``."""
        if not edits or (why := self._difference(edits)) is None:
            return edits
        if len(edits) == 1:
            skipped[f"{edits[0].name}: {edits[0].kind}"] = why
            return []
        half = len(edits) // 2
        return [*self.keep_exact(edits[:half], skipped), *self.keep_exact(edits[half:], skipped)]

    def _difference(self, edits: list[_Edit]) -> str | None:
        """Apply ``edits``; if the outputs are others, take them back and say so."""
        before = [parameter.detach().clone() for parameter in self.model.parameters()]
        for edit in edits:
            edit.apply(self.model)
        found = self._outputs()
        pairs = list(zip(found, self.expected, strict=True))
        if all(agree(one, other, self.limit) for one, other in pairs):
            return None
        with torch.no_grad():
            for parameter, value in zip(self.model.parameters(), before, strict=True):
                parameter.copy_(value)
        error = max(float((one - other).abs().max() / other.abs().max()) for one, other in pairs)
        return f"the output changes: by {error:.1e} of its largest value"

    @torch.no_grad()
    def _outputs(self) -> list[Tensor]:
        return [leaf for leaf in tree_leaves(self.model(self.images)) if isinstance(leaf, Tensor)]


@torch.no_grad()
def _copy_changed(source: nn.Module, target: nn.Module) -> None:
    for new, old in zip(source.parameters(), target.parameters(), strict=True):
        if not torch.equal(new, old.double()):
            old.copy_(new)
