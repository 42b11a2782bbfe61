"""Image folders: class/picture files, numbered as torchvision does; what is left out is said."""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from torchvision.datasets.folder import IMG_EXTENSIONS

from gplq.errors import DataError
from gplq.files import printable
from gplq.labels import is_text
from gplq.sources import SPLITS, Files, Found, fingerprint, open_shards, shards_of_split

_APPLE = "._"  # before the name of a file, for what macOS knows of it and another file system cannot hold


@dataclass
class _Walk:
    """What is below a folder.

    Attributes:
        pictures: folder -> the paths of its picture files, both in alphabetical order, as torchvision takes them.
        left_out: what is no picture that can be read, and why, in words.
    """

    pictures: dict[str, list[str]] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    @classmethod
    def below(cls, folder: str) -> "_Walk":
        walk = cls()
        walk._enter(folder, ())
        walk.pictures = dict(sorted(walk.pictures.items()))
        return walk

    def _enter(self, folder: str, above: tuple[tuple[int, int], ...]) -> None:
        try:
            status = Path(folder).stat()
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            self.left_out.append(f"cannot list the folder {printable(folder)}: {error.strerror}")
            return
        identity = (status.st_dev, status.st_ino)
        if identity in above:
            self.left_out.append(f"the link {printable(folder)} leads back to a folder that it is in")
            return
        self.pictures[folder] = []
        for entry in entries:
            if _is_folder(entry):
                self._enter(entry.path, (*above, identity))
            elif entry.name.lower().endswith(IMG_EXTENSIONS):
                if entry.name.startswith(_APPLE):
                    self.left_out.append(f"{printable(entry.path)} is what macOS notes of a picture, and no picture")
                else:
                    self.pictures[folder].append(entry.path)

    def __iter__(self) -> Iterator[str]:
        return (path for paths in self.pictures.values() for path in paths)


def open_folder(path: Path, split: str, need_labels: bool) -> Found:
    """A folder of class folders or of tar shards; or, without labels, of images at any depth.

    Raises:
        DataError: it is none, a class has no picture, or the name of a class cannot be written down.
        OSError: it cannot be read.
    """
    root = _split_folder(path, split)
    shards = sorted(root.glob("*.tar"))
    if shards:
        return open_shards(shards_of_split(shards, root, split), printable(root), need_labels)
    labels, classes = None, None
    if need_labels:
        paths, labels, classes, left_out = _classes(root)
    else:
        os.scandir(root).close()  # raises what _Walk would take for a folder among others
        walk = _Walk.below(str(root))
        paths, left_out = list(walk), walk.left_out
    if not paths:
        also = f" ({left_out[0]})" if left_out else ""
        raise DataError(f"{printable(root)} holds no images ({', '.join(IMG_EXTENSIONS)}){also}.{_hint(root)}")
    listing = hashlib.sha256()
    for name in paths:
        listing.update(f"{Path(name).relative_to(root)} {_size(name)}\n".encode(errors="surrogateescape"))
    pictures = Files(paths)
    return Found(
        pictures,
        labels,
        classes,
        printable(root),
        fingerprint(pictures, listing),
        orders_classes=True,
        left_out=tuple(left_out),
    )


def _classes(root: Path) -> tuple[list[str], list[int], list[str], list[str]]:
    """Paths and labels of the pictures in class folders, the names of the classes, and what is left out."""
    paths: list[str] = []
    labels: list[int] = []
    classes: list[str] = []
    left_out: list[str] = []
    for entry in sorted(os.scandir(root), key=lambda entry: entry.name):
        name, shown = entry.name, printable(entry.path)
        is_picture, gone = name.lower().endswith(IMG_EXTENSIONS), entry.is_symlink() and not _is_there(entry.path)
        if name.startswith(".") and not is_picture:  # of programs: .git, .ipynb_checkpoints
            continue
        if gone:
            left_out.append(f"{shown} is a link to {printable(Path(entry.path).readlink())}, which cannot be reached")
        elif is_picture and not _is_folder(entry):
            left_out.append(f"{shown} lies beside the folders of classes, and in none of them")
        if is_picture if gone else not _is_folder(entry):
            continue
        # A class that cannot be read keeps its number.
        walk = _Walk() if gone else _Walk.below(entry.path)
        found = list(walk)
        if not found and not walk.left_out and not gone:
            kinds = ", ".join(IMG_EXTENSIONS)
            raise DataError(f"{shown} is the folder of a class and holds no picture ({kinds}). Fill or remove it.")
        if not is_text(name):
            raise DataError(f"{shown}: the name of a class must be a line of text in UTF-8. Rename the folder.")
        classes.append(name)
        paths += found
        labels += [len(classes) - 1] * len(found)
        left_out += walk.left_out
    if not classes:
        loose = f" {left_out[0]}." if left_out else ""
        raise DataError(
            f"{printable(root)} is not an image folder: it has no folders of classes. Expected "
            f"{printable(root.name)}/<class>/<image files>.{loose}{_hint(root)}"
        )
    return paths, labels, classes, left_out


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link whose target cannot be asked
        return False


def _is_there(path: str) -> bool:
    try:
        return Path(path).exists()
    except OSError:
        return False


def _size(name: str) -> int:
    """In bytes; -1 of what cannot be asked, such as a link to nowhere: whether that is fatal is decided at its turn."""
    try:
        return Path(name).stat().st_size
    except OSError:
        return -1


def _hint(root: Path) -> str:
    foreign = any(next(root.glob(pattern), None) for pattern in ("*.arrow", "*.parquet", "dataset_*.json"))
    return f" It looks like a Hugging Face data set: write hf:{printable(root)}." if foreign else ""


def _split_folder(path: Path, split: str) -> Path:
    """``path`` itself, or its sub-folder for ``split`` if it is divided into splits."""
    divided = any((path / name).is_dir() for names in SPLITS.values() for name in names)
    if not divided:
        return path
    for name in SPLITS[split]:
        if (path / name).is_dir():
            return path / name
    raise DataError(f"{printable(path)} has no {split} images: expected a sub-folder {' or '.join(SPLITS[split])}.")
