"""Classes of the data against classes of the model, by name and by order."""

from pathlib import Path

import numpy as np
import pytest
from conftest import make_arrays
from PIL import Image
from test_data import GREY, write_npz
from timm.data.readers.reader_image_folder import ReaderImageFolder
from torchvision.datasets import ImageFolder

from gplq.data import ImageSet, open_images
from gplq.errors import DataError
from gplq.labels import check_labels, check_same_classes, class_names


def test_folders_are_matched_to_label_names_whatever_their_order(image_folder: Path) -> None:
    images = open_images(image_folder, "test", GREY)
    model_names = ["top-right", "unused", "top-left", "bottom-right", "bottom-left"]
    expected = [model_names.index(Path(path).parent.name) for path in images.pictures.paths]
    for _ in range(2):  # a second call changes nothing
        check_labels(images, 5, model_names)
        assert list(images.labels) == expected


def test_folders_of_other_names_are_matched_by_order_if_all_are_there(image_folder: Path) -> None:
    images = open_images(image_folder, "test", GREY)
    before = list(images.labels)
    assumed = check_labels(images, 4, ["a", "b", "c", "d"])
    assert assumed is not None
    assert "'bottom-left' … 'top-right', for the model 'a' … 'd'" in assumed
    assert check_labels(images, 4, None) is not None
    assert list(images.labels) == before


def test_folders_that_cannot_be_matched_are_refused(image_folder: Path) -> None:
    with pytest.raises(DataError, match="4 classes, the model 10"):
        check_labels(open_images(image_folder, "test", GREY), 10, None)


def test_labels_outside_the_model_are_refused(tmp_path: Path) -> None:
    pixels, _ = make_arrays(3, seed=0)
    for labels in ([0, 1, 4], [-1, 0, 1]):
        images = open_images(write_npz(tmp_path / "n.npz", images=pixels, labels=np.array(labels)), "train", GREY)
        with pytest.raises(DataError, match=f"labels {min(labels)} … {max(labels)}, the model has 4 classes"):
            check_labels(images, 4, None)


def numbered(tmp_path: Path, names: list[str]) -> ImageSet:
    for name in names:
        (tmp_path / "folders" / name).mkdir(parents=True)
        Image.fromarray(np.zeros((16, 16), np.uint8)).save(tmp_path / "folders" / name / "0.png")
    return open_images(str(tmp_path / "folders"), "train", GREY)


@pytest.mark.parametrize("names", [["1", "2", "10"], ["ant", "Zebra", "bee"]])
def test_an_order_that_timm_and_torchvision_see_differently_is_asked_for(names: list[str], tmp_path: Path) -> None:
    images = numbered(tmp_path, names)
    with pytest.raises(DataError, match="--class-order alphabetical, natural, or a FILE"):
        check_labels(images, 3, None)
    by_timm = ReaderImageFolder(str(tmp_path / "folders")).class_to_idx
    assert class_names(images, 3, "natural") == sorted(by_timm, key=by_timm.__getitem__)
    assert class_names(images, 3, "alphabetical") == ImageFolder(str(tmp_path / "folders")).classes
    check_labels(images, 3, class_names(images, 3, "natural"))
    found = {Path(images.pictures.name(row)).parent.name: label for row, label in enumerate(images.labels)}
    assert found == by_timm


def test_an_order_from_a_file(tmp_path: Path) -> None:
    images = numbered(tmp_path, ["1", "2", "10"])
    order = tmp_path / "order.txt"
    order.write_text("2\n10\n\n1\n")
    assert class_names(images, 3, str(order)) == ["2", "10", "1"]
    order.write_bytes(b"\xef\xbb\xbf2\r\n10\r\n1\r\n")  # as an editor of Windows leaves it
    assert class_names(images, 3, str(order)) == ["2", "10", "1"]
    for content, what in (("2\n10\n", "lacks '1'"), ("2\n10\n1\n1\n", "names a class twice")):
        order.write_text(content)
        with pytest.raises(DataError, match=what):
            class_names(images, 3, str(order))
    with pytest.raises(DataError, match="cannot read"):
        class_names(images, 3, str(tmp_path / "none.txt"))


def test_where_there_is_one_order_nothing_is_asked(tmp_path: Path) -> None:
    images = numbered(tmp_path, ["a", "b", "c"])
    check_labels(images, 3, None)
    assert images.labels == [0, 1, 2]


def test_two_labels_of_one_name(tmp_path: Path) -> None:
    images = numbered(tmp_path, ["crane", "hen", "owl"])
    with pytest.raises(DataError, match="more than one label 'crane'"):
        check_labels(images, 4, ["crane", "hen", "crane", "owl"])
    images.labels, images.classes = [0, 1, 2], ["crane", "hen", "crane"]  # as a shard's classes.json may say
    check_labels(images, 3, ["crane", "hen", "crane"])
    assert images.labels == [0, 1, 2]


def test_both_sides_of_classes_that_do_not_match_are_shown(tmp_path: Path) -> None:
    images = numbered(tmp_path, ["cat", "dog"])
    with pytest.raises(DataError, match="Only the data has 'dog'; only the model has 'hen', 'owl'"):
        check_labels(images, 3, ["cat", "hen", "owl"])


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["cow", "cat", "dog"], "class 0 is 'cat', the model's class 1 is 'cat'"),
        (["Dog", "Hen", "Cat"], "class 0 is 'cat', the model's class 2 is 'Cat'"),
        (["sea lion", "cat", "hen"], "Only the data has"),
    ],
)
def test_a_name_at_another_place_contradicts_the_order(names: list[str], message: str, tmp_path: Path) -> None:
    images = numbered(tmp_path, ["cat", "dog", "sea_lion"])
    with pytest.raises(DataError, match=message):
        check_labels(images, 3, names)


def test_an_umlaut_of_two_characters_is_the_same_letter(tmp_path: Path) -> None:
    images = numbered(tmp_path, ["a\u0308sp", "bass"])  # as macOS writes it, so that it comes before b
    with pytest.raises(DataError, match="by order they contradict each other: its class 0 is"):
        check_labels(images, 2, ["barsch", "\u00e4sp"])


def test_names_that_are_written_otherwise_at_the_same_place_are_the_same(tmp_path: Path) -> None:
    images = numbered(tmp_path, ["cat", "dog", "sea_lion"])
    check_labels(images, 3, ["Cat", "Dog", "sea lion"])
    assert images.labels == [0, 1, 2]


def test_training_and_test_images_have_the_same_classes(tmp_path: Path) -> None:
    ours, theirs = numbered(tmp_path / "a", ["cat", "dog"]), numbered(tmp_path / "b", ["cat", "hen"])
    check_same_classes(ours, ours)
    with pytest.raises(DataError, match="Only the former has 'dog'; only the latter has 'hen'"):
        check_same_classes(ours, theirs)
