"""Hugging Face data sets: saved ones, files that load_dataset reads, and streams."""

import io
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from conftest import CLASSES, make_arrays
from PIL import Image

from gplq.data import batches, open_images
from gplq.errors import DataError, MissingError
from gplq.huggingface import Request, cache_folder
from gplq.labels import check_labels
from gplq.preprocessing import Preprocessing

GREY = Preprocessing((1, 16, 16), "bilinear", 1.0, "center", (0.5,), (0.25,))
IMAGE, LABEL = datasets.Image(), datasets.ClassLabel(names=CLASSES)


@pytest.fixture(autouse=True)
def caches(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing is written to the user's own folders."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "datasets")
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.1)  # seconds; the default is 5
    return folder


def make_set(count: int = 12, seed: int = 0, **columns: Any) -> datasets.Dataset:
    """Columns "img" and "kind"; others as given, (feature, values)."""
    pixels, labels = make_arrays(count, seed)
    content = {"img": [Image.fromarray(image) for image in pixels], "kind": labels.tolist()}
    features = {"img": IMAGE, "kind": LABEL}
    for name, (feature, values) in columns.items():
        content[name], features[name] = values, feature
    return datasets.Dataset.from_dict(content, features=datasets.Features(features))


def expected(index: int, seed: int = 0) -> torch.Tensor:
    return (torch.from_numpy(make_arrays(12, seed)[0][index]).float() / 255 - 0.5) / 0.25


@pytest.fixture
def parquet(tmp_path: Path) -> Path:
    """A folder as the hub has them: train and validation, 12 images each."""
    folder = tmp_path / "parquet"
    folder.mkdir()
    make_set(seed=0).to_parquet(folder / "train-00000-of-00001.parquet")
    make_set(seed=1).to_parquet(folder / "validation-00000-of-00001.parquet")
    return folder


def test_saved_set_is_read_in_any_order(tmp_path: Path) -> None:
    make_set().save_to_disk(tmp_path / "saved")
    images = open_images(f"hf:{tmp_path / 'saved'}", "train", GREY)
    assert images.classes == CLASSES
    assert list(images.labels) == make_arrays(12, 0)[1].tolist()
    for index in (7, 0, 11):
        torch.testing.assert_close(images[index][0][0], expected(index))
    read = list(batches(images, 4, [3, 9, 1, 2, 5]))  # in a worker process
    torch.testing.assert_close(read[1][0][0, 0], expected(5))


def test_saved_splits_are_found_and_can_be_chosen(tmp_path: Path) -> None:
    parts = {"train": make_set(6), "validation": make_set(4, seed=1), "odd": make_set(2, seed=2)}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    name = f"hf:{tmp_path / 'saved'}"
    assert [len(open_images(name, split, GREY)) for split in ("train", "test")] == [6, 4]
    assert [len(open_images(f"{name}?split=odd", split, GREY)) for split in ("train", "test")] == [2, 2]
    with pytest.raises(DataError, match="no split even; it has train, validation, odd"):
        open_images(f"{name}?split=even", "train", GREY)


def test_test_images_are_never_trained_on_by_accident(tmp_path: Path) -> None:
    datasets.DatasetDict({"validation": make_set(4)}).save_to_disk(tmp_path / "saved")
    with pytest.raises(DataError, match="no split train; it has validation"):
        open_images(f"hf:{tmp_path / 'saved'}", "train", GREY)


def test_folder_of_parquet_files(parquet: Path) -> None:
    train, test = (open_images(f"hf:{parquet}", split, GREY) for split in ("train", "test"))
    assert (len(train), len(test)) == (12, 12)
    torch.testing.assert_close(test[4][0][0], expected(4, seed=1))
    assert train.fingerprint != test.fingerprint == open_images(f"hf:{parquet}", "test", GREY).fingerprint
    check_labels(train, 5, ["none", *CLASSES])
    assert list(train.labels) == (make_arrays(12, 0)[1] + 1).tolist()


def test_parquet_of_other_programs_needs_names_of_columns(tmp_path: Path) -> None:
    files = []
    for pixels in make_arrays(12, 0)[0]:
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        files.append({"bytes": file.getvalue(), "path": None})
    (tmp_path / "plain").mkdir()
    plain = datasets.Dataset.from_dict({"photo": files, "number": list(range(12)), "text": ["x"] * 12})
    plain.to_parquet(tmp_path / "plain" / "a.parquet")
    name = f"hf:{tmp_path / 'plain'}"
    with pytest.raises(DataError, match="no column of type Image; its columns are photo, number, text"):
        open_images(name, "train", GREY)
    with pytest.raises(DataError, match="no column of type ClassLabel"):
        open_images(f"{name}?image=photo", "train", GREY)
    assert open_images(f"{name}?image=photo", "train", GREY, need_labels=False)[3][1] == -1
    for stream in ("", "&stream=12"):
        images = open_images(f"{name}?image=photo&label=number{stream}", "train", GREY)
        assert images.classes is None
        row = list(images.labels).index(5)
        torch.testing.assert_close(images[row][0][0], expected(5))
        with pytest.raises(DataError, match="labels must be integers; column 'text' has"):
            open_images(f"{name}?image=photo&label=text{stream}", "train", GREY)


def test_ambiguous_columns_are_named(tmp_path: Path) -> None:
    rows = make_set(coarse=(datasets.ClassLabel(names=["a", "b"]), [0, 1] * 6), mask=(IMAGE, make_set()["img"][:]))
    rows.save_to_disk(tmp_path / "saved")
    name = f"hf:{tmp_path / 'saved'}"
    with pytest.raises(DataError, match=r"2 columns \(img, mask\) of type Image.*image=COLUMN"):
        open_images(name, "train", GREY)
    with pytest.raises(DataError, match=r"2 columns \(kind, coarse\) of type ClassLabel.*label=COLUMN"):
        open_images(f"{name}?image=img", "train", GREY)
    assert open_images(f"{name}?image=img&label=coarse", "train", GREY).classes == ["a", "b"]
    with pytest.raises(DataError, match=r"no column 'fine' \(label\); its columns are img, kind, coarse, mask"):
        open_images(f"{name}?image=img&label=fine", "train", GREY)
    unlabelled = open_images(f"{name}?image=img", "train", GREY, need_labels=False)
    assert (unlabelled.classes, unlabelled[0][1]) == (None, -1)
    assert unlabelled.fingerprint == open_images(f"{name}?image=img&label=kind", "train", GREY).fingerprint


def test_fingerprint_follows_images_and_labels(tmp_path: Path) -> None:
    found = set()
    others = make_set()
    moved = others.map(lambda row: {"kind": (row["kind"] + 1) % 4})
    for index, rows in enumerate((others, moved, make_set(seed=3), make_set(11))):
        rows.save_to_disk(tmp_path / str(index))
        found.add(open_images(f"hf:{tmp_path / str(index)}", "train", GREY).fingerprint)
    assert len(found) == 4


def test_stream_is_drawn_once_and_kept(parquet: Path, caches: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = open_images(f"hf:{parquet}?stream=8", "train", GREY)
    assert "drawing 8 images into" in capsys.readouterr().err
    pixels, labels = make_arrays(12, 0)
    drawn = [next(i for i in range(12) if torch.allclose(image[0], expected(i))) for image, _ in first]
    assert len(set(drawn)) == 8
    assert drawn != sorted(drawn)
    assert list(first.labels) == [labels[index] for index in drawn]
    assert first.classes == CLASSES
    [kept] = cache_folder().iterdir()
    assert kept.is_relative_to(caches)

    content = kept.read_bytes()
    again = open_images(f"hf:{parquet}?stream=8", "train", GREY)
    assert f"the images drawn earlier, in {kept}" in capsys.readouterr().err
    assert again.fingerprint == first.fingerprint
    kept.unlink()
    open_images(f"hf:{parquet}?stream=8", "train", GREY)
    assert kept.read_bytes() == content  # the same seed draws the same bytes
    other = open_images(f"hf:{parquet}?stream=8&seed=1", "train", GREY)
    assert other.fingerprint != first.fingerprint
    unlabelled = open_images(f"hf:{parquet}?stream=8", "train", GREY, need_labels=False)
    assert (unlabelled.fingerprint, unlabelled[0][1]) == (first.fingerprint, -1)
    assert len(pixels) == len(open_images(f"hf:{parquet}?stream=99", "train", GREY)) == 12


def test_stream_is_drawn_anew_when_its_files_change(parquet: Path) -> None:
    before = open_images(f"hf:{parquet}?stream=8", "train", GREY)
    make_set(seed=5).to_parquet(parquet / "train-00000-of-00001.parquet")
    assert open_images(f"hf:{parquet}?stream=8", "train", GREY).fingerprint != before.fingerprint


def test_drawn_images_need_neither_network_nor_package(parquet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = open_images(f"hf:{parquet}?stream=8", "train", GREY)
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert open_images(f"hf:{parquet}?stream=8", "train", GREY).fingerprint == drawn.fingerprint
    with pytest.raises(MissingError):
        open_images(f"hf:{parquet}?stream=8", "test", GREY)


def test_images_drawn_from_an_only_split_are_known_to_be_the_same(parquet: Path) -> None:
    (parquet / "validation-00000-of-00001.parquet").unlink()
    for stream in ("", "?stream=8"):
        train, test = (open_images(f"hf:{parquet}{stream}", split, GREY) for split in ("train", "test"))
        assert train.fingerprint == test.fingerprint


def test_broken_stream_leaves_nothing(parquet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Breaks:
        def __init__(self, rows: Any) -> None:
            self.rows = rows

        def __iter__(self) -> Iterator[Any]:
            yield next(iter(self.rows))
            raise ConnectionResetError("peer went away")

    take = datasets.IterableDataset.take
    monkeypatch.setattr(datasets.IterableDataset, "take", lambda rows, count: Breaks(take(rows, count)))
    with pytest.raises(DataError, match=r"broke off: peer went away\. Run again"):
        open_images(f"hf:{parquet}?stream=8", "train", GREY)
    assert list(cache_folder().iterdir()) == []


def test_empty_cells_are_bad_images(tmp_path: Path) -> None:
    rows = make_set(3)
    holes = datasets.Dataset.from_dict({"img": [rows[0]["img"], None], "kind": [0, None]}, features=rows.features)
    holes.save_to_disk(tmp_path / "saved")
    images = open_images(f"hf:{tmp_path / 'saved'}", "train", GREY)
    assert list(images.labels) == [0, -1]
    with pytest.raises(DataError, match=r"cannot read row 1 of hf:.*it has no image"):
        images[1]
    with pytest.raises(DataError, match="labels -1"):
        check_labels(images, 4, CLASSES)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hf:", "names no data set"),
        ("hf:x?label", "option=value"),
        ("hf:x?lable=y", "no option 'lable'; the options are split, image, label"),
        ("hf:x?stream=many", "stream takes a number"),
        ("hf:x?stream=0", "stream takes a number"),
        ("hf:/no/such/folder", "cannot open hf:/no/such/folder"),
    ],
)
def test_mistakes_are_explained(text: str, message: str) -> None:
    with pytest.raises(DataError, match=re.escape(message)):
        open_images(text, "train", GREY)


def test_saved_set_is_not_streamed(tmp_path: Path) -> None:
    make_set(2).save_to_disk(tmp_path / "saved")
    with pytest.raises(DataError, match="leave stream out"):
        open_images(f"hf:{tmp_path / 'saved'}?stream=2", "train", GREY)


def test_folder_without_prefix_says_so(parquet: Path) -> None:
    with pytest.raises(DataError, match=f"write hf:{parquet}"):
        open_images(parquet, "train", GREY)


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingError, match=re.escape("pip install 'gplq[datasets]'")) as caught:
        open_images("hf:cifar10", "train", GREY)
    assert caught.value.exit_code == 3


def test_request_keeps_what_was_given() -> None:
    request = Request.parse("hf:org/name?config=c&revision=v1&split=a%2Bb&seed=7")
    assert (request.name, request.config, request.revision, request.split) == ("org/name", "c", "v1", "a+b")
    assert (request.seed, request.stream, request.image) == (7, None, None)
