"""``gplq-export bench``: how fast each file of an export is, and whether the difference is one.

All back ends are timed in one process, in turns: in every round each runs once, and each round begins with another of
them, so that whatever else the machine does meets all alike. A repeat is a number of rounds; what is compared is the
ratio of two medians of one repeat, and the spread of that ratio over the repeats says what the comparison is worth:

    faster or slower    the median ratio differs from 1 by more than max(3 %, 2 spreads), so do at least 3 repeats
    otherwise           no measurable difference

The baseline is the FP16 engine for what runs on the GPU, the FP32 file in ONNX Runtime for what runs on the CPU. A time
is one call as the caller sees it, with the images already in the memory of the device that runs it.
"""

import argparse
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gplq.cli import positive
from gplq.errors import GplqError, MissingError, UsageError
from gplq.files import sha256, write_json
from gplq.progress import progress
from gplq.provenance import environment
from gplq_export.contenders import (
    Call,
    Contender,
    Open,
    Settings,
    baseline_of,
    find_contenders,
    open_contender,
    peak_memory,
)
from gplq_export.manifest import input_shape, read_manifest
from gplq_export.runtimes import package

SCHEMA_VERSION = "1.0"
NOISE = 0.03  # a smaller difference is none, however small the spread
ENOUGH = 3  # repeats that must agree
_WARM_UP, _WARM_UP_SECONDS = 3, 0.5  # at least so many calls, for at least so long
_FEWEST_ROUNDS, _MOST_ROUNDS = 4, 200  # a repeat


@dataclass(frozen=True)
class Timing:
    """What one contender needed for one size of batch: milliseconds of each call, a list for each repeat."""

    name: str
    batch: int
    repeats: tuple[tuple[float, ...], ...]

    @property
    def medians(self) -> list[float]:
        """Of each repeat, in ms."""
        return [statistics.median(repeat) for repeat in self.repeats]

    def to_dict(self) -> dict[str, Any]:
        """Median and percentiles over all calls, ready for JSON."""
        calls = np.concatenate(self.repeats)
        median, p95, p99 = (float(np.percentile(calls, q)) for q in (50, 95, 99))
        return {
            "name": self.name,
            "batch": self.batch,
            "calls": len(calls),
            "median_ms": round(median, 4),
            "p95_ms": round(p95, 4),
            "p99_ms": round(p99, 4),
            "quantiles_ms": [round(float(value), 4) for value in np.percentile(calls, range(0, 101, 5))],
            "images_per_second": round(1000 * self.batch / median, 2),
            "repeat_medians_ms": [round(value, 4) for value in self.medians],
        }


@dataclass(frozen=True)
class Verdict:
    """A comparison with the baseline.

    Attributes:
        word: "faster", "slower" or "no measurable difference".
        ratio: median over the repeats of time / baseline's time. ``spread``: its relative standard deviation over them.
        threshold: by which share the two had to differ. ``agreeing``: how many of ``repeats`` differ by more.
    """

    word: str
    ratio: float
    spread: float
    threshold: float
    agreeing: int
    repeats: int

    def __str__(self) -> str:
        return (
            f"{self.word}: {self.ratio:.3f} x the time, spread {100 * self.spread:.1f} %, "
            f"{self.agreeing} of {self.repeats} repeats beyond {100 * self.threshold:.1f} %"
        )


def verdict(medians: Sequence[float], baseline: Sequence[float]) -> Verdict:
    """Compare the medians of repeats, at least two, with the baseline's of the same repeats.

    >>> print(verdict([0.5, 0.51, 0.49], [1.0, 1.0, 1.0]))
    faster: 0.500 x the time, spread 2.0 %, 3 of 3 repeats beyond 4.0 %
    """
    # Logarithms: twice as fast is as far from no difference as half as fast.
    logs = [math.log(ours / theirs) for ours, theirs in zip(medians, baseline, strict=True)]
    middle, spread = statistics.median(logs), statistics.stdev(logs)
    threshold = max(-math.log(1 - NOISE), 2 * spread)
    sign = -1 if middle < 0 else 1
    agreeing = sum(sign * each > threshold for each in logs)
    word = "no measurable difference"
    if sign * middle > threshold and agreeing >= ENOUGH:
        word = "slower" if sign > 0 else "faster"
    return Verdict(word, math.exp(middle), spread, threshold, agreeing, len(logs))


@dataclass
class Report:
    """What was measured, and what was not and why."""

    settings: dict[str, Any]
    machine: dict[str, Any]
    contenders: list[Contender] = field(default_factory=list)
    timings: list[Timing] = field(default_factory=list)
    verdicts: dict[tuple[str, int], Verdict] = field(default_factory=dict)
    memory: dict[str, int | None] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """All of it, ready for JSON."""
        by_name = {contender.name: contender for contender in self.contenders}
        return {
            "settings": self.settings,
            "machine": self.machine,
            "back_ends": [
                {
                    **asdict(contender),
                    "path": str(contender.path),
                    "bytes": contender.path.stat().st_size,
                    "sha256": sha256(contender.path),
                    "peak_memory_bytes": self.memory.get(contender.name),
                }
                for contender in self.contenders
            ],
            "timings": [timing.to_dict() for timing in self.timings],
            "verdicts": [
                {"name": name, "batch": batch, "baseline": baseline_of(by_name[name]), **asdict(found)}
                for (name, batch), found in self.verdicts.items()
            ],
            "skipped": self.skipped,
        }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of ``gplq-export bench``."""
    parser.add_argument("folder", type=Path, metavar="DIR", help="what 'gplq-export' wrote")
    parser.add_argument(
        "--checkpoint", type=Path, help="also time PyTorch: eager, compiled, and the integer model of it"
    )
    parser.add_argument("--only", type=_names, help="time these alone, such as fp32,cpu,torch; the baseline always")
    parser.add_argument("--batch", type=_sizes, default=(1, 8, 32), help="sizes of batch (default: 1,8,32)")
    parser.add_argument("--threads", type=positive, help="of the CPU, for each back end (default: all that we may use)")
    parser.add_argument("--repeats", type=positive, default=5, help=f"at least {ENOUGH} (default: 5)")
    length = parser.add_mutually_exclusive_group()
    length.add_argument(
        "--seconds", type=positive, default=60, help="to measure each size of batch (default: about 60)"
    )
    length.add_argument("--rounds", type=positive, help="calls of each back end in a repeat, instead of --seconds")
    parser.add_argument("--json", type=Path, help="write all numbers")
    parser.add_argument("--plot", type=Path, help="draw the ratios, as SVG or PNG by the name")


def run(arguments: argparse.Namespace) -> None:
    """Measure, print, write.

    Raises:
        UsageError: an argument is wrong, or the folder is no export.
        MissingError: nothing that was asked for can run here.
    """
    if arguments.repeats < ENOUGH:
        raise UsageError(f"--repeats {arguments.repeats}: a verdict needs at least {ENOUGH}.")
    if arguments.plot is not None:
        _check_plot(arguments.plot)
    shape = input_shape(arguments.folder, read_manifest(arguments.folder))
    threads = arguments.threads or _usable_cpus()
    settings = Settings(threads, arguments.repeats, float(arguments.seconds), arguments.rounds, shape)
    contenders = find_contenders(arguments.folder, arguments.checkpoint, arguments.only)
    report = bench(contenders, arguments.batch, settings)
    for line in lines(report):
        sys.stdout.write(f"{line}\n")
    if arguments.json is not None:
        write_json(arguments.json, {"schema_version": SCHEMA_VERSION, **environment(), **report.to_dict()})
    if arguments.plot is not None:
        from gplq_export.plot import plot_ratios

        plot_ratios(_ratios(report), arguments.plot)


def bench(contenders: Sequence[Contender], batches: Sequence[int], settings: Settings) -> Report:
    """Time all contenders that run here, in turns, for each size of batch.

    Raises:
        MissingError: none runs here.
    """
    report = Report(asdict(settings), _machine())
    opened: dict[str, Open] = {}
    with progress(len(contenders), "load", "back end") as bar:
        for contender in contenders:
            try:
                opened[contender.name] = open_contender(contender, settings)
                report.contenders.append(contender)
            except GplqError as error:
                report.skipped[contender.name] = str(error)
            bar.update()
    if not opened:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in report.skipped.items())
        raise MissingError(f"nothing can be timed here. {reasons}")
    clocks = [_clock()]
    for batch in batches:
        calls = _warm(opened, batch, report.skipped)
        if not calls:
            continue
        for name, repeats in measure(calls, settings, f"batch {batch}").items():
            report.timings.append(Timing(name, batch, repeats))
        clocks.append(_clock())
    _judge(report)
    with progress(len(report.contenders), "peak memory", "back end") as bar:
        for contender in report.contenders:
            report.memory[contender.name] = peak_memory(contender, max(batches), settings)
            bar.update()
    report.machine["cpu_mhz"] = clocks
    report.machine["gpu_after"] = _gpu()
    report.machine["load_average_after"] = _load_average()
    return report


def measure(calls: dict[str, Call], settings: Settings, what: str) -> dict[str, tuple[tuple[float, ...], ...]]:
    """Milliseconds of each call: by name, a tuple for each repeat. In a round each runs once, in turn the first."""
    names = list(calls)
    once = sum(_timed(calls[name]) for name in names) / 1000
    rounds = settings.rounds or min(
        max(int(settings.seconds / settings.repeats / max(once, 1e-9)), _FEWEST_ROUNDS), _MOST_ROUNDS
    )
    found: dict[str, list[list[float]]] = {name: [[] for _ in range(settings.repeats)] for name in names}
    with progress(rounds * settings.repeats, what, "round") as bar:
        for index in range(rounds * settings.repeats):
            first = index % len(names)
            for name in (*names[first:], *names[:first]):
                found[name][index // rounds].append(_timed(calls[name]))
            bar.update()
    return {name: tuple(tuple(repeat) for repeat in repeats) for name, repeats in found.items()}


def _timed(call: Call) -> float:
    started = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - started)


def _warm(opened: dict[str, Open], batch: int, skipped: dict[str, str]) -> dict[str, Call]:
    """What runs one batch, for each back end that can; each has run a few times."""
    calls = {}
    with progress(len(opened), f"batch {batch}, warm-up", "back end") as bar:
        for name, open_batch in opened.items():
            try:
                call = open_batch(batch)
                took = [_timed(call) / 1000 for _ in range(_WARM_UP)]
                while sum(took) < _WARM_UP_SECONDS:
                    took.append(_timed(call) / 1000)
                calls[name] = call
            except GplqError as error:
                skipped[f"{name}, batch {batch}"] = str(error)
            bar.update()
    return calls


def _judge(report: Report) -> None:
    """A verdict for each timing whose baseline was timed, too."""
    medians = {(timing.name, timing.batch): timing.medians for timing in report.timings}
    for contender in report.contenders:
        base = baseline_of(contender)
        for timing in report.timings:
            if timing.name == contender.name != base and (base, timing.batch) in medians:
                report.verdicts[timing.name, timing.batch] = verdict(timing.medians, medians[base, timing.batch])


def _usable_cpus() -> int:
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS and Windows
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _load_average() -> list[float] | None:
    return [round(value, 2) for value in os.getloadavg()] if hasattr(os, "getloadavg") else None


def _cpuinfo(key: str) -> list[str]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return []
    return [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith(key)]


def _clock() -> list[int] | None:
    """Slowest and fastest core's clock at this moment, MHz; None where the system does not say."""
    clocks = [round(float(value)) for value in _cpuinfo("cpu MHz")]
    return [min(clocks), max(clocks)] if clocks else None


def _machine() -> dict[str, Any]:
    """What the numbers depend on besides the files."""
    governor = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    return {
        "cpu": next(iter(_cpuinfo("model name")), platform.processor() or platform.machine()),
        "cpus": _usable_cpus(),
        "governor": governor.read_text(encoding="ascii").strip() if governor.exists() else None,
        "load_average_before": _load_average(),
        "gpu": _gpu(),
    }


def _gpu() -> dict[str, str] | None:
    """Name, driver, clocks and power limit, as the driver's own tool says; None without a GPU."""
    keys = ["name", "driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit", "persistence_mode"]
    try:
        command = ["nvidia-smi", f"--query-gpu={','.join(keys)}", "--format=csv,noheader", "--id=0"]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return dict(zip(keys, (value.strip() for value in done.stdout.split(",")), strict=False))


def lines(report: Report) -> list[str]:
    """The report for people: settings, a table, the verdicts, what was skipped."""
    machine, settings = report.machine, report.settings
    clocks = [clock for clock in machine.get("cpu_mhz", []) if clock]
    mhz = f"{min(low for low, _ in clocks)} to {max(high for _, high in clocks)} MHz" if clocks else "clock unknown"
    found = [
        f"{machine['cpu']}, {settings['threads']} thread(s) of {machine['cpus']} CPU(s), {mhz}, governor "
        f"{machine['governor'] or 'unknown'}, load {machine['load_average_before']} -> "
        f"{machine.get('load_average_after')}",
    ]
    load = machine["load_average_before"]
    if load is not None and load[0] > machine["cpus"] / 2:
        found.append("warning: other programs keep this machine busy, which widens the spread; an idle one tells more.")
    if machine["gpu"] is not None:
        found.append(", ".join(f"{key} {value}" for key, value in machine["gpu"].items()))
    found += [
        f"{settings['repeats']} repeats, back ends in turns; warm-up {_WARM_UP} calls, {_WARM_UP_SECONDS} s; waiting "
        "threads do not spin",
        "peak MB: to load and run the largest batch, in a process of its own",
        "",
        f"{'back end':18} {'batch':>5} {'calls':>6} {'median ms':>10} {'p95':>9} {'p99':>9} {'images/s':>9} "
        f"{'file MB':>8} {'peak MB':>8}",
    ]
    by_name = {contender.name: contender for contender in report.contenders}
    for timing in report.timings:
        row, contender = timing.to_dict(), by_name[timing.name]
        memory = report.memory.get(timing.name)
        found.append(
            f"{timing.name:18} {timing.batch:5} {row['calls']:6} {row['median_ms']:10.2f} {row['p95_ms']:9.2f} "
            f"{row['p99_ms']:9.2f} {row['images_per_second']:9.1f} {contender.path.stat().st_size / 1e6:8.1f} "
            + (f"{memory / 1e6:8.0f}" if memory is not None else f"{'-':>8}")
        )
    found.append("")
    found += [f"{contender.name}: {contender.runs}" for contender in report.contenders]
    found.append("")
    for (name, batch), comparison in report.verdicts.items():
        found.append(f"{name}, batch {batch}, against {baseline_of(by_name[name])}: {comparison}")
    found += [f"skipped {name}: {reason}" for name, reason in report.skipped.items()]
    return found


def _ratios(report: Report) -> dict[int, dict[str, list[float]]]:
    """By batch and back end: time / baseline's time of each repeat."""
    medians = {(timing.name, timing.batch): timing.medians for timing in report.timings}
    by_name = {contender.name: contender for contender in report.contenders}
    found: dict[int, dict[str, list[float]]] = {}
    for name, batch in report.verdicts:
        base = medians[baseline_of(by_name[name]), batch]
        ratios = [ours / theirs for ours, theirs in zip(medians[name, batch], base, strict=True)]
        found.setdefault(batch, {})[name] = ratios
    return found


def _check_plot(path: Path) -> None:
    """Before anything is measured."""
    if path.suffix not in (".svg", ".png"):
        raise UsageError(f"--plot {path}: the name must end in .svg or .png.")
    package("matplotlib", "matplotlib is not installed: pip install 'gplq[report]'")


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(","))


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(dict.fromkeys(positive(part) for part in text.split(",")))
