"""The server's preprocessing against timm's, bit for bit."""

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gplq.preprocessing import Preprocessing
from gplq_export.triton.preprocess import Preprocess

SIZES = [(16, 16), (17, 23), (40, 9), (5, 7), (224, 224), (100, 333), (301, 64), (1, 90)]


def encoded(size: tuple[int, int], mode: str, file_format: str) -> bytes:
    random = np.random.default_rng(sum(size))
    shape = (size[1], size[0]) if mode == "L" else (size[1], size[0], len(mode))
    buffer = io.BytesIO()
    Image.fromarray(random.integers(0, 256, shape, dtype=np.uint8), mode).save(buffer, file_format)
    return buffer.getvalue()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "nearest", "lanczos"])
@pytest.mark.parametrize(
    ("height", "width", "crop_pct"), [(16, 16, 1.0), (32, 32, 0.875), (28, 20, 0.9), (70, 70, 0.95)]
)
def test_same_bits_as_timm(
    channels: int, crop_mode: str, interpolation: str, height: int, width: int, crop_pct: float
) -> None:
    mean, std = ((0.286,), (0.353,)) if channels == 1 else ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    ours = Preprocessing((channels, height, width), interpolation, crop_pct, crop_mode, mean, std)
    transform, served = ours.transform(), Preprocess(ours.to_dict())
    for size in SIZES:
        for mode, file_format in (("RGB", "PNG"), ("L", "PNG"), ("RGBA", "PNG"), ("RGB", "JPEG")):
            content = encoded(size, mode, file_format)
            with Image.open(io.BytesIO(content)) as image:
                try:
                    expected = transform(image.convert(ours.image_mode)).numpy()
                except ValueError:  # timm scales a very long image to less than a pixel
                    with pytest.raises(ValueError, match="must be > 0"):
                        served(content)
                    continue
            found = served(content)
            assert found.dtype == np.float32 and found.flags.c_contiguous
            np.testing.assert_array_equal(found, expected, err_msg=f"{size} {mode} {file_format}")


def served(**changes: Any) -> Preprocess:
    settings = Preprocessing((3, 32, 32), "bicubic", 1.0, "center", (0.5,) * 3, (0.5,) * 3).to_dict()
    return Preprocess({**settings, **changes})


def test_same_bits_for_every_way_to_store_a_picture() -> None:
    transform = Preprocessing((3, 32, 32), "bicubic", 1.0, "center", (0.5,) * 3, (0.5,) * 3).transform()
    picture = Image.open(io.BytesIO(encoded((50, 40), "RGB", "PNG")))
    for mode, file_format in (
        ("P", "PNG"),
        ("P", "GIF"),
        ("1", "PNG"),
        ("LA", "PNG"),
        ("CMYK", "JPEG"),
    ):
        buffer = io.BytesIO()
        picture.convert(mode).save(buffer, file_format)
        with Image.open(buffer) as image:
            expected = transform(image.convert("RGB")).numpy()
        np.testing.assert_array_equal(served()(buffer.getvalue()), expected, err_msg=f"{mode} {file_format}")


@pytest.mark.parametrize(("mode", "file_format"), [("I;16", "PNG"), ("I", "TIFF"), ("F", "TIFF")])
def test_pixels_of_more_than_8_bits_are_refused(mode: str, file_format: str) -> None:
    buffer = io.BytesIO()
    Image.fromarray(
        (np.arange(64).reshape(8, 8) * 900).astype({"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode])
    ).save(buffer, file_format)
    with pytest.raises(ValueError, match="more than 8 bits"):
        served()(buffer.getvalue())


def test_a_picture_too_large_is_refused_before_it_is_decoded() -> None:
    bomb = io.BytesIO()
    Image.new("1", (9500, 9500)).save(bomb, "PNG")
    with pytest.warns(Image.DecompressionBombWarning), pytest.raises(ValueError, match="9500 x 9500 pixels"):
        served()(bomb.getvalue())


def test_a_picture_too_long_is_refused_before_it_is_resized() -> None:
    """One row of 60,000 pixels is small; at 224 rows it would have 3 billion."""
    long = io.BytesIO()
    Image.new("L", (60000, 1)).save(long, "PNG")
    with pytest.raises(ValueError, match="are too many"):
        served(input_size=[3, 224, 224])(long.getvalue())


@pytest.mark.parametrize("content", [b"", b"no picture", b"%!PS-Adobe-3.0 EPSF-3.0\n"], ids=["empty", "text", "eps"])
def test_what_is_no_picture_is_an_error(content: bytes) -> None:
    with pytest.raises(ValueError, match="it is none of JPEG, PNG"):
        served()(content)
