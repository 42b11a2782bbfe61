"""Reading back at which precision an engine runs, layer by layer, and comparing it with what was asked for.

With detailed profiling verbosity and a verbose logger the builder prints "Layers:" and one line for each engine layer
with its tensors' types and the ONNX nodes in it, also on a machine without a GPU. Matrix multiplications appear as
``gemm`` (operands as stored, epilogue apart) or as a fusion ``__myl_<ops>Fc<ops>`` whose operations before ``Fc``
convert the operands: a ``Cast`` there means that 8-bit operands are dequantised inside the kernel and multiplied in
floating point, although the layer's inputs say Int8.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gplq.errors import BuildError, PrecisionError

# TensorRT's names for types, in either style of listing: "Datatype: Half" or "Row major linear FP16 format".
_DTYPES = {
    "int4": "INT4", "fp4e2m1": "FP4", "fp4": "FP4", "int8": "INT8", "fp8e4m3": "FP8", "fp8": "FP8",
    "half": "FP16", "fp16": "FP16", "bfloat16": "BF16", "bf16": "BF16", "float": "FP32", "fp32": "FP32",
}  # fmt: skip
_WIDTH = {name: rank for rank, name in enumerate(["INT4", "FP4", "INT8", "FP8", "FP16", "BF16", "FP32", "unknown"])}
_FLOATS = ("FP16", "BF16", "FP32")


@dataclass(frozen=True)
class EngineTensor:
    """An operand of an engine layer: builder's name, dtype ("INT8", "FP16", …) and shape, -1 where dynamic."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def is_matrix(self) -> bool:
        """Whether two dimensions or more are not 1: no scalar factor, scale or bias."""
        return sum(size != 1 for size in self.shape) > 1


@dataclass(frozen=True)
class EngineLayer:
    """One kernel of an engine, with the ONNX nodes that it computes wholly or in part."""

    name: str
    layer_type: str
    inputs: tuple[EngineTensor, ...]
    constants: tuple[EngineTensor, ...]
    outputs: tuple[EngineTensor, ...]
    onnx_nodes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Name, type, dtypes and nodes, ready for JSON."""
        dtypes = {key: [t.dtype for t in getattr(self, key)] for key in ("inputs", "constants", "outputs")}
        return {"name": self.name, "type": self.layer_type, **dtypes, "onnx_nodes": list(self.onnx_nodes)}


@dataclass(frozen=True)
class EngineReport:
    """What was built, from what, and what is in it. ``batch`` is (smallest, best tuned, largest)."""

    backend: str
    backend_version: str
    build_seconds: float
    plan_bytes: int
    plan_sha256: str
    onnx_sha256: str
    batch: tuple[int, int, int]
    compute_capabilities: tuple[int, ...]
    layers: tuple[EngineLayer, ...]

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        lists = {"batch": list(self.batch), "compute_capabilities": list(self.compute_capabilities)}
        return {**vars(self), **lists, "layers": [layer.to_dict() for layer in self.layers]}


def _dtype(text: str) -> str:
    """The type named in a "Datatype" or "Format/Datatype" field.

    >>> _dtype("Half"), _dtype("Thirty-two wide channel vectorized row major Int8 format"), _dtype("Bool")
    ('FP16', 'INT8', 'BOOL')
    """
    known = [_DTYPES[word] for word in re.findall(r"\w+", text.lower()) if word in _DTYPES]
    return known[-1] if known else text.strip().upper()


def _tensors(line: str, label: str) -> tuple[EngineTensor, ...]:
    """The tensors in ``label: [ { Name: …, Dimensions: […], …Datatype: … }, … ]``; none if the label is absent."""
    section = re.search(rf", {label}: \[\s*((?:\{{[^{{}}]*\}}(?:, )?)*)\]", line)
    fields = r"\{ Name: (.*?), (?:Location: \w+, )?Dimensions: \[([^\]]*)\].*?Datatype: ([^,}]+)"
    found = re.findall(fields, section[1]) if section else []
    return tuple(
        EngineTensor(name, _dtype(dtype), tuple(int(size) for size in re.findall(r"-?\d+", shape)))
        for name, shape, dtype in found
    )


def parse_layers(messages: Sequence[str]) -> tuple[EngineLayer, ...]:
    """The engine layers from the builder's log messages.

    The listing is one message: "Layers:", one line for each layer, an empty line, then the engine's inputs and outputs.

    Raises:
        BuildError: there is no listing, so nothing can be said about precision.
    """
    listings = [message.split("\n\n")[0] for message in messages if message.startswith("Layers:")]
    layers = []
    # Not splitlines(): nodes in the metadata may be separated by U+001E, at which it would split too.
    for line in "\n".join(listings).split("\n"):
        if head := re.match(r"Name: (.+?), LayerType: (\w+)", line):
            _, _, metadata = line.rpartition(", Metadata: ")
            inputs, constants, outputs = (_tensors(line, label) for label in ("Inputs", "Constants", "Outputs"))
            nodes = tuple(re.findall(r"\[ONNX Layer: ([^\]]*)", metadata))
            layers.append(EngineLayer(head[1], head[2], inputs, constants, outputs, nodes))
    if not layers:
        raise BuildError("the builder's log lists no engine layers, so the engine's precision cannot be proven")
    return tuple(layers)


def _prologue(layer: EngineLayer) -> str | None:
    """Operations that a fusion applies before its matrix multiplication; None if it multiplies no matrices.

    >>> [_prologue(EngineLayer(n, "", (), (), (), ())) for n in ("__myl_CastMulFc_myl0_3", "__myl_MulAdd_myl0_4")]
    ['CastMul', None]
    """
    found = re.match(r"__myl_([A-Za-z]*?)Fc", layer.name)
    return found[1] if found else None


def _running(layers: Sequence[EngineLayer], node: str) -> list[EngineLayer]:
    """The engine layers that do the multiplication of an ONNX MatMul or Gemm.

    A ``gemm`` carries the names of its nodes: "q+k+v_myl0_2" when siblings were merged. A fusion carries them only in
    its metadata, as do the kernels before and after it, which move or scale but do not multiply.
    """
    for layer in layers:
        if node in (name.strip() for name in re.sub(r"_myl\d+_\d+$", "", layer.name).split("+")):
            return [layer]
    return [
        layer
        for layer in layers
        if node in layer.onnx_nodes and (layer.layer_type == "gemm" or _prologue(layer) is not None)
    ]


def _precision(layer: EngineLayer) -> str:
    """The type in which a layer multiplies.

    Matrices: the first input, and whichever other input or constant is no scalar, scale or bias. The two factors have
    one type; a third matrix is a residual added afterwards, so a type that occurs twice is that of the factors.
    """
    if "Cast" in (_prologue(layer) or ""):
        floats = [t.dtype for t in (*layer.inputs, *layer.constants, *layer.outputs) if t.dtype in _FLOATS]
        return max(floats, key=_WIDTH.__getitem__, default="unknown")
    others = [tensor for tensor in (*layer.inputs[1:], *layer.constants) if tensor.is_matrix]
    counts = Counter(t.dtype if t.dtype in _WIDTH else "unknown" for t in (*layer.inputs[:1], *others))
    twice = [dtype for dtype, count in counts.items() if count > 1]
    return min(twice, key=_WIDTH.__getitem__) if twice else max(counts, key=_WIDTH.__getitem__, default="unknown")


def linear_precisions(layers: Sequence[EngineLayer], linears: Sequence[str]) -> dict[str, str]:
    """For each ONNX MatMul or Gemm node name, the type in which the engine multiplies its operands.

    "INT8", "FP8", "FP16", "BF16", "FP32", …; "missing" if no engine layer names the node; "unknown" if the builder does
    not say. Of several layers that share a node the widest counts.
    """
    running = {node: _running(layers, node) for node in linears}
    return {n: max(map(_precision, by), key=_WIDTH.__getitem__, default="missing") for n, by in running.items()}


def fused_attentions(layers: Sequence[EngineLayer]) -> tuple[str, ...]:
    """The operand type of each fused attention kernel; an unfused attention has none."""
    fused = [layer for layer in layers if "_mha" in layer.name and layer.inputs]
    return tuple(max((t.dtype for t in layer.inputs), key=lambda name: _WIDTH.get(name, 99)) for layer in fused)


# The lowering rules whose breach sends a linear to floating point without a word, and the remedies.
_ADVICE = {
    "missing": "No engine layer names it: give each MatMul and Gemm a unique node name, without '+' or ']', and see "
    "that it is not folded into a constant.",
    "unquantised": "Its weights reach it unquantised: connect a DequantizeLinear directly to the weight operand.",
    "fused qkv": "Likely a fused qkv with per-channel scales: the engine slices the weights, which the scales cannot "
    "follow. Export q, k and v as three MatMuls that share one quantised input.",
    "fp32 scales": "Likely FP32 weight scales or a Cast after the weights' DequantizeLinear: use FP16 scales and "
    "connect DequantizeLinear directly to the MatMul.",
    "reduction axis": "Likely weight scales along the reduction axis: quantise per output channel, axis=1 for a [K, N] "
    "weight of a MatMul, axis=0 for the [N, K] weight of a Gemm with transB=1.",
    "other": "Its weights are dequantised before the multiplication: check that QuantizeLinear and DequantizeLinear "
    "with one constant scale stand directly before its input, and that weights have one scale per output channel.",
}


def _broken_rule(layers: Sequence[EngineLayer], layer: EngineLayer | None) -> str:
    """The key in ``_ADVICE`` of the rule that a linear run by ``layer`` most likely breaks.

    Read off the kernel that holds the packed weights beside their scales: ``layer`` itself, or the one that feeds it.
    """
    if layer is None:
        return "missing"
    sources = {tensor.name for tensor in layer.inputs}
    feeding = [layer, *(other for other in layers if sources & {tensor.name for tensor in other.outputs})]
    packed = [it for it in feeding if any(t.is_matrix and t.dtype in ("INT4", "INT8", "FP8") for t in it.constants)]
    scales = [t for it in packed for t in it.constants if not t.is_matrix and len(t.shape) > 1]
    if not packed:
        return "unquantised"
    if any("Slic" in it.name for it in packed):
        return "fused qkv"
    if any(t.dtype == "FP32" for t in scales):
        return "fp32 scales"
    return "reduction axis" if any(t.shape[-1] == 1 for t in scales) else "other"


def check_precision(report: EngineReport, linears: Sequence[str], expected: str) -> None:
    """Require that every linear (ONNX node name) multiplies in ``expected``, e.g. "INT8".

    Raises:
        PrecisionError: one does not, or there is none to check; names the first, the likely rule broken and the remedy.
    """
    found = linear_precisions(report.layers, linears)
    wrong = [node for node, precision in found.items() if precision != expected]
    if found and not wrong:
        return
    if not found:
        raise PrecisionError(f"no linear was given to check for {expected}; a check of nothing proves nothing")
    counts = Counter(found.values())
    tally = ", ".join(f"{count} of {len(found)} at {precision}" for precision, count in counts.most_common())
    layer = max(_running(report.layers, wrong[0]), key=lambda it: _WIDTH[_precision(it)], default=None)
    by = f", in engine layer {layer.name} ({layer.layer_type})" if layer else ""
    raise PrecisionError(
        f"not all linears run at {expected}: {tally}. First: {wrong[0]} is {found[wrong[0]]}{by}. "
        f"{_ADVICE[_broken_rule(report.layers, layer)]}"
    )
