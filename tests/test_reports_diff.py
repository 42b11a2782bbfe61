"""Two reports: what got worse, better, was lost; and the commands `gplq-export report` and `diff`."""

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from junitparser import JUnitXml
from markdown_it import MarkdownIt
from reports_fixture import make_gates, make_hostile, make_latency, make_report

from gplq.errors import GateError, UsageError
from gplq_export.check.report import Estimate, File, Gate, Report, Top, json_schema, read_report
from gplq_export.reports import command, diff, write_reports
from gplq_export.reports.words import STAMP


def changed_pair(**changes: Any) -> Report:
    """The report, its first pair changed."""
    report = make_report()
    first, *others = report.pairs
    return report.model_copy(update={"pairs": [first.model_copy(update=changes), *others]})


def changed_closeness(**changes: Any) -> Report:
    found = make_report().pairs[0].found
    assert found is not None
    return changed_pair(found=found.model_copy(update=changes))


def changed_gate(index: int, **changes: Any) -> Report:
    gates: list[Gate] = make_gates()
    gates[index] = gates[index].model_copy(update=changes)
    return make_report(gates=gates)


def changed_latency(index: int, **changes: Any) -> Report:
    rows = make_latency()
    rows[index] = rows[index].model_copy(update=changes)
    return make_report(latency=rows)


def estimate(value: float, reach: float, n: int = 1000) -> Estimate:
    return Estimate(value=value, low=value - reach, high=value + reach, n=n)


def outcomes(old: Report, new: Report) -> list[tuple[str, str]]:
    return [(change.direction, change.what) for change in diff.diff(old, new)]


def test_the_same_report_is_no_change() -> None:
    report = make_report()
    assert diff.diff(report, report) == []
    assert diff.console(report, report) == ["FAILED → FAILED; nothing changed"]
    later = report.model_copy(update={"created_utc": "2027-01-01T00:00:00+00:00", "seconds": 1.0})
    assert diff.diff(report, later) == []


@pytest.mark.parametrize(
    ("worse", "what"),
    [
        (lambda: changed_gate(0, status="failed"), "export.hashes"),
        (lambda: changed_gate(4, status="failed"), "pair-2.top1"),
        (lambda: changed_gate(5, status="failed"), "trt-int4.plan.agreement"),
        (lambda: changed_closeness(agreement=estimate(96.0, 1.0)), "pair-0, same label, %"),
        (lambda: changed_closeness(cosine=estimate(0.99, 0.001)), "pair-0, cosine"),
        (lambda: changed_closeness(cosine=estimate(math.nan, 0)), "pair-0, cosine"),
        (lambda: changed_closeness(cosine_p01=estimate(0.99, 0.001)), "pair-0, cosine of the worst 1 %"),
        (lambda: changed_closeness(kl=estimate(0.002, 0.001)), "pair-0, KL"),
        (lambda: changed_closeness(sqnr_db=31.4 - 3.1), "pair-0, SQNR"),
        (lambda: changed_closeness(sqnr_db=math.nan), "pair-0, SQNR"),
        (
            lambda: changed_pair(candidate_top=Top(top1=estimate(88, 1), top5=None)),
            "pair-0, top-1 of the candidate, %",
        ),
        (lambda: changed_latency(1, ratio=0.60), "latency of cpu, batch 1"),
    ],
)
def test_worse_in_one_direction_is_better_in_the_other(worse: Callable[[], Report], what: str) -> None:
    old, new = make_report(), worse()
    assert outcomes(old, new) == [("worse", what)]
    if what not in ("pair-2.top1", "trt-int4.plan.agreement"):  # these were not judged before
        assert outcomes(new, old) == [("better", what)]


@pytest.mark.parametrize(
    "same",
    [
        lambda: changed_closeness(agreement=estimate(97.5, 0.9)),  # the intervals touch
        lambda: changed_closeness(sqnr_db=31.4 - 2.9),
        lambda: changed_latency(1, ratio=0.561),  # 2 %
        lambda: changed_latency(1, ratio=0.60, spread=0.05),  # 9 %, within two spreads
        lambda: changed_latency(0, median_ms=90.0),  # the baseline itself: another machine, maybe
        lambda: changed_gate(2, found=99.8, sentence="Something else."),
    ],
)
def test_within_the_noise_is_no_change(same: Callable[[], Report]) -> None:
    assert diff.diff(make_report(), same()) == []


def test_layers_that_leave_their_band_and_come_back() -> None:
    layers = list(make_report().pairs[0].layers)
    layers[3] = layers[3].model_copy(update={"inside": False})
    layers[9] = layers[9].model_copy(update={"inside": True})
    changes = diff.diff(make_report(), changed_pair(layers=layers))
    assert [change.direction for change in changes] == ["worse", "better"]
    assert changes[0].what == "pair-0, blocks.0.mlp"
    assert changes[1].sentence == "inside the noise floor's band again: blocks.2.attn.proj.input_quantizer"


def test_what_is_no_longer_checked_is_lost_and_no_regression() -> None:
    assert outcomes(make_report(), changed_gate(2, status="skipped")) == [("lost", "pair-0.agreement")]
    assert outcomes(changed_gate(2, status="skipped"), make_report()) == [("changed", "pair-0.agreement")]
    assert outcomes(make_report(), make_report(gates=make_gates()[:-1])) == [("lost", "latency.regression")]
    assert outcomes(make_report(gates=make_gates()[1:]), make_report()) == [("changed", "export.hashes")]
    assert outcomes(make_report(gates=[]), make_report())[0] == ("worse", "pair-0.forced.codes")


def test_files_versions_and_images() -> None:
    old = make_report()
    subject = old.subject.model_copy(update={"files": {"model.cpu.onnx": File(bytes=1, sha256="b" * 64)}})
    data = old.data.model_copy(update={"sha256": "e" * 64, "random": True})
    new = make_report(subject=subject, data=data, versions={"torch": "2.16.0", "onnxruntime": "1.31.1"})
    assert [change.what for change in diff.diff(old, new)] == [
        "file model.int4.onnx",
        "file model.cpu.onnx",
        "version of torch",
        "the images",
    ]
    lines = diff.console(old, new)
    assert "  file model.cpu.onnx: not there → bbbbbbbbbbbb" in lines
    assert "  version of torch: 2.15.0 → 2.16.0" in lines
    assert f"warning: {STAMP}" in lines
    assert "warning: The two were checked on different images." in lines


def test_markdown_of_a_difference() -> None:
    new = changed_gate(0, status="failed", sentence="model.int4.onnx | is *another* one.")
    text = diff.markdown(make_report(), new)
    assert text.startswith("## gplq parity, before and after: 1 worse\n")
    assert "- `export.hashes`: passed → failed: model.int4.onnx | is \\*another\\* one." in text.replace("\\|", "|")
    strange = diff.markdown(make_report(gates=[]), make_hostile(make_report()))
    kinds = {token.type for token in MarkdownIt("commonmark").parse(strange)}
    assert not kinds & {"html_block", "fence", "code_block"}
    inside = [child for token in MarkdownIt("commonmark").parse(strange) for child in token.children or []]
    assert not [child for child in inside if child.type in ("html_inline", "image", "link_open")]


# The commands


def call(module: ModuleType, *words: str | Path) -> None:
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    module.run(parser.parse_args([str(word) for word in words]))


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Two exports, the second worse."""
    old, new = tmp_path / "old", tmp_path / "new"
    write_reports(make_report(), old / "reports")
    write_reports(changed_gate(0, status="failed"), new / "reports")
    return old, new


def test_diff_fails_on_regressions(folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    old, new = folders
    with pytest.raises(GateError, match=r"worse than .*old in 1: export\.hashes\."):
        call(diff, old, new)
    assert "\nworse\n  export.hashes: passed → failed: " in capsys.readouterr().out
    call(diff, old, new, "--fail-on", "never")
    call(diff, new, old / "reports" / "parity.json", "--format", "md")
    assert "### Better\n\n- `export.hashes`" in capsys.readouterr().out


def test_diff_fails_on_what_is_lost_if_told_so(folders: tuple[Path, Path], tmp_path: Path) -> None:
    write_reports(changed_gate(2, status="skipped"), tmp_path / "less")
    call(diff, folders[0], tmp_path / "less")
    with pytest.raises(GateError, match=r"pair-0\.agreement"):
        call(diff, folders[0], tmp_path / "less", "--fail-on", "lost")


@pytest.mark.parametrize(
    ("kind", "start"),
    [("console", "FAILED. 7 gates"), ("md", "## ❌ gplq"), ("html", "<!DOCTYPE html>"), ("junit", "<?xml version=")],
)
def test_report_again_in_any_format(
    kind: str, start: str, folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call(command, folders[0], "--format", kind)
    printed = capsys.readouterr().out
    assert printed.startswith(start)
    call(command, folders[0] / "reports" / "parity.json", "--format", kind, "--out", tmp_path / "again")
    assert (tmp_path / "again").read_text(encoding="utf-8") == printed
    names = {"md": "report.md", "html": "report.html", "junit": "parity.junit.xml"}
    if kind in names:
        assert (folders[0] / "reports" / names[kind]).read_text(encoding="utf-8") == printed
    if kind == "junit":
        JUnitXml.fromfile(str(tmp_path / "again"))


def test_report_of_the_console_is_the_default(folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    call(command, folders[0])
    assert capsys.readouterr().out.startswith("FAILED. ")
    call(command, folders[0], "--format", "md", "--link", "https://ci.example/1")
    assert "](https://ci.example/1)" in capsys.readouterr().out


def test_schema(capsys: pytest.CaptureFixture[str]) -> None:
    call(command, "--schema")
    assert json.loads(capsys.readouterr().out) == json_schema()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "name the folder of an export"),
        (("nowhere",), "cannot be read as a report"),
        (("DIR", "--link", "x"), "--link has no effect without --format md"),
        (("DIR", "--schema"), "leave out report"),
        (("--schema", "--format", "md"), "leave out format"),
        (("DIR", "--out", "DIR/reports/parity.json/x"), "cannot write"),
    ],
)
def test_usage(words: tuple[str, ...], message: str, folders: tuple[Path, Path]) -> None:
    with pytest.raises(UsageError, match=message):
        call(command, *(word.replace("DIR", str(folders[0])) for word in words))


def test_reading_what_was_altered(tmp_path: Path) -> None:
    path = tmp_path / "parity.json"
    content = json.loads(make_report().to_json())
    for change, message in (
        ({"schema_version": "99.0"}, "schema version 99.0"),
        ({"tool": "other"}, "is no report"),
        ({"pairs": 3}, "damaged or was altered: pairs"),
    ):
        path.write_text(json.dumps({**content, **change}))
        with pytest.raises(UsageError, match=message):
            read_report(path)
