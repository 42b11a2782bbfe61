"""Untrusted ONNX files: each is built here, and each ends in one message."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from gplq.errors import UsageError
from gplq_export.inspect import inspect_file
from gplq_export.lint import lint
from gplq_export.onnx_file import MAX_BYTES, read_onnx

WEIGHT = np.arange(16, dtype=np.float32).reshape(4, 4)


def model(nodes: list[Any], tensors: tuple[Any, ...] = (), opset: int = 21, ir_version: int = 10) -> Any:
    """From x [1, 4] to y [1, 4]."""
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4]) for name in "xy"]
    graph = helper.make_graph(nodes, "test", values[:1], values[1:], list(tensors))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version)


def external(location: str, offset: object = None, length: object = None, size: int = 4) -> Any:
    """A MatMul whose weight [4, size] lies in another file."""
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4, size], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        if value is not None:
            tensor.external_data.add(key=key, value=str(value))
    return model([helper.make_node("MatMul", ["x", "w"], ["y"])], (tensor,))


@pytest.fixture
def write(tmp_path: Path) -> Callable[[Any], Path]:
    """Writes a proto, or bytes, into a folder that has data.bin (64 bytes) inside and secret.bin outside."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "data.bin").write_bytes(WEIGHT.tobytes())
    (tmp_path / "secret.bin").write_bytes(WEIGHT.tobytes())

    def write_file(content: Any) -> Path:
        path = folder / "model.onnx"
        path.write_bytes(content if isinstance(content, bytes) else content.SerializeToString())
        return path

    return write_file


RELU = helper.make_node("Relu", ["x"], ["y"])


def refused(path: Path, message: str) -> None:
    before = sorted(path.parent.iterdir()) if path.parent.is_dir() else []
    with pytest.raises(UsageError, match=message) as caught:
        read_onnx(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2
    if path.parent.is_dir():
        assert sorted(path.parent.iterdir()) == before


def test_a_good_file_is_read(write: Callable[[Any], Path]) -> None:
    read = read_onnx(write(model([RELU])))
    assert [node.op_type for node in read.graph] == ["Relu"]
    assert read.opset_imports == {"": 21}


@pytest.mark.parametrize("from_elsewhere", [False, True])
def test_good_external_data_is_found_from_any_folder(
    write: Callable[[Any], Path], from_elsewhere: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(external("data.bin", 0, 64))
    if from_elsewhere:
        monkeypatch.chdir(tmp_path)
        path = path.relative_to(tmp_path)
    tensor = read_onnx(path).graph.initializers["w"].const_value
    assert tensor is not None
    assert np.array_equal(tensor.numpy(), WEIGHT)


def test_other_domains_are_no_reason_to_refuse(write: Callable[[Any], Path]) -> None:
    proto = model([helper.make_node("Quantise", ["x"], ["y"], domain="acme")])
    proto.opset_import.append(helper.make_opsetid("acme", 3))
    assert next(iter(read_onnx(write(proto)).graph)).domain == "acme"


@pytest.mark.parametrize(
    "content",
    [b"hello, this is a text file\n" * 9, bytes(range(256)), b"PK\x03\x04" + bytes(100), b"vtrt" + bytes(60)],
    ids=["text", "bytes", "zip", "plan"],
)
def test_other_kinds_of_files(write: Callable[[Any], Path], content: bytes) -> None:
    refused(write(content), "cannot be read as ONNX: it is another kind of file")


def test_every_truncation_is_refused(write: Callable[[Any], Path]) -> None:
    proto = model([helper.make_node("MatMul", ["x", "w"], ["y"])], (numpy_helper.from_array(WEIGHT, "w"),))
    whole = proto.SerializeToString()
    for length in range(len(whole)):
        path = write(whole[:length])
        with pytest.raises(UsageError):
            read_onnx(path)
    read_onnx(write(whole))


def test_missing_file_and_folder(tmp_path: Path) -> None:
    refused(tmp_path / "none" / "model.onnx", "does not exist or is not a file")
    refused(tmp_path, "does not exist or is not a file")


def test_size_is_checked_before_reading(tmp_path: Path) -> None:
    path = tmp_path / "huge.onnx"
    with path.open("wb") as file:
        file.truncate(MAX_BYTES + 1)  # a sparse file: reading it would take 2 GB
    refused(path, "has 2,147,483,648 bytes, an ONNX file at most 2,147,483,647")


def test_no_content(write: Callable[[Any], Path]) -> None:
    refused(write(b""), "has no IR version")
    refused(write(model([])), "has no nodes")


def test_cycle_is_named(write: Callable[[Any], Path]) -> None:
    nodes = [
        helper.make_node("Add", ["x", "b"], ["a"], name="add"),
        helper.make_node("Relu", ["a"], ["b"], name="relu"),
        helper.make_node("Relu", ["a"], ["y"], name="last"),
    ]
    refused(write(model(nodes)), "has a cycle.*: (add → relu → add|relu → add → relu)")
    refused(write(model([helper.make_node("Add", ["x", "y"], ["y"])])), r"has a cycle.*Add\(y\) → Add\(y\)")


@pytest.mark.parametrize(
    ("proto", "message"),
    [
        (model([RELU], ir_version=onnx.IR_VERSION + 1), f"has IR version {onnx.IR_VERSION + 1}.*upgrade onnx"),
        (model([RELU], opset=99), f"has opset 99.*reads up to {onnx.defs.onnx_opset_version()}"),
        (model([helper.make_node("Foo", ["x"], ["y"])]), "No Op registered for Foo"),
        (model([helper.make_node("Foo", ["x"], ["y"], domain="acme")]), "No opset import for domain 'acme'"),
        (model([helper.make_node("Relu", ["nobody"], ["y"])]), "'nobody' of node.*not output of any previous"),
        (model([RELU, RELU]), "single static assignment"),
    ],
    ids=["ir version", "opset", "operator", "domain", "input", "names"],
)
def test_broken_and_foreign_models(write: Callable[[Any], Path], proto: Any, message: str) -> None:
    refused(write(proto), message)


def test_a_weight_that_lies_about_itself(write: Callable[[Any], Path]) -> None:
    def changed(change: Callable[[Any], None]) -> Any:
        tensor = numpy_helper.from_array(WEIGHT, "w")
        change(tensor)
        return model([helper.make_node("MatMul", ["x", "w"], ["y"])], (tensor,))

    refused(
        write(changed(lambda tensor: tensor.dims.__setitem__(0, 1 << 40))),
        "too small for the declared shape|needs 17,592,186,044,416 bytes, and has 64",
    )
    refused(write(changed(lambda tensor: setattr(tensor, "data_type", 77))), "is damaged: .*77")
    refused(write(changed(lambda tensor: tensor.dims.__setitem__(0, 3))), "is damaged: w needs 48 bytes, and has 64")


def test_names_that_are_no_text(write: Callable[[Any], Path]) -> None:
    named = model([helper.make_node("Relu", ["x"], ["y"], name="a node")]).SerializeToString()
    refused(write(named.replace(b"a node", b"a\xff\xfe\xfd\xfc\xfb")), "names that are no text")


def test_damage_ends_in_a_model_or_a_message(write: Callable[[Any], Path]) -> None:
    """A few bytes changed at random: what can be read can be linted and inspected, all else is refused."""
    weight = helper.make_tensor("w", TensorProto.INT4, (4, 4), list(range(-8, 8)))
    scales = numpy_helper.from_array(np.full(4, 0.5, np.float32), "s")
    nodes = [
        helper.make_node("Reshape", ["x", "shape"], ["r"], name="reshape"),
        helper.make_node("DequantizeLinear", ["w", "s"], ["d"], name="dequantize", axis=1),
        helper.make_node("MatMul", ["r", "d"], ["y"], name="matmul"),
    ]
    shape = numpy_helper.from_array(np.array([1, 4]), "shape")
    whole = model(nodes, (weight, scales, shape)).SerializeToString()
    random, read = np.random.default_rng(0), 0
    for _ in range(1000):
        changed = bytearray(whole)
        for place in random.integers(len(changed), size=random.integers(1, 4)):
            changed[place] = random.integers(256)
        path = write(bytes(changed))
        try:
            lint(read_onnx(path))
            inspect_file(path)
        except UsageError as error:
            assert str(error).isprintable()
        else:
            read += 1
    assert 100 < read < 900


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("../secret.bin", "points outside the directory"),
        ("/etc/passwd", "absolute path"),
        ("link.bin", "which is a link"),
        ("inner/../../secret.bin", "outside the directory"),
        ("folder/secret.bin", "outside|symbolic link|not regular"),
        ("hard.bin", "hard link"),
        ("gone.bin", "not regular file"),
        ("pipe", "not regular file"),
        ("", "should not be empty"),
    ],
)
def test_external_data_stays_in_the_folder(write: Callable[[Any], Path], location: str, message: str) -> None:
    path = write(external(location, 0, 64))
    (path.parent / "link.bin").symlink_to("../secret.bin")
    (path.parent / "folder").symlink_to("..")
    (path.parent / "hard.bin").hardlink_to(path.parent.parent / "secret.bin")
    os.mkfifo(path.parent / "pipe")
    refused(path, message)


@pytest.mark.parametrize(
    ("offset", "length", "message"),
    [
        (0, 4, "64 bytes .*but 4 are given"),
        (60, 64, "64 bytes from byte 60 of data.bin, which has 64"),
        (0, 10**12, "but 1,000,000,000,000 are given"),
        (10**12, None, "which has 64"),
        (-4, 64, "is damaged|not valid"),
        ("x", 64, "is damaged|not valid"),
    ],
)
def test_external_data_holds_the_tensor(
    write: Callable[[Any], Path], offset: object, length: object, message: str
) -> None:
    refused(write(external("data.bin", offset, length)), message)


def test_short_external_data(write: Callable[[Any], Path]) -> None:
    refused(write(external("data.bin", size=5)), re.escape("80 bytes from byte 0 of data.bin, which has 64"))
