"""Where images come from: npz files, files and tar shards. :func:`gplq.data.open_images` chooses among them.

Every source ends up as numbered pictures that can be read in any order, so that a training order is drawn once, and an
interrupted run goes on with exactly the images that were left.
"""

import hashlib
import json
import os
import re
import tarfile
from abc import ABC, abstractmethod
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS

from gplq.errors import DataError
from gplq.files import printable
from gplq.progress import progress

SPLITS = {"train": ("train",), "test": ("val", "validation", "test")}
# What the content may be, whatever a file is called: some of Pillow's other formats start external programs.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF", "GIF")
_NPZ_LIMIT_BYTES = 64 * 2**30  # a decompressed array above this is refused rather than tried
_LABEL_LIMIT_BYTES = 2**20  # of one .cls or .json file in a tar shard
_HASHED_PICTURES = 256


class Pictures(ABC):
    """Encoded images by number, read when they are wanted; small enough to be handed to worker processes."""

    in_memory = False

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def name(self, row: int) -> str:
        """What a message calls the picture."""

    @abstractmethod
    def read(self, row: int) -> bytes:
        """The encoded bytes. Raises OSError."""

    def open(self, row: int) -> Image.Image:
        """The picture, perhaps not yet decoded; a damaged one raises whatever Pillow raises, here or later."""
        return Image.open(BytesIO(self.read(row)), formats=FORMATS)


class Arrays(Pictures):
    """uint8 arrays [n, H, W] or [n, H, W, 3]."""

    in_memory = True

    def __init__(self, arrays: "np.ndarray[Any, np.dtype[np.uint8]]", source: Path) -> None:
        self.arrays, self.source = arrays, source

    def __len__(self) -> int:
        return len(self.arrays)

    def name(self, row: int) -> str:
        """Such as ``image 3 of set.npz``."""
        return f"image {row} of {self.source}"

    def read(self, row: int) -> bytes:
        """The pixels."""
        return bytes(self.arrays[row].tobytes())

    def open(self, row: int) -> Image.Image:
        """The array as an image."""
        return Image.fromarray(self.arrays[row])


class Files(Pictures):
    """Image files."""

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, row: int) -> str:
        """The path."""
        return printable(self.paths[row])

    def read(self, row: int) -> bytes:
        """The content of the file."""
        path = Path(self.paths[row])
        try:
            return path.read_bytes()
        except FileNotFoundError as error:
            if not path.is_symlink():
                raise
            raise FileNotFoundError(f"it is a link to {printable(path.readlink())}, which is not there") from error


class Members(Pictures):
    """Members of uncompressed tar files; member ``row`` is ``sizes[row]`` bytes at ``offsets[row]`` of its shard."""

    def __init__(self, shards: Sequence[Path]) -> None:
        self.shards = shards
        self.names: list[str] = []
        self.shard_of, self.offsets, self.sizes = array("q"), array("q"), array("q")

    def add(self, shard: int, member: tarfile.TarInfo) -> None:
        """Append a picture."""
        self.names.append(member.name)
        self.shard_of.append(shard)
        self.offsets.append(member.offset_data)
        self.sizes.append(member.size)

    def __len__(self) -> int:
        return len(self.names)

    def name(self, row: int) -> str:
        """Such as ``a/3.jpg in shard.tar``."""
        return printable(f"{self.names[row]} in {self.shards[self.shard_of[row]]}")

    def read(self, row: int) -> bytes:
        """The content of the member."""
        # Opened each time: a file that worker processes share has one position for all of them.
        with self.shards[self.shard_of[row]].open("rb") as file:
            file.seek(self.offsets[row])
            return file.read(self.sizes[row])


@dataclass(frozen=True)
class Found:
    """What a source holds.

    Attributes:
        pictures: the images.
        labels: one integer for each; None if they were not asked for.
        classes: class names in label order, if the source has names.
        source: where it is, for messages.
        orders_classes: the classes are in the order of their names, which the source does not state.
        fingerprint: identifies the images, whether or not their labels were asked for.
        left_out: what was found and is no picture that could be read, and why, in words.
    """

    pictures: Pictures
    labels: list[int] | None
    classes: list[str] | None
    source: str
    fingerprint: str
    orders_classes: bool = False
    left_out: tuple[str, ...] = ()


def fingerprint(pictures: Pictures, listing: "hashlib._Hash") -> str:
    """SHA-256 over a listing (names and sizes, say) and over the content of 256 pictures, evenly spread.

    Sizes notice nearly every change of a compressed image, and the sample a whole set that was processed again to the
    same sizes (uncompressed formats). A single image that is exchanged for one of the same name and size is not seen:
    that would take reading everything. Times of change are left out, as they differ between copies of the same data.
    """
    for row in np.linspace(0, len(pictures) - 1, min(_HASHED_PICTURES, len(pictures))).astype(int).tolist():
        try:
            listing.update(hashlib.sha256(pictures.read(row)).digest())
        except OSError as error:
            listing.update(f"unreadable: {error.errno}".encode())  # whether that is fatal is decided when it is used
    return listing.hexdigest()


def open_npz(path: Path, split: str, need_labels: bool) -> Found:
    """An npz file with ``<split>_images`` and ``<split>_labels``, or ``images`` and ``labels``."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            size = sum(info.file_size for info in arrays.zip.infolist())
            if size > _NPZ_LIMIT_BYTES:
                raise DataError(f"{path} decompresses to {size / 2**30:.0f} GiB; use an image folder instead.")
            names = [f"{split}_images", f"{split}_labels"]
            if names[0] not in arrays.files:
                names = ["images", "labels"]
            if any(name not in arrays.files for name in names[: 1 + need_labels]):
                expected = f"{split}_images and {split}_labels (or images and labels)"
                raise DataError(
                    f"{path} has no {split} images{' with labels' if names[0] in arrays.files else ''}: expected the "
                    f"arrays {expected}, found {', '.join(arrays.files) or 'none'}."
                )
            images = arrays[names[0]]
            labels = arrays[names[1]] if need_labels else None
    except (OSError, ValueError, EOFError, KeyError) as error:
        raise DataError(f"cannot read {path}: {error}. It must be an npz file without pickled objects.") from error
    except Exception as error:  # zipfile and zlib raise a family of types of their own for damaged files
        if isinstance(error, DataError):
            raise
        raise DataError(f"cannot read {path}: it is damaged ({error}).") from error
    good_shape = images.ndim == 3 or (images.ndim == 4 and images.shape[3] == 3)
    if images.dtype != np.uint8 or not good_shape:
        raise DataError(
            f"{path}: images must be uint8 [n, H, W] or [n, H, W, 3]; found {images.dtype} {list(images.shape)}."
        )
    if labels is not None and labels.shape != images.shape[:1]:
        raise DataError(f"{path}: {len(images)} images need as many labels; found an array {list(labels.shape)}.")
    if labels is not None and not np.issubdtype(labels.dtype, np.integer):
        raise DataError(f"{path}: labels must be integers; found {labels.dtype}.")
    if len(images) == 0:
        raise DataError(f"{path} holds no {split} images.")
    if images.max() <= 1:
        raise DataError(f"{path}: no pixel of the {split} images is above 1; black is 0 and white 255.")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    numbers = None if labels is None else labels.astype(np.int64).tolist()
    return Found(Arrays(images, path), numbers, None, str(path), f"{digest}/{names[0]}")


def shards_of_split(shards: list[Path], root: Path, split: str) -> list[Path]:
    """All shards of a folder; or those of ``split`` if their names tell, so that training and test images never mix."""
    words = {shard: set(re.findall("[a-z]+", shard.stem.lower())) for shard in shards}
    known = {name for names in SPLITS.values() for name in names}
    if not any(words[shard] & known for shard in shards):
        return shards
    chosen = [shard for shard in shards if words[shard].intersection(SPLITS[split])]
    if not chosen:
        raise DataError(f"{root} has no {split} shards: expected {' or '.join(SPLITS[split])} in a name (*.tar).")
    return chosen


def expand(pattern: str) -> list[Path]:
    """The files that a pattern names: numbers in braces, or the wildcards of a shell.

    >>> [str(path) for path in expand("a-{08..10}.tar")]
    ['a-08.tar', 'a-09.tar', 'a-10.tar']
    """
    braces = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if braces is not None:
        first, last = braces.groups()
        numbers = (str(number).zfill(len(first)) for number in range(int(first), int(last) + 1))
        return [
            path for number in numbers for path in expand(pattern[: braces.start()] + number + pattern[braces.end() :])
        ]
    path = Path(pattern)
    if path.exists() or not re.search(r"[*?\[]", pattern):
        return [path]
    return sorted(Path(path.anchor).glob(str(path.relative_to(path.anchor))))


def open_shards(shards: list[Path], source: str, need_labels: bool) -> Found:
    """WebDataset shards: tar files with ``key.jpg`` (or another image) and ``key.cls`` or ``key.json`` ("label").

    A member ``classes.json``, a list of names in label order, is optional. Shards are read through once for the places
    of their members; images are never unpacked to disk.
    """
    if not shards:
        raise DataError(f"{source} matches no file.")
    pictures, labels, classes = Members(shards), array("q"), None
    listing = hashlib.sha256()
    with progress(len(shards), f"index of {source}", "shard") as bar:
        for number, shard in enumerate(shards):
            listing.update(f"shard {number}\n".encode())
            samples, names = _index(shard, listing)
            classes = names or classes
            for key, sample in samples.items():
                if sample.image is None:
                    continue
                if need_labels:
                    labels.append(_label(sample, key, shard))
                pictures.add(number, sample.image)
            bar.update()
    if len(pictures) == 0:
        raise DataError(f"{source} holds no images: expected members such as 0001.jpg, 0001.cls.")
    numbers = labels.tolist() if need_labels else None
    return Found(pictures, numbers, classes, source, fingerprint(pictures, listing))


@dataclass
class _Sample:
    """The members of a tar file that share a key."""

    image: tarfile.TarInfo | None = None
    cls: bytes | None = None
    json: bytes | None = None


def _index(shard: Path, listing: "hashlib._Hash") -> tuple[dict[str, _Sample], list[str] | None]:
    """Samples of a shard by key, in its order; and the class names, if it has them."""
    samples: dict[str, _Sample] = {}
    classes = None
    try:
        with tarfile.open(shard, "r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # typeshed lacks it; tarfile remembers every member: gigabytes for a large file
                folder, name = os.path.split(member.name)
                if not member.isreg() or member.issparse() or name.startswith("."):
                    continue
                stem, _, kind = name.partition(".")  # a key ends at the first dot (WebDataset's rule)
                kind = kind.lower()
                listing.update(f"{member.name} {member.size}\n".encode(errors="surrogateescape"))
                content = None
                if kind in ("cls", "json"):
                    if member.size > _LABEL_LIMIT_BYTES:
                        raise DataError(f"{member.name} in {shard} has {member.size:,} bytes: that is no label.")
                    file = tar.extractfile(member)
                    assert file is not None  # it is a regular member
                    content = file.read()
                    listing.update(content)
                if member.name == "classes.json" and content is not None:
                    classes = _class_names(content, shard)
                    continue
                sample = samples.setdefault(os.path.join(folder, stem), _Sample())  # noqa: PTH118 - a name, not a path
                if kind == "cls":
                    sample.cls = content
                elif kind == "json":
                    sample.json = content
                elif f".{kind}" in IMG_EXTENSIONS:
                    if sample.image is not None:
                        raise DataError(
                            f"{shard} has two images of one key, {sample.image.name} and {member.name}: which one is "
                            "meant? Keep one image for each key."
                        )
                    sample.image = member
    except FileNotFoundError as error:
        raise DataError(f"{shard} does not exist.") from error
    except (OSError, tarfile.TarError, ValueError, EOFError) as error:
        reason = f"{error.strerror if isinstance(error, OSError) and error.strerror else error}"
        raise DataError(
            f"cannot read {shard}: {reason}. It must be a whole, uncompressed tar file (gunzip a .tar.gz first)."
        ) from error
    return samples, classes


def _label(sample: _Sample, key: str, shard: Path) -> int:
    label = None
    try:
        if sample.cls is not None:
            label = int(sample.cls)
        elif sample.json is not None:
            label = json.loads(sample.json)["label"]
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    if type(label) is int and abs(label) < 2**31:
        return label
    raise DataError(
        f'{key} in {shard} has no label: expected {key}.cls with an integer, or {key}.json with {{"label": integer}}.'
    )


def _class_names(content: bytes, shard: Path) -> list[str]:
    try:
        names = json.loads(content)
    except (ValueError, RecursionError):
        names = None
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise DataError(f"classes.json in {shard} must be a list of names in label order.")
    return names
