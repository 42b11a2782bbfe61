"""The picture of a parity report."""

import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from PIL import Image

from gplq_export.parity import CodeCount, ParityReport
from gplq_export.plot import plot_layers


@pytest.fixture
def report() -> ParityReport:
    names = ["patch_embed.proj.input_quantizer", "blocks.0.attn.input_quantizer", "head.input_quantizer"]
    return ParityReport(
        forced_images=2,
        quantizers={name: CodeCount(0, 1000) for name in names},
        free={name: CodeCount(different, 1000) for name, different in zip(names, (0, 3, 40), strict=True)},
        sqnr_db={"blocks.0": 20.0},
    )


def test_svg_and_png_are_pictures(report: ParityReport, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    svg, png = tmp_path / "reports" / "layers.svg", tmp_path / "reports" / "layers.png"
    assert plot_layers(report, svg, png)
    assert ElementTree.parse(svg).getroot().tag.endswith("svg")
    with Image.open(png) as image:
        assert image.format == "PNG"
        assert image.size == (1080, 720)
    assert sorted(path.name for path in svg.parent.iterdir()) == ["layers.png", "layers.svg"]


def test_without_matplotlib_nothing_is_written(
    report: ParityReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert not plot_layers(report, tmp_path / "layers.svg")
    assert list(tmp_path.iterdir()) == []
