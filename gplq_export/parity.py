"""Proof that an ONNX file computes what PyTorch computed: PyTorch fake-quant against the file in its runtime.

The reference file runs in ONNX Runtime with optimisation off; a deployment file in what it is made for, as it will run
(:mod:`gplq_export.runtimes`).

Rounding is chaotic: two correct back ends sum in different orders, a last-bit difference in front of a quantiser flips
a code, and the flip travels through all blocks. So each thing is judged where it can be judged:

    quantisers, teacher-forced    fed PyTorch's own input, each returns PyTorch's codes: all of them
    linears, teacher-forced       fed PyTorch's own input, each returns PyTorch's output but for its last bits
    blocks, teacher-forced        fed PyTorch's own block input, at most 0.5 % of each block's codes differ, those of
                                  the quantiser behind it included
    outputs, all quantisers fed   logits or features are PyTorch's but for their last bits
    free-running                  label agreement (without a classifier: cosine of the features) no worse than
                                  PyTorch's with itself in another order of summation

Everything is streamed: memory is one batch, whatever the number of images.
"""

import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gplq import grid
from gplq.checkpoint import frozen_quantizers, integer_linears
from gplq.convert import input_name, output_name, structure_of, units
from gplq.data import ImageSet, batches
from gplq.evaluate import Accuracy, Similarity, cosines
from gplq.integer import FrozenQuantizer, IntegerLinear, set_rounding
from gplq.ops import Codes
from gplq.progress import progress
from gplq_export.passes.common import constant, only_reader
from gplq_export.passes.fold_layer_scale import SCALED
from gplq_export.runtimes import Runtime, onnxruntime_reference
from gplq_export.targets import codes_name
from gplq_export.trace import INPUT, LOGITS

BLOCK_LIMIT = 0.005  # share of a block's codes that may differ when it is fed the same input
LINEAR_LIMIT = 1e-4  # largest difference of a linear's output from PyTorch's, relative to its largest value
# By so much of its range a number may be wrong that was multiplied by a rounded reciprocal and moved to positive codes.
_TIE = 2.0**-21
_COSINE_RESOLUTION = 1e-6  # two FP32 networks without any unequal code differ by less
_BEFORE, _BEHIND = "stem", "head"  # the parts of the network in front of the first unit and behind the last


@dataclass
class CodeCount:
    """How many codes were compared, and how many differed."""

    different: int = 0
    total: int = 0

    def add(self, a: np.ndarray, b: np.ndarray) -> None:
        """Compare two arrays of codes of one shape."""
        self.different += int((a != b).sum())
        self.total += a.size

    @property
    def share(self) -> float:
        """Share of the codes that differ, 0 … 1."""
        return self.different / max(self.total, 1)


_NONE = Accuracy(0, 1)


@dataclass
class ParityReport:
    """What was compared and what came out.

    Attributes:
        quantizers: per quantiser, teacher-forced. ``blocks``: per block, and for what stands before and behind
            them, teacher-forced. ``free``: per quantiser, free.
        linears: per linear, teacher-forced: largest difference of its output, relative to its largest value.
        outputs: the same per output of the model, all of its quantisers fed.
        sqnr_db: per block, how far the quantised output is from the same network's without quantisers, in dB.
        agreement: labels equal between PyTorch and ONNX Runtime; without a classifier, cosine of their features.
        noise_floor: the same between PyTorch and PyTorch in another order of summation.
        torch_top1, onnx_top1: against the labels; None without any.
        max_output_difference: free-running, absolute.
    """

    forced_images: int
    quantizers: dict[str, CodeCount] = field(default_factory=dict)
    linears: dict[str, float] = field(default_factory=dict)
    outputs: dict[str, float] = field(default_factory=dict)
    blocks: dict[str, CodeCount] = field(default_factory=dict)
    free: dict[str, CodeCount] = field(default_factory=dict)
    sqnr_db: dict[str, float] = field(default_factory=dict)
    agreement: Accuracy | Similarity = _NONE
    noise_floor: Accuracy | Similarity = _NONE
    torch_top1: Accuracy | None = None
    onnx_top1: Accuracy | None = None
    max_output_difference: float = 0.0

    @property
    def compared(self) -> str:
        """What ``agreement`` and ``noise_floor`` are about."""
        return "labels equal" if isinstance(self.agreement, Accuracy) else "cosine of features"

    def forced_equal(self) -> CodeCount:
        """All quantisers together, teacher-forced."""
        return _sum(self.quantizers.values())

    def free_equal(self) -> CodeCount:
        """All quantisers together, free-running."""
        return _sum(self.free.values())

    def failures(self) -> list[str]:
        """The gates that failed, one sentence each; empty if all passed.

        The free-running gate fails only if even the favourable end of its interval is below the unfavourable end of
        the noise floor's, so that it does not flicker.
        """
        found = []
        worst = max(self.quantizers, key=lambda name: self.quantizers[name].share)
        if (count := self.quantizers[worst]).different:
            found.append(
                f"quantiser {worst}: {count.different:,} of {count.total:,} codes differ for the same input; "
                "its scale, rounding or limits are not those of the checkpoint."
            )
        wrong = [name for name, difference in self.linears.items() if not difference <= LINEAR_LIMIT]  # also if NaN
        if wrong:
            found.append(
                f"linear {', '.join(wrong[:5])}: the output for the same input is not PyTorch's (limit "
                f"{LINEAR_LIMIT:g} of its largest value); its weight, scale or bias is not the checkpoint's."
            )
        worst = max(self.blocks, key=lambda name: self.blocks[name].share)
        if (count := self.blocks[worst]).share > BLOCK_LIMIT:
            found.append(
                f"{worst}: {100 * count.share:.2f} % of its codes differ for the same input (limit "
                f"{100 * BLOCK_LIMIT} %, n = {self.forced_images}); a weight, bias or norm in it is not the "
                "checkpoint's."
            )
        changed = [name for name, difference in self.outputs.items() if not difference <= LINEAR_LIMIT]
        if changed and not wrong:  # behind a wrong linear they cannot be right
            found.append(
                f"output {', '.join(changed)}: not PyTorch's although all quantisers were fed the same (limit "
                f"{LINEAR_LIMIT:g} of its largest value); a norm or another float tensor is not the checkpoint's."
            )
        if _below(self.agreement, self.noise_floor):
            found.append(
                f"{self.compared}: {self.agreement} with PyTorch, below the noise floor {self.noise_floor} "
                f"(n = {self.agreement.n})."
            )
        return found

    def summary(self) -> str:
        """One line: codes for the same input, outputs when running free, the noise floor."""
        forced, free = self.forced_equal(), self.free_equal()
        return (
            f"{forced.different:,} of {forced.total:,} codes differ for the same input; free-running {self.compared}: "
            f"{self.agreement}, PyTorch with itself in another order of summation {self.noise_floor}; "
            f"{100 * (1 - free.share):.2f} % of the codes equal (n = {self.agreement.n})"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""

        def counts(table: dict[str, CodeCount]) -> dict[str, Any]:
            return {name: {"different": c.different, "total": c.total} for name, c in table.items()}

        return {
            "images": self.agreement.n,
            "forced_images": self.forced_images,
            "torch_top1": None if self.torch_top1 is None else self.torch_top1.to_dict(),
            "onnx_top1": None if self.onnx_top1 is None else self.onnx_top1.to_dict(),
            "compared": self.compared,
            "agreement": self.agreement.to_dict(),
            "noise_floor": self.noise_floor.to_dict(),
            "max_output_difference": self.max_output_difference,
            "quantizers_forced": counts(self.quantizers),
            "linears_forced": self.linears,
            "outputs_forced": self.outputs,
            "blocks_forced": counts(self.blocks),
            "quantizers_free": counts(self.free),
            "block_sqnr_db": {name: round(value, 2) for name, value in self.sqnr_db.items()},
            "failures": self.failures(),
        }


def _below(found: Accuracy | Similarity, floor: Accuracy | Similarity) -> bool:
    """Whether even the favourable end of one interval is below the unfavourable end of the other; or it is NaN."""
    if isinstance(found, Similarity) and isinstance(floor, Similarity):
        # In few images perhaps no code flips: then a deviation of zero says nothing about the next ones.
        deviation = max(found.deviation, floor.deviation)
        found, floor = replace(found, deviation=deviation), replace(floor, deviation=deviation)
    resolution = _COSINE_RESOLUTION if isinstance(found, Similarity) else 0.0
    return not found.interval()[1] >= floor.interval()[0] - resolution


def _sum(counts: Any) -> CodeCount:
    total = CodeCount()
    for count in counts:
        total.different += count.different
        total.total += count.total
    return total


@torch.inference_mode()
def compare(
    model: nn.Module,
    onnx_model: ir.Model,
    images: ImageSet | Sequence[Tensor],
    *,
    forced_images: int = 256,
    batch_size: int = 64,
    runtime: Runtime = onnxruntime_reference,
    ties: bool = False,
) -> ParityReport:
    """Compare a frozen model with its lowered ONNX graph on images.

    Args:
        model: the frozen model, on the CPU.
        onnx_model: a graph of a quantising target in FP32, as :func:`gplq_export.lowering.lower` returns it.
        images: with labels, or without (all of them -1). Or batches [B, C, H, W], just as the model gets them.
        forced_images: how many images go through the teacher-forced comparisons; free-running takes all.
        batch_size: images at once, of an image set.
        runtime: where the graph runs.
        ties: it multiplies by the reciprocal of a scale: where the last bits of a number decide between two codes, it
            may take either. Quantisers are fed numbers that are moved off these ties.

    Raises:
        MissingError: the runtime is not installed.
    """
    frozen = frozen_quantizers(model)
    taps = _taps(onnx_model, frozen)
    quantizers = list(taps)
    linears = {name: _linear_output(onnx_model, name) for name in integer_linears(model)}
    factors = {name: _folded_factor(onnx_model, name, linear) for name, linear in integer_linears(model).items()}
    tapped = [tap.tensor for tap in taps.values()]
    fed = {tap.source for tap in taps.values() if tap.source not in onnx_model.graph.initializers}
    outputs = [str(value.name) for value in onnx_model.graph.outputs]
    free = _Session(onnx_model, [INPUT], [*outputs, *tapped], runtime)
    # What is looked at cannot be merged with what follows: a runtime that optimises answers without.
    whole = free if runtime is onnxruntime_reference else _Session(onnx_model, [INPUT], outputs, runtime)
    # An output that a quantiser reads as it is would be fed.
    wanted = list(dict.fromkeys([*tapped, *linears.values(), *(name for name in outputs if name not in fed)]))
    forced = _Session(onnx_model, _sources(onnx_model.graph, wanted, {*fed, INPUT}), wanted, runtime)
    segments = _segments(onnx_model, structure_of(model).units, taps, runtime)
    behind = segments[_BEHIND].quantizers if _BEHIND in segments else []
    classifies = outputs == [LOGITS]
    labelled = classifies and isinstance(images, ImageSet) and min(images.labels) >= 0

    count = len(images) if isinstance(images, ImageSet) else sum(map(len, images))
    report = ParityReport(forced_images=min(forced_images, count))
    for table, names in ((report.quantizers, quantizers), (report.free, quantizers), (report.blocks, segments)):
        table.update({name: CodeCount() for name in names})
    signal, noise = np.zeros(len(units(model))), np.zeros(len(units(model)))
    right = {"torch": 0, "onnx": 0}
    close: dict[str, list[Tensor]] = {"agreement": [], "floor": []}
    with progress(count, "PyTorch against ONNX Runtime", "image") as bar:
        done = 0
        for inputs, labels in _with_labels(images, batch_size):
            seen = _Capture(model)
            results = tree_leaves(seen.run(inputs))
            answers = free.run({INPUT: inputs.numpy()})
            for name, tap in taps.items():
                report.free[name].add(tap.codes(answers), seen.codes[name])
            if whole is not free:
                answers = whole.run({INPUT: inputs.numpy()})
            if done < report.forced_images:
                fed_inputs: dict[str, np.ndarray] = {}
                for name, tap in taps.items():
                    x = fed_inputs.get(tap.source, seen.inputs[name])  # several may read the same
                    fed_inputs[tap.source] = _off_ties(x, frozen[name]) if ties else x
                feeds = {tap.source: tap.feed(fed_inputs[tap.source]) for tap in taps.values()}
                answers_forced = forced.run({INPUT: inputs.numpy(), **feeds})
                equal: dict[str, np.ndarray] = {}
                for name, tap in taps.items():
                    codes, expected = tap.codes(answers_forced), seen.codes[name]
                    equal[name] = (codes == expected).reshape(len(codes), -1).all(1)
                    report.quantizers[name].add(codes, expected)
                for name, output in linears.items():
                    same = equal[seen.linear_quantizers[name]]  # behind another code a linear returns something else
                    expected = seen.linear_outputs[name] * factors[name]
                    _keep_largest(report.linears, name, answers_forced[output][same], expected[same])
                same = np.logical_and.reduce([equal[name] for name in behind], initial=True)
                for output, result in zip(outputs, results, strict=True):
                    if output in answers_forced:
                        same = np.broadcast_to(same, len(result))
                        _keep_largest(report.outputs, output, answers_forced[output][same], result.numpy()[same])
                for block, segment in segments.items():
                    answers_block = segment.session.run(seen.unit_inputs | {INPUT: inputs.numpy()})
                    for name in segment.quantizers:
                        report.blocks[block].add(taps[name].codes(answers_block), seen.codes[name])
                _add_error(model, seen, inputs, signal, noise)
            found = [torch.from_numpy(answers[output]) for output in outputs]
            with AnotherSummationOrder():
                again = tree_leaves(model(inputs))
            for name, others in (("agreement", found), ("floor", again)):
                close[name].append(_same_labels(others, results) if classifies else cosines(others, results))
            if labelled:
                for name, logits in (("torch", results[0]), ("onnx", found[0])):
                    right[name] += int(torch.eq(logits.argmax(1), labels).sum())
            for ours, theirs in zip(found, results, strict=True):
                difference = _largest((ours - theirs).numpy())
                report.max_output_difference = float(np.maximum(report.max_output_difference, difference))
            done += len(inputs)
            bar.update(len(inputs))
    # What was never compared, because codes before it differed in every image, is not proven.
    report.linears = {name: report.linears.get(name, math.nan) for name in linears}
    report.outputs = {name: report.outputs.get(name, 0.0 if name in fed else math.nan) for name in outputs}
    report.agreement, report.noise_floor = (_summary(values, classifies) for values in close.values())
    if labelled:
        report.torch_top1, report.onnx_top1 = (Accuracy(number, done) for number in right.values())
    with np.errstate(divide="ignore"):
        ratio = 10 * np.log10(signal / noise)
    report.sqnr_db = {name: float(value) for (name, _), value in zip(units(model), ratio, strict=True)}
    return report


def _with_labels(images: ImageSet | Sequence[Tensor], batch_size: int) -> Iterable[tuple[Tensor, Tensor]]:
    if isinstance(images, ImageSet):
        return batches(images, batch_size)
    return ((inputs, torch.full([len(inputs)], -1)) for inputs in images)


def _same_labels(ours: list[Tensor], theirs: list[Tensor]) -> Tensor:
    return (ours[0].argmax(1) == theirs[0].argmax(1)).double()


def _summary(values: list[Tensor], classifies: bool) -> Accuracy | Similarity:
    """Of what was found for each image."""
    each = torch.cat(values)
    if classifies:
        return Accuracy(int(each.sum()), len(each))
    return Similarity.of(len(each), float(each.sum()), float(each.square().sum()))


def _keep_largest(table: dict[str, float], name: str, found: np.ndarray, expected: np.ndarray) -> None:
    if not found.size:
        return
    difference = _largest(found - expected) / max(_largest(expected), 1e-30)
    table[name] = float(np.maximum(table.get(name, 0.0), difference))  # unlike max, keeps a NaN


@dataclass(frozen=True)
class _Tap:
    """Where a graph holds what a quantiser reads (``source``) and its codes (``tensor``), and in which form.

    ``scale``: of a graph that holds codes * scale only. ``offset``: what is added to the codes. ``axes``: how a graph
    that quantises first and transposes then does that, as ``numpy.transpose`` takes it.
    """

    tensor: str
    source: str
    scale: float | None = None
    offset: int = 0
    axes: tuple[int, ...] | None = None

    def codes(self, answers: dict[str, np.ndarray]) -> np.ndarray:
        """The codes, as PyTorch has them."""
        found = answers[self.tensor]
        codes = found.astype(np.int16) - self.offset if self.scale is None else np.rint(found / self.scale)
        return codes if self.axes is None else codes.transpose(self.axes)

    def feed(self, x: np.ndarray) -> np.ndarray:
        """A quantiser's input in PyTorch, as the graph has it."""
        return x if self.axes is None else np.ascontiguousarray(x.transpose(np.argsort(self.axes)))


def _taps(onnx_model: ir.Model, quantizers: Mapping[str, FrozenQuantizer]) -> dict[str, _Tap]:
    """By quantiser, in the order in which the graph computes them."""
    found, values = {}, ir.convenience.create_value_mapping(onnx_model.graph)
    for name, quantizer in quantizers.items():
        held = codes_name(name) in values
        value = values[codes_name(name) if held else f"{name}.dequantized"]
        node: ir.Node | None = value.producer()
        while held and node is not None and node.op_type != "QuantizeLinear":  # a clamp of the codes
            node = node.inputs[0].producer() if node.inputs[0] is not None else None
        zero_point = constant(node.inputs[2]) if held and node is not None else None
        after = only_reader(value)
        moved = after is not None and after.name is not None and after.name.startswith(f"{name}/Transpose")
        found[name] = _Tap(
            str(value.name),
            _quantizer_input(value, name),
            scale=None if held else float(quantizer.scale),
            offset=0 if zero_point is None else int(zero_point),
            axes=tuple(after.attributes["perm"].as_ints()) if moved and after is not None else None,
        )
    position = {value.name: i for i, node in enumerate(onnx_model.graph) for value in node.outputs}
    return dict(sorted(found.items(), key=lambda item: position[item[1].tensor]))


@dataclass
class _Segment:
    """A part of the network from one unit's input to the first quantiser of the next, which ends what the unit did."""

    quantizers: list[str]
    session: "_Session"


def _segments(onnx_model: ir.Model, names: list[str], taps: dict[str, _Tap], runtime: Runtime) -> dict[str, _Segment]:
    """For the part before all units, each unit, and the part behind: its quantisers and the first one behind it.

    Without the one behind, nothing would see the last linear of a unit, or what stands before all units.
    """
    quantizers = list(taps)
    last = max(i for i, quantizer in enumerate(quantizers) if quantizer.startswith(tuple(f"{name}." for name in names)))
    first = {name: next(i for i, q in enumerate(quantizers) if q.startswith(f"{name}.")) for name in names}
    starts = [(_BEFORE, 0), *first.items()]
    if last + 1 < len(quantizers):
        starts.append((_BEHIND, last + 1))
    marks: dict[str, str] = json.loads(onnx_model.metadata_props["gplq.marks"])
    found = {}
    for (name, start), (following, end) in itertools.pairwise([*starts, ("", len(quantizers))]):
        inside = quantizers[start : end + 1]
        ending = output_name(names[-1]) if following == _BEHIND else f"{following}.input"
        own = {tensor for mark, tensor in marks.items() if mark.startswith(ending)}
        known = {tensor: mark for mark, tensor in marks.items() if tensor not in own}
        outputs = [taps[quantizer].tensor for quantizer in inside]
        feeds = _sources(onnx_model.graph, outputs, {*known, INPUT})
        found[name] = _Segment(inside, _Session(onnx_model, feeds, outputs, runtime, known))
    return found


def _sources(graph: ir.Graph, outputs: list[str], known: set[str]) -> list[str]:
    """Those of the ``known`` tensors that ``outputs`` are computed from, the nearest ones on each path."""
    values = ir.convenience.create_value_mapping(graph)
    seen: dict[str, None] = {}
    pending = [values[name] for name in outputs]
    visited: set[int] = set()
    while pending:
        value = pending.pop()
        if id(value) in visited:
            continue
        visited.add(id(value))
        if value.name in known:
            seen[value.name] = None
        elif (node := value.producer()) is not None:
            pending += [x for x in node.inputs if x is not None]
    return list(seen)


def _largest(x: np.ndarray) -> float:
    return float(np.abs(x).max())


def _off_ties(x: np.ndarray, quantizer: FrozenQuantizer) -> np.ndarray:
    """``x``, but numbers whose last bits decide between two codes move a little towards the one that they get."""

    def codes(moved: float) -> Tensor:
        y = torch.from_numpy(x)
        y = y if quantizer.pre_shift is None else y + quantizer.pre_shift
        y = y if quantizer.pre_scale is None else y * quantizer.pre_scale
        return grid.quantize(y + moved * quantizer.scale, quantizer.scale, quantizer.bits, quantizer.signed)

    tie = _TIE * 2**quantizer.bits
    direction = (codes(0) != codes(-tie)).float() - (codes(0) != codes(tie)).float()
    step = 2 * tie * quantizer.scale
    moved: np.ndarray = x + (direction * (step if quantizer.pre_scale is None else step / quantizer.pre_scale)).numpy()
    return moved


def _add_error(model: nn.Module, quantised: "_Capture", inputs: Tensor, signal: np.ndarray, noise: np.ndarray) -> None:
    """Add each unit's output energy without quantisers, and that of the difference to it, to running sums."""
    set_rounding(model, rounding=False)
    try:
        exact = _Capture(model)
        exact.run(inputs)
    finally:
        set_rounding(model, rounding=True)
    for index, (name, _) in enumerate(units(model)):
        reference = exact.unit_outputs[name]
        signal[index] += float((reference.astype(np.float64) ** 2).sum())
        noise[index] += float(((quantised.unit_outputs[name] - reference).astype(np.float64) ** 2).sum())


class _Capture:
    """One forward pass in PyTorch with everything that is compared: what goes into quantisers, and the codes."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.inputs: dict[str, np.ndarray] = {}
        self.codes: dict[str, np.ndarray] = {}
        self.linear_outputs: dict[str, np.ndarray] = {}
        self.linear_quantizers: dict[str, str] = {}  # which quantiser made the codes that a linear read
        self._makers: dict[int, str] = {}
        self.unit_inputs: dict[str, np.ndarray] = {}  # by exported name; the last unit's output is the head's input
        self.unit_outputs: dict[str, np.ndarray] = {}

    def run(self, images: Tensor) -> Any:
        """What the model returns for ``images``."""
        with self._hooks():
            return self.model(images)

    @contextmanager
    def _hooks(self) -> Iterator[None]:
        handles = []
        for name, quantizer in frozen_quantizers(self.model).items():
            handles.append(quantizer.register_forward_hook(self._quantizer_hook(name)))
        for name, linear in integer_linears(self.model).items():
            handles.append(linear.register_forward_hook(self._linear_hook(name)))
        for name, unit in units(self.model):
            handles.append(unit.register_forward_hook(self._unit_hook(name)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _quantizer_hook(self, name: str) -> Any:
        def keep(module: FrozenQuantizer, args: tuple[Tensor], output: Any) -> None:
            if module.rounding:
                self.inputs[name] = args[0].numpy()
                self.codes[name] = output.values.to(torch.int8).numpy()
                self._makers[id(output.values)] = name

        return keep

    def _linear_hook(self, name: str) -> Any:
        def keep(_: nn.Module, args: tuple[Codes], output: Tensor) -> None:
            self.linear_outputs[name] = output.numpy()
            self.linear_quantizers[name] = self._makers.get(id(args[0].values), "")

        return keep

    def _unit_hook(self, name: str) -> Any:
        def keep(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            for index, arg in enumerate(args):
                if isinstance(arg, Tensor):
                    self.unit_inputs[input_name(name, index)] = arg.numpy()
            # Some blocks return the size of their feature map beside it.
            tensor = output[0] if isinstance(output, tuple | list) else output
            self.unit_outputs[name] = self.unit_inputs[output_name(name)] = tensor.numpy()

        return keep


class AnotherSummationOrder(TorchDispatchMode):
    """Runs a frozen model with every sum in another order: the noise floor of correct back ends.

    Matmuls multiply by the scales first, as a Q/DQ graph does, and add up backwards; norms and softmax reduce
    backwards. Mathematically nothing changes.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replace gplq's matmuls, LayerNorm and softmax; leave the rest."""
        ops, aten = torch.ops.gplq, torch.ops.aten
        if func is ops.linear.default:
            codes, scale, weight, weight_scale, bias = args[:5]
            x, w = codes * scale, weight.to(codes.dtype) * weight_scale[:, None]
            return F.linear(x.flip(-1), w.flip(-1), bias)
        if func is ops.conv.default:
            codes, scale, weight, weight_scale, bias, stride, padding, dilation = args[:8]
            x, w = codes * scale, weight.to(codes.dtype) * weight_scale[:, None, None, None]
            return F.conv2d(x.flip(1), w.flip(1), bias, stride, padding, dilation)
        if func is ops.matmul.default:
            a, a_scale, b, b_scale = args[:4]
            return torch.matmul((a * a_scale).flip(-1), (b * b_scale).flip(-2))
        if func is aten._softmax.default:
            return func(args[0].flip(args[1]), *args[1:]).flip(args[1])
        if func is aten.native_layer_norm.default and len(args[1]) == 1:
            x, shape, weight, bias, eps = args
            flipped = [None if t is None else t.flip(-1) for t in (weight, bias)]
            y, mean, rstd = func(x.flip(-1), shape, *flipped, eps)
            return y.flip(-1), mean, rstd
        return func(*args, **(kwargs or {}))


class _Session:
    """A part of an ONNX graph in a runtime; 4-bit codes come back as int8."""

    def __init__(
        self,
        model: ir.Model,
        inputs: Sequence[str],
        outputs: Sequence[str],
        runtime: Runtime,
        names: Mapping[str, str] | None = None,
    ) -> None:
        """``names``: by which name :meth:`run` is given an input, if not by the tensor's own."""
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
        for value in part.inputs:
            value.type = ir.TensorType(ir.DataType.FLOAT)
            value.shape = None if value.name != INPUT else value.shape
        whole = ir.Model(part, ir_version=model.ir_version)
        whole.opset_imports.update(model.opset_imports)
        self._run = runtime(ir.to_proto(whole).SerializeToString())
        self.outputs = list(outputs)

    def run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Arrays by tensor name; ``feeds`` may hold more than is needed."""
        needed = {tensor: feeds[name] for tensor, name in self.inputs.items()}
        return dict(zip(self.outputs, self._run(needed), strict=True))


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


def _linear_output(model: ir.Model, linear: str) -> str:
    """The tensor that a linear returns, its bias added if it has one."""
    nodes = {node.name: node for node in model.graph}
    name = nodes.get(f"{linear}/Add", nodes[linear]).outputs[0].name
    assert name is not None
    return name


def _folded_factor(model: ir.Model, linear: str, layer: IntegerLinear) -> np.ndarray:
    """What a graph multiplies a linear's output by within the linear: 1, or the layer scale behind it, [N]."""
    scaled = constant(model.graph.initializers.get(f"{linear}.weight_scale{SCALED}"))
    return np.ones((), np.float32) if scaled is None else scaled / layer.weight_scale.numpy()
