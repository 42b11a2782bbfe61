"""PyTorch's side of a comparison: one forward pass with everything that is compared; and the noise floors.

Rounding is chaotic: a last-bit difference in front of a quantiser flips a code, and the flip travels through all
blocks. So the same network is run once more in a way that is mathematically the same, and what differs then is what
any correct back end may differ by:

    AnotherSummationOrder   for back ends that compute in FP32
    HalfPrecision           for back ends that hold what is not quantised in FP16
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from gplq.checkpoint import frozen_quantizers, integer_linears
from gplq.convert import input_name, output_name, units
from gplq.integer import FrozenQuantizer, IntegerLinear, set_rounding
from gplq.ops import Codes


class Capture:
    """One forward pass of a frozen model on the CPU, and what was seen in it, by name; float32 unless said.

    ``everything``: also what a graph can be fed with; if not, only outputs, codes and what units return are kept.

    Attributes:
        outputs: of the network, in order.
        inputs: what each quantiser reads. ``codes``: what it returns, int8.
        linear_outputs: what each linear and convolution returns, its bias added.
        linear_terms: [N], :func:`largest_sum` of each.
        unit_inputs: what each unit is called with, by the names that an export gives them; the last unit's output too.
        unit_outputs: what each unit returns.
    """

    def __init__(self, model: nn.Module, images: Tensor, *, everything: bool = True) -> None:
        self._everything = everything
        self.inputs: dict[str, np.ndarray] = {}
        self.codes: dict[str, np.ndarray] = {}
        self.linear_outputs: dict[str, np.ndarray] = {}
        self.linear_terms: dict[str, np.ndarray] = {}
        self.unit_inputs: dict[str, np.ndarray] = {}
        self.unit_outputs: dict[str, np.ndarray] = {}
        with self._hooks(model):
            self.outputs: list[Tensor] = tree_leaves(model(images))

    @property
    def nbytes(self) -> int:
        """How much memory it holds."""
        tables = (self.inputs, self.codes, self.linear_outputs, self.unit_inputs, self.unit_outputs)
        return sum(array.nbytes for table in tables for array in table.values())

    @contextmanager
    def _hooks(self, model: nn.Module) -> Iterator[None]:
        handles = []
        for name, quantizer in frozen_quantizers(model).items():
            handles.append(quantizer.register_forward_hook(self._quantizer_hook(name)))
        for name, linear in integer_linears(model).items() if self._everything else ():
            handles.append(linear.register_forward_hook(self._linear_hook(name)))
        for name, unit in units(model):
            handles.append(unit.register_forward_hook(self._unit_hook(name)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _quantizer_hook(self, name: str) -> Any:
        def keep(module: FrozenQuantizer, args: tuple[Tensor], output: Codes) -> None:
            if self._everything:
                self.inputs[name] = args[0].numpy()
            if module.rounding:
                self.codes[name] = output.values.to(torch.int8).numpy()

        return keep

    def _linear_hook(self, name: str) -> Any:
        def keep(linear: IntegerLinear, args: tuple[Codes], output: Tensor) -> None:
            self.linear_outputs[name] = output.numpy()
            self.linear_terms[name] = largest_sum(linear, args[0]).numpy()

        return keep

    def _unit_hook(self, name: str) -> Any:
        def keep(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            for index, arg in enumerate(args):
                if isinstance(arg, Tensor) and self._everything:
                    self.unit_inputs[input_name(name, index)] = arg.numpy()
            # Some blocks return the size of their feature map beside it.
            tensor = output[0] if isinstance(output, tuple | list) else output
            self.unit_outputs[name] = self.unit_inputs[output_name(name)] = tensor.numpy()

        return keep


def largest_sum(linear: IntegerLinear, x: Codes) -> Tensor:
    """What a linear or a convolution adds up, signs apart: its last bits are those of this, though its sums may cancel.

    Returns:
        [N]: the sum of |w x| over an output channel's weights, with the largest |x| that each input has anywhere.
    """
    largest = (x.values * x.scale).abs().transpose(linear.channel_axis, -1).flatten(0, -2).amax(0)
    weight = linear.codes.float().abs().reshape(*linear.codes.shape[:2], -1).sum(2)  # over the kernel, if there is one
    # Of a grouped convolution the weight has a group's inputs only.
    groups = len(largest) // weight.shape[1]
    sums = torch.einsum("gnk,gk->gn", weight.unflatten(0, (groups, -1)), largest.unflatten(0, (groups, -1)))
    return sums.flatten() * linear.weight_scale


@contextmanager
def without_rounding(model: nn.Module) -> Iterator[None]:
    """The same network with its quantisers off."""
    set_rounding(model, rounding=False)
    try:
        yield
    finally:
        set_rounding(model, rounding=True)


class AnotherSummationOrder(TorchDispatchMode):
    """Runs a frozen model with every sum in another order.

    Matmuls multiply by the scales first, as a Q/DQ graph does, and add up backwards; norms and softmax reduce
    backwards. Mathematically nothing changes.
    """

    words = "PyTorch in FP32 with another order of summation"

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replace gplq's matmuls, LayerNorm and softmax; leave the rest."""
        ops, aten = torch.ops.gplq, torch.ops.aten
        if func is ops.linear.default:
            codes, scale, weight, weight_scale, bias = args[:5]
            x, w = codes * scale, weight.to(codes.dtype) * weight_scale[:, None]
            return F.linear(x.flip(-1), w.flip(-1), bias)
        if func is ops.conv.default:
            codes, scale, weight, weight_scale, bias, stride, padding, dilation = args[:8]
            x, w = codes * scale, weight.to(codes.dtype) * weight_scale[:, None, None, None]
            return F.conv2d(x.flip(1), w.flip(1), bias, stride, padding, dilation)
        if func is ops.matmul.default:
            a, a_scale, b, b_scale = args[:4]
            return torch.matmul((a * a_scale).flip(-1), (b * b_scale).flip(-2))
        if func is aten._softmax.default:
            return func(args[0].flip(args[1]), *args[1:]).flip(args[1])
        if func is aten.native_layer_norm.default and len(args[1]) == 1:
            x, shape, weight, bias, eps = args
            flipped = [None if t is None else t.flip(-1) for t in (weight, bias)]
            y, mean, rstd = func(x.flip(-1), shape, *flipped, eps)
            return y.flip(-1), mean, rstd
        return func(*args, **(kwargs or {}))


class HalfPrecision(TorchDispatchMode):
    """Runs a frozen model with every result rounded to FP16: sums in FP32, what is held between them in FP16.

    That is how an engine computes what is not quantised. Codes are small integers and stay what they are. A number
    beyond 65504 becomes infinite, as it does there.
    """

    words = "PyTorch with every result rounded to FP16"

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute as usual, then round."""
        result = func(*args, **(kwargs or {}))
        if func.is_view:
            return result
        return tree_map_only(Tensor, _to_half_and_back, result)


def _to_half_and_back(x: Tensor) -> Tensor:
    return x.half().float() if x.dtype == torch.float32 else x
