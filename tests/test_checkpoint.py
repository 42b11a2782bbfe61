"""``model.pt``: what comes back, and what is refused."""

import os
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
from conftest import ARCHITECTURE, MODEL_ARGS, Quantised, fast_recipe, rough
from torch import Tensor

import gplq
from gplq.checkpoint import (
    Checkpoint,
    frozen_quantizers,
    integer_linears,
    load_checkpoint,
    read_plain,
    save_checkpoint,
)
from gplq.errors import CheckpointError, UsageError
from gplq.files import sha256
from gplq.models import FloatModel, ModelSpec
from gplq.pipeline import quantize

Alter = Callable[[Callable[[dict[str, Any]], None]], Path]


def test_pipeline_reports_every_accuracy_and_leaves_no_state(quantised: Quantised) -> None:
    assert list(quantised.accuracies) == ["FP32", "W32A4", "W4A4"]
    assert all(accuracy.n == 64 for accuracy in quantised.accuracies.values())
    assert sorted(path.name for path in quantised.path.parent.iterdir()) == ["model.pt"]


def test_saving_and_loading_keep_logits_bit_for_bit(quantised: Quantised, probe: Tensor, tmp_path: Path) -> None:
    first = load_checkpoint(quantised.path)
    save_checkpoint(first, tmp_path / "again.pt")
    with torch.no_grad():
        assert torch.equal(first.model(probe), gplq.load(tmp_path / "again.pt")(probe))
    assert first.sha256 == sha256(quantised.path)


def test_loaded_model_is_the_one_that_was_measured(quantised: Quantised, npz_file: Path) -> None:
    from gplq.data import open_images
    from gplq.evaluate import top1

    checkpoint: Checkpoint = load_checkpoint(quantised.path)
    images = open_images(npz_file, "test", checkpoint.preprocessing)
    assert top1(checkpoint.model, images, "test") == quantised.accuracies["W4A4"]


def test_file_is_plain_data_with_its_history(quantised: Quantised, npz_file: Path, model_folder: Path) -> None:
    content = torch.load(quantised.path, weights_only=True)
    assert (content["schema"], content["schema_version"]) == ("gplq.checkpoint", [1, 1])
    provenance = content["provenance"]
    assert provenance["source_sha256"] == sha256(model_folder / "model.safetensors")
    assert provenance["train_data"] == {
        "path": str(npz_file),
        "sha256": f"{sha256(npz_file)}/train_images",
        "images": 128,
    }
    assert list(provenance["top1"]) == ["FP32", "W32A4", "W4A4"]
    assert content["label_names"] == ["bottom-left", "bottom-right", "top-left", "top-right"]


def test_four_bit_codes_take_half_a_byte(quantised: Quantised) -> None:
    content = torch.load(quantised.path, weights_only=True)
    linears = integer_linears(load_checkpoint(quantised.path).model)
    assert content["linears"].keys() == linears.keys()
    sizes = {4: 0, 8: 0}
    for name, entry in content["linears"].items():
        sizes[entry["bits"]] += entry["codes"].untyped_storage().nbytes()
        if entry["bits"] == 4:
            np.testing.assert_array_equal(
                reference.unpack_int4(bytes(entry["codes"].tolist()), linears[name].codes.numel()),
                linears[name].codes.flatten().numpy(),
            )
    assert sizes == {4: 2 * 12 * 64 * 64 // 2, 8: 64 * 16 + 4 * 64}


def test_every_part_of_the_model_is_frozen(quantised: Quantised) -> None:
    model = load_checkpoint(quantised.path).model
    assert not model.training
    assert len(frozen_quantizers(model)) == 18
    assert len(integer_linears(model)) == 14


def set_at(*path: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = value

    return change


def delete_at(*path: Any) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        for key in path[:-1]:
            content = content[key]
        del content[path[-1]]

    return change


def hide_size(content: dict[str, Any]) -> None:
    """Declare a large model and back it with a tensor of as many elements that all lie on one number."""
    content["model"]["model_args"]["embed_dim"] = 8192
    content["floats"]["norm.weight"] = torch.zeros(1).expand(2 * 12 * 8192**2)


Q, L = "blocks.0.attn.input_quantizer", "blocks.0.mlp.fc1.linear"
ALTERATIONS = {
    "other-schema": (set_at("schema", value="something"), "is not a gplq checkpoint"),
    "newer-schema": (set_at("schema_version", value=[2, 0]), r"schema version 2\.0.*Upgrade"),
    "no-schema-version": (delete_at("schema_version"), "schema version"),
    "schema-version-text": (set_at("schema_version", value="1.0"), "schema version"),
    "no-recipe": (delete_at("recipe"), "recipe"),
    "bad-recipe": (set_at("recipe", "weight_bits", value=99), "weight_bits"),
    "unknown-architecture": (set_at("model", "architecture", value="vit_evil"), "vit_evil"),
    "hub-architecture": (set_at("model", "architecture", value="hf-hub:evil/model"), "hf-hub"),
    "other-architecture": (set_at("model", "architecture", value="resnet18"), "resnet18"),
    "code-by-checkpoint-path": (set_at("model", "model_args", "checkpoint_path", value="/x.pth"), "checkpoint_path"),
    "huge-width": (set_at("model", "model_args", "embed_dim", value=100_000), "parameters"),
    "huge-width-hidden": (hide_size, "parameters"),
    "huge-depth": (set_at("model", "model_args", "depth", value=10**9), "depth"),
    "huge-classes": (set_at("model", "num_classes", value=10**9), "parameters"),
    "zero-heads": (set_at("model", "model_args", "num_heads", value=0), "num_heads"),
    "missing-float": (delete_at("floats", "norm.weight"), r"norm\.weight"),
    "extra-float": (set_at("floats", "extra", value=torch.zeros(1)), "extra"),
    "float-of-other-shape": (set_at("floats", "norm.weight", value=torch.zeros(63)), r"norm\.weight"),
    "missing-quantizer": (delete_at("quantizers", Q), "raw_scale"),
    "extra-quantizer": (
        set_at("quantizers", "norm", value={"scale": torch.ones(()), "pre_scale": None, "bits": 4, "signed": True}),
        "no quantiser norm",
    ),
    "zero-scale": (set_at("quantizers", Q, "scale", value=torch.tensor(0.0)), "scale of"),
    "nan-scale": (set_at("quantizers", Q, "scale", value=torch.tensor(torch.nan)), "scale of"),
    "vector-scale": (set_at("quantizers", Q, "scale", value=torch.ones(64)), "scale of"),
    "pre-scale-of-other-shape": (set_at("quantizers", Q, "pre_scale", value=torch.ones(3, 3)), "pre_scale"),
    "bits-of-no-grid": (set_at("quantizers", Q, "bits", value=77), "bits"),
    "missing-linear": (delete_at("linears", L), "parameters|fc1"),
    "codes-too-few": (set_at("linears", L, "codes", value=torch.zeros(9, dtype=torch.uint8)), "codes|parameters"),
    "codes-of-other-type": (set_at("linears", L, "codes", value=torch.zeros(8192)), "codes"),
    "linear-of-other-shape": (set_at("linears", L, "shape", value=[64, 256]), "shape"),
    "weight-scale-of-other-shape": (set_at("linears", L, "scale", value=torch.ones(3)), "scale of"),
    "negative-weight-scale": (set_at("linears", L, "scale", value=-torch.ones(256)), "scale of"),
    "bias-of-other-shape": (set_at("linears", L, "bias", value=torch.ones(3)), "bias"),
    "linear-bits-text": (set_at("linears", L, "bits", value="4"), "altered"),
    "not-a-dict": (set_at("linears", value=[]), "altered"),
    "preprocessing-gone": (set_at("preprocessing", value={}), "input_size"),
}


@pytest.mark.parametrize("name", ALTERATIONS)
def test_altered_file_is_refused(name: str, altered: Alter) -> None:
    change, message = ALTERATIONS[name]
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(altered(change))
    assert "altered.pt" in str(caught.value)


def test_minor_version_that_is_newer_still_loads(altered: Alter) -> None:
    assert load_checkpoint(altered(set_at("schema_version", value=[1, 7]))).spec.num_classes == 4


@pytest.fixture(scope="module")
def plain_file(float_model: FloatModel, npz_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Quantised as before 2026-11-29."""
    path = tmp_path_factory.mktemp("plain") / "model.pt"
    recipe = rough(fast_recipe(enabled=False))
    recipe = recipe.model_copy(update={"stage2": recipe.stage2.model_copy(update={"importance": "none"})})
    quantize(float_model, npz_file, path, recipe, say=lambda _: None)
    return path


def test_file_of_before_the_new_settings_still_loads(plain_file: Path, probe: Tensor, tmp_path: Path) -> None:
    content = torch.load(plain_file, weights_only=True)
    del content["recipe"]["matmul_bits"], content["recipe"]["limits"], content["recipe"]["stage2"]["importance"]
    for key in ("rotate", "importance", "centre"):
        del content["recipe"]["calibration"][key]
    torch.save(content, tmp_path / "old.pt")
    old, new = load_checkpoint(tmp_path / "old.pt"), load_checkpoint(plain_file)
    assert old.recipe == new.recipe
    assert (old.recipe.matmul_bits, old.recipe.calibration.rotate) == (4, False)
    assert {quantizer.bits for quantizer in frozen_quantizers(old.model).values()} == {4, 7, 8}
    assert {frozen_quantizers(old.model)[f"blocks.0.attn.qk.{side}_quantizer"].bits for side in "ab"} == {4}
    with torch.no_grad():
        assert torch.equal(old.model(probe), new.model(probe))


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_truncated_file_is_refused(share: float, quantised: Quantised, tmp_path: Path) -> None:
    whole = quantised.path.read_bytes()
    path = tmp_path / "half.pt"
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(CheckpointError, match=r"half\.pt"):
        load_checkpoint(path)


class Bomb:
    """Unpickling it makes a folder."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("form", ["pickle", "torch", "old-torch"])
def test_pickle_that_runs_code_is_refused(form: str, tmp_path: Path) -> None:
    path, mark = tmp_path / "bomb.pt", tmp_path / "boom"
    if form == "pickle":
        path.write_bytes(pickle.dumps({"schema": Bomb(mark)}))
    else:
        torch.save({"schema": Bomb(mark)}, path, _use_new_zipfile_serialization=form == "torch")
    with pytest.raises(CheckpointError, match=r"bomb\.pt"):
        load_checkpoint(path)
    assert not mark.exists()


def test_compressed_zip_is_refused(quantised: Quantised, tmp_path: Path) -> None:
    path = tmp_path / "small.pt"
    with zipfile.ZipFile(quantised.path) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for info in old.infolist():
            new.writestr(info.filename, old.read(info))
    with pytest.raises(CheckpointError, match="compressed"):
        read_plain(path)


def test_missing_file_and_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.pt"):
        with pytest.raises(CheckpointError, match="does not exist"):
            load_checkpoint(path)


def test_other_content_is_refused(tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match="not a gplq checkpoint"):
        load_checkpoint(tmp_path / "list.pt")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (ModelSpec("mine", {}, 4), "timm .* has no model 'mine'"),
        (ModelSpec(ARCHITECTURE, {**MODEL_ARGS, "depth": 3}, 4), r"the quantised layers are not those of .*blocks\.2"),
    ],
)
def test_what_could_not_be_read_again_is_not_saved(
    checkpoint: gplq.Checkpoint, spec: ModelSpec, message: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        save_checkpoint(replace(checkpoint, spec=spec), tmp_path / "model.pt")
    assert list(tmp_path.iterdir()) == []
