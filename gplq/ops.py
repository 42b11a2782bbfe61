"""The five operators that a quantised model is made of.

They are PyTorch custom operators, so that ``torch.export`` keeps each as one node under its own name whatever the
exporter's version decomposes; the ONNX side maps each to the nodes of its target. All of them run on any device, in
FP32 or FP64; codes travel as floating point numbers (see :mod:`gplq.grid`), weight codes are stored as int8.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gplq import grid


class Codes(NamedTuple):
    """A quantised activation: ``values * scale`` is the tensor that it stands for.

    ``values``: the integer codes, floating point, any shape. ``scale``: scalar tensor.
    """

    values: Tensor
    scale: Tensor


@torch.library.custom_op("gplq::quantize", mutates_args=())
def quantize(
    x: Tensor,
    scale: Tensor,
    pre_shift: Tensor | None,
    pre_scale: Tensor | None,
    bits: int,
    signed: bool,
    name: str,
) -> Tensor:
    """Codes of ``(x + pre_shift) * pre_scale``.

    ``x``: [..., C]; ``scale``: []; ``pre_shift``: [] or None; ``pre_scale``: [C] or None; ``name``: of the node.
    """
    x = x if pre_shift is None else x + pre_shift
    return grid.quantize(x if pre_scale is None else x * pre_scale, scale, bits, signed)


@quantize.register_fake
def _(
    x: Tensor,
    scale: Tensor,
    pre_shift: Tensor | None,
    pre_scale: Tensor | None,
    bits: int,
    signed: bool,
    name: str,
) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("gplq::linear", mutates_args=())
def linear(
    codes: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, bits: int, name: str
) -> Tensor:
    """A linear layer on codes: the sum is over integers and exact, the scales multiply once, after it.

    ``codes``: [..., K]; ``scale``: []; ``weight``: int8 codes [N, K]; ``weight_scale``: [N]; ``bias``: [N] or None.
    """
    y = F.linear(codes, weight.to(codes.dtype)) * (scale * weight_scale)
    return y if bias is None else y + bias


@linear.register_fake
def _(
    codes: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, bits: int, name: str
) -> Tensor:
    return codes.new_empty([*codes.shape[:-1], weight.shape[0]])


@torch.library.custom_op("gplq::conv", mutates_args=())
def conv(
    codes: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    bits: int,
    name: str,
) -> Tensor:
    """A convolution on codes, as :func:`linear`. ``codes``: [B, C, H, W]; ``weight``: int8 codes [N, C, kh, kw].

    Padding is with zeros, which are codes of 0 on any symmetric grid.
    """
    y = F.conv2d(codes, weight.to(codes.dtype), None, stride, padding, dilation)
    y = y * (scale * weight_scale)[:, None, None]
    return y if bias is None else y + bias[:, None, None]


@conv.register_fake
def _(
    codes: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    bits: int,
    name: str,
) -> Tensor:
    return F.conv2d(codes, codes.new_empty(weight.shape), None, stride, padding, dilation)


@torch.library.custom_op("gplq::matmul", mutates_args=())
def matmul(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, name: str) -> Tensor:
    """A matmul of two code tensors, [..., M, K] and [..., K, N] with equal leading sizes; scalar scales."""
    return torch.matmul(a, b) * (a_scale * b_scale)


@matmul.register_fake
def _(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, name: str) -> Tensor:
    return a.new_empty([*a.shape[:-1], b.shape[-1]])


@torch.library.custom_op("gplq::mark", mutates_args=())
def mark(x: Tensor, name: str) -> Tensor:
    """The identity, with a name by which the tensor is found again in an exported graph."""
    return x.clone()


@mark.register_fake
def _(x: Tensor, name: str) -> Tensor:
    return torch.empty_like(x)
