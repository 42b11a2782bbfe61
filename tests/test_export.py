"""The command: what it writes, what it says, and what it leaves on disk when something is wrong."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from conftest import Quantised
from timm.layers import resample_abs_pos_embed

from gplq.checkpoint import Checkpoint
from gplq.errors import BuildError, MissingError
from gplq.files import sha256
from gplq_export import engine
from gplq_export.check.report import read_report
from gplq_export.cli import main
from gplq_export.reports.console import console
from gplq_export.targets import TARGETS, GraphWriter, Int4, Quantizer, Weight

ONNX_FILES = ["model.cpu.onnx", "model.fp16.onnx", "model.fp32.onnx", "model.int4.onnx"]
FILES = [*ONNX_FILES, "model.pt"]


def tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def manifest_of(out: Path) -> dict[str, Any]:
    """The manifest; its hashes and sizes are those of the files."""
    content: dict[str, Any] = json.loads((out / "manifest.json").read_text())
    for name, entry in content["files"].items():
        assert entry == {"bytes": (out / name).stat().st_size, "sha256": sha256(out / name)}, name
    return content


@pytest.fixture
def command(quantised: Quantised, tmp_path: Path) -> list[str]:
    return [str(quantised.path), "--int4", "--out", str(tmp_path / "dist")]


@pytest.fixture
def no_builder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "optional_module", lambda _: None)


def test_complete_export(
    command: list[str], quantised: Quantised, npz_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "--data", str(npz_file)]) == 0
    out = tmp_path / "dist"
    reports = ["parity.json", "parity.junit.xml", "report.html", "report.md"]
    assert tree(out) == sorted([*FILES, "manifest.json", "reproduce.sh", *(f"reports/{name}" for name in reports)])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dist"]
    manifest = manifest_of(out)
    assert sorted(manifest["files"]) == FILES
    assert manifest["schema_version"] == "3.0"
    assert (out / "model.pt").read_bytes() == quantised.path.read_bytes()
    assert manifest["checkpoint"]["sha256"] == sha256(quantised.path)
    assert manifest["input"]["shape"] == ["batch", 1, 16, 16]
    assert manifest["outputs"][0]["shape"] == ["batch", 4]
    assert manifest["label_names"] == ["bottom-left", "bottom-right", "top-left", "top-right"]
    assert manifest["problems"] == []
    assert manifest["engines"] == {}
    printed = capsys.readouterr()
    assert printed.err == ""
    report = read_report(out / "reports" / "parity.json")
    assert (report.failed, report.data.images) == ([], 64)
    assert {pair.name for pair in report.pairs if pair.skipped is None} == {
        "float", "rounding", "twin-fp32", "twin-fp16", "int4", "int4-optimised", "cpu",
    }  # fmt: skip
    for name in ("int4", "cpu"):
        pair = report.pair(name)
        assert pair is not None and pair.found is not None and pair.forced is not None
        assert (pair.found.n, pair.forced.images) == (64, 64)
        assert sum(layer.different for layer in pair.forced.quantizers) == 0
    # What the folder says of its files is what the check saw, and what the command printed.
    assert {name: entry.sha256 for name, entry in report.subject.files.items()} == {
        name: manifest["files"][name]["sha256"] for name in ONNX_FILES
    }
    assert all(line in printed.out for line in console(report))
    kernels = manifest["kernels"]["cpu"]
    assert all(kernel["integer"] and kernel["promised"] for kernel in kernels.values())
    assert len(kernels) == 2 * (6 + 2) + 2  # linears and products of two blocks, patch embedding, classifier
    assert f"wrote {out}" in printed.out


def test_another_image_size(
    command: list[str], checkpoint: Checkpoint, npz_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "--img-size", "24", "--data", str(npz_file)]) == 0
    manifest = manifest_of(tmp_path / "dist")
    assert manifest["input"]["shape"] == ["batch", 1, 24, 24]
    assert manifest["preprocessing"]["input_size"] == [1, 24, 24]
    model = ir.load(tmp_path / "dist" / "model.int4.onnx")
    # 6 x 6 patches and the class token; timm's own resampling of the embedding is the judge.
    embedding = resample_abs_pos_embed(checkpoint.model.pos_embed, [6, 6], num_prefix_tokens=1)  # type: ignore[arg-type]
    stored = [value.const_value.numpy() for value in model.graph.initializers.values() if value.const_value is not None]
    assert any(np.array_equal(array, embedding.detach().numpy()) for array in stored)
    assert "PASSED. " in capsys.readouterr().out
    report = read_report(tmp_path / "dist" / "reports" / "parity.json")
    float_pair, reference = report.pair("float"), report.pair("int4")
    assert reference is not None and reference.skipped is None
    assert float_pair is not None and float_pair.skipped is not None  # it is for images of another size


def test_bytes_of_the_int4_file_are_accounted_for(command: list[str], tmp_path: Path) -> None:
    assert main(command) == 0
    manifest = manifest_of(tmp_path / "dist")
    stored = manifest["int4_onnx_bytes"]
    sizes = {name: entry["bytes"] for name, entry in manifest["files"].items()}
    assert sum(stored.values()) == sizes["model.int4.onnx"]
    # By hand: two blocks of 4 x 64 x 64 + 2 x 64 x 256 weights, two a byte; edges of 16 x 64 and 64 x 4, one a byte.
    weights = 2 * (4 * 64 * 64 + 2 * 64 * 256)
    assert stored["weight codes, 4 bits"] == weights // 2
    assert stored["weight codes, 8 bits"] == 16 * 64 + 64 * 4  # patch embedding, classifier
    biases = 4 * (64 + 2 * (4 * 64 + 256 + 64) + 4)
    others = 4 * (5 * 2 * 64 + 18 * 64 + 2 * 256)  # five norms, the class token and embeddings, factors behind GELUs
    assert 0 <= stored["biases, norms, embeddings, constants"] - biases - others < 256
    assert 0 < stored["graph"] < 40_000
    # 32 and 16 bits against 4: what differs between the files is the weights.
    assert sizes["model.fp32.onnx"] - sizes["model.int4.onnx"] > 0.8 * weights * 28 / 8
    assert sizes["model.fp16.onnx"] - sizes["model.int4.onnx"] > 0.6 * weights * 12 / 8


def test_files_load_alone(command: list[str], tmp_path: Path) -> None:
    assert main(command) == 0
    for name in ONNX_FILES:
        proto = onnx.load(tmp_path / "dist" / name)
        metadata = {entry.key: entry.value for entry in proto.metadata_props}
        for key in ("preprocessing", "label_names", "recipe", "versions", "quantizers"):
            json.loads(metadata[f"gplq.{key}"])
        assert all(not tensor.external_data for tensor in proto.graph.initializer)


def test_existing_folder_is_kept_without_force_and_replaced_with_it(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "dist"
    assert main(command) == 0
    before = {name: (out / name).read_bytes() for name in tree(out)}
    assert main(command) == 2
    assert "--force" in capsys.readouterr().err
    assert {name: (out / name).read_bytes() for name in tree(out)} == before
    (out / "model.int4.onnx").write_bytes(b"old")
    assert main([*command, "--force"]) == 0
    assert (out / "model.int4.onnx").read_bytes() == before["model.int4.onnx"]
    assert [path.name for path in tmp_path.iterdir()] == ["dist"]


@pytest.mark.parametrize("foreign", ["thesis.tex", "manifest.json"])
@pytest.mark.parametrize("content", ["{}", '{"tool": "another"}', "[]", "\\relax"])
def test_force_does_not_delete_what_it_did_not_write(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], foreign: str, content: str
) -> None:
    out = tmp_path / "dist"
    out.mkdir()
    (out / foreign).write_text(content)
    assert main([*command, "--force"]) == 2
    assert "was not written by gplq-export" in capsys.readouterr().err
    assert (out / foreign).read_text() == content
    assert tree(tmp_path) == [f"dist/{foreign}"]


def test_force_takes_an_empty_folder_and_refuses_a_file(command: list[str], tmp_path: Path) -> None:
    out = tmp_path / "dist"
    out.write_text("precious")
    assert main([*command, "--force"]) == 2
    assert out.read_text() == "precious"
    out.unlink()
    out.mkdir()
    assert main([*command, "--force"]) == 0
    assert "manifest.json" in tree(out)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--images", "3"], "--images has no effect without --data"),
        (["--sm", "89"], "no effect without --trt"),
        (["--batch-max", "64"], "no effect without --trt"),
        (["--workspace", "3"], "--workspace is about engines, and has no effect without --trt"),
        (["--int8"], "--int8 is about engines, and has no effect without --trt"),
        (["--fp8", "--trt", "--sm", "86,89"], "trt-fp8 needs compute capability 89"),
        (["--img-size", "2"], "cannot take images of 2 x 2 pixels: "),
        (["--trt", "--batch-min", "9"], "batches must not fall"),
        (["--data", "gone.npz"], "gone.npz does not exist"),
    ],
)
def test_flags_that_cannot_work_exit_with_2(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    assert main([*command, *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("gplq-export: error: ")
    assert message in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [[], ["x.pt"], ["x.pt", "--out", "y", "--w4"], ["x", "--sm", "a"], ["lint"]])
def test_wrong_usage_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: gplq-export" in capsys.readouterr().err


class _Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_missing_or_hostile_checkpoint_exits_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, bomb = tmp_path / "dist", tmp_path / "bomb.pt"
    assert main([str(tmp_path / "none.pt"), "--int4", "--out", str(out)]) == 2
    assert "none.pt does not exist" in capsys.readouterr().err
    torch.save({"schema": "gplq.checkpoint", "boom": _Bomb(tmp_path / "exploded")}, bomb)
    assert main([str(bomb), "--int4", "--out", str(out)]) == 2
    assert "bomb.pt" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["bomb.pt"]


@pytest.mark.usefixtures("no_builder")
def test_without_a_builder_all_but_the_engines_is_written(
    command: list[str], npz_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "--trt", "--data", str(npz_file)]) == 3
    assert "pip install 'gplq[trt-rtx]'" in capsys.readouterr().err
    out = tmp_path / "dist"
    manifest = manifest_of(out)
    assert sorted(manifest["files"]) == sorted([*FILES, "model.trt-int4.onnx"])
    assert [problem["exit_code"] for problem in manifest["problems"]] == [3]
    assert manifest["engines"] == {}
    assert read_report(out / "reports" / "parity.json").failed == []


def test_without_onnx_runtime_files_are_skipped(
    command: list[str],
    npz_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert main([*command, "--data", str(npz_file)]) == 3
    assert "pip install 'gplq[cpu]'" in capsys.readouterr().err
    manifest = manifest_of(tmp_path / "dist")
    assert manifest["kernels"] == {}
    assert [problem["exit_code"] for problem in manifest["problems"]] == [3]
    report = read_report(tmp_path / "dist" / "reports" / "parity.json")
    assert all(pair.skipped for pair in report.pairs if pair.file is not None)
    assert not any(gate.pair in ("int4", "cpu") and gate.status == "passed" for gate in report.gates)


class DoubleScale(Int4):
    """A target with a fault: one activation scale is twice what it should be."""

    def quantizer(self, writer: GraphWriter, quantizer: Quantizer) -> ir.Value:
        if quantizer.name == "blocks.1.mlp.fc1.input_quantizer":
            quantizer = Quantizer(**{**vars(quantizer), "scale": 2 * quantizer.scale})
        return super().quantizer(writer, quantizer)


@pytest.mark.usefixtures("no_builder")
def test_failed_gate_outranks_a_missing_builder_and_the_manifest_tells_both(
    command: list[str],
    npz_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(TARGETS, "int4", DoubleScale)
    assert main([*command, "--trt", "--data", str(npz_file)]) == 1
    assert "int4.forced.codes: " in capsys.readouterr().err
    manifest = manifest_of(tmp_path / "dist")
    assert sorted(problem["exit_code"] for problem in manifest["problems"]) == [1, 3]
    first = read_report(tmp_path / "dist" / "reports" / "parity.json").failed[0]
    assert (first.id, first.layer) == ("int4.forced.codes", "blocks.1.mlp.fc1.input_quantizer")


class Unbuildable(Int4):
    """A target that gives up half-way."""

    error: Exception = BuildError("this target cannot do that")

    def weight(self, writer: GraphWriter, linear: Weight) -> ir.Value:
        if linear.name == "head.linear":
            raise self.error
        return super().weight(writer, linear)


def test_failure_in_the_middle_leaves_the_old_folder_and_nothing_else(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "dist"
    assert main(command) == 0
    before = tree(tmp_path), sha256(out / "manifest.json")
    monkeypatch.setitem(TARGETS, "fp16", Unbuildable)
    assert main([*command, "--force"]) == 4
    assert (tree(tmp_path), sha256(out / "manifest.json")) == before
    monkeypatch.setattr(Unbuildable, "error", RuntimeError("a defect"))
    with pytest.raises(RuntimeError, match="a defect"):
        main([*command, "--force"])
    assert (tree(tmp_path), sha256(out / "manifest.json")) == before


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root on Linux")
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"mounting is not allowed here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_full_disk_exits_with_2_and_leaves_nothing(
    quantised: Quantised, small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = small_disk / "dist"
    assert main([str(quantised.path), "--int4", "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert f"cannot write {out}: No space left on device" in error
    assert list(small_disk.iterdir()) == []


def test_ctrl_c_exits_with_130_and_leaves_nothing(command: list[str], tmp_path: Path) -> None:
    program = [sys.executable, "-m", "gplq_export", *command]
    with subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 120
        while not list(tmp_path.iterdir()) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        error = process.communicate(timeout=60)[1]
    assert process.returncode == 130, error
    assert "interrupted" in error
    assert "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.trt
def test_engines_multiply_every_linear_in_int8(
    command: list[str], npz_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        backend = engine.find_builder()
    except MissingError as error:
        pytest.skip(str(error))
    flags = ["--trt", "--int8", "--int4", "--batch-min", "1", "--batch-opt", "2", "--batch-max", "4"]
    assert main([*command, *flags, "--data", str(npz_file), "--workspace", "512"]) == 0
    said = capsys.readouterr().out
    out = tmp_path / "dist"
    manifest = manifest_of(out)
    assert {"model.trt-int4.plan", "model.fp16.plan", "model.trt-int4.onnx"} <= manifest["files"].keys()
    assert {"build.trt-int4.log", "build.fp16.log"} <= set(tree(out))
    linears = ["q", "k", "v", "proj.linear"]
    names = [f"blocks.{block}.attn.{name}" for block in (0, 1) for name in linears]
    names += [f"blocks.{block}.mlp.{name}.linear" for block in (0, 1) for name in ("fc1", "fc2")]
    names += ["patch_embed.proj.linear", "head.linear"]
    for target, precision in (("trt-int4", "INT8"), ("trt-int8", "INT8"), ("fp16", "FP16")):
        report = manifest["engines"][target]
        assert report["backend"] == backend.name
        assert report["batch"] == [1, 2, 4]
        assert report["options"] == {"workspace": 512 * 2**20}
        assert report["onnx_sha256"] == manifest["files"][f"model.{target}.onnx"]["sha256"]
        rows = [row for row in report["precision"]["rows"] if row["kind"] == "linear"]
        assert {row["name"]: row["found"] for row in rows} == dict.fromkeys(names, precision)
        assert report["precision"]["summary"] in said
        assert str(report["precision"]["rows"][0]["name"]) in (out / "reports" / f"precision.{target}.txt").read_text()
    gates = {gate.id: gate.status for gate in read_report(out / "reports" / "parity.json").gates}
    assert gates["fp16.range"] == "passed"


def test_force_does_not_delete_a_file_that_was_moved_into_an_earlier_export(
    quantised: Quantised, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "dist"
    assert main([str(quantised.path), "--int4", "--out", str(out)]) == 0
    other = {**torch.load(quantised.path, weights_only=True), "label_names": list("abcd")}
    for name, content in (("own.pt", quantised.path.read_bytes()), ("model.pt", None)):
        moved, before = out / name, (out / "model.pt").read_bytes()
        if content is None:
            torch.save(other, moved)
        else:
            moved.write_bytes(content)
        kept = moved.read_bytes()
        assert main([str(moved), "--int4", "--out", str(out), "--force"]) == 2
        assert moved.read_bytes() == kept
        assert f"{name} was not written by gplq-export" in capsys.readouterr().err
        moved.unlink()
    (out / "model.pt").write_bytes(before)
    # Its own checkpoint may be exported again.
    assert main([str(out / "model.pt"), "--int4", "--out", str(out), "--force"]) == 0
    assert (out / "model.pt").read_bytes() == quantised.path.read_bytes()
