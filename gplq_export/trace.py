"""PyTorch -> the gplq dialect of ONNX, with proof that every quantiser and every linear arrived exactly once."""

import inspect
import re
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch.utils._pytree import tree_leaves

from gplq.checkpoint import Checkpoint, frozen_quantizers, integer_linears
from gplq.convert import mark_units
from gplq.errors import BuildError, GplqError
from gplq_export.dialect import DOMAIN, translations
from gplq_export.onnx_file import printable

OPSET = 21  # the first with INT4 and UINT4 in QuantizeLinear and DequantizeLinear
INPUT, LOGITS, FEATURES = "images", "logits", "features"
_LONGEST = 400  # characters of a reason
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
                dynamic_shapes=_dynamic_shapes(model),
                custom_translation_table=translations(),
                verbose=False,
            )
    except Exception as error:  # the exporter wraps whatever a network raises, and adds some of its own
        raise BuildError(
            f"PyTorch cannot export {checkpoint.spec.architecture}: {_reason(error)} A network is exported by tracing "
            "it once, for any batch: what forward() does must not depend on the numbers that it computes, and ONNX has "
            "to have the operators."
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    dialect: ir.Model = program.model
    _check_mapping(dialect, checkpoint)
    return dialect


def _dynamic_shapes(model: torch.nn.Module) -> tuple[Any, ...]:
    """The batch of the input is open; what forward(*inputs) collects is a tuple by itself."""
    batch = {0: torch.export.Dim("batch")}
    first = next(iter(inspect.signature(model.forward).parameters.values()))
    return ((batch,),) if first.kind is inspect.Parameter.VAR_POSITIONAL else (batch,)


def _reason(error: BaseException) -> str:
    """What is at the bottom of a chain of errors, and the line of the network's own code that it comes from."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip()
    summary = printable(text.split("\n\n")[0])[:_LONGEST].rstrip(".") or "no reason given"
    if not isinstance(error, GplqError):
        summary = f"{type(error).__name__}: {summary}"
    # PyTorch quotes the line; of other errors it is the innermost one outside of PyTorch and of this package.
    quoted = re.findall(r'File "([^"]+)", line (\d+), in \S+', text)
    frames = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    ours = (str(Path(torch.__file__).parent), str(Path(__file__).parent))
    where = next((line for line in reversed([*frames, *quoted]) if not line[0].startswith(ours)), None)
    return f"{summary}{'' if where is None else f' ({where[0]}:{where[1]})'}."


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
            first, *others = sorted(unmatched)
            more = f", and {len(others)} more" if others else ""
            raise BuildError(
                f"the {kind} {first} is in the exported graph {found[first]} times, not once{more}: forward() calls it "
                "so often for the images that it was traced with. What is quantised must be called once."
            )


def is_dialect(node: ir.Node, *op_types: str) -> bool:
    """Whether a node is of the dialect, and of one of ``op_types`` if any is given."""
    return node.domain == DOMAIN and (not op_types or node.op_type in op_types)


def node_name(node: ir.Node) -> str:
    """The name that a dialect node got in PyTorch."""
    return node.attributes["name"].as_string()
