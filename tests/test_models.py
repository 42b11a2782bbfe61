"""Names of labels that a model's configuration gives: used rightly, or refused with both sides."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import write_model

from gplq.errors import ModelError
from gplq.models import load_model


def with_names(folder: Path, names: Any) -> Path:
    write_model(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "label_names": names}))
    return folder


@pytest.mark.parametrize("names", [{"0": "cat", "1": "dog", "2": "hen", "3": "owl"}, ["cat", "dog", "hen", "owl"]])
def test_names_by_number_and_in_a_list(names: Any, tmp_path: Path) -> None:
    assert load_model(str(with_names(tmp_path / "m", names))).label_names == ["cat", "dog", "hen", "owl"]


def test_names_by_number_are_put_in_order(tmp_path: Path) -> None:
    names = {str(index): f"class {index}" for index in (2, 0, 3, 1)}
    assert load_model(str(with_names(tmp_path / "m", names))).label_names == [f"class {index}" for index in range(4)]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["cat", "dog", "hen"], "names 3 labels .* but the classifier has 4 classes"),
        (list("abcde"), "names 5 labels .* but the classifier has 4 classes"),
        ({"1": "a", "2": "b", "3": "c", "4": "d"}, r"has classes \[1, 2, 3, 4\] …, not 0 to 3"),
        ({"cat": 0, "dog": 1, "hen": 2, "owl": 3}, "keys are no class numbers"),
        ([0, 1, 2, 3], "must be a list of strings"),
        (["cat", "dog", "hen\nowl", "pig"], r"the label 'hen\\nowl' is no line of text"),
    ],
)
def test_names_that_do_not_fit_are_refused(names: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=message):
        load_model(str(with_names(tmp_path / "m", names)))


def test_without_a_classifier_names_do_not_matter(tmp_path: Path) -> None:
    assert load_model(str(with_names(tmp_path / "m", ["cat"])), num_classes=0).label_names is None
