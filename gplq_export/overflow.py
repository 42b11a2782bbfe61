"""Does everything that an FP16 engine computes fit into FP16? Found out on images before the engine is built.

The graph that the engine is built from is lowered once more with FP32 in place of FP16 and run in ONNX Runtime; what is
kept is the largest magnitude of each floating point tensor, all images together. FP16 holds up to 65504; beyond, an
engine computes infinities without a word.

An INT8 engine has one more number than the graph: with FP16 scales it multiplies the integer sum of a linear by the
activation's scale first and holds *that* in FP16, before the weights' scales. It is the linear's result divided by the
scale of its output channel, and larger by one or two orders of magnitude (:attr:`Peak.before_scale`).
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass
from torch import Tensor

from gplq.data import ImageSet, batches
from gplq.errors import UsageError
from gplq.progress import progress
from gplq_export.runtimes import onnxruntime_session
from gplq_export.trace import INPUT

FP16_MAX = 65504.0
WARN_SHARE = 0.25  # of the range: calibration images are few, and others may go further
_SHOWN = 5
# Move what they were given.
_LAYOUT = {"Expand", "Flatten", "Gather", "Identity", "Pad", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"}
# Return nothing larger than their inputs have shown.
_NO_LARGER = {*_LAYOUT, "Cast", "Clip", "Concat", "DequantizeLinear", "Relu", "Softmax", "Split"}


@dataclass(frozen=True)
class Peak:
    """The largest magnitude that a tensor reached.

    Attributes:
        tensor: its name in the graph. ``operator``: of the node that computes it, or "constant".
        before_scale: not the tensor itself, but what an INT8 engine holds before it applies the weights' scales.
    """

    tensor: str
    operator: str
    value: float
    before_scale: bool = False

    @property
    def headroom(self) -> float:
        """By which factor it may grow and still fit."""
        return FP16_MAX / self.value if self.value else float("inf")

    def __str__(self) -> str:
        what = "the sum before the weights' scales of " if self.before_scale else ""
        return f"{what}{self.tensor} ({self.operator}) reaches {self.value:,.{0 if self.value >= 100 else 2}f}"


@dataclass(frozen=True)
class OverflowReport:
    """The peaks of the floating point tensors of a graph over ``images`` images, largest first.

    Tensors that only hold what another one held, such as those behind a Reshape, are left out.
    """

    images: int
    peaks: tuple[Peak, ...]

    def failures(self) -> list[str]:
        """One sentence for each tensor that does not fit into FP16; empty if all do. NaN does not fit."""
        return [
            f"{peak} on {self.images} images, and FP16 holds up to {FP16_MAX:.0f}: an FP16 engine computes infinity "
            "there, and no error. "
            + (
                "Fewer bits make that layer's scales larger and the sum smaller (first and last layer: first_last_bits "
                "in the recipe)."
                if peak.before_scale
                else "Do not deploy one of this checkpoint; the files for ONNX Runtime compute in FP32."
            )
            for peak in self.peaks
            if not peak.value <= FP16_MAX
        ]

    def warnings(self) -> list[str]:
        """One sentence for each tensor that fits, but with little room."""
        return [
            f"{peak} on {self.images} images, {100 * peak.value / FP16_MAX:.0f} % of what FP16 holds (head-room "
            f"{peak.headroom:.1f}x): other images may go beyond. Probe with more of them."
            for peak in self.peaks
            if WARN_SHARE * FP16_MAX < peak.value <= FP16_MAX
        ]

    def summary(self) -> str:
        """The tensor that comes closest, in one line."""
        worst = self.peaks[0]
        return (
            f"FP16 range: {worst} on {self.images} images, head-room {worst.headroom:.1f}x ({len(self.peaks)} tensors)"
        )

    def to_dict(self) -> dict[str, Any]:
        """The largest peaks, failures and warnings; plain data for JSON."""
        return {
            "images": self.images,
            "tensors": len(self.peaks),
            "fp16_max": FP16_MAX,
            "largest": [asdict(peak) for peak in self.peaks[:_SHOWN]],
            "failures": self.failures(),
            "warnings": self.warnings(),
        }


def probe(
    model: ir.Model, images: ImageSet | Sequence[Tensor], *, limit: int = 16, batch_size: int = 2
) -> OverflowReport:
    """Run the FP32 form of a graph on images and keep the largest magnitude of every floating point tensor.

    Memory is that of one batch; tensors are reduced to one number as soon as they are computed.

    Args:
        model: what the engine is built from, lowered with ``Target(ir.DataType.FLOAT)``; stays as it is.
        images: an image set, or batches [B, C, H, W], float32, just as the model gets them.
        limit: look at so many images.
        batch_size: images at once; few are faster, since their tensors stay in the cache.

    Raises:
        UsageError: there are no images.
        MissingError: ONNX Runtime is not installed.
    """
    model = model.clone()
    constants = _constants(model.graph)
    taps = _tap(model)
    # Twice as fast as without optimisation, and still no kernel that computes something else.
    session = onnxruntime_session(ir.to_proto(model).SerializeToString(), "ENABLE_BASIC")
    largest = np.zeros(len(taps), np.float32)
    done = 0
    total = len(images) if isinstance(images, ImageSet) else sum(map(len, images))
    with progress(min(limit, total), "FP16 range", "image") as bar:
        for inputs in _inputs(images, batch_size):
            batch = inputs[: limit - done]
            found = session.run(None, {INPUT: batch.numpy()})
            largest = np.maximum(largest, np.array(found, np.float32))  # unlike fmax, keeps a NaN
            done += len(batch)
            bar.update(len(batch))
            if done >= limit:
                break
    if not done:
        raise UsageError("no images to probe the FP16 range with")
    measured = [
        Peak(tensor, operator, float(value), before_scale)
        for (tensor, operator, before_scale), value in zip(taps, largest, strict=True)
    ]
    peaks = sorted([*measured, *constants], key=lambda peak: np.nan_to_num(peak.value, nan=np.inf), reverse=True)
    return OverflowReport(done, tuple(peaks))


def _inputs(images: ImageSet | Sequence[Tensor], batch_size: int) -> Iterable[Tensor]:
    if isinstance(images, ImageSet):
        return (inputs for inputs, _ in batches(images, batch_size))
    return (part for inputs in images for part in inputs.split(batch_size))


def _constants(graph: ir.Graph) -> list[Peak]:
    """Weights, biases and scales: they are rounded to FP16 as they are."""
    found = []
    for name, value in graph.initializers.items():
        if value.const_value is not None and value.dtype == ir.DataType.FLOAT and value.const_value.size:
            found.append(Peak(name, "constant", float(np.abs(value.const_value.numpy()).max())))
    return found


def _tap(model: ir.Model) -> list[tuple[str, str, bool]]:
    """Replace the graph's outputs by the largest magnitude of each tensor; tensor, operator, before_scale of each."""
    ShapeInferencePass()(model)  # tells which tensors are floating point
    graph = model.graph
    taps: list[tuple[str, str, bool]] = []
    outputs: list[ir.Value] = []

    def add(value: ir.Value, tensor: str, operator: str, before_scale: bool) -> None:
        name = f"gplq.peak.{len(taps)}"
        magnitude = ir.node("Abs", [value], name=f"{name}/Abs")
        peak = ir.node("ReduceMax", magnitude.outputs, attributes={"keepdims": 0}, name=f"{name}/ReduceMax")
        peak.outputs[0].name, peak.outputs[0].type = name, ir.TensorType(ir.DataType.FLOAT)
        peak.outputs[0].shape = ir.Shape([])
        graph.extend([magnitude, peak])
        taps.append((tensor, operator, before_scale))
        outputs.append(peak.outputs[0])

    for node in list(graph):
        for value in node.outputs:
            if value.dtype == ir.DataType.FLOAT and value.name and node.op_type not in _NO_LARGER:
                add(value, value.name, node.op_type, before_scale=False)
        if (scaled := _before_scale(graph, node)) is not None:
            add(scaled, str(node.outputs[0].name), node.op_type, before_scale=True)
    graph.outputs[:] = outputs
    return taps


def _before_scale(graph: ir.Graph, node: ir.Node) -> ir.Value | None:
    """The product of integers and the activation's scale alone; None if the node multiplies no integer weights."""
    if node.op_type not in ("MatMul", "Conv"):
        return None
    activation, weight = (None if value is None else value.producer() for value in node.inputs[:2])
    while activation is not None and activation.op_type in _LAYOUT:
        activation = None if activation.inputs[0] is None else activation.inputs[0].producer()
    scale = None if weight is None or weight.op_type != "DequantizeLinear" else weight.inputs[1]
    if activation is None or activation.op_type != "DequantizeLinear" or scale is None or not scale.is_initializer():
        return None
    assert scale.const_value is not None
    result = node.outputs[0]
    factors = scale.const_value.numpy().reshape(-1, *[1] * (2 if node.op_type == "Conv" else 0))
    if node.op_type == "Conv" and len(node.inputs) > 2 and node.inputs[2] is not None:
        assert node.inputs[2].const_value is not None
        bias = _constant(graph, f"{node.name}/peak.bias", node.inputs[2].const_value.numpy().reshape(-1, 1, 1))
        minus = ir.node("Sub", [result, bias], name=f"{node.name}/peak.Sub")
        graph.append(minus)
        result = minus.outputs[0]
    divided = ir.node("Div", [result, _constant(graph, f"{node.name}/peak.scale", factors)])
    divided.name = f"{node.name}/peak.Div"
    graph.append(divided)
    return divided.outputs[0]


def _constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    value = ir.Value(
        name=name,
        const_value=ir.Tensor(array, name=name),
        type=ir.TensorType(ir.DataType.FLOAT),
        shape=ir.Shape(array.shape),
    )
    graph.register_initializer(value)
    return value
