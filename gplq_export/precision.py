"""Reading back at which precision an engine runs, layer by layer, and comparing it with what was promised.

:mod:`gplq_export.promise` reads the promise off the ONNX file that an engine is built from; :func:`precision_table`
looks up each linear, product and attention in the engine, and :func:`check_precision` requires what was promised.

With detailed profiling verbosity and a verbose logger the builder prints "Layers:" and one line for each engine layer
with its tensors' types and the ONNX nodes in it, also on a machine without a GPU. Matrix multiplications appear as
``gemm`` (operands as stored, epilogue apart) or as a fusion ``__myl_<ops>Fc<ops>`` whose operations before ``Fc``
convert the operands (``Corr`` stands for a convolution): a ``Cast`` there means that 8-bit operands are dequantised
inside the kernel and multiplied in floating point, although the layer's inputs say Int8. A fused attention is one
``_gemm_mha_v2`` whose metadata name both of its products.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
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
    """What was built, from what, and what is in it. ``batch`` is (smallest, best tuned, largest).

    ``options``: what was asked of the builder beyond its defaults (:class:`gplq_export.engine.BuilderOptions`).
    """

    backend: str
    backend_version: str
    build_seconds: float
    plan_bytes: int
    plan_sha256: str
    onnx_sha256: str
    batch: tuple[int, int, int]
    compute_capabilities: tuple[int, ...]
    layers: tuple[EngineLayer, ...]
    options: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        lists = {"batch": list(self.batch), "compute_capabilities": list(self.compute_capabilities)}
        return {**vars(self), **lists, "layers": [layer.to_dict() for layer in self.layers]}


ANY = "any"  # nothing is promised: the checkpoint itself leaves it in floating point


@dataclass(frozen=True)
class Multiplication:
    """A linear, or a product of two activations, of an ONNX file, and the precision that its types promise.

    Attributes:
        node: name of the MatMul, Gemm or Conv.
        kind: "linear" or "product".
        storage: type of the weight's codes, such as "INT4", or of the weight itself; of a product, as ``carrier``.
        carrier: type of the activation's codes, or of the activation itself.
        compute: type in which it is to multiply, or ``ANY``.
    """

    node: str
    kind: str
    storage: str
    carrier: str
    compute: str


@dataclass(frozen=True)
class Attention:
    """A softmax between two products, and whether engines can run it as one kernel.

    Attributes:
        name: what the names of its products have in common.
        products: the nodes of queries times keys and of probabilities times values; empty if they are not found.
        carrier: type of the operands, such as "INT8"; several are joined by "+".
        obstacle: why no kernel runs it as one; None if one does.
    """

    name: str
    products: tuple[str, ...]
    carrier: str
    obstacle: str | None = None


@dataclass(frozen=True)
class Promise:
    """What an engine is to be checked for: everything that multiplies in its ONNX file."""

    multiplications: tuple[Multiplication, ...]
    attentions: tuple[Attention, ...] = ()

    @classmethod
    def of(cls, linears: Sequence[str], compute: str) -> "Promise":
        """That all ``linears`` (names of ONNX nodes) multiply in one type."""
        return cls(tuple(Multiplication(node, "linear", compute, compute, compute) for node in linears))


@dataclass(frozen=True)
class PrecisionRow:
    """What became of one linear, product or attention in the engine.

    Attributes:
        kind: "linear", "product" or "attention".
        storage, carrier: of its operands, as in :class:`Multiplication`.
        promised: "INT8", "FP16", …, or "any"; of an attention "INT8 fused" or "unfused"; of a product within a fused
            attention what became of the attention, whose own row says what was promised.
        found: the same, read back. "missing" if no engine layer names it, "unknown" if the builder does not say.
        layers: the engine layers that multiply it.
        merged: the ONNX nodes that share these layers with it.
        note: why an attention is not fused.
    """

    name: str
    kind: str
    storage: str
    carrier: str
    promised: str
    found: str
    layers: tuple[str, ...] = ()
    merged: tuple[str, ...] = ()
    note: str = ""

    @property
    def kept(self) -> bool:
        """Whether the promise is kept. What is promised of no attention kernel may be fused, or folded away, too."""
        return self.promised in (ANY, "unfused", self.found)


@dataclass(frozen=True)
class PrecisionTable:
    """One row for each linear, product and attention, in the order of the ONNX file; attentions last."""

    rows: tuple[PrecisionRow, ...]

    def of(self, kind: str) -> list[PrecisionRow]:
        """The rows of one kind."""
        return [row for row in self.rows if row.kind == kind]

    def summary(self) -> str:
        """One line: how many of each kind run at what.

        >>> row = PrecisionRow("fc", "linear", "INT4", "INT8", "INT8", "INT8")
        >>> PrecisionTable((row, row)).summary()
        'linears: 2 INT8'
        """
        counts = {kind: Counter(row.found for row in self.of(kind)) for kind in ("linear", "product", "attention")}
        return "; ".join(
            f"{kind}s: " + ", ".join(f"{number} {found}" for found, number in counter.most_common())
            for kind, counter in counts.items()
            if counter
        )

    def to_dict(self) -> dict[str, Any]:
        """The summary and all rows, ready for JSON."""
        rows = [
            {**vars(row), "layers": list(row.layers), "merged": list(row.merged), "kept": row.kept} for row in self.rows
        ]
        return {"summary": self.summary(), "rows": rows}

    def __str__(self) -> str:
        """As text in columns, with the reason behind each attention that is not fused."""
        heads = ("name", "kind", "storage", "carrier", "promised", "found", "engine layer")
        lines = [heads]
        for row in self.rows:
            kernels = row.layers[0] if row.layers else "-"
            more = f" and {len(row.layers) - 1} more" if len(row.layers) > 1 else ""
            lines.append((row.name, row.kind, row.storage, row.carrier, row.promised, row.found, kernels + more))
        widths = [max(len(line[column]) for line in lines) for column in range(len(heads) - 1)]
        text = ["  ".join([*map(str.ljust, line, widths), line[-1]]).rstrip() for line in lines]
        notes = [f"{row.name}: {row.note}" for row in self.rows if row.note]
        return "\n".join([*text, *notes])


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
    found = re.match(r"__myl_([A-Za-z]*?)(?:Fc|Corr)", layer.name)
    return found[1] if found else None


def _place(layer: EngineLayer) -> tuple[list[str], str | None]:
    """The ONNX nodes that a layer's name consists of, and in which of the engine's compiled parts it is.

    >>> _place(EngineLayer("q [profile 1]+k [profile 1]_myl1_2", "gemm", (), (), (), ()))
    (['q', 'k'], '1')
    """
    found = re.fullmatch(r"(.*?)(?:_myl(\d+)_\d+)?", layer.name, re.DOTALL)
    assert found is not None  # the pattern fits everything
    return [re.sub(r" \[profile \d+\]$", "", name.strip()) for name in found[1].split("+")], found[2]


def _running(layers: Sequence[EngineLayer], node: str) -> list[EngineLayer]:
    """The engine layers that do the multiplication of an ONNX MatMul or Gemm.

    A ``gemm`` carries the names of its nodes: "q+k+v_myl0_2" when siblings were merged. A fusion carries them only in
    its metadata, as do the kernels before and after it, which move or scale but do not multiply. Each optimisation
    profile is a part of the engine with kernels of its own.
    """
    places = [(layer, *_place(layer)) for layer in layers]
    named = {part: layer for layer, nodes, part in places if node in nodes}
    return list(named.values()) + [
        layer
        for layer, _, part in places
        if node in layer.onnx_nodes
        and part not in named
        and (layer.layer_type in ("gemm", "correlation") or _prologue(layer) is not None)
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
    "follow. Export q, k and v as three MatMuls that share one quantised input, or quantise what is cut out of their "
    "result (matmul_bits: 8 in the recipe).",
    "fp32 scales": "Likely FP32 weight scales or a Cast after the weights' DequantizeLinear: use FP16 scales and "
    "connect DequantizeLinear directly to the MatMul.",
    "reduction axis": "Likely weight scales along the reduction axis: quantise per output channel, axis=1 for a [K, N] "
    "weight of a MatMul, axis=0 for the [N, K] weight of a Gemm with transB=1.",
    "attention": "The file promises an attention that engines fuse, and this one did not: look at what stands between "
    "its products in the ONNX file, and report it with the builder's log.",
    "product": "A product of activations: check that QuantizeLinear and DequantizeLinear of one type, with one "
    "constant scale each, stand in front of both its factors.",
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


def precision_table(report: EngineReport, promise: Promise) -> PrecisionTable:
    """Everything that the promise names, looked up in the engine."""
    layers = report.layers
    fused: dict[str, PrecisionRow] = {}
    rows: list[PrecisionRow] = []
    for attention in promise.attentions:
        kernels = _fused_kernels(layers, attention)
        promised = "unfused" if attention.obstacle else f"{attention.carrier} fused"
        found = f"{_widest(kernels)} fused" if kernels else "unfused"
        if not kernels and any(not _running(layers, product) for product in attention.products):
            found = "missing"
        rows.append(_row(attention.name, "attention", (attention.carrier,) * 2, promised, found, kernels, attention))
        fused |= {product: rows[-1] for product in attention.products if kernels}
    multiplications = []
    for it in promise.multiplications:
        if it.node in fused:
            row = fused[it.node]
            # What it promised alone counts for less than what was promised of the attention, whose row says it all.
            multiplications.append(replace(row, name=it.node, kind=it.kind, promised=row.found, note=""))
            continue
        running = _running(layers, it.node)
        found = max(map(_precision, running), key=_WIDTH.__getitem__, default="missing")
        multiplications.append(_row(it.node, it.kind, (it.storage, it.carrier), it.compute, found, running))
    return PrecisionTable((*multiplications, *rows))


def _fused_kernels(layers: Sequence[EngineLayer], attention: Attention) -> list[EngineLayer]:
    """The kernels that run an attention as a whole, one for each optimisation profile; none if any profile does not."""
    if not attention.products or any(_running(layers, product) for product in attention.products):
        return []
    return [layer for layer in layers if "_mha" in layer.name and set(attention.products) <= set(layer.onnx_nodes)]


def _widest(kernels: Sequence[EngineLayer]) -> str:
    """The widest type among the operands of fused attentions."""
    return max((t.dtype for layer in kernels for t in layer.inputs), key=lambda name: _WIDTH.get(name, 99))


def _row(
    name: str,
    kind: str,
    operands: tuple[str, str],
    promised: str,
    found: str,
    running: Sequence[EngineLayer],
    attention: Attention | None = None,
) -> PrecisionRow:
    own = {name, *(attention.products if attention else ())}
    merged = dict.fromkeys(node for layer in running for node in layer.onnx_nodes if node not in own)
    note = attention.obstacle or "" if attention and not running else ""
    return PrecisionRow(name, kind, *operands, promised, found, tuple(it.name for it in running), tuple(merged), note)


def check_precision(report: EngineReport, promise: Promise) -> PrecisionTable:
    """Require that the engine keeps the promise; returns the proof.

    Raises:
        PrecisionError: a linear or product multiplies in another type, an attention that could be fused is not, or
            there is nothing to check; names the first, the likely rule broken and the remedy.
    """
    if not promise.multiplications:
        raise PrecisionError("no linear was given to check; a check of nothing proves nothing")
    table = precision_table(report, promise)
    broken = [row for row in table.rows if not row.kept]
    if not broken:
        return table
    first = broken[0]
    alike = Counter(row.found for row in table.of(first.kind) if row.promised == first.promised)
    total = sum(alike.values())
    tally = ", ".join(f"{count} of {total} at {found}" for found, count in alike.most_common())
    layer = max(_running(report.layers, first.name), key=lambda it: _WIDTH[_precision(it)], default=None)
    by = f", in engine layer {layer.name} ({layer.layer_type})" if layer else ""
    rule = first.kind if first.kind != "linear" and layer else _broken_rule(report.layers, layer)
    if first.kind == "attention":
        rule = "missing" if first.found == "missing" else "attention"
    raise PrecisionError(
        f"not all {first.kind}s run at {first.promised}: {tally}. First: {first.name} is {first.found}{by}. "
        f"{_ADVICE[rule]}"
    )
