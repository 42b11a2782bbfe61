"""npz files and image folders: what is read, and what every error says."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CLASSES, Quantised, make_arrays
from PIL import Image

from gplq.checkpoint import Checkpoint
from gplq.cli import main
from gplq.data import (
    ImageSet,
    batches,
    draw,
    open_images,
    open_test_images,
)
from gplq.errors import DataError
from gplq.evaluate import top1
from gplq.preprocessing import Preprocessing
from gplq.sources import Files

GREY = Preprocessing((1, 16, 16), "bilinear", 1.0, "center", (0.5,), (0.25,))
COLOUR = Preprocessing((3, 16, 16), "bilinear", 1.0, "center", (0.5, 0.4, 0.3), (0.25, 0.2, 0.1))


def write_npz(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def test_npz_pixels_arrive_normalised(npz_file: Path) -> None:
    images = open_images(npz_file, "test", GREY)
    pixels, labels = make_arrays(64, seed=2)
    assert len(images) == 64
    assert list(images.labels) == labels.tolist()
    expected = (pixels[5].astype(np.float64) / 255 - 0.5) / 0.25
    np.testing.assert_allclose(images[5][0].numpy()[0], expected, atol=1e-6)
    assert images[5][0].dtype == torch.float32


def test_grey_images_reach_a_colour_model_in_three_channels(npz_file: Path) -> None:
    tensor = open_images(npz_file, "train", COLOUR)[0][0]
    assert tensor.shape == (3, 16, 16)
    torch.testing.assert_close(tensor[0] * 0.25 + 0.5, tensor[2] * 0.1 + 0.3, rtol=0, atol=1e-6)


def test_pictures_for_a_model_of_other_channels_are_refused_before_any_is_read(npz_file: Path) -> None:
    satellite = Preprocessing((4, 16, 16), "bilinear", 1.0, "center", (0.5,) * 4, (0.25,) * 4)
    with pytest.raises(DataError, match=r"takes images of 4 channels, and pictures are read in grey .1. or RGB .3."):
        open_images(npz_file, "test", satellite)


def test_npz_with_one_split_serves_both(tmp_path: Path) -> None:
    pixels, labels = make_arrays(6, seed=0)
    colour = np.repeat(pixels[..., None], 3, axis=3)
    path = write_npz(tmp_path / "one.npz", images=colour, labels=labels.astype(np.uint8))
    train, test = (open_images(path, split, COLOUR) for split in ("train", "test"))
    assert train.fingerprint == test.fingerprint
    assert torch.equal(train[3][0], test[3][0])


def test_splits_of_a_file_have_fingerprints_of_their_own(npz_file: Path) -> None:
    assert open_images(npz_file, "train", GREY).fingerprint != open_images(npz_file, "test", GREY).fingerprint


@pytest.mark.parametrize("test_name", ["val", "validation", "test"])
def test_folder_splits_are_found(test_name: str, image_folder: Path) -> None:
    (image_folder / "val").rename(image_folder / test_name)
    train, test = (open_images(image_folder, split, GREY) for split in ("train", "test"))
    assert (len(train), len(test)) == (16, 8)
    assert train.classes == test.classes == CLASSES
    assert train[0][0].shape == (1, 16, 16)


def test_folder_and_npz_give_the_same_tensors(image_folder: Path, tmp_path: Path) -> None:
    folder = open_images(image_folder, "train", GREY)
    pixels = np.stack([np.asarray(Image.open(path)) for path in folder.pictures.paths])
    npz = open_images(write_npz(tmp_path / "same.npz", images=pixels, labels=np.array(folder.labels)), "train", GREY)
    assert all(torch.equal(folder[index][0], npz[index][0]) for index in range(len(folder)))
    assert list(folder.labels) == list(npz.labels)


def test_folder_without_splits_is_read_whole(image_folder: Path) -> None:
    assert len(open_images(image_folder / "val", "train", GREY)) == 8


def test_fingerprint_of_a_folder_follows_its_files(image_folder: Path) -> None:
    before = open_images(image_folder, "test", GREY)
    extra = image_folder / "val" / CLASSES[0] / "extra.png"
    Image.new("L", (16, 16)).save(extra)
    assert open_images(image_folder, "test", GREY).fingerprint != before.fingerprint


def write_text(path: Path) -> Path:
    path.write_text("no image")
    return path


def bad_inputs(folder: Path) -> dict[str, tuple[Callable[[], Path], str]]:
    pixels, labels = make_arrays(6, seed=0)
    empty = pixels[:0]

    def truncated() -> Path:
        path = write_npz(folder / "cut.npz", images=pixels, labels=labels)
        path.write_bytes(path.read_bytes()[:-200])
        return path

    def flipped() -> Path:
        path = write_npz(folder / "flip.npz", images=pixels, labels=labels)
        content = bytearray(path.read_bytes())
        content[500] ^= 0xFF  # within the pixels: the checksum does not hold
        path.write_bytes(content)
        return path

    def make_folder(name: str) -> Path:
        (folder / name).mkdir(parents=True)
        return folder / name

    def npz(**arrays: Any) -> Callable[[], Path]:
        return lambda: write_npz(folder / "bad.npz", **arrays)

    return {
        "missing": (lambda: folder / "none", "does not exist"),
        "other-file": (lambda: write_text(folder / "file.txt"), "neither a folder nor an .npz or .tar"),
        "text-as-npz": (lambda: write_text(folder / "text.npz"), r"cannot read .*text\.npz"),
        "truncated-npz": (truncated, r"cannot read .*cut\.npz"),
        "damaged-npz": (flipped, r"cannot read .*flip\.npz"),
        "empty-npz": (npz(), "no train images.*found none"),
        "other-arrays": (npz(x=pixels, y=labels), "no train images.*found x, y"),
        "no-labels": (npz(train_images=pixels), "no train images with labels"),
        "only-test": (npz(test_images=pixels, test_labels=labels), "no train images"),
        "no-images": (npz(images=empty, labels=labels[:0]), "holds no train images"),
        "float-images": (npz(images=pixels / 255.0, labels=labels), "uint8.*found float64"),
        "flat-images": (npz(images=pixels.reshape(6, -1), labels=labels), r"found uint8 \[6, 256\]"),
        "channels-first": (npz(images=np.zeros((6, 3, 16, 16), np.uint8), labels=labels), r"\[6, 3, 16, 16\]"),
        "labels-too-few": (
            npz(images=pixels, labels=labels[:5]),
            r"6 images need as many labels; found an array \[5\]",
        ),
        "one-hot-labels": (npz(images=pixels, labels=np.eye(6, dtype=int)), r"found an array \[6, 6\]"),
        "float-labels": (npz(images=pixels, labels=labels * 1.0), "labels must be integers; found float64"),
        "pickled-labels": (npz(images=pixels, labels=labels.astype(object)), "without pickled objects"),
        "empty-folder": (lambda: make_folder("void"), "is not an image folder"),
        "class-without-images": (lambda: make_folder("classes/cat").parent, "class and holds no picture"),
        "only-val-folder": (lambda: make_folder("split/val").parent, "no train images: expected a sub-folder train"),
    }


@pytest.mark.parametrize("name", bad_inputs(Path()))
def test_bad_input_is_explained(name: str, tmp_path: Path) -> None:
    make, message = bad_inputs(tmp_path)[name]
    path = make()
    with pytest.raises(DataError, match=message) as caught:
        open_images(path, "train", GREY)
    assert str(path) in str(caught.value)


def test_npz_without_labels_serves_if_they_are_not_needed(tmp_path: Path) -> None:
    pixels, _ = make_arrays(6, seed=0)
    images = open_images(write_npz(tmp_path / "x.npz", train_images=pixels), "train", GREY, need_labels=False)
    assert (len(images), images[2][1]) == (6, -1)
    labelled = write_npz(tmp_path / "y.npz", images=pixels, labels=np.eye(6))  # labels of any kind are not looked at
    assert open_images(labelled, "train", GREY, need_labels=False)[2][1] == -1


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\nbroken"])
def test_corrupt_image_is_named(content: bytes, image_folder: Path) -> None:
    images = open_images(image_folder, "train", GREY)
    path = Path(images.pictures.paths[3])
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"cannot read {path}: .*Repair or remove it"):
        images[3]
    with pytest.raises(DataError, match=str(path)):
        list(batches(images, 8))


def test_truncated_image_is_named(image_folder: Path) -> None:
    images = open_images(image_folder, "train", GREY)
    path = Path(images.pictures.paths[0])
    path.write_bytes(path.read_bytes()[:-60])
    with pytest.raises(DataError, match=str(path)):
        images[0]


def corrupt(images: ImageSet, indices: list[int]) -> list[str]:
    assert isinstance(images.pictures, Files)
    for index in indices:
        path = Path(images.pictures.paths[index])
        path.write_bytes(path.read_bytes()[:-60])
    return [images.pictures.paths[index] for index in indices]


def test_bad_images_are_skipped_if_that_is_wanted(image_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = open_images(image_folder, "train", GREY, bad_images="skip")
    whole = list(batches(images, 4))
    paths = corrupt(images, [1, 8, 9, 10, 11])
    for _ in range(2):  # reported once
        found = list(batches(images, 4))
        assert [len(labels) for _, labels in found] == [3, 4, 4]  # the third batch of four has no good image
        assert torch.equal(found[0][0], whole[0][0][[0, 2, 3]])
        assert torch.equal(found[2][1], whole[3][1])
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 5
    assert all(line.startswith(f"skipped: cannot read {path}: ") for line, path in zip(lines, paths, strict=True))
    assert images.skipped == {1, 8, 9, 10, 11}
    assert images.to_dict()["skipped"] == 5


def test_a_training_batch_is_never_empty(image_folder: Path) -> None:
    images = open_images(image_folder, "train", GREY, bad_images="skip")
    whole = [images[index] for index in range(16)]
    corrupt(images, [1, 14, 15, 0])
    found = list(batches(images, 2, [5, 1, 14, 15, 6, 7], never_empty=True))
    assert [len(labels) for _, labels in found] == [1, 1, 2]
    assert torch.equal(found[1][0][0], whole[2][0])  # behind 15 comes 0, and 2 is the first good one
    resumed = list(batches(images, 2, [14, 15, 6, 7], never_empty=True))
    assert torch.equal(resumed[0][0], found[1][0])


def test_many_bad_images_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for index in range(30):
        path = tmp_path / "a" / f"{index:02}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("L", (16, 16)).save(path)
    images = open_images(tmp_path, "train", GREY, bad_images="skip")
    corrupt(images, list(range(25)))
    few = images.head(29)
    list(batches(few, 8))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 11
    assert lines[-1] == f"skipped {len(few.skipped)} images of {tmp_path} so far"
    list(batches(few, 8))
    assert capsys.readouterr().err == ""


def test_a_set_without_any_good_image_is_an_error(image_folder: Path) -> None:
    images = open_images(image_folder, "test", GREY, bad_images="skip")
    corrupt(images, list(range(8)))
    for never_empty in (False, True):
        with pytest.raises(DataError, match="none of 8 images can be read"):
            list(batches(images, 4, never_empty=never_empty))


def test_accuracy_counts_what_could_be_read(image_folder: Path, checkpoint: Checkpoint) -> None:
    images = open_test_images(image_folder, checkpoint, None, "skip")
    corrupt(images, [2, 3])
    assert top1(checkpoint.model, images, "x", batch_size=2).n == 6


START = """
import multiprocessing, sys
from gplq.cli import main
if __name__ == "__main__":
    multiprocessing.set_start_method(sys.argv[1])
    sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize(
    "method", ["fork", *(pytest.param(name, marks=pytest.mark.slow) for name in ("spawn", "forkserver"))]
)
def test_corrupt_jpeg_in_a_worker_process_is_one_line(
    method: str, quantised: Quantised, image_folder: Path, tmp_path: Path
) -> None:
    victim = next((image_folder / "val").rglob("*.png")).with_suffix(".jpg")
    Image.fromarray(make_arrays(1, seed=0)[0][0]).save(victim)
    victim.write_bytes(victim.read_bytes()[:-100])
    script = tmp_path / "start.py"
    script.write_text(START)
    command = [sys.executable, str(script), method, "eval", str(quantised.path), "--data", str(image_folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(f"gplq: error: cannot read {victim}: ")
    assert done.stderr.count("\n") == 1


class Deadly(Files):
    """Pictures whose reader is killed, as by a machine without memory."""

    def read(self, row: int) -> bytes:
        os.kill(os.getpid(), signal.SIGKILL)
        return b""


def test_a_worker_process_that_dies_is_explained(image_folder: Path) -> None:
    images = open_images(image_folder, "train", GREY)
    images.pictures = Deadly(images.pictures.paths)  # type: ignore[attr-defined]
    with pytest.raises(DataError, match=r"a process that reads .* died"):
        list(batches(images, 4))


def test_commands_skip_bad_images_if_told(
    model_folder: Path, recipe_file: Path, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for split in ("train", "test"):
        corrupt(open_images(image_folder, split, GREY), [0, 3])
    out = tmp_path / "model.pt"
    common = [str(model_folder), "--data", str(image_folder), "--recipe", str(recipe_file), "--out", str(out)]
    assert main(["quantize", *common]) == 2
    assert "--skip-bad-images" in capsys.readouterr().err
    assert main(["quantize", *common, "--skip-bad-images"]) == 0
    captured = capsys.readouterr()
    assert captured.err.count("skipped: cannot read") == 4
    assert captured.out.count("(n = 6)") == 3
    provenance = torch.load(out, weights_only=True)["provenance"]
    assert [provenance[key]["skipped"] for key in ("train_data", "test_data")] == [2, 2]
    assert main(["eval", str(out), "--data", str(image_folder)]) == 2
    assert main(["eval", str(out), "--data", str(image_folder), "--skip-bad-images"]) == 0
    assert "(n = 6)" in capsys.readouterr().out


def test_help_names_every_kind_of_data(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("quantize", "eval"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        text = capsys.readouterr().out
        assert all(kind in text for kind in ("images.npz", "FOLDER", "shards-{0000..0009}.tar", "hf:NAME?stream="))
        assert max(map(len, text.split("data (")[1].splitlines())) <= 120


def test_folder_fingerprint_follows_content_of_the_same_size(image_folder: Path) -> None:
    before = open_images(image_folder, "train", GREY)
    assert isinstance(before.pictures, Files)
    path = Path(before.pictures.paths[7])
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)
    assert open_images(image_folder, "train", GREY).fingerprint != before.fingerprint
    content[-20] ^= 1
    path.write_bytes(content)
    os.utime(path, (0, 0))  # a copy of the same data has other times
    assert open_images(image_folder, "train", GREY).fingerprint == before.fingerprint


def test_test_images_have_the_labels_of_the_model(image_folder: Path, checkpoint: Checkpoint) -> None:
    images = open_test_images(str(image_folder), checkpoint, 3)
    assert len(images) == 3
    assert images.classes == checkpoint.label_names
    for path in (image_folder / "val" / CLASSES[0]).iterdir():
        path.unlink()
    (image_folder / "val" / CLASSES[0]).rmdir()
    (image_folder / "val" / CLASSES[1]).rename(image_folder / "val" / "unknown")
    with pytest.raises(DataError, match="3 classes, the model 4"):
        open_test_images(image_folder, checkpoint, None)


def test_head_is_spread_over_the_set(npz_file: Path) -> None:
    images = open_images(npz_file, "test", GREY)
    few = images.head(4)
    assert [few[index][1] for index in range(4)] == [images[index][1] for index in (0, 21, 42, 63)]
    assert torch.equal(few[3][0], images[63][0])
    assert few.fingerprint != images.fingerprint
    assert images.head(None) is images.head(64) is images


def test_draw_is_distinct_and_repeatable() -> None:
    drawn = draw(50, 20, seed=1)
    assert len(set(drawn)) == 20
    assert drawn == draw(50, 20, seed=1) != draw(50, 20, seed=2)
    assert sorted(draw(5, 20, seed=0)) == [0, 1, 2, 3, 4]


def test_batches_follow_the_indices(npz_file: Path) -> None:
    images = open_images(npz_file, "test", GREY)
    found = list(batches(images, 3, [9, 1, 5, 2]))
    assert [len(labels) for _, labels in found] == [3, 1]
    assert torch.equal(found[0][0][2], images[5][0])
    assert found[1][1].tolist() == [images.labels[2]]


@pytest.mark.parametrize(("dtype", "suffix"), [(np.uint16, "png"), (np.int32, "tif"), (np.float32, "tif")])
def test_pixels_of_more_than_8_bits_are_refused_or_skipped(dtype: Any, suffix: str, image_folder: Path) -> None:
    # Pillow would make them white or black: chance accuracy, and no word.
    wide = image_folder / "val" / CLASSES[0] / f"wide.{suffix}"
    Image.fromarray((np.arange(256).reshape(16, 16) * 200).astype(dtype)).save(wide)
    images = open_images(str(image_folder), "test", GREY)
    row = next(row for row in range(len(images)) if images.pictures.name(row) == str(wide))
    with pytest.raises(DataError, match=r"wide\..* has .*(16-bit|32-bit|floating).*convert it to 8 bits"):
        images[row]
    images = open_images(str(image_folder), "test", GREY, bad_images="skip")
    assert sum(len(labels) for _, labels in batches(images, 4)) == len(images) - 1
    assert images.skipped == {row}


def test_a_link_to_nowhere_is_a_bad_image(image_folder: Path) -> None:
    (image_folder / "val" / CLASSES[0] / "gone.png").symlink_to("/nowhere/x.png")
    images = open_images(str(image_folder), "test", GREY, bad_images="skip")
    assert sum(len(labels) for _, labels in batches(images, 4)) == len(images) - 1
