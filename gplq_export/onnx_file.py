"""Reading an ONNX file that somebody else wrote: as data, checked before anything is done with it.

Refused, each with one message: what is no ONNX file or is cut off; what is too large for the format; what is newer than
the installed onnx; what breaks the standard (a cycle, a value that nobody computes, two of one name); and weights
outside the file that are missing, too short or not inside its folder. Nothing is executed, and no weight is read.

Operators of other domains are no reason to refuse a file: whether a runtime knows them is a question for ``lint``.
"""

import graphlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from gplq.errors import UsageError

MAX_BYTES = 2**31 - 1  # what Protocol Buffers can hold; larger models keep their weights outside
_STANDARD = ("", "ai.onnx")


def read_onnx(path: Path) -> ir.Model:
    """The model in ``path``; weights outside of it are found, and read when they are asked for.

    Raises:
        UsageError: the file is missing, damaged, hostile, too large or too new.
    """
    proto = _parse(path)
    _check_versions(proto, path)
    _check_standard(proto, path)
    try:
        model = ir.from_proto(proto)
    except Exception as error:  # onnx_ir wraps whatever a bad field raises into errors of its own
        raise UsageError(f"{path} is damaged: {printable(_root_cause(error))}. Export it again.") from error
    ir.external_data.set_base_dir(model.graph, path.absolute().parent)
    if any(not isinstance(text, str) for text in _texts(model)):
        raise UsageError(f"{path} is damaged: it has names that are no text (UTF-8). Export or copy it again.")
    for tensor in _tensors(model):
        if isinstance(tensor, ir.ExternalTensor):
            _check_external(tensor, path)
        elif isinstance(tensor, ir.TensorProtoTensor):
            _check_inline(tensor, path)
    return model


def _texts(model: ir.Model) -> Iterator[Any]:
    """Every name that is given. Protocol Buffers return what is no UTF-8 as bytes."""
    values: list[ir.Value | None] = [*model.graph.inputs, *model.graph.outputs]
    for node in model.graph.all_nodes():
        yield from (node.name or "", node.op_type, node.domain)
        values += node.outputs
    yield from (value.name or "" for value in values if value is not None)
    yield from (text for graph in model.graphs() for text in graph.initializers)
    yield from (text for pair in model.metadata_props.items() for text in pair)
    yield from (model.producer_name or "", model.producer_version or "", *model.opset_imports)


def _tensors(model: ir.Model) -> Iterator[ir.TensorProtocol]:
    """Every initialiser and every tensor in an attribute."""
    for graph in model.graphs():
        yield from (value.const_value for value in graph.initializers.values() if value.const_value is not None)
    for node in model.graph.all_nodes():
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.TENSOR:
                yield attribute.as_tensor()
            elif attribute.type == ir.AttributeType.TENSORS:
                yield from attribute.as_tensors()


def printable(text: str) -> str:
    r"""A stranger's text on one line, and without the control characters that change a terminal.

    >>> printable("a\tname\n\x1b[2J")
    'a name �[2J'
    """
    return "".join(
        character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in " ".join(text.split())
    )


def _parse(path: Path) -> onnx.ModelProto:
    if not path.is_file():
        raise UsageError(f"{path} does not exist or is not a file.")
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise UsageError(
            f"{path} has {size:,} bytes, an ONNX file at most {MAX_BYTES:,}. It is no ONNX file; a larger model keeps "
            "its weights in a file beside it (onnx.save with save_as_external_data=True)."
        )
    try:
        proto = onnx.ModelProto()
        proto.ParseFromString(path.read_bytes())
    except DecodeError as error:
        raise UsageError(
            f"{path} cannot be read as ONNX: it is another kind of file, or cut off. Export or copy it again."
        ) from error
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}.") from error
    # Protocol Buffers skip unknown fields, so that an empty file, and many others, are messages without content.
    if not proto.ir_version or not proto.graph.node:
        raise UsageError(f"{path} is no ONNX model: it has no {'nodes' if proto.ir_version else 'IR version'}.")
    return proto


def _check_versions(proto: onnx.ModelProto, path: Path) -> None:
    """What a newer onnx means by an operator is unknown to this one, although its checker lets most of it pass."""
    known = onnx.defs.onnx_opset_version()
    opset = max((entry.version for entry in proto.opset_import if entry.domain in _STANDARD), default=0)
    for what, version, limit in (("IR version", proto.ir_version, onnx.IR_VERSION), ("opset", opset, known)):
        if version > limit:
            raise UsageError(
                f"{path} has {what} {version}, the installed onnx {onnx.__version__} reads up to {limit}. "
                f"Upgrade with: pip install --upgrade onnx; or export with an older {what}."
            )


def _check_standard(proto: onnx.ModelProto, path: Path) -> None:
    """The checker of onnx, which also refuses external data outside the folder, behind links or missing."""
    _check_acyclic(proto.graph, path)
    _check_links(proto, path)
    try:
        onnx.checker.check_model(str(path))
    except (onnx.checker.ValidationError, UnicodeDecodeError, ValueError) as error:
        reason = printable(str(error)).rstrip(".")
        raise UsageError(f"{path} is not valid ONNX: {reason}. Nothing was done with it.") from error


def _check_acyclic(graph: onnx.GraphProto, path: Path) -> None:
    """The checker only says that nodes are not in order."""
    producer = {name: index for index, node in enumerate(graph.node) for name in node.output if name}
    order = graphlib.TopologicalSorter[int]()
    for index, node in enumerate(graph.node):
        order.add(index, *(producer[name] for name in node.input if name in producer))
    try:
        order.prepare()
    except graphlib.CycleError as error:
        nodes = [graph.node[index] for index in error.args[1]]
        circle = " → ".join(node.name or f"{node.op_type}({', '.join(node.output)})" for node in nodes[:6])
        more = " → …" if len(nodes) > 6 else ""
        raise UsageError(f"{path} has a cycle, so that nothing can run it: {printable(circle)}{more}.") from error


def _check_links(proto: onnx.ModelProto, path: Path) -> None:
    """The checker does not follow links, and words that in a way that blames the file."""
    tensors = [tensor for tensor in proto.graph.initializer if tensor.data_location == onnx.TensorProto.EXTERNAL]
    locations = [entry.value for tensor in tensors for entry in tensor.external_data if entry.key == "location"]
    for location in dict.fromkeys(locations):
        if (weights := path.parent / location).is_symlink():
            raise UsageError(
                f"{path} has its weights in {printable(location)}, which is a link (to "
                f"{printable(str(weights.readlink()))}), as in the cache of Hugging Face. Links of weights are not "
                f"followed: a file could name any other on this machine. Copy the folder with what its links point to "
                f"(cp -rL {path.parent} copy) or download into a folder (hf download … --local-dir copy), and use that."
            )


def _check_external(tensor: ir.ExternalTensor, path: Path) -> None:
    """The checker asks whether the file is there and inside the folder, not whether the tensor is in the file."""
    held = Path(tensor.path).stat().st_size
    start, stated, needed = tensor.offset or 0, tensor.length, tensor.nbytes
    if stated not in (None, needed) or start + needed > held:
        raise UsageError(
            f"{path}: the weight {printable(str(tensor.name))} needs {needed:,} bytes from byte {start:,} of "
            f"{printable(str(tensor.location))}, "
            f"{'which has ' + format(held, ',') if stated in (None, needed) else f'but {stated:,} are given'}. "
            "The file is cut off or belongs to another model; copy both again."
        )


def _check_inline(tensor: ir.TensorProtoTensor, path: Path) -> None:
    """The checker refuses a tensor with too few elements, but not one with too many."""
    if tensor.raw.HasField("raw_data"):
        held = len(tensor.raw.raw_data)
        if held != tensor.nbytes:
            name = printable(str(tensor.name))
            raise UsageError(f"{path} is damaged: {name} needs {tensor.nbytes:,} bytes, and has {held:,}.")
        return
    try:
        tensor.numpy()
    except Exception as error:  # NumPy and onnx_ir each raise types of their own
        raise UsageError(f"{path} is damaged: {printable(str(tensor.name))}: {printable(str(error))}.") from error


def _root_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip() or type(error).__name__).splitlines()[0]
