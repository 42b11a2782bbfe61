"""What is kept while images stream by: counts for each layer, a few numbers for each image, never a tensor.

Everything is NumPy arrays, which :meth:`state` gives away and :meth:`restore` takes back, so that a check that was
interrupted goes on where it was.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gplq.evaluate import Accuracy, cosines
from gplq_export.check.report import Closeness, Estimate, Layer, Top

State = dict[str, np.ndarray]
_SCATTER = 16  # outputs of each batch that are kept for the picture; at most
_SCATTER_IN_ALL = 1500


class CodeCounts:
    """For each quantiser: how many codes were compared, how many differ and by how much."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = list(names)
        self._row = {name: index for index, name in enumerate(self.names)}
        count = len(self.names)
        self.total = np.zeros(count, np.int64)
        self.steps = np.zeros((count, 3), np.int64)  # differ by 1, by 2, by more
        self.max_step = np.zeros(count, np.int64)
        self.energy = np.zeros((count, 2))  # of the reference's codes, of the difference
        self.shares = np.zeros((count, 3))  # images; sum of their shares of different codes; of its square

    def add(self, name: str, reference: np.ndarray, candidate: np.ndarray, images: int) -> None:
        """Compare two arrays of codes of one shape, of so many images."""
        row = self._row[name]
        steps = np.abs(candidate.astype(np.int16) - reference)
        different = steps != 0
        self.total[row] += steps.size
        codes = reference.astype(np.float32)
        self.energy[row, 0] += float(np.vdot(codes, codes))
        share = different.reshape(images, -1).mean(1)
        self.shares[row] += images, share.sum(), np.square(share).sum()
        if not share.any():
            return
        found = steps[different].astype(np.int64)
        self.steps[row] += (found == 1).sum(), (found == 2).sum(), (found > 2).sum()
        self.max_step[row] = max(self.max_step[row], found.max())
        self.energy[row, 1] += float(np.square(found).sum())

    def different(self, name: str | None = None) -> int:
        """How many codes differ, of a quantiser or in all."""
        return int(self.steps.sum() if name is None else self.steps[self._row[name]].sum())

    def share(self, name: str) -> Estimate | None:
        """Per cent of an image's codes that differ, mean over the images; None before any."""
        images, total, squares = self.shares[self._row[name]]
        return None if images == 0 else mean_estimate(100 * total, 1e4 * squares, int(images))

    def layer(self, name: str, kind: Literal["quantizer", "block"], floor: Estimate | None, inside: bool) -> Layer:
        """A quantiser as data."""
        row = self._row[name]
        signal, noise = self.energy[row]
        return Layer(
            name=name,
            kind=kind,
            total=int(self.total[row]),
            different=self.different(name),
            steps=tuple(int(count) for count in self.steps[row]),
            max_step=int(self.max_step[row]),
            sqnr_db=decibel(signal, noise),
            share=self.share(name),
            floor=floor,
            inside=inside,
        )

    def state(self) -> State:
        """All arrays."""
        return {key: getattr(self, key) for key in ("total", "steps", "max_step", "energy", "shares")}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Go on from a :meth:`state`."""
        for key, array in self.state().items():
            array[...] = state[key]


class UnitErrors:
    """For each unit: the energy of what it returns, and of the difference to the reference's."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = list(names)
        self.energy = np.zeros((len(self.names), 2))

    def add(self, name: str, reference: np.ndarray, candidate: np.ndarray) -> None:
        """Compare what a unit returned, arrays of one shape."""
        exact = reference.astype(np.float64)
        self.energy[self.names.index(name)] += np.square(exact).sum(), np.square(candidate - exact).sum()

    def layers(self) -> list[Layer]:
        """The units as data."""
        return [
            Layer(
                name=name,
                kind="block",
                total=0,
                different=0,
                steps=(0, 0, 0),
                max_step=0,
                sqnr_db=decibel(*energy),
                share=None,
                floor=None,
                inside=True,
            )
            for name, energy in zip(self.names, self.energy, strict=True)
        ]

    def state(self) -> State:
        """All arrays."""
        return {"energy": self.energy}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Go on from a :meth:`state`."""
        self.energy[...] = state["energy"]


class Outputs:
    """Two networks' outputs for the same images, compared image by image.

    ``classifies``: the one output is logits, float32 [B, classes].
    """

    _COLUMNS = ("label", "reference", "candidate", "reference_rank", "candidate_rank", "cosine", "kl")

    def __init__(self, classifies: bool) -> None:
        self.classifies = classifies
        self._columns: dict[str, list[np.ndarray]] = {name: [] for name in self._COLUMNS}
        self.energy = np.zeros(2)  # of the reference, of the difference
        self.largest = np.zeros(1)
        self.scatter: list[np.ndarray] = []

    def add(self, reference: Sequence[Tensor], candidate: Sequence[Tensor], labels: Tensor) -> None:
        """A batch: what both returned, and the labels, -1 where there is none."""
        self._keep("label", labels)
        self._keep("cosine", cosines(candidate, reference))
        for ours, theirs in zip(candidate, reference, strict=True):
            difference = ours.double() - theirs.double()
            self.energy += float(theirs.double().square().sum()), float(difference.square().sum())
            self.largest = np.maximum(self.largest, float(difference.abs().max()))  # unlike max, keeps a NaN
        if self.classifies:
            a, b = reference[0].double(), candidate[0].double()
            self._keep("reference", a.argmax(1))
            self._keep("candidate", b.argmax(1))
            for name, logits in (("reference_rank", a), ("candidate_rank", b)):
                own = logits.gather(1, labels.clamp(min=0)[:, None])
                self._keep(name, (logits > own).sum(1))
            self._keep("kl", F.kl_div(b.log_softmax(1), a.log_softmax(1), log_target=True, reduction="none").sum(1))
        a, b = (each[0].flatten() for each in (reference, candidate))
        if sum(map(len, self.scatter)) < _SCATTER_IN_ALL:
            chosen = torch.linspace(0, len(a) - 1, min(_SCATTER, len(a))).long()
            self.scatter.append(torch.stack([a[chosen], b[chosen]], 1).double().numpy())

    def column(self, name: str) -> np.ndarray:
        """One number for each image."""
        parts = self._columns[name]
        return np.concatenate(parts) if parts else np.zeros(0)

    @property
    def images(self) -> int:
        """How many were compared."""
        return len(self.column("cosine"))

    def closeness(self) -> Closeness:
        """All images together."""
        cosine, n = self.column("cosine"), self.images
        same = self.column("reference") == self.column("candidate")
        kl = self.column("kl")
        return Closeness(
            n=n,
            agreement=share_estimate(int(same.sum()), n) if self.classifies else None,
            cosine=mean_estimate(cosine.sum(), np.square(cosine).sum(), n),
            cosine_p01=percentile_estimate(cosine, 0.01),
            sqnr_db=decibel(*self.energy),
            kl=mean_estimate(kl.sum(), np.square(kl).sum(), n) if self.classifies else None,
            max_difference=float(self.largest[0]),
        )

    def top(self, side: Literal["reference", "candidate"], classes: int) -> Top | None:
        """Accuracy of one of the two; None without labels."""
        labels, rank = self.column("label"), self.column(f"{side}_rank")
        if not self.classifies or not len(labels) or labels.min() < 0:
            return None
        right = self.column(side) == labels
        return Top(
            top1=share_estimate(int(right.sum()), len(labels)),
            top5=share_estimate(int((rank < 5).sum()), len(labels)) if classes > 5 else None,
        )

    def state(self) -> State:
        """All arrays."""
        scatter = np.concatenate(self.scatter) if self.scatter else np.zeros((0, 2))
        return {**{n: self.column(n) for n in self._COLUMNS}, "energy": self.energy, "largest": self.largest,
                "scatter": scatter}  # fmt: skip

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Go on from a :meth:`state`."""
        self._columns = {name: [state[name]] if len(state[name]) else [] for name in self._COLUMNS}
        self.energy, self.largest = state["energy"].copy(), state["largest"].copy()
        self.scatter = [state["scatter"]]

    def _keep(self, column: str, values: Tensor) -> None:
        self._columns[column].append(values.numpy())


def decibel(signal: float, noise: float) -> float | None:
    """10 log10 of a ratio of energies; None if there is no noise.

    >>> decibel(1000.0, 1.0), decibel(1.0, 0.0)
    (30.0, None)
    """
    if noise == 0:
        return None
    with np.errstate(divide="ignore", invalid="ignore"):
        return round(float(10 * np.log10(signal / noise)), 2)


def share_estimate(count: int, n: int) -> Estimate:
    """A share in per cent, with Wilson's 95 % interval."""
    accuracy = Accuracy(count, n)
    low, high = accuracy.interval()
    return Estimate(value=accuracy.percent, low=low, high=high, n=n)


def mean_estimate(total: float, squares: float, n: int) -> Estimate:
    """A mean from a sum and a sum of squares, with its normal 95 % interval."""
    mean = float(total) / n
    deviation = math.sqrt(max(float(squares) / n - mean * mean, 0.0)) if math.isfinite(squares) else math.nan
    half = 1.96 * deviation / math.sqrt(n)
    return Estimate(value=mean, low=mean - half, high=mean + half, n=n)


def percentile_estimate(values: np.ndarray, share: float) -> Estimate:
    """The value below which a share of a population lies, with the 95 % interval that order statistics give.

    An end that they cannot give, as there are too few values, is the smallest or largest of them.

    >>> estimate = percentile_estimate(np.arange(1000.0), 0.01)
    >>> (estimate.low, estimate.value, estimate.high)
    (3.0, 10.0, 17.0)
    """
    n = len(values)
    ordered = np.sort(values)  # NaN last
    if n and np.isnan(ordered[-1]):
        ordered = np.full(n, np.nan)
    half = 1.96 * math.sqrt(n * share * (1 - share))
    low, middle, high = (
        float(ordered[min(max(round(n * share + shift), 0), n - 1)]) for shift in (-half - 1, 0, half + 1)
    )
    return Estimate(value=middle, low=low, high=high, n=n)
