"""The feature space in which the student mimics its teacher (GPLQ, Eq 2)."""

from types import TracebackType
from typing import Self

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from gplq.data import ImageSet, batches, draw
from gplq.errors import ModelError
from gplq.processes import device_of, share, total
from gplq.progress import progress
from gplq.survey import classifiers


class Features:
    """The penultimate features of a timm classifier's last forward pass: what its classifier was given.

    A context manager: within the block each forward pass of the model leaves its features in :attr:`value`, float32
    [B, D], part of the autograd graph. A model with several classifiers (distilled DeiT) has the features of all of
    them side by side; one without (``num_classes=0``) has its output.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._taken: dict[int, Tensor] = {}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    @property
    def tensors(self) -> list[Tensor]:
        """What :attr:`value` is made of, of any shapes: of a backbone each of its outputs."""
        taken = [self._taken[index] for index in sorted(self._taken)]
        return [leaf for leaf in tree_leaves(taken) if isinstance(leaf, Tensor)]

    @property
    def value(self) -> Tensor:
        """See the class.

        Raises:
            ModelError: the model's classifier did not run, or not on [B, D].
        """
        features = [self._taken[index] for index in sorted(self._taken)]
        if not features or any(not isinstance(feature, Tensor) or feature.ndim != 2 for feature in features):
            raise ModelError(
                f"{type(self._model).__name__} has no features of one vector an image, so that the PCA loss does not "
                "apply: set stage1.alpha to 0; for a backbone, give gplq.train_activations a loss of your own, or set "
                "stage1.enabled to false."
            )
        return torch.cat([feature.float() for feature in features], dim=1)

    def __enter__(self) -> Self:
        heads = classifiers(self._model)

        def take(index: int, tensor: Tensor) -> None:
            self._taken[index] = tensor

        for index, classifier in enumerate(heads):
            self._handles.append(
                classifier.register_forward_pre_hook(lambda _, args, index=index: take(index, args[0]))
            )
        if not heads:
            self._handles.append(self._model.register_forward_hook(lambda _, __, output: take(0, output)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._taken.clear()


@torch.no_grad()
def fit_pca(
    teacher: nn.Module, images: ImageSet, count: int, variance: float, seed: int, dimensions: int | None = None
) -> Tensor:
    """Principal directions [D, k] of the teacher's features, about enough for a share ``variance`` of their variance.

    k is rounded to the nearest multiple of 32 (at least 32), as in the paper, unless ``dimensions`` says it. The
    covariance is summed up image by image in FP64, over all processes: memory is D x D, whatever ``count`` is.
    """
    drawn = draw(len(images), count, seed)
    device = device_of(teacher)
    sums: list[Tensor] = []
    with Features(teacher) as features, progress(len(drawn), "PCA of the teacher's features", "image") as bar:
        for inputs, labels in batches(images, 64, share(drawn)):
            teacher(inputs.to(device))
            x = features.value.double()
            new = [x.sum(0), x.T @ x, x.new_tensor(len(x))]
            sums = new if not sums else [a + b for a, b in zip(sums, new, strict=True)]
            bar.update(len(labels))
    outputs, products, seen = (total(part) for part in sums)
    mean = outputs / seen  # bad images may have been skipped: fewer than were drawn
    eigenvalues, eigenvectors = torch.linalg.eigh(products / seen - torch.outer(mean, mean))
    shares = eigenvalues.flip(0).clamp_min(0).cumsum(0)
    needed = int(torch.searchsorted(shares, variance * shares[-1])) + 1
    kept = min(dimensions or max(32, round(needed / 32) * 32), len(shares))
    directions: Tensor = eigenvectors.flip(1)[:, :kept].float().contiguous()
    return directions


def pca_loss(student: Tensor, teacher: Tensor, directions: Tensor) -> Tensor:
    """Eq 2: the squared distance of the projected features, summed over directions, mean over the batch.

    ``student``, ``teacher``: [B, D]; ``directions``: [D, k]. The paper subtracts the teacher's mean from both, which
    cancels.
    """
    return ((student - teacher) @ directions).square().sum(1).mean()
