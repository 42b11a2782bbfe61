"""Top-1 accuracy, with the interval that its sample size allows."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gplq.data import ImageSet, batches
from gplq.pca import Features
from gplq.processes import device_of, processes, share, total
from gplq.progress import progress


@dataclass(frozen=True)
class Accuracy:
    """Share of right answers among ``n`` images.

    >>> print(Accuracy(correct=1880, n=2048))
    91.80 % [90.53, 92.91]
    """

    correct: int
    n: int

    @property
    def percent(self) -> float:
        """The share, in per cent."""
        return 100 * self.correct / self.n

    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval, in per cent."""
        z, share = 1.96, self.correct / self.n
        centre = share + z * z / (2 * self.n)
        half = z * math.sqrt(share * (1 - share) / self.n + z * z / (4 * self.n**2))
        return tuple(100 * (centre + sign * half) / (1 + z * z / self.n) for sign in (-1, 1))  # type: ignore[return-value]  # a generator has no length

    def __str__(self) -> str:
        low, high = self.interval()
        return f"{self.percent:.2f} % [{low:.2f}, {high:.2f}]"

    def to_dict(self) -> dict[str, Any]:
        """Plain data, percentages rounded to 0.01."""
        low, high = self.interval()
        return {"percent": round(self.percent, 2), "interval": [round(low, 2), round(high, 2)], "n": self.n}


@dataclass(frozen=True)
class Agreement(Accuracy):
    """Share of images that get the float model's label, for data without labels of their own.

    Attributes:
        cosine: mean cosine between the penultimate features of the two models.

    >>> print(Agreement(correct=1880, n=2048, cosine=0.98765))
    91.80 % [90.53, 92.91], cosine of features 0.9877
    """

    cosine: float

    def __str__(self) -> str:
        return f"{super().__str__()}, cosine of features {self.cosine:.4f}"

    def to_dict(self) -> dict[str, Any]:
        """Plain data, percentages rounded to 0.01."""
        return {**super().to_dict(), "cosine": round(self.cosine, 6)}


@torch.inference_mode()
def top1(model: nn.Module, images: ImageSet, what: str, batch_size: int = 128) -> Accuracy:
    """Top-1 of ``model`` on ``images``; ``what`` names the run in the progress line. Processes share the images."""
    device = device_of(model)
    counts = torch.zeros(2, dtype=torch.int64)
    with progress(len(images), f"{what} top-1", "image") as bar:
        for inputs, labels in batches(images, batch_size, share(range(len(images)))):
            right = model(inputs.to(device)).argmax(1).cpu() == labels
            counts += torch.tensor([int(right.sum()), len(labels)])
            bar.update(len(labels) * processes().num_processes)
    correct, count = total(counts).tolist()
    return Accuracy(correct, count)


@torch.inference_mode()
def agreement(model: nn.Module, teacher: nn.Module, images: ImageSet, what: str, batch_size: int = 128) -> Agreement:
    """How far ``model`` says what ``teacher`` says, both on one device; else as :func:`top1`."""
    device = device_of(teacher)
    sums = torch.zeros(3, dtype=torch.float64)
    with (
        Features(model) as features,
        Features(teacher) as targets,
        progress(len(images), f"{what} against the float model", "image") as bar,
    ):
        for inputs, labels in batches(images, batch_size, share(range(len(images)))):
            ours, theirs = (network(inputs.to(device)).argmax(1) for network in (model, teacher))
            cosines = torch.cosine_similarity(features.value, targets.value).double()
            sums += torch.tensor([(ours == theirs).sum(), len(labels), cosines.sum()], dtype=torch.float64)
            bar.update(len(labels) * processes().num_processes)
    correct, count, cosine = total(sums).tolist()
    return Agreement(int(correct), int(count), cosine / count)
