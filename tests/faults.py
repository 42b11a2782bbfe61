"""Faults, planted in the files of an export: each changes a graph as a wrong exporter, or a wrong edit, would have.

The manifest is made to fit afterwards (:func:`rehash`), so that the numbers must give a fault away, not a hash.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from gplq.files import sha256, write_json
from gplq_export.manifest import CHECKPOINT
from gplq_export.onnx_file import read_onnx

Change = Callable[[ir.Model], None]


def plant(folder: Path, kind: str, change: Change) -> None:
    """Change one ONNX file of an export."""
    path = folder / f"model.{kind}.onnx"
    model = read_onnx(path)
    change(model)
    ir.save(model, path)
    rehash(folder)


def rehash(folder: Path) -> None:
    """Make the manifest fit the files, and everything in it the checkpoint that lies there."""
    manifest = json.loads((folder / "manifest.json").read_text())
    made_from = manifest["checkpoint"]["sha256"] = sha256(folder / CHECKPOINT)
    for name, entry in manifest["files"].items():
        path = folder / name
        if path.suffix == ".onnx":
            model = read_onnx(path)
            if model.metadata_props["gplq.checkpoint_sha256"] != made_from:
                model.metadata_props["gplq.checkpoint_sha256"] = made_from
                ir.save(model, path)
        entry.update(bytes=path.stat().st_size, sha256=sha256(path))
    for name, entry in manifest["engines"].items():
        entry["onnx_sha256"] = manifest["files"][f"model.{name}.onnx"]["sha256"]
    write_json(folder / "manifest.json", manifest)


def edited(name: str, edit: Callable[[np.ndarray], Any]) -> Change:
    """A constant, edited in place by a function that gets codes as int64."""

    def change(model: ir.Model) -> None:
        value = model.graph.initializers[name]
        assert value.const_value is not None
        before = value.const_value.numpy()
        array = before.astype(np.int64) if value.const_value.dtype.is_integer() else before.copy()
        edit(array)
        after = array.astype(before.dtype)
        assert not np.array_equal(after, before), f"nothing changed in {name}"
        value.const_value = ir.Tensor(after, name=name, dtype=value.const_value.dtype)

    return change


def scaled(name: str, factor: float, at: tuple[Any, ...] = ()) -> Change:
    """A constant, or some of its elements, multiplied."""

    def edit(array: np.ndarray) -> None:
        array[at or ...] = array[at or ...] * np.float32(factor)

    return edited(name, edit)


def nudged(linear: str, at: tuple[int, ...]) -> Change:
    """One code of a weight, off by one: up, or down where it is the largest already."""

    def edit(codes: np.ndarray) -> None:
        codes[at] += 1 if codes[at] < codes.max() else -1

    return edited(f"{linear}.codes", edit)


def swapped(names: Sequence[str], channels: tuple[int, int], axis: int = -1) -> Change:
    """Two channels of a tensor, or of several, exchanged."""

    def edit(array: np.ndarray) -> None:
        view = np.moveaxis(array, axis, 0)
        view[list(channels)] = view[list(channels[::-1])]

    return together(*(edited(name, edit) for name in names))


def together(*changes: Change) -> Change:
    """Several changes, one after the other."""

    def change(model: ir.Model) -> None:
        for each in changes:
            each(model)

    return change


def exchanged(first: str, second: str) -> Change:
    """All constants of two linears of one shape."""

    def change(model: ir.Model) -> None:
        for tensor in ("codes", "weight_scale", "bias"):
            a, b = (model.graph.initializers[f"{name}.{tensor}"] for name in (first, second))
            a.const_value, b.const_value = b.const_value, a.const_value

    return change


def half_up(quantizer: str) -> Change:
    """Halves are rounded up instead of to even: floor(x / scale + 1/2)."""

    def nodes(x: ir.Value, scale: ir.Value, constant: Callable[[float], ir.Value]) -> list[ir.Node]:
        divided = ir.node("Div", [x, scale])
        moved = ir.node("Add", [divided.outputs[0], constant(0.5)])
        floored = ir.node("Floor", [moved.outputs[0]])
        return [divided, moved, floored, ir.node("Mul", [floored.outputs[0], scale])]

    return in_front(quantizer, nodes)


def clamped(quantizer: str, low: int, high: int) -> Change:
    """A quantiser that clamps its codes to other limits, too."""

    def nodes(x: ir.Value, scale: ir.Value, constant: Callable[[float], ir.Value]) -> list[ir.Node]:
        limits = [ir.node("Mul", [scale, constant(limit)]) for limit in (low, high)]
        return [*limits, ir.node("Clip", [x, *(node.outputs[0] for node in limits)])]

    return in_front(quantizer, nodes)


def in_front(
    quantizer: str, make: Callable[[ir.Value, ir.Value, Callable[[float], ir.Value]], list[ir.Node]]
) -> Change:
    """Nodes that a quantiser's QuantizeLinear reads from; the last one's output."""

    def change(model: ir.Model) -> None:
        quantize = node(model, f"{quantizer}/QuantizeLinear")
        x, scale = quantize.inputs[:2]
        assert x is not None and scale is not None

        def constant(number: float) -> ir.Value:
            name = f"{quantizer}.fault{len(model.graph.initializers)}"
            model.graph.initializers[name] = ir.Value(name=name, const_value=ir.tensor(np.float32(number), name=name))
            return model.graph.initializers[name]

        nodes = make(x, scale, constant)
        for index, each in enumerate(nodes):
            each.name = f"{quantizer}/Fault{index}"
            each.outputs[0].name = f"{quantizer}.fault_output{index}"
            each.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        model.graph.insert_before(quantize, nodes)
        quantize.replace_input_with(0, nodes[-1].outputs[0])

    return change


def dequantized_otherwise(quantizer: str, factor: float) -> Change:
    """The scale is right where codes are made, and wrong where they become numbers again."""

    def change(model: ir.Model) -> None:
        scale = model.graph.initializers[f"{quantizer}.scale"]
        assert scale.const_value is not None
        name = f"{quantizer}.other_scale"
        array = scale.const_value.numpy() * np.float32(factor)
        model.graph.initializers[name] = ir.Value(name=name, const_value=ir.tensor(array, name=name))
        node(model, f"{quantizer}/DequantizeLinear").replace_input_with(1, model.graph.initializers[name])

    return change


def one_level_wide(quantizer: str) -> Change:
    """A clamp in front of four bits that are carried by eight lets one more negative code pass."""

    def change(model: ir.Model) -> None:
        clamp = node(model, f"{quantizer}/Clip")
        assert clamp.inputs[1] is not None and clamp.inputs[1].const_value is not None
        name = f"{quantizer}.wider"
        array = clamp.inputs[1].const_value.numpy() - np.uint8(1)
        model.graph.initializers[name] = ir.Value(name=name, const_value=ir.tensor(array, name=name))
        clamp.replace_input_with(1, model.graph.initializers[name])

    return change


def unclamped(quantizer: str) -> Change:
    """Four bits are carried by eight, and nothing clamps."""

    def change(model: ir.Model) -> None:
        zero = model.graph.initializers["zero_int8"]
        for kind in ("QuantizeLinear", "DequantizeLinear"):
            each = node(model, f"{quantizer}/{kind}")
            each.replace_input_with(2, zero)
        codes = node(model, f"{quantizer}/QuantizeLinear").outputs[0]
        codes.type = ir.TensorType(ir.DataType.INT8)

    return change


def without_bias(linear: str) -> Change:
    """A fused multiplication of ONNX Runtime forgets the bias."""
    return lambda model: node(model, linear).replace_input_with(6, None)


def without_quantizer(quantizer: str) -> Change:
    """What reads a quantiser's numbers reads them as they were before."""

    def change(model: ir.Model) -> None:
        quantize, dequantize = (node(model, f"{quantizer}/{kind}") for kind in ("QuantizeLinear", "DequantizeLinear"))
        assert quantize.inputs[0] is not None
        dequantize.outputs[0].replace_all_uses_with(quantize.inputs[0])
        model.graph.remove([dequantize, quantize], safe=True)

    return change


def attributes(operator: str, **values: Any) -> Change:
    """Every node of an operator gets other attributes."""

    def change(model: ir.Model) -> None:
        for each in [each for each in model.graph if each.op_type == operator]:
            each.attributes.update({name: ir.convenience.convert_attribute(name, x) for name, x in values.items()})

    return change


def shortened(name: str) -> Change:
    """A constant without its last element."""

    def change(model: ir.Model) -> None:
        value = model.graph.initializers[name]
        assert value.const_value is not None
        array = value.const_value.numpy()[:-1]
        value.const_value, value.shape = ir.tensor(array, name=name), ir.Shape(array.shape)

    return change


def node(model: ir.Model, name: str) -> ir.Node:
    """A node by its name."""
    return next(each for each in model.graph if each.name == name)
