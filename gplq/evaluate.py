"""Top-1 accuracy, with the interval that its sample size allows."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gplq.data import ImageSet, batches
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


@torch.inference_mode()
def top1(model: nn.Module, images: ImageSet, what: str, batch_size: int = 128) -> Accuracy:
    """Top-1 of ``model`` on ``images``; ``what`` names the run in the progress line."""
    device = next(model.buffers(), next(model.parameters(), torch.empty(0))).device
    correct = 0
    with progress(len(images), f"{what} top-1", "image") as bar:
        for inputs, labels in batches(images, batch_size):
            correct += int((model(inputs.to(device)).argmax(1).cpu() == labels).sum())
            bar.update(len(labels))
    return Accuracy(correct, len(images))
