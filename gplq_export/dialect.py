"""The ONNX dialect between PyTorch and the targets: five operators, one for each operator of :mod:`gplq.ops`.

``torch.export`` keeps gplq's operators whole, and the translations here write each as one ONNX node of the domain
``gplq``, with its name as an attribute. Nothing after this depends on how an exporter names or decomposes anything;
a target (:mod:`gplq_export.targets`) replaces every one of these nodes by standard ones.

    Quantize(x [..., C], scale [], pre_shift []?, pre_scale [C]?) -> codes     name, bits, signed
    Linear(codes [..., K], scale [], weight int8 [N, K], weight_scale [N], bias [N]?) -> y     name, bits
    Conv(codes [B, C, H, W], scale [], weight int8 [N, C, kh, kw], weight_scale [N], bias [N]?) -> y
                                                                   name, bits, stride, padding, dilation
    MatMul(a, a_scale [], b, b_scale []) -> y                      name
    Mark(x) -> x                                                   name
"""

from collections.abc import Callable
from typing import Any

import onnx.defs
import torch
from onnx.defs import OpSchema
from onnxscript.values import Opset

DOMAIN = "gplq"
_VERSION = 1


def translations() -> dict[Any, Callable[..., Any]]:
    """What ``torch.onnx.export`` takes as ``custom_translation_table``."""
    _register_schemas()
    dialect = Opset(DOMAIN, _VERSION)

    def quantize(x: Any, scale: Any, pre_shift: Any, pre_scale: Any, bits: int, signed: bool, name: str) -> Any:
        return dialect.Quantize(x, scale, pre_shift, pre_scale, bits=bits, signed=int(signed), name=name)

    def linear(codes: Any, scale: Any, weight: Any, weight_scale: Any, bias: Any, bits: int, name: str) -> Any:
        return dialect.Linear(codes, scale, weight, weight_scale, bias, bits=bits, name=name)

    def conv(
        codes: Any,
        scale: Any,
        weight: Any,
        weight_scale: Any,
        bias: Any,
        stride: list[int],
        padding: list[int],
        dilation: list[int],
        bits: int,
        name: str,
    ) -> Any:
        geometry = {"stride": list(stride), "padding": list(padding), "dilation": list(dilation)}
        return dialect.Conv(codes, scale, weight, weight_scale, bias, bits=bits, name=name, **geometry)

    def matmul(a: Any, a_scale: Any, b: Any, b_scale: Any, name: str) -> Any:
        return dialect.MatMul(a, a_scale, b, b_scale, name=name)

    def mark(x: Any, name: str) -> Any:
        return dialect.Mark(x, name=name)

    ops = torch.ops.gplq
    return {
        ops.quantize.default: quantize,
        ops.linear.default: linear,
        ops.conv.default: conv,
        ops.matmul.default: matmul,
        ops.mark.default: mark,
    }


def _register_schemas() -> None:
    """Tell onnx about the dialect; onnxscript refuses to write operators that have no schema. Idempotent."""
    if _is_registered():
        return
    optional = OpSchema.FormalParameterOption.Optional
    tensor, codes = "T", "tensor(int8)"

    def parameter(name: str, type_: str = tensor, option: Any = OpSchema.FormalParameterOption.Single) -> Any:
        return OpSchema.FormalParameter(name, type_, param_option=option)

    integer, integers, string = OpSchema.AttrType.INT, OpSchema.AttrType.INTS, OpSchema.AttrType.STRING
    weighted = [
        parameter("codes"),
        parameter("scale"),
        parameter("weight", codes),
        parameter("weight_scale"),
        parameter("bias", option=optional),
    ]
    inputs = {
        "Quantize": [
            parameter("x"),
            parameter("scale"),
            parameter("pre_shift", option=optional),
            parameter("pre_scale", option=optional),
        ],
        "Linear": weighted,
        "Conv": weighted,
        "MatMul": [parameter("a"), parameter("a_scale"), parameter("b"), parameter("b_scale")],
        "Mark": [parameter("x")],
    }
    attributes = {
        "Quantize": {"name": string, "bits": integer, "signed": integer},
        "Linear": {"name": string, "bits": integer},
        "Conv": {
            "name": string,
            "bits": integer,
            "stride": integers,
            "padding": integers,
            "dilation": integers,
        },
        "MatMul": {"name": string},
        "Mark": {"name": string},
    }
    for op_type, formal in inputs.items():
        schema = OpSchema(
            op_type,
            DOMAIN,
            _VERSION,
            inputs=formal,
            outputs=[parameter("y")],
            type_constraints=[(tensor, ["tensor(float)"], "floating point")],
            attributes=[OpSchema.Attribute(key, kind, required=True) for key, kind in attributes[op_type].items()],
        )
        onnx.defs.register_schema(schema)


def _is_registered() -> bool:
    try:
        onnx.defs.get_schema("Mark", _VERSION, DOMAIN)
    except onnx.defs.SchemaError:
        return False
    return True
