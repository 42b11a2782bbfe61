"""The page: valid, self-contained, small, and right to a browser."""

import base64
import json
import math
import os
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from justhtml import JustHTML
from PIL import Image
from reports_fixture import make_gates, make_hostile, make_report, without_labels

from gplq_export.check.report import Report
from gplq_export.reports.charts import Axis, Band, Series, bar, plot
from gplq_export.reports.html import html

BROWSER = next(filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "google-chrome"))), None)


def make_random(report: Report) -> Report:
    return report.model_copy(update={"data": report.data.model_copy(update={"random": True})})


def elements(page: str) -> list[Any]:
    """All elements, in order; the page must be free of errors."""
    document = JustHTML(page, strict=True, sanitize=False)
    return list(document.query("*"))


REPORTS = {
    "rich": make_report(),
    "without labels": without_labels(make_report()),
    "random": make_random(make_report()),
    "empty": make_report(pairs=0, gates=[], latency=[]),
    "hostile": make_hostile(make_report()),
}


@pytest.mark.parametrize("name", REPORTS)
def test_the_page_is_valid_and_self_contained(name: str) -> None:
    page = html(REPORTS[name])
    found = elements(page)
    names = Counter(element.name for element in found)
    assert not names.keys() & {"script", "link", "iframe", "object", "embed", "base", "form"}
    ids = [element.attrs["id"] for element in found if "id" in element.attrs]
    assert len(ids) == len(set(ids))
    for element in found:
        assert not [key for key in element.attrs if key.startswith("on") or key in ("xlink:href", "srcset")]
        if element.name == "a":
            assert element.attrs["href"].removeprefix("#") in ids
        if element.name == "img":
            content = base64.b64decode(element.attrs["src"].removeprefix("data:image/png;base64,"), validate=True)
            assert content.startswith(b"\x89PNG")
    assert "url(" not in page
    assert "@import" not in page


def test_strange_text_changes_no_structure() -> None:
    plain, strange = (elements(html(REPORTS[name])) for name in ("rich", "hostile"))
    assert [element.name for element in plain] == [element.name for element in strange]
    assert [sorted(element.attrs) for element in plain] == [sorted(element.attrs) for element in strange]
    assert "&lt;script&gt;alert(1)" in html(REPORTS["hostile"])


def test_everything_is_on_the_page() -> None:
    report = REPORTS["rich"]
    page = html(report)
    text = JustHTML(page, sanitize=False).to_text()
    for gate in report.gates:
        assert gate.id in text
        assert gate.sentence in text
        assert gate.why in text
    for layer in report.pairs[0].layers:
        assert layer.name in text
    for expected in (
        "FAILED",
        "Not checked: trt-int4.plan.",
        "not compared: no NVIDIA GPU on this machine",
        "4 outside the band, first blocks.2.attn.proj.input_quantizer",
        "quantisers, fed the reference's input: all",
        "different in blocks.1.mlp.fc1.input_quantizer (2)",
        "largest difference NaN of the range, in blocks.1.mlp.fc1",
        "T-shirt/top → Pullover: 2",
        "0.550 of fp32",
        "norms are cheap and need the range",
        "10.6 MB",
        "gplq-export check dist --data 'my images/val'",
        "model.int4.onnx aaaa from cccc",
        "a" * 64,
        "d" * 64,
        "resize to 80, bicubic",
        "activation_bits",
    ):
        assert expected in text, expected
    # Depth, outputs and pictures of three pairs, and the latency of two batches.
    names = Counter(element.attrs.get("class") for element in elements(page) if element.name == "svg")
    assert names["chart"] == 3 + 2
    assert names["chart square"] == 3
    assert sum(element.name == "img" for element in elements(page)) == 3 * 12


def test_no_attribute_of_a_chart_is_no_number() -> None:
    for element in elements(html(REPORTS["rich"])):
        for key in ("d", "x", "y", "cx", "cy", "width", "height"):
            assert not re.search("nan|inf", str(element.attrs.get(key)), re.IGNORECASE)


def test_random_numbers_are_stamped_on_every_section() -> None:
    found = elements(html(REPORTS["random"]))
    sections = sum(element.name in ("section", "header") for element in found)
    stamps = [element for element in found if element.attrs.get("class") == "stamp"]
    assert len(stamps) == sections >= 9
    assert all(stamp.parent.name in ("section", "header") for stamp in stamps)
    assert 'class="stamp"' not in html(REPORTS["rich"])


def test_what_is_no_picture_is_not_shown() -> None:
    report = make_report(pairs=1, flips=2)
    broken = [flip.model_copy(update={"picture": '\x00"><script>'}) for flip in report.pairs[0].flips]
    page = html(report.model_copy(update={"pairs": [report.pairs[0].model_copy(update={"flips": broken})]}))
    assert not [element for element in elements(page) if element.name in ("img", "script")]
    assert "val/Trouser/00001.png" in page


def test_two_megabytes_are_enough() -> None:
    report = make_report(layers=40, pairs=8, flips=200)
    picture = base64.b64encode(bytes(15_000)).decode()
    heavy = [
        pair.model_copy(update={"flips": [flip.model_copy(update={"picture": picture}) for flip in pair.flips]})
        for pair in report.pairs
    ]
    page = html(report.model_copy(update={"pairs": heavy, "gates": make_gates() * 30}))
    assert len(page.encode()) <= 2_000_000
    shown = page.count("<img ")
    assert shown == 1_000_000 // len(picture)
    assert page.count("val/") == 8 * 200  # what has no picture is named


@pytest.mark.skipif(BROWSER is None, reason="no Chromium in PATH (Debian: apt install chromium-headless-shell)")
@pytest.mark.parametrize("name", ["rich", "hostile"])
def test_a_browser_shows_it_without_complaint(name: str, tmp_path: Path) -> None:
    page, control = tmp_path / "report.html", tmp_path / "control.html"
    page.write_text(html(REPORTS[name]), encoding="utf-8")
    control.write_text('<!DOCTYPE html><title>x</title><img src="http://127.0.0.1:9/x.png"><script>x()</script>')
    complaints, requests, picture = look(page)
    assert complaints == []
    assert requests == []
    colours = picture.convert("RGB").getcolors(picture.width * picture.height)
    assert colours is not None
    assert len(colours) > 100
    assert max(count for count, _ in colours) < 0.95 * picture.width * picture.height
    # The instruments work: a page that does both is found out.
    complaints, requests, _ = look(control)
    assert complaints
    assert requests


def look(page: Path) -> tuple[list[str], list[str], Image.Image]:
    """What a browser says of a page, what it asks the network for, and what it shows."""
    assert BROWSER is not None
    log, shot = page.with_suffix(".net.json"), page.with_suffix(".png")
    done = subprocess.run(
        [
            BROWSER,
            "--headless",
            *["--no-sandbox"] * (os.name == "posix" and os.geteuid() == 0),
            "--disable-gpu",
            "--disable-background-networking",
            "--enable-logging=stderr",
            f"--log-net-log={log}",
            f"--user-data-dir={page.parent / 'profile'}",
            f"--screenshot={shot}",
            "--window-size=1200,2400",
            page.as_uri(),
        ],
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    )
    complaints = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    events = json.loads(log.read_text())["events"]
    urls = [str(event.get("params", {}).get("url", "")) for event in events]
    with Image.open(shot) as picture:
        picture.load()
    return complaints, [url for url in urls if url.startswith(("http", "ws"))], picture


# Charts


def coordinates(svg: str, kind: str) -> list[tuple[float, float]]:
    path = re.findall(rf'<path class="{kind}" d="([^"]*)"', svg)[0]  # before the legend's
    return [(float(x), float(y)) for x, y in re.findall(r"([\d.]+),([\d.]+)", path)]


def test_a_line_is_where_its_numbers_are() -> None:
    svg = plot("t", Axis("x"), Axis("y"), [Series("a", [(0, 0), (5, 50), (10, 100)])])
    (left, bottom), middle, (right, top) = coordinates(svg, "line s0")
    assert middle == ((left + right) / 2, (bottom + top) / 2)
    assert (right - left, bottom - top) == (440, 210)
    assert re.findall(r">([\d.]+)</text>", svg) == ["0", "2", "4", "6", "8", "10", "0", "20", "40", "60", "80", "100"]


def test_a_logarithmic_axis_has_no_zero() -> None:
    svg = plot("t", Axis("x"), Axis("y", log=True), [Series("a", [(0, 0.0), (1, 0.01), (2, 0.1), (3, 1.0)])])
    heights = [y for _, y in coordinates(svg, "line s0")]
    assert heights[0] == heights[1]  # at the bottom
    assert heights[1] - heights[2] == pytest.approx(heights[2] - heights[3])


def test_gaps_where_there_is_no_number() -> None:
    points = [(0.0, 1.0), (1.0, math.nan), (2.0, 3.0), (3.0, 4.0), (math.inf, 1.0), (4.0, -math.inf), (5.0, 1e308)]
    band = Band("b", [(0, 1, 2), (1, math.nan, 2), (2, 1, 2)])
    svg = plot("t", Axis("x"), Axis("y"), [Series("a", points, marks=[(1.0, math.nan, "x"), (2.0, 3.0, "y")])], band)
    path = re.findall(r'class="line s0" d="([^"]*)"', svg)[0]
    assert path.count("M") == 2
    assert len(coordinates(svg, "line s0")) == 3
    assert len(coordinates(svg, "band")) == 4
    assert svg.count("<circle") == 1


@pytest.mark.parametrize(
    "values",
    [[], [0.0], [3.0, 3.0], [-1e150, 1e150], [1e16, 1e16 + 2], [5e-324, 1.0], [math.nan], [-5.0, -4.0], [0.0, 0.0]],
)
@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("diagonal", [False, True])
def test_any_numbers_can_be_drawn(values: list[float], log: bool, diagonal: bool) -> None:
    points = list(zip(values, values, strict=True))
    svg = plot("t", Axis("x", log=log), Axis("y", log=log), [Series("a", points)], diagonal=diagonal)
    assert not JustHTML(svg, fragment=True, collect_errors=True).errors
    assert 2 < svg.count("<text") < 40
    assert not re.search("nan|inf", svg)


def test_bars() -> None:
    def width(value: float, most: float) -> float:
        return float(re.findall(r'class="fill s0" width="([\d.]+)"', bar(value, most))[0])

    values = [0, 5, 10, 20, -1, math.nan, math.inf, -math.inf]
    assert [width(value, 10) for value in values] == [0, 60, 120, 120, 0, 0, 120, 0]
    assert width(1, 0) == 0


def test_names_in_charts_are_escaped() -> None:
    name = "<script>\"'&"
    svg = plot(name, Axis(name), Axis(name), [Series(name, [(0, 0)], marks=[(0, 0, name)])], Band(name, [(0, 0, 1)]))
    assert "<script" not in svg
    assert svg.count("&lt;script&gt;") == 7
