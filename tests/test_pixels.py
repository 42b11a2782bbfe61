"""Pictures of every kind, as timm and torchvision read them, here and in the server, or refused in both."""

import io
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_data import COLOUR, GREY, write_npz
from torchvision.datasets.folder import pil_loader

from gplq.data import batches, open_images
from gplq.errors import DataError
from gplq.preprocessing import Preprocessing
from gplq_export.triton.preprocess import Preprocess

NOISE = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
SHAPE = np.zeros((16, 16), np.uint8)
SHAPE[4:9, 2:7] = 255


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def with_alpha(colours: object, alpha: object = SHAPE) -> Image.Image:
    image = Image.fromarray(np.asarray(colours, np.uint8)).convert("RGB")
    image.putalpha(Image.fromarray(np.asarray(alpha, np.uint8)))
    return image


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    return encoded(Image.fromarray(NOISE), "JPEG", exif=exif)


def palette(transparency: object) -> bytes:
    return encoded(Image.fromarray(NOISE).quantize(16), "PNG", transparency=transparency)


def moving(kind: str) -> bytes:
    frames = [Image.fromarray(np.roll(NOISE, k, 0)) for k in range(3)]
    return encoded(frames[0], kind, save_all=True, append_images=frames[1:])


READ = {
    "alpha.png": encoded(with_alpha(NOISE), "PNG"),
    "alpha.webp": encoded(with_alpha(NOISE), "WEBP", lossless=True),
    "opaque.png": encoded(with_alpha(SHAPE, np.full((16, 16), 255)), "PNG"),
    "blank.png": encoded(with_alpha(np.full((16, 16), 7), np.full((16, 16), 255)), "PNG"),
    "palette.png": palette(bytes([0, 128] + [255] * 14)),
    "palette-one.png": palette(3),
    "bits.png": encoded(Image.fromarray(SHAPE).convert("1"), "PNG"),
    "cmyk.jpg": encoded(Image.fromarray(NOISE).convert("CMYK"), "JPEG"),
    "turned.jpg": turned(),
    "moving.gif": moving("GIF"),
    "moving.png": moving("PNG"),
    "moving.webp": moving("WEBP"),
    "pages.tif": moving("TIFF"),
    "two.jpg": moving("MPO"),
}
REFUSED = {
    "logo.png": (encoded(with_alpha(np.zeros((16, 16))), "PNG"), "transparency alone"),
    "logo.webp": (encoded(with_alpha(np.full((16, 16), 255)), "WEBP", lossless=True, exact=True), "transparency alone"),
    "grey-logo.png": (
        encoded(Image.merge("LA", [Image.new("L", (16, 16)), Image.fromarray(SHAPE)]), "PNG"),
        "transparency alone",
    ),
    "wide.png": (encoded(Image.fromarray(NOISE[:, :, 0].astype(np.uint16) * 257), "PNG"), "8 bits|to 8"),
    "float.tif": (encoded(Image.fromarray(NOISE[:, :, 0].astype(np.float32) / 255), "TIFF"), "8 bits|to 8"),
    "long.tif": (encoded(Image.fromarray(NOISE[:, :, 0].astype(np.int32)), "TIFF"), "8 bits|to 8"),
    "empty.png": (b"", "none of JPEG"),
    "text.png": (b"no picture", "none of JPEG"),
}


@pytest.mark.parametrize("preprocessing", [COLOUR, GREY], ids=["colour", "grey"])
@pytest.mark.parametrize("name", READ)
def test_read_as_torchvision_reads_it(name: str, preprocessing: Preprocessing, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    path = tmp_path / "a" / name
    # The name of the file is not what decides, and .gif is none that torchvision takes from a folder.
    path = path.with_suffix(".png") if path.suffix == ".gif" else path
    path.write_bytes(READ[name])
    ours, _ = open_images(tmp_path, "train", preprocessing)[0]
    with warnings.catch_warnings(action="ignore"):
        theirs = preprocessing.transform()(pil_loader(str(path)).convert(preprocessing.image_mode))
        if preprocessing is COLOUR:
            assert torch.equal(ours, theirs)
        served = Preprocess(preprocessing.to_dict())(READ[name])
    np.testing.assert_array_equal(ours.numpy(), served)


@pytest.mark.parametrize("name", REFUSED)
def test_refused_where_nothing_would_be_left_of_it(name: str, tmp_path: Path) -> None:
    content, message = REFUSED[name]
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"cannot read .*{name}: .*({message})"):
        open_images(tmp_path, "train", COLOUR)[0]
    with pytest.raises(ValueError, match=message):
        Preprocess(COLOUR.to_dict())(content)


def test_odd_pictures_warn_nobody(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.png").write_bytes(palette(bytes([0, 128] + [255] * 14)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        list(batches(open_images(tmp_path, "train", COLOUR), 4))
    assert [str(warning.message) for warning in caught] == []


@pytest.mark.parametrize("brightest", [0, 1])
def test_arrays_of_0_to_1_are_refused(brightest: int, tmp_path: Path) -> None:
    pixels = np.minimum(NOISE[None], brightest).astype(np.uint8)
    with pytest.raises(DataError, match="no pixel of the train images is above 1"):
        open_images(write_npz(tmp_path / "x.npz", images=pixels, labels=np.zeros(1, np.int64)), "train", COLOUR)
