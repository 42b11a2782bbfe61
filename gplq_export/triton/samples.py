"""Images to ask a served model with: from files, or of noise."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gplq.errors import DataError, UsageError
from gplq_export.triton.client import Feeds, TritonRun, own_preprocessing, preprocessed, takes_encoded

_NOISE = 16  # different images


def make_images(model: TritonRun, paths: Sequence[Path]) -> list[Feeds]:
    """Requests of one image each: of these files, or of noise if there are none.

    Raises:
        DataError: an image cannot be read. UsageError: the model takes no single tensor of images.
    """
    if len(model.inputs) != 1:
        raise UsageError(f"{model} takes {len(model.inputs)} tensors; load can make images only.")
    [tensor] = model.inputs
    if takes_encoded(model):
        encoded = [_read(path) for path in paths] or [_noise_png(seed) for seed in range(_NOISE)]
        return [{tensor.name: np.frombuffer(each, np.uint8)} for each in encoded]
    if paths:
        preprocess = own_preprocessing(model)
        return [{tensor.name: preprocessed(_read(path), preprocess)[None]} for path in paths]
    if tensor.datatype != "FP32" or model.max_batch_size == 0 or min(tensor.shape[1:]) < 1:
        shape = list(tensor.shape)
        raise UsageError(f"{model} takes {tensor.datatype} {shape}; load can make batches of FP32 images only.")
    noise = np.random.default_rng(0).standard_normal((_NOISE, 1, *tensor.shape[1:]), dtype=np.float32)
    return [{tensor.name: each} for each in noise]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}.") from error


def _noise_png(seed: int) -> bytes:
    from PIL import Image

    pixels = np.random.default_rng(seed).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def in_batches(feeds: Sequence[Feeds], batch: int) -> list[Feeds]:
    """Requests of ``batch`` images from requests of one; each begins with another image.

    >>> images = [{"x": np.array([i])} for i in range(3)]
    >>> [each["x"].tolist() for each in in_batches(images, 2)]
    [[0, 1], [1, 2], [2, 0]]
    """
    several = [[feeds[(first + i) % len(feeds)] for i in range(batch)] for first in range(len(feeds))]
    return [{name: np.concatenate([each[name] for each in few]) for name in few[0]} for few in several]
