"""Latency in a check: measured JSON into a report, and the gate on regressions, on made-up times."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from check_fixture import THRESHOLDS

from gplq.errors import BuildError, MissingError, UsageError
from gplq_export.bench import Report, Timing, verdict
from gplq_export.check import latency
from gplq_export.check.gates import Judge
from gplq_export.check.latency import entries, judge_latency, measure, read_bench
from gplq_export.check.report import Gate
from gplq_export.contenders import Contender


def bench(
    folder: Path, ratio: float, *, spread: float = 0.01, cpu: str = "x", threads: int = 1, speed: float = 1.0
) -> dict[str, Any]:
    """What 'gplq-export bench --json' writes of five repeats; ``speed``: of the machine, which cancels out."""
    path = folder / "model.cpu.onnx"
    path.write_bytes(b"")
    report = Report({"threads": threads}, {"cpu": cpu, "gpu": None})
    times = [speed * 10 * ratio * (1 + spread * each) for each in (-1, -1, 0, 1, 1)]
    for name, medians in (("fp32", [speed * 10.0] * 5), ("cpu", times)):
        report.contenders.append(Contender(name, path, "onnxruntime", "cpu"))
        report.timings.append(Timing(name, 8, tuple((t, t, t) for t in medians)))
    report.verdicts["cpu", 8] = verdict(report.timings[1].medians, report.timings[0].medians)
    (folder / "bench.json").write_text(json.dumps(report.to_dict()))
    return read_bench(folder / "bench.json")


def gates(now: dict[str, Any], before: dict[str, Any] | None) -> dict[str, Gate]:
    judge = Judge(THRESHOLDS)
    judge_latency(now, before, judge)
    return {gate.metric: gate for gate in judge.gates}


def test_timings_become_entries_of_the_report(tmp_path: Path) -> None:
    fp32, cpu = entries(bench(tmp_path, 0.5))
    assert (fp32.name, fp32.verdict, fp32.ratio) == ("fp32", "the baseline", None)
    assert (cpu.name, cpu.baseline, cpu.batch, cpu.verdict) == ("cpu", "fp32", 8, "faster")
    assert cpu.ratio == pytest.approx(0.5)
    assert cpu.median_ms == pytest.approx(5.0)
    assert len(cpu.quantiles_ms) == 21
    assert cpu.quantiles_ms == sorted(cpu.quantiles_ms)


def test_without_an_earlier_measurement_verdicts_are_reported(tmp_path: Path) -> None:
    found = gates(bench(tmp_path, 0.5), None)
    assert list(found) == ["fp32.batch-8", "cpu.batch-8"]
    assert {gate.status for gate in found.values()} == {"reported"}
    assert "0.500 x fp32: faster" in found["cpu.batch-8"].sentence
    assert found["cpu.batch-8"].n == 15


@pytest.mark.parametrize(
    ("before", "now", "spread", "status"),
    [
        (0.5, 0.5, 0.01, "passed"),
        (0.5, 0.4, 0.01, "passed"),
        (0.5, 0.56, 0.01, "passed"),  # 12 % slower, of which 2.8 % may be noise
        (0.5, 0.57, 0.01, "failed"),  # 14 %
        (0.5, 0.56, 0.0, "failed"),  # nothing is noise
        (0.5, 0.65, 0.1, "passed"),  # 30 %, of which 28 % may be noise
        (2.0, 2.4, 0.01, "failed"),
    ],
)
def test_ratio_may_grow_by_the_limit_and_by_the_noise_of_both(
    before: float, now: float, spread: float, status: str, tmp_path: Path
) -> None:
    old, new = bench(tmp_path, before, spread=spread), bench(tmp_path, now, spread=spread, speed=3.0)
    gate = gates(new, old)["cpu.batch-8.regression"]
    assert gate.status == status
    assert gate.found == pytest.approx(100 * (now / before - 1), abs=1e-6)
    assert gate.limit == 10
    assert gate.low is not None and gate.found is not None
    assert (gate.low > 10) == (status == "failed")


@pytest.mark.parametrize("other", [{"cpu": "y"}, {"threads": 2}])
def test_another_machine_is_skipped_with_the_reason(other: dict[str, Any], tmp_path: Path) -> None:
    gate = gates(bench(tmp_path, 2.0), bench(tmp_path, 0.5, **other))["cpu.batch-8.regression"]
    assert gate.status == "skipped"
    assert "another machine" in gate.sentence


@pytest.mark.parametrize("content", ["", "[]", "3", "null", "{}", '{"timings": 3}'])
def test_what_the_bench_did_not_write_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text(content)
    with pytest.raises(UsageError, match=r"other\.json was not written by 'gplq-export bench --json'"):
        read_bench(tmp_path / "other.json")


@pytest.mark.parametrize("change", ["machine", "verdicts", "median", "quantiles", "ratio"])
def test_damaged_measurement_is_refused(change: str, tmp_path: Path) -> None:
    content = bench(tmp_path, 0.5)
    if change in content:
        del content[change]
    elif change == "median":
        content["timings"][0]["median_ms"] = "fast"
    elif change == "quantiles":
        del content["timings"][1]["quantiles_ms"]
    else:
        content["verdicts"][0]["ratio"] = [1]
    (tmp_path / "bench.json").write_text(json.dumps(content))
    with pytest.raises(UsageError, match=r"bench\.json was not written by"):
        read_bench(tmp_path / "bench.json")


def test_bench_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"gone\.json was not written by"):
        read_bench(tmp_path / "gone.json")


@pytest.mark.parametrize(("code", "error"), [(3, MissingError), (2, BuildError), (0, BuildError)])
def test_bench_that_fails_is_an_error(
    code: int, error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a process of its own, which here is another program."""
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\nexit {code}\n")
    program.chmod(0o755)
    monkeypatch.setattr(latency.sys, "executable", str(program))
    with pytest.raises(error, match=f"exit code {code}"):
        measure(tmp_path, [])
    assert sys.executable == str(program)


@pytest.mark.slow
def test_exported_folder_is_measured(exported: Path) -> None:
    found = measure(exported, ["--seconds", "1", "--batch", "1"])
    names = {entry.name for entry in entries(found)}
    assert {"fp32", "cpu"} <= names
