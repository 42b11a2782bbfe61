"""The other side of a comparison: where a lowered graph holds which codes, and parts of the graph in a runtime."""

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from torch import nn

from gplq.checkpoint import frozen_quantizers, integer_linears
from gplq.convert import output_name, units
from gplq.errors import UsageError
from gplq.integer import FrozenQuantizer, IntegerLinear
from gplq_export.passes.common import constant, only_reader
from gplq_export.passes.fold_layer_scale import SCALED
from gplq_export.runtimes import Runtime
from gplq_export.targets import codes_name
from gplq_export.trace import INPUT

BEFORE, BEHIND = "stem", "head"  # the parts of the network in front of the first unit and behind the last


@dataclass(frozen=True)
class Tap:
    """Where a graph holds what a quantiser reads (``source``) and its codes (``tensor``), and in which form.

    ``scale``: what one code is, where the graph holds no codes; ``offset``: what is added to the codes, and
    ``code_type``: theirs, where it does. ``axes``: how a graph that quantises first and transposes then does that, as
    ``numpy.transpose`` takes it.
    """

    tensor: str
    source: str
    scale: np.float32
    holds_codes: bool
    offset: int
    code_type: ir.DataType
    axes: tuple[int, ...] | None

    def codes(self, answers: Mapping[str, np.ndarray]) -> np.ndarray:
        """The codes, as PyTorch has them."""
        found = answers[self.tensor]
        return self.as_in_pytorch(
            found.astype(np.int16) - self.offset if self.holds_codes else np.rint(found / self.scale)
        )

    def as_in_pytorch(self, x: np.ndarray) -> np.ndarray:
        """What the graph holds, its axes in PyTorch's order."""
        return x if self.axes is None else x.transpose(self.axes)

    def as_in_graph(self, x: np.ndarray) -> np.ndarray:
        """A quantiser's input in PyTorch, as the graph has it."""
        return x if self.axes is None else np.ascontiguousarray(x.transpose(np.argsort(self.axes)))

    def feed(self, codes: np.ndarray) -> np.ndarray:
        """PyTorch's codes, as the graph has them; those of 4 bits in eight."""
        codes = self.as_in_graph(codes)
        if not self.holds_codes:
            return codes.astype(np.float32) * self.scale
        return (codes.astype(np.int16) + self.offset).astype(_in_8_bits(self.code_type).numpy())


def check_graph(graph: ir.Model, model: nn.Module) -> None:
    """Make sure that a graph has the parts that are compared with a frozen model, and no more.

    Raises:
        UsageError: it has others: it is of another network, or was rewritten.
    """
    inputs = [str(value.name) for value in graph.graph.inputs]
    if inputs != [INPUT]:
        raise UsageError(
            f"the graph takes {', '.join(inputs) or 'nothing'}, where an export takes '{INPUT}' alone: it was "
            "rewritten. Export again."
        )
    values = ir.convenience.create_value_mapping(graph.graph)
    nodes = {node.name for node in graph.graph}
    expected = [name for name, _ in units(model)]
    try:
        marks: dict[str, str] = json.loads(graph.metadata_props["gplq.marks"])
        marked = {mark.rpartition(".")[0] for mark, tensor in marks.items() if tensor in values}
    except (LookupError, ValueError, AttributeError, TypeError):
        marked = set()
    missing = [
        *(
            f"quantiser {name}"
            for name in frozen_quantizers(model)
            if values.keys().isdisjoint({codes_name(name), f"{name}.dequantized"})
        ),
        *(f"linear {name}" for name in integer_linears(model) if name not in nodes),
        *(f"unit {name}" for name in expected if name not in marked),
    ]
    more = [f"unit {name}" for name in marked - {*expected}]
    if missing or more:
        raise UsageError(
            f"the graph {'lacks' if missing else 'also has'} {(missing or more)[0]}: it is of another network, or was "
            "rewritten. Export again."
        )


def find_taps(model: ir.Model, quantizers: Mapping[str, FrozenQuantizer]) -> dict[str, Tap]:
    """By quantiser, in the order in which the graph computes them."""
    found, values = {}, ir.convenience.create_value_mapping(model.graph)
    for name, quantizer in quantizers.items():
        held = codes_name(name) in values
        value = values[codes_name(name) if held else f"{name}.dequantized"]
        node: ir.Node | None = value.producer()
        while held and node is not None and node.op_type != "QuantizeLinear":  # a clamp of the codes
            node = node.inputs[0].producer() if node.inputs[0] is not None else None
        zero_point = constant(node.inputs[2]) if held and node is not None else None
        code_type = ir.DataType.FLOAT if zero_point is None else ir.DataType.from_numpy(zero_point.dtype)
        after = only_reader(value)
        moved = after is not None and after.name is not None and after.name.startswith(f"{name}/Transpose")
        tensor = str(value.name)
        found[name] = Tap(
            tensor,
            _quantizer_input(value, name),
            np.float32(quantizer.scale),
            held,
            0 if zero_point is None else int(zero_point),
            code_type,
            tuple(after.attributes["perm"].as_ints()) if moved and after is not None else None,
        )
    position = {value.name: i for i, node in enumerate(model.graph) for value in node.outputs}
    return dict(sorted(found.items(), key=lambda item: position[item[1].tensor]))


@dataclass
class Segment:
    """A part of the network from one unit's input to the first quantiser of the next, which ends what the unit did."""

    quantizers: list[str]
    part: "Part"


def segments(
    model: ir.Model, units: list[str], taps: dict[str, Tap], runtime: Runtime, *, only_last: bool = False
) -> dict[str, Segment]:
    """For the part before all units, each unit, and the part behind: its quantisers and the first one behind it.

    Without the one behind, nothing would see the last linear of a unit, or what stands before all units. ``only_last``:
    that one alone, for a runtime that would compute the others differently if it had to return their codes.
    """
    quantizers = list(taps)
    last = max(i for i, quantizer in enumerate(quantizers) if quantizer.startswith(tuple(f"{name}." for name in units)))
    first = {name: next(i for i, q in enumerate(quantizers) if q.startswith(f"{name}.")) for name in units}
    starts = [(BEFORE, 0), *first.items()]
    if last + 1 < len(quantizers):
        starts.append((BEHIND, last + 1))
    marks: dict[str, str] = json.loads(model.metadata_props["gplq.marks"])
    found = {}
    for (name, start), (following, end) in itertools.pairwise([*starts, ("", len(quantizers))]):
        inside = quantizers[start : end + 1][-1 if only_last else 0 :]
        ending = output_name(units[-1]) if following == BEHIND else f"{following}.input"
        own = {tensor for mark, tensor in marks.items() if mark.startswith(ending)}
        known = {tensor: mark for mark, tensor in marks.items() if tensor not in own}
        outputs = [taps[quantizer].tensor for quantizer in inside]
        feeds = sources(model.graph, outputs, {*known, INPUT})
        found[name] = Segment(inside, Part(model, feeds, outputs, runtime, known))
    return found


def sources(graph: ir.Graph, outputs: list[str], known: set[str]) -> list[str]:
    """Those of the ``known`` tensors that ``outputs`` are computed from, the nearest ones on each path.

    An output that is itself known is still computed, from what is known in front of it.
    """
    values = ir.convenience.create_value_mapping(graph)
    seen: dict[str, None] = {}
    pending = [values[name] for name in outputs]
    wanted = {id(value) for value in pending}
    visited: set[int] = set()
    while pending:
        value = pending.pop()
        if id(value) in visited:
            continue
        visited.add(id(value))
        node = value.producer()
        if value.name in known and id(value) not in wanted:
            seen[value.name] = None
        elif node is not None:
            pending += [x for x in node.inputs if x is not None]
        elif value.name in known:
            seen[value.name] = None
    return list(seen)


class Part:
    """A part of an ONNX graph in a runtime; 4-bit codes are given, and come back, as int8."""

    def __init__(
        self,
        model: ir.Model,
        inputs: Sequence[str],
        outputs: Sequence[str],
        runtime: Runtime,
        names: Mapping[str, str] | None = None,
        types: Mapping[str, ir.DataType] | None = None,
    ) -> None:
        """Cut the part out and load it.

        Args:
            model: a lowered graph; stays as it is.
            inputs: the tensors that are given, float32 if ``types`` says nothing else.
            outputs: the tensors that are wanted.
            runtime: what runs it.
            names: by which name :meth:`run` is given an input, if not by the tensor's own.
            types: of inputs.
        """
        self.inputs = {tensor: (names or {}).get(tensor, tensor) for tensor in inputs}
        part = ir.convenience.extract(model.graph, list(inputs), list(outputs))
        for index, value in enumerate(part.outputs):
            producer = value.producer()
            if producer is None or producer.op_type != "QuantizeLinear" or not _is_4_bit(producer):
                continue
            # ONNX Runtime's Python API cannot return 4-bit tensors.
            cast = ir.node("Cast", [value], attributes={"to": ir.DataType.INT8}, name=f"{value.name}/Cast")
            cast.outputs[0].name = f"{value.name}.int8"
            cast.outputs[0].type = ir.TensorType(ir.DataType.INT8)
            part.append(cast)
            part.outputs[index] = cast.outputs[0]
        for index, value in enumerate(part.inputs):
            wanted = (types or {}).get(str(value.name), ir.DataType.FLOAT)
            value.type = ir.TensorType(wanted)
            value.shape = None if value.name != INPUT else value.shape
            if wanted.bitwidth < 8:
                part.inputs[index] = _widen(part, value)
        whole = ir.Model(part, ir_version=model.ir_version)
        whole.opset_imports.update(model.opset_imports)
        self._run = runtime(ir.to_proto(whole).SerializeToString())
        self.outputs = list(outputs)

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Arrays by tensor name; ``feeds`` may hold more than is needed."""
        needed = {tensor: feeds[name] for tensor, name in self.inputs.items()}
        return dict(zip(self.outputs, self._run(needed), strict=True))


def _in_8_bits(code_type: ir.DataType) -> ir.DataType:
    """What holds codes of a type outside of a graph: ONNX Runtime's Python API takes no 4-bit tensors."""
    return ir.DataType.INT8 if code_type.bitwidth < 8 else code_type


def _widen(graph: ir.Graph, value: ir.Value) -> ir.Value:
    """An input of 8 bits and the same name, in the place of one of 4."""
    assert value.name is not None and value.type is not None
    wide = ir.Value(name=value.name, type=ir.TensorType(_in_8_bits(value.type.dtype)))
    cast = ir.node("Cast", [wide], attributes={"to": value.type.dtype}, name=f"{value.name}/Cast")
    value.name = cast.outputs[0].name = f"{value.name}.narrow"
    value.replace_all_uses_with(cast.outputs[0])
    graph.insert_before(graph[0], cast)
    return wide


def linear_output(model: ir.Model, linear: str) -> str:
    """The tensor that a linear returns, its bias added if it has one."""
    nodes = {node.name: node for node in model.graph}
    name = nodes.get(f"{linear}/Add", nodes[linear]).outputs[0].name
    assert name is not None
    return name


def folded_factor(model: ir.Model, linear: str, layer: IntegerLinear) -> np.ndarray:
    """What a graph multiplies a linear's output by within the linear: 1, or the layer scale behind it, [N]."""
    scaled = constant(model.graph.initializers.get(f"{linear}.weight_scale{SCALED}"))
    return np.ones((), np.float32) if scaled is None else scaled / layer.weight_scale.numpy()


def _is_4_bit(quantize: ir.Node) -> bool:
    zero_point = quantize.inputs[2]
    return zero_point is not None and zero_point.dtype in (ir.DataType.INT4, ir.DataType.UINT4)


def _quantizer_input(result: ir.Value, quantizer: str) -> str:
    """The tensor that a quantiser, with the factor in front of it if it has one, reads. ``result``: what it returns."""
    node = result.producer()
    while node is not None and node.name is not None and node.name.startswith(f"{quantizer}/"):
        source = node.inputs[0]
        assert source is not None and source.name is not None
        node, name = source.producer(), source.name
    return name
