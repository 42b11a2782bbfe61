"""The last step of the end-to-end model: logits -> the names of the k likeliest classes, and how likely each is.

An ONNX file rather than Python: it runs in the server's own ONNX Runtime, in batches, without a process of its own, and
names are strings in a tensor, so that clients need no list of labels.
"""

from collections.abc import Sequence

import onnx
from onnx import TensorProto, helper


def top_model(logits: str, labels: Sequence[str], k: int) -> onnx.ModelProto:
    """``logits`` FP32 [B, classes] -> ``labels`` string [B, k] and ``scores`` FP32 [B, k], the softmax; largest first.

    Opsets as old as possible: any server that serves the network runs this, too.
    """
    k = min(k, len(labels))
    nodes = [
        helper.make_node("Softmax", [logits], ["probabilities"], axis=1),
        helper.make_node("TopK", ["probabilities", "k"], ["scores", "classes"], axis=1, largest=1, sorted=1),
        helper.make_node(
            "LabelEncoder",
            ["classes"],
            ["labels"],
            domain="ai.onnx.ml",
            keys_int64s=list(range(len(labels))),
            values_strings=list(labels),
            default_string="?",
        ),
    ]
    graph = helper.make_graph(
        nodes,
        "top",
        [helper.make_tensor_value_info(logits, TensorProto.FLOAT, ["batch", len(labels)])],
        [
            helper.make_tensor_value_info("labels", TensorProto.STRING, ["batch", k]),
            helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["batch", k]),
        ],
        [helper.make_tensor("k", TensorProto.INT64, [1], [k])],
    )
    opsets = [helper.make_opsetid("", 13), helper.make_opsetid("ai.onnx.ml", 2)]
    model = helper.make_model(graph, producer_name="gplq", ir_version=8, opset_imports=opsets)
    onnx.checker.check_model(model, full_check=True)
    return model
