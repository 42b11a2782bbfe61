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
import math
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from timm.data import DEFAULT_CROP_PCT, create_transform
from timm.utils.misc import natural_key
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from tqdm import tqdm

from gplq.errors import DataError
from gplq.huggingface import PREFIX, open_dataset
from gplq.sources import Found, expand, open_folder, open_npz, open_shards

if TYPE_CHECKING:
    from gplq.checkpoint import Checkpoint

BadImages = Literal["fail", "skip"]
_NAMED_BAD_IMAGES = 10  # so many are reported one by one


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes a tensor; timm's data config of the model.

    ``input_size``: (channels, height, width) in pixels; ``mean``, ``std``: per channel, of pixels in 0 … 1.
    """

    input_size: tuple[int, int, int]
    interpolation: str
    crop_pct: float
    crop_mode: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "Preprocessing":
        """Inverse of :meth:`to_dict`; also takes timm's data config. Unknown keys are ignored."""
        channels, height, width = (int(size) for size in content["input_size"])
        return cls(
            input_size=(channels, height, width),
            interpolation=str(content["interpolation"]),
            crop_pct=float(content["crop_pct"]),
            crop_mode=str(content["crop_mode"]),
            mean=tuple(float(value) for value in content["mean"]),
            std=tuple(float(value) for value in content["std"]),
        )

    def transform(self) -> Any:
        """The evaluation transform: PIL image -> float32 [C, H, W]."""
        return create_transform(**asdict(self), is_training=False)

    def steps(self) -> list[str]:
        """The same in words, for whoever writes it in another language: from the image to the tensor.

        >>> photos = Preprocessing((3, 224, 224), "bicubic", 0.875, "center", (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
        >>> print(photos.steps()[1])
        resize, bicubic with antialiasing: the shorter side to 256 pixels, the other in proportion (rounded down)
        """
        channels, height, width = self.input_size
        # As timm does: fractions of a pixel are cut off, and 0 stands for its default.
        tall, wide = (math.floor(side / (self.crop_pct or DEFAULT_CROP_PCT)) for side in (height, width))
        if self.crop_mode == "squash":
            resized = f"to {tall} x {wide} pixels, whatever the proportions"
        elif self.crop_mode == "border":
            resized = f"in proportion (rounded), as large as fits into {tall} x {wide} pixels"
        elif tall == wide:
            resized = f"the shorter side to {tall} pixels, the other in proportion (rounded down)"
        else:
            resized = f"in proportion (rounded), as small as covers {tall} x {wide} pixels"
        fill = [round(255 * mean) for mean in self.mean] if self.crop_mode == "border" else [0]
        padded = self.crop_mode == "border" or tall < height or wide < width
        # Pillow's, which averages over all pixels that fall together.
        smooth = "" if self.interpolation == "nearest" else " with antialiasing"
        return [
            f"convert to {'grey' if self.image_mode == 'L' else 'RGB'}, 8 bits a channel",
            f"resize, {self.interpolation}{smooth}: {resized}",
            f"crop the middle {height} x {width} pixels" + f", filled up with {_listed(fill)}" * padded,
            f"divide by 255, channels first: float32 [{channels}, {height}, {width}], 0 to 1",
            f"subtract {_listed(self.mean)}",
            f"divide by {_listed(self.std)}",
        ]

    @property
    def image_mode(self) -> str:
        """The PIL mode that the model wants."""
        return "L" if self.input_size[0] == 1 else "RGB"


def _listed(numbers: Sequence[float]) -> str:
    """Numbers of the channels, or the one that is all of theirs.

    >>> _listed((0.485, 0.456)), _listed((0.5, 0.5))
    ('(0.485, 0.456)', '0.5')
    """
    if len(set(numbers)) == 1:
        return f"{numbers[0]:.9g}"
    return f"({', '.join(f'{number:.9g}' for number in numbers)})"


# Pillow converts these to 8 bits by cutting off, not by scaling: nearly every picture becomes white, or black.
_TOO_WIDE = "{} pixels, whose range nobody knows: convert it to 8 bits a channel"
WIDE_MODES = {
    **{mode: _TOO_WIDE.format("16-bit grey") for mode in ("I;16", "I;16L", "I;16B", "I;16N")},
    "I": _TOO_WIDE.format("16- or 32-bit integer"),
    "F": _TOO_WIDE.format("floating-point"),
}


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
    """

    def __init__(self, found: Found, preprocessing: Preprocessing, bad_images: BadImages = "fail") -> None:
        self.pictures, self.classes, self.source = found.pictures, found.classes, found.source
        self.orders_classes = found.orders_classes
        self.fingerprint = self.source_fingerprint = found.fingerprint
        self.bad_images = bad_images
        self.rows: Sequence[int] = range(len(found.pictures))
        self.labels = [-1] * len(found.pictures) if found.labels is None else found.labels
        self.skipped: set[int] = set()
        self._mode, self._transform = preprocessing.image_mode, preprocessing.transform()

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
            with self.pictures.open(row) as image:
                if image.mode in WIDE_MODES:
                    return BadImage(row, f"{self.pictures.name(row)} has {WIDE_MODES[image.mode]}")
                tensor: Tensor = self._transform(image.convert(self._mode))
        except Exception as error:  # Pillow's decoders raise nearly every type there is for damaged files
            return BadImage(row, f"cannot read {self.pictures.name(row)}: {error}")
        return tensor

    def to_dict(self) -> dict[str, Any]:
        """What provenance records; plain data."""
        record = {"path": self.source, "sha256": self.fingerprint, "images": len(self)}
        return {**record, "skipped": len(self.skipped)} if self.skipped else record

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
        advice = "Repair or remove it and run again; gplq quantize and gplq eval can go on with --skip-bad-images."
        return DataError(f"{self.reason}. {advice}")


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
        DataError: nothing is there, it is none of these layouts, it is empty, or it lacks the split or labels.
        MissingError: a package is needed to read it and not installed.
    """
    return ImageSet(_find(str(data), split, need_labels), preprocessing, bad_images)


def fingerprint(data: str, split: str) -> str:
    """What :class:`ImageSet` calls so, of one split of what ``data`` names; :func:`open_images` for what it raises."""
    return _find(data, split, need_labels=False).fingerprint


def _find(data: str, split: str, need_labels: bool) -> Found:
    if data.startswith(PREFIX):
        return open_dataset(data, split, need_labels)
    path = Path(data)
    if path.is_dir():
        return open_folder(path, split, need_labels)
    if data.endswith((".tar", ".tar.gz", ".tgz")):
        return open_shards(expand(data), data, need_labels)
    expected = "--data takes an npz file, a folder of images, tar files or hf:NAME."
    if not path.exists():
        raise DataError(f"{path} does not exist. {expected}")
    if path.suffix == ".npz":
        return open_npz(path, split, need_labels)
    raise DataError(f"{path} is neither a folder nor an .npz or .tar file. {expected}")


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
        DataError: see :func:`open_images` and :func:`check_labels`.
    """
    images = open_images(data, "test", checkpoint.preprocessing, need_labels=need_labels, bad_images=bad_images)
    if need_labels:
        # Before there was a --class-order, every folder was in alphabetical order.
        old = "class_order" not in checkpoint.provenance.get("arguments", {})
        check_labels(images, checkpoint.spec.num_classes, checkpoint.label_names, order_is_known=old)
    return images.head(limit)


def check_labels(
    images: ImageSet, num_classes: int, label_names: Sequence[str] | None, *, order_is_known: bool = False
) -> None:
    """Make the labels those of the model, or refuse: a wrong class order would look like a broken model.

    Classes (folders, say) that are named like the model's labels are matched by name, others by their order, which is
    only sound if there are as many as the model has classes, and if there is one order: torchvision sorts folders
    alphabetically (1, 10, 2; Zebra, ant), timm naturally and without regard to case (1, 2, 10; ant, Zebra).

    Args:
        images: their labels are changed in place.
        num_classes: of the model.
        label_names: of the model, if it has names.
        order_is_known: the alphabetical order is right, even where timm's would be another.

    Raises:
        DataError: the classes do not fit the model, or their order is not known.
    """
    known: dict[str, int] = {}
    by_name, limit = False, num_classes
    if images.classes is not None:
        known = {name: index for index, name in enumerate(label_names or [])}
        by_name = all(name in known for name in images.classes)
        if not by_name and len(images.classes) != num_classes:
            raise DataError(_unmatched(images, num_classes, label_names))
        twice = sorted(name for name, count in Counter(label_names or []).items() if count > 1)
        if by_name and list(images.classes) == list(label_names or []):
            by_name = False  # the very same list: there is nothing to match, and a name may stand for two classes
        elif by_name and (ambiguous := [name for name in twice if name in images.classes]):
            raise DataError(
                f"the model has more than one label '{ambiguous[0]}', so that the class of that name in "
                f"{images.source} cannot be matched. Give the data all {num_classes} classes in the model's order."
            )
        elif not by_name and not order_is_known:
            _check_order(images, label_names)
        limit = len(images.classes)
    lowest, highest = min(images.labels), max(images.labels)
    if lowest < 0 or highest >= limit:
        owner = "the model has" if images.classes is None else "and"
        raise DataError(f"{images.source} has labels {lowest} … {highest}, {owner} {limit} classes.")
    if by_name and images.classes is not None:
        images.labels = [known[images.classes[label]] for label in images.labels]
        images.classes = list(label_names or [])  # in label order again, so that a second call changes nothing


def _unmatched(images: ImageSet, num_classes: int, label_names: Sequence[str] | None) -> str:
    classes = images.classes or []
    sides = f"{images.source} has {len(classes)} classes, the model {num_classes}: the labels cannot be matched."
    if label_names:
        ours = [name for name in classes if name not in set(label_names)]
        theirs = [name for name in label_names if name not in set(classes)]
        sides += f" Only the data has {_few(ours)}; only the model has {_few(theirs)}."
    return f"{sides} Name the classes (folders) as the model's labels, or give all of them."


def _few(names: Sequence[str]) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown or "none"


def _check_order(images: ImageSet, label_names: Sequence[str] | None) -> None:
    classes = list(images.classes or [])
    natural = in_order(classes, "natural")
    if not images.orders_classes or natural == classes:
        return
    first = next(index for index, pair in enumerate(zip(classes, natural, strict=True)) if pair[0] != pair[1])
    names = f" The model's own names ({_few(list(label_names))}) are others." if label_names else ""
    raise DataError(
        f"{images.source}: which class is which? In alphabetical order (torchvision) class {first} is "
        f"'{classes[first]}', in natural order (timm's train.py) '{natural[first]}'.{names} Say how the model was "
        "trained: gplq quantize --class-order alphabetical, natural, or a FILE with one class a line."
    )


def class_names(images: ImageSet, num_classes: int, order: str) -> list[str]:
    """The names of a model's labels, from what ``--class-order`` says of a set of class folders.

    Args:
        images: with class names.
        num_classes: of the model.
        order: "alphabetical", "natural", or the path of a text file with one class a line.

    Raises:
        DataError: the set has no class names, or the file cannot be read, or the two have other classes.
    """
    classes = images.classes
    if classes is None or not images.orders_classes:
        raise DataError(f"--class-order is about folders of classes; {images.source} numbers its classes itself.")
    if order in ("alphabetical", "natural"):
        names = in_order(classes, order)
    else:
        try:
            lines = Path(order).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(
                f"--class-order takes alphabetical, natural or a text file with one class a line; cannot read "
                f"{order}: {error}."
            ) from error
        names = [line.strip() for line in lines if line.strip()]
        missing = [name for name in classes if name not in names]
        if missing or len(set(names)) != len(names):
            what = f"lacks {_few(missing)}" if missing else "names a class twice"
            raise DataError(f"{order} {what}; {images.source} has {len(classes)} classes ({_few(classes)}).")
    if len(names) != num_classes:
        raise DataError(f"--class-order {order} gives {len(names)} classes, the model has {num_classes}.")
    return names


def in_order(classes: Sequence[str], order: str) -> list[str]:
    """Names of folders in the order in which torchvision ("alphabetical") or timm ("natural") numbers them."""
    return sorted(classes) if order == "alphabetical" else sorted(classes, key=natural_key)


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
