"""What is checked: files, the checkpoint that they were made from, the float model that it was made from."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import safetensors.torch
import torch
from check_fixture import THRESHOLDS
from conftest import Quantised

from gplq.checkpoint import Checkpoint, at_image_size, load_checkpoint
from gplq.errors import CheckpointError, UsageError
from gplq.files import sha256
from gplq.models import FloatModel
from gplq_export.check.gates import Judge
from gplq_export.check.report import Gate
from gplq_export.check.subject import Files, describe, find_checkpoint, find_float_model, judge_files
from gplq_export.export import export


@pytest.fixture
def dist(exported: Path, tmp_path: Path) -> Path:
    """A copy of the export, to be changed."""
    shutil.copytree(exported, tmp_path / "dist")
    return tmp_path / "dist"


def altered_manifest(dist: Path, change: Any) -> None:
    content = json.loads((dist / "manifest.json").read_text())
    change(content)
    (dist / "manifest.json").write_text(json.dumps(content))


def gates(files: Files, checkpoint: Checkpoint, *, trust: bool = False) -> dict[str, Gate]:
    judge = Judge(THRESHOLDS)
    judge_files(files, checkpoint, judge, trust_engine=trust)
    return {gate.metric: gate for gate in judge.gates}


# Files


def test_files_of_a_folder_are_known_by_kind(dist: Path) -> None:
    files = Files.of([dist])
    assert {kind: path.name for kind, path in files.paths.items()} == {
        kind: f"model.{kind}.onnx" for kind in ("int4", "cpu", "fp32", "fp16")
    }
    assert files.manifest is not None
    assert files.folder == dist


def test_files_may_be_named_and_the_manifest_is_found_beside_them(dist: Path, tmp_path: Path) -> None:
    files = Files.of([dist / "model.cpu.onnx", dist / "model.int4.onnx"])
    assert list(files.paths) == ["cpu", "int4"]
    assert files.manifest is not None
    # What a file is for is in the file, not in its name.
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(dist / "model.cpu.onnx", alone / "deployed.onnx")
    found = Files.of([alone / "deployed.onnx"])
    assert (list(found.paths), found.manifest, found.folder) == (["cpu"], None, alone)


def test_what_is_no_export_is_refused(dist: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is no folder that gplq-export wrote"):
        Files.of([tmp_path])
    shutil.copy(dist / "model.int4.onnx", tmp_path)
    with pytest.raises(UsageError, match="must lie in one folder"):
        Files.of([dist / "model.cpu.onnx", tmp_path / "model.int4.onnx"])
    with pytest.raises(UsageError, match=r"gone\.onnx does not exist"):
        Files.of([dist / "gone.onnx"])
    with pytest.raises(UsageError, match="neither ONNX files nor plans"):
        Files.of([dist / "model.pt"])
    model = ir.load(dist / "model.fp32.onnx")
    del model.metadata_props["gplq.target"]
    ir.save(model, dist / "other.onnx")
    with pytest.raises(UsageError, match=r"other\.onnx was not written by gplq-export"):
        Files.of([dist / "other.onnx"])
    (dist / "model.cpu.onnx").unlink()
    with pytest.raises(UsageError, match=r"model\.cpu\.onnx does not exist\. Export again"):
        Files.of([dist])


# The checkpoint


def test_checkpoint_lies_in_the_folder_or_is_named(dist: Path, quantised: Quantised, checkpoint: Checkpoint) -> None:
    files = Files.of([dist])
    assert find_checkpoint(files, None).sha256 == checkpoint.sha256
    (dist / "model.pt").unlink()
    with pytest.raises(UsageError, match=r"has no model\.pt: name the checkpoint with --checkpoint"):
        find_checkpoint(files, None)
    assert find_checkpoint(files, quantised.path).sha256 == checkpoint.sha256
    with pytest.raises(CheckpointError):
        find_checkpoint(files, dist / "manifest.json")


def test_checkpoint_is_brought_to_the_images_of_the_export(checkpoint: Checkpoint, tmp_path: Path) -> None:
    export(at_image_size(checkpoint, 24), tmp_path / "dist", say=lambda _: None)
    files = Files.of([tmp_path / "dist"])
    found = find_checkpoint(files, None)
    assert found.preprocessing.input_size == (1, 24, 24)
    assert {gate.status for gate in gates(files, found).values()} == {"passed"}
    altered_manifest(tmp_path / "dist", lambda content: content["input"].pop("shape"))
    with pytest.raises(UsageError, match="does not say the shape of the images"):
        find_checkpoint(Files.of([tmp_path / "dist"]), None)


# The float model


def test_float_model_is_found_where_it_was(checkpoint: Checkpoint, model_folder: Path, probe: torch.Tensor) -> None:
    found = find_float_model(checkpoint)
    assert found is not None
    assert found.source == str(model_folder)
    with torch.no_grad():
        assert not torch.equal(found.model(probe), checkpoint.model(probe))
    named = find_float_model(checkpoint, str(model_folder))
    assert named is not None and named.sha256 == found.sha256


@pytest.mark.parametrize("source", ["/nowhere/model", "test_vit.r160_in1k", ""])
def test_float_model_that_is_gone_or_would_be_downloaded_is_not_looked_for(
    checkpoint: Checkpoint, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("it was asked for")

    monkeypatch.setattr("timm.create_model", never)
    moved = replace(checkpoint, provenance={**checkpoint.provenance, "source": source})
    assert find_float_model(moved) is None


@pytest.fixture
def retrained(model_folder: Path, tmp_path: Path) -> Path:
    """The same model with other weights."""
    folder = tmp_path / "retrained"
    shutil.copytree(model_folder, folder)
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    weights["head.bias"] += 1
    safetensors.torch.save_file(weights, folder / "model.safetensors")
    return folder


def test_float_model_with_other_weights_is_not_taken_and_refused_if_given(
    checkpoint: Checkpoint, retrained: Path
) -> None:
    moved = replace(checkpoint, provenance={**checkpoint.provenance, "source": str(retrained)})
    assert find_float_model(moved) is None
    with pytest.raises(UsageError, match="retrained: the checkpoint was made from other weights"):
        find_float_model(checkpoint, str(retrained))


def test_float_model_for_other_images_is_not_taken(checkpoint: Checkpoint, model_folder: Path) -> None:
    larger = at_image_size(checkpoint, 24)
    assert find_float_model(larger) is None
    with pytest.raises(UsageError, match="or for other images"):
        find_float_model(larger, str(model_folder))


def test_float_model_that_cannot_be_loaded_is_an_error_only_if_given(checkpoint: Checkpoint, retrained: Path) -> None:
    (retrained / "model.safetensors").write_bytes(b"damaged")
    moved = replace(checkpoint, provenance={**checkpoint.provenance, "source": str(retrained)})
    assert find_float_model(moved) is None
    with pytest.raises(UsageError, match="cannot be loaded safely"):
        find_float_model(checkpoint, str(retrained))


# The chain of hashes


def test_sound_export_is_a_whole_chain(dist: Path, checkpoint: Checkpoint) -> None:
    files = Files.of([dist])
    found = gates(files, checkpoint)
    assert list(found) == ["checkpoint", *(f"hash.{kind}" for kind in files.paths)]
    assert {gate.status for gate in found.values()} == {"passed"}
    assert files.broken == {}
    subject = describe(files, checkpoint)
    assert subject.checkpoint_sha256 == checkpoint.sha256
    assert subject.files.keys() == {path.name for path in files.paths.values()}
    assert str(checkpoint.provenance["source_sha256"]) in subject.chain[0]
    assert checkpoint.sha256 in subject.chain[1]
    assert len(subject.chain) == 2 + 4
    assert sum(subject.bytes.values()) == (dist / "model.int4.onnx").stat().st_size


def test_another_checkpoint_breaks_the_chain(dist: Path, altered: Any) -> None:
    other = load_checkpoint(altered(lambda content: content["provenance"].update(note="another")))
    files = Files.of([dist])
    assert {gate.status for gate in gates(files, other).values()} == {"failed"}
    assert files.broken.keys() == files.paths.keys()


def plan(dist: Path, *, listed: bool, built_from: str | None) -> Files:
    """A plan beside the files; ``built_from``: what the manifest says of the ONNX file."""
    (dist / "model.fp16.plan").write_bytes(b"plan")
    if listed:
        digest = sha256(dist / "model.fp16.plan")

        def add(content: dict[str, Any]) -> None:
            content["files"]["model.fp16.plan"] = {"bytes": 4, "sha256": digest}
            content["engines"]["fp16"] = {"onnx_sha256": built_from or content["files"]["model.fp16.onnx"]["sha256"]}

        altered_manifest(dist, add)
    return Files.of([dist / "model.fp16.plan"])


def test_plan_that_a_manifest_vouches_for_is_whole(dist: Path, checkpoint: Checkpoint) -> None:
    files = plan(dist, listed=True, built_from=None)
    assert gates(files, checkpoint)["hash.fp16.plan"].status == "passed"
    (dist / "model.fp16.plan").write_bytes(b"nalp")
    assert gates(files, checkpoint)["hash.fp16.plan"].status == "failed"
    assert "fp16.plan" in files.broken
    files.broken.clear()
    assert gates(files, checkpoint, trust=True)["hash.fp16.plan"].status == "passed"


def test_stale_plan_is_named(dist: Path, checkpoint: Checkpoint) -> None:
    gate = gates(plan(dist, listed=True, built_from="0" * 64), checkpoint)["hash.fp16.plan"]
    assert gate.status == "failed"
    assert "is stale: it was built from another model.fp16.onnx" in gate.sentence


def test_plan_without_a_manifest_is_run_only_if_trusted(dist: Path, checkpoint: Checkpoint, tmp_path: Path) -> None:
    files = plan(dist, listed=False, built_from=None)
    assert "is not in the manifest" in gates(files, checkpoint)["hash.fp16.plan"].sentence
    (dist / "manifest.json").unlink()
    files = Files.of([dist / "model.fp16.plan"])
    gate = gates(files, checkpoint)["hash.fp16.plan"]
    assert gate.status == "failed"
    assert "--trust-engine" in gate.sentence
    assert gates(Files.of([dist / "model.fp16.plan"]), checkpoint, trust=True)["hash.fp16.plan"].status == "passed"


def test_float_model_is_the_one_of_several_in_a_file_that_was_quantised(
    checkpoint: Checkpoint, float_model: FloatModel, tmp_path: Path
) -> None:
    raw = float_model.model.state_dict()
    averaged = {name: tensor * 0.5 for name, tensor in raw.items()}
    path = tmp_path / "training.ckpt"
    torch.save({"state_dict": raw, "state_dict_ema": averaged}, path)
    origin = {"source": str(path), "source_sha256": sha256(path)}
    for key, head in (("state_dict", raw), (None, averaged)):
        moved = replace(checkpoint, provenance={**checkpoint.provenance, **origin, "source_key": key})
        found = find_float_model(moved)
        assert found is not None
        assert torch.equal(found.model.state_dict()["head.weight"], head["head.weight"])
