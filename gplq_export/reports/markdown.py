"""A report as a comment on a pull request: less than 60 lines and 8 kB, however many layers, pairs and failures."""

import re
from collections.abc import Iterator

from gplq_export.check.report import Report
from gplq_export.reports.words import (
    STAMP,
    decibel,
    estimate,
    harmless,
    listed,
    number,
    outside,
    shorten,
    tally,
    top1,
    verdict,
)

MOST_LINES, MOST_BYTES = 60, 8000
_ICONS = {"PASSED": "✅", "FAILED": "❌", "NOTHING CHECKED": "⚠️"}


def markdown(report: Report, link: str = "report.html") -> str:
    """The comment. ``link``: where the complete report is, such as the address of a CI run's artefacts."""
    report = harmless(report)
    for shown in (10, 6, 3, 1):  # rows of a table: as many as fit
        text = "\n".join(_lines(report, link, shown)) + "\n"
        if text.count("\n") < MOST_LINES and len(text.encode()) < MOST_BYTES:
            break
    return text


def _lines(report: Report, link: str, shown: int) -> Iterator[str]:
    found, subject, data = verdict(report), report.subject, report.data
    yield f"## {_ICONS[found.word]} gplq parity: {found.word}"
    yield ""
    if data.random:
        yield f"> **{STAMP}**"
        yield ""
    images = f"{data.images:,} {'random tensors' if data.random else 'images'}"
    yield f"{code(subject.architecture)} on {images} of {code(data.source)}. {text(tally(report.gates))}."
    yield ""
    yield "| pair | compared | same label, % | cosine p01 | SQNR | top-1 | outside the band |"
    yield "|---|---|---|---|---|---|---|"
    for pair in report.pairs[:shown]:
        if pair.skipped or pair.found is None:
            reason = text(shorten(pair.skipped or "not measured", 120))
            yield f"| {code(pair.name)} | not compared: {reason} | | | | | |"
            continue
        cells = (
            code(pair.name),
            f"{text(shorten(pair.reference, 30))} → {text(shorten(pair.candidate, 30))}, n = {pair.found.n:,}",
            estimate(pair.found.agreement),
            number(pair.found.cosine_p01.value, 6),
            decibel(pair.found.sqnr_db),
            top1(pair) or "–",
            code(layers[0].name) + f" + {len(layers) - 1}" * (len(layers) > 1) if (layers := outside(pair)) else "–",
        )
        yield f"| {' | '.join(cells)} |"
    if names := [code(pair.name) for pair in report.pairs[shown:]]:
        yield f"\nAnd {listed(names, 3)}."
    if report.failed:
        yield f"\n### Failed gates{_note(report)}, the likely cause first\n"
        for gate in report.failed[:shown]:
            layer = f" in {code(gate.layer)}" if gate.layer else ""
            yield f"1. {code(gate.id)}{layer}, n = {gate.n:,}: {text(shorten(gate.sentence, 300))}"
        if len(report.failed) > shown:
            yield f"\nAnd {len(report.failed) - shown} more."
    if report.latency:
        yield f"\n### Latency{_note(report)}\n"
        yield "| back end | batch | median, ms | p99, ms | verdict |"
        yield "|---|---|---|---|---|"
        for each in report.latency[:shown]:
            ratio = "" if each.ratio is None else f", {number(each.ratio, 3)} × {text(shorten(each.baseline, 30))}"
            times = f"{number(each.median_ms)} | {number(each.p99_ms)}"
            yield f"| {code(each.name)} | {each.batch} | {times} | {text(shorten(each.verdict, 60))}{ratio} |"
        if len(report.latency) > shown:
            yield f"\nAnd {len(report.latency) - shown} more."
    versions = (f"{name} {version}" for name, version in report.versions.items())
    yield ""
    yield (
        f"[Everything, with charts and thresholds]({_address(link)}). gplq {text(report.tool_version)}, thresholds "
        f"{text(report.thresholds_version)}, {text(shorten(', '.join(versions), 200))}, checkpoint "
        f"{code(subject.checkpoint_sha256[:12])}, data {code(data.sha256[:12])}."
    )


def _note(report: Report) -> str:
    return " (random numbers, not images)" if report.data.random else ""


def code(name: str, most: int = 60) -> str:
    """A name in a code span of a table's cell: nothing in it is read as Markdown, HTML or a mention."""
    # A pipe ends the cell even here, unless there is a backslash before it.
    name = shorten(name, most).replace("|", r"\|") or " "
    fence = "`" * (1 + max(map(len, re.findall("`+", name)), default=0))
    space = " " if "`" in name else ""
    return f"{fence}{space}{name}{space}{fence}"


def text(sentence: str) -> str:
    """A sentence, nothing of which is read as Markdown or HTML; @name and #1 notify and link nobody."""
    escaped = re.sub(r"([\\`*_{}\[\]<>()~|!&])", r"\\\1", sentence)
    return re.sub("([@#])(?=[0-9A-Za-z])", "\\1\N{ZERO WIDTH SPACE}", escaped).replace("://", ":\N{ZERO WIDTH SPACE}//")


def _address(link: str) -> str:
    """An address that the parentheses of a link can hold."""
    return re.sub(r"[\s()<>\\]", lambda match: f"%{ord(match[0]):02X}", link)
