"""Images and labels: from an npz file or an image folder, through timm's own evaluation transform.

Two layouts are read, both for training images (to quantise with) and test images (to measure with):

    FILE.npz     train_images, train_labels, test_images, test_labels; or only images, labels
                 images: uint8 [n, H, W] or [n, H, W, 3]; labels: integers [n]
    FOLDER/      class/image files; or train/class/… and val/class/… (or validation/, test/)
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.datasets import ImageFolder

from gplq.errors import DataError

SPLIT_FOLDERS = {"train": ("train",), "test": ("val", "validation", "test")}
_NPZ_LIMIT_BYTES = 64 * 2**30  # a decompressed array above this is refused rather than tried


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

    @property
    def image_mode(self) -> str:
        """The PIL mode that the model wants."""
        return "L" if self.input_size[0] == 1 else "RGB"


class ImageSet(Dataset[tuple[Tensor, int]]):
    """Images with labels; yields (float32 [C, H, W], label).

    Attributes:
        source: where the images come from, for messages.
        classes: folder names in label order, or None.
        fingerprint: SHA-256 over the npz bytes, or over the relative paths and sizes of an image folder.
    """

    def __init__(
        self,
        items: Sequence[Any],
        labels: Sequence[int],
        preprocessing: Preprocessing,
        source: Path,
        classes: list[str] | None,
        fingerprint: str,
    ) -> None:
        """``items``: paths of image files, or uint8 arrays [H, W] or [H, W, 3]."""
        self.items, self.labels, self.source = items, labels, source
        self.classes, self.fingerprint = classes, fingerprint
        self._mode, self._transform = preprocessing.image_mode, preprocessing.transform()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        item = self.items[index]
        try:
            with Image.open(item) if isinstance(item, str | Path) else Image.fromarray(item) as image:
                tensor: Tensor = self._transform(image.convert(self._mode))
        except (OSError, UnidentifiedImageError, Image.DecompressionBombError, SyntaxError, ValueError) as error:
            where = item if isinstance(item, str | Path) else f"image {index} of {self.source}"
            raise DataError(f"cannot read {where}: {error}. Repair or remove it and run again.") from error
        return tensor, int(self.labels[index])

    def loader(self, batch_size: int, indices: Sequence[int] | None = None) -> "DataLoader[tuple[Tensor, int]]":
        """Batches (float32 [B, C, H, W], int64 [B]) in the order of ``indices``, or all in their own order."""
        # Decoding files is worth processes of its own; arrays are in memory, and processes would only copy them.
        workers = min(8, torch.get_num_threads()) if self._reads_files() else 0
        return DataLoader(self if indices is None else Subset(self, list(indices)), batch_size, num_workers=workers)

    def _reads_files(self) -> bool:
        return len(self.items) > 0 and isinstance(self.items[0], str | Path)

    def head(self, count: int | None) -> "ImageSet":
        """The first ``count`` images, evenly spread over the set so that all classes are met."""
        if count is None or count >= len(self):
            return self
        chosen = np.linspace(0, len(self) - 1, count).astype(int).tolist()
        copy = ImageSet.__new__(ImageSet)
        copy.__dict__ = dict(self.__dict__)
        copy.items = [self.items[i] for i in chosen]
        copy.labels = [self.labels[i] for i in chosen]
        copy.fingerprint = hashlib.sha256(f"{self.fingerprint} {chosen}".encode()).hexdigest()
        return copy


def draw(total: int, count: int, seed: int) -> list[int]:
    """``count`` distinct indices below ``total`` (all, if there are fewer), drawn with a seed of their own."""
    order: list[int] = torch.randperm(total, generator=torch.Generator().manual_seed(seed)).tolist()
    return order[:count]


def open_images(path: Path, split: str, preprocessing: Preprocessing) -> ImageSet:
    """Open one split, "train" or "test", of an npz file or an image folder.

    Raises:
        DataError: nothing is there, it is of neither layout, it is empty, or it lacks the split.
    """
    if not path.exists():
        raise DataError(f"{path} does not exist. --data takes an npz file or a folder of images.")
    if path.is_dir():
        return _open_folder(path, split, preprocessing)
    if path.suffix == ".npz":
        return _open_npz(path, split, preprocessing)
    raise DataError(f"{path} is neither a folder nor an .npz file. --data takes an npz file or a folder of images.")


def _open_npz(path: Path, split: str, preprocessing: Preprocessing) -> ImageSet:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            size = sum(info.file_size for info in arrays.zip.infolist())
            if size > _NPZ_LIMIT_BYTES:
                raise DataError(f"{path} decompresses to {size / 2**30:.0f} GiB; use an image folder instead.")
            names = [f"{split}_images", f"{split}_labels"]
            if names[0] not in arrays.files:
                names = ["images", "labels"]
            if any(name not in arrays.files for name in names):
                raise DataError(
                    f"{path} has no {split} images: expected the arrays {split}_images and {split}_labels "
                    f"(or images and labels), found {', '.join(arrays.files) or 'none'}."
                )
            images, labels = arrays[names[0]], arrays[names[1]]
    except (OSError, ValueError, EOFError, KeyError) as error:
        raise DataError(f"cannot read {path}: {error}. It must be an npz file without pickled objects.") from error
    except Exception as error:  # zipfile and zlib raise a family of types of their own for damaged files
        if isinstance(error, DataError):
            raise
        raise DataError(f"cannot read {path}: it is damaged ({error}).") from error
    good_shape = images.ndim == 3 or (images.ndim == 4 and images.shape[3] == 3)
    if images.dtype != np.uint8 or not good_shape or labels.shape != images.shape[:1]:
        raise DataError(
            f"{path}: images must be uint8 [n, H, W] or [n, H, W, 3] with n labels; found {images.dtype} "
            f"{list(images.shape)} with {list(labels.shape)} labels."
        )
    if not np.issubdtype(labels.dtype, np.integer):
        raise DataError(f"{path}: labels must be integers; found {labels.dtype}.")
    if len(images) == 0:
        raise DataError(f"{path} holds no {split} images.")
    with path.open("rb") as file:
        fingerprint = hashlib.file_digest(file, "sha256").hexdigest()
    return ImageSet(images, labels.astype(np.int64).tolist(), preprocessing, path, None, f"{fingerprint}/{names[0]}")


def _open_folder(path: Path, split: str, preprocessing: Preprocessing) -> ImageSet:
    root = _split_folder(path, split)
    try:
        folder = ImageFolder(str(root))
    except FileNotFoundError as error:
        raise DataError(
            f"{root} is not an image folder: {str(error).splitlines()[0]} Expected {root.name}/<class>/<image files>."
        ) from error
    except OSError as error:
        raise DataError(f"cannot read {root}: {error.strerror}.") from error
    paths = [Path(name) for name, _ in folder.samples]
    digest = hashlib.sha256()
    for image in paths:
        digest.update(f"{image.relative_to(root)} {image.stat().st_size}\n".encode())
    return ImageSet(paths, folder.targets, preprocessing, root, folder.classes, digest.hexdigest())


def _split_folder(path: Path, split: str) -> Path:
    """``path`` itself, or its sub-folder for ``split`` if it is divided into splits."""
    divided = any((path / name).is_dir() for names in SPLIT_FOLDERS.values() for name in names)
    if not divided:
        return path
    for name in SPLIT_FOLDERS[split]:
        if (path / name).is_dir():
            return path / name
    raise DataError(f"{path} has no {split} images: expected a sub-folder {' or '.join(SPLIT_FOLDERS[split])}.")


def check_labels(images: ImageSet, num_classes: int, label_names: Sequence[str] | None) -> None:
    """Make the labels those of the model, or refuse: a wrong class order would look like a broken model.

    Folders that are named like the model's labels are matched by name, others by their sorted order, which is only
    sound if there are as many as the model has classes.

    Raises:
        DataError: the classes do not fit the model.
    """
    if images.classes is not None:
        known = {name: index for index, name in enumerate(label_names or [])}
        if all(name in known for name in images.classes):
            images.labels = [known[images.classes[label]] for label in images.labels]
            images.classes = list(label_names or [])  # in label order again, so that a second call changes nothing
            return
        if len(images.classes) != num_classes:
            raise DataError(
                f"{images.source} has {len(images.classes)} class folders, the model {num_classes} classes: the "
                "labels cannot be matched. Name the folders as the model's labels, or give all classes."
            )
    lowest, highest = min(images.labels), max(images.labels)
    if lowest < 0 or highest >= num_classes:
        raise DataError(f"{images.source} has labels {lowest} … {highest}, the model has {num_classes} classes.")


def batches(images: ImageSet, batch_size: int, indices: Sequence[int] | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of ``images``, on the CPU."""
    for inputs, labels in images.loader(batch_size, indices):
        yield inputs, torch.as_tensor(labels)
