"""Latency in a check: what ``gplq-export bench`` measures, as part of the report, and the gate on regressions."""

import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gplq.errors import BuildError, MissingError, UsageError
from gplq_export.check.gates import Judge
from gplq_export.check.report import Latency

_MISSING = 3


def measure(folder: Path, arguments: Sequence[str]) -> dict[str, Any]:
    """Run the bench on an export; in a process of its own, where nothing else has started threads.

    Raises:
        MissingError: nothing can be timed here. BuildError: the bench failed.
    """
    with tempfile.TemporaryDirectory(prefix="gplq-") as temporary:
        result = Path(temporary) / "bench.json"
        command = [sys.executable, "-m", "gplq_export", "bench", str(folder), "--json", str(result), *arguments]
        done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
        if done.returncode != 0 or not result.exists():
            kind = MissingError if done.returncode == _MISSING else BuildError
            raise kind(f"the bench ended with exit code {done.returncode}; what it said stands above.")
        return read_bench(result)


def read_bench(path: Path) -> dict[str, Any]:
    """What ``gplq-export bench --json`` wrote.

    Raises:
        UsageError: it did not write this.
    """
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        complete = all(key in content for key in ("machine", "timings", "verdicts", "back_ends"))
        entries(content)
    except (OSError, ValueError, TypeError, LookupError) as error:
        raise UsageError(f"{path} was not written by 'gplq-export bench --json': {error}.") from error
    if not complete:
        raise UsageError(f"{path} was not written by 'gplq-export bench --json'.")
    return content


def entries(bench: dict[str, Any]) -> list[Latency]:
    """The timings with their verdicts, for the report."""
    verdicts = {(verdict["name"], verdict["batch"]): verdict for verdict in bench["verdicts"]}
    devices = {back_end["name"]: back_end["device"] for back_end in bench["back_ends"]}
    found = []
    for timing in bench["timings"]:
        name, batch = timing["name"], timing["batch"]
        verdict = verdicts.get((name, batch))
        baseline = "fp16.plan" if devices.get(name) == "gpu" else "fp32"
        found.append(
            Latency(
                name=name,
                baseline=baseline,
                batch=batch,
                median_ms=timing["median_ms"],
                p95_ms=timing["p95_ms"],
                p99_ms=timing["p99_ms"],
                quantiles_ms=timing["quantiles_ms"],
                verdict="the baseline" if name == baseline else verdict["word"] if verdict else "without a baseline",
                ratio=verdict["ratio"] if verdict else None,
                spread=verdict["spread"] if verdict else None,
            )
        )
    return found


def judge_latency(bench: dict[str, Any], before: dict[str, Any] | None, judge: Judge) -> None:
    """Report the verdicts, and judge the ratios to the baseline against those of an earlier measurement."""
    machines = [json.dumps(_machine(each), sort_keys=True) for each in (bench, before or bench)]
    known = {(entry.name, entry.batch): entry for entry in entries(before)} if before is not None else {}
    allowed = judge.thresholds["latency_regression"]
    for entry in entries(bench):
        metric = f"{entry.name}.batch-{entry.batch}"
        calls = next(t["calls"] for t in bench["timings"] if (t["name"], t["batch"]) == (entry.name, entry.batch))
        words = f"{entry.median_ms:.3f} ms a batch of {entry.batch}"
        if entry.ratio is None or entry.spread is None:
            judge.add("latency", metric, "reported", f"{words}: {entry.verdict}.", found=entry.median_ms, unit="ms",
                      n=calls)  # fmt: skip
            continue
        words += f", {entry.ratio:.3f} x {entry.baseline}: {entry.verdict}"
        judge.add("latency", metric, "reported", f"{words}.", found=entry.ratio, unit="x baseline", n=calls)
        old = known.get((entry.name, entry.batch))
        if old is None or old.ratio is None or old.spread is None:
            continue
        if machines[0] != machines[1]:
            judge.skip("latency", f"{metric}.regression", "the earlier measurement is of another machine or settings")
            continue
        grown = 100 * (entry.ratio / old.ratio - 1)
        noise = 100 * 2 * math.hypot(entry.spread, old.spread)
        judge.add(
            "latency",
            f"{metric}.regression",
            grown - noise <= allowed,
            f"{entry.ratio:.3f} x {entry.baseline}, before {old.ratio:.3f}: {grown:+.1f} %, of which noise may be "
            f"{noise:.1f} %"
            + ("." if grown - noise <= allowed else f": slower than before by more than {allowed:g} %."),
            "latency_regression",
            found=grown,
            interval=(grown - noise, grown + noise),
            unit="%",
            n=calls,
        )


def _machine(bench: dict[str, Any]) -> dict[str, Any]:
    """What must be the same for ratios to be comparable."""
    gpu = bench["machine"].get("gpu") or {}
    settings = bench.get("settings", {})
    return {"cpu": bench["machine"].get("cpu"), "gpu": gpu.get("name"), "threads": settings.get("threads")}
