"""Image folders as people have them: what is read, what is named, what is skipped and counted."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import CLASSES
from PIL import Image
from test_data import GREY
from torchvision.datasets import ImageFolder

from gplq.data import ImageSet, batches, open_images
from gplq.errors import DataError

NOBODY = 65534


def write(path: Path, brightness: int = 100) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (16, 16), brightness).save(path)
    return path


@pytest.fixture
def folder() -> Iterator[Path]:
    """Two classes, where other users can read them: pytest's folders are private."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name) / "set"
        for kind in ("cat", "hen"):
            for number in range(3):
                write(root / kind / f"{number}.png")
        Path(name).chmod(0o755)
        yield root


@contextlib.contextmanager
def without_privileges() -> Iterator[None]:
    """Root may read everything; so be somebody else for a while."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


def read_all(root: Path, *, need_labels: bool = True) -> tuple[ImageSet, int]:
    """The set, and how many of its images can be read; what cannot is skipped."""
    images = open_images(root, "train", GREY, bad_images="skip", need_labels=need_labels)
    return images, sum(len(labels) for _, labels in batches(images, 4))


def refused(root: Path) -> str:
    """What ends the work if bad images are fatal."""
    with pytest.raises(DataError, match="--skip-bad-images") as caught:
        list(batches(open_images(root, "train", GREY), 4))
    return str(caught.value)


def test_the_order_is_torchvisions(folder: Path) -> None:
    for name in ("hen/b/2.png", "hen/a/1.JPG", "hen/a-b/1.png", "Zebra/1.webp", ".git/1.png", "cat/.x.png"):
        write(folder / name)
    (folder / "cat" / "notes.txt").touch()
    (folder / "link").symlink_to(folder / "hen" / "b")
    images = open_images(folder, "train", GREY)
    (folder / ".git" / "1.png").unlink()  # which torchvision would take for a class
    (folder / ".git").rmdir()
    theirs = ImageFolder(str(folder))
    assert images.classes == theirs.classes
    assert [(images.pictures.name(row), images.labels[row]) for row in range(len(images))] == theirs.samples


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("loose.png", "loose.png lies beside the folders of classes"),
        ("cat/._0.png", r"\._0.png is what macOS notes of a picture"),
    ],
)
def test_what_is_no_picture_of_a_class_is_named_or_counted(name: str, message: str, folder: Path) -> None:
    write(folder / name)
    assert refused(folder).find(name.split("/")[-1]) > 0
    with pytest.raises(DataError, match=message):
        open_images(folder, "train", GREY)
    images, count = read_all(folder)
    assert (count, images.left_out, images.to_dict()["skipped"]) == (6, 1, 1)


def test_links_to_nowhere(folder: Path) -> None:
    (folder / "cat" / "gone.png").symlink_to("/nowhere/x.png")
    assert "is a link to /nowhere/x.png, which is not there" in refused(folder)
    images, count = read_all(folder)
    assert (count, images.to_dict()["skipped"]) == (6, 1)


def test_a_class_that_is_a_link_to_nowhere_keeps_its_number(folder: Path) -> None:
    (folder / "dog").symlink_to("/nowhere/dog")
    assert "dog is a link to /nowhere/dog, which cannot be reached" in refused(folder)
    images, count = read_all(folder)
    assert (images.classes, count) == (["cat", "dog", "hen"], 6)
    assert set(images.labels) == {0, 2}


def test_links_in_a_circle(folder: Path) -> None:
    (folder / "cat" / "again").symlink_to(folder)
    (folder / "hen" / "self").symlink_to(folder / "hen" / "self")
    assert "leads back to a folder that it is in" in refused(folder)
    images, count = read_all(folder)
    assert count == 3 + 3 + 3  # cat/again/hen is read, cat/again/cat is where we come from
    assert images.left_out > 0


def test_files_and_folders_without_permission(folder: Path) -> None:
    read_all(folder)  # Pillow loads its plugins
    (folder / "cat" / "1.png").chmod(0)
    with without_privileges():
        assert "1.png: Permission denied" in refused(folder)
        images, count = read_all(folder)
        assert (count, images.to_dict()["skipped"]) == (5, 1)
    (folder / "hen").chmod(0)
    try:
        with without_privileges():
            assert "cannot list the folder" in refused(folder)
            for need_labels in (True, False):
                images, count = read_all(folder, need_labels=need_labels)
                assert (count, images.to_dict()["skipped"]) == (2, 2)
            assert read_all(folder)[0].classes == ["cat", "hen"]
    finally:
        (folder / "hen").chmod(0o755)


def test_a_folder_on_the_way_without_permission(folder: Path) -> None:
    for place in (folder, folder.parent):
        place.chmod(0)
        try:
            with without_privileges(), pytest.raises(DataError, match=r"cannot read .*: Permission denied"):
                open_images(folder, "train", GREY)
        finally:
            place.chmod(0o755)


def test_a_file_that_vanishes(folder: Path) -> None:
    images = open_images(folder, "train", GREY, bad_images="skip")
    (folder / "cat" / "0.png").unlink()
    assert sum(len(labels) for _, labels in batches(images, 4)) == 5
    assert images.to_dict()["skipped"] == 1


def test_names_that_are_no_utf_8(folder: Path) -> None:
    strange = os.fsencode(folder / "cat") + b"/k\xfcche.png"
    Path(os.fsdecode(strange)).write_bytes(b"")
    message = refused(folder)
    assert r"k\xfcche.png" in message
    message.encode()  # can be written to any report
    images, count = read_all(folder)
    assert (count, images.to_dict()["skipped"]) == (6, 1)
    Path(os.fsdecode(strange)).unlink()
    (folder / "cat").rename(os.fsdecode(os.fsencode(folder) + b"/k\xe4tzchen"))
    with pytest.raises(DataError, match=r"k\\xe4tzchen: the name of a class must be a line of text"):
        open_images(folder, "train", GREY)


def test_a_class_without_pictures(folder: Path) -> None:
    (folder / "dog").mkdir()
    for bad_images in ("fail", "skip"):
        with pytest.raises(DataError, match="dog is the folder of a class and holds no picture"):
            open_images(folder, "train", GREY, bad_images=bad_images)  # type: ignore[arg-type]  # one of the two
    assert len(open_images(folder, "train", GREY, need_labels=False)) == 6


def test_pictures_alone_are_no_classes(tmp_path: Path) -> None:
    write(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"no folders of classes\. .*a\.png lies beside"):
        open_images(tmp_path, "train", GREY)


def test_many_are_counted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(12):
        write(folder / f"{number}.png")
    assert read_all(folder)[0].left_out == 12
    err = capsys.readouterr().err
    assert err.count("lies beside") == 10
    assert f"skipped 12 files and folders of {folder}" in err


def test_classes_of_the_tests_are_what_they_were(image_folder: Path) -> None:
    assert open_images(image_folder, "test", GREY).classes == CLASSES
