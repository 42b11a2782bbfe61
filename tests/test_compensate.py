"""A compensated checkpoint: stored, loaded, refused when altered, exported."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import fast_recipe
from torch import Tensor

from gplq.checkpoint import integer_linears, load_checkpoint
from gplq.compensate import compensations
from gplq.errors import CheckpointError
from gplq.models import FloatModel
from gplq.pipeline import quantize
from gplq.recipe import Recipe
from gplq_export.check.report import read_report
from gplq_export.cli import main

WEIGHT, BIAS = "blocks.1.compensation.weight", "blocks.1.compensation.bias"


@pytest.fixture(scope="module")
def compensated(float_model: FloatModel, npz_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("compensated") / "model.pt"
    content = fast_recipe().to_dict()
    content["stage1"] |= {"enabled": False}
    # Rounding to nearest leaves enough to compensate in both blocks.
    content["stage2"] |= {"compensation": "qwt", "rounding": "nearest", "ridge": 0.1}
    quantize(float_model, npz_file, path, Recipe.from_dict(content), say=lambda _: None)
    return path


def test_checkpoint_keeps_compensations(compensated: Path, probe: Tensor) -> None:
    content = torch.load(compensated, weights_only=True)
    assert content["compensated"] == ["blocks.0", "blocks.1"]
    assert content["floats"][WEIGHT].dtype == torch.float16
    reports = content["provenance"]["stage2"]
    assert [report["name"] for report in reports] == ["blocks.0", "blocks.1"]
    assert all(entry["kept"] for report in reports for entry in report["compensations"])
    model = load_checkpoint(compensated).model
    assert list(compensations(model)) == ["blocks.0", "blocks.1"]
    # By hand: the block's own layers, then its input times the matrix.
    found: list[Tensor] = []
    handles = [
        model.get_submodule("blocks.0").register_forward_hook(lambda _, args, y: found.extend([args[0], y])),
        model.get_submodule("blocks.1").register_forward_pre_hook(lambda _, args: found.append(args[0])),
    ]
    with torch.no_grad():
        logits = model(probe)
        x, y, following = found
        bare = copy.deepcopy(model.get_submodule("blocks.0"))
        bare.__class__ = type(bare).__bases__[0]
        floats = content["floats"]
        weight, bias = (floats[f"blocks.0.compensation.{name}"].float() for name in ("weight", "bias"))
        torch.testing.assert_close(y, bare(x) + torch.nn.functional.linear(x, weight, bias), rtol=0, atol=0)
        assert torch.equal(y, following)
        for handle in handles:
            handle.remove()
        assert torch.equal(copy.deepcopy(model)(probe), logits)
    assert len(integer_linears(model)) == 14


def change_float(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Any]], None]:
    def alter(content: dict[str, Any]) -> None:
        content["floats"][name] = change(content["floats"][name])

    return alter


def hide_size(content: dict[str, Any]) -> None:
    content["floats"][WEIGHT] = torch.zeros(1, dtype=torch.float16).expand(100_000, 100_000)
    content["floats"][BIAS] = torch.zeros(1, dtype=torch.float16).expand(100_000)


ALTERATIONS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "not-listed": (lambda content: content["compensated"].pop(), "compensation|parameters"),
    "no-list": (lambda content: content.pop("compensated"), "compensation|parameters"),
    "tensor-gone": (lambda content: content["floats"].pop(BIAS), "compensation"),
    "listed-twice": (lambda content: content["compensated"].append("blocks.1"), "no block"),
    "no-block": (lambda content: content["compensated"].append("norm"), "norm"),
    "unknown-block": (lambda content: content["compensated"].append("blocks.9"), r"blocks\.9"),
    "list-of-numbers": (lambda content: content.update(compensated=[3]), "altered"),
    "no-list-at-all": (lambda content: content.update(compensated=7), "altered"),
    "other-shape": (change_float(WEIGHT, lambda weight: weight[:, :-1]), "does not fit"),
    "bias-of-other-shape": (change_float(BIAS, lambda bias: bias[:-1]), "does not fit"),
    "not-half": (change_float(WEIGHT, Tensor.float), "not FP16"),
    "not-finite": (change_float(BIAS, lambda bias: bias / 0), "not finite"),
    "huge-width-hidden": (hide_size, "parameters"),
}


@pytest.mark.parametrize("name", ALTERATIONS)
def test_altered_compensation_is_refused(name: str, compensated: Path, tmp_path: Path) -> None:
    change, message = ALTERATIONS[name]
    content = torch.load(compensated, weights_only=True)
    change(content)
    torch.save(content, tmp_path / "altered.pt")
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path / "altered.pt")


def test_file_from_before_compensations_still_loads(quantised: Any, tmp_path: Path, probe: Tensor) -> None:
    content = torch.load(quantised.path, weights_only=True)
    assert content.pop("compensated") == []
    content["schema_version"] = [1, 0]
    torch.save(content, tmp_path / "old.pt")
    with torch.no_grad():
        expected = load_checkpoint(quantised.path).model(probe)
        assert torch.equal(load_checkpoint(tmp_path / "old.pt").model(probe), expected)


def test_compensated_checkpoint_exports_with_parity(compensated: Path, npz_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "dist"
    assert main([str(compensated), "--int4", "--out", str(out), "--data", str(npz_file)]) == 0
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["problems"] == []
    report = read_report(out / "reports" / "parity.json")
    assert (report.failed, report.data.images) == ([], 64)
    pair = report.pair("int4")
    assert pair is not None and pair.skipped is None
