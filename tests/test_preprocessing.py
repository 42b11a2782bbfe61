"""What the settings of the preprocessing do, and where they come from."""

import re
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_data import COLOUR

from gplq.preprocessing import Preprocessing


def test_preprocessing_round_trip() -> None:
    assert Preprocessing.from_dict(COLOUR.to_dict()) == COLOUR


@pytest.mark.parametrize("size", [(3, 40, 40), (3, 40, 24), (1, 32, 32)], ids=str)
@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize(
    ("crop_pct", "interpolation"), [(0.9, "bicubic"), (1.0, "bilinear"), (0.0, "nearest"), (1.3, "box")]
)
def test_steps_in_words_are_what_the_transform_does(
    size: tuple[int, int, int], crop_mode: str, crop_pct: float, interpolation: str
) -> None:
    """An interpreter of the words, in Pillow and NumPy, against timm's transform, bit for bit but for the division."""
    mean, std = (0.485, 0.456, 0.406)[: size[0]], (0.25,) * size[0]
    preprocessing = Preprocessing(size, interpolation, crop_pct, crop_mode, mean, std)
    for height, width in ((50, 75), (90, 33), (20, 20)):
        pixels = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
        found = _follow(preprocessing.steps(), Image.fromarray(pixels))
        expected = preprocessing.transform()(Image.fromarray(pixels).convert(preprocessing.image_mode)).numpy()
        assert found.shape == expected.shape == size
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def _follow(steps: list[str], image: Image.Image) -> "np.ndarray[Any, np.dtype[np.float64]]":
    convert, resize, crop, divide, subtract, scale = steps

    def numbers(text: str) -> list[float]:
        return [float(number) for number in re.findall(r"\d+\.?\d*", text)]

    image = image.convert({"convert to grey": "L", "convert to RGB": "RGB"}[convert.split(",")[0]])
    width, height = image.size
    how, where = resize.removeprefix("resize, ").split(": ")
    if "shorter side" in where:
        (side,) = numbers(where)
        goal = [int(side * size / min(width, height)) for size in (height, width)]
    else:
        tall, wide = numbers(where)
        factors = tall / height, wide / width
        factor = max(factors) if "as small as covers" in where else min(factors)
        goal = [round(height * factor), round(width * factor)] if "in proportion" in where else [int(tall), int(wide)]
    image = image.resize((goal[1], goal[0]), Image.Resampling[how.split()[0].upper()])
    shape, _, fill = crop.partition(", filled up with ")
    tall, wide = (int(number) for number in numbers(shape))
    array = np.asarray(image).reshape(goal[0], goal[1], -1)
    missing = [max(tall - goal[0], 0), max(wide - goal[1], 0)]
    assert fill or not any(missing)
    colour = np.array(numbers(fill) or [0]) * np.ones(array.shape[2])
    canvas = np.ones((goal[0] + missing[0], goal[1] + missing[1], 1)) * colour
    top, left = missing[0] // 2, missing[1] // 2
    canvas[top : top + goal[0], left : left + goal[1]] = array
    top, left = (round((have - want) / 2) for have, want in zip(canvas.shape[:2], (tall, wide), strict=True))
    tensor = canvas[top : top + tall, left : left + wide].transpose(2, 0, 1) / numbers(divide)[0]
    mean, std = (np.array(numbers(text)).reshape(-1, 1, 1) for text in (subtract, scale))
    result: np.ndarray[Any, np.dtype[np.float64]] = (tensor - mean) / std
    return result
