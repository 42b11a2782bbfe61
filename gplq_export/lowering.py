"""The one lowering: replaces every dialect node by what a target wants, and finishes the model.

1. Mark(x)                -> x, which takes the mark's name (``gplq.marks`` in the metadata: mark -> tensor)
2. Quantize(x, …)         -> the target's quantiser
3. Linear(codes, …)       -> MatMul(dequantised codes, the target's weight) [-> Add(bias)]
4. Conv(codes, …)         -> Conv(dequantised codes, the target's weight, bias)
5. MatMul(a, …, b, …)     -> MatMul(dequantised a, dequantised b)
6. float initialisers     -> the target's float type, with a Cast behind the input and in front of the output if FP16
7. the whole graph        -> the target's passes, in their order (:mod:`gplq_export.passes`)
8. what nothing reads     -> removed; metadata written; the ONNX checker run in full

The result holds no node of the dialect, and each quantiser's codes under ``<quantizer>.codes``.
"""

import json

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from gplq import __version__
from gplq.errors import BuildError
from gplq_export.dialect import DOMAIN
from gplq_export.passes.common import MARKED
from gplq_export.targets import GraphWriter, Quantizer, Target, Weight, codes_name, in_float_type
from gplq_export.trace import WEIGHTED, is_dialect, node_name


def lower(dialect: ir.Model, target: Target, metadata: dict[str, str]) -> ir.Model:
    """A new model for ``target``; ``dialect`` stays as it is.

    Raises:
        BuildError: the result does not pass the ONNX checker.
    """
    model = dialect.clone()
    graph = model.graph
    writer = GraphWriter(graph, target.float_type)
    # Read before anything is replaced: a float target folds a quantiser's factor into the weight behind it.
    quantizers = {node_name(node): _quantizer_before(node) for node in graph if is_dialect(node, *WEIGHTED)}
    codes: dict[str, str] = {}
    marks: dict[str, ir.Value] = {}
    outputs = [str(value.name) for value in graph.outputs]
    if target.float_type != ir.DataType.FLOAT:
        _change_float_type(graph, target.float_type)
    for node in [node for node in graph if is_dialect(node)]:
        writer.at(node)
        name = node_name(node)
        if node.op_type == "Mark":
            result = marks[name] = _unmark(node, list(marks.values()))
        elif node.op_type == "Quantize":
            result = target.quantizer(writer, _quantizer(node))
            codes[name] = codes_name(name) if target.holds_codes else str(result.name)
        elif node.op_type == "Linear":
            result = _linear(writer, node, target, quantizers[name])
        elif node.op_type == "Conv":
            result = _conv(writer, node, target)
        else:
            result = writer.node("MatMul", [node.inputs[0], node.inputs[2]], name, f"{name}.output")
        if node.outputs[0].is_graph_output():
            result.type, result.shape = node.outputs[0].type, node.outputs[0].shape
        ir.convenience.replace_all_uses_with(node.outputs, [result], replace_graph_outputs=True)
        graph.remove(node, safe=True)
    for value in marks.values():
        value.meta[MARKED] = True
    for graph_pass in target.passes:
        graph_pass(model)
    RemoveUnusedNodesPass()(model)
    for value, output in zip(graph.outputs, outputs, strict=True):
        value.name = output  # of a backbone, some of them are marked, too
    names = {name: value.name for name, value in marks.items()}
    mapping = {"gplq.quantizers": json.dumps(codes if target.quantizes else {}), "gplq.marks": json.dumps(names)}
    _finish(model, target, {**metadata, **mapping})
    return model


def linear_nodes(dialect: ir.Model) -> list[str]:
    """Names of the MatMul and Conv nodes that the linears and convolutions become, in order."""
    return [node_name(node) for node in dialect.graph if is_dialect(node, *WEIGHTED)]


def _array(value: ir.Value | None) -> np.ndarray:
    assert value is not None and value.const_value is not None  # the tracer's buffers are initialisers
    return value.const_value.numpy()


def _optional_array(node: ir.Node, index: int) -> np.ndarray | None:
    present = index < len(node.inputs) and node.inputs[index] is not None
    return _array(node.inputs[index]).astype(np.float32) if present else None


def _quantizer(node: ir.Node) -> Quantizer:
    x = node.inputs[0]
    assert x is not None
    return Quantizer(
        name=node_name(node),
        x=x,
        scale=_array(node.inputs[1]).astype(np.float32),
        pre_shift=_optional_array(node, 2),
        pre_scale=_optional_array(node, 3),
        bits=node.attributes["bits"].as_int(),
        signed=bool(node.attributes["signed"].as_int()),
    )


def _quantizer_before(linear: ir.Node) -> Quantizer:
    """The quantiser that feeds a linear."""
    codes = linear.inputs[0]
    assert codes is not None
    quantize = codes.producer()
    assert quantize is not None and is_dialect(quantize, "Quantize")  # a linear reads codes, always
    return _quantizer(quantize)


def _linear(writer: GraphWriter, node: ir.Node, target: Target, quantizer: Quantizer) -> ir.Value:
    name = node_name(node)
    weight = _weight(node, quantizer.pre_scale)
    y = writer.node("MatMul", [node.inputs[0], target.weight(writer, weight)], name, f"{name}.product")
    bias = _optional_array(node, 4)
    if bias is None:
        return y
    if quantizer.pre_shift is not None and not target.quantizes:
        # The bias takes a shift away that such a target does not make.
        bias = bias + weight.floating().sum(1) * quantizer.pre_shift
    return writer.node("Add", [y, writer.floating(f"{name}.bias", bias)], f"{name}/Add", f"{name}.output")


def _conv(writer: GraphWriter, node: ir.Node, target: Target) -> ir.Value:
    name = node_name(node)
    inputs = [node.inputs[0], target.weight(writer, _weight(node, None))]
    bias = _optional_array(node, 4)
    if bias is not None:
        inputs.append(writer.floating(f"{name}.bias", bias))
    stride, padding, dilation = (list(node.attributes[key].as_ints()) for key in ("stride", "padding", "dilation"))
    return writer.node(
        "Conv", inputs, name, f"{name}.output", strides=stride, pads=[*padding, *padding], dilations=dilation
    )


def _weight(node: ir.Node, pre_scale: np.ndarray | None) -> Weight:
    scale = _array(node.inputs[3]).astype(np.float32)
    return Weight(node_name(node), _array(node.inputs[2]), scale, node.attributes["bits"].as_int(), pre_scale)


def _unmark(node: ir.Node, marked: list[ir.Value]) -> ir.Value:
    """A mark's input, which takes the mark's name, unless it has one that must stay."""
    value = node.inputs[0]
    assert value is not None
    if not (any(value is other for other in marked) or value.is_graph_input() or value.is_initializer()):
        value.name = node_name(node)
    return value


def _change_float_type(graph: ir.Graph, float_type: ir.DataType) -> None:
    """Every FP32 initialiser and tensor becomes ``float_type``; the model's own input and output stay FP32."""
    for value in list(graph.initializers.values()):
        if value.dtype == ir.DataType.FLOAT:
            # Scales are FP16-exact, so that this rounds embeddings, norms and biases only.
            array = in_float_type(_array(value), float_type)
            value.const_value = ir.Tensor(array, name=value.name)
            value.type = ir.TensorType(float_type)  # not value.dtype: the type object is shared with the original
    for node in graph:
        for output in node.outputs:
            if output.dtype == ir.DataType.FLOAT:
                output.type = ir.TensorType(float_type)
    first = next(iter(graph))
    for value in graph.inputs:
        cast = ir.node("Cast", [value], attributes={"to": float_type}, name=f"{value.name}/Cast")
        cast.outputs[0].name = f"{value.name}.cast"
        ir.convenience.replace_all_uses_with(value, cast.outputs[0])
        cast.replace_input_with(0, value)
        graph.insert_before(first, cast)
    for index, value in enumerate(graph.outputs):
        name = value.name
        value.name = f"{name}.uncast"
        cast = ir.node("Cast", [value], attributes={"to": ir.DataType.FLOAT}, name=f"{name}/Cast")
        cast.outputs[0].name, cast.outputs[0].type = name, ir.TensorType(ir.DataType.FLOAT)
        cast.outputs[0].shape = value.shape
        graph.append(cast)
        graph.outputs[index] = cast.outputs[0]


def _finish(model: ir.Model, target: Target, metadata: dict[str, str]) -> None:
    """Metadata and types; then the checker."""
    graph = model.graph
    for node in graph:
        # What the exporter noted for itself: half of a small file.
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
            if value.name and not value.is_graph_output():
                value.type = value.shape = None  # the exporter's may be wrong by now; every reader infers them
    for value in (*graph.initializers.values(), *graph.inputs, *graph.outputs):
        value.metadata_props.clear()
    graph.metadata_props.clear()
    graph.name = "gplq"
    model.opset_imports.pop(DOMAIN, None)
    model.producer_name, model.producer_version = "gplq", __version__
    model.metadata_props.clear()
    model.metadata_props.update({**metadata, "gplq.target": target.name})
    _check(model, target)


def _check(model: ir.Model, target: Target) -> None:
    try:
        onnx.checker.check_model(ir.to_proto(model), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise BuildError(
            f"the {target.name} graph does not pass the ONNX checker: {first_line} Please report it."
        ) from error
