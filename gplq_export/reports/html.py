"""A report as one HTML file: nothing is loaded from elsewhere, nothing runs in it, and it has at most 2 MB.

A page of a report is data for the template ``report.html.jinja``, which escapes all that it is given.
"""

import math
import re
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from gplq_export.check.report import Flip, Forced, Gate, Latency, Layer, Pair, Report
from gplq_export.reports import charts, words

_PICTURES = 1_000_000  # bytes of thumbnails on a page; flips beyond them are named only
_BASE64 = re.compile("[A-Za-z0-9+/]+=*")
_DOTS = 2000  # of a scatter plot


def html(report: Report) -> str:
    """The page."""
    report = words.harmless(report)
    environment = Environment(
        loader=PackageLoader("gplq_export.reports", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": words.number,
        "estimate": words.estimate,
        "decibel": words.decibel,
        "size": words.size,
        "short": words.shorten,
    }
    room = _PICTURES
    pairs = []
    for pair in report.pairs:
        confusions, room = _confusions(pair.flips, room)
        pairs.append(_Shown(pair, confusions))
    # What people look for first: the first pair that has something wrong, or else the end of the chain.
    told = [shown for shown in pairs if shown.layers]
    unfolded = next((shown for shown in told if shown.outside), told[-1] if told else None)
    return environment.get_template("report.html.jinja").render(
        report=report,
        verdict=words.verdict(report),
        boxes=_boxes(report),
        pairs=pairs,
        unfolded=unfolded,
        latencies=_latencies(report.latency),
        byte_bars=_byte_bars(report.subject.bytes),
        command=shlex.join(report.command),
        stamp=words.STAMP if report.data.random else "",
        symbols=words.SYMBOLS,
        top1=words.top1,
    )


@dataclass(frozen=True)
class _Box:
    """One of the three questions that people come with, and the answer."""

    title: str
    status: words.Status
    lines: list[str]


def _boxes(report: Report) -> list[_Box]:
    groups: dict[str, list[Gate]] = {"export": [], "latency": [], "numbers": []}
    for gate in report.gates:
        groups[gate.pair if gate.pair in groups else "numbers"].append(gate)
    accuracy = [f"{pair.name}: top-1 {words.top1(pair)}" for pair in report.pairs if words.top1(pair)]
    precision = [f"{name}: {found}" for name, found in report.subject.precision.items()]
    speed = [
        f"{each.name}, batch {each.batch}: {each.verdict}, {words.number(each.ratio, 3)} × {each.baseline}"
        for each in report.latency
        if each.ratio is not None
    ]
    return [
        _box("Does it compute the same?", groups["numbers"], accuracy, "No labels: no accuracy."),
        _box("In the precision asked for?", groups["export"], precision, "Nothing was read back."),
        _box("How fast is it?", groups["latency"], speed, "Not measured: see gplq-export bench."),
    ]


def _box(title: str, gates: Sequence[Gate], lines: list[str], nothing: str) -> _Box:
    found = {gate.status for gate in gates}
    worst: list[words.Status] = ["failed", "passed", "skipped"]
    status: words.Status = next((each for each in worst if each in found), "reported")
    judged = [f"{words.tally(gates)}."] if gates else []
    return _Box(title, status, judged + (lines[:8] or [nothing]) + ["…"] * (len(lines) > 8))


@dataclass(frozen=True)
class _Confusion:
    """The images that went from one label to another."""

    reference: str
    candidate: str
    flips: list[Flip]
    outcome: str


def _confusions(flips: Sequence[Flip], room: int) -> tuple[list[_Confusion], int]:
    """Flips by their labels, the most frequent first; pictures as long as there is room. Returns what is left of it."""
    groups: dict[tuple[str, str], list[Flip]] = {}
    for flip in flips:
        groups.setdefault((flip.reference, flip.candidate), []).append(flip)
    found = []
    for (reference, candidate), members in sorted(groups.items(), key=lambda item: -len(item[1])):
        shown = []
        for flip in members:
            fits = _BASE64.fullmatch(flip.picture or "") is not None and len(flip.picture or "") <= room
            room -= len(flip.picture or "") if fits else 0
            shown.append(flip if fits else flip.model_copy(update={"picture": None}))
        count = Counter(_outcome(flip) for flip in members)
        found.append(_Confusion(reference, candidate, shown, ", ".join(f"{n} {word}" for word, n in count.items())))
    return found, room


def _outcome(flip: Flip) -> str:
    if flip.label is None:
        return "without label"
    return {flip.reference: "lost", flip.candidate: "won"}.get(flip.label, "wrong before and after")


class _Shown:
    """A pair, and the charts of it."""

    def __init__(self, pair: Pair, confusions: list[_Confusion]) -> None:
        self.pair = pair
        self.confusions = confusions
        self.outside = words.outside(pair)
        self.layers = _rows(pair.layers)
        self.depth = _depth(pair)
        self.scatter = _scatter(pair)
        self.forced = _Fed(pair.forced) if pair.forced is not None else None


@dataclass(frozen=True)
class _Row:
    layer: Layer
    bar: Markup
    share: str


def _rows(layers: Sequence[Layer]) -> list[_Row]:
    finite = [each.sqnr_db for each in layers if each.sqnr_db is not None and math.isfinite(each.sqnr_db)]
    most = max(finite, default=1.0)
    return [
        # No difference at all is the longest bar there can be.
        _Row(each, charts.bar(math.inf if each.sqnr_db is None else each.sqnr_db, most, _colour(each)), _share(each))
        for each in layers
    ]


def _colour(layer: Layer) -> str:
    return ("s0" if layer.kind == "block" else "s2") if layer.inside else "s1"


def _share(layer: Layer) -> str:
    return f"{layer.different:,} of {layer.total:,}" if layer.total else "–"


def _depth(pair: Pair) -> Markup | None:
    """How the error grows with depth: unequal codes and the band of the noise floor, or the outputs' errors."""
    coded = [each for each in pair.layers if each.share is not None]
    depth = charts.Axis("quantiser, from the image to the output")
    title = f"{pair.name}: error against depth"
    if coded:
        shares = [(index, each.share) for index, each in enumerate(coded) if each.share is not None]
        marks = [(index, each.value, coded[index].name) for index, each in shares if not coded[index].inside]
        line = charts.Series(pair.name, [(index, each.value) for index, each in shares], marks=marks)
        floors = [(index, each.floor) for index, each in enumerate(coded) if each.floor is not None]
        band = charts.Band("noise floor", [(index, it.low, it.high) for index, it in floors]) if floors else None
        return charts.plot(title, depth, charts.Axis("codes that differ, %", log=True), [line], band)
    blocks = [(index, each) for index, each in enumerate(pair.layers) if each.sqnr_db is not None]
    if not blocks:
        return None
    points = [(index, each.sqnr_db or 0.0) for index, each in blocks]
    marks = [(index, each.sqnr_db or 0.0, each.name) for index, each in blocks if not each.inside]
    line = charts.Series(pair.name, points, marks=marks)
    return charts.plot(title, charts.Axis("block, from the image to the output"), charts.Axis("SQNR, dB"), [line])


def _scatter(pair: Pair) -> Markup | None:
    if not pair.scatter:
        return None
    dots = charts.Series("an output", pair.scatter[:: math.ceil(len(pair.scatter) / _DOTS)], "dots")
    axes = charts.Axis(words.shorten(pair.reference, 30)), charts.Axis(words.shorten(pair.candidate, 30))
    return charts.plot(f"{pair.name}: outputs", *axes, [dots], diagonal=True)


class _Fed:
    """What was teacher-forced, in sentences."""

    def __init__(self, forced: Forced) -> None:
        self.images = forced.images
        self.facts = [
            _codes("quantisers, fed the reference's input", forced.quantizers),
            _codes("blocks, fed the reference's input", forced.blocks),
            _grid(forced.grid),
            _worst("linears", forced.linears),
            _worst("what quantisers read", forced.floats),
            _worst("outputs", forced.outputs),
        ]
        unequal = [each for each in forced.quantizers + forced.blocks if each.different or not each.inside]
        self.rows = _rows(unequal)


def _codes(what: str, layers: Sequence[Layer]) -> str:
    if not layers:
        return f"{what}: none"
    unequal = [each for each in layers if each.different]
    total, different = (sum(getattr(each, key) for each in layers) for key in ("total", "different"))
    if not unequal:
        return f"{what}: all {total:,} codes of {len(layers)} equal"
    worst = max(unequal, key=lambda each: each.different / max(each.total, 1))
    return f"{what}: {different:,} of {total:,} codes differ, in {len(unequal)} of {len(layers)}; most in {worst.name}"


def _grid(grid: dict[str, int]) -> str:
    wrong = [f"{name} ({count:,})" for name, count in grid.items() if count]
    found = f"different in {words.listed(wrong)}" if wrong else "all equal"
    return f"numbers on and around every step and limit of {len(grid)} quantisers: {found}"


def _worst(what: str, differences: dict[str, float]) -> str:
    if not differences:
        return f"{what}: none"
    name = max(differences, key=lambda name: math.inf if math.isnan(differences[name]) else differences[name])
    return f"{what}: largest difference {words.number(differences[name], 6)} of the range, in {name}"


@dataclass(frozen=True)
class _Batch:
    """One size of batch: its back ends, and which share of their calls was how fast."""

    size: int
    rows: list[Latency]
    chart: Markup


def _latencies(latency: Sequence[Latency]) -> list[_Batch]:
    ordered = sorted(latency, key=lambda each: each.batch)
    return [_batch(size, list(rows)) for size, rows in groupby(ordered, key=lambda each: each.batch)]


def _batch(size: int, rows: list[Latency]) -> _Batch:
    series = []
    for row in rows:
        last = max(len(row.quantiles_ms) - 1, 1)
        series.append(charts.Series(row.name, [(ms, 100 * at / last) for at, ms in enumerate(row.quantiles_ms)]))
    times = [ms for row in rows for ms in row.quantiles_ms]
    far_apart = max(times, default=0.0) > 10 * min(times, default=0.0)
    axes = charts.Axis("milliseconds of a call", log=far_apart), charts.Axis("calls that took no longer, %")
    return _Batch(size, rows, charts.plot(f"Latency, batch {size}", *axes, series))


def _byte_bars(sizes: dict[str, int]) -> list[tuple[str, int, Markup]]:
    most = max(sizes.values(), default=0)
    return [(name, count, charts.bar(count, most)) for name, count in sizes.items()]
