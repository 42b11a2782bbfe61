"""What a model multiplies: found by watching one forward pass, so that no model family needs code of its own.

Watched are the calls of modules and, through a ``TorchFunctionMode``, of PyTorch's functions: which linear and
convolution runs where, which modules multiply two activations (attention scores, softmax times values), and what does
not depend on the image at all. The image requires a gradient and no parameter does, so that "depends on the image" is
simply ``requires_grad``. The pass works on the meta device too, where nothing is computed or allocated.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import resolve_data_config
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gplq.errors import GplqError, ModelError, first_line

# Products of two tensors, as functions with the signature (a, b).
MATMULS: frozenset[Any] = frozenset(
    {torch.matmul, torch.bmm, torch.mm, Tensor.matmul, Tensor.bmm, Tensor.mm, Tensor.__matmul__}
)
ATTENTION: Any = F.scaled_dot_product_attention
# Multiplications that gplq cannot route through quantisers; met with two activations, they are an error.
_UNSUPPORTED: frozenset[Any] = frozenset(
    {torch.einsum, torch.baddbmm, torch.addmm, torch.tensordot, F.bilinear, F.multi_head_attention_forward}
)
_CONVOLUTIONS: frozenset[Any] = frozenset({torch.conv1d, torch.conv2d, torch.conv3d, torch.conv_transpose2d})
# Numbers that are kept of an output; more would take memory for every module of the network.
_SAMPLE = 4096


@dataclass
class Survey:
    """What was seen; names are those of ``named_modules``.

    Attributes:
        layers: every linear and 2-D convolution that ran, in the order of its first call.
        constant: those of them whose input does not depend on the image.
        products: modules that multiply two activations themselves, and how often.
        behind_products: those that run inside a module with products, after them: the projection of an attention.
        biases: linears whose parent applies their weight itself, with the bias that it adds (or None).
        order: all modules in the order of their first call (for ``biases``, of their weight's use).
        repeated: those of ``layers`` and ``products`` that ran more than once.
        samples: some numbers of what each module returned first, in the order in which they were done; not on the meta
            device.
    """

    layers: list[str] = field(default_factory=list)
    constant: set[str] = field(default_factory=set)
    behind_products: set[str] = field(default_factory=set)
    products: dict[str, int] = field(default_factory=dict)
    biases: dict[str, Tensor | None] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)
    repeated: list[str] = field(default_factory=list)
    samples: dict[str, Tensor] = field(default_factory=dict)


def input_size(model: nn.Module) -> tuple[int, int, int]:
    """Channels, height and width in pixels of the images that a timm model was built for."""
    # The configuration tells the size of the pretrained weights; in_chans and img_size may have chosen another.
    channels, *size = resolve_data_config({}, model=model)["input_size"]
    own: Any = getattr(model, "in_chans", None)
    stem = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    channels = own or (channels if stem is None else stem.in_channels)
    # The model knows, or what embeds its patches does; in later stages the size is that of feature maps.
    found = next((known for known in (getattr(m, "img_size", None) for m in model.modules()) if known), size)
    height, width = (found, found) if isinstance(found, int) else found
    return int(channels), int(height), int(width)


def classifiers(model: nn.Module) -> list[nn.Module]:
    """The classifier of a timm model, or its classifiers (distilled models have two); empty if it has none."""
    getter: Any = getattr(model, "get_classifier", None)
    found = getter() if getter is not None else None
    modules = list(found) if isinstance(found, tuple | list | nn.ModuleList) else [found]
    return [module for module in modules if isinstance(module, nn.Module) and not isinstance(module, nn.Identity)]


def survey(model: nn.Module, image_size: tuple[int, int, int]) -> Survey:
    """Watch ``model``, in evaluation mode, run on two images of ``image_size`` (channels, height, width).

    Raises:
        ModelError: the model does not run on such images, or multiplies in a way that gplq cannot quantise; the message
            names the module.
    """
    recorder = _Recorder(model)
    with frozen_parameters(model), recorder.watching(), torch.enable_grad():
        try:
            model(probe_images(model, image_size).requires_grad_())
        except GplqError:
            raise
        except Exception as error:  # a network may object to its input in any way there is
            raise ModelError(
                f"{type(model).__name__} does not run on images of {' x '.join(map(str, image_size))}, "
                f"{recorder.where()}: {first_line(error)}"
            ) from error
    recorder.finish()
    return recorder.seen


def probe_images(model: nn.Module, image_size: tuple[int, int, int]) -> Tensor:
    """Two images of noise, [2, C, H, W], the same ones at each call, as the model's device and type want them."""
    tensor = next(model.parameters())
    if tensor.is_meta:
        return torch.rand(2, *image_size, device="meta", dtype=tensor.dtype)
    return torch.rand(2, *image_size, generator=torch.Generator().manual_seed(0)).to(tensor.device, tensor.dtype)


def output_samples(model: nn.Module, image_size: tuple[int, int, int]) -> dict[str, Tensor]:
    """As :attr:`Survey.samples`."""
    names = {id(module): name for name, module in model.named_modules()}
    samples: dict[str, Tensor] = {}

    def leave(module: nn.Module, _: Any, output: Any) -> None:
        _sample(names[id(module)], output, samples)

    with hooked(model, lambda *_: None, leave), torch.no_grad():
        model(probe_images(model, image_size))
    return samples


def _sample(name: str, output: Any, samples: dict[str, Tensor]) -> None:
    found = next((x for x in torch.utils._pytree.tree_leaves(output) if isinstance(x, Tensor)), None)
    if name not in samples and found is not None and not found.is_meta and found.is_floating_point():
        numbers = found.detach().flatten()
        samples[name] = numbers[:: -(-len(numbers) // _SAMPLE) or 1].clone()


class _Recorder(TorchFunctionMode):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.names = {id(module): name for name, module in model.named_modules()}
        self.owners = {id(m.weight): self.names[id(m)] for m in model.modules() if isinstance(m, nn.Linear)}
        self.last = model
        self.by_constants: list[tuple[Any, list[nn.Module]]] = []
        self.stack: list[nn.Module] = [model]
        self.seen = Survey()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Install the mode and a hook on every module."""
        with hooked(self.model, self._enter, self._leave), self:
            yield

    def _enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        name = self.names[id(module)]
        self.stack.append(module)
        self.last = module
        if name not in self.seen.order:
            self.seen.order.append(name)
            if isinstance(module, nn.Linear | nn.Conv2d):
                self._see_layer(name, args[0])
        elif name in self.seen.layers or name in self.seen.products:
            self.seen.repeated.append(name)

    def _leave(self, module: nn.Module, _: Any, output: Any) -> None:
        self.stack.pop()
        _sample(self.names[id(module)], output, self.seen.samples)

    def finish(self) -> None:
        """Refuse what only the whole pass shows: products that cannot be told from others in the same module."""
        for func, stack in self.by_constants:
            if any(self.names[id(module)] in self.seen.products for module in stack):
                self._refuse(func, stack[-1], "multiplies by what does not depend on the image, beside products,")

    def where(self) -> str:
        """The module that began last: in it or right behind it a network failed."""
        name = self.names[id(self.last)]
        return f"at layer '{name}' ({type(self.last).__name__})" if name else "before its first layer"

    def _see_layer(self, name: str, x: Tensor) -> None:
        self.seen.layers.append(name)
        if not x.requires_grad:
            self.seen.constant.add(name)
        if any(self.names[id(module)] in self.seen.products for module in self.stack):
            self.seen.behind_products.add(name)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note the call, then do it."""
        kwargs = kwargs or {}
        module = self.stack[-1]
        if func in MATMULS or func is ATTENTION:
            a, b = operands(func, args, kwargs)
            # An attention with learned queries still multiplies two activations: its softmax with the values.
            if (a.requires_grad and b.requires_grad) or (func is ATTENTION and b.requires_grad):
                name = self.names[id(module)]
                self.seen.products[name] = self.seen.products.get(name, 0) + products_in(func)
            else:
                if (a.requires_grad or b.requires_grad) and any(isinstance(x, nn.Parameter) for x in (a, b)):
                    self._refuse(func, module, "multiplies by a parameter that is not a linear's weight")
                self.by_constants.append((func, list(self.stack)))
        elif func in _UNSUPPORTED:
            tensors = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            activations = [x for x in tensors if x.requires_grad]
            if len(activations) > 1 or (activations and any(isinstance(x, nn.Parameter) for x in tensors)):
                self._refuse(func, module, "multiplies activations")
        elif func is F.linear and not isinstance(module, nn.Linear):
            self._see_linear_call(func, module, args, kwargs)
        elif func in _CONVOLUTIONS and not isinstance(module, nn.Conv2d):
            self._refuse(func, module, "convolves")
        return func(*args, **kwargs)

    def _see_linear_call(self, func: Any, module: nn.Module, args: Any, kwargs: Any) -> None:
        x, weight, bias = bind_linear(*args, **kwargs)
        name = self.owners.get(id(weight))
        if name is None:
            self._refuse(func, module, "multiplies by a parameter that is not a linear's weight")
        elif name in self.seen.layers:
            self.seen.repeated.append(name)
        else:
            self.seen.order.append(name)
            self._see_layer(name, x)
            self.seen.biases[name] = bias

    def _refuse(self, func: Any, module: nn.Module, what: str) -> None:
        raise ModelError(
            f"layer '{self.names[id(module)]}' ({type(module).__name__}) {what} with "
            f"{getattr(func, '__name__', func)}, which gplq cannot put quantisers around. Supported are nn.Linear, "
            "nn.Conv2d, matmul (@) and scaled_dot_product_attention: it would have to be written with these."
        )


def operands(func: Callable[..., Any], args: Any, kwargs: Any) -> tuple[Tensor, Tensor]:
    """The two factors of a matmul, or queries and keys of an attention."""
    names = ("query", "key") if func is ATTENTION else ("input", "other")
    first, second = (args[index] if index < len(args) else kwargs[name] for index, name in enumerate(names))
    return first, second


def products_in(func: Callable[..., Any]) -> int:
    """How many products a function computes: an attention computes two, scores and weighted values."""
    return 2 if func is ATTENTION else 1


def bind_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The arguments of ``F.linear``, however they were passed."""
    return input, weight, bias


@contextmanager
def hooked(model: nn.Module, enter: Callable[..., None], leave: Callable[..., None]) -> Iterator[None]:
    """Within the block every module calls ``enter`` before it runs and ``leave`` after it, even if it fails."""
    handles = []
    for module in model.modules():
        handles.append(module.register_forward_pre_hook(enter))
        handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def frozen_parameters(model: nn.Module) -> Iterator[None]:
    """Within the block no parameter requires a gradient: a backward pass then keeps half as much."""
    required = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in required:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in required:
            parameter.requires_grad_(True)
