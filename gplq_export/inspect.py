"""``gplq-export inspect FILE``: what a checkpoint, an ONNX file or an engine is, holds and comes from.

What a file is, its first bytes tell. An engine is a program for a GPU, which loading would run: it is never opened, and
what is said about it is what manifest.json beside it says, provided that the hashes agree.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx_ir as ir

from gplq.errors import GateError, UsageError
from gplq.files import sha256
from gplq_export.manifest import MANIFEST, read_manifest
from gplq_export.onnx_file import printable, read_onnx
from gplq_export.qdq import QdqGraph, channels, code_type, is_dequantize, is_op, is_quantize, operand

SCHEMA_VERSION = "1.0"
_ZIP, _RTX_PLAN = b"PK\x03\x04", b"vtrt"
_PLAN_SUFFIXES = (".plan", ".engine", ".trt")
_SHOWN_CHARACTERS, _SHOWN_ITEMS = 96, 6
_INTEGER_KERNELS = {"MatMulInteger": 1, "MatMulIntegerToFloat": 1, "DynamicQuantizeMatMul": 1, "QLinearMatMul": 3}
_BITS_8 = (ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT8E5M2)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.add_argument("file", type=Path, help="a checkpoint (.pt), an ONNX file or an engine (.plan)")
    parser.add_argument("--json", action="store_true", help="print JSON, complete")


def run(arguments: argparse.Namespace) -> None:
    """Print what a file is.

    Raises:
        UsageError: the file cannot be read, or is of no known kind.
        GateError: an engine is not the one that the manifest beside it describes.
    """
    content = inspect_file(arguments.file)
    if arguments.json:
        sys.stdout.write(json.dumps({"schema_version": SCHEMA_VERSION, **content}, indent=2) + "\n")
    else:
        sys.stdout.write("\n".join(_lines(content)) + "\n")
    if content.get("manifest") == _OTHER_HASH:
        raise GateError(
            f"{arguments.file} is not the file that manifest.json beside it describes: it was replaced or damaged. "
            "Build it again, and load no engine of unknown origin: it is a program."
        )


def inspect_file(path: Path) -> dict[str, Any]:
    """What ``path`` is, ready for JSON: its kind, size and hash, and what is known for that kind.

    Raises:
        UsageError: the file cannot be read, or is of no known kind.
    """
    if not path.is_file():
        raise UsageError(f"{path} does not exist or is not a file.")
    try:
        with path.open("rb") as file:
            magic = file.read(4)
        basics = {"file": str(path), "bytes": path.stat().st_size, "sha256": sha256(path)}
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}.") from error
    if magic == _ZIP:
        return {"kind": "gplq checkpoint", **basics, **_checkpoint(path)}
    if magic == _RTX_PLAN or path.suffix in _PLAN_SUFFIXES:
        kind = "TensorRT-RTX engine" if magic == _RTX_PLAN else "engine, by its name"
        return {"kind": f"{kind}: a program, not opened", **basics, "magic": repr(magic)[2:-1], **_plan(path, basics)}
    return {"kind": "ONNX model", **basics, **_onnx(path)}


def _checkpoint(path: Path) -> dict[str, Any]:
    from gplq.checkpoint import frozen_quantizers, integer_linears, load_checkpoint

    checkpoint = load_checkpoint(path)
    linears, quantizers = integer_linears(checkpoint.model), frozen_quantizers(checkpoint.model)
    weights, grids = Counter[str](), Counter[str]()
    for linear in linears.values():
        weights[f"{linear.bits}-bit codes"] += linear.codes.numel()
    inside = tuple(f"{name}." for name in (*linears, *quantizers))
    tensors = checkpoint.model.state_dict().items()
    weights["floating point"] = sum(tensor.numel() for name, tensor in tensors if not name.startswith(inside))
    for quantizer in quantizers.values():
        extras = [name for name in ("pre_scale", "pre_shift") if getattr(quantizer, name) is not None]
        sign = "signed" if quantizer.signed else "unsigned"
        grids[" with ".join([f"{quantizer.bits}-bit {sign}", *[" and ".join(extras)] * bool(extras)])] += 1
    provenance = _part(checkpoint.provenance)
    accuracies = {name: _part(entry) for name, entry in _part(provenance, "top1").items()}
    top1 = {name: f"{entry.get('percent')} % of {entry.get('n')} images" for name, entry in accuracies.items()}
    return {
        "architecture": checkpoint.spec.architecture,
        "classes": checkpoint.spec.num_classes,
        "input": [*checkpoint.preprocessing.input_size],
        "linears": len(linears),
        "weights": dict(weights),
        "quantisers": dict(grids),
        "top1": top1,
        "recipe": checkpoint.recipe.to_dict(),
        "provenance": provenance,
    }


def _onnx(path: Path) -> dict[str, Any]:
    model = read_onnx(path)
    graph = QdqGraph(model)
    linears = Counter(_linears(graph))
    grids = Counter(
        f"{code_type(node).name}, {f'{channels(node)} scales' if channels(node) > 1 else 'one scale'}"
        for node in graph.activation_quantizers
    )
    operators = Counter(f"{node.domain}::{node.op_type}" if node.domain else node.op_type for node in graph.nodes)
    metadata = dict(model.metadata_props)
    return {
        "producer": " ".join(filter(None, (model.producer_name, model.producer_version))),
        "opset": {domain or "ai.onnx": version for domain, version in model.opset_imports.items()},
        "ir_version": model.ir_version,
        "inputs": {str(value.name): _type(value) for value in model.graph.inputs},
        "outputs": {str(value.name): _type(value) for value in model.graph.outputs},
        "linears": dict(linears.most_common()),
        "quantisers": dict(grids.most_common()),
        "storage": storage(graph, path.stat().st_size),
        "operators": dict(operators.most_common()),
        "metadata": metadata,
    }


def _linears(graph: QdqGraph) -> Iterator[str]:
    """Of each linear: what its weight and its activation are stored as."""
    for linear in graph.linears:
        sources = (linear.weight, linear.activation)
        kinds = [source.code_type.name if source is not None else "floating point" for source in sources]
        yield f"{kinds[0]} weights × {kinds[1]} activations"
    for node in graph.nodes:
        if node.op_type in _INTEGER_KERNELS and graph.is_constant(operand(node, _INTEGER_KERNELS[node.op_type])):
            yield f"weights and activations in the integers of {node.op_type}"


def storage(graph: QdqGraph, file_bytes: int) -> dict[str, int]:
    """Bytes of an ONNX file by what they hold; "graph" is what is no tensor: nodes, names and metadata.

    Weights outside the file are counted as such. Works for any ONNX file: what a tensor is, its type and readers tell.
    """
    weights = {id(linear.node): linear.weight_index for linear in graph.linears}
    found, inside = Counter[str](), 0
    for part in graph.model.graphs():
        for value in part.initializers.values():
            tensor = value.const_value
            if tensor is None:
                continue
            external = isinstance(tensor, ir.ExternalTensor)
            found[_role(value, weights) + (", in another file" if external else "")] += tensor.nbytes
            inside += 0 if external else tensor.nbytes
    found["graph"] = file_bytes - inside
    return dict(found.most_common())


def _role(value: ir.Value, weights: dict[int, int]) -> str:
    uses = list(value.uses())
    if uses and all((is_quantize(use.node) or is_dequantize(use.node)) and use.idx > 0 for use in uses):
        return "scales and zero points"
    matrix = value.shape is not None and len(value.shape) > 1
    if value.dtype is not None and value.dtype.bitwidth < 8:
        return f"weight codes, {value.dtype.bitwidth} bits"
    if value.dtype in _BITS_8 and matrix:
        return "weight codes, 8 bits"
    if any(is_op(use.node, "MatMul", "Gemm", "Conv") and weights.get(id(use.node)) == use.idx for use in uses):
        return "weights in floating point"
    return "biases, norms, embeddings, constants"


def _type(value: ir.Value) -> str:
    sizes = [] if value.shape is None else [str(size) for size in value.shape]
    return f"{'unknown' if value.dtype is None else value.dtype.name} [{', '.join(sizes)}]"


_NO_MANIFEST = "none beside it: nothing is known about precisions"
_NOT_LISTED = "does not list this file: nothing is known about precisions"
_OTHER_HASH = "describes another file of this name: the hashes differ"


def _plan(path: Path, basics: dict[str, Any]) -> dict[str, Any]:
    if not (path.parent / MANIFEST).is_file():
        return {"manifest": _NO_MANIFEST}
    try:
        manifest = read_manifest(path.parent)
    except UsageError as error:
        return {"manifest": f"{error} Nothing is known about precisions."}
    if path.name not in manifest["files"]:
        return {"manifest": _NOT_LISTED}
    if manifest["files"][path.name]["sha256"] != basics["sha256"]:
        return {"manifest": _OTHER_HASH}
    # An engine's hash, not its name, says which it is.
    engines = [_part(entry) for entry in _part(manifest, "engines").values()]
    engine: dict[str, Any] = next((it for it in engines if it.get("plan_sha256") == basics["sha256"]), {})
    layers = engine.get("layers")
    built = ("backend", "backend_version", "build_seconds", "batch", "compute_capabilities", "onnx_sha256")
    return {
        "manifest": "describes this file: the hashes agree",
        "built": {key: engine[key] for key in built if key in engine},
        "layers": len(layers) if isinstance(layers, list) else 0,
        "precision": str(_part(engine, "precision").get("summary", "unknown")),
        "checkpoint_sha256": _part(manifest, "checkpoint").get("sha256"),
    }


def _part(content: Any, *keys: str) -> dict[str, Any]:
    """A part of JSON that somebody else may have written; empty if it is not there or not of the right kind."""
    for key in keys:
        content = content.get(key) if isinstance(content, dict) else None
    return content if isinstance(content, dict) else {}


def _lines(content: dict[str, Any]) -> Iterator[str]:
    """Plain text, a line for each fact and each of the largest parts."""
    width = max(len(key) for key in content) + 2
    for key, value in content.items():
        if key in ("provenance", "recipe", "metadata"):
            value = _summary(value)
        if not isinstance(value, dict):
            yield f"{key:{width}}{_short(value)}"
            continue
        items = list(value.items())
        shown = items[: _SHOWN_ITEMS - (len(items) > _SHOWN_ITEMS)]
        column = max((len(name) for name, _ in shown), default=0) + 2
        for index, (name, entry) in enumerate(shown):
            yield f"{key if not index else '':{width}}{printable(name):{column}}{_short(entry)}"
        if len(items) > len(shown):
            yield f"{'':{width}}and {len(items) - len(shown)} more (--json)"


def _summary(entries: dict[str, Any]) -> dict[str, Any]:
    """What fits a line each, in front what says where a file comes from."""
    first = ("weight_bits", "activation_bits", "source", "source_sha256", "gplq.target", "gplq.architecture")
    order = sorted(entries, key=lambda key: (key not in first, "sha256" not in key))
    return {key: entries[key] for key in order if not isinstance(entries[key], dict | list)}


def _short(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    text = printable(str(value))
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[: _SHOWN_CHARACTERS - 1]}…"
