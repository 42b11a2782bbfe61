"""The leaves of a frozen model: quantisers that return codes, linears that hold codes. All is exported."""

import torch
from torch import Tensor, nn

from gplq import grid, ops
from gplq.ops import Codes


class FrozenQuantizer(nn.Module):
    """A quantiser with one scale, optionally behind a multiplication by a per-channel factor.

    Per-channel activation scales do not fit integer GEMMs; they have become ``pre_scale`` (or part of the norm before)
    and the columns of the weights behind (see :mod:`gplq.fold`).

    Attributes:
        scale: [], FP16-exact, > 0.
        pre_scale: [C] or None.
        pre_shift: [] or None: added before the multiplication; the bias of the linear behind takes it away again.
        rounding: False turns the quantiser into a plain multiplication, for the float twin of the same network.
    """

    scale: Tensor
    pre_scale: Tensor | None
    pre_shift: Tensor | None

    def __init__(
        self,
        scale: Tensor,
        pre_scale: Tensor | None,
        bits: int,
        signed: bool,
        name: str,
        pre_shift: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.bits, self.signed, self.name = bits, signed, name
        self.rounding = True
        self.register_buffer("scale", scale)
        self.register_buffer("pre_scale", pre_scale)
        self.register_buffer("pre_shift", pre_shift)

    @property
    def offset(self) -> Tensor | None:
        """By how much codes * scale are too large because of the shift, [] or [C]; None without one."""
        if self.pre_shift is None or self.pre_scale is None:
            return self.pre_shift
        return self.pre_shift * self.pre_scale

    def forward(self, x: Tensor) -> Codes:
        """[..., C] -> codes of the same shape, and the scale."""
        if self.rounding:
            before = self.pre_shift, self.pre_scale
            return Codes(ops.quantize(x, self.scale, *before, self.bits, self.signed, self.name), self.scale)
        x = x if self.pre_shift is None else x + self.pre_shift
        return Codes((x if self.pre_scale is None else x * self.pre_scale) / self.scale, self.scale)


class IntegerLinear(nn.Module):
    """A linear layer whose weight is integer codes.

    Attributes:
        codes: int8 [N, K], on the signed grid of ``bits``.
        weight_scale: [N], FP16-exact, > 0.
        bias: [N] or None, floating point.
        channel_axis: of the inputs and of the outputs.
    """

    channel_axis = -1
    codes: Tensor
    weight_scale: Tensor
    bias: Tensor | None

    def __init__(self, codes: Tensor, weight_scale: Tensor, bias: Tensor | None, bits: int, name: str) -> None:
        super().__init__()
        self.bits, self.name = bits, name
        self.register_buffer("codes", codes)
        self.register_buffer("weight_scale", weight_scale)
        self.register_buffer("bias", bias)

    def forward(self, x: Codes) -> Tensor:
        """Codes [..., K] -> [..., N]."""
        y: Tensor = ops.linear(x.values, x.scale, self.codes, self.weight_scale, self.bias, self.bits, self.name)
        return y


class IntegerConv(IntegerLinear):
    """A convolution whose weight is integer codes: as :class:`IntegerLinear`, but ``codes`` are int8 [N, C, kh, kw].

    Attributes:
        stride, padding, dilation: (height, width) each, in pixels.
    """

    channel_axis = 1

    def __init__(
        self,
        conv: nn.Conv2d,
        codes: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        bits: int,
        name: str,
    ) -> None:
        """``conv``: the convolution that it replaces, for its geometry."""
        super().__init__(codes, weight_scale, bias, bits, name)
        self.stride, self.padding, self.dilation = (
            [int(size) for size in sizes] for sizes in (conv.stride, conv.padding, conv.dilation)
        )

    def forward(self, x: Codes) -> Tensor:
        """Codes [B, C, H, W] -> [B, N, H', W']."""
        y: Tensor = ops.conv(
            x.values,
            x.scale,
            self.codes,
            self.weight_scale,
            self.bias,
            self.stride,
            self.padding,
            self.dilation,
            self.bits,
            self.name,
        )
        return y


def integer_layer(
    layer: nn.Module, codes: Tensor, weight_scale: Tensor, bias: Tensor | None, bits: int, name: str
) -> IntegerLinear:
    """The integer form of an ``nn.Linear`` or ``nn.Conv2d`` with the given codes, of its weight's shape."""
    if isinstance(layer, nn.Conv2d):
        return IntegerConv(layer, codes, weight_scale, bias, bits, name)
    return IntegerLinear(codes, weight_scale, bias, bits, name)


def quantize_rows(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Nearest codes of a weight [N, K] with one scale a row [N]; int8 [N, K]."""
    return grid.quantize(weight, scale[:, None], bits, signed=True).to(torch.int8)


def set_rounding(model: nn.Module, rounding: bool) -> None:
    """Switch every quantiser of a frozen model on or off."""
    for module in model.modules():
        if isinstance(module, FrozenQuantizer):
            module.rounding = rounding
