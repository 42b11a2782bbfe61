"""The layers of a quantised model; :mod:`gplq.convert` puts them into a timm model by structure.

A layer holds leaves that exist in two states. While training (Stage 1) the leaves are
:class:`~gplq.lsq.ActivationQuantizer` and ``nn.Linear`` and pass tensors; once frozen (Stage 2) they are
:class:`~gplq.integer.FrozenQuantizer` and :class:`~gplq.integer.IntegerLinear` and pass integer codes. The layers
themselves do not know the difference.

    timm                          becomes                quantised operands
    Linear                        QuantLinear            its input
    Conv2d, kernel = stride       QuantPatchConv         its patches
    Conv2d                        QuantConv              its input
    Attention of a plain ViT      QuantAttention         one input for q, k, v; q, k; softmax (unsigned), v; proj input
    whatever else multiplies two  itself, with products  both operands of each product
    activations                   (route_products)
"""

import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame
from timm.layers.attention import Attention
from timm.layers.padding import pad_same
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gplq import ops
from gplq.errors import ModelError
from gplq.lsq import ActivationQuantizer, recomputed, shifted
from gplq.ops import Codes
from gplq.survey import ATTENTION, MATMULS, bind_linear, operands

# Makes the quantiser of a product's operand: signed, unsigned, or None if calibration is to find out. Where products
# stay in floating point it is an identity.
OperandFactory = Callable[[bool | None], nn.Module]


class QuantLinear(nn.Module):
    """A linear layer behind the quantiser of its input. [..., K] -> [..., N].

    Attributes:
        weight_bits: of the weight, once Stage 2 has quantised it; so in all layers here that own a weight.
        applied_by_parent: the parent does not call the layer but multiplies by its ``weight``.
    """

    def __init__(self, linear: nn.Linear, input_quantizer: nn.Module, weight_bits: int) -> None:
        super().__init__()
        self.weight_bits = weight_bits
        self.input_quantizer = input_quantizer
        self.linear = linear
        self.applied_by_parent = False

    @property
    def weight(self) -> Tensor:
        """The inner linear's weight, by which a parent that applies it itself is recognised."""
        linear: Any = self.linear
        weight: Tensor = linear.weight if isinstance(linear, nn.Linear) else linear.codes
        return weight

    @property
    def bias(self) -> Tensor | None:
        """The inner linear's bias, which such a parent may read, too."""
        bias: Tensor | None = self.linear.bias
        return bias

    def forward(self, x: Tensor) -> Tensor:
        """Quantise, then multiply."""
        quantizer: Any = self.input_quantizer
        if isinstance(quantizer, ActivationQuantizer) and quantizer.shift and quantizer.mode == "quantize":
            # W (x + shift) - W shift: the second term belongs to the bias.
            weight, bias = self.linear.weight, self.linear.bias
            return F.linear(quantizer(shifted(x, quantizer.shift)), weight, bias - quantizer.shift * weight.sum(1))
        y: Tensor = self.linear(quantizer(x))
        return y


class QuantMatMul(nn.Module):
    """A matmul of two activations, quantised or as they are. [..., M, K] @ [..., K, N] -> [..., M, N]."""

    def __init__(self, a_quantizer: nn.Module, b_quantizer: nn.Module) -> None:
        super().__init__()
        self.a_quantizer = a_quantizer
        self.b_quantizer = b_quantizer
        self.name = ""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Quantise both, then multiply."""
        a_hat, b_hat = self.a_quantizer(a), self.b_quantizer(b)
        if isinstance(a_hat, Codes):
            y: Tensor = ops.matmul(a_hat.values, a_hat.scale, b_hat.values, b_hat.scale, self.name)
            return y
        return torch.matmul(a_hat, b_hat)


class QuantAttention(nn.Module):
    """timm's ``Attention`` with q, k and v as three linears that share one quantised input. [B, N, C] -> [B, N, C].

    Three linears, because a GPU runs a fused qkv with per-channel scales in FP16 without a warning (TensorRT slices
    the weights, which a per-channel scale cannot follow); it merges three that share an input by itself. The factor
    1/sqrt(head_dim) is part of the query's weights, so that the graph has no multiplication there.
    """

    def __init__(
        self,
        attention: Attention,
        input_quantizer: ActivationQuantizer,
        proj_quantizer: ActivationQuantizer,
        operand: OperandFactory,
        weight_bits: int,
    ) -> None:
        super().__init__()
        self.weight_bits = weight_bits
        self.num_heads, self.head_dim = attention.num_heads, attention.head_dim
        self.input_quantizer = input_quantizer
        self.q, self.k, self.v = _split_rows(attention.qkv, 3)
        self.q_norm, self.k_norm, self.norm = attention.q_norm, attention.k_norm, attention.norm
        self.qk = QuantMatMul(operand(True), operand(True))
        self.pv = QuantMatMul(operand(False), operand(True))
        self.proj = QuantLinear(attention.proj, proj_quantizer, weight_bits)
        self.attn_drop, self.proj_drop = attention.attn_drop, attention.proj_drop
        _scale_output(self.q if isinstance(self.q_norm, nn.Identity) else self.q_norm, attention.scale)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Signature of timm's ``Attention``; masks are not supported."""
        if attn_mask is not None or is_causal:
            raise ModelError("attention masks are not supported: this model is meant for whole images.")
        batch, tokens, _ = x.shape
        x_hat = self.input_quantizer(x)
        heads = (batch, tokens, self.num_heads, self.head_dim)
        q = self.q_norm(self.q(x_hat).reshape(heads).transpose(1, 2))  # [B, H, N, D]
        k = self.k_norm(self.k(x_hat).reshape(heads).transpose(1, 2))
        v = self.v(x_hat).reshape(heads).transpose(1, 2)
        y = recomputed(self._weigh, q, k, v).transpose(1, 2).reshape(batch, tokens, self.num_heads * self.head_dim)
        out: Tensor = self.proj_drop(self.proj(self.norm(y)))
        return out

    @torch.no_grad()
    def equalize(self, query: Tensor, key: Tensor) -> None:
        """Give each channel of queries and keys the same range, which changes no score: one is multiplied, one divided.

        Keys have channels that are ten times as large as others; one scale for all of them would spend its codes
        there. ``query``, ``key``: largest absolute value of each channel, [heads * head_dim].
        """
        if not isinstance(self.q_norm, nn.Identity) or not isinstance(self.k_norm, nn.Identity):
            return  # a norm behind the linears would undo it
        factor = torch.where((query > 0) & (key > 0), (key / query).sqrt(), torch.ones_like(key))
        for linear, by in ((self.q, factor), (self.k, 1 / factor)):
            linear.weight.mul_(by[:, None])
            if linear.bias is not None:
                linear.bias.mul_(by)

    @torch.no_grad()
    def centre(self, key: Tensor, value: Tensor) -> None:
        """Take their mean [heads * head_dim] out of keys and values, which changes no output.

        A key that all tokens share adds the same to all scores of a query, which a softmax ignores; a value that they
        share arrives whole, because probabilities sum to 1, and may as well be part of the projection's bias. Quantised
        probabilities do not sum to 1, and what is missing multiplies just that mean: at 257 tokens three quarters of
        the damage that a 7-bit softmax does. (Means of keys: as SageAttention, arXiv 2410.02367.)
        """
        if self.k.bias is not None and isinstance(self.k_norm, nn.Identity):
            self.k.bias.sub_(key)
        projection = self._plain_projection()
        if projection is not None and self.v.bias is not None and projection.bias is not None:
            self.v.bias.sub_(value)
            projection.bias.add_(projection.weight @ value)

    @torch.no_grad()
    def spread(self, size: Tensor) -> None:
        """Divide each channel of the values by its ``size`` in front of the projection, which multiplies it again.

        So the projection's input, which has one scale, has channels of one size. ``size``: [heads * head_dim].
        """
        projection = self._plain_projection()
        if projection is None:
            return
        factor = torch.where(size > 0, size / size.mean(), torch.ones_like(size)).clamp(1e-2, 1e2)
        self.v.weight.div_(factor[:, None])
        if self.v.bias is not None:
            self.v.bias.div_(factor)
        projection.weight.mul_(factor)

    def _plain_projection(self) -> nn.Linear | None:
        """The linear that reads the weighted values as they are; None if a norm stands between."""
        projection: Any = self.proj.linear
        return projection if isinstance(self.norm, nn.Identity) else None

    def _weigh(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        p = self.attn_drop(torch.softmax(self.qk(q, k.transpose(-2, -1)), dim=-1))  # [B, H, N, N]
        y: Tensor = self.pv(p, v)
        return y


class QuantPatchConv(nn.Module):
    """A convolution whose kernel is its stride, as a linear on patches. [B, C, H, W] -> [B, D, H/p, W/p].

    A matmul sums in the order of the code domain on every back end, which a convolution kernel does not promise.
    """

    def __init__(self, conv: nn.Conv2d, input_quantizer: nn.Module, weight_bits: int) -> None:
        super().__init__()
        self.weight_bits = weight_bits
        self.kernel_size = (conv.kernel_size[0], conv.kernel_size[1])  # also read by parents that pad
        self.input_quantizer = input_quantizer
        self.linear = nn.Linear(math.prod(conv.weight.shape[1:]), conv.out_channels, bias=conv.bias is not None)
        self.linear.weight = nn.Parameter(conv.weight.detach().flatten(1).clone())
        if conv.bias is not None:
            self.linear.bias = nn.Parameter(conv.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """Cut patches, quantise, multiply; channels first again, as a convolution returns them."""
        batch, channels, height, width = x.shape
        ph, pw = self.kernel_size
        rows, columns = height // ph, width // pw
        x = x[:, :, : rows * ph, : columns * pw].reshape(batch, channels, rows, ph, columns, pw)
        patches = x.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows, columns, channels * ph * pw)
        y: Tensor = self.linear(self.input_quantizer(patches))
        return y.permute(0, 3, 1, 2)

    @staticmethod
    def fits(conv: nn.Conv2d) -> bool:
        """Whether a convolution takes disjoint patches of its input, each pixel once."""
        plain = type(conv) is nn.Conv2d and conv.groups == 1 and conv.kernel_size == conv.stride
        return plain and set(conv.padding) <= {0} and set(conv.dilation) == {1}


class QuantConv(nn.Module):
    """Any other ungrouped convolution behind the quantiser of its input. [B, C, H, W] -> [B, D, H', W'].

    ``linear`` is the convolution, under the name that a weight has in all layers here.
    """

    def __init__(self, conv: nn.Conv2d, input_quantizer: nn.Module, weight_bits: int) -> None:
        super().__init__()
        self.weight_bits = weight_bits
        self.input_quantizer = input_quantizer
        self.pads_as_tensorflow = isinstance(conv, Conv2dSame)
        self.kernel_size, self.stride, self.dilation = conv.kernel_size, conv.stride, conv.dilation
        self.linear = conv
        if self.pads_as_tensorflow:
            height, width = conv.kernel_size
            self.linear = nn.Conv2d(conv.in_channels, conv.out_channels, (height, width))
            self.linear.stride, self.linear.dilation = conv.stride, conv.dilation
            self.linear.weight, self.linear.bias = conv.weight, conv.bias

    @staticmethod
    def fits(conv: nn.Conv2d) -> bool:
        """Whether a convolution is an ordinary, ungrouped one."""
        ordinary = type(conv) in (nn.Conv2d, Conv2dSame) and not isinstance(conv.padding, str)
        return ordinary and conv.groups == 1 and conv.padding_mode == "zeros"

    def forward(self, x: Tensor) -> Tensor:
        """Pad as TensorFlow does if the weights come from there; quantise, convolve."""
        if self.pads_as_tensorflow:
            x = pad_same(x, list(self.kernel_size), list(self.stride), list(self.dilation))
        y: Tensor = self.linear(self.input_quantizer(x))
        return y


class Products(nn.Module):
    """Mixed into a module that multiplies activations itself, by :func:`route_products`.

    While the module's own forward runs, the products in it go through the quantised ``product_0``, ``product_1``, …, in
    the order of their calls; an attention is written out as its two products with a softmax between. A linear whose
    weight the module applies itself goes through that child's quantised layer.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module itself computes."""
        with _Router(self):
            return super().forward(*args, **kwargs)


def route_products(module: nn.Module, count: int, operand: OperandFactory) -> None:
    """Quantise, in place, the operands of the ``count`` products that ``module`` computes."""
    for index in range(count):
        module.add_module(f"product_{index}", QuantMatMul(operand(None), operand(None)))
    cls: Any = type(module)
    module.__class__ = _with_products(cls)


@functools.cache
def _with_products(cls: Any) -> Any:
    # One class for each class, as torch.nn.utils.parametrize does it: isinstance, names and deepcopy stay as they are.
    return type(f"Quant{cls.__name__}", (Products, cls), {"__module__": __name__})


class _Router(TorchFunctionMode):
    """Sends the products of one module through its quantised ones."""

    _active: ClassVar[list["_Router | None"]] = []

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.calls = 0
        self.applied = [
            child for child in module.children() if isinstance(child, QuantLinear) and child.applied_by_parent
        ]

    def __enter__(self) -> Any:
        self._active.append(self)
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *exception: object) -> None:
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        self._active.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replace a product; leave the rest, and whatever a quantised layer computes inside."""
        kwargs = kwargs or {}
        if self._active[-1] is not self:
            return func(*args, **kwargs)
        self._active.append(None)
        try:
            if func is ATTENTION:
                return self._attention(*args, **kwargs)
            if func in MATMULS:
                return self._product()(*operands(func, args, kwargs))
            if func is F.linear:
                x, weight, _ = bind_linear(*args, **kwargs)
                for child in self.applied:
                    if child.weight is weight:
                        return child(x)  # its bias is the one that the module would have added
            return func(*args, **kwargs)
        finally:
            self._active.pop()

    def _product(self) -> QuantMatMul:
        """The next one."""
        product: QuantMatMul | None = getattr(self.module, f"product_{self.calls}", None)
        if product is None:
            raise ModelError(f"{type(self.module).__name__} multiplies more often than when it was converted.")
        self.calls += 1
        return product

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """``scaled_dot_product_attention`` in evaluation: no dropout."""
        if is_causal or enable_gqa or (attn_mask is not None and attn_mask.dtype == torch.bool):
            raise ModelError(f"{type(self.module).__name__}: causal, grouped or masked attention is not supported.")
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        qk, pv = self._product(), self._product()

        def weigh(q: Tensor, k: Tensor, v: Tensor, *masks: Tensor) -> Tensor:
            scores = sum(masks, start=qk(q, k.transpose(-2, -1)))
            y: Tensor = pv(torch.softmax(scores, dim=-1), v)
            return y

        # Scaling queries costs less than scaling scores, and is what families without the fused function do.
        return recomputed(weigh, query * scale, key, value, *([] if attn_mask is None else [attn_mask]))


def _split_rows(linear: nn.Linear, parts: int) -> list[nn.Linear]:
    """A linear [N, K] as ``parts`` linears of [N / parts, K] each."""
    weights = linear.weight.detach().chunk(parts)
    biases = [None] * parts if linear.bias is None else list(linear.bias.detach().chunk(parts))
    result = []
    for weight, bias in zip(weights, biases, strict=True):
        part = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
        part.weight = nn.Parameter(weight.clone())
        part.bias = None if bias is None else nn.Parameter(bias.clone())
        result.append(part)
    return result


@torch.no_grad()
def _scale_output(module: nn.Module, factor: float) -> None:
    """Multiply a linear's or a norm's output by ``factor`` through its own weight and bias."""
    if not isinstance(getattr(module, "weight", None), Tensor):
        raise ModelError(f"a query norm without a weight ({type(module).__name__}) is not supported.")
    for parameter in module.parameters():
        parameter.mul_(factor)
