"""``gplq-export diff OLD NEW``: what got worse between two checks, what got better, and what else changed.

Where a number has an interval, it changed if the two intervals have nothing in common. An SQNR has none: it changed if
the energy of the error doubled or halved, since the bands of the gates are about twice the noise floor, too. A ratio of
times changed if it did so by more than ``gplq-export bench`` calls a difference.
"""

import argparse
import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gplq.errors import GateError
from gplq_export.bench import NOISE
from gplq_export.check.report import Estimate, Gate, Layer, Pair, Report
from gplq_export.reports.command import open_report
from gplq_export.reports.console import measured
from gplq_export.reports.markdown import code, text
from gplq_export.reports.words import STAMP, decibel, estimate, harmless, listed, number, outside, shorten, verdict

Direction = Literal["worse", "better", "lost", "changed"]
_TITLES: dict[Direction, str] = {
    "worse": "worse",
    "lost": "no longer checked",
    "better": "better",
    "changed": "changed",
}
_FAIL_ON: dict[str, tuple[Direction, ...]] = {"regression": ("worse",), "lost": ("worse", "lost"), "never": ()}
_DOUBLED = 10 * math.log10(2)  # dB
_SHOWN = 20  # a section of the Markdown


@dataclass(frozen=True)
class Change:
    """One thing that is not as it was: which, and a sentence."""

    direction: Direction
    what: str
    sentence: str


def diff(old: Report, new: Report) -> list[Change]:
    """All that changed: the worse first, then what is no longer checked, the better, and the rest."""
    old, new = harmless(old), harmless(new)
    found = [*_gates(old, new)]
    for after in new.pairs:
        before = old.pair(after.name)
        if before is not None and before.found is not None and after.found is not None:
            found += [*_pair(before, after)]
    found += [*_latency(old, new), *_circumstances(old, new)]
    return [change for direction in _TITLES for change in found if change.direction == direction]


def console(old: Report, new: Report) -> list[str]:
    """The lines to print."""
    changes = diff(old, new)
    lines = [f"{_verdicts(old, new)}; {_counts(changes)}"]
    lines += [f"warning: {warning}" for warning in _warnings(old, new)]
    for direction, title in _TITLES.items():
        if members := [change for change in changes if change.direction == direction]:
            lines += ["", title, *(f"  {change.what}: {change.sentence}" for change in members)]
    return lines


def markdown(old: Report, new: Report) -> str:
    """A comment on a pull request."""
    changes = diff(old, new)
    lines = [f"## gplq parity, before and after: {_counts(changes)}", "", f"{_verdicts(old, new)}."]
    lines += [f"\n> **{text(warning)}**" for warning in _warnings(old, new)]
    for direction, title in _TITLES.items():
        if members := [change for change in changes if change.direction == direction]:
            lines += ["", f"### {title.capitalize()}", ""]
            lines += [f"- {code(change.what)}: {text(shorten(change.sentence, 300))}" for change in members[:_SHOWN]]
            lines += [f"- and {len(members) - _SHOWN} more"] * (len(members) > _SHOWN)
    return "\n".join(lines) + "\n"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of ``gplq-export diff``."""
    parser.add_argument("old", type=Path, metavar="OLD", help="an export's folder, or its parity.json")
    parser.add_argument("new", type=Path, metavar="NEW")
    parser.add_argument("--format", choices=["console", "md"], default="console")
    parser.add_argument(
        "--fail-on",
        choices=list(_FAIL_ON),
        default="regression",
        help="exit code 1 if something got worse (default); lost: or is no longer checked; never",
    )


def run(arguments: argparse.Namespace) -> None:
    """Print what changed.

    Raises:
        UsageError: one of the reports cannot be read.
        GateError: something got worse that ``--fail-on`` names.
    """
    old, new = open_report(arguments.old), open_report(arguments.new)
    sys.stdout.write(markdown(old, new) if arguments.format == "md" else "\n".join(console(old, new)) + "\n")
    bad = [change.what for change in diff(old, new) if change.direction in _FAIL_ON[arguments.fail_on]]
    if bad:
        raise GateError(f"worse than {arguments.old} in {len(bad)}: {listed(bad, 3)}.")


def _verdicts(old: Report, new: Report) -> str:
    return f"{verdict(old).word} → {verdict(new).word}"


def _counts(changes: list[Change]) -> str:
    counts = {title: sum(change.direction == direction for change in changes) for direction, title in _TITLES.items()}
    return ", ".join(f"{count} {title}" for title, count in counts.items() if count) or "nothing changed"


def _warnings(old: Report, new: Report) -> Iterator[str]:
    """Why the two may not be comparable."""
    if old.data.random or new.data.random:
        yield STAMP
    if old.subject.architecture != new.subject.architecture:
        yield "The two are different networks."
    if old.data.sha256 != new.data.sha256:
        yield "The two were checked on different images."


def _gates(old: Report, new: Report) -> Iterator[Change]:
    before, after = ({gate.id: gate for gate in report.gates} for report in (old, new))
    for name, gate in after.items():
        was = before[name].status if name in before else "not there"
        if gate.status == was:
            continue
        change = f"{was} → {gate.status}: {gate.sentence} ({measured(gate)})"
        yield Change(_direction(was, gate), name, change)
    for name, gate in before.items():
        if name not in after:
            yield Change("lost" if _checked(gate) else "changed", name, f"{gate.status} → not there")


def _direction(was: str, gate: Gate) -> Direction:
    if gate.status == "failed":
        return "worse"
    if was == "failed":
        return "better" if gate.status == "passed" else "lost"
    return "lost" if was == "passed" else "changed"


def _checked(gate: Gate) -> bool:
    return gate.status in ("passed", "failed")


def _pair(before: Pair, after: Pair) -> Iterator[Change]:
    old, new = before.found, after.found
    assert old is not None and new is not None
    yield from _interval(f"{after.name}, same label, %", old.agreement, new.agreement)
    yield from _interval(f"{after.name}, cosine", old.cosine, new.cosine, 6)
    yield from _interval(f"{after.name}, cosine of the worst 1 %", old.cosine_p01, new.cosine_p01, 6)
    yield from _interval(f"{after.name}, KL", old.kl, new.kl, 6, more_is_better=False)
    was_db, is_db = _ordered(old.sqnr_db), _ordered(new.sqnr_db)
    if was_db != is_db and abs(is_db - was_db) > _DOUBLED:
        sentence = f"{decibel(old.sqnr_db)} → {decibel(new.sqnr_db)}"
        yield Change("better" if is_db > was_db else "worse", f"{after.name}, SQNR", sentence)
    for which, was, now in (
        ("reference", before.reference_top, after.reference_top),
        ("candidate", before.candidate_top, after.candidate_top),
    ):
        if was is not None and now is not None:
            yield from _interval(f"{after.name}, top-1 of the {which}, %", was.top1, now.top1)
    was_outside, is_outside = (_names(outside(pair)) for pair in (before, after))
    layers = [_names(pair.layers) for pair in (before, after)]
    if left := [name for name in is_outside if name not in was_outside]:
        yield Change("worse", f"{after.name}, {left[0]}", f"outside the noise floor's band now: {listed(left)}")
    if back := [name for name in was_outside if name in layers[1] and name not in is_outside]:
        yield Change("better", f"{after.name}, {back[0]}", f"inside the noise floor's band again: {listed(back)}")


def _ordered(sqnr_db: float | None) -> float:
    """No difference at all is better than any other, no number at all worse."""
    if sqnr_db is None:
        return math.inf
    return -math.inf if math.isnan(sqnr_db) else sqnr_db


def _names(layers: list[Layer]) -> list[str]:
    return [layer.name for layer in layers]


def _interval(
    what: str, old: Estimate | None, new: Estimate | None, digits: int = 2, *, more_is_better: bool = True
) -> Iterator[Change]:
    """A change if the intervals have nothing in common; one to or from no number at all is one, too."""
    if old is None or new is None:
        return
    rose, fell = new.low > old.high, new.high < old.low
    broke, recovered = math.isnan(new.value) > math.isnan(old.value), math.isnan(old.value) > math.isnan(new.value)
    if rose or fell or broke or recovered:
        better = recovered or (not broke and rose == more_is_better)
        sentence = f"{estimate(old, digits)}, n = {old.n:,} → {estimate(new, digits)}, n = {new.n:,}"
        yield Change("better" if better else "worse", what, sentence)


def _latency(old: Report, new: Report) -> Iterator[Change]:
    before = {(each.name, each.batch, each.baseline): each for each in old.latency}
    for now in new.latency:
        was = before.get((now.name, now.batch, now.baseline))
        if was is None or not was.ratio or not now.ratio:
            continue
        change = math.log(now.ratio / was.ratio)
        threshold = max(-math.log(1 - NOISE), 2 * math.hypot(was.spread or 0.0, now.spread or 0.0))
        if abs(change) > threshold:
            yield Change(
                "worse" if change > 0 else "better",
                f"latency of {now.name}, batch {now.batch}",
                f"{number(was.ratio, 3)} → {number(now.ratio, 3)} x the time of {now.baseline}, by more than "
                f"{100 * threshold:.0f} %",
            )


def _circumstances(old: Report, new: Report) -> Iterator[Change]:
    before, after = ({name: file.sha256[:12] for name, file in it.subject.files.items()} for it in (old, new))
    yield from _entries("file", before, after)
    yield from _entries("version of", _versions(old), _versions(new))
    settings = (
        {
            "checkpoint": report.subject.checkpoint_sha256[:12],
            "architecture": report.subject.architecture,
            "images": f"{report.data.images:,} of {report.data.source}, {report.data.sha256[:12]}",
            "transform": ", ".join(report.data.transform),
        }
        for report in (old, new)
    )
    yield from _entries("the", *settings)
    yield from _entries("precision of", old.subject.precision, new.subject.precision)


def _versions(report: Report) -> dict[str, str]:
    own = {"gplq": report.tool_version, "thresholds": report.thresholds_version}
    return {**own, "python": report.python, "platform": report.platform, **report.versions}


def _entries(kind: str, old: Mapping[str, str], new: Mapping[str, str]) -> Iterator[Change]:
    for name in dict.fromkeys([*old, *new]):
        was, now = old.get(name, "not there"), new.get(name, "not there")
        if was != now:
            yield Change("changed", f"{kind} {name}", f"{was} → {now}")
