"""Whether a model may be converted: what it computes must be what the weights of its layers say, before and after.

:mod:`gplq.convert` replaces layers by others with the same weights. That is right for a layer whose output depends on
its weight and bias alone, that runs once for an image, and that nothing else reaches into.
"""

from collections.abc import Collection
from typing import Any

import torch
from timm.layers.linear import Linear
from torch import Tensor, nn
from torch.nn.utils import parametrize

from gplq.errors import ModelError
from gplq.survey import Survey

# Whatever else owns parameters and multiplies by them in a way of its own.
_UNSUPPORTED = (
    nn.MultiheadAttention,
    nn.RNNBase,
    nn.Conv1d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Bilinear,
)
_QUANTISED = ("torch.ao.nn.", "torchao.")  # packages of layers that keep integers for their weights
# Of an output's norm. Sums in another order differ by 1e-6, behind a steep softmax or with TF32 by some 1e-4.
_TOLERANCE = 5e-3
_MERGE = (
    "merge or remove it first (PEFT: merge_and_unload(); torch.nn.utils: remove_weight_norm(), remove_spectral_norm(), "
    "prune.remove())"
)


def make_plain(model: nn.Module) -> None:
    """Give each layer, in place, weights of its own that it holds itself.

    Parametrised weights (``torch.nn.utils.parametrize``) become what they are at the moment, and of modules that share
    a parameter each gets a copy: quantised, they have scales of their own.
    """
    for module in list(model.modules()):
        if parametrize.is_parametrized(module):
            _freeze_parametrized(module)
    owned: set[int] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in owned:
                copied = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
                module.register_parameter(name, copied)
            owned.add(id(parameter))


def _freeze_parametrized(module: nn.Module) -> None:
    """As ``remove_parametrizations``, but copies of the module, which share its class, keep theirs."""
    parametrized: Any = module.parametrizations
    values = {name: getattr(module, name).detach().clone() for name in parametrized}
    module.__class__ = type(module).__bases__[0]
    del module.parametrizations
    for name, value in values.items():
        module.register_parameter(name, nn.Parameter(value))


def check_finite(model: nn.Module) -> None:
    """Refuse weights that are no numbers: whatever they reach compares with nothing.

    Raises:
        ModelError: with the first of them.
    """
    for name, parameter in model.named_parameters():
        if not parameter.is_meta and not bool(parameter.isfinite().all()):
            raise ModelError(f"{name} of this model is not finite (NaN or infinite): its training diverged.")


def check_layers(model: nn.Module, seen: Survey, floats: Collection[str]) -> None:
    """Refuse what cannot be converted; layers that stay in floating point (``floats``) may do as they like.

    Raises:
        ModelError: with the layer and the reason.
    """
    for name, module in model.named_modules():
        if isinstance(module, _UNSUPPORTED):
            raise ModelError(
                f"layer '{name}' ({type(module).__name__}) of this model is not supported: gplq quantises nn.Linear, "
                "nn.Conv2d and products of activations. It would need a quantised form in gplq/layers.py."
            )
        if type(module).__module__.startswith(_QUANTISED):
            raise ModelError(
                f"layer '{name}' ({type(module).__module__}) is quantised already: start from the float model."
            )
    for name in (name for name in seen.repeated if name not in floats):
        kind = type(model.get_submodule(name)).__name__
        raise ModelError(
            f"layer '{name}' ({kind}) runs more than once for an image, and each time would need scales of its own: "
            "give each use a copy (copy.deepcopy)."
        )
    for name in (*(name for name in seen.layers if name not in floats), *seen.products):
        module = model.get_submodule(name)
        if name in seen.layers and "weight" not in dict(module.named_parameters(recurse=False)):
            raise ModelError(f"the weight of layer '{name}' is computed when it runs: {_MERGE}.")
        if module._forward_pre_hooks or module._forward_hooks:
            raise ModelError(f"layer '{name}' has a hook, which a quantised layer would not call: {_MERGE}.")
        if "forward" in vars(module):
            raise ModelError(f"the forward of layer '{name}' was replaced, and a quantised layer would not call it.")
        if isinstance(module, nn.Linear) and type(module).forward not in (nn.Linear.forward, Linear.forward):
            raise ModelError(
                f"layer '{name}' ({type(module).__name__}) computes in a way of its own, of which a quantised layer "
                f"would keep the weight and bias alone. If it is an adapter, {_MERGE}."
            )


def check_unchanged(before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
    """Compare what modules returned for the same images: :func:`gplq.survey.output_samples`.

    Raises:
        ModelError: a module returns something else; the first that does is named.
    """
    for name, expected in before.items():
        found = after.get(name)
        if found is None or not bool(torch.isfinite(expected).all()):
            continue
        size = float(expected.double().norm())
        difference = float((found.double() - expected.double()).norm()) if found.shape == expected.shape else size
        if not difference <= _TOLERANCE * size:
            raise ModelError(
                f"the converted model computes something else: the first output that differs is that of "
                f"'{name or 'the model'}', by {difference / size if size else difference:.1g} of its size. A layer in "
                f"it computes more than its weights say. If that is an adapter, {_MERGE}."
            )
