"""Proof that an ONNX file computes what PyTorch computed: PyTorch fake-quant against ONNX Runtime, optimisation off.

Rounding is chaotic: two correct back ends sum in different orders, a last-bit difference in front of a quantiser flips
a code, and the flip travels through all blocks. So each thing is judged where it can be judged:

    quantisers, teacher-forced    fed PyTorch's own input, each returns PyTorch's codes: all of them
    linears, teacher-forced       fed PyTorch's own input, each returns PyTorch's output but for its last bits
    blocks, teacher-forced        fed PyTorch's own block input, at most 0.5 % of each block's codes differ, those of
                                  the quantiser behind it included
    free-running                  label agreement no worse than PyTorch's with itself in another order of summation

Everything is streamed: memory is one batch, whatever the number of images.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from gplq.checkpoint import frozen_quantizers, integer_linears
from gplq.data import ImageSet, batches
from gplq.errors import MissingError
from gplq.evaluate import Accuracy
from gplq.integer import FrozenQuantizer, set_rounding
from gplq.layers import blocks
from gplq.progress import progress
from gplq_export.targets import codes_name
from gplq_export.trace import INPUT, OUTPUT

BLOCK_LIMIT = 0.005  # share of a block's codes that may differ when it is fed the same input
LINEAR_LIMIT = 1e-4  # largest difference of a linear's output from PyTorch's, relative to its largest value
_BEFORE, _BEHIND = "patch_embed", "head"  # the parts of the network in front of the first block and behind the last


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
        sqnr_db: per block, how far the quantised output is from the same network's without quantisers, in dB.
        torch_top1, onnx_top1: against the labels. ``agreement``: labels equal between the two. ``noise_floor``: labels
            equal between PyTorch and PyTorch in another order of summation.
    """

    forced_images: int
    quantizers: dict[str, CodeCount] = field(default_factory=dict)
    linears: dict[str, float] = field(default_factory=dict)
    blocks: dict[str, CodeCount] = field(default_factory=dict)
    free: dict[str, CodeCount] = field(default_factory=dict)
    sqnr_db: dict[str, float] = field(default_factory=dict)
    torch_top1: Accuracy = _NONE
    onnx_top1: Accuracy = _NONE
    agreement: Accuracy = _NONE
    noise_floor: Accuracy = _NONE
    max_logit_difference: float = 0.0

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
        if self.agreement.interval()[1] < self.noise_floor.interval()[0]:
            found.append(
                f"labels: {self.agreement} agree with PyTorch, below the noise floor {self.noise_floor} "
                f"(n = {self.agreement.n})."
            )
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""

        def counts(table: dict[str, CodeCount]) -> dict[str, Any]:
            return {name: {"different": c.different, "total": c.total} for name, c in table.items()}

        return {
            "images": self.agreement.n,
            "forced_images": self.forced_images,
            "torch_top1": self.torch_top1.to_dict(),
            "onnx_top1": self.onnx_top1.to_dict(),
            "label_agreement": self.agreement.to_dict(),
            "noise_floor": self.noise_floor.to_dict(),
            "max_logit_difference": self.max_logit_difference,
            "quantizers_forced": counts(self.quantizers),
            "linears_forced": self.linears,
            "blocks_forced": counts(self.blocks),
            "quantizers_free": counts(self.free),
            "block_sqnr_db": {name: round(value, 2) for name, value in self.sqnr_db.items()},
            "failures": self.failures(),
        }


def _sum(counts: Any) -> CodeCount:
    total = CodeCount()
    for count in counts:
        total.different += count.different
        total.total += count.total
    return total


@torch.inference_mode()
def compare(
    model: nn.Module, onnx_model: ir.Model, images: ImageSet, *, forced_images: int = 256, batch_size: int = 64
) -> ParityReport:
    """Compare a frozen model with its lowered ONNX graph on images.

    Args:
        model: the frozen model, on the CPU.
        onnx_model: a graph of a quantising target in FP32, as :func:`gplq_export.lowering.lower` returns it.
        images: with labels.
        forced_images: how many images go through the teacher-forced comparisons; free-running takes all.
        batch_size: images at once.

    Raises:
        MissingError: ONNX Runtime is not installed.
    """
    named = blocks(model)
    quantizers = list(frozen_quantizers(model))
    starts = {_BEFORE: INPUT, **{name: f"{name}.input" for name, _ in named}, _BEHIND: f"{named[-1][0]}.output"}
    inside = _segments([name for name, _ in named], quantizers)
    linears = {name: _linear_output(onnx_model, name) for name in integer_linears(model)}
    sources = {name: _quantizer_input(onnx_model, name) for name in quantizers}
    taps = [codes_name(name) for name in quantizers]
    free = _Session(onnx_model, [INPUT], [OUTPUT, *taps])
    forced = _Session(onnx_model, list(dict.fromkeys(sources.values())), [*taps, *linears.values()])
    by_block = {
        block: _Session(onnx_model, [starts[block]], [codes_name(name) for name in names])
        for block, names in inside.items()
    }

    report = ParityReport(forced_images=min(forced_images, len(images)))
    for table, names in ((report.quantizers, quantizers), (report.free, quantizers), (report.blocks, inside)):
        table.update({name: CodeCount() for name in names})
    report.linears = dict.fromkeys(linears, 0.0)
    signal, noise = np.zeros(len(named)), np.zeros(len(named))
    right = dict.fromkeys(("torch", "onnx", "agree", "floor"), 0)
    with progress(len(images), "PyTorch against ONNX Runtime", "image") as bar:
        done = 0
        for inputs, labels in batches(images, batch_size):
            seen = _Capture(model)
            logits = seen.run(inputs)
            answers = free.run({INPUT: inputs.numpy()})
            for name in quantizers:
                report.free[name].add(answers[codes_name(name)], seen.codes[name])
            if done < report.forced_images:
                answers_forced = forced.run({sources[name]: seen.inputs[name] for name in quantizers})
                for name in quantizers:
                    report.quantizers[name].add(answers_forced[codes_name(name)], seen.codes[name])
                for name, output in linears.items():
                    largest = _largest(answers_forced[output] - seen.linear_outputs[name])
                    largest /= max(_largest(seen.linear_outputs[name]), 1e-30)
                    report.linears[name] = float(np.maximum(report.linears[name], largest))  # unlike max, keeps a NaN
                fed = {_BEFORE: inputs.numpy(), **seen.block_inputs, _BEHIND: seen.block_outputs[named[-1][0]]}
                for block, names in inside.items():
                    answers_block = by_block[block].run({starts[block]: fed[block]})
                    for name in names:
                        report.blocks[block].add(answers_block[codes_name(name)], seen.codes[name])
                _add_error(model, seen, inputs, signal, noise)
            torch_labels, onnx_labels = logits.argmax(1), torch.from_numpy(answers[OUTPUT]).argmax(1)
            with AnotherSummationOrder():
                floor_labels = model(inputs).argmax(1)
            right["torch"] += int((torch_labels == labels).sum())
            right["onnx"] += int((onnx_labels == labels).sum())
            right["agree"] += int((onnx_labels == torch_labels).sum())
            right["floor"] += int((floor_labels == torch_labels).sum())
            difference = float((torch.from_numpy(answers[OUTPUT]) - logits).abs().max())
            report.max_logit_difference = float(np.maximum(report.max_logit_difference, difference))
            done += len(labels)
            bar.update(len(labels))
    report.torch_top1, report.onnx_top1, report.agreement, report.noise_floor = (
        Accuracy(right[key], done) for key in ("torch", "onnx", "agree", "floor")
    )
    with np.errstate(divide="ignore"):
        ratio = 10 * np.log10(signal / noise)
    report.sqnr_db = {name: float(value) for (name, _), value in zip(named, ratio, strict=True)}
    return report


def _segments(names: list[str], quantizers: list[str]) -> dict[str, list[str]]:
    """For the part before the blocks, each block, and the part behind: its quantisers, and the first one behind it.

    Without the one behind, nothing would see the last linear of a block, or what stands before all blocks.
    """
    inside = {name: [q for q in quantizers if q.startswith(f"{name}.")] for name in names}
    start, end = quantizers.index(inside[names[0]][0]), quantizers.index(inside[names[-1]][-1]) + 1
    before, behind = quantizers[:start], quantizers[end:]  # the order is the network's
    following = [*(own[0] for own in inside.values()), *behind[:1]]
    found = {
        name: [*own, *following[index : index + 1]]
        for index, (name, own) in enumerate({_BEFORE: before, **inside}.items())
    }
    return {**found, _BEHIND: behind} if behind else found


def _largest(x: np.ndarray) -> float:
    return float(np.abs(x).max())


def _add_error(model: nn.Module, quantised: "_Capture", inputs: Tensor, signal: np.ndarray, noise: np.ndarray) -> None:
    """Add each block's output energy without quantisers, and that of the difference to it, to running sums."""
    set_rounding(model, rounding=False)
    try:
        exact = _Capture(model)
        exact.run(inputs)
    finally:
        set_rounding(model, rounding=True)
    for index, (name, _) in enumerate(blocks(model)):
        reference = exact.block_outputs[name]
        signal[index] += float((reference.astype(np.float64) ** 2).sum())
        noise[index] += float(((quantised.block_outputs[name] - reference).astype(np.float64) ** 2).sum())


class _Capture:
    """One forward pass in PyTorch with everything that is compared: what goes into quantisers, and the codes."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.inputs: dict[str, np.ndarray] = {}
        self.codes: dict[str, np.ndarray] = {}
        self.linear_outputs: dict[str, np.ndarray] = {}
        self.block_inputs: dict[str, np.ndarray] = {}
        self.block_outputs: dict[str, np.ndarray] = {}

    def run(self, images: Tensor) -> Tensor:
        """Logits of ``images``."""
        with self._hooks():
            logits: Tensor = self.model(images)
        return logits

    @contextmanager
    def _hooks(self) -> Iterator[None]:
        handles = []
        for name, quantizer in frozen_quantizers(self.model).items():
            handles.append(quantizer.register_forward_hook(self._quantizer_hook(name)))
        for name, linear in integer_linears(self.model).items():
            handles.append(linear.register_forward_hook(self._linear_hook(name)))
        for name, block in blocks(self.model):
            handles.append(block.register_forward_hook(self._block_hook(name)))
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

        return keep

    def _linear_hook(self, name: str) -> Any:
        def keep(_: nn.Module, __: Any, output: Tensor) -> None:
            self.linear_outputs[name] = output.numpy()

        return keep

    def _block_hook(self, name: str) -> Any:
        def keep(_: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
            self.block_inputs[name], self.block_outputs[name] = args[0].numpy(), output.numpy()

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
    """A part of an ONNX graph in ONNX Runtime on the CPU, graph optimisation off; codes come back as int8."""

    def __init__(self, model: ir.Model, inputs: Sequence[str], outputs: Sequence[str]) -> None:
        part = ir.convenience.extract(model.graph, list(inputs), list(outputs))
        for index, value in enumerate(part.outputs):
            producer = value.producer()
            if producer is None or producer.op_type != "QuantizeLinear":
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
        self.session = reference_session(ir.to_proto(whole).SerializeToString())
        self.outputs = list(outputs)

    def run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Arrays by tensor name."""
        return dict(zip(self.outputs, self.session.run(None, feeds), strict=True))


def reference_session(model: bytes | str) -> Any:
    """An ONNX Runtime session on the CPU that runs the graph as it is written.

    Raises:
        MissingError: ONNX Runtime is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingError(
            "ONNX Runtime is not installed: pip install 'gplq[cpu]', or 'gplq[gpu]' on a machine with an NVIDIA GPU; "
            "never both, they share a folder."
        ) from error
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _quantizer_input(model: ir.Model, quantizer: str) -> str:
    """The tensor that a quantiser, with the factor in front of it if it has one, reads."""
    values = ir.convenience.create_value_mapping(model.graph)
    node = values[codes_name(quantizer)].producer()
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
