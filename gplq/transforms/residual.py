"""R1: another basis for a whole residual stream, x -> x R (SpinQuant, arXiv 2405.16406; QuaRot, arXiv 2404.00456).

There, LayerNorm is first turned into RMSNorm, which commutes with every orthogonal R. Here R keeps the mean, R 1 = 1,
so that LayerNorm itself commutes with it and the architecture stays as it is:

    LN(x R) = LN(x) R       without affine parameters; what a norm has of them, its readers take first
    W x for x = LN(...)     W diag(w) R and bias + W b, or, where a linear has no bias, b R / w stays in the norm
    what writes to it       R^T W, bias R; embeddings times R; LayerScale goes into the linear in front of it
"""

from typing import Any

import torch
from torch import Tensor, nn

from gplq.transforms.streams import Stream

# A norm's bias is divided by its weight where a linear behind it has no bias. Where the weight is smaller than this
# share of its largest, that would lose too many of FP32's digits.
_SMALLEST = 1e-3


@torch.no_grad()
def obstacle(model: nn.Module, stream: Stream) -> str | None:
    """Why the basis of ``stream`` cannot be changed, or None if it can."""
    if stream.pins:
        return stream.pins[0]
    if stream.normed_by:
        return f"the norm '{min(stream.normed_by)}' writes to it, and the weight of a norm cannot hold a rotation"
    if stream.scaled_by:
        return f"'{min(stream.scaled_by)}' multiplies it channel by channel"
    for name, before in stream.scaled_to.items():
        if not _foldable_scale(name, before.root(), stream):
            return f"the scale '{name}', which writes to it, cannot be folded into a linear"
    for name, after in stream.norms.items():
        why = _unfoldable(model, name, after.root())
        if why is not None:
            return f"of the norm '{name}' that reads it: {why}"
    return None


def _unfoldable(model: nn.Module, name: str, after: Stream) -> str | None:
    """Why the linears behind a norm cannot take its weight and the rotation of what it returns."""
    if after.pins:
        return after.pins[0]
    if after.normed_by != {name} or after.writers or after.embeddings or after.scaled_to:
        return "what it returns is no mere input of linears, and its weight cannot hold a rotation"
    if after.norms or after.scaled_by:
        return f"'{min([*after.norms, *after.scaled_by])}' reads it, which is no linear"
    norm = model.get_submodule(name)
    weight, bias = _affine(norm)
    tiny = float(weight.abs().min()) < _SMALLEST * float(weight.abs().max())
    if tiny and _keeps_bias(bias, _layers(model, after.readers)):
        return "a linear without a bias reads it, and its weight is too close to 0 to keep its bias rotated"
    return None


def _foldable_scale(name: str, before: Stream, after: Stream) -> bool:
    """Whether nothing but linears without other readers stands in front of a LayerScale."""
    others = before.norms or before.normed_by or before.readers or before.embeddings or before.scaled_to or before.pins
    return before is not after and bool(before.writers) and before.scaled_by.keys() == {name} and not others


@torch.no_grad()
def change_basis(model: nn.Module, stream: Stream, rotation: Tensor) -> None:
    """Express ``stream`` in the basis R [C, C], in place, in the precision of ``model``. It has no :func:`obstacle`."""
    rotation = rotation.to(next(model.parameters()))
    writers = set(stream.writers)
    for name, before in stream.scaled_to.items():
        _fold_scale(model.get_parameter(name), _layers(model, before.root().writers))
        writers |= before.root().writers
    for name, after in stream.norms.items():
        _fold_norm(model.get_submodule(name), _layers(model, after.root().readers), rotation)
    for layer in _layers(model, stream.readers):
        _mix_inputs(layer, rotation)
    for layer in _layers(model, writers):
        # [out, in, ...] -> R^T on the left
        layer.weight.copy_(torch.einsum("oi...,op->pi...", layer.weight, rotation))
        if layer.bias is not None:
            layer.bias.copy_(layer.bias @ rotation)
    for name, axis in stream.embeddings.items():
        parameter = model.get_parameter(name)
        parameter.copy_((parameter.movedim(axis, -1) @ rotation).movedim(-1, axis))


def _fold_scale(scale: Tensor, layers: list[nn.Linear]) -> None:
    for layer in layers:
        layer.weight.mul_(scale.reshape(-1, *[1] * (layer.weight.ndim - 1)))
        if layer.bias is not None:
            layer.bias.mul_(scale)
    scale.fill_(1)


def _fold_norm(norm: nn.Module, layers: list[nn.Linear], rotation: Tensor) -> None:
    weight, bias = _affine(norm)
    keeps = _keeps_bias(bias, layers)
    for layer in layers:
        if bias is not None and not keeps:
            layer.bias.add_(layer.weight @ bias)
        layer.weight.mul_(weight.reshape(-1, *[1] * (layer.weight.ndim - 2)))
        _mix_inputs(layer, rotation)
    if bias is not None:
        kept = bias / weight if keeps else torch.zeros_like(bias)
        bias.copy_(kept @ rotation)
    weight.fill_(1)


def _mix_inputs(layer: nn.Linear, rotation: Tensor) -> None:
    layer.weight.copy_(torch.einsum("oi...,ij->oj...", layer.weight, rotation))  # [out, in, ...]


def _layers(model: nn.Module, names: set[str]) -> list[nn.Linear]:
    """Linears, or convolutions, which have as much in common with them as is needed here."""
    layers: list[Any] = [model.get_submodule(name) for name in names]
    return layers


def _keeps_bias(bias: Tensor | None, layers: list[nn.Linear]) -> bool:
    """Whether a norm has a bias that the layers behind it cannot take."""
    return bias is not None and bool(bias.any()) and not all(map(_takes_bias, layers))


def _takes_bias(layer: nn.Linear) -> bool:
    # What a convolution pads with is 0, and not what the norm's bias makes of it.
    return isinstance(layer, nn.Linear) and layer.bias is not None


def _affine(norm: nn.Module) -> tuple[Tensor, Tensor | None]:
    parameters = dict(norm.named_parameters())
    return parameters["weight"], parameters.get("bias")
