"""What all formats of a report have in common: numbers and intervals in words, the verdict, and text made harmless."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from gplq_export.check.report import Estimate, Gate, Layer, Pair, Report
from gplq_export.onnx_file import printable

STAMP = "Random numbers, not images: this proves nothing about accuracy."
_LONGEST = 1000  # characters of a text; a class name that is longer is an accident or an attack
Status = Literal["passed", "failed", "skipped", "reported"]
SYMBOLS: dict[Status, str] = {"passed": "✓", "failed": "✗", "skipped": "–", "reported": "·"}


@dataclass(frozen=True)
class Verdict:
    """The check in a word, ``"PASSED"``, ``"FAILED"`` or ``"NOTHING CHECKED"``, and in a few sentences."""

    word: str
    sentences: list[str]


def verdict(report: Report) -> Verdict:
    """What came out; the first failed gate is named as the cause, and what was not checked is named, too."""
    sentences = [f"{tally(report.gates)}."]
    if report.failed:
        first = report.failed[0]
        sentences.append(f"The first that failed, and the likely cause of the others, is {first.id}: {first.sentence}")
    if skipped := [pair.name for pair in report.pairs if pair.skipped]:
        sentences.append(f"Not checked: {listed(skipped)}.")
    if unjudged := {_in_words(gate): None for gate in not_judged(report)}:
        sentences.append(f"Not judged: {listed([*unjudged], len(unjudged))}.")
    passed = any(gate.status == "passed" for gate in report.gates)
    return Verdict("FAILED" if report.failed else "PASSED" if passed else "NOTHING CHECKED", sentences)


def not_judged(report: Report) -> list[Gate]:
    """The gates of compared pairs that have a limit, or would have one, and could not be held against it."""
    return [
        gate
        for gate in report.gates
        if (gate.status == "skipped" and gate.metric != "compared")
        or (gate.status == "reported" and gate.limit is not None)
    ]


# Metrics whose names say too little. On few images several pairs leave the same ones open.
_METRICS = {
    "top1": "accuracy",
    "golden": "preparation of the images",
    "closeness": "closeness to the float model",
    "range": "range of FP16",
    "free.labels": "labels",
    "free.cosine_p01": "cosine",
    "free.kl": "divergence",
    "free.codes": "codes, free-running",
}


def _in_words(gate: Gate) -> str:
    """What was not judged: "labels (n = 8)", "accuracy"."""
    few = f" (n = {gate.n:,})" if gate.status == "reported" else ""
    return f"{_METRICS.get(gate.metric, gate.id)}{few}"


def tally(gates: Sequence[Gate]) -> str:
    """How many gates have which outcome: "12 gates: 10 passed, 2 skipped"."""
    count = Counter(gate.status for gate in gates)
    parts = [f"{count[status]} {status}" for status in SYMBOLS if count[status]]
    return f"{len(gates)} gate{'s' * (len(gates) != 1)}" + (f": {', '.join(parts)}" if parts else "")


def listed(names: Sequence[str], shown: int = 6) -> str:
    """Names in a row, the first few of them."""
    more = [f"{len(names) - shown} more"] if len(names) > shown else []
    return ", ".join([*names[:shown], *more])


def number(value: float | None, digits: int | None = 2) -> str:
    """A number that may be absent, infinite or none at all; ``digits`` behind the point, None: six significant ones."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "∞" if value > 0 else "−∞"
    if digits is None:
        return f"{value:.6g}"
    tiny = value != 0 and abs(value) < 0.5 * 10**-digits
    return f"{value:.1e}" if tiny or abs(value) >= 1e7 else f"{value:,.{digits}f}"


def estimate(found: Estimate | None, digits: int = 2) -> str:
    """A value with its interval: "98.20 (97.10 to 98.92)"."""
    if found is None:
        return "–"
    return f"{number(found.value, digits)} ({number(found.low, digits)} to {number(found.high, digits)})"


def decibel(value: float | None) -> str:
    """An SQNR; None is no difference."""
    if value is None:
        return "equal"
    return f"{number(value, 1)} dB" if math.isfinite(value) else number(value)


def size(count: float) -> str:
    """Bytes, as people read them."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count:.0f} B"


def compared(pair: Pair) -> str:
    """A compared pair in one line: how close it is, on how many images."""
    found = pair.found
    if found is None:
        return "not measured"
    parts = [f"cosine p01 {number(found.cosine_p01.value, 6)}", f"SQNR {decibel(found.sqnr_db)}"]
    if found.agreement is not None:
        parts.insert(0, f"same label {estimate(found.agreement)} %")
    return f"{', '.join(parts)}, n = {found.n:,}"


def top1(pair: Pair) -> str:
    """Both accuracies of a pair, the candidate's with its interval; empty without labels."""
    if pair.reference_top is None or pair.candidate_top is None:
        return ""
    return f"{number(pair.reference_top.top1.value)} → {estimate(pair.candidate_top.top1)} %"


def outside(pair: Pair) -> list[Layer]:
    """The layers that leave the band of the noise floor, in the order of the network."""
    return [layer for layer in pair.layers if not layer.inside]


def shorten(text: str, most: int) -> str:
    """Cut in the middle: what names of layers and files differ in is often at their end."""
    return text if len(text) <= most else f"{text[: (most - 1) // 2]}…{text[len(text) - most // 2 :]}"


def harmless(report: Report) -> Report:
    """The same report, all of its text on one line, of bounded length and without control characters.

    Names of classes, files and layers come from strangers. What remains to be done is the escaping of each format.
    """

    def clean(value: Any) -> Any:
        if isinstance(value, str):
            return shorten(printable(value), _LONGEST)
        if isinstance(value, dict):
            return {clean(key): content if key == "picture" else clean(content) for key, content in value.items()}
        if isinstance(value, list | tuple):
            return [clean(content) for content in value]
        return value

    return Report.model_validate(clean(report.model_dump()))
