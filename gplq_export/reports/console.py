"""A report for the terminal: the verdict first, then what it rests on."""

from collections.abc import Iterator

from gplq_export.check.report import Gate, Report
from gplq_export.reports.words import STAMP, compared, harmless, listed, not_judged, number, outside, top1, verdict

_SHOWN = 20  # failed gates in full; one fault seldom leaves more than a handful of others


def console(report: Report) -> list[str]:
    """The lines to print."""
    return list(_lines(harmless(report)))


def _lines(report: Report) -> Iterator[str]:
    found = verdict(report)
    yield f"{found.word}. {' '.join(found.sentences)}"
    if report.data.random:
        yield f"warning: {STAMP}"
    data, subject = report.data, report.subject
    yield f"{subject.architecture}, {subject.checkpoint} ({subject.checkpoint_sha256[:12]})"
    yield (
        f"{data.images:,} {'random tensors' if data.random else 'images'} of {data.source}, "
        f"{'with' if data.labels else 'without'} labels: {', '.join(data.transform) or 'no transform'}"
    )
    yield from _section("pairs", report)
    width = max((len(pair.name) for pair in report.pairs), default=0)
    for pair in report.pairs:
        if pair.skipped:
            yield f"  {pair.name:{width}}  not compared: {pair.skipped}"
            continue
        yield f"  {pair.name:{width}}  {pair.reference} → {pair.candidate}: {compared(pair)}"
        if accuracy := top1(pair):
            yield f"  {'':{width}}  top-1 {accuracy}, {pair.lost} lost, {pair.won} won"
        if names := [layer.name for layer in outside(pair)]:
            yield f"  {'':{width}}  outside their band: {listed(names, 3)}"
    if unjudged := [gate for gate in not_judged(report) if gate.status == "skipped"]:
        yield from _section("not judged", report)
        yield from (f"  {gate.id}: {gate.sentence}" for gate in unjudged)
    if report.failed:
        yield from _section("failed gates, the cause first", report)
        for gate in report.failed[:_SHOWN]:
            yield f"  {gate.id}{f' in {gate.layer}' if gate.layer else ''}: {gate.sentence} ({_limit(gate)})"
        if len(report.failed) > _SHOWN:
            yield f"  and {len(report.failed) - _SHOWN} more, in parity.json"
    if report.latency:
        yield from _section("latency", report)
        width = max(len(each.name) for each in report.latency)
        for each in report.latency:
            ratio = "" if each.ratio is None else f", {number(each.ratio, 3)} x {each.baseline}: {each.verdict}"
            yield f"  {each.name:{width}}  batch {each.batch}: median {number(each.median_ms)} ms{ratio}"


def _section(title: str, report: Report) -> Iterator[str]:
    yield ""
    yield f"{title} (random numbers, not images)" if report.data.random else title


def measured(gate: Gate) -> str:
    """What a gate found, in numbers: "found 97.1 % (96.0 to 98.0), limit 99.0 %, n = 1,000"."""
    if gate.found is None:
        return _limit(gate)
    ends = [number(end, None) for end in (gate.low, gate.high) if end is not None]
    interval = f" ({' to '.join(ends)})" if len(ends) == 2 else ""
    found = f"found {number(gate.found, None)}{interval} {gate.unit}".rstrip()
    return f"{found}, {_limit(gate)}"


def _limit(gate: Gate) -> str:
    limit = [] if gate.limit is None else [f"limit {number(gate.limit, None)} {gate.unit}".rstrip()]
    return ", ".join([*limit, f"n = {gate.n:,}"])
