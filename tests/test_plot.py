"""The picture of a benchmark."""

from pathlib import Path
from xml.etree import ElementTree

import pytest
from PIL import Image

from gplq_export.plot import plot_ratios

RATIOS = {1: {"cpu": [0.5, 0.52, 0.49], "openvino": [0.7, 0.8, 0.75]}, 8: {"cpu": [0.4, 0.41, 0.42]}}


def test_svg_and_png_are_pictures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    svg, png = tmp_path / "new" / "ratios.svg", tmp_path / "new" / "ratios.png"
    plot_ratios(RATIOS, svg)
    plot_ratios(RATIOS, png)
    assert ElementTree.parse(svg).getroot().tag.endswith("svg")
    with Image.open(png) as image:
        assert image.format == "PNG"
        assert image.size[0] == 1080
    assert sorted(path.name for path in svg.parent.iterdir()) == ["ratios.png", "ratios.svg"]
