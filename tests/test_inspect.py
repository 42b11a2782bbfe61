"""What is said of checkpoints, ONNX files and engines, and of engines that are not what they seem."""

import argparse
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from gplq.checkpoint import Checkpoint, frozen_quantizers, integer_linears
from gplq.errors import CheckpointError, GateError, MissingError, UsageError
from gplq.files import sha256
from gplq_export import engine
from gplq_export.inspect import add_arguments, inspect_file, run, storage
from gplq_export.lowering import lower
from gplq_export.onnx_file import read_onnx
from gplq_export.precision import check_precision
from gplq_export.promise import promise
from gplq_export.qdq import QdqGraph
from gplq_export.targets import TARGETS


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(arguments)


def printed(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What was printed: few lines, none of them long."""
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 40
    assert all(len(line) < 160 for line in lines)
    return lines


@pytest.fixture(scope="module")
def exported(dialect: ir.Model, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Exports the tiny model for a target."""
    folder = tmp_path_factory.mktemp("onnx")

    def write(target: str) -> Path:
        path = folder / f"model.{target}.onnx"
        ir.save(
            lower(dialect, TARGETS[target](), {"gplq.architecture": "tiny", "gplq.checkpoint_sha256": "12ab"}), path
        )
        return path

    return write


def test_checkpoint(quantised: Any, checkpoint: Checkpoint, capsys: pytest.CaptureFixture[str]) -> None:
    content = inspect_file(quantised.path)
    linears, quantizers = integer_linears(checkpoint.model), frozen_quantizers(checkpoint.model)
    assert content["kind"] == "gplq checkpoint"
    assert content["sha256"] == hashlib.sha256(quantised.path.read_bytes()).hexdigest()
    assert content["bytes"] == quantised.path.stat().st_size
    assert content["linears"] == len(linears)
    assert sum(content["quantisers"].values()) == len(quantizers)
    four_bits = sum(linear.codes.numel() for linear in linears.values() if linear.bits == 4)
    assert content["weights"]["4-bit codes"] == four_bits
    assert content["recipe"]["weight_bits"] == 4
    run(parse(str(quantised.path)))
    lines = printed(capsys)
    assert any("4-bit codes" in line and line.endswith(f" {four_bits:,}") for line in lines)
    assert any(line.startswith("architecture") and line.endswith("vit_tiny_patch16_224") for line in lines)


def test_damaged_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_bytes(b"PK\x03\x04 and no archive")
    with pytest.raises(CheckpointError, match="cannot be loaded safely"):
        run(parse(str(tmp_path / "model.pt")))


def test_checkpoint_with_strange_provenance(altered: Any) -> None:
    path = altered(lambda content: content.update(provenance={"top1": ["no", "mapping"], "x": "\x1b[2Jgone"}))
    assert inspect_file(path)["top1"] == {}


def test_onnx(exported: Callable[[str], Path], checkpoint: Checkpoint, capsys: pytest.CaptureFixture[str]) -> None:
    path = exported("int4")
    content = inspect_file(path)
    linears, quantizers = integer_linears(checkpoint.model), frozen_quantizers(checkpoint.model)
    assert content["kind"] == "ONNX model"
    assert sum(content["linears"].values()) == len(linears)
    assert sum(count for kind, count in content["linears"].items() if kind.startswith("INT4 weights")) == sum(
        linear.bits == 4 for linear in linears.values()
    )
    assert sum(content["quantisers"].values()) == len(quantizers)
    assert content["inputs"] == {"images": "FLOAT [batch, 1, 16, 16]"}
    assert content["opset"] == {"ai.onnx": 21}
    assert content["metadata"]["gplq.checkpoint_sha256"] == "12ab"
    run(parse(str(path)))
    assert any("gplq.target" in line and line.endswith("int4") for line in printed(capsys))


@pytest.mark.parametrize("target", list(TARGETS))
def test_storage_is_complete_and_right(exported: Callable[[str], Path], checkpoint: Checkpoint, target: str) -> None:
    path = exported(target)
    model = read_onnx(path)
    found = storage(QdqGraph(model), path.stat().st_size)
    assert sum(found.values()) == path.stat().st_size
    assert found["graph"] > 0
    codes = dict.fromkeys((4, 8), 0)
    for linear in integer_linears(checkpoint.model).values():
        codes[linear.bits] += linear.codes.numel()
    if TARGETS[target]().quantizes and target not in ("trt-int8", "trt-fp8"):
        assert found["weight codes, 4 bits"] == codes[4] // 2
        assert found["weight codes, 8 bits"] == codes[8]
    elif TARGETS[target]().quantizes:
        assert found["weight codes, 8 bits"] == codes[4] + codes[8]
    else:
        assert found["weights in floating point"] == (codes[4] + codes[8]) * (4 if target == "fp32" else 2)


def test_weights_outside_the_file_are_named(tmp_path: Path) -> None:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 64]) for name in "xy"]
    weight = numpy_helper.from_array(np.zeros((64, 64), np.float32), "w")
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "test", values[:1], values[1:], [weight])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(proto, tmp_path / "model.onnx", save_as_external_data=True, location="model.bin", size_threshold=0)
    assert inspect_file(tmp_path / "model.onnx")["storage"] == {
        "weights in floating point, in another file": 64 * 64 * 4,
        "graph": (tmp_path / "model.onnx").stat().st_size,
    }


def write_plan(folder: Path, manifest: Any = None, content: bytes = b"vtrt" + bytes(60)) -> Path:
    path = folder / "model.plan"
    path.write_bytes(content)
    if manifest is not None:
        text = manifest if isinstance(manifest, str) else json.dumps(manifest)
        (folder / "manifest.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    return path


def manifest_of(path: Path, **engine_entry: Any) -> dict[str, Any]:
    return {
        "tool": "gplq-export",
        "schema_version": "3.0",
        "checkpoint": {"sha256": "ab12"},
        "files": {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)}},
        "engines": {"trt-int4": {"plan_sha256": sha256(path), **engine_entry}},
    }


def test_plan_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_plan(tmp_path)
    run(parse(str(path)))
    text = "\n".join(printed(capsys))
    assert "TensorRT-RTX engine: a program, not opened" in text
    assert "none beside it: nothing is known about precisions" in text
    assert hashlib.sha256(path.read_bytes()).hexdigest() in text
    other = tmp_path / "other.engine"
    other.write_bytes(b"ftrt" + bytes(10))
    assert inspect_file(other)["kind"] == "engine, by its name: a program, not opened"
    assert inspect_file(other)["magic"] == "ftrt"


def test_plan_is_what_the_manifest_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_plan(tmp_path)
    layers = [{"name": name} for name in ("gemm_1", "_gemm_mha_v2_1", "_gemm_mha_v2_2")]
    precision = {"summary": "linears: 2 INT8, 1 FP16"}
    write_plan(tmp_path, manifest_of(path, backend="TensorRT-RTX", layers=layers, precision=precision))
    run(parse(str(path), "--json"))
    content = json.loads(capsys.readouterr().out)
    assert content["schema_version"] == "1.0"
    assert (content["layers"], content["precision"]) == (3, "linears: 2 INT8, 1 FP16")
    assert content["built"] == {"backend": "TensorRT-RTX"}
    assert content["checkpoint_sha256"] == "ab12"


def test_a_replaced_plan_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_plan(tmp_path)
    write_plan(tmp_path, manifest_of(path, precision={"summary": "linears: 1 INT8"}), b"vtrt and something else")
    with pytest.raises(GateError, match=r"not the file that manifest\.json beside it describes") as caught:
        run(parse(str(path)))
    assert caught.value.exit_code == 1
    text = "\n".join(printed(capsys))
    assert "the hashes differ" in text
    assert "INT8" not in text


@pytest.mark.parametrize(
    "manifest", [{}, [], 7, {"files": []}, {"files": {"model.plan": "text"}}, "{", "[" * 100_000, "\udcff"]
)
def test_foreign_manifests_say_nothing(tmp_path: Path, manifest: Any) -> None:
    said = inspect_file(write_plan(tmp_path, manifest))["manifest"]
    assert "no readable manifest.json" in said
    assert said.endswith("Nothing is known about precisions.")


def test_manifest_of_other_files_or_of_another_version(tmp_path: Path) -> None:
    manifest = manifest_of(write_plan(tmp_path))
    other = {**manifest, "files": {"other.plan": manifest["files"]["model.plan"]}}
    assert inspect_file(write_plan(tmp_path, other))["manifest"].startswith("does not list this file")
    old = {**manifest, "schema_version": "1.0"}
    assert "schema version 1.0" in inspect_file(write_plan(tmp_path, old))["manifest"]


@pytest.mark.parametrize("engines", [[], {"x": 3}, {"x": {"layers": 3, "precision": [1]}}, None])
def test_strange_entries_of_a_manifest(tmp_path: Path, engines: Any) -> None:
    path = write_plan(tmp_path)
    content = inspect_file(write_plan(tmp_path, {**manifest_of(path), "engines": engines}))
    assert (content["layers"], content["precision"]) == (0, "unknown")


def test_files_of_no_known_kind(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    for path, message in ((tmp_path / "notes.txt", "another kind of file"), (tmp_path, "not a file")):
        with pytest.raises(UsageError, match=message):
            run(parse(str(path)))


def test_names_from_a_stranger_do_not_reach_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x\x1b[2J", "y")]
    graph = helper.make_graph([helper.make_node("Relu", ["x\x1b[2J"], ["y"])], "test", values[:1], values[1:])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    proto.metadata_props.add(key="a\x07", value="b\x1b]0;owned\x07" * 50)
    onnx.save(proto, tmp_path / "model.onnx")
    run(parse(str(tmp_path / "model.onnx")))
    assert all(line.isprintable() for line in printed(capsys))


@pytest.mark.trt
def test_a_real_engine(exported: Callable[[str], Path], checkpoint: Checkpoint, tmp_path: Path) -> None:
    try:
        backend = engine.find_builder()
    except MissingError as error:
        pytest.skip(str(error))
    path = tmp_path / "model.plan"
    source = exported("trt-int4")
    report = engine.build_engine(source, path, batch=(1, 2, 4), backend=backend)
    linears = list(integer_linears(checkpoint.model))
    table = check_precision(report, promise(ir.load(source), TARGETS["trt-int4"](), linears))
    entry = {**report.to_dict(), "precision": table.to_dict()}
    manifest = {**manifest_of(path), "engines": {"trt-int4": entry}}
    assert manifest["files"][path.name]["sha256"] == report.plan_sha256
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    content = inspect_file(path)
    assert content["kind"].startswith(backend.name)
    assert content["layers"] == len(report.layers)
    assert content["precision"].startswith(f"linears: {len(linears)} INT8; ")
    assert content["built"]["backend_version"] == backend.version
