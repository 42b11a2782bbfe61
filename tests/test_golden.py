"""The golden probe: silent on another machine's arithmetic, loud when images are prepared otherwise."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_arrays
from torch import nn

from gplq import golden
from gplq.checkpoint import Checkpoint, at_image_size, load_checkpoint
from gplq.data import open_images, open_test_images
from gplq.errors import DataError
from gplq.evaluate import top1
from gplq.integer import set_rounding
from gplq_export.check.capture import AnotherSummationOrder
from gplq_export.check.gates import read_thresholds

LIMIT = read_thresholds()["golden"]


GOLDEN = Path(__file__).resolve().parent / "golden"


def test_a_checkpoint_of_an_earlier_version_computes_what_it_did() -> None:
    """The committed one: its file format, its network and how its images are prepared. See golden/make.py."""
    earlier = load_checkpoint(GOLDEN / "model.pt")
    images = open_test_images(GOLDEN / "images.npz", earlier, limit=None)
    assert golden.difference(earlier.provenance["golden"], earlier.model, images) < LIMIT
    accuracy = top1(earlier.model, images, "golden")
    stored = earlier.provenance["top1"]["W4A4"]
    assert stored["percent"] > 95
    assert abs(accuracy.percent - stored["percent"]) < 1  # of 600: six flips


@pytest.fixture
def large_npz(tmp_path: Path) -> Path:
    """Test images that must be resized for the tiny ViT, [9, 24, 24], and changed copies of them beside it."""
    images = make_arrays(9, seed=3)[0].repeat(2, 1).repeat(2, 2)[:, 4:28, 4:28]
    np.savez(tmp_path / "large.npz", images=images)
    return tmp_path / "large.npz"


def test_a_checkpoint_carries_what_its_network_says_without_rounding(checkpoint: Checkpoint, npz_file: Path) -> None:
    stored = checkpoint.provenance["golden"]
    images = open_images(npz_file, "test", checkpoint.preprocessing)
    assert (stored["source"], stored["fingerprint"]) == (str(npz_file), images.fingerprint)
    assert (stored["rows"], stored["shape"]) == ([0, 8, 16, 24, 32, 40, 48, 56], [1, 16, 16])
    inputs = torch.stack([images[row][0] for row in stored["rows"]])
    with torch.inference_mode():
        rounded = checkpoint.model(inputs)
        set_rounding(checkpoint.model, rounding=False)
        smooth = checkpoint.model(inputs)
        set_rounding(checkpoint.model, rounding=True)
    torch.testing.assert_close(torch.tensor(stored["outputs"][0]), smooth, rtol=1e-5, atol=1e-6)
    assert (smooth - rounded).abs().max() > 1e-2
    assert golden.difference(stored, checkpoint.model, images) < 1e-6
    with torch.inference_mode():
        assert torch.equal(checkpoint.model(inputs), rounded)  # it rounds again


def test_another_order_of_summation_is_inside_the_limit(checkpoint: Checkpoint, npz_file: Path) -> None:
    images = open_images(npz_file, "test", checkpoint.preprocessing)
    with AnotherSummationOrder():
        found = golden.difference(checkpoint.provenance["golden"], checkpoint.model, images)
    assert isinstance(found, float)
    assert 1e-8 < found < LIMIT / 5


@pytest.mark.parametrize(
    "wrong",
    [
        {"mean": (0.501,)},
        {"std": (0.2505,)},
        {"interpolation": "bicubic"},
        {"interpolation": "nearest"},
        {"crop_pct": 0.9},
        {"crop_mode": "border", "crop_pct": 1.2},
    ],
    ids=str,
)
def test_images_prepared_otherwise_are_outside(checkpoint: Checkpoint, large_npz: Path, wrong: dict[str, Any]) -> None:
    right = checkpoint.preprocessing
    stored = golden.record(checkpoint.model, open_images(large_npz, "test", right, need_labels=False))
    same = golden.difference(stored, checkpoint.model, open_images(large_npz, "test", right, need_labels=False))
    images = open_images(large_npz, "test", replace(right, **wrong), need_labels=False)
    found = golden.difference(stored, checkpoint.model, images)
    assert isinstance(same, float)
    assert isinstance(found, float)
    assert same < 1e-6
    assert found > 10 * LIMIT


def test_another_pixel_or_weight_is_outside(checkpoint: Checkpoint, npz_file: Path) -> None:
    images = open_images(npz_file, "test", checkpoint.preprocessing)
    images.pictures.arrays = images.pictures.arrays.copy()  # type: ignore[attr-defined]
    images.pictures.arrays[8, 3, 3] ^= 16  # type: ignore[attr-defined]
    found = golden.difference(checkpoint.provenance["golden"], checkpoint.model, images)
    assert isinstance(found, float)
    assert found > LIMIT


def test_part_of_the_same_images_serves(checkpoint: Checkpoint, npz_file: Path) -> None:
    few = open_images(npz_file, "test", checkpoint.preprocessing).head(5)
    assert golden.difference(checkpoint.provenance["golden"], checkpoint.model, few) < 1e-6
    stored = golden.record(checkpoint.model, few)
    assert stored["rows"] == [0, 15, 31, 47, 63]
    assert golden.difference(stored, checkpoint.model, few.head(2)) < 1e-6


def test_what_cannot_be_compared_has_a_reason(
    checkpoint: Checkpoint, npz_file: Path, large_npz: Path, altered: Callable[..., Path]
) -> None:
    images = open_images(npz_file, "test", checkpoint.preprocessing)
    stored = checkpoint.provenance["golden"]

    def reason(known: Any, taken: Checkpoint = checkpoint) -> str:
        found = golden.difference(known, taken.model, open_images(npz_file, "test", taken.preprocessing))
        assert isinstance(found, str)
        return found

    older = load_checkpoint(altered(lambda content: content["provenance"].pop("golden")))
    assert "has no golden outputs" in reason(older.provenance.get("golden"))
    assert "they are of other images: quadrants.npz" in str(
        golden.difference(
            {**stored, "source": "quadrants.npz"},
            checkpoint.model,
            open_images(large_npz, "test", checkpoint.preprocessing, need_labels=False),
        )
    )
    assert "for images of [1, 16, 16], not [1, 24, 24]" in reason(stored, at_image_size(checkpoint, 24))
    for damage in (
        {"rows": [0, 1000]},
        {"rows": []},
        {"outputs": [[[0.0]] * 8]},
        {"outputs": [[[0.0], []]]},
        {"outputs": []},
        {"shape": "large"},
        {"outputs": [[[math.nan]]]},
    ):
        assert "damaged" in reason({**stored, **damage}), damage
    assert "damaged" in reason(["no", "mapping"])
    assert golden.difference(stored, checkpoint.model, images) < 1e-6


def test_images_that_cannot_be_read_are_passed_over_and_missed_later(
    checkpoint: Checkpoint, image_folder: Path
) -> None:
    paths = sorted((image_folder / "val").glob("*/*.png"))
    good = paths[0].read_bytes()
    paths[0].write_bytes(bytes(len(good)))
    stored = golden.record(checkpoint.model, open_images(image_folder, "test", checkpoint.preprocessing))
    assert stored["rows"] == list(range(1, 8))
    paths[0].write_bytes(good)
    images = open_images(image_folder, "test", checkpoint.preprocessing)
    damaged = {**stored, "fingerprint": images.fingerprint}
    assert golden.difference(damaged, checkpoint.model, images) < 1e-6
    paths[1].write_bytes(bytes(paths[1].stat().st_size))
    assert golden.difference(damaged, checkpoint.model, images) == math.inf
    for path in paths:
        path.write_bytes(b"")
    with pytest.raises(DataError, match="none of 8 images can be read"):
        golden.record(checkpoint.model, open_images(image_folder, "test", checkpoint.preprocessing))


class _Maps(nn.Module):
    """Feature maps of two sizes, and far too many numbers."""

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [x.expand(-1, 80, -1, -1) * torch.arange(1.0, 81)[:, None, None], x]


def test_large_outputs_become_means_that_fit_into_a_checkpoint(checkpoint: Checkpoint, npz_file: Path) -> None:
    images = open_images(npz_file, "test", checkpoint.preprocessing)
    stored = golden.record(_Maps(), images)
    assert [len(output[0]) for output in stored["outputs"]] == [500, 256]
    pixels = images[0][0].flatten()
    assert stored["outputs"][1][0] == pytest.approx(pixels.tolist(), rel=1e-6)
    assert sum(stored["outputs"][0][0]) / 500 == pytest.approx(40.5 * float(pixels.mean()), rel=1e-2)  # pieces overlap
    assert len(json.dumps(stored)) < 100_000
    assert golden.difference(stored, _Maps(), images) < 1e-6
    other = open_images(npz_file, "test", replace(checkpoint.preprocessing, mean=(0.501,)))
    assert golden.difference(stored, _Maps(), other) > 10 * LIMIT
