"""What does not depend on the image is computed once and for all."""

import onnx_ir as ir
from onnxscript import optimizer

_LIMIT = 2**26  # bytes of a tensor


def fold_constants(model: ir.Model) -> bool:
    """Nodes that read constants only become the initialiser that they compute; DequantizeLinear stays.

    Rule: weights must reach an engine as codes, everything else as values. Swin gathers the relative position bias of
    an attention from a table: an engine fuses an attention with such a bias only if it is a constant.
    """
    before = len(model.graph)
    optimizer.fold_constants(
        model,
        onnx_shape_inference=False,
        input_size_limit=_LIMIT,
        output_size_limit=_LIMIT,
        should_fold=lambda node: False if node.op_type in ("QuantizeLinear", "DequantizeLinear") else None,
    )
    return len(model.graph) != before
