"""Free-running: streamed, interrupted in every way, taken up again; and what is read of a whole check."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from check_fixture import check_graph, replaced
from torch import Tensor

from gplq.checkpoint import Checkpoint, frozen_quantizers
from gplq.data import ImageSet, open_images
from gplq.errors import UsageError
from gplq_export.check import free
from gplq_export.check.capture import AnotherSummationOrder
from gplq_export.check.chain import Settings, check
from gplq_export.check.free import Comparison, Member, StateFile, compare, stream
from gplq_export.check.members import array_member, torch_member
from gplq_export.check.report import Report, read_report
from gplq_export.check.subject import Files
from gplq_export.lowering import lower
from gplq_export.runtimes import onnxruntime_reference
from gplq_export.targets import Cpu, Int4

SIZE = 8


@pytest.fixture(scope="module")
def images(checkpoint: Checkpoint, npz_file: Path) -> ImageSet:
    return open_images(npz_file, "test", checkpoint.preprocessing)


@pytest.fixture(scope="module")
def members(checkpoint: Checkpoint, dialect: ir.Model) -> dict[str, Member]:
    run = onnxruntime_reference(ir.to_proto(lower(dialect, Int4(), {})).SerializeToString())
    return {
        "torch": torch_member(checkpoint.model),
        "other": torch_member(checkpoint.model, AnotherSummationOrder),
        "smooth": torch_member(checkpoint.model, rounding=False),
        "onnx": array_member(run, "images"),
    }


def comparisons(checkpoint: Checkpoint) -> dict[str, Comparison]:
    return {
        "onnx": compare("torch", "onnx", classifies=True),
        "floor": compare("torch", "other", classifies=True, codes=frozen_quantizers(checkpoint.model)),
        "rounding": compare("smooth", "torch", classifies=True, units=["blocks.0", "blocks.1"]),
    }


class Batches:
    """Of an image set; the one from image number ``bad`` on fails."""

    def __init__(self, images: ImageSet, bad: int | None = None) -> None:
        self.images, self.bad, self.starts = images, bad, [-1]

    def __call__(self, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        self.starts.append(start)
        for first in range(start, len(self.images), SIZE):
            if first == self.bad:
                raise RuntimeError("the machine went down")
            rows = range(first, min(first + SIZE, len(self.images)))
            found = [self.images[row] for row in rows]
            yield torch.stack([x for x, _ in found]), torch.tensor([label for _, label in found])


def counted(table: dict[str, Comparison]) -> dict[str, np.ndarray]:
    return {
        f"{name}.{type(part).__name__}.{key}": array
        for name, each in table.items()
        for part in each.parts
        for key, array in part.state().items()
    }


def test_members_see_what_the_networks_say(checkpoint: Checkpoint, images: ImageSet, members: Any) -> None:
    found = comparisons(checkpoint)
    stream(members, found, Batches(images), len(images), "test")
    inputs = torch.stack([images[row][0] for row in range(64)])
    labels = torch.tensor(images.labels)
    with torch.inference_mode():
        expected = [checkpoint.model(part) for part in inputs.split(SIZE)]
    top = found["onnx"].outputs.top("reference", 4)
    assert top is not None
    assert top.top1.value == pytest.approx(100 * float((torch.cat(expected).argmax(1) == labels).float().mean()))
    assert found["onnx"].outputs.images == found["floor"].outputs.images == 64
    assert sum(found["floor"].codes.total) == 64 * (16 * 16 + 2 * (6 * 17 * 64 + 2 * 17 * 17 + 17 * 256) + 64)
    assert [5 < (layer.sqnr_db or 0) < 60 for layer in found["rounding"].units.layers()] == [True, True]


def test_only_members_that_are_compared_run(checkpoint: Checkpoint, images: ImageSet, members: Any) -> None:
    def never(_: Tensor) -> Any:
        raise AssertionError

    found = {"floor": compare("torch", "other", classifies=True)}
    stream({**members, "onnx": never}, found, Batches(images), 64, "test")
    assert found["floor"].outputs.images == 64


@pytest.mark.parametrize("bad", [0, 8, 40, 56])
def test_interrupted_stream_goes_on_exactly(
    bad: int, checkpoint: Checkpoint, images: ImageSet, members: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(free, "_SAVE_SECONDS", -1.0)
    whole, before, after = (comparisons(checkpoint) for _ in range(3))
    stream(members, whole, Batches(images), 64, "test")
    path, said = tmp_path / "new" / ".check.npz", []
    with pytest.raises(RuntimeError, match="went down"):
        stream(members, before, Batches(images, bad), 64, "test", StateFile(path, "same", said.append))
    assert path.exists() == (bad > 0)
    assert said == []
    batches = Batches(images)
    stream(members, after, batches, 64, "test", StateFile(path, "same", said.append))
    assert batches.starts[-1] == bad
    assert said == ([f"going on at image {bad}, where an earlier check was interrupted"] if bad else [])
    expected, found = counted(whole), counted(after)
    assert expected.keys() == found.keys()
    assert [key for key in expected if not np.array_equal(expected[key], found[key])] == []
    # Complete: once more, it has nothing to do.
    again, batches = comparisons(checkpoint), Batches(images)
    stream(members, again, batches, 64, "test", StateFile(path, "same", said.append))
    assert batches.starts == [-1]
    assert [key for key in expected if not np.array_equal(expected[key], counted(again)[key])] == []


def saved(checkpoint: Checkpoint, images: ImageSet, members: Any, path: Path) -> None:
    state = StateFile(path, "same", print)
    stream(members, comparisons(checkpoint), Batches(images), 64, "test", state)
    assert path.exists()


def test_state_is_not_written_all_the_time(
    checkpoint: Checkpoint, images: ImageSet, members: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[int] = []
    monkeypatch.setattr(StateFile, "save", lambda _, __, done: written.append(done))
    state = StateFile(tmp_path / "x", "same", print)
    stream(members, comparisons(checkpoint), Batches(images), 64, "test", state)
    assert written == [64]


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "one-array", "array-gone", "other", "pickle", "none"])
def test_damaged_or_foreign_state_is_not_used(
    damage: str, checkpoint: Checkpoint, images: ImageSet, members: Any, tmp_path: Path
) -> None:
    path, said = tmp_path / ".check.npz", []
    saved(checkpoint, images, members, path)
    fingerprint = "same"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-300])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "text":
        path.write_text("hello")
    elif damage == "one-array":
        with path.open("wb") as file:
            np.save(file, np.zeros(3))
    elif damage in ("array-gone", "pickle"):
        with np.load(path) as stored:
            arrays = dict(stored)
        gone = next(name for name in arrays if name.endswith("/total"))
        arrays[gone] = np.array([{}], object)
        if damage == "array-gone":
            del arrays[gone]
        np.savez(path, **arrays)  # type: ignore[arg-type]
    elif damage == "other":
        fingerprint = "another checkpoint"
    else:
        path.unlink()
    found, batches = comparisons(checkpoint), Batches(images)
    stream(members, found, batches, 64, "test", StateFile(path, fingerprint, said.append))
    assert batches.starts[-1] == 0
    assert found["onnx"].outputs.images == 64
    expected = [] if damage in ("other", "none") else [f"{path} cannot be read: starting anew"]
    assert said == expected


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to read-only folders")
def test_state_that_cannot_be_written_is_a_usage_error(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UsageError, match="cannot write"):
        StateFile(tmp_path / "x", "same", print).save({}, 0)


def test_state_in_a_place_that_is_a_file_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot write"):
        StateFile(tmp_path / "file" / "x", "same", print).save({}, 0)


# Whole checks

PROGRAM = """
import sys, time
from pathlib import Path
from gplq.checkpoint import load_checkpoint
from gplq.data import open_images
from gplq_export.check import free
from gplq_export.check.chain import Settings, check
from gplq_export.check.subject import Files
import torch

torch.set_num_threads(1)
free._SAVE_SECONDS = -1.0
save = free.StateFile.save

def slowly(*arguments):
    save(*arguments)
    time.sleep(0.5)

free.StateFile.save = slowly
dist, data, state = map(Path, sys.argv[1:])
checkpoint = load_checkpoint(dist / "model.pt")
images = open_images(data, "test", checkpoint.preprocessing)
check(checkpoint, Files.of([dist]), images, Settings(batch_size=8, state=state))
"""


def numbers(report: Report) -> dict[str, Any]:
    return report.model_dump(include={"gates", "pairs", "data", "subject"})


def test_killed_check_goes_on_and_finds_the_same_numbers(
    exported: Path, checkpoint: Checkpoint, npz_file: Path, tmp_path: Path
) -> None:
    """Killed without any warning in the middle of the images; what is left is a state that is whole."""
    images = open_images(npz_file, "test", checkpoint.preprocessing)
    state = tmp_path / ".check.npz"

    def run(where: Path | None, said: list[str]) -> Report:
        settings = Settings(batch_size=8, state=where)
        return check(checkpoint, Files.of([exported]), images, settings, say=said.append)

    expected = run(None, [])
    assert expected.failed == []
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, tmp_path / "program.py", exported, npz_file, state]
    with subprocess.Popen([str(part) for part in command], stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 120
        while not state.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.7)  # some batches more
        process.send_signal(signal.SIGKILL)
        error = process.communicate(timeout=60)[1]
    assert process.returncode == -9, error
    with np.load(state) as stored:
        done = int(stored["done"])
    assert 0 < done < 64

    said: list[str] = []
    found = run(state, said)
    assert f"going on at image {done}, where an earlier check was interrupted" in said
    assert numbers(found) == numbers(expected)
    assert list(tmp_path.glob(".check*")) == []  # the check is complete


def test_state_of_other_images_is_not_taken_up(exported: Path, checkpoint: Checkpoint, tmp_path: Path) -> None:
    state, said = tmp_path / ".check.npz", []
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(8, 1, 16, 16, generator=generator) for _ in range(2))
    kept = tmp_path / "kept.npz"

    def run(inputs: Tensor) -> Report:
        settings = Settings(batch_size=4, state=state)
        return check(checkpoint, Files.of([exported / "model.int4.onnx"]), [inputs], settings, say=said.append)

    remove = StateFile.remove
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StateFile, "remove", lambda self: self.path.replace(kept))
        run(first)
    kept.replace(state)
    run(second)
    assert not any("going on" in line for line in said)
    assert StateFile.remove is remove


def test_whole_check_of_a_faithful_file(
    checkpoint: Checkpoint, dialect: ir.Model, images: ImageSet, tmp_path: Path
) -> None:
    report = check_graph(checkpoint, lower(dialect, Int4(), {}), images, tmp_path, forced_images=30, batch_size=24)
    assert report.failed == []
    pair = report.pair("int4")
    assert pair is not None and pair.found is not None and pair.floor is not None and pair.forced is not None
    assert (pair.found.n, pair.floor.n, pair.forced.images) == (64, 64, 30)
    assert pair.found.agreement is not None and pair.found.agreement.value >= 96
    assert pair.found.max_difference < 0.05
    assert pair.reference_top is not None and pair.candidate_top is not None
    assert pair.reference_top.top1.n == pair.candidate_top.top1.n == 64
    assert [layer.name for layer in pair.layers] == list(frozen_quantizers(checkpoint.model))
    assert all(layer.floor is not None and layer.inside for layer in pair.layers)
    optimised = report.pair("int4-optimised")
    assert optimised is not None and optimised.skipped is None
    assert {gate.id for gate in report.gates} >= {"int4.free.labels", "int4.free.codes", "int4-optimised.free.kl"}
    (tmp_path / "parity.json").write_text(report.to_json())
    assert numbers(read_report(tmp_path / "parity.json")) == numbers(report)


def test_fault_behind_the_last_quantiser_is_seen_free_running(
    checkpoint: Checkpoint, dialect: ir.Model, images: ImageSet, tmp_path: Path
) -> None:
    def shift(bias: np.ndarray) -> None:
        bias += np.array([0, 0, 4, 0], np.float32)

    graph = replaced(lower(dialect, Cpu(), {}), "head.linear.bias", shift)
    report = check_graph(checkpoint, graph, images, tmp_path)
    failed = [gate.id for gate in report.failed]
    assert failed[:2] == ["cpu.forced.linears", "cpu.forced.outputs"]
    assert {"cpu.free.labels", "cpu.free.cosine_p01", "cpu.free.kl"} <= set(failed)
    assert "cpu.free.codes" not in failed
    pair = report.pair("cpu")
    assert pair is not None and pair.found is not None and pair.found.agreement is not None
    wrong = 64 - round(64 * pair.found.agreement.value / 100)
    assert len(pair.flips) == wrong > 10
    assert all(flip.candidate == "top-left" and flip.reference != "top-left" for flip in pair.flips)
    labels = [flip.label for flip in pair.flips]
    assert pair.lost == sum(flip.label == flip.reference for flip in pair.flips)
    assert pair.won == labels.count("top-left")
    assert pair.flips[0].picture is not None
