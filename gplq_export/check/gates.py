"""What is good enough: every gate of a check, judged by ``thresholds.yaml``.

The order is the one in which a fault travels, so that the first gate that failed is the cause: the files, the images,
the float network in each arithmetic, and only then what is quantised.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gplq.errors import ConfigError
from gplq_export.check.report import Closeness, Estimate, Forced, Gate, Layer, Pair

_DEFAULTS = Path(__file__).with_name("thresholds.yaml")
_NAMED = 5  # layers that a sentence names


class Threshold(BaseModel):
    """A limit and the reason for it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    limit: float = Field(ge=0)
    why: str


@dataclass(frozen=True)
class Thresholds:
    """All limits by name. ``version``: of the file that they come from."""

    version: str
    table: dict[str, Threshold]

    def __getitem__(self, name: str) -> float:
        return self.table[name].limit

    def of(self, name: str, pair: str) -> str:
        """The name of the limit that holds for a pair: its own, if it has one."""
        return own if (own := f"{name}.{pair}") in self.table else name

    def why(self, name: str) -> str:
        """The reason for a limit."""
        return self.table[name].why.strip()

    def replaced(self, name: str, limit: float, why: str) -> "Thresholds":
        """With another limit."""
        return Thresholds(self.version, {**self.table, name: Threshold(limit=limit, why=why)})


def read_thresholds(path: Path | None = None) -> Thresholds:
    """The limits that gplq comes with, or those of them that a file replaces.

    Raises:
        ConfigError: the file cannot be read, or holds something that is no limit.
    """
    known = _read(_DEFAULTS, None)
    return known if path is None else _read(path, known)


def _read(path: Path, base: Thresholds | None) -> Thresholds:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read as thresholds: {error}.") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: thresholds are a table of names, each with a limit and a reason (why).")
    version = str(content.pop("version", f"{path.name}, on {base.version if base else '?'}"))
    table = {} if base is None else dict(base.table)
    for name, entry in content.items():
        if base is not None and name not in table and name.partition(".")[0] not in table:
            raise ConfigError(f"{path}: there is no threshold '{name}'; there are {', '.join(table)}.")
        try:
            table[name] = Threshold.model_validate(entry)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, (name, *first["loc"])))
            raise ConfigError(f"{path}: {where}: {first['msg']}.") from error
    return Thresholds(version, table)


Status = Literal["passed", "failed", "skipped", "reported"]


class Judge:
    """Collects gates, in the order in which they are added."""

    def __init__(self, thresholds: Thresholds) -> None:
        self.thresholds = thresholds
        self.gates: list[Gate] = []

    def add(
        self,
        pair: str,
        metric: str,
        status: Status | bool,
        sentence: str,
        threshold: str = "",
        *,
        layer: str | None = None,
        found: float | None = None,
        interval: tuple[float, float] | None = None,
        limit: float | None = None,
        unit: str = "",
        n: int = 0,
        why: str = "",
    ) -> None:
        """A gate; ``status`` may be whether it passed. ``limit`` and ``why`` are the threshold's if not given."""
        if threshold:
            limit = self.thresholds[threshold] if limit is None else limit
            why = why or self.thresholds.why(threshold)
        low, high = interval or (None, None)
        self.gates.append(
            Gate(
                id=f"{pair}.{metric}",
                pair=pair,
                metric=metric,
                layer=layer,
                status=status if isinstance(status, str) else "passed" if status else "failed",
                found=found,
                low=low,
                high=high,
                limit=limit,
                unit=unit,
                n=n,
                sentence=sentence,
                why=why,
            )
        )

    def skip(self, pair: str, metric: str, reason: str) -> None:
        """A gate that could not be judged."""
        self.add(pair, metric, "skipped", reason)

    # Everything below takes a pair that has been compared.

    def forced(self, pair: Pair, forced: Forced) -> None:
        """Teacher-forced: codes on images and on the grid, floats, blocks; each names the layers that are wrong."""
        n = forced.images
        wrong = [layer for layer in forced.quantizers if layer.different]
        worst = max(wrong, key=lambda layer: layer.different, default=None)
        total, different = (sum(getattr(layer, key) for layer in forced.quantizers) for key in ("total", "different"))
        self.add(
            pair.name,
            "forced.codes",
            not wrong,
            f"{different:,} of {total:,} codes differ for the same input"
            + (
                f", first in {wrong[0].name} and most in {worst.name}: its scale, rounding or limits are not the "
                "checkpoint's."
                if worst
                else "."
            ),
            self.thresholds.of("forced_codes", pair.name),
            layer=wrong[0].name if wrong else None,
            found=different,
            unit="codes",
            n=n,
        )
        off = {name: count for name, count in forced.grid.items() if count}
        self.add(
            pair.name,
            "forced.grid",
            not off,
            f"{sum(off.values()):,} codes differ for numbers on and around the steps and limits of "
            + (
                f"{_some(off)}: it rounds half another way than to even, or clamps elsewhere."
                if off
                else f"{len(forced.grid)} quantisers."
            ),
            self.thresholds.of("forced_codes", pair.name),
            layer=next(iter(off), None),
            found=sum(off.values()),
            unit="codes",
            n=n,
        )
        for metric, table, what, cause in (
            ("forced.linears", forced.linears, "linears", "its weight, scale or bias is not the checkpoint's"),
            ("forced.floats", forced.floats, "inputs of quantisers", "a norm, scale, embedding or residual before it"),
            ("forced.outputs", forced.outputs, "outputs", "a norm or another float tensor before it"),
        ):
            self._floats(pair, metric, table, what, cause, n)
        threshold = self.thresholds.of("forced_blocks", pair.name)
        limit = self.thresholds[threshold]
        broken = [layer for layer in forced.blocks if layer.share is None or not layer.share.value <= limit]
        largest = max((layer.share.value if layer.share else math.nan for layer in forced.blocks), default=0.0)
        self.add(
            pair.name,
            "forced.blocks",
            not broken,
            f"at most {largest:.4f} % of a block's codes differ when it is fed the same input"
            + (f": {_some([layer.name for layer in broken])} computes something else." if broken else "."),
            threshold,
            layer=broken[0].name if broken else None,
            found=largest,
            unit="%",
            n=n,
        )

    def _floats(self, pair: Pair, metric: str, table: dict[str, float], what: str, cause: str, n: int) -> None:
        threshold = "forced_linears" if metric != "forced.floats" else "forced_floats"
        threshold = self.thresholds.of(threshold, pair.name)
        limit = self.thresholds[threshold]
        wrong = [name for name, difference in table.items() if not difference <= limit]  # also if NaN
        largest = max(table.values(), default=0.0, key=lambda value: math.inf if math.isnan(value) else value)
        self.add(
            pair.name,
            metric,
            not wrong,
            f"{len(table)} {what} differ by at most {largest:.1e} of a channel's range for the same codes"
            + (f"; beyond the limit, first: {_some(wrong)}: {cause}." if wrong else "."),
            threshold,
            layer=wrong[0] if wrong else None,
            found=largest,
            unit="of a channel's range",
            n=n,
        )

    def free(self, pair: Pair) -> None:
        """Free-running, against the noise floor: labels, cosine, divergence, codes by layer."""
        found, floor = pair.found, pair.floor
        assert found is not None
        if floor is None:
            self._report_closeness(pair, found)
            return
        factor = self.thresholds["floor_factor"]
        if found.agreement is not None and floor.agreement is not None:
            limit = 100 - factor * (100 - floor.agreement.low)
            gross = found.agreement.value < floor.agreement.low
            self._against_floor(
                pair, "free.labels", found.agreement, floor.agreement, limit, "% of labels equal", gross=gross
            )
        limit = 1 - factor * (1 - floor.cosine_p01.low) - self.thresholds["cosine_resolution"]
        lost = self.thresholds["gross_factor"] * (1 - floor.cosine.value) + self.thresholds["gross_cosine"]
        gross = not found.cosine.value >= 1 - lost  # NaN is no closeness
        self._against_floor(pair, "free.cosine_p01", found.cosine_p01, floor.cosine_p01, limit, "cosine", gross=gross)
        if found.kl is not None and floor.kl is not None:
            limit = factor * floor.kl.high + self.thresholds["kl_resolution"]
            inside = found.kl.low <= limit
            self._floor_gate(pair, "free.kl", inside, found.kl, floor.kl, limit, "nats")
        if pair.layers:
            self._layers(pair)

    def _against_floor(
        self,
        pair: Pair,
        metric: str,
        found: Estimate,
        floor: Estimate,
        limit: float,
        unit: str,
        *,
        gross: bool = False,
    ) -> None:
        self._floor_gate(pair, metric, found.high >= limit, found, floor, limit, unit, gross=gross)

    def _floor_gate(
        self,
        pair: Pair,
        metric: str,
        inside: bool,
        found: Estimate,
        floor: Estimate,
        limit: float,
        unit: str,
        *,
        gross: bool = False,
    ) -> None:
        """``gross``: so far off that few images show it."""
        few = found.n < self.thresholds["few_images"]
        beyond = f": beyond twice what {pair.floor_is} changes"
        status: Status | bool = inside
        if few:
            status = "failed" if gross else "reported"
            beyond += ", by so much that few images show it" if gross else ", on too few images to judge"
        self.add(
            pair.name,
            metric,
            status,
            f"{_number(found)} {unit}, noise floor {_number(floor)}"
            + ("." if inside and status != "failed" else f"{beyond}."),
            "floor_factor",
            found=found.value,
            interval=(found.low, found.high),
            limit=limit,
            unit=unit,
            n=found.n,
        )

    def _layers(self, pair: Pair) -> None:
        outside = [layer for layer in pair.layers if not layer.inside]
        last = pair.layers[-1]
        n = last.share.n if last.share else 0
        total, different = (sum(getattr(layer, key) for layer in pair.layers) for key in ("total", "different"))
        self.add(
            pair.name,
            "free.codes",
            not outside if n >= self.thresholds["few_images"] else "reported",
            f"{100 * different / max(total, 1):.3f} % of the codes differ"
            + (
                f"; the first layer that leaves its band is {outside[0].name}: {_share(outside[0])}, "
                f"{len(outside)} of {len(pair.layers)} leave theirs."
                if outside
                else f", each of {len(pair.layers)} quantisers within its band."
            ),
            "floor_factor",
            layer=outside[0].name if outside else None,
            found=100 * different / max(total, 1),
            unit="% of codes",
            n=n,
        )

    def _report_closeness(self, pair: Pair, found: Closeness) -> None:
        measured = found.agreement or found.cosine
        unit = "% of labels equal" if found.agreement else "cosine"
        self.add(
            pair.name,
            "free.labels" if found.agreement else "free.cosine",
            "reported",
            f"{_number(measured)} {unit}.",
            found=measured.value,
            interval=(measured.low, measured.high),
            unit=unit,
            n=found.n,
        )

    def accuracy(self, pair: Pair, threshold: str) -> None:
        """Top-1 of the candidate against the reference's, image by image; reported only on few images."""
        if pair.reference_top is None or pair.candidate_top is None:
            return
        n = pair.reference_top.top1.n
        drop, low, high = paired_drop(pair.lost, pair.won, n)
        enough = n >= self.thresholds["enough_images"]
        passed = low <= self.thresholds[threshold]
        self.add(
            pair.name,
            "top1",
            passed if enough else "reported",
            f"top-1 {pair.candidate_top.top1.value:.2f} %, reference {pair.reference_top.top1.value:.2f} %: "
            f"{drop:+.2f} points lost [{low:+.2f}, {high:+.2f}]"
            + ("" if enough else ", too few images to judge")
            + ("." if passed or not enough else f": more than {self.thresholds[threshold]:g}."),
            threshold,
            found=drop,
            interval=(low, high),
            unit="points",
            n=n,
        )

    def inside(self, share: Estimate | None, floor: Estimate | None) -> bool:
        """Whether a layer's share of different codes, in per cent, is within the band that its floor gives."""
        if share is None or floor is None:
            return True
        return share.low <= self.thresholds["floor_factor"] * floor.high + self.thresholds["codes_resolution"]


def paired_drop(lost: int, won: int, n: int) -> tuple[float, float, float]:
    """Points of accuracy lost, and the ends of their 95 % interval: of paired answers, only those that changed count.

    >>> [round(points, 2) for points in paired_drop(lost=30, won=10, n=1000)]
    [2.0, 0.77, 3.23]
    """
    drop = (lost - won) / n
    half = 1.96 * math.sqrt(max(lost + won - (lost - won) ** 2 / n, 0.0)) / n
    return 100 * drop, 100 * (drop - half), 100 * (drop + half)


def _some(names: Iterable[Any]) -> str:
    listed = [str(name) for name in names]
    return ", ".join(listed[:_NAMED]) + (f" and {len(listed) - _NAMED} more" if len(listed) > _NAMED else "")


def _share(layer: Layer) -> str:
    """A layer's share of different codes, and what its floor allows."""
    found, floor = layer.share, layer.floor
    assert found is not None and floor is not None
    return f"{found.value:.3f} % of its codes differ, {floor.value:.3f} % at the noise floor"


def _number(estimate: Estimate) -> str:
    digits = 2 if abs(estimate.value) > 1.5 else 6
    return f"{estimate.value:.{digits}f} [{estimate.low:.{digits}f}, {estimate.high:.{digits}f}]"
