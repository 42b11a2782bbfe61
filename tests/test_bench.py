"""The benchmark: its statistics on made-up times, its turns, and a whole run on a tiny export."""

import argparse
import hashlib
import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Quantised

from gplq.checkpoint import Checkpoint
from gplq.errors import MissingError, UsageError
from gplq_export import bench, contenders, runner
from gplq_export.bench import Timing, verdict
from gplq_export.contenders import Call, Contender, Open, Settings, find_contenders, open_contender
from gplq_export.export import export

TINY = Settings(threads=1, repeats=3, seconds=1.0, rounds=2, input_shape=(1, 16, 16))
PLAN = b"vtrt" + bytes(20) + bytes([1, 7, 1, 116]) + b"kernels"


@pytest.fixture(scope="module")
def exported(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared: do not change it."""
    folder = tmp_path_factory.mktemp("bench") / "dist"
    export(checkpoint, folder, say=lambda _: None)
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    (folder / "model.fp16.plan").write_bytes(PLAN)
    manifest["files"]["model.fp16.plan"] = {"bytes": len(PLAN), "sha256": hashlib.sha256(PLAN).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def _short_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "_WARM_UP_SECONDS", 0)


def parse(*arguments: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return parser.parse_args([str(argument) for argument in arguments])


@pytest.mark.parametrize(
    ("ours", "word", "agreeing"),
    [
        ([50, 51, 49, 50, 50], "faster", 5),
        ([150, 151, 149, 150, 150], "slower", 5),
        ([98, 98, 98, 98, 98], "no measurable difference", 0),  # 2 % is less than 3 %
        ([102.9] * 5, "no measurable difference", 0),
        ([104] * 5, "slower", 5),
        ([96, 96, 96, 100, 100], "no measurable difference", 0),  # the spread, 2.2 %, allows for 4.4 %
        ([95, 95, 95, 99, 99], "faster", 3),  # the same spread: three repeats are enough
        ([80, 120, 80, 120, 80], "no measurable difference", 0),
        ([90, 90], "no measurable difference", 2),  # of two repeats, never
    ],
)
def test_verdict(ours: list[float], word: str, agreeing: int) -> None:
    found = verdict(ours, [100.0] * len(ours))
    assert (found.word, found.agreeing, found.repeats) == (word, agreeing, len(ours))
    spread = float(np.std(np.log(ours), ddof=1))
    assert found.threshold == pytest.approx(max(-np.log(0.97), 2 * spread))
    assert found.ratio == pytest.approx(np.exp(np.median(np.log(np.array(ours) / 100))))


def test_a_machine_that_slows_down_meets_both_alike() -> None:
    drift = np.linspace(1, 3, 7)
    found = verdict(list(80 * drift), list(100 * drift))
    assert (found.word, found.spread < 1e-9) == ("faster", True)


def test_percentiles_are_those_of_all_calls() -> None:
    random = np.random.default_rng(0)
    calls = random.gamma(2, size=(4, 250))
    row = Timing("a", 8, tuple(map(tuple, calls.tolist()))).to_dict()
    ordered = np.sort(calls, axis=None)
    assert row["calls"] == 1000
    assert row["median_ms"] == pytest.approx((ordered[499] + ordered[500]) / 2, abs=1e-4)
    assert ordered[948] <= row["p95_ms"] <= ordered[951]
    assert ordered[988] <= row["p99_ms"] <= ordered[991]
    assert row["images_per_second"] == pytest.approx(8000 / row["median_ms"], rel=1e-3)
    np.testing.assert_allclose(row["repeat_medians_ms"], np.median(calls, axis=1), atol=1e-4)


def test_back_ends_take_turns_and_each_is_first_as_often() -> None:
    order: list[str] = []
    calls: dict[str, Call] = {name: (lambda name=name: order.append(name)) for name in "abc"}
    settings = Settings(1, repeats=3, seconds=1.0, rounds=4, input_shape=(1,))
    found = bench.measure(calls, settings, "test")
    rounds = np.array(order[3:]).reshape(12, 3)  # the first three estimate how long a round takes
    assert all(sorted(turn) == ["a", "b", "c"] for turn in rounds.tolist())
    assert {name: int((rounds[:, 0] == name).sum()) for name in "abc"} == {"a": 4, "b": 4, "c": 4}
    assert {name: [len(repeat) for repeat in repeats] for name, repeats in found.items()} == {n: [4] * 3 for n in "abc"}


def test_seconds_decide_on_the_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "_timed", lambda call: 100.0)  # ms
    for seconds, rounds in ((6, 10), (0.1, 4), (1e6, 200)):
        settings = Settings(1, repeats=3, seconds=seconds, rounds=None, input_shape=(1,))
        found = bench.measure({"a": object, "b": object}, settings, "test")
        assert [len(repeat) for repeat in found["a"]] == [rounds] * 3


def test_whole_run(
    exported: Path,
    quantised: Quantised,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = bench.peak_memory
    # Processes that import PyTorch take seconds.
    monkeypatch.setattr(bench, "peak_memory", lambda c, *rest: None if "torch" in c.name else real(c, *rest))
    only = "fp16,int4,torch,torch-quantised,fp16.plan"
    numbers, plot = tmp_path / "bench.json", tmp_path / "bench.svg"
    flags = ["--batch", "1,2", "--threads", 1, "--repeats", 3, "--rounds", 2, "--json", numbers, "--plot", plot]
    bench.run(parse(exported, "--checkpoint", quantised.path, "--only", only, *flags))
    said = capsys.readouterr().out
    content = json.loads(numbers.read_text(encoding="utf-8"))
    assert content["schema_version"] == "1.0"
    assert content["versions"]["torch"]
    names = ["fp32", "fp16", "int4", "torch", "torch-quantised"]  # the baseline though nobody asked for it
    assert [entry["name"] for entry in content["back_ends"]] == names
    assert [(row["name"], row["batch"]) for row in content["timings"]] == [(n, b) for b in (1, 2) for n in names]
    assert all(row["calls"] == 6 and len(row["repeat_medians_ms"]) == 3 for row in content["timings"])
    for entry in content["back_ends"]:
        path = Path(entry["path"])
        assert entry["bytes"] == path.stat().st_size
        assert entry["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        known = sys.platform == "linux" and "torch" not in entry["name"]
        assert (100_000 < entry["peak_memory_bytes"] < 1e9) if known else entry["peak_memory_bytes"] is None
    assert [(row["name"], row["batch"]) for row in content["verdicts"]] == [(n, b) for n in names[1:] for b in (1, 2)]
    medians = {(row["name"], row["batch"]): row["repeat_medians_ms"] for row in content["timings"]}
    for row in content["verdicts"]:
        expected = verdict(medians[row["name"], row["batch"]], medians["fp32", row["batch"]])
        assert (row["baseline"], row["word"]) == ("fp32", expected.word)
        assert f"{row['name']}, batch {row['batch']}, against fp32: {row['word']}" in said
    assert list(content["skipped"]) == ["fp16.plan"]
    assert "skipped fp16.plan: " in said
    assert content["settings"]["threads"] == 1
    assert {"cpu", "governor", "load_average_before", "cpu_mhz", "gpu"} <= content["machine"].keys()
    assert plot.read_text(encoding="utf-8").startswith("<?xml")


def test_plan_without_gpu_is_skipped_and_nothing_else_is_an_error(exported: Path) -> None:
    plan = next(c for c in find_contenders(exported) if c.name == "fp16.plan")
    assert plan.device == "gpu"
    with pytest.raises(MissingError, match=r"nothing can be timed here\. fp16\.plan: ") as raised:
        bench.bench([plan], [1], TINY)
    assert raised.value.exit_code == 3


def test_engine_sources_are_no_back_end_and_files_are_checked(exported: Path, tmp_path: Path) -> None:
    folder = tmp_path / "dist"
    shutil.copytree(exported, folder)
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    manifest["files"]["model.trt-int4.onnx"] = {"bytes": 0, "sha256": "0"}
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    found = find_contenders(folder)
    assert not any(contender.name.startswith("trt-") for contender in found)
    assert [found[0].name, found[-1].name] == ["fp32", "fp16.plan"]
    (folder / "model.int4.onnx").write_bytes(b"altered")
    report = bench.bench([c for c in found if c.name in ("fp32", "int4")], [1], TINY)
    assert "missing or altered" in report.skipped["int4"]
    assert [timing.name for timing in report.timings] == ["fp32"]
    assert report.verdicts == {}


def test_a_back_end_that_fails_at_one_batch_is_skipped_there(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def limited(contender: Contender, settings: Settings) -> Open:
        opened = open_contender(contender, settings)

        def open_batch(batch: int) -> Call:
            if contender.name == "fp16" and batch > 1:
                raise UsageError("too many")
            return opened(batch)

        return open_batch

    monkeypatch.setattr(bench, "open_contender", limited)
    report = bench.bench(find_contenders(exported, only=["fp16"]), [1, 2], TINY)
    assert report.skipped == {"fp16, batch 2": "too many"}
    assert [(timing.name, timing.batch) for timing in report.timings] == [("fp32", 1), ("fp16", 1), ("fp32", 2)]
    assert list(report.verdicts) == [("fp16", 1)]


class FakeRunner:
    """Stands for a plan on a GPU: sums are ready once it is waited for."""

    def __init__(self, plan: Path, cuda_graphs: bool) -> None:
        assert cuda_graphs
        self.waited = 0

    def input_buffer(self, batch: int) -> torch.Tensor:
        self.buffer = torch.zeros(batch, *TINY.input_shape)
        return self.buffer

    def __call__(self, images: torch.Tensor) -> None:
        assert images is self.buffer  # nothing is copied while it is timed

    def synchronize(self) -> None:
        self.waited += 1


def test_plan_is_timed_until_the_gpu_is_done(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[FakeRunner] = []
    monkeypatch.setattr(runner, "Runner", lambda plan, **flags: made.append(FakeRunner(plan, **flags)) or made[-1])
    monkeypatch.setattr(bench, "peak_memory", lambda *arguments: None)
    report = bench.bench(find_contenders(exported, only=["fp16.plan"]), [2], TINY)
    assert made[0].waited == 3 + 1 + 3 * 2  # warm-up, estimate, three repeats of two rounds
    assert made[0].buffer.std() > 0.5
    assert report.verdicts == {}  # it is its own baseline
    twin = Contender("trt-int4.plan", exported / "model.fp16.plan", "TensorRT", "gpu")
    report = bench.bench([*report.contenders, twin], [2], TINY)
    assert list(report.verdicts) == [("trt-int4.plan", 2)]
    assert "trt-int4.plan, batch 2, against fp16.plan: " in "\n".join(bench.lines(report))


def test_usage_errors(exported: Path, quantised: Quantised, tmp_path: Path) -> None:
    def fails(message: str, *arguments: Any) -> None:
        with pytest.raises(UsageError, match=message):
            bench.run(parse(*arguments))

    fails("a verdict needs at least 3", exported, "--repeats", 2)
    fails("no readable manifest", tmp_path)
    fails("there is no cpu2 here; there are", exported, "--only", "cpu2")
    fails(r"must end in \.svg or \.png", exported, "--plot", "bench.txt")
    (tmp_path / "manifest.json").write_text('{"tool": "other"}', encoding="utf-8")
    fails("no readable manifest", tmp_path)
    manifest = {
        "tool": "gplq-export",
        "schema_version": "3.0",
        "files": {"../a.onnx": {"sha256": "0"}},
        "input": {"shape": ["batch", 1, 2, 2]},
    }
    (tmp_path / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    fails("was altered", tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"files": {}, "input": {}}), encoding="utf-8")
    fails("does not say the shape", tmp_path)
    for arguments in (["--batch", "0"], ["--rounds", "2", "--seconds", "3"]):
        with pytest.raises(SystemExit):
            parse(exported, *arguments)
    other = Settings(1, 3, 1.0, 2, input_shape=(3, 16, 16))
    contender = Contender("torch", quantised.path, "PyTorch", "cpu")
    with pytest.raises(UsageError, match="not of one model"):
        open_contender(contender, other)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process its peak memory")
def test_peak_memory_grows_with_the_batch(quantised: Quantised) -> None:
    contender = Contender("torch-quantised", quantised.path, "PyTorch", "cpu")
    small, large = (contenders.peak_memory(contender, batch, TINY) for batch in (1, 4096))
    assert small is not None
    assert large is not None
    assert large > small + 4096 * math.prod(TINY.input_shape) * 4


@pytest.mark.slow
def test_compiled_model_runs_or_says_why_not(quantised: Quantised, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "peak_memory", lambda *arguments: None)  # would compile again
    contender = Contender("torch-compile", quantised.path, "torch.compile", "cpu")
    report = bench.bench([contender], [2], TINY)
    assert report.timings or "does not run" in report.skipped["torch-compile, batch 2"]
