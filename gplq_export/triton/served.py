"""What a load test finds out: the served latency, and whether the answers were right."""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

CLIENTS = {
    "gplq": "gplq's own client: Python threads, every answer checked",
    "perf_analyzer": "NVIDIA's perf_analyzer, which checks no answer",
}


class Latencies:
    """The latencies of any number of requests in a fixed amount of memory: counts by size, in steps of 1 %."""

    _SMALLEST, _STEP, _STEPS = 1e-6, math.log(1.01), 2200  # 1 µs … 53 minutes

    def __init__(self) -> None:
        self.counts = np.zeros(self._STEPS, np.int64)

    def add(self, seconds: float) -> None:
        """Count one."""
        step = int(math.log(max(seconds, self._SMALLEST) / self._SMALLEST) / self._STEP)
        self.counts[min(step, self._STEPS - 1)] += 1

    def quantile_ms(self, share: float) -> float:
        """What so large a share of all took at most, within 0.5 %, in ms; nan if there are none.

        >>> latencies = Latencies()
        >>> for seconds in (0.010, 0.020, 0.030):
        ...     latencies.add(seconds)
        >>> abs(latencies.quantile_ms(0.5) / 20 - 1) < 0.005
        True
        """
        total = int(self.counts.sum())
        if total == 0:
            return math.nan
        step = int(np.searchsorted(np.cumsum(self.counts), share * total))
        return 1000 * self._SMALLEST * math.exp((step + 0.5) * self._STEP)


@dataclass
class Served:
    """What one concurrency gave.

    Attributes:
        client: a key of :data:`CLIENTS`. ``batch``: images a request. ``requests``: answered in ``seconds``.
        wrong: answers that differ from the expected ones, ``largest_difference`` over all; None: not checked.
        lost: requests that ended in an error; ``errors`` counts them by message.
        latency_ms: p50, p95 and p99 of the served latency.
        server: of the server's own statistics: mean size of the batches that ran, ms in the queue and ms of computing
            by request.
    """

    client: str
    concurrency: int
    batch: int
    requests: int
    seconds: float
    latency_ms: dict[str, float]
    wrong: int | None = None
    largest_difference: float | None = None
    lost: int = 0
    errors: dict[str, int] = field(default_factory=dict)
    server: dict[str, float] = field(default_factory=dict)

    @property
    def images_per_second(self) -> float:
        """Of answered requests."""
        return self.requests * self.batch / self.seconds if self.requests else 0.0

    def to_dict(self) -> dict[str, Any]:
        """All of it, ready for JSON, which has no infinity: a difference that is no number is None."""
        content = {**vars(self), "images_per_second": round(self.images_per_second, 2)}
        content["latency_ms"] = {key: _finite(value) for key, value in self.latency_ms.items()}
        content["largest_difference"] = _finite(self.largest_difference)
        return content


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
