"""Moving per-channel activation scales to where a GPU can run them.

An integer GEMM takes one scale for its whole input. With x_c ~ s_c q_c,

    sum_c W[o, c] x_c  ~  sum_c (W[o, c] s_c) q_c

so that s_c goes into the weight's columns, *before* Stage 2 quantises them, and 1/s_c in front of the quantiser, whose
scale becomes 1. A norm in front takes 1/s_c into its own weight and bias, at no cost; behind a GELU it stays as an
explicit multiplication, which engines fuse into the GELU's kernel.
"""

import torch
from torch import Tensor, nn

from gplq.grid import round_scale
from gplq.layers import QuantAttention


@torch.no_grad()
def fold_channels(scale: Tensor, linears: list[nn.Linear], norm: nn.Module | None) -> Tensor | None:
    """Fold a per-channel scale [C] into ``linears`` behind it and the ``norm`` in front of it, in place.

    Returns the factor [C] that remains in front of the quantiser, or None if the norm took it. The factor is rounded
    to FP16 first, and the columns get exactly its inverse, so that nothing is lost in an FP16 engine.
    """
    factor = round_scale(1 / scale, "fp16")
    for linear in linears:
        linear.weight.div_(factor)
    if norm is None:
        return factor
    for parameter in norm.parameters():
        parameter.mul_(factor)
    return None


def norm_before(block: nn.Module, name: str) -> nn.Module | None:
    """The norm whose output nothing but the layer ``name`` of ``block`` reads, if there is one that can be scaled."""
    norm = {"attn": getattr(block, "norm1", None), "mlp.fc1": getattr(block, "norm2", None)}.get(name)
    affine = isinstance(norm, nn.LayerNorm) and norm.weight is not None
    return norm if affine else None


def readers(layer: nn.Module) -> list[nn.Linear]:
    """The linears that read a layer's quantised input."""
    if isinstance(layer, QuantAttention):
        return [layer.q, layer.k, layer.v]
    linear = layer.linear
    assert isinstance(linear, nn.Linear)
    return [linear]
