"""The feature space in which the student mimics its teacher (GPLQ, Eq 2)."""

import torch
from torch import Tensor, nn

from gplq.data import ImageSet, batches, draw
from gplq.progress import progress


def penultimate(model: nn.Module, images: Tensor) -> Tensor:
    """Features that the classifier head sees, [B, D]: the class token or the pooled tokens, as the model has it."""
    forward_features, forward_head = model.forward_features, model.forward_head
    features: Tensor = forward_head(forward_features(images), pre_logits=True)  # type: ignore[operator]  # timm's models have both
    return features


def classify(model: nn.Module, features: Tensor) -> Tensor:
    """Logits [B, classes] of penultimate features [B, D]."""
    logits: Tensor = model.get_classifier()(features)  # type: ignore[operator]  # timm's models have it
    return logits


@torch.no_grad()
def fit_pca(teacher: nn.Module, images: ImageSet, count: int, variance: float, seed: int) -> Tensor:
    """Principal directions [D, k] of the teacher's features, about enough for a share ``variance`` of their variance.

    k is rounded to the nearest multiple of 32 (at least 32), as in the paper. The covariance is summed up image by
    image in FP64: memory is D x D, whatever ``count`` is.
    """
    total: Tensor | None = None
    outer: Tensor | None = None
    indices = draw(len(images), count, seed)
    with progress(len(indices), "PCA of the teacher's features", "image") as bar:
        for inputs, labels in batches(images, 64, indices):
            features = penultimate(teacher, inputs).double()
            total = features.sum(0) + (0 if total is None else total)
            outer = features.T @ features + (0 if outer is None else outer)
            bar.update(len(labels))
    assert total is not None and outer is not None  # an ImageSet is never empty
    mean = total / len(indices)
    eigenvalues, eigenvectors = torch.linalg.eigh(outer / len(indices) - torch.outer(mean, mean))
    shares = eigenvalues.flip(0).clamp_min(0).cumsum(0)
    needed = int(torch.searchsorted(shares, variance * shares[-1])) + 1
    kept = min(max(32, round(needed / 32) * 32), len(shares))
    directions: Tensor = eigenvectors.flip(1)[:, :kept].float().contiguous()
    return directions


def pca_loss(student: Tensor, teacher: Tensor, directions: Tensor) -> Tensor:
    """Eq 2: the squared distance of the projected features, summed over directions, mean over the batch.

    ``student``, ``teacher``: [B, D]; ``directions``: [D, k]. The paper subtracts the teacher's mean from both, which
    cancels.
    """
    return ((student - teacher) @ directions).square().sum(1).mean()
