"""What the settings of the preprocessing do, and where they come from."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
from conftest import ARCHITECTURE, MODEL_ARGS, make_model, write_model
from PIL import Image
from safetensors.torch import save_file
from test_data import COLOUR
from timm.data import resolve_data_config

from gplq.errors import ModelError
from gplq.models import load_model
from gplq.preprocessing import SETTINGS, Preprocessing
from gplq_export.triton.preprocess import Preprocess


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mean": [0.5]}, r"mean has 1 numbers 0\.5 for 3 channel"),
        ({"std": [0.2, 0.3]}, "std has 2 numbers"),
        ({"mean": [123.7, 116.3, 103.5]}, "divide those of 0 … 255 by 255"),
        ({"std": [0.2, 0.0, 0.2]}, "not positive"),
        ({"std": [58.4, 57.1, 57.4]}, "not of pixels in 0 … 1"),
        ({"crop_pct": -1}, "crop_pct"),
        ({"interpolation": "random"}, "interpolation 'random' is none of nearest"),
        ({"crop_mode": "corner"}, "crop_mode 'corner' is none of center"),
    ],
)
def test_what_would_prepare_every_image_wrongly_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Preprocessing.from_dict({**COLOUR.to_dict(), **change})


def test_the_server_refuses_another_number_of_channels_too() -> None:
    with pytest.raises(ValueError, match="mean has 1 numbers for 3 channels"):
        Preprocess({**COLOUR.to_dict(), "mean": [0.5]})


def rewrite(folder: Path, change: Any) -> Path:
    """Change the configuration of a model's folder."""
    file = folder / "config.json"
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    return folder


def flat(config: dict[str, Any]) -> dict[str, Any]:
    """As timm wrote it before 0.9: everything on one level."""
    return {"architecture": config["architecture"], **config["pretrained_cfg"], "labels": config["label_names"]}


def silent(config: dict[str, Any]) -> dict[str, Any]:
    """Nothing is said: the numbers of ImageNet, whatever the architecture's own weights want."""
    return {**config, "num_classes": 4, "pretrained_cfg": {}}


def test_a_configuration_without_a_word_is_timms_default(tmp_path: Path) -> None:
    folder = rewrite(write_model(tmp_path / "m", in_chans=3), silent)
    found = load_model(str(folder))
    theirs = resolve_data_config({}, model=timm.create_model(f"local-dir:{folder}", pretrained=False))
    assert found.preprocessing.mean == theirs["mean"] == (0.485, 0.456, 0.406)
    assert found.assumed.startswith("mean (0.485, 0.456, 0.406), std")


@pytest.mark.parametrize("change", [dict, flat])
def test_a_folder_is_read_as_timm_reads_it(change: Any, tmp_path: Path) -> None:
    folder = rewrite(write_model(tmp_path / "m"), change)
    extra = {} if change is dict else MODEL_ARGS
    found = load_model(str(folder), model_args=extra)
    theirs = resolve_data_config({}, model=timm.create_model(f"local-dir:{folder}", pretrained=False, **extra))
    ours = found.preprocessing
    for key in SETTINGS:
        assert getattr(ours, key) == (tuple(theirs[key]) if isinstance(theirs[key], list) else theirs[key])
    assert found.preprocessing.mean == (0.5,)
    assert found.assumed == ""
    assert set(found.origins.values()) == {str(folder / "config.json")}
    assert found.label_names == ["bottom-left", "bottom-right", "top-left", "top-right"]


def test_what_a_configuration_does_not_say_is_an_assumption(tmp_path: Path) -> None:
    def forget(config: dict[str, Any]) -> dict[str, Any]:
        known = {key: value for key, value in config["pretrained_cfg"].items() if key not in ("std", "interpolation")}
        return {**config, "pretrained_cfg": {**known, "mean": [0.4]}}

    found = load_model(str(rewrite(write_model(tmp_path / "m"), forget)), preprocessing={"std": [0.3]})
    assert (found.preprocessing.mean, found.preprocessing.std) == ((0.4,), (0.3,))
    assert found.origins["std"] == "given"
    assert re.search(r"interpolation bicubic, which is timm's default; .*config\.json does not say", found.assumed)
    with pytest.raises(ModelError, match=r"std has 3 numbers .*0\.229.* --std"):
        load_model(str(tmp_path / "m"))


def weights_file(folder: Path, **changes: Any) -> Path:
    folder.mkdir()
    save_file(make_model(**changes).state_dict(), folder / "weights.safetensors")
    return folder / "weights.safetensors"


def test_bare_weights_are_taken_for_timms_own_and_that_is_said(tmp_path: Path) -> None:
    path = weights_file(tmp_path / "w", in_chans=3)
    found = load_model(str(path), arch=ARCHITECTURE, model_args={**MODEL_ARGS, "in_chans": 3})
    assert found.preprocessing.mean == (0.5, 0.5, 0.5)
    assert "what timm's own weights vit_tiny_patch16_224.augreg_in21k_ft_in1k want" in found.assumed
    given = {"mean": [0.4], "std": [0.3, 0.2, 0.1], "interpolation": "bilinear", "crop_pct": 0.8, "crop_mode": "squash"}
    found = load_model(str(path), arch=ARCHITECTURE, model_args={**MODEL_ARGS, "in_chans": 3}, preprocessing=given)
    assert found.preprocessing.settings() == {**given, "mean": [0.4, 0.4, 0.4]}
    assert found.assumed == ""
    with pytest.raises(ModelError, match="has no 'size'"):
        load_model(str(path), arch=ARCHITECTURE, preprocessing={"size": 3})


def test_a_configuration_beside_the_weights_counts_if_it_is_theirs(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    found = load_model(str(folder / "model.safetensors"), arch=ARCHITECTURE, model_args=MODEL_ARGS)
    assert (found.preprocessing.std, found.assumed) == ((0.25,), "")
    for content in ('{"architecture": "deit_tiny_patch16_224", "pretrained_cfg": {}}', "[1]", "no json"):
        (folder / "config.json").write_text(content)
        found = load_model(str(folder / "model.safetensors"), arch=ARCHITECTURE, model_args=MODEL_ARGS)
        assert found.preprocessing.std == (0.5,)
        assert found.assumed


def test_numbers_of_other_channels_are_spread_if_they_are_all_the_same_and_refused_otherwise(tmp_path: Path) -> None:
    path = weights_file(tmp_path / "w")
    found = load_model(str(path), arch=ARCHITECTURE, model_args=MODEL_ARGS)  # timm's weights: three times 0.5
    assert found.preprocessing.mean == (0.5,)
    args = {"arch": "deit_tiny_patch16_224", "model_args": MODEL_ARGS}  # those of ImageNet
    with pytest.raises(ModelError, match=r"mean has 3 numbers \(0\.485, 0\.456, 0\.406\) for 1 channel.*--mean"):
        load_model(str(path), **args)
    found = load_model(str(path), preprocessing={"mean": [0.45], "std": [0.22]}, **args)
    assert found.preprocessing.std == (0.22,)
