"""An encoded image -> what the network takes; the same bits as timm's evaluation transform gives.

This file is copied into the repository and runs inside the server, which has NumPy and Pillow, and neither torch nor
timm nor gplq. tests/test_triton_preprocess.py compares it with :class:`gplq.preprocessing.Preprocessing`.
"""

import io
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF", "GIF")
MAX_PIXELS = 89_478_485  # Pillow's own limit, also for what a very long image is resized to


class Preprocess:
    """``settings``: input_size [channels, height, width], interpolation, crop_pct, crop_mode, mean and std."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        channels, self.height, self.width = settings["input_size"]
        self.mode = "L" if channels == 1 else "RGB"
        self.crop_mode = settings["crop_mode"]
        # timm: `or`, that is, 0 stands for its default.
        crop = settings["crop_pct"] or 0.875
        self.scaled = (math.floor(self.height / crop), math.floor(self.width / crop))
        self.resample = Image.Resampling[settings["interpolation"].upper()]
        fill = tuple(round(255 * value) for value in settings["mean"]) if self.crop_mode == "border" else (0, 0, 0)
        self.fill: int | tuple[int, ...] = fill[0] if self.mode == "L" else fill
        for key in ("mean", "std"):
            if len(settings[key]) != channels:
                raise ValueError(f"{key} has {len(settings[key])} numbers for {channels} channels")
        self.mean, self.std = (np.array(settings[key], np.float32)[:, None, None] for key in ("mean", "std"))

    def __call__(self, encoded: bytes) -> NDArray[np.float32]:
        """The bytes of a file -> float32 [channels, height, width].

        Raises:
            ValueError: it is no image, or has too many pixels. Besides, whatever Pillow raises for damaged files, which
                is nearly anything.
        """
        try:
            file = Image.open(io.BytesIO(encoded), formats=FORMATS)
        except UnidentifiedImageError as error:  # its text names a Python object
            raise ValueError(f"it is none of {', '.join(FORMATS)}") from error
        with file:
            _check_size(file.height, file.width)
            if file.mode in ("I", "F") or file.mode.startswith("I;16"):  # Pillow cuts them off: white or black
                raise ValueError(f"its pixels have more than 8 bits (Pillow's mode {file.mode}): convert it to 8")
            image = file.convert(self.mode)
            if file.has_transparency_data and _is_constant(image) and not _is_constant(file.convert("RGBA").split()[3]):
                raise ValueError("its picture is in its transparency alone, which the model does not see")
        image = self._crop(self._resize(image))
        pixels = np.asarray(image, np.float32) / np.float32(255)
        planes = pixels[None] if self.mode == "L" else pixels.transpose(2, 0, 1)
        return np.ascontiguousarray((planes - self.mean) / self.std, np.float32)

    def _resize(self, image: Image.Image) -> Image.Image:
        height, width = self._size(image.height, image.width)
        if (height, width) == (image.height, image.width):
            return image
        _check_size(height, width)
        return image.resize((width, height), self.resample)

    def _size(self, height: int, width: int) -> tuple[int, int]:
        """What an image is resized to before the crop, (height, width)."""
        if self.crop_mode == "squash":
            return self.scaled
        if self.crop_mode != "border" and self.scaled[0] == self.scaled[1]:  # the shorter edge becomes so long
            short, long = sorted((height, width))
            new_short, new_long = self.scaled[0], int(self.scaled[0] * long / short)
            return (new_long, new_short) if width <= height else (new_short, new_long)
        ratios = height / self.scaled[0], width / self.scaled[1]
        ratio = max(ratios) if self.crop_mode == "border" else min(ratios)
        return round(height / ratio), round(width / ratio)

    def _crop(self, image: Image.Image) -> Image.Image:
        """The middle; with a border where the image is smaller."""
        missing = max(self.width - image.width, 0), max(self.height - image.height, 0)
        if any(missing):
            x, y = missing
            image = ImageOps.expand(image, (x // 2, y // 2, (x + 1) // 2, (y + 1) // 2), self.fill)
        top, left = round((image.height - self.height) / 2), round((image.width - self.width) / 2)
        return image.crop((left, top, left + self.width, top + self.height))


def _is_constant(image: Image.Image) -> bool:
    return all(low == high for low, high in (band.getextrema() for band in image.split()))


def _check_size(height: int, width: int) -> None:
    if height * width > MAX_PIXELS:
        raise ValueError(f"{width} x {height} pixels are too many; at most {MAX_PIXELS:,}")
