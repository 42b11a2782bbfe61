"""The layers of a quantised ViT, and :func:`convert`, which puts them into a timm model by structure.

A layer holds leaves that exist in two states. While training (Stage 1) the leaves are
:class:`~gplq.lsq.ActivationQuantizer` and ``nn.Linear`` and pass tensors; once frozen (Stage 2) they are
:class:`~gplq.integer.FrozenQuantizer` and :class:`~gplq.integer.IntegerLinear` and pass integer codes. The layers
themselves do not know the difference.

    timm                          becomes                quantised operands
    Attention (qkv, proj)         QuantAttention         one input for q, k, v; q, k; softmax (unsigned), v; proj input
    Linear                        QuantLinear            its input
    Conv2d of a patch embedding   QuantPatchConv         its patches
"""

import math
from typing import Any

import torch
from timm.layers import LayerNorm as TimmLayerNorm
from timm.layers import PatchEmbed
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block, LayerScale, VisionTransformer
from torch import Tensor, nn

from gplq import ops
from gplq.errors import ModelError
from gplq.lsq import ActivationQuantizer
from gplq.ops import Codes
from gplq.recipe import Recipe


class QuantLinear(nn.Module):
    """A linear layer behind the quantiser of its input. [..., K] -> [..., N]."""

    def __init__(self, linear: nn.Linear, input_quantizer: nn.Module) -> None:
        super().__init__()
        self.input_quantizer = input_quantizer
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        """Quantise, then multiply."""
        y: Tensor = self.linear(self.input_quantizer(x))
        return y


class QuantMatMul(nn.Module):
    """A matmul of two quantised activations. [..., M, K] @ [..., K, N] -> [..., M, N]."""

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

    def __init__(self, attention: Attention, quantizer: "_QuantizerFactory") -> None:
        super().__init__()
        if attention.gate is not None:
            raise ModelError("gated attention (timm's Attention with gated=True) is not supported yet.")
        self.num_heads, self.head_dim = attention.num_heads, attention.head_dim
        self.input_quantizer = quantizer("linear")
        self.q, self.k, self.v = _split_rows(attention.qkv, 3)
        self.q_norm, self.k_norm, self.norm = attention.q_norm, attention.k_norm, attention.norm
        self.qk = QuantMatMul(quantizer("matmul"), quantizer("matmul"))
        self.pv = QuantMatMul(quantizer("matmul", signed=False), quantizer("matmul"))
        # The attention output mixes heads whose scales differ, and no norm stands before it that could take a
        # per-channel scale for free: per tensor (design: granularity that a GPU can run).
        self.proj = QuantLinear(attention.proj, quantizer("linear", per_channel=False))
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
        p = self.attn_drop(torch.softmax(self.qk(q, k.transpose(-2, -1)), dim=-1))  # [B, H, N, N]
        y = self.pv(p, v).transpose(1, 2).reshape(batch, tokens, self.num_heads * self.head_dim)
        out: Tensor = self.proj_drop(self.proj(self.norm(y)))
        return out


class QuantPatchConv(nn.Module):
    """A convolution whose kernel is its stride, as a linear on patches. [B, C, H, W] -> [B, D, H/p, W/p].

    A matmul sums in the order of the code domain on every back end, which a convolution kernel does not promise.
    """

    def __init__(self, conv: nn.Conv2d, input_quantizer: nn.Module) -> None:
        super().__init__()
        self.patch = (conv.kernel_size[0], conv.kernel_size[1])
        self.input_quantizer = input_quantizer
        self.linear = nn.Linear(math.prod(conv.weight.shape[1:]), conv.out_channels, bias=conv.bias is not None)
        self.linear.weight = nn.Parameter(conv.weight.detach().flatten(1).clone())
        if conv.bias is not None:
            self.linear.bias = nn.Parameter(conv.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """Cut patches, quantise, multiply; channels first again, as a convolution returns them."""
        batch, channels, height, width = x.shape
        ph, pw = self.patch
        rows, columns = height // ph, width // pw
        x = x[:, :, : rows * ph, : columns * pw].reshape(batch, channels, rows, ph, columns, pw)
        patches = x.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows, columns, channels * ph * pw)
        y: Tensor = self.linear(self.input_quantizer(patches))
        return y.permute(0, 3, 1, 2)


def convert(model: nn.Module, recipe: Recipe) -> nn.Module:
    """Replace, in place, every weight layer of a timm ViT by its quantised form; quantisers still pass through.

    Raises:
        ModelError: the model is not a ViT, or has a layer that is not supported; the message names it.
    """
    check_supported(model)
    quantizer = _QuantizerFactory(recipe)
    edge = {id(module) for module in _first_and_last(model)}
    for name, module in list(model.named_modules()):
        replacement: nn.Module
        if isinstance(module, Attention):
            replacement = QuantAttention(module, quantizer)
        elif isinstance(module, nn.Conv2d):
            replacement = QuantPatchConv(module, quantizer.edge())
        elif isinstance(module, nn.Linear) and ".attn." not in f".{name}.":
            replacement = QuantLinear(module, quantizer.edge() if id(module) in edge else quantizer("linear"))
        else:
            continue
        model.set_submodule(name, replacement)
    for name, module in model.named_modules():
        if hasattr(module, "name"):
            module.name = name
    return model


# What may hold parameters in a supported model; all but the first three stay in float, they are a fraction of a per
# cent of the work.
_SUPPORTED_OWNERS = (Attention, nn.Linear, nn.Conv2d, nn.LayerNorm, TimmLayerNorm, LayerScale, VisionTransformer)


def check_supported(model: nn.Module) -> None:
    """Raise a :class:`ModelError` that names the first layer of ``model`` that cannot be quantised."""
    if not isinstance(model, VisionTransformer):
        raise ModelError(
            f"{type(model).__name__} is not a ViT: supported is timm's VisionTransformer (ViT, DeiT, DINOv2, CLIP and "
            "their like). Choose one of timm.list_models('*vit*')."
        )
    for name, module in model.named_modules():
        owns_parameters = next(module.parameters(recurse=False), None) is not None
        patch_conv = (
            name == "patch_embed.proj" and isinstance(module, nn.Conv2d) and isinstance(model.patch_embed, PatchEmbed)
        )
        unsupported = (
            (owns_parameters and not isinstance(module, _SUPPORTED_OWNERS))
            or (isinstance(module, nn.Conv2d) and not (patch_conv and module.kernel_size == module.stride))
            or (name.endswith(".attn") and type(module) is not Attention)
            # Folding relies on the order of norms and layers in timm's plain block; others have the same names.
            or (name.startswith("blocks.") and name.count(".") == 1 and type(module) is not Block)
        )
        if unsupported:
            raise ModelError(f"layer '{name}' ({type(module).__name__}) of this model is not supported.")


class _QuantizerFactory:
    """Makes activation quantisers as a recipe wants them."""

    def __init__(self, recipe: Recipe) -> None:
        self.bits, self.edge_bits = recipe.activation_bits, recipe.first_last_bits
        self.per_channel = recipe.stage1.granularity == "per_channel"

    def __call__(self, kind: str, signed: bool = True, per_channel: bool | None = None) -> ActivationQuantizer:
        if per_channel is None:
            per_channel = self.per_channel and kind == "linear"
        return ActivationQuantizer(self.bits, signed, per_channel, kind)

    def edge(self) -> ActivationQuantizer:
        """For the first and the last layer: more bits, one scale."""
        return ActivationQuantizer(self.edge_bits, signed=True, per_channel=False, kind="edge")


def is_edge(name: str) -> bool:
    """Whether a layer of a converted model is its first or its last, by its name."""
    return name.startswith(("patch_embed", "head"))


def blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The transformer blocks in order, with their names."""
    children: Any = model.blocks
    return [(f"blocks.{index}", block) for index, block in enumerate(children)]


def _first_and_last(model: nn.Module) -> list[nn.Module]:
    return [module for name, module in model.named_modules() if is_edge(name)]


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


def mark_blocks(model: nn.Module) -> list[torch.utils.hooks.RemovableHandle]:
    """Give each block's input, and the last block's output, a name that survives export: ``<block>.input``."""
    named = blocks(model)
    handles = [
        block.register_forward_pre_hook(lambda _, args, name=name: (ops.mark(args[0], f"{name}.input"), *args[1:]))
        for name, block in named
    ]
    name, last = named[-1]
    handles.append(last.register_forward_hook(lambda _, __, output: ops.mark(output, f"{name}.output")))
    return handles
