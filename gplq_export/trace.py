"""PyTorch -> the gplq dialect of ONNX, with proof that every quantiser and every linear arrived exactly once."""

import warnings
from collections import Counter
from typing import Any

import onnx_ir as ir
import torch
from torch.utils._pytree import tree_leaves

from gplq.checkpoint import Checkpoint, frozen_quantizers, integer_linears
from gplq.convert import mark_units
from gplq.errors import BuildError
from gplq_export.dialect import DOMAIN, translations

OPSET = 21  # the first with INT4 and UINT4 in QuantizeLinear and DequantizeLinear
INPUT, LOGITS, FEATURES = "images", "logits", "features"
WEIGHTED = ("Linear", "Conv")  # the operators that hold a weight


def trace(checkpoint: Checkpoint) -> ir.Model:
    """The checkpoint's network as a dialect model, FP32.

    Its input is ``images`` [batch, C, H, W]. A classifier's output is ``logits`` [batch, classes]; without its head,
    ``features`` [batch, D]; of a backbone that returns several feature maps, ``features_0``, ``features_1`` and so on.

    Raises:
        BuildError: PyTorch cannot export the network, or the graph does not hold each quantiser and linear once.
    """
    model = checkpoint.model
    example = torch.zeros(2, *checkpoint.preprocessing.input_size)
    handles = mark_units(model)
    try:
        with warnings.catch_warnings():
            # The exporter's own deprecations are no business of the user's.
            warnings.simplefilter("ignore")
            program: Any = torch.onnx.export(
                model,
                (example,),
                dynamo=True,
                opset_version=OPSET,
                input_names=[INPUT],
                output_names=_output_names(checkpoint, example),
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                custom_translation_table=translations(),
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        first_line = str(error).strip().splitlines()[0]
        raise BuildError(f"PyTorch could not export {checkpoint.spec.architecture}: {first_line}") from error
    finally:
        for handle in handles:
            handle.remove()
    dialect: ir.Model = program.model
    _check_mapping(dialect, checkpoint)
    return dialect


def _output_names(checkpoint: Checkpoint, example: torch.Tensor) -> list[str]:
    with torch.no_grad():
        outputs = checkpoint.model(example)
    if isinstance(outputs, torch.Tensor):
        return [LOGITS if checkpoint.spec.num_classes else FEATURES]
    return [f"{FEATURES}_{index}" for index in range(len(tree_leaves(outputs)))]


def _check_mapping(dialect: ir.Model, checkpoint: Checkpoint) -> None:
    """Every quantiser and linear of the checkpoint is one node, and every such node is one of the checkpoint."""
    expected = {
        "quantiser": (set(frozen_quantizers(checkpoint.model)), ("Quantize",)),
        "linear": (set(integer_linears(checkpoint.model)), WEIGHTED),
    }
    for kind, (names, op_types) in expected.items():
        found = Counter(node_name(node) for node in dialect.graph if is_dialect(node, *op_types))
        unmatched = names.symmetric_difference(found) | {name for name, count in found.items() if count != 1}
        if unmatched:
            raise BuildError(
                f"the exported graph does not hold each {kind} of the checkpoint exactly once: "
                f"{', '.join(sorted(unmatched)[:5])}. This is a defect of gplq; please report it."
            )


def is_dialect(node: ir.Node, *op_types: str) -> bool:
    """Whether a node is of the dialect, and of one of ``op_types`` if any is given."""
    return node.domain == DOMAIN and (not op_types or node.op_type in op_types)


def node_name(node: ir.Node) -> str:
    """The name that a dialect node got in PyTorch."""
    return node.attributes["name"].as_string()
