"""parity.json, the console's lines, Markdown and JUnit: read by other people's readers."""

import json
import math
import os
import re
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from junitparser import Failure, JUnitXml, Skipped, TestCase, TestSuite
from markdown_it import MarkdownIt
from reports_fixture import make_gates, make_hostile, make_report, without_labels

from gplq_export.check.report import Gate, Pair, Report, json_schema, read_report
from gplq_export.reports import write_reports
from gplq_export.reports.console import console
from gplq_export.reports.junit import junit
from gplq_export.reports.markdown import MOST_BYTES, MOST_LINES, markdown
from gplq_export.reports.words import STAMP, Verdict, decibel, harmless, number, shorten, verdict


def make_random(**changes: Any) -> Report:
    report = make_report(**changes)
    return report.model_copy(update={"data": report.data.model_copy(update={"random": True})})


def passing() -> list[Gate]:
    return [gate for gate in make_gates() if gate.status != "failed"]


# parity.json


def refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


@pytest.mark.parametrize("report", [make_report(), without_labels(make_report()), make_hostile(make_report(layers=4))])
def test_json_is_valid_and_what_was_written_is_read(report: Report, tmp_path: Path) -> None:
    content = json.loads(report.to_json(), parse_constant=refuse)
    Draft202012Validator.check_schema(json_schema())
    Draft202012Validator(json_schema()).validate(content)
    paths = write_reports(report, tmp_path)
    assert [path.name for path in paths] == ["parity.json", "parity.junit.xml", "report.md", "report.html"]
    assert read_report(paths[0]).to_json() == report.to_json()


def test_the_schema_refuses_what_is_no_report() -> None:
    content = json.loads(make_report().to_json())
    content["gates"][0]["found"] = "a lot"
    assert not Draft202012Validator(json_schema()).is_valid(content)


def test_names_that_are_no_utf8_can_be_written(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9")
    report = make_report(command=["check", name], versions={name: name})
    report = report.model_copy(update={"pairs": [Pair(name=name, reference="", candidate="", file=name, skipped=name)]})
    for path in write_reports(report, tmp_path):
        assert "caf?" in path.read_text(encoding="utf-8")


def test_json_is_there_when_the_page_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(report: Report) -> str:
        raise RuntimeError

    monkeypatch.setattr("gplq_export.reports.html.html", fail)
    with pytest.raises(RuntimeError):
        write_reports(make_report(), tmp_path)
    assert read_report(tmp_path / "parity.json").pairs
    assert not (tmp_path / "report.html").exists()


# words


def test_numbers_in_words() -> None:
    values = [None, math.nan, math.inf, -math.inf, 0.0, 1234.5678, 0.00012, 1.5e9]
    assert [number(value) for value in values] == ["–", "NaN", "∞", "−∞", "0.00", "1,234.57", "1.2e-04", "1.5e+09"]
    assert number(0.123456789, None) == "0.123457"
    assert [decibel(value) for value in (None, 31.44, math.nan)] == ["equal", "31.4 dB", "NaN"]
    assert shorten("blocks.11.attn.qkv", 9) == "bloc….qkv"
    assert len(shorten("x" * 100, 60)) == 60


def test_the_verdict_names_the_cause_and_what_was_not_checked() -> None:
    found = verdict(make_report())
    assert found.word == "FAILED"
    assert "pair-0.forced.codes: 3 codes differ in blocks.3.attn.qkv." in found.sentences[1]
    assert found.sentences[2] == "Not checked: trt-int4.plan."
    assert found.sentences[3] == "Not judged: trt-int4.plan.agreement."
    assert verdict(make_report(gates=passing())).word == "PASSED"
    skipped = [gate for gate in make_gates() if gate.status in ("skipped", "reported")]
    assert verdict(make_report(gates=skipped)).word == "NOTHING CHECKED"


def test_the_verdict_names_what_few_images_left_open() -> None:
    few = [
        gate.model_copy(update={"metric": metric, "status": "reported", "limit": 1.0, "n": 8})
        for gate, metric in zip(make_gates() * 2, ("top1", "free.labels", "free.kl", "free.labels"), strict=False)
    ]
    closeness = few[0].model_copy(update={"metric": "closeness", "status": "skipped"})
    found = verdict(make_report(gates=[*passing(), *few, closeness], pairs=1))
    assert found.word == "PASSED"
    assert found.sentences[-1] == (
        "Not judged: trt-int4.plan.agreement, accuracy (n = 8), labels (n = 8), divergence (n = 8), closeness to the "
        "float model."
    )
    assert "  data.hash: " not in "\n".join(console(make_report()))


def test_a_check_of_nothing_says_so() -> None:
    assert verdict(make_report(gates=[], pairs=0)) == Verdict(
        "NOTHING CHECKED", ["0 gates.", "Not checked: trt-int4.plan."]
    )


def test_harmless_keeps_what_is_harmless() -> None:
    report = make_report()
    assert harmless(report).to_json() == report.to_json()
    spoilt = make_hostile(report).model_copy(update={"python": "3" * 5000})
    clean = harmless(spoilt)
    assert len(clean.python) == 1000
    assert not re.search("[\x00-\x1f\x7f-\x9f\u202e\ufffe]", json.dumps(clean.model_dump(), ensure_ascii=False))
    assert clean.pairs[0].flips[0].picture == report.pairs[0].flips[0].picture


# console


def test_console() -> None:
    lines = console(make_report())
    assert lines[0].startswith("FAILED. 7 gates: 3 passed, 2 failed, 1 skipped, 1 reported.")
    text = "\n".join(lines)
    assert "  trt-int4.plan  not compared: no NVIDIA GPU on this machine" in lines
    assert "same label 98.80 (98.00 to 99.30) %" in text
    assert "top-1 91.20 → 91.20 (89.30 to 92.80) %, 2 lost, 1 won" in text
    assert "outside their band: blocks.2.attn.proj.input_quantizer, blocks.4.mlp" in text
    gate = "  pair-0.forced.codes in blocks.3.attn.qkv: 3 codes differ in blocks.3.attn.qkv. (limit 99 %, n = 1,000)"
    assert gate in lines
    assert "  cpu   batch 1: median 11.00 ms, 0.550 x fp32: faster" in lines
    assert STAMP not in text


def test_console_is_plain_text() -> None:
    for line in console(make_hostile(make_report())):
        assert line.isprintable()


def test_many_failures_are_counted() -> None:
    failed = [make_gates()[1].model_copy(update={"id": f"pair-0.gate-{index}"}) for index in range(50)]
    lines = console(make_report(gates=failed))
    assert "  and 30 more, in parity.json" in lines
    assert sum(line.startswith("  pair-0.gate-") for line in lines) == 20


def test_without_labels_and_without_anything() -> None:
    for report in (without_labels(make_report()), make_report(pairs=0, gates=[], latency=[])):
        text = "\n".join(console(report))
        assert "top-1" not in text
        assert "same label" not in text
        assert markdown(report)
        assert junit(report)


# Markdown


def parse(text: str) -> list[Any]:
    """All tokens, those inside of lines included."""
    found = []
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        found += [token, *(token.children or [])]
    return found


def test_markdown() -> None:
    text = markdown(make_report(), "https://ci.example/run/1?a=(b)")
    tokens = parse(text)
    rows = sum(token.type == "tr_open" for token in tokens)
    assert rows == 1 + 4 + 1 + 6
    links = [token.attrs["href"] for token in tokens if token.type == "link_open"]
    assert links == ["https://ci.example/run/1?a=%28b%29"]
    items = [token for token in tokens if token.type == "list_item_open"]
    assert len(items) == 2
    assert text.startswith("## ❌ gplq parity: FAILED\n")
    assert markdown(make_report(gates=passing())).startswith("## ✅ gplq parity: PASSED\n")


def test_nothing_strange_becomes_markdown() -> None:
    report = make_report(layers=4, flips=0)
    plain, strange = (parse(markdown(each)) for each in (report, make_hostile(report)))
    kinds = [
        [token.type for token in tokens if token.type not in ("text", "code_inline", "text_special")]
        for tokens in (plain, strange)
    ]
    assert kinds[0] == kinds[1]
    assert not [token for token in strange if token.type in ("html_inline", "html_block", "image")]
    outside = "".join(token.content for token in strange if token.type.startswith("text"))
    assert "alert(1)" in outside
    assert not re.search(r"@\w|#\d|://", outside)


def test_markdown_is_short_whatever_was_found() -> None:
    gate, pair = make_gates()[1], make_report(pairs=1).pairs[0]
    gates = [gate.model_copy(update={"id": f"{gate.id}.{n}", "sentence": "*A* long story. " * 200}) for n in range(300)]
    pairs: list[Pair] = [pair.model_copy(update={"name": f"pair-{n}" * 20}) for n in range(50)]
    report = make_report().model_copy(update={"gates": gates, "pairs": pairs, "latency": make_report().latency * 20})
    for each in (report, make_hostile(report), make_report()):
        text = markdown(each)
        assert text.count("\n") < MOST_LINES
        assert len(text.encode()) < MOST_BYTES
    assert "And 290 more" in markdown(report) or "And 294 more" in markdown(report)


# JUnit


def suites(report: Report) -> tuple[TestSuite, list[TestCase]]:
    (suite,) = JUnitXml.fromstring(junit(report).encode())
    return suite, list(suite)


def test_junit_is_read_by_a_real_parser() -> None:
    report = make_report()
    suite, cases = suites(report)
    assert (suite.tests, suite.failures, suite.errors, suite.skipped) == (8, 2, 0, 2)
    assert [case.name for case in cases] == [*(gate.id for gate in report.gates), "trt-int4.plan.compared"]
    outcomes = [type(case.result[0]) if case.result else None for case in cases]
    assert outcomes == [None, Failure, None, Failure, None, Skipped, None, Skipped]
    assert cases[1].classname == "parity.pair-0"
    assert cases[1].result[0].message == "3 codes differ in blocks.3.attn.qkv."
    assert "layer: blocks.3.attn.qkv" in cases[1].result[0].text
    assert "found NaN (NaN to NaN) %, limit 99 %, n = 1,000" in cases[3].result[0].text
    assert cases[5].result[0].message == "no NVIDIA GPU on this machine"
    assert str(cases[4].system_out).startswith("reported, not judged: n < 500")
    properties = {each.name: each.value for each in suite.properties()}
    assert properties["version.torch"] == "2.15.0"
    assert properties["file.model.int4.onnx.sha256"] == "a" * 64
    assert properties["command"] == "gplq-export check dist --data 'my images/val'"


def test_junit_holds_any_text() -> None:
    _, cases = suites(make_hostile(make_report()))
    assert "</td></script><script>alert(1)" in cases[1].result[0].message
    assert len(cases) == 8


# random numbers


def test_random_numbers_are_stamped_on_everything() -> None:
    report = make_random()
    lines = console(report)
    assert f"warning: {STAMP}" in lines
    assert [line for line in lines if line and not line.startswith(" ")][-4:] == [
        f"{title} (random numbers, not images)"
        for title in ("pairs", "not judged", "failed gates, the cause first", "latency")
    ]
    assert markdown(report).count("andom numbers, not images") == 3
    suite, _ = suites(report)
    assert "random" in suite.name
    assert {each.name: each.value for each in suite.properties()}["data.random"] == "true"
    assert STAMP in junit(report)
