"""Labels that the answers speak against, and labels that only seem so."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import fast_recipe, make_arrays, write_model
from numpy.typing import NDArray
from safetensors.torch import save_file

from gplq.checkpoint import load_checkpoint
from gplq.cli import main as gplq
from gplq.data import batches, open_images
from gplq.doubt import doubt
from gplq.errors import DataError
from gplq.models import FloatModel, load_model
from gplq.pipeline import quantize
from gplq_export.cli import main as gplq_export

Numbers = NDArray[np.int64]


def classifier(accuracy: float, classes: int, images: int, seed: int = 0) -> tuple[Numbers, Numbers]:
    """Labels, and answers that are right so often and else any class at all."""
    random = np.random.default_rng(seed)
    labels = np.arange(images) % classes
    guesses = random.integers(0, classes, images)
    return labels, np.where(random.random(images) < accuracy, labels, guesses)


@pytest.mark.parametrize(("classes", "images"), [(2, 24), (4, 64), (12, 96), (100, 400), (1000, 4000)])
@pytest.mark.parametrize("accuracy", [0.7, 0.98])
def test_another_numbering_is_found(classes: int, images: int, accuracy: float) -> None:
    labels, said = classifier(accuracy, classes, images)
    assert doubt(labels, said, classes) is None
    why = doubt(np.roll(np.arange(classes), 1)[labels], said, classes)
    assert why is not None
    assert "numbered otherwise" in why


def test_two_classes_exchanged_among_many_are_named() -> None:
    labels, said = classifier(0.98, 20, 400)
    exchanged = np.arange(20)
    exchanged[[3, 7]] = 7, 3
    why = doubt(exchanged[labels], said, 20, [f"n{k}" for k in range(20)])
    assert why is not None
    assert "class 3 ('n3') is mostly taken for class 7 ('n7')" in why
    assert "class 4" not in why


@pytest.mark.parametrize("classes", [2, 4, 10, 100, 1000])
def test_few_images_and_weak_classifiers_raise_no_alarm(classes: int) -> None:
    """An assignment of labels to answers that fits such images always exists; it says nothing about others."""
    for seed in range(20):
        for images in (1, 5, 20):
            assert doubt(*classifier(0.9, classes, images, seed), classes) is None
        for images in (200, 2000):
            assert doubt(*classifier(0.4, classes, images, seed), classes) is None


def test_similar_classes_raise_no_alarm() -> None:
    """Half of a class is taken for its neighbour: more than half would be another numbering."""
    random = np.random.default_rng(0)
    labels = np.arange(2000) % 100
    said = np.where((labels % 2 == 0) & (random.random(2000) < 0.45), labels + 1, labels)
    assert doubt(labels, said, 100) is None


@pytest.mark.parametrize(("classes", "images"), [(2, 300), (4, 128), (12, 96), (1000, 100)])
def test_guessing_is_found(classes: int, images: int) -> None:
    labels = np.arange(images) % classes
    why = doubt(labels, np.zeros(images, np.int64), classes)  # images that are all white
    assert why is not None
    assert "guessing" in why


def test_a_constant_answer_is_guessing_and_no_numbering() -> None:
    """Taking the constant for another class would be right for that one, and spoil the class that it is."""
    labels = np.repeat([0, 1, 2, 3], [26, 36, 32, 34])
    why = doubt(labels, np.zeros(128, np.int64), 4)
    assert why is not None
    assert "guessing" in why


@pytest.mark.parametrize("answers", [[1, 1, 1, 2], [1, 0, 0, 1], [2, 2, 3, 0]])
def test_untrained_networks_that_say_the_same_of_alike_images_have_no_other_numbering(answers: list[int]) -> None:
    """Renumbering would make half or more of the answers right, as any constant answer can be called right."""
    labels = np.arange(64) % 4
    assert doubt(labels, np.array(answers)[labels], 4) is None


def test_one_class_in_the_data_is_no_guessing() -> None:
    assert doubt(np.full(50, 3), np.full(50, 3), 10) is None


@dataclass(frozen=True)
class Knowing:
    """A model that knows its labels; images with these labels, and with the same in another order."""

    source: FloatModel
    train: Path
    right: Path
    other: Path


@pytest.fixture(scope="module")
def knowing(tmp_path_factory: pytest.TempPathFactory) -> Knowing:
    folder = tmp_path_factory.mktemp("knowing")
    model = write_model(folder / "model")
    source = load_model(str(model))
    for name, seed, order in (("train", 1, [0, 1, 2, 3]), ("right", 2, [0, 1, 2, 3]), ("other", 2, [1, 2, 3, 0])):
        pixels, labels = make_arrays(128, seed)
        np.savez(folder / f"{name}.npz", images=pixels, labels=np.array(order)[labels])
    images = open_images(folder / "train.npz", "train", source.preprocessing)
    inputs, labels = next(batches(images, 128))
    optimizer = torch.optim.AdamW(source.model.parameters(), lr=1e-3)
    for _ in range(40):
        optimizer.zero_grad()
        F.cross_entropy(source.model(inputs), labels).backward()
        optimizer.step()
    save_file(source.model.state_dict(), model / "model.safetensors")
    return Knowing(load_model(str(model)), *(folder / f"{name}.npz" for name in ("train", "right", "other")))


def test_quantize_stops_before_it_learns_wrong_labels(knowing: Knowing, tmp_path: Path) -> None:
    out, said = tmp_path / "model.pt", list[str]()
    with pytest.raises(DataError, match=r"FP32 on .*other\.npz: top-1 .* numbered otherwise .*--trust-labels"):
        quantize(knowing.source, knowing.train, out, fast_recipe(), eval_data=knowing.other, say=said.append)
    assert not out.exists()
    assert not any("Stage 1" in line for line in said)


@pytest.mark.slow
def test_eval_and_check_stop_too_unless_told(
    knowing: Knowing, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, other = tmp_path / "model.pt", ["--data", str(knowing.other)]
    quantize(
        knowing.source, knowing.train, out, fast_recipe(enabled=False), eval_data=knowing.right, say=lambda _: None
    )
    assert gplq(["eval", str(out), "--data", str(knowing.right)]) == 0
    assert gplq(["eval", str(out), *other]) == 2
    assert "numbered otherwise" in capsys.readouterr().err
    assert gplq(["eval", str(out), *other, "--trust-labels"]) == 0
    assert gplq_export([str(out), "--out", str(tmp_path / "dist")]) == 0
    check = ["check", str(tmp_path / "dist" / "model.cpu.onnx"), *other, "--forced-images", "4", "--images", "64"]
    assert gplq_export(check) == 2
    assert "numbered otherwise" in capsys.readouterr().err
    assert gplq_export([*check, "--trust-labels"]) == 0


def test_what_was_trusted_once_is_recorded(knowing: Knowing, tmp_path: Path) -> None:
    out, recipe = tmp_path / "model.pt", fast_recipe(enabled=False)
    arguments = {"eval_data": knowing.other, "trust_labels": True, "say": lambda _: None}
    quantize(knowing.source, knowing.train, out, recipe, **arguments)
    assert load_checkpoint(out).trusts_labels
    assert gplq(["eval", str(out), "--data", str(knowing.other)]) == 0
