"""Images from Hugging Face data sets: on disk, or drawn from a stream into a tar shard that is kept on disk.

How they are named, on the command line and in :func:`gplq.data.open_images`:

    hf:NAME_OR_FOLDER?option=value&option=value

    NAME_OR_FOLDER   a data set of the hub, a folder of save_to_disk, or a folder of files that load_dataset reads
    split            which split (default: train, or one of val, validation and test)
    image, label     columns, where there is more than one of the kind; any column of integers can be the label
    config, revision of a data set of the hub
    stream, seed     do not download the set: draw so many images at most, through a shuffle buffer with that seed (0)
"""

import hashlib
import json
import os
import re
import sys
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm import tqdm

from gplq.errors import DataError, MissingError
from gplq.files import atomic_path
from gplq.progress import progress
from gplq.sources import SPLITS, Found, Pictures, fingerprint, open_shards

PREFIX = "hf:"
# Of the shuffle buffer. It is filled from ten shards at once, whose row groups are in memory too: about 2 GB for images
# of 120 kB, however many are drawn.
_BUFFER_IMAGES = 1000


@dataclass(frozen=True)
class Request:
    """What stands behind ``hf:``."""

    name: str
    split: str | None = None
    image: str | None = None
    label: str | None = None
    config: str | None = None
    revision: str | None = None
    stream: int | None = None
    seed: int = 0

    @classmethod
    def parse(cls, text: str) -> "Request":
        """Inverse of the notation above.

        >>> Request.parse("hf:cifar100?label=fine_label&stream=5000").stream
        5000
        """
        name, _, query = text.removeprefix(PREFIX).partition("?")
        try:
            given = dict(parse_qsl(query, strict_parsing=True, max_num_fields=20)) if query else {}
        except ValueError as error:
            raise DataError(f"{text}: behind the question mark stands option=value&option=value.") from error
        known = [field.name for field in fields(cls)][1:]
        numbers = {}
        for option, value in given.items():
            if option not in known:
                raise DataError(f"{text}: there is no option '{option}'; the options are {', '.join(known)}.")
            if option in ("stream", "seed"):
                if not value.isdecimal() or (option == "stream" and int(value) == 0):
                    raise DataError(f"{text}: {option} takes a number, such as {option}=50000.")
                numbers[option] = int(value)
        if not name:
            raise DataError(f"{text} names no data set: write hf:NAME or hf:FOLDER.")
        return cls(str(Path(name).expanduser()), **{**given, **numbers})  # type: ignore[arg-type]  # checked above


class Rows(Pictures):
    """A column of encoded images; only the rows that are wanted are read from disk."""

    def __init__(self, dataset: Any, column: str, source: str) -> None:
        self.dataset, self.column, self.source = dataset, column, source

    def __len__(self) -> int:
        return len(self.dataset)

    def name(self, row: int) -> str:
        """Such as ``row 3 of hf:cifar10 (train)``."""
        return f"row {row} of {self.source}"

    def read(self, row: int) -> bytes:
        """The encoded bytes in the cell, or in the file that it names."""
        cell = self.dataset[row][self.column]
        if cell is None or (cell["bytes"] is None and cell["path"] is None):
            raise OSError("it has no image")
        content: bytes | None = cell["bytes"]
        return Path(cell["path"]).read_bytes() if content is None else content


@dataclass(frozen=True)
class _Columns:
    """Which columns hold what, and the class names if the data set knows them."""

    image: str
    label: str | None
    classes: list[str] | None


def open_dataset(text: str, split: str, need_labels: bool) -> Found:
    """Open one split of the data set that ``text`` names.

    Raises:
        DataError: there is no such data set, split or column, or columns are ambiguous.
        MissingError: the package ``datasets`` is not installed.
    """
    request = Request.parse(text)
    if request.stream is None:
        found = _open_rows(request, split, text, need_labels)
    else:
        found = _open_stream(request, split, text, need_labels)
    return found if need_labels else replace(found, labels=None, classes=None)


def _datasets(text: str) -> Any:
    """The package: it is optional, and takes a second to import."""
    try:
        import datasets
    except ImportError as error:
        raise MissingError(f"{text} needs the package datasets: pip install 'gplq[datasets]'") from error
    return datasets


def _load(datasets: Any, request: Request, split: str, text: str) -> tuple[Any, str]:
    """The data set, and the name of its split."""
    folder = Path(request.name)
    saved = any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))
    if saved and request.stream is not None:
        raise DataError(f"{text}: {folder} is a whole data set on this disk already; leave stream out.")
    try:
        if saved:
            found = datasets.load_from_disk(str(folder))
            if not isinstance(found, datasets.DatasetDict):
                return found, "whole"
            name = _choose(list(found), request, split, text)
            return found[name], name
        where = {"name": request.config, "revision": request.revision}
        splits = datasets.get_dataset_split_names(request.name, config_name=request.config, revision=request.revision)
        name = _choose(splits, request, split, text)
        return datasets.load_dataset(request.name, split=name, streaming=request.stream is not None, **where), name
    except DataError:
        raise
    except Exception as error:  # the package, its readers and its network clients have no common class of errors
        raise DataError(f"cannot open {text}: {_first_line(error)}") from error


def _choose(splits: list[str], request: Request, split: str, text: str) -> str:
    """The split to read; training images may be asked for as test images if there are no others."""
    wanted = SPLITS[split] if request.split is None else (request.split,)
    for name in wanted:
        if name in splits:
            return name
    if request.split is None and splits == ["train"]:
        return "train"
    raise DataError(
        f"{text} has no split {' or '.join(wanted)}; it has {', '.join(splits)}. Choose one with split=NAME behind a "
        "question mark."
    )


def _columns(datasets: Any, dataset: Any, request: Request, text: str, need_labels: bool) -> _Columns:
    features: Mapping[str, Any] = dataset.features or {}
    names = list(features or next(iter(dataset), {}))
    for option, column in (("image", request.image), ("label", request.label)):
        if column is not None and column not in names:
            raise DataError(f"{text} has no column '{column}' ({option}); its columns are {', '.join(names)}.")

    def only(kind: type, option: str) -> str:
        found = [name for name in names if isinstance(features.get(name), kind)]
        if len(found) == 1:
            return found[0]
        found_text = f"{len(found)} columns ({', '.join(found)})" if found else "no column"
        raise DataError(
            f"{text} has {found_text} of type {kind.__name__}; its columns are {', '.join(names)}. Choose one with "
            f"{option}=COLUMN behind a question mark."
        )

    image = request.image or only(datasets.Image, "image")
    label = request.label
    if label is None:
        try:
            label = only(datasets.ClassLabel, "label")
        except DataError:
            if need_labels:
                raise
            return _Columns(image, None, None)
    feature = features.get(label)
    return _Columns(image, label, list(feature.names) if isinstance(feature, datasets.ClassLabel) else None)


def _open_rows(request: Request, split: str, text: str, need_labels: bool) -> Found:
    datasets = _datasets(text)
    dataset, split = _load(datasets, request, split, text)
    columns, source = _columns(datasets, dataset, request, text, need_labels), f"{text} ({split})"
    if len(dataset) == 0:
        raise DataError(f"{source} holds no images.")
    listing = hashlib.sha256(f"{len(dataset)} {columns.image}".encode())
    for name, feature in dataset.features.items():
        if isinstance(feature, datasets.ClassLabel):
            listing.update(f"{name} {feature.names}".encode())
            listing.update(_integers(dataset, name, source).tobytes())
    labels = None if columns.label is None else _integers(dataset, columns.label, source).tolist()
    encoded = _encoded(datasets, dataset.select_columns([columns.image]), columns.image, source)
    pictures = Rows(encoded, columns.image, source)
    return Found(pictures, labels, columns.classes, source, fingerprint(pictures, listing))


def _integers(dataset: Any, column: str, source: str) -> "np.ndarray[Any, np.dtype[np.int64]]":
    """A column as numbers; -1 where it is empty, which no model has as a class."""
    import pyarrow

    cells = dataset.select_columns([column]).with_format("arrow")[:].column(0)
    if not pyarrow.types.is_integer(cells.type):
        raise DataError(f"{source}: labels must be integers; column '{column}' has {cells.type}.")
    numbers: np.ndarray[Any, np.dtype[np.int64]] = cells.cast("int64", safe=False).fill_null(-1).to_numpy()
    return numbers


def _encoded(datasets: Any, dataset: Any, column: str, source: str) -> Any:
    """The same data set with an image column that gives encoded bytes."""
    try:
        return dataset.cast_column(column, datasets.Image(decode=False))
    except Exception as error:  # pyarrow's and datasets' own
        raise DataError(f"{source}: column '{column}' holds no images: {_first_line(error)}") from error


def _open_stream(request: Request, split: str, text: str, need_labels: bool) -> Found:
    """Draw images into a tar shard in the user's cache, once; later calls find it there, and so see the same images."""
    source = f"{text} ({split})"
    identity = json.dumps([asdict(request), split, _local_files(Path(request.name))])
    name = f"{re.sub(r'[^a-zA-Z0-9]+', '-', request.name)[-60:]}-{split}-{request.stream}"
    shard = cache_folder() / f"{name}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}.tar"
    if shard.exists():
        tqdm.write(f"{source}: the images drawn earlier, in {shard}; delete it to draw anew", file=sys.stderr)
    else:
        datasets = _datasets(text)
        dataset, _ = _load(datasets, request, split, text)
        columns = _columns(datasets, dataset, request, text, need_labels)
        tqdm.write(f"{source}: drawing {request.stream} images into {shard}", file=sys.stderr)
        encoded = _encoded(datasets, dataset, columns.image, source)
        drawn = encoded.shuffle(seed=request.seed, buffer_size=_BUFFER_IMAGES).take(request.stream)
        with atomic_path(shard) as temporary, tarfile.open(temporary, "w") as tar:
            if columns.classes is not None:
                _add(tar, "classes.json", json.dumps(columns.classes).encode())
            with progress(request.stream or 0, source, "image") as bar:
                for index, (kind, image, label) in enumerate(_draw(drawn, columns, source)):
                    _add(tar, f"{index:09}{kind}", image)
                    if label is not None:
                        _add(tar, f"{index:09}.cls", str(label).encode())
                    bar.update()
    return replace(open_shards([shard], str(shard), need_labels), source=source)


def _draw(dataset: Any, columns: _Columns, source: str) -> Iterator[tuple[str, bytes, int | None]]:
    """Suffix, encoded image and label of each row."""
    import fsspec

    try:
        for row in dataset:
            cell = row[columns.image] or {"bytes": None, "path": None}
            content, path = cell["bytes"], cell["path"] or ""
            if content is None and path:
                with fsspec.open(path, "rb") as file:  # a file of the hub, or inside an archive
                    content = file.read()
            suffix = Path(path).suffix.lower()
            label = None
            if columns.label is not None:
                label = -1 if row[columns.label] is None else row[columns.label]
                if type(label) is not int:
                    raise DataError(f"{source}: labels must be integers; column '{columns.label}' has {label!r}.")
            yield suffix if suffix in IMG_EXTENSIONS else ".jpg", content or b"", label
    except DataError:
        raise
    except Exception as error:  # as in _load; an OSError of the network must not pass for one of the disk
        raise DataError(f"the stream of {source} broke off: {_first_line(error)}. Run again.") from error


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, BytesIO(content))
    tar.members.clear()  # type: ignore[attr-defined]  # typeshed lacks it; tarfile remembers every member: gigabytes for a large file


def _local_files(folder: Path) -> list[list[Any]]:
    """Names, sizes and times of a local set's files: if they change, what was drawn from them no longer counts."""
    files = sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else []
    return [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in files]


def cache_folder() -> Path:
    """Where drawn images are kept: ``$XDG_CACHE_HOME/gplq``, or ``~/.cache/gplq``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gplq"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
