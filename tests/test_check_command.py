"""The command: exit codes, messages, what is written; flags that cannot have an effect."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import onnx_ir as ir
import pytest
from check_fixture import Array, replaced
from conftest import make_arrays, write_model
from test_bench import PLAN
from test_check_latency import bench

from gplq.files import sha256
from gplq_export.check.report import Report, read_report
from gplq_export.cli import main
from gplq_export.onnx_file import read_onnx

Check = Callable[..., int]


@pytest.fixture
def few(npz_file: Path, tmp_path: Path) -> Path:
    """Twelve test images, so that a check takes no time."""
    with np.load(npz_file) as content:
        np.savez(tmp_path / "few.npz", images=content["test_images"][:12], labels=content["test_labels"][:12])
    return tmp_path / "few.npz"


@pytest.fixture
def dist(exported: Path, tmp_path: Path) -> Path:
    """A copy of the export, to be changed."""
    shutil.copytree(exported, tmp_path / "dist")
    return tmp_path / "dist"


def call(*arguments: object) -> int:
    """Exit code of 'gplq-export check'."""
    return main(["check", *map(str, arguments)])


def spoil(path: Path) -> None:
    """Another bias in one channel of the classifier."""

    def shift(bias: Array) -> None:
        bias[0] += 5

    ir.save(replaced(read_onnx(path), "head.linear.bias", shift), path)


def report_of(folder: Path) -> Report:
    return read_report(folder / "parity.json")


def test_sound_export_passes_and_everything_is_written(
    dist: Path, npz_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(dist, "--data", npz_file, "--require", "int4,cpu,float") == 0
    folder = dist / "reports"
    assert sorted(path.name for path in folder.iterdir()) == [
        "parity.json", "parity.junit.xml", "report.html", "report.md",
    ]  # fmt: skip
    report = report_of(folder)
    assert (report.failed, report.data.images, report.data.labels, report.data.random) == ([], 64, True, False)
    assert report.command[:2] != []
    assert {pair.name for pair in report.pairs if pair.skipped is None} == {
        "float", "rounding", "twin-fp32", "twin-fp16", "int4", "int4-optimised", "cpu",
    }  # fmt: skip
    assert {gate.id: gate.status for gate in report.gates}["data.golden"] == "passed"
    floats = report.pair("float")
    assert floats is not None and floats.reference_top is not None and floats.candidate_top is not None
    assert floats.lost - floats.won == round(0.64 * (floats.reference_top.top1.value - floats.candidate_top.top1.value))
    printed = capsys.readouterr()
    assert printed.out.startswith("PASSED. ")
    assert f"wrote parity.json, parity.junit.xml, report.md, report.html in {folder}" in printed.out
    assert ElementTree.parse(folder / "parity.junit.xml").getroot().get("failures") == "0"


def test_reports_go_where_they_are_asked_for(exported: Path, few: Path, tmp_path: Path) -> None:
    before = sorted(path.name for path in exported.iterdir())
    assert call(exported, "--data", few, "--report", tmp_path / "new" / "here", "--images", "5") == 0
    assert sorted(path.name for path in exported.iterdir()) == before
    assert report_of(tmp_path / "new" / "here").data.images == 5


def test_failed_gate_exits_with_1_and_names_it(dist: Path, few: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spoil(dist / "model.cpu.onnx")
    # A gate that failed outranks what is missing.
    assert call(dist, "--data", few, "--require", "nonsense") == 1
    printed = capsys.readouterr()
    assert printed.err.splitlines()[-1].startswith(
        "gplq-export check: error: export.hash.cpu: model.cpu.onnx is not the file"
    )
    assert printed.out.startswith("FAILED. ")
    found = [gate.id for gate in report_of(dist / "reports").failed]
    assert found[:3] == ["export.hash.cpu", "cpu.forced.linears", "cpu.forced.outputs"]


def test_thresholds_and_max_drop_reach_the_gates(dist: Path, few: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("enough_images: {limit: 12, why: These are all.}\n")
    flags = ["--thresholds", tmp_path / "mine.yaml", "--max-drop", "77", "--expect-top1", "20"]
    assert call(dist, "--data", few, *flags) == 0
    report = report_of(dist / "reports")
    gates = {gate.id: gate for gate in report.gates}
    assert report.thresholds_version == "mine.yaml, on 1.1"
    assert (gates["float.top1"].limit, gates["float.top1"].why) == (77, "Given with --max-drop.")
    assert gates["float.top1"].status == "passed"  # judged, although they are so few
    assert gates["data.top1"].limit == 19


def test_unknown_threshold_exits_with_2(
    exported: Path, few: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.yaml").write_text("enough: {limit: 12, why: x}\n")
    assert call(exported, "--data", few, "--thresholds", tmp_path / "mine.yaml", "--report", tmp_path / "r") == 2
    assert "there is no threshold 'enough'" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


def test_random_numbers_are_stamped_everywhere(dist: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(dist, "--random", "6") == 0
    report = report_of(dist / "reports")
    assert (report.data.random, report.data.images, report.data.labels) == (True, 6, False)
    stamp = "Random numbers, not images: this proves nothing about accuracy."
    assert stamp in capsys.readouterr().out
    for name in ("report.md", "report.html", "parity.junit.xml"):
        text = (dist / "reports" / name).read_text()
        assert stamp in text or "random numbers" in text, name
    gates = {gate.id: gate for gate in report.gates}
    assert gates["data.golden"].status == "skipped"
    assert not any(gate.metric == "top1" and gate.status == "passed" for gate in report.gates)
    assert gates["cpu.forced.codes"].status == "passed"


def test_random_numbers_are_the_same_every_time(exported: Path, tmp_path: Path) -> None:
    for name in "ab":
        assert call(exported / "model.int4.onnx", "--random", "3", "--report", tmp_path / name) == 0
    first, second = (report_of(tmp_path / name) for name in "ab")
    assert first.data.sha256 == second.data.sha256
    assert first.pairs == second.pairs


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "check needs images: --data DATA"),
        (["--data", "x.npz", "--random", "3"], "check needs images"),
        (["--random", "3", "--images", "2"], "--images has no effect without --data"),
        (["--random", "3", "--no-labels"], "--no-labels has no effect without --data"),
        (["--random", "3", "--model", "vit"], "--model has no effect without --triton"),
        (["--random", "3", "--grpc"], "--grpc has no effect without --triton"),
        (["--random", "3", "--triton", "localhost:8000"], "--triton has no effect without --model"),
        (["--random", "3", "--latency-baseline", "x"], "--latency-baseline has no effect without --latency or --bench"),
        (["--data", "gone.npz"], "gone.npz does not exist"),
        (["--random", "3", "--checkpoint", "gone.pt"], "gone.pt does not exist"),
        (["--random", "3", "--float", "gone"], "gone"),
        (["--random", "3", "--thresholds", "gone.yaml"], "gone.yaml cannot be read as thresholds"),
    ],
)
def test_mistake_exits_with_2_and_leaves_nothing(
    exported: Path, flags: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert call(exported, *flags, "--report", "r") == 2
    error = capsys.readouterr().err
    assert error.startswith("gplq-export check: error: ")
    assert message in error
    assert list(tmp_path.iterdir()) == []


def test_another_float_model_exits_with_2(exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = write_model(tmp_path / "other", depth=1)
    assert call(exported, "--random", "3", "--float", other, "--report", tmp_path / "r") == 2
    assert "the checkpoint was made from other weights" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["--random", "3"], ["x", "--random", "0"], ["x", "--images", "-1"]])
def test_wrong_usage_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        call(*arguments)
    assert caught.value.code == 2
    assert "usage: gplq-export check" in capsys.readouterr().err


# What is missing


def test_required_pair_that_was_skipped_exits_with_3(dist: Path, few: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A plan that nothing here can run; what is skipped has a reason, and is no failure unless it is required."""
    (dist / "model.fp16.plan").write_bytes(PLAN)
    content = json.loads((dist / "manifest.json").read_text())
    digest = sha256(dist / "model.fp16.plan")
    content["files"]["model.fp16.plan"] = {"bytes": len(PLAN), "sha256": digest}
    content["engines"]["fp16"] = {"onnx_sha256": content["files"]["model.fp16.onnx"]["sha256"]}
    (dist / "manifest.json").write_text(json.dumps(content))
    assert call(dist, "--data", few) == 0
    pair = report_of(dist / "reports").pair("fp16.plan")
    assert pair is not None and pair.skipped
    assert "Not checked: fp16.plan" in capsys.readouterr().out
    for name in ("trt", "fp16.plan"):
        assert call(dist, "--data", few, "--require", f"cpu,{name}") == 3
        assert f"fp16.plan is required (--require {name}) and was skipped: " in capsys.readouterr().err


def test_requiring_what_is_not_there_exits_with_2(
    exported: Path, few: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(exported, "--data", few, "--require", "openvino", "--report", tmp_path) == 2
    error = capsys.readouterr().err
    assert "--require openvino: there is no such pair here; there are float, rounding, " in error


def test_without_onnx_runtime_nothing_passes(
    dist: Path, few: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert call(dist, "--data", few) == 3
    assert "pip install 'gplq[cpu]'" in capsys.readouterr().err


# Images and labels


def test_images_without_labels_have_no_accuracy(exported: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "bare.npz", images=make_arrays(6, seed=9)[0])
    assert call(exported, "--data", tmp_path / "bare.npz", "--report", tmp_path / "r") == 2
    assert call(exported, "--data", tmp_path / "bare.npz", "--report", tmp_path / "r", "--no-labels") == 0
    report = report_of(tmp_path / "r")
    assert not report.data.labels
    assert all(pair.reference_top is None and pair.lost == pair.won == 0 for pair in report.pairs)


# Latency


def test_measured_latency_becomes_part_of_the_report(dist: Path, few: Path, tmp_path: Path) -> None:
    for name, ratio in (("before", 0.5), ("now", 0.7)):
        (tmp_path / name).mkdir()
        bench(tmp_path / name, ratio)
    files = {name: tmp_path / name / "bench.json" for name in ("before", "now")}
    assert call(dist, "--data", few, "--bench", files["now"]) == 0
    report = report_of(dist / "reports")
    assert [entry.name for entry in report.latency] == ["fp32", "cpu"]
    assert report.latency_machine["cpu"] == "x"
    assert call(dist, "--data", few, "--bench", files["now"], "--latency-baseline", files["before"]) == 1
    [gate] = report_of(dist / "reports").failed
    assert gate.id == "latency.cpu.batch-8.regression"
    assert call(dist, "--data", few, "--bench", files["before"], "--latency-baseline", files["now"]) == 0
    assert call(dist, "--data", few, "--bench", few) == 2
