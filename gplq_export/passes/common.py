"""Questions that several passes ask about a graph."""

import numpy as np
import onnx_ir as ir

# Give elements other places, and do nothing else to them.
MOVES = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten")
# E4M3 is evenly spaced at its lower end, and only there: 2^-9 apart from -2^-5 to 2^-5. With a scale that is 2^9 times
# as large it holds codes from -16 to 16, and rounds to them, half to even.
FP8_STEP, FP8_CODES = 2.0**-9, 16
# The lowest and the highest code of a type.
CODE_LIMITS = {
    ir.DataType.INT8: (-128, 127),
    ir.DataType.UINT8: (0, 255),
    ir.DataType.INT4: (-8, 7),
    ir.DataType.UINT4: (0, 15),
    ir.DataType.FLOAT8E4M3FN: (-448, 448),
}
MARKED = "gplq.marked"  # in Value.meta: a tensor that others look up by its name, so that it must stay what it is

# Operators whose output is bounded whatever they are given.
_RANGES = {
    "Softmax": (0.0, 1.0),
    "Sigmoid": (0.0, 1.0),
    "Tanh": (-1.0, 1.0),
    "Relu": (0.0, np.inf),
    "Gelu": (-0.17, np.inf),
}


def only_reader(value: ir.Value) -> ir.Node | None:
    """The node that reads a value, if there is one only and nobody else wants the value."""
    uses = tuple(value.uses())
    wanted = value.is_graph_output() or MARKED in value.meta
    return uses[0].node if len(uses) == 1 and not wanted else None


def source(value: ir.Value | None, through: tuple[str, ...] = MOVES) -> ir.Node | None:
    """The node that computes a value, behind nodes of the types ``through``; None for inputs and constants."""
    node = None if value is None else value.producer()
    while node is not None and node.op_type in through:
        node = None if node.inputs[0] is None else node.inputs[0].producer()
    return node


def reachable(value: ir.Value | None) -> tuple[float, float]:
    """The lowest and the highest number that a tensor can hold, whatever the graph is given.

    >>> reachable(None)
    (-inf, inf)
    """
    node = source(value)
    return _RANGES.get("" if node is None else node.op_type, (-np.inf, np.inf))


def constant(value: ir.Value | None) -> np.ndarray | None:
    """The content of an initialiser; None for anything else."""
    if value is None or not value.is_initializer() or value.const_value is None:
        return None
    return value.const_value.numpy()


def is_scalar_constant(value: ir.Value | None) -> bool:
    """Whether a value is an initialiser of one element."""
    array = constant(value)
    return array is not None and array.size == 1


def is_product(node: ir.Node | None) -> bool:
    """Whether a node multiplies two matrices neither of which is a weight."""
    return node is not None and node.op_type == "MatMul" and not any(is_weight(value) for value in node.inputs)


def is_weight(value: ir.Value | None) -> bool:
    """Whether a value is constant, be it codes behind DequantizeLinear."""
    node = None if value is None else value.producer()
    return constant(node.inputs[0] if node is not None and node.op_type == "DequantizeLinear" else value) is not None


def int8_parameters(graph: ir.Graph, quantize: ir.Node) -> tuple[ir.Value, ir.Value]:
    """The scale and the zero point with which INT8 holds the codes that a QuantizeLinear writes in FP8."""
    scale = quantize.inputs[1]
    wide = constant(scale)
    assert scale is not None and wide is not None  # targets write constant scales only
    narrow = (wide.astype(np.float32) * np.float32(FP8_STEP)).astype(wide.dtype)
    return _initialiser(graph, f"{scale.name}.int8", narrow), _initialiser(graph, "zero_int8", np.zeros((), np.int8))


def _initialiser(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """The initialiser of that name, made if there is none."""
    if name not in graph.initializers:
        tensor = ir.Tensor(array, name=name)
        value = ir.Value(name=name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape))
        graph.register_initializer(value)
    return graph.initializers[name]
