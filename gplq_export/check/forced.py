"""Teacher-forced: a graph is fed PyTorch's own tensors, so that each thing is judged where nothing has piled up yet.

    quantisers   fed PyTorch's input, each returns PyTorch's codes: all of them; on images, and on numbers that lie on
                 and around every step and both limits of its grid, which images may never reach
    floats       fed all codes that PyTorch has, what each linear returns, what each quantiser reads and what the
                 network returns is PyTorch's but for its last bits: weights, scales, biases, norms, activations,
                 embeddings, everything between quantisers
    blocks       fed PyTorch's block input, a block's codes are PyTorch's but for those that its own last bits flip

A graph that is wrong anywhere differs in the very place, and nowhere else.
"""

import itertools
import math
from collections.abc import Iterable, Mapping

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from gplq import grid
from gplq.checkpoint import frozen_quantizers, integer_linears
from gplq.convert import structure_of
from gplq.grid import code_limits
from gplq.integer import FrozenQuantizer
from gplq.progress import progress
from gplq_export.check.accumulate import CodeCounts
from gplq_export.check.capture import Capture
from gplq_export.check.graph import Part, Tap, find_taps, folded_factor, linear_output, segments, sources
from gplq_export.check.report import Forced
from gplq_export.passes.common import reachable
from gplq_export.runtimes import Runtime, onnxruntime_reference
from gplq_export.trace import INPUT

# By so much of its range a number may be wrong that was multiplied by a rounded reciprocal and moved to positive codes.
_TIE = 2.0**-21
# A channel of which little is left gets its last bits from what it adds up: a linear's from its products, what a
# network returns from about the largest. It is held against so much of that.
_SMALLEST = 5e-2
_MOST_ROWS = 64


@torch.inference_mode()
def compare_forced(
    model: nn.Module,
    graph: ir.Model,
    batches: Iterable[Tensor],
    images: int,
    what: str,
    *,
    block_limit: float,
    runtime: Runtime = onnxruntime_reference,
    ties: bool = False,
    whole_blocks: bool = False,
) -> Forced:
    """Feed a graph what PyTorch computed.

    Args:
        model: the frozen model, on the CPU.
        graph: a graph of a quantising target in FP32, as :func:`gplq_export.lowering.lower` returns it.
        batches: images [B, C, H, W], just as the model gets them.
        images: how many there are.
        what: names the graph in the progress line.
        block_limit: per cent of a block's codes that may differ.
        runtime: where the graph runs.
        ties: it multiplies by the reciprocal of a scale: where the last bits of a number decide between two codes, it
            may take either. Quantisers are fed numbers that are moved off these ties.
        whole_blocks: of a block's codes compare the last ones only. A runtime that rearranges what it runs merges
            nothing across a tensor that it must return: without, quantisers inside a block would be seen as they are
            nowhere else.

    Raises:
        MissingError: the runtime is not installed.
    """
    quantizers = frozen_quantizers(model)
    taps = find_taps(graph, quantizers)
    given = [tap.source for tap in taps.values() if tap.source not in graph.graph.initializers]
    tapped = [tap.tensor for tap in taps.values()]
    rounding = Part(graph, sources(graph.graph, tapped, {*given, INPUT}), tapped, runtime)
    floats = _Floats(model, graph, taps, runtime)
    parts = segments(graph, structure_of(model).units, taps, runtime, only_last=whole_blocks)
    codes, blocks = CodeCounts(taps), CodeCounts(parts)
    on_grid: dict[str, int] = {}
    done = 0
    with progress(images, f"{what}, fed by PyTorch", "image") as bar:
        for inputs in batches:
            seen = Capture(model, inputs)
            if not on_grid:
                on_grid = _compare_on_grid(rounding, graph, quantizers, taps, seen, ties)
            fed: dict[str, np.ndarray] = {}
            for name, tap in taps.items():
                x = fed.get(tap.source, seen.inputs[name])  # several may read the same
                fed[tap.source] = _off_ties(x, quantizers[name]) if ties else x
            for name, found in _codes(rounding, taps, fed).items():
                codes.add(name, seen.codes[name], found, len(inputs))
            floats.add(inputs, seen)
            for block, segment in parts.items():
                answers = segment.part.run(seen.unit_inputs | {INPUT: inputs.numpy()})
                expected, got = (
                    np.concatenate([each(name).reshape(len(inputs), -1) for name in segment.quantizers], 1)
                    for each in (seen.codes.__getitem__, lambda name: taps[name].codes(answers))  # noqa: B023  called here
                )
                blocks.add(block, expected, got, len(inputs))
            done += len(inputs)
            bar.update(len(inputs))
    return Forced(
        images=done,
        quantizers=[codes.layer(name, "quantizer", None, codes.different(name) == 0) for name in taps],
        grid=on_grid,
        linears=_largest(floats.linears),
        floats=_largest(floats.sources),
        outputs=_largest(floats.outputs),
        blocks=[
            blocks.layer(name, "block", None, share is not None and share.value <= block_limit)
            for name in parts
            for share in [blocks.share(name)]
        ],
    )


def _codes(part: Part, taps: Mapping[str, Tap], fed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What each quantiser of a graph makes of ``fed``, arrays by source as PyTorch has them."""
    answers = part.run({tap.source: tap.as_in_graph(fed[tap.source]) for tap in taps.values()})
    return {name: tap.codes(answers) for name, tap in taps.items()}


class _Floats:
    """Everything between quantisers, all codes fed: differences of each, relative to its channel's range, by batch."""

    def __init__(self, model: nn.Module, graph: ir.Model, taps: dict[str, Tap], runtime: Runtime) -> None:
        self.taps = taps
        self._linears = integer_linears(model)
        self._tensors = {name: linear_output(graph, name) for name in self._linears}
        self._factors = {name: folded_factor(graph, name, linear) for name, linear in self._linears.items()}
        # What is small beside a grid's limits need not be exact: of a GELU's tail no digits are left in FP32.
        self._reaches = {name: _reach(quantizer) for name, quantizer in frozen_quantizers(model).items()}
        self._outputs = [str(value.name) for value in graph.graph.outputs]
        types = {tap.tensor: tap.code_type for tap in taps.values()}
        # What is given cannot be asked for: a network's input that a quantiser reads, a linear's output that is codes.
        wanted = [*self._tensors.values(), *(tap.source for tap in taps.values()), *self._outputs]
        wanted = [name for name in dict.fromkeys(wanted) if name not in {INPUT, *types, *graph.graph.initializers}]
        inputs = sources(graph.graph, wanted, {*types, INPUT})
        self._part = Part(graph, inputs, wanted, runtime, types=types)
        self.linears: dict[str, list[float]] = {name: [] for name in self._linears}
        self.sources: dict[str, list[float]] = {name: [] for name, tap in taps.items() if tap.source in wanted}
        self.outputs: dict[str, list[float]] = {name: [] for name in self._outputs}

    def add(self, inputs: Tensor, seen: Capture) -> None:
        """Compare a batch."""
        fed = {tap.tensor: tap.feed(seen.codes[name]) for name, tap in self.taps.items()}
        answers = self._part.run({INPUT: inputs.numpy(), **fed})
        for name, linear in self._linears.items():
            found, factor = answers[self._tensors[name]], self._factors[name]
            smallest = _SMALLEST * np.abs(seen.linear_terms[name] * factor)
            expected = seen.linear_outputs[name] * factor
            self.linears[name].append(_difference(found, expected, linear.channel_axis, smallest))
        for name in self.sources:
            found = self.taps[name].as_in_pytorch(answers[self.taps[name].source])
            self.sources[name].append(_difference(found, seen.inputs[name], -1, self._reaches[name]))
        for name, output in zip(self._outputs, seen.outputs, strict=True):
            expected = output.numpy()
            self.outputs[name].append(_difference(answers[name], expected, 1, _SMALLEST * np.abs(expected).max()))


def _reach(quantizer: FrozenQuantizer) -> np.ndarray:
    """The largest magnitude on a quantiser's grid, as its input has it; [] or [C]."""
    low, high = code_limits(quantizer.bits, quantizer.signed)
    largest = max(-low, high) * quantizer.scale
    return (largest if quantizer.pre_scale is None else largest / quantizer.pre_scale.abs()).numpy()


def _difference(found: np.ndarray, expected: np.ndarray, axis: int, smallest: np.ndarray) -> float:
    """The largest difference of a channel, relative to its largest value, but at least to ``smallest``, [] or [N]."""
    others = tuple(i for i in range(expected.ndim) if i != axis % expected.ndim)
    ranges = np.maximum(np.abs(expected).max(others), np.maximum(smallest, 1e-30))
    return float((np.abs(found - expected).max(others) / ranges).max())


def _largest(differences: Mapping[str, list[float]]) -> dict[str, float]:
    """Of all batches; NaN if one of them is, or if nothing was compared, which proves nothing."""
    return {name: float(np.max(each)) if each else math.nan for name, each in differences.items()}


def _compare_on_grid(
    part: Part,
    graph: ir.Model,
    quantizers: Mapping[str, FrozenQuantizer],
    taps: Mapping[str, Tap],
    seen: Capture,
    ties: bool,
) -> dict[str, int]:
    """How many codes differ, by quantiser, for numbers on and around its steps and limits.

    Numbers that cannot come, such as negative ones behind a softmax, are left out: no clamp is needed for them.
    """
    values = ir.convenience.create_value_mapping(graph.graph)
    rows = 1
    for name, quantizer in quantizers.items():
        rows = max(rows, math.ceil(len(_steps(quantizer)) / math.prod(seen.inputs[name].shape[1:])))
    fed: dict[str, np.ndarray] = {}
    for name, tap in taps.items():
        if tap.source not in fed:
            shape = (min(rows, _MOST_ROWS), *seen.inputs[name].shape[1:])
            fed[tap.source] = np.clip(_on_steps(quantizers[name], shape), *reachable(values[tap.source]))
        if ties:
            fed[tap.source] = _off_ties(fed[tap.source], quantizers[name])
    different = {}
    for name, found in _codes(part, taps, fed).items():
        expected = quantizers[name](torch.from_numpy(fed[taps[name].source])).values.numpy()
        different[name] = int((found != expected).sum())
    return different


def _steps(quantizer: FrozenQuantizer) -> np.ndarray:
    """Numbers, in codes, between which and on which a quantiser decides; beyond its limits, too."""
    low, high = code_limits(quantizer.bits, quantizer.signed)
    halves = np.arange(2 * low - 5, 2 * high + 6) / 2
    return np.concatenate([halves, halves + 1e-3, halves - 1e-3]).astype(np.float32)


def _on_steps(quantizer: FrozenQuantizer, shape: tuple[int, ...]) -> np.ndarray:
    """An input of a quantiser that meets its steps, as many of them as it has elements."""
    steps = itertools.islice(itertools.cycle(np.random.default_rng(0).permutation(_steps(quantizer))), math.prod(shape))
    x = torch.from_numpy(np.fromiter(steps, np.float32).reshape(shape)) * quantizer.scale
    x = x if quantizer.pre_scale is None else x / quantizer.pre_scale
    return (x if quantizer.pre_shift is None else x - quantizer.pre_shift).numpy()


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
