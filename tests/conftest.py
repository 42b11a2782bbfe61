"""A tiny random ViT as timm writes it, a task that it can learn, and the checkpoint that the real pipeline makes."""

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import timm
import timm.models
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from gplq.checkpoint import Checkpoint, load_checkpoint
from gplq.data import ImageSet, open_images
from gplq.models import FloatModel, load_model
from gplq.pipeline import quantize
from gplq.recipe import Recipe
from gplq_export.export import export
from gplq_export.trace import trace

collect_ignore = ["triton_backends"]  # run inside a Triton server
ARCHITECTURE = "vit_tiny_patch16_224"
MODEL_ARGS = {"img_size": 16, "patch_size": 4, "in_chans": 1, "embed_dim": 64, "depth": 2, "num_heads": 2}
CLASSES = ["bottom-left", "bottom-right", "top-left", "top-right"]


def make_arrays(count: int, seed: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Grey noise [n, 16, 16] with one bright quadrant; the label says which (CLASSES)."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, 4, count)
    images = random.integers(0, 100, (count, 16, 16))
    for image, label in zip(images, labels, strict=True):
        row, column = (0 if label >= 2 else 8), (8 if label % 2 else 0)
        image[row : row + 8, column : column + 8] += 120
    return images.astype(np.uint8), labels


def make_model(**changes: Any) -> nn.Module:
    """The tiny ViT with random weights that are always the same ones."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model(ARCHITECTURE, num_classes=4, **{**MODEL_ARGS, **changes})
        for parameter in model.parameters():  # timm's initialisation leaves biases zero and logits too
            parameter.data.add_(torch.randn(parameter.shape) * 0.05)
    return model.eval()


def write_model(folder: Path, **changes: Any) -> Path:
    """Write the folder that timm's own exporter writes."""
    model = make_model(**changes)
    config = {"input_size": [1, 16, 16], "mean": [0.5], "std": [0.25], "interpolation": "bilinear", "crop_pct": 1.0}
    model.pretrained_cfg = {**model.pretrained_cfg, **config}  # type: ignore[operator]
    timm.models.save_for_hf(model, folder, model_config={"label_names": CLASSES}, safe_serialization=True)
    return folder


def fast_recipe(**stage1: Any) -> Recipe:
    """Every step of the method, on a few images, at a learning rate that shows within a few steps."""
    settings: dict[str, Any] = {"batch_size": 16, "lr": 1e-3, "scale_lr": 1e-2, **stage1}
    return Recipe.from_dict({"calibration": {"images": 64}, "stage1": settings, "stage2": {"images": 64}})


def rough(recipe: Recipe) -> Recipe:
    """``recipe`` with a start that leaves much to learn: a tiny random network needs little more than good scales."""
    calibration = recipe.calibration.model_copy(update={"rotate": False, "importance": "none", "centre": False})
    return recipe.model_copy(update={"matmul_bits": recipe.activation_bits, "calibration": calibration})


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first, so that no process is left with one at the end while the others are done."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session", autouse=True)
def _same_everywhere() -> None:
    """One thread, here and in every program that a test starts: another number of threads sums in another order."""
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    # A shell that starts us in the background has Ctrl-C ignored, which programs inherit.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def npz_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "quadrants.npz"
    train_images, train_labels = make_arrays(128, seed=1)
    test_images, test_labels = make_arrays(64, seed=2)
    np.savez(
        path, train_images=train_images, train_labels=train_labels, test_images=test_images, test_labels=test_labels
    )
    return path


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """train/ and val/, a folder for each class, PNG files."""
    root = tmp_path / "images"
    for split, count in (("train", 16), ("val", 8)):
        images, labels = make_arrays(count, seed=count)
        labels[:4] = range(4)  # no class without an image
        for index, (image, label) in enumerate(zip(images, labels, strict=True)):
            path = root / split / CLASSES[label] / f"{index:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    return root


@pytest.fixture(scope="session")
def float_model(model_folder: Path) -> FloatModel:
    """Shared: do not change it."""
    return load_model(str(model_folder))


@pytest.fixture(scope="session")
def train_set(npz_file: Path, float_model: FloatModel) -> ImageSet:
    return open_images(npz_file, "train", float_model.preprocessing)


@pytest.fixture(scope="session")
def probe(npz_file: Path, float_model: FloatModel) -> torch.Tensor:
    """A batch of test images, [16, 1, 16, 16]."""
    images = open_images(npz_file, "test", float_model.preprocessing)
    return torch.stack([images[index][0] for index in range(16)])


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "fast.yaml"
    path.write_text(fast_recipe().to_yaml())
    return path


@dataclass(frozen=True)
class Quantised:
    """A checkpoint file and what the pipeline said and returned when it made it."""

    path: Path
    said: list[str]
    accuracies: dict[str, Any]


@pytest.fixture(scope="session")
def quantised(float_model: FloatModel, npz_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Quantised:
    path = tmp_path_factory.mktemp("out") / "model.pt"
    said: list[str] = []
    accuracies = quantize(float_model, npz_file, path, fast_recipe(), say=said.append)
    return Quantised(path, said, accuracies)


@pytest.fixture
def altered(quantised: Quantised, tmp_path: Path) -> Callable[[Callable[[dict[str, Any]], None]], Path]:
    """Makes a copy of the checkpoint whose content a function has changed."""

    def alter(change: Callable[[dict[str, Any]], None]) -> Path:
        content = torch.load(quantised.path, weights_only=True)
        change(content)
        torch.save(content, tmp_path / "altered.pt")
        return tmp_path / "altered.pt"

    return alter


@pytest.fixture(scope="session")
def checkpoint(quantised: Quantised) -> Checkpoint:
    """Shared: do not change it."""
    return load_checkpoint(quantised.path)


@pytest.fixture(scope="session")
def dialect(checkpoint: Checkpoint) -> ir.Model:
    """The checkpoint traced; lowering leaves it as it is."""
    return trace(checkpoint)


@pytest.fixture(scope="session")
def exported(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What gplq-export writes of the checkpoint; shared: copy it before you change it."""
    out = tmp_path_factory.mktemp("exported") / "dist"
    export(checkpoint, out, say=lambda _: None)
    return out
