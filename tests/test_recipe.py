"""Recipes: what is accepted, and what the errors say."""

from pathlib import Path
from typing import Any

import pytest

from gplq.errors import ConfigError
from gplq.recipe import Recipe, Stage1

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))


def test_round_trip_through_yaml_keeps_every_setting(tmp_path: Path) -> None:
    changes = {"weight_bits": 8, "stage1": {"lr": 1e-5, "max_images": 100}, "stage2": {"rounding": "nearest"}}
    recipe = Recipe.from_dict(changes)
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.to_yaml())
    assert Recipe.from_yaml(path) == recipe != Recipe()


def test_empty_file_is_the_default(tmp_path: Path) -> None:
    path = tmp_path / "empty.yaml"
    path.write_text("# nothing\n")
    assert Recipe.from_yaml(path) == Recipe()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_of_the_repository_loads(path: Path) -> None:
    assert Recipe.from_yaml(path) != Recipe()


def test_repository_has_recipes() -> None:
    assert RECIPES


@pytest.mark.parametrize(
    ("content", "where", "nearest"),
    [
        ({"weight_bit": 4}, "weight_bit", "weight_bits"),
        ({"stage1": {"epoch": 1}}, "stage1.epoch", "epochs"),
        ({"stage2": {"dampening": 0.1}}, "stage2.dampening", "damping"),
        ({"calibration": {"image": 1}}, "calibration.image", "images"),
    ],
)
def test_unknown_key_names_the_nearest(content: dict[str, Any], where: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match=rf"{where}: unknown key; did you mean '{nearest}'\?"):
        Recipe.from_dict(content)


def test_unknown_key_like_no_other_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"stage2\.xyz: unknown key; known keys: granularity, range, "):
        Recipe.from_dict({"stage2": {"xyz": 1}})


@pytest.mark.parametrize(
    ("content", "where"),
    [
        ({"weight_bits": 1}, "weight_bits"),
        ({"weight_bits": 9}, "weight_bits"),
        ({"activation_bits": "four"}, "activation_bits"),
        ({"matmul_bits": 12}, "matmul_bits"),
        ({"matmul_bits": 17}, "matmul_bits"),
        ({"scale_grid": "fp8"}, "scale_grid"),
        ({"stage1": {"lr": 0}}, "stage1.lr"),
        ({"stage1": {"lr": float("nan")}}, "stage1.lr"),
        ({"stage1": {"alpha": float("inf")}}, "stage1.alpha"),
        ({"stage1": {"pca_variance": 1.5}}, "stage1.pca_variance"),
        ({"stage1": []}, "stage1"),
        ({"stage1": None}, "stage1"),
        ({"stage2": {"rounding": "up"}}, "stage2.rounding"),
        ({"calibration": {"percentile": 50}}, "calibration.percentile"),
        ({1: 2}, "1"),
    ],
)
def test_bad_value_is_named(content: dict[Any, Any], where: str) -> None:
    with pytest.raises(ConfigError, match=rf"not a valid recipe:\n  {where}: "):
        Recipe.from_dict(content)


@pytest.mark.parametrize(
    ("stage1", "why"),
    [
        ({"batch_size": 10, "accumulate": 4}, "batch_size 10 is not divisible by accumulate 4"),
        ({"task_weight": 0, "alpha": 0}, "task_weight and alpha are both 0"),
        ({"train_weights": False, "scale_lr": 0}, "train_weights is false and scale_lr 0"),
    ],
)
def test_keys_that_contradict_each_other_are_refused(stage1: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=rf"not a valid recipe:\n  stage1: .*{why}"):
        Recipe.from_dict({"stage1": stage1})


def record_of_before(recipe: Recipe) -> dict[str, Any]:
    """What a checkpoint of before 2026-11-29 says of its recipe: everything that there was then."""
    record = recipe.to_dict()
    del record["matmul_bits"], record["limits"], record["stage2"]["importance"]
    for key in ("rotate", "importance", "centre"):
        del record["calibration"][key]
    return record


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_record_of_before_keeps_its_meaning(bits: int) -> None:
    recipe = Recipe.from_dict({"activation_bits": bits, "stage2": {"rounding": "nearest"}, "seed": 7})
    found = Recipe.from_record(record_of_before(recipe), "here")
    calibration = found.calibration
    assert (calibration.rotate, calibration.importance, calibration.centre) == (False, "none", False)
    assert (found.stage2.importance, found.stage2.rounding, found.seed) == ("none", "nearest", 7)
    assert found.matmul_bits == bits
    # A recipe that someone writes means what recipes mean now.
    now = Recipe.from_dict(record_of_before(recipe))
    assert (now.calibration.rotate, now.calibration.importance, now.calibration.centre) == (True, "gradient", True)
    assert (now.stage2.importance, now.matmul_bits) == ("gradient", 8)


@pytest.mark.parametrize("recipe", [Recipe(), Recipe.from_dict({"matmul_bits": 5, "calibration": {"rotate": False}})])
def test_record_of_today_is_taken_as_it_is(recipe: Recipe) -> None:
    assert Recipe.from_record(recipe.to_dict(), "here") == recipe


@pytest.mark.parametrize("content", [[], None, {"calibration": 3}, {"activation_bits": "four"}, {"stage2": {"x": 1}}])
def test_bad_record_says_where_it_is_from(content: Any) -> None:
    with pytest.raises(ConfigError, match=r"the recipe in old\.pt"):
        Recipe.from_record(content, "the recipe in old.pt")


def test_all_mistakes_are_listed_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        Recipe.from_dict({"weight_bits": 99, "stage1": {"lr": -1}, "extra": 0})
    assert len(str(caught.value).splitlines()) == 4


@pytest.mark.parametrize("content", ["a: [1", "- 1\n- 2\n", "42", "a: b: c", "!!python/object/apply:os.system [ls]"])
def test_file_that_is_no_yaml_mapping_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=r"bad\.yaml"):
        Recipe.from_yaml(path)


def test_missing_folder_or_binary_recipe_is_a_config_error(tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "missing.yaml", tmp_path, tmp_path / "binary.yaml"):
        with pytest.raises(ConfigError, match=str(path)):
            Recipe.from_yaml(path)


@pytest.mark.parametrize(
    ("batch_size", "expected"), [(8, 1e-6), (16, 1e-6), (33, 1e-6), (64, 2.5e-6), (127, 2.5e-6), (512, 5e-6)]
)
def test_learning_rate_follows_table_9(batch_size: int, expected: float) -> None:
    assert Stage1(batch_size=batch_size).learning_rate() == expected
    assert Stage1(batch_size=batch_size, lr=0.5).learning_rate() == 0.5
