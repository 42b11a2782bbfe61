"""What a network that cannot be exported is told: the reason at the bottom, and the line that it comes from."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import fast_recipe, make_model
from torch import Tensor, nn

from gplq import stage2
from gplq.calibrate import calibrate_on
from gplq.checkpoint import Checkpoint
from gplq.convert import convert
from gplq.data import ImageSet, Preprocessing
from gplq.errors import BuildError
from gplq.models import ModelSpec
from gplq_export.trace import trace


class Wrapped(nn.Module):
    """A network in a network, as users have them; ``forward`` is what each test is about."""

    def __init__(self, forward: Callable[..., Tensor]) -> None:
        super().__init__()
        self.network, self._forward = make_model(depth=1), forward

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(self.network, x)


class Collected(Wrapped):
    def forward(self, *inputs: Tensor) -> Tensor:  # type: ignore[override]
        return self._forward(self.network, *inputs)


def checkpoint_of(model: nn.Module, train_set: ImageSet) -> Checkpoint:
    """``model`` quantised, without the training that this is not about."""
    recipe = fast_recipe(enabled=False)
    batches = [torch.stack([train_set[index][0] for index in range(8)])]
    convert(model, recipe, image_size=(1, 16, 16))
    calibrate_on(model, model, batches, 1, recipe)
    stage2.quantize_weights(model, batches, recipe)
    preprocessing = Preprocessing((1, 16, 16), "bilinear", 1.0, "squash", (0.5,), (0.5,))
    return Checkpoint(model, ModelSpec("mine", {}, 4), preprocessing, None, recipe, {})


def branching(network: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = network(x)
    return 2 * y if y.sum() > 1e9 else y


def unsupported(network: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = network(x)
    return y + torch.special.bessel_j0(x).mean()


def refusing(network: nn.Module, x: Tensor) -> Tensor:
    if torch.compiler.is_exporting():
        raise ValueError("this network is not for\x1b[31m export\n\nand that is a long story")
    y: Tensor = network(x)
    return y


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (branching, r"GuardOnDataDependentSymNode: Could not guard on data-dependent .*\(.*test_trace\.py:\d+\)\."),
        (unsupported, r"DispatchError: No ONNX function found for .*bessel_j0"),
        (refusing, r"ValueError: this network is not for export \(.*test_trace\.py:\d+\)\."),
    ],
)
def test_reason_at_the_bottom_is_told(forward: Any, reason: str, train_set: ImageSet) -> None:
    with pytest.raises(BuildError, match=reason) as caught:
        trace(checkpoint_of(Wrapped(forward).eval(), train_set))
    text = str(caught.value)
    assert text.startswith("PyTorch cannot export mine: ")
    assert text.isprintable()  # one line without colours
    assert not any(words in text for words in ("step 1", "Next steps", "issue", "long story"))


def test_forward_that_collects_its_inputs_is_exported(train_set: ImageSet) -> None:
    graph = trace(checkpoint_of(Collected(lambda network, x: network(x)).eval(), train_set))
    assert [value.name for value in graph.graph.inputs] == ["images"]
    assert [str(size) for size in graph.graph.inputs[0].shape or ()] == ["batch", "1", "16", "16"]


def test_layer_that_is_called_twice_is_named(train_set: ImageSet) -> None:
    checkpoint = checkpoint_of(Wrapped(lambda network, x: network(x)).eval(), train_set)
    model: Any = checkpoint.model
    model._forward = lambda network, x: network(x) + network(x.flip(0))
    with pytest.raises(BuildError, match=r"the quantiser network\.\S+ is in the exported graph 2 times, not once"):
        trace(checkpoint)
