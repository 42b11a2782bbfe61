"""Moving per-channel activation scales to where a GPU can run them.

An integer GEMM takes one scale for its whole input. With x_c ~ s_c q_c,

    sum_c W[o, c] x_c  ~  sum_c (W[o, c] s_c) q_c

so that s_c goes into the weight's columns, *before* Stage 2 quantises them, and 1/s_c in front of the quantiser, whose
scale becomes 1. A norm in front takes 1/s_c into its own weight and bias, at no cost; elsewhere, behind a GELU say, it
stays as an explicit multiplication, which engines fuse into the kernel before it.

Which norm may take it is found by experiment (:func:`foldable_norms`), not from the names of a family's modules.
"""

import torch
from torch import Tensor, nn

from gplq.convert import quant_layers, structure_of
from gplq.grid import round_scale
from gplq.layers import QuantAttention, QuantConv
from gplq.lsq import ActivationQuantizer


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


def readers(layer: nn.Module) -> list[nn.Linear]:
    """The linears (or the convolution) that read a layer's quantised input."""
    if isinstance(layer, QuantAttention):
        return [layer.q, layer.k, layer.v]
    linear: nn.Linear = layer.linear  # type: ignore[assignment]
    return [linear]


@torch.no_grad()
def foldable_norms(model: nn.Module) -> dict[str, nn.Module]:
    """The norm in front of each layer with a per-channel quantiser, by the layer's name, where there is one.

    A norm can take a factor if nothing but that quantiser sees it. The experiment: multiply channels of the norm by
    powers of two, divide them away again in front of the quantiser, and look whether the model's output has the very
    same bits; powers of two round nothing, so that it has unless something else reads the norm, or something
    in between mixes or bends the channels.

    Args:
        model: converted, its quantisers not yet frozen.
    """
    experiment = _Experiment(model)
    candidates = experiment.candidates()
    if experiment.changes_nothing(candidates):
        return candidates
    return {name: norm for name, norm in candidates.items() if experiment.changes_nothing({name: norm})}


class _Experiment:
    def __init__(self, model: nn.Module) -> None:
        self.model = model
        parameter = next(model.parameters())
        generator = torch.Generator().manual_seed(0)
        image = torch.randn(1, *structure_of(model).image_size, generator=generator)
        self.image = image.to(parameter.device, parameter.dtype)
        self.layers = {
            name: layer
            for name, layer in quant_layers(model)
            if isinstance(layer.input_quantizer, ActivationQuantizer)
            and layer.input_quantizer.per_channel
            and not isinstance(layer, QuantConv)
        }
        self.expected = self._run()

    def candidates(self) -> dict[str, nn.Module]:
        """The norm that ran last before each layer, if it has as many channels and no other layer claims it.

        Both must be part of the same unit: a fold across two would change what Stage 2 compares unit by unit.
        """
        # Parts of a plain attention have gone; its norms stand behind its input.
        modules = dict(self.model.named_modules())
        last: nn.Module | None = None
        unit = ""
        claims: dict[str, nn.Module] = {}
        structure = structure_of(self.model)
        for name in structure.order:
            if name in structure.units:
                last, unit = None, f"{name}."
            if name in self.layers:
                channels = readers(self.layers[name])[0].weight.shape[1]
                if last is not None and norm_channels(last) == channels and f"{name}.".startswith(unit):
                    claims[name] = last
            elif (module := modules.get(name)) is not None and norm_channels(module) is not None:
                last = module
        claimed = [id(norm) for norm in claims.values()]
        return {name: norm for name, norm in claims.items() if claimed.count(id(norm)) == 1}

    def changes_nothing(self, pairs: dict[str, nn.Module]) -> bool:
        """Whether the output's bits stay if each norm is scaled and its layer's input scaled back."""
        generator = torch.Generator().manual_seed(1)
        handles, kept = [], []
        for name, norm in pairs.items():
            exponents = torch.randint(-2, 3, (norm_channels(norm) or 0,), generator=generator)
            factor = torch.exp2(exponents.to(self.image))
            for parameter in norm.parameters():
                kept.append((parameter, parameter.detach().clone()))
                parameter.mul_(factor)
            quantizer = self.layers[name].input_quantizer
            handles.append(quantizer.register_forward_pre_hook(lambda _, args, factor=factor: (args[0] / factor,)))
        try:
            found = self._run()
        finally:
            for handle in handles:
                handle.remove()
            for parameter, value in kept:
                parameter.copy_(value)
        return len(found) == len(self.expected) and all(map(torch.equal, found, self.expected))

    def _run(self) -> list[Tensor]:
        quantizers = [module for module in self.model.modules() if isinstance(module, ActivationQuantizer)]
        modes = [quantizer.mode for quantizer in quantizers]
        for quantizer in quantizers:
            quantizer.mode = "float"
        try:
            leaves = torch.utils._pytree.tree_leaves(self.model(self.image))
        finally:
            for quantizer, mode in zip(quantizers, modes, strict=True):
                quantizer.mode = mode
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def norm_channels(module: nn.Module) -> int | None:
    """C, if a module's parameters are one weight [C], and perhaps a bias [C], as in all affine norms."""
    parameters = dict(module.named_parameters())
    shapes = {parameter.shape for parameter in parameters.values()}
    if "weight" not in parameters or not parameters.keys() <= {"weight", "bias"} or len(shapes) != 1:
        return None
    weight = parameters["weight"]
    return len(weight) if weight.ndim == 1 else None
