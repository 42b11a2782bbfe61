"""How good a model is, with the interval that the sample size allows: top-1, or closeness to the float model."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from gplq.data import ImageSet, batches
from gplq.pca import Features
from gplq.processes import device_of, gathered, processes, share, total
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

    def interval(self, z: float = 1.96) -> tuple[float, float]:
        """Wilson's interval, in per cent; that of 95 %, or of another number of standard deviations."""
        share = self.correct / self.n
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


@dataclass(frozen=True)
class Similarity:
    """Cosine between what two models return for the same image, for models without a classifier.

    Attributes:
        mean: over ``n`` images. ``deviation``: its standard deviation over them.

    >>> print(Similarity(mean=0.98765, deviation=0.01, n=100))
    0.98765 [0.98569, 0.98961]
    """

    mean: float
    deviation: float
    n: int

    @classmethod
    def of(cls, count: float, sum_: float, squares: float) -> "Similarity":
        """From the number of cosines, their sum and that of their squares."""
        mean = sum_ / count
        return cls(mean, math.sqrt(max(squares / count - mean * mean, 0.0)), int(count))

    def interval(self) -> tuple[float, float]:
        """The normal 95 % interval of the mean."""
        half = 1.96 * self.deviation / math.sqrt(self.n)
        return self.mean - half, self.mean + half

    def __str__(self) -> str:
        low, high = self.interval()
        return f"{self.mean:.5f} [{low:.5f}, {high:.5f}]"

    def to_dict(self) -> dict[str, Any]:
        """Plain data, rounded to 1e-6."""
        return {"cosine": round(self.mean, 6), "interval": [round(x, 6) for x in self.interval()], "n": self.n}


def cosines(a: Any, b: Any) -> Tensor:
    """For each image, [B], FP64: the cosine between two models' outputs; of several outputs, the mean of theirs."""
    pairs = zip(tree_leaves(a), tree_leaves(b), strict=True)
    each = [torch.cosine_similarity(x.double().flatten(1), y.double().flatten(1)) for x, y in pairs]
    return torch.stack(each).mean(0)


@torch.inference_mode()
def answers(model: nn.Module, images: ImageSet, what: str, batch_size: int = 128) -> Tensor:
    """Labels and what ``model`` says, int64 [2, n], of the images that can be read; ``what`` names the model.

    Processes share the images, and all of them get all answers.
    """
    device = device_of(model)
    pairs: list[Tensor] = []
    with progress(len(images), f"{what} top-1", "image") as bar:
        for inputs, labels in batches(images, batch_size, share(range(len(images)))):
            pairs.append(torch.stack([labels, model(inputs.to(device)).argmax(1).cpu()]))
            bar.update(len(labels) * processes().num_processes)
    return torch.cat(gathered(pairs), 1)


def top1(model: nn.Module, images: ImageSet, what: str, batch_size: int = 128) -> Accuracy:
    """Top-1 of ``model`` on ``images``; else as :func:`answers`."""
    labels, said = answers(model, images, what, batch_size)
    return Accuracy(int((labels == said).sum()), len(labels))


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
            # Features of any shape: a classifier may be a convolution.
            one, other = (torch.cat([x.float().flatten(1) for x in f.tensors], 1) for f in (features, targets))
            cosines = torch.cosine_similarity(one, other).double()
            sums += torch.tensor([(ours == theirs).sum(), len(labels), cosines.sum()], dtype=torch.float64)
            bar.update(len(labels) * processes().num_processes)
    correct, count, cosine = total(sums).tolist()
    return Agreement(int(correct), int(count), cosine / count)


@torch.inference_mode()
def similarity(model: nn.Module, teacher: nn.Module, images: ImageSet, what: str, batch_size: int = 128) -> Similarity:
    """How close the outputs of ``model`` are to those of ``teacher``, both on one device; else as :func:`top1`."""
    device = device_of(teacher)
    sums = torch.zeros(3, dtype=torch.float64)
    with progress(len(images), f"{what} against the float model", "image") as bar:
        for inputs, labels in batches(images, batch_size, share(range(len(images)))):
            inputs = inputs.to(device)
            found = cosines(model(inputs), teacher(inputs)).cpu()
            sums += torch.stack([torch.tensor(len(found)), found.sum(), found.square().sum()])
            bar.update(len(labels) * processes().num_processes)
    return Similarity.of(*total(sums).tolist())
