"""Images and labels, through timm's own evaluation transform; how they are named, opened, checked and batched.

What ``--data`` takes, for training images (to quantise with) and test images (to measure with):

    FILE.npz     train_images, train_labels, test_images, test_labels; or only images, labels
                 images: uint8 [n, H, W] or [n, H, W, 3]; labels: integers [n]
    FOLDER/      class/image files; or train/class/… and val/class/… (or validation/, test/); or the same with *.tar
    SHARDS.tar   WebDataset; also shards-{0000..0009}.tar and 'shards-*.tar'
    hf:NAME      a Hugging Face data set, see :mod:`gplq.huggingface`
"""

import copy
import hashlib
import itertools
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from PIL import UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from tqdm import tqdm

from gplq.errors import DataError
from gplq.files import printable
from gplq.folders import open_folder
from gplq.huggingface import PREFIX, open_dataset
from gplq.labels import check_labels
from gplq.pixels import as_mode
from gplq.preprocessing import Preprocessing
from gplq.sources import FORMATS, Found, expand, open_npz, open_shards

if TYPE_CHECKING:
    from gplq.checkpoint import Checkpoint

BadImages = Literal["fail", "skip"]
_NAMED_BAD_IMAGES = 10  # so many are reported one by one
_BAD = "Repair or remove it and run again; gplq quantize and gplq eval can go on with --skip-bad-images."


class ImageSet(Dataset[tuple[Tensor, int]]):
    """Images with labels; yields (float32 [C, H, W], label). Without labels, every label is -1.

    Attributes:
        labels: one for each image.
        classes: class names in label order, or None.
        orders_classes: the order is that of the names, and not one that the source states.
        source: where the images come from, for messages.
        fingerprint: SHA-256 of what identifies the images: :func:`gplq.sources.fingerprint`, or all of an npz file.
        source_fingerprint: that of the whole source, also of a set that :meth:`head` made.
        bad_images: whether :func:`batches` fails at an image that cannot be read, or skips it.
        skipped: the numbers of the images that were skipped so far.
        left_out: how many files and folders could not be taken for images, or not be read.

    Raises:
        DataError: there are such, and bad images are fatal.
    """

    def __init__(self, found: Found, preprocessing: Preprocessing, bad_images: BadImages = "fail") -> None:
        self.pictures, self.classes, self.source = found.pictures, found.classes, found.source
        self.orders_classes = found.orders_classes
        self.fingerprint = self.source_fingerprint = found.fingerprint
        self.bad_images = bad_images
        self.rows: Sequence[int] = range(len(found.pictures))
        self.labels = [-1] * len(found.pictures) if found.labels is None else found.labels
        self.skipped: set[int] = set()
        self.left_out = len(found.left_out)
        self._mode, self._transform = preprocessing.image_mode, preprocessing.transform()

        for number, reason in enumerate(found.left_out):
            if bad_images == "fail":
                more = f" (and {self.left_out - 1} more)" if self.left_out > 1 else ""
                raise DataError(f"{reason}{more}. {_BAD}")
            if number < _NAMED_BAD_IMAGES:
                tqdm.write(f"skipped: {reason}", file=sys.stderr)
        if self.left_out > _NAMED_BAD_IMAGES:
            tqdm.write(f"skipped {self.left_out} files and folders of {self.source}", file=sys.stderr)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        item = self.read(index)
        if isinstance(item, BadImage):
            raise item.error()
        return item

    def read(self, index: int) -> "tuple[Tensor, int] | BadImage":
        """An item, or why there is none."""
        tensor = self.read_row(self.rows[index])
        return tensor if isinstance(tensor, BadImage) else (tensor, int(self.labels[index]))

    def read_row(self, row: int) -> "Tensor | BadImage":
        """An image, float32 [C, H, W], by its number in the whole source."""
        try:
            # What Pillow warns of (odd transparency, damaged notes on the camera) does not change the pixels.
            with warnings.catch_warnings(action="ignore"), self.pictures.open(row) as image:
                tensor: Tensor = self._transform(as_mode(image, self._mode))
        except UnidentifiedImageError:  # its text names a Python object
            return BadImage(row, f"cannot read {self.pictures.name(row)}: it is none of {', '.join(FORMATS)}")
        except Exception as error:  # Pillow's decoders raise nearly every type there is for damaged files
            reason = getattr(error, "strerror", None) or error  # without the number and the name, which is there
            return BadImage(row, f"cannot read {self.pictures.name(row)}: {reason}")
        return tensor

    def to_dict(self) -> dict[str, Any]:
        """What provenance records; plain data."""
        record = {"path": self.source, "sha256": self.fingerprint, "images": len(self)}
        skipped = len(self.skipped) + self.left_out
        return {**record, "skipped": skipped} if skipped else record

    def head(self, count: int | None) -> "ImageSet":
        """The first ``count`` images, evenly spread over the set so that all classes are met."""
        if count is None or count >= len(self):
            return self
        chosen = np.linspace(0, len(self) - 1, count).astype(int).tolist()
        few = copy.copy(self)
        few.rows = [self.rows[i] for i in chosen]
        few.labels = [self.labels[i] for i in chosen]
        few.fingerprint = hashlib.sha256(f"{self.fingerprint} {chosen}".encode()).hexdigest()
        return few

    def skip(self, bad: "BadImage") -> None:
        """Note an image that cannot be read, and report it the first time; or fail, as ``bad_images`` wants it.

        Raises:
            DataError: bad images are fatal.
        """
        if self.bad_images == "fail":
            raise bad.error()
        if bad.row in self.skipped:
            return
        self.skipped.add(bad.row)
        if len(self.skipped) <= _NAMED_BAD_IMAGES:
            tqdm.write(f"skipped: {bad.reason}", file=sys.stderr)


@dataclass(frozen=True)
class BadImage:
    """An image that cannot be read: its number in the source, and which and why in words."""

    row: int
    reason: str

    def error(self) -> DataError:
        """What to raise if that is fatal."""
        return DataError(f"{self.reason}. {_BAD}")


class _Batches(Dataset["_Batch"]):
    """An ImageSet by batches, with bad images as values: out of a worker process, an exception comes as a traceback."""

    def __init__(self, images: ImageSet, never_empty: bool) -> None:
        self.images, self.never_empty = images, never_empty

    def __getitems__(self, indices: list[int]) -> "_Batch":
        items = [self.images.read(index) for index in indices]
        bad = [item for item in items if isinstance(item, BadImage)]
        good = [item for item in items if not isinstance(item, BadImage)]
        if self.never_empty and self.images.bad_images == "skip":
            following = itertools.chain(range(indices[-1] + 1, len(self.images)), range(indices[-1]))
            while not good and (index := next(following, None)) is not None:
                good = [item for item in [self.images.read(index)] if not isinstance(item, BadImage)]
        return (default_collate(good) if good else None), bad


_Batch = tuple[list[Tensor] | None, list[BadImage]]


def draw(total: int, count: int, seed: int) -> list[int]:
    """``count`` distinct indices below ``total`` (all, if there are fewer), drawn with a seed of their own."""
    order: list[int] = torch.randperm(total, generator=torch.Generator().manual_seed(seed)).tolist()
    return order[:count]


def open_images(
    data: str | Path,
    split: str,
    preprocessing: Preprocessing,
    *,
    need_labels: bool = True,
    bad_images: BadImages = "fail",
) -> ImageSet:
    """Open one split, "train" or "test", of what ``data`` names.

    Args:
        data: see the top of this module.
        split: "train" or "test".
        preprocessing: the model's.
        need_labels: if not, labels are neither needed nor looked at, and all labels are -1; a folder may then hold its
            images in any way.
        bad_images: whether an image that cannot be read ends the work or is left out.

    Raises:
        DataError: nothing is there, it is none of these layouts, it is empty, or it lacks the split or labels; or the
            model takes images of other channels than pictures have.
        MissingError: a package is needed to read it and not installed.
    """
    channels = preprocessing.input_size[0]
    if channels not in (1, 3):
        raise DataError(
            f"the model takes images of {channels} channels, and pictures are read in grey (1) or RGB (3): "
            f"{printable(str(data))} cannot be used. In Python, gplq.calibrate and gplq.stage2 take tensors."
        )
    return ImageSet(_find(str(data), split, need_labels), preprocessing, bad_images)


def fingerprint(data: str, split: str) -> str:
    """What :class:`ImageSet` calls so, of one split of what ``data`` names; :func:`open_images` for what it raises."""
    return _find(data, split, need_labels=False).fingerprint


def _find(data: str, split: str, need_labels: bool) -> Found:
    if data.startswith(PREFIX):
        return open_dataset(data, split, need_labels)
    path, shown = Path(data), printable(data)
    expected = "--data takes an npz file, a folder of images, tar files or hf:NAME."
    try:
        if path.is_dir():
            return open_folder(path, split, need_labels)
        if data.endswith((".tar", ".tar.gz", ".tgz")):
            return open_shards(expand(data), shown, need_labels)
        if not path.exists():
            raise DataError(f"{shown} does not exist. {expected}")
        if path.suffix == ".npz":
            return open_npz(path, split, need_labels)
    except OSError as error:  # a folder on the way that may not be entered, a link that leads in a circle
        raise DataError(f"cannot read {printable(error.filename or data)}: {error.strerror or error}.") from error
    raise DataError(f"{shown} is neither a folder nor an .npz or .tar file. {expected}")


def open_test_images(
    data: str | Path,
    checkpoint: "Checkpoint",
    limit: int | None,
    bad_images: BadImages = "fail",
    *,
    need_labels: bool = True,
) -> ImageSet:
    """At most ``limit`` test images of ``data``, evenly spread, with the labels of a checkpoint's model if needed.

    Raises:
        DataError: see :func:`open_images` and :func:`gplq.labels.check_labels`.
    """
    images = open_images(data, "test", checkpoint.preprocessing, need_labels=need_labels, bad_images=bad_images)
    if need_labels:
        # Before there was a --class-order, every folder was in alphabetical order.
        old = "class_order" not in checkpoint.provenance.get("arguments", {})
        assumed = check_labels(images, checkpoint.spec.num_classes, checkpoint.label_names, order_is_known=old)
        if assumed:
            tqdm.write(f"assumed: {assumed}", file=sys.stderr)
    return images.head(limit)


def batches(
    images: ImageSet, batch_size: int, indices: Sequence[int] | None = None, *, never_empty: bool = False
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches (float32 [B, C, H, W], int64 [B]) on the CPU, in the order of ``indices``, or all in their own order.

    If bad images are skipped, a batch is smaller by them. One without any good image is left out; or, if
    ``never_empty``, it holds the next good image of the set instead, so that training has as many steps as planned, in
    each of its processes.

    Raises:
        DataError: an image cannot be read and that is fatal, or none can be read, or a worker process died.
    """
    order = range(len(images)) if indices is None else indices
    # Decoding is worth processes of its own; arrays are in memory, and processes would only copy them.
    workers = 0 if images.pictures.in_memory else min(8, torch.get_num_threads())
    dataset = _Batches(images, never_empty)
    loader: DataLoader[_Batch] = DataLoader(dataset, batch_size, sampler=order, num_workers=workers, collate_fn=_as_is)
    empty, known = True, len(images.skipped)
    try:
        for good, bad in loader:
            for image in bad:
                images.skip(image)
            if good is not None:
                empty = False
                inputs, labels = good
                yield inputs, labels
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise DataError(
            f"a process that reads {images.source} died: {str(error).splitlines()[0]} Most often memory, or shared "
            "memory in a container (docker run --shm-size), is too small; OMP_NUM_THREADS=1 starts fewer processes."
        ) from error
    if len(images.skipped) > max(known, _NAMED_BAD_IMAGES):
        tqdm.write(f"skipped {len(images.skipped)} images of {images.source} so far", file=sys.stderr)
    if empty and len(order) > 0:
        raise DataError(f"{images.source}: none of {len(order)} images can be read.")


def _as_is(batch: Any) -> Any:
    return batch
