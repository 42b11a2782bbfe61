"""Tar shards, and folders without labels: what is read, and what every error says."""

import io
import json
import re
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from conftest import make_arrays
from PIL import Image

from gplq.data import batches, open_images
from gplq.errors import DataError
from gplq.preprocessing import Preprocessing
from gplq.sources import expand

GREY = Preprocessing((1, 16, 16), "bilinear", 1.0, "center", (0.5,), (0.25,))


def png(index: int) -> bytes:
    """Image ``index`` of a fixed set, encoded without loss."""
    file = io.BytesIO()
    Image.fromarray(make_arrays(16, seed=0)[0][index]).save(file, "PNG")
    return file.getvalue()


def write_tar(path: Path, members: dict[str, bytes], mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def samples(indices: Sequence[int]) -> dict[str, bytes]:
    """Image ``i`` with label ``i % 4``, alternately in both ways of writing a label."""
    members: dict[str, bytes] = {}
    for i in indices:
        members[f"part/{i:04}.png"] = png(i)
        if i % 2:
            members[f"part/{i:04}.cls"] = f"{i % 4}\n".encode()
        else:
            members[f"part/{i:04}.json"] = json.dumps({"label": i % 4, "caption": "no"}).encode()
    return members


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Three shards, images 0 … 8 in order."""
    for number in range(3):
        write_tar(tmp_path / "set" / f"s-{number:02}.tar", samples(range(3 * number, 3 * number + 3)))
    return tmp_path / "set"


def expected(index: int) -> torch.Tensor:
    return (torch.from_numpy(make_arrays(16, seed=0)[0][index]).float() / 255 - 0.5) / 0.25


@pytest.mark.parametrize("pattern", ["s-{00..02}.tar", "s-*.tar", "s-0[0-2].tar", ""])
def test_shards_are_read_in_any_order(pattern: str, shards: Path) -> None:
    images = open_images(shards / pattern, "train", GREY)
    assert list(images.labels) == [0, 1, 2, 3, 0, 1, 2, 3, 0]
    for index in (7, 0, 8, 3):
        torch.testing.assert_close(images[index][0][0], expected(index))


def test_worker_processes_read_the_same_batches_each_time(shards: Path) -> None:
    images = open_images(shards, "train", GREY)
    assert not images.pictures.in_memory  # one worker a thread, and tests have one thread
    order = [8, 1, 5, 0, 7]
    first, second = list(batches(images, 2, order)), list(batches(images, 2, order[2:]))
    assert torch.equal(first[1][0], second[0][0])
    assert torch.cat([labels for _, labels in first]).tolist() == [0, 1, 1, 0, 3]
    torch.testing.assert_close(first[2][0][0, 0], expected(7))


def test_one_shard_and_braces_name_what_they_say(shards: Path) -> None:
    assert len(open_images(shards / "s-01.tar", "test", GREY)) == 3
    assert [path.name for path in expand("x{9..11}-{0..1}.tar")] == [
        f"x{number}-{half}.tar" for number in (9, 10, 11) for half in (0, 1)
    ]


def test_folders_divide_shards(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "both").mkdir()
    shards.rename(tmp_path / "both" / "train")
    write_tar(tmp_path / "both" / "val" / "x.tar", samples([9]))
    assert [len(open_images(tmp_path / "both", split, GREY)) for split in ("train", "test")] == [9, 1]


def test_names_divide_shards(tmp_path: Path) -> None:
    write_tar(tmp_path / "imagenet-train-000.tar", samples([1, 2]))
    write_tar(tmp_path / "imagenet-validation-000.tar", samples([3]))
    assert [len(open_images(tmp_path, split, GREY)) for split in ("train", "test")] == [2, 1]
    (tmp_path / "imagenet-train-000.tar").unlink()
    with pytest.raises(DataError, match="no train shards"):
        open_images(tmp_path, "train", GREY)


def test_class_names_may_come_along(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {"classes.json": b'["x", "y", "z", "w"]', **samples([1])})
    images = open_images(path, "train", GREY)
    assert (images.classes, len(images)) == (["x", "y", "z", "w"], 1)


def test_labels_are_optional_if_they_are_not_needed(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {"a.png": png(0), "b.jpg": png(1), "b.cls": b"bird", "b.txt": b"a bird"})
    images = open_images(path, "train", GREY, need_labels=False)
    assert [images[index][1] for index in range(2)] == [-1, -1]
    torch.testing.assert_close(images[1][0][0], expected(1))


def test_fingerprint_is_about_content_and_not_about_need(shards: Path) -> None:
    with_labels, without = (open_images(shards, "train", GREY, need_labels=need) for need in (True, False))
    assert with_labels.fingerprint == without.fingerprint
    changes: list[Callable[[dict[str, bytes]], None]] = [
        lambda members: members.update({"part/0001.cls": b"2\n"}),  # another label of the same size
        lambda members: members.update({"part/0001.png": png(1)[:-20] + bytes(20)}),  # another image of the same size
        lambda members: members.update({"part/0009.png": png(9), "part/0009.cls": b"0"}),
    ]
    for change in changes:
        members = samples([0, 1, 2])
        change(members)
        write_tar(shards / "s-00.tar", members)
        assert open_images(shards, "train", GREY).fingerprint != with_labels.fingerprint


def test_what_is_no_sample_is_ignored(tmp_path: Path) -> None:
    members = {"README.md": b"x", "._a.png": b"resource fork", "a.seg.png": b"mask", "a.png": png(2), "a.cls": b"2"}
    path = write_tar(tmp_path / "a.tar", members)
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    images = open_images(path, "train", GREY)
    assert (len(images), images[0][1]) == (1, 2)


def bad_shards(folder: Path) -> dict[str, tuple[Callable[[], Path], str]]:
    good = samples(range(4))

    def truncated() -> Path:
        path = write_tar(folder / "cut.tar", good)
        path.write_bytes(path.read_bytes()[:2000])
        return path

    def text() -> Path:
        (folder / "text.tar").write_text("no tar file " * 100)
        return folder / "text.tar"

    def tar(**changes: bytes) -> Callable[[], Path]:
        return lambda: write_tar(folder / "x.tar", {**good, **{k.replace("_", "."): v for k, v in changes.items()}})

    return {
        "missing": (lambda: folder / "none.tar", r"none\.tar does not exist"),
        "missing-shard": (lambda: write_tar(folder / "s-0.tar", good).with_name("s-{0..1}.tar"), "s-1.tar does not"),
        "no-match": (lambda: folder / "s-*.tar", "matches no file"),
        "truncated": (truncated, "whole, uncompressed tar"),
        "text": (text, "whole, uncompressed tar"),
        "compressed": (lambda: write_tar(folder / "x.tar.gz", good, "w:gz"), "gunzip"),
        "empty": (lambda: write_tar(folder / "x.tar", {}), "holds no images"),
        "no-label": (tar(a_png=png(0)), "a in .* has no label: expected a.cls"),
        "text-label": (tar(a_png=png(0), a_cls=b"bird"), "has no label"),
        "no-json-label": (tar(a_png=png(0), a_json=b'{"class": 1}'), "has no label"),
        "json-list": (tar(a_png=png(0), a_json=b"[" * 100_000), "has no label"),
        "true-label": (tar(a_png=png(0), a_json=b'{"label": true}'), "has no label"),
        "large-label": (tar(a_png=png(0), a_cls=b"1" * (2**20 + 1)), "that is no label"),
        "many-digits": (tar(a_png=png(0), a_cls=b"1" * 10_000), "has no label"),
        "huge-label": (tar(a_png=png(0), a_cls=b"1" * 100), "has no label"),
        "two-images": (tar(a_png=png(0), a_jpg=png(0)), r"a\.png and a\.jpg"),
        "bad-classes": (tar(classes_json=b'{"a": 1}'), "must be a list of names"),
    }


@pytest.mark.parametrize("name", bad_shards(Path()))
def test_bad_shards_are_explained(name: str, tmp_path: Path) -> None:
    make, message = bad_shards(tmp_path)[name]
    path = make()
    with pytest.raises(DataError, match=message):
        open_images(path, "train", GREY)


def test_corrupt_member_is_named(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {"a.png": png(0)[:-40], "a.cls": b"0"})
    with pytest.raises(DataError, match=rf"cannot read a\.png in {re.escape(str(path))}"):
        list(batches(open_images(path, "train", GREY), 1))


def test_a_picture_that_would_start_a_program_is_refused(tmp_path: Path) -> None:
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EndComments\nshowpage\n"
    path = write_tar(tmp_path / "a.tar", {"a.png": postscript, "a.cls": b"0"})
    with pytest.raises(DataError, match="none of JPEG"):
        open_images(path, "train", GREY)[0]


def test_images_at_any_depth_serve_without_labels(image_folder: Path, tmp_path: Path) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    (flat / "notes.txt").write_text("x")
    for index in (2, 0, 1):
        (flat / f"{index}.PNG").write_bytes(png(index))
    images = open_images(flat, "train", GREY, need_labels=False)
    assert list(images.labels) == [-1, -1, -1]
    torch.testing.assert_close(images[2][0][0], expected(2))
    with pytest.raises(DataError, match="not an image folder"):
        open_images(flat, "train", GREY)

    by_class, loose = (open_images(image_folder, "train", GREY, need_labels=need) for need in (True, False))
    assert by_class.fingerprint == loose.fingerprint
    assert loose.classes is None
    (tmp_path / "void").mkdir()
    with pytest.raises(DataError, match="holds no images"):
        open_images(tmp_path / "void", "train", GREY, need_labels=False)
