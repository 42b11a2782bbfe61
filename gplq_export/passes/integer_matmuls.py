"""MatMul on dequantised codes becomes one integer operator of ONNX Runtime."""

import onnx_ir as ir

from gplq_export.passes.common import constant, only_reader

DOMAIN = "com.microsoft"
_EIGHT_BITS = (ir.DataType.INT8, ir.DataType.UINT8)


def integer_matmuls(model: ir.Model) -> bool:
    """MatMul(Dequantize(a), Dequantize(b)) [-> Add(bias)] becomes com.microsoft.MatMulIntegerToFloat(a, b, …, bias).

    Rule: a has one scale, b one or one a column; both are 8-bit codes. Sums are over integers and exact, the scales
    multiply once, as in PyTorch. ONNX Runtime finds most of these products itself, but leaves the bias to a node of
    its own, and finds none in a graph whose batch size is fixed.
    """
    changed = False
    for matmul in [node for node in model.graph if node.op_type == "MatMul"]:
        a, b = (_dequantize(value) for value in matmul.inputs)
        if a is None or b is None or not _is_scalar(a) or not (_is_scalar(b) or _is_by_column(b)):
            continue
        inputs = [a.inputs[0], b.inputs[0], a.inputs[1], b.inputs[1], _zero_point(a), _zero_point(b)]
        last = matmul
        add = only_reader(matmul.outputs[0])
        if add is not None and add.op_type == "Add" and _is_bias(add):
            inputs.append(add.inputs[1])
            last = add
        product = ir.node("MatMulIntegerToFloat", inputs, domain=DOMAIN, name=matmul.name)
        output, old = product.outputs[0], last.outputs[0]
        output.name, output.type, output.shape = old.name, old.type, old.shape
        output.meta.update(old.meta)
        model.graph.insert_before(last, product)
        ir.convenience.replace_all_uses_with(old, output, replace_graph_outputs=True)
        for node in dict.fromkeys((last, matmul, a, b)):
            if not any(value.uses() for value in node.outputs):
                model.graph.remove(node, safe=True)
        changed = True
    if changed:
        model.opset_imports[DOMAIN] = 1
    return changed


def _dequantize(value: ir.Value | None) -> ir.Node | None:
    """The node that dequantises 8-bit codes to ``value``, if one does."""
    node = None if value is None else value.producer()
    if node is None or node.op_type != "DequantizeLinear" or "block_size" in node.attributes:
        return None
    return node if _code_type(node.inputs[0]) in _EIGHT_BITS else None


def _code_type(codes: ir.Value | None) -> ir.DataType | None:
    """The type of codes, as the nodes that make them tell: inferred types are not kept in a lowered graph."""
    node = None if codes is None else codes.producer()
    if codes is None or node is None:
        return None if codes is None else codes.dtype
    if node.op_type == "QuantizeLinear":
        return node.inputs[2].dtype if len(node.inputs) > 2 and node.inputs[2] is not None else None
    if node.op_type == "Cast":
        return ir.DataType(node.attributes["to"].as_int())
    return _code_type(node.inputs[0]) if node.op_type in ("Max", "Min", "Clip") else None


def _zero_point(dequantize: ir.Node) -> ir.Value | None:
    return dequantize.inputs[2] if len(dequantize.inputs) > 2 else None


def _is_scalar(dequantize: ir.Node) -> bool:
    scale = constant(dequantize.inputs[1])
    return scale is not None and scale.size == 1


def _is_by_column(dequantize: ir.Node) -> bool:
    scale = constant(dequantize.inputs[1])
    return scale is not None and scale.ndim == 1 and dequantize.attributes["axis"].as_int() == 1


def _is_bias(add: ir.Node) -> bool:
    bias = constant(add.inputs[1])
    return bias is not None and bias.ndim == 1
