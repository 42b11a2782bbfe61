"""PyTorch's side: what is seen in a forward pass, and the arithmetics that make the noise floors."""

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gplq.checkpoint import Checkpoint, frozen_quantizers, integer_linears
from gplq.convert import units
from gplq.integer import IntegerConv, set_rounding
from gplq.ops import Codes
from gplq_export.check.capture import AnotherSummationOrder, Capture, HalfPrecision, largest_sum, without_rounding


def test_capture_sees_what_the_network_computes(checkpoint: Checkpoint, probe: Tensor) -> None:
    model = checkpoint.model
    with torch.inference_mode():
        expected = model(probe)
        seen = Capture(model, probe)
        assert torch.equal(seen.outputs[0], expected)
        quantizers = frozen_quantizers(model)
        assert seen.codes.keys() == seen.inputs.keys() == quantizers.keys()
        for name, quantizer in quantizers.items():
            again = quantizer(torch.from_numpy(seen.inputs[name])).values.numpy()
            assert seen.codes[name].dtype == "int8"
            assert (seen.codes[name] == again).all()
        assert seen.linear_outputs.keys() == integer_linears(model).keys()
        names = [name for name, _ in units(model)]
        assert list(seen.unit_outputs) == names
        # A unit alone, given what the network gave it, returns what is said to come out.
        given = next(array for name, array in seen.unit_inputs.items() if name.startswith("blocks.1.input"))
        alone = model.get_submodule("blocks.1")(torch.from_numpy(given))
        assert torch.equal(alone, torch.from_numpy(seen.unit_outputs["blocks.1"]))
        assert not model._forward_hooks and not any(module._forward_hooks for module in model.modules())


def test_without_rounding_is_smooth_and_over_afterwards(checkpoint: Checkpoint, probe: Tensor) -> None:
    model = checkpoint.model
    with torch.inference_mode():
        rounded = model(probe)
        with without_rounding(model):
            seen = Capture(model, probe)
        with pytest.raises(ZeroDivisionError), without_rounding(model):
            _ = 1 / 0
        assert torch.equal(model(probe), rounded)
        set_rounding(model, rounding=False)
        expected = model(probe)
        set_rounding(model, rounding=True)
    assert torch.equal(seen.outputs[0], expected)
    assert seen.codes == {}
    assert not torch.equal(expected, rounded)


def test_another_summation_order_is_the_same_network(checkpoint: Checkpoint, probe: Tensor) -> None:
    model = copy.deepcopy(checkpoint.model).double()
    with torch.inference_mode():
        plain = model(probe.double())
        with AnotherSummationOrder():
            other = model(probe.double())
    torch.testing.assert_close(other, plain, rtol=0, atol=1e-9)


def test_another_summation_order_is_another_one(checkpoint: Checkpoint, probe: Tensor) -> None:
    with torch.inference_mode():
        plain = checkpoint.model(probe)
        with AnotherSummationOrder():
            other = checkpoint.model(probe)
        assert torch.equal(checkpoint.model(probe), plain)  # and it is off again
    assert not torch.equal(other, plain)
    assert int((other.argmax(1) != plain.argmax(1)).sum()) <= 1


def test_half_precision_is_near_and_all_of_it_fits_into_half(checkpoint: Checkpoint, probe: Tensor) -> None:
    model = checkpoint.model
    with torch.inference_mode(), without_rounding(model):
        plain = model(probe)
        with HalfPrecision():
            seen = Capture(model, probe)
    [half] = seen.outputs
    assert torch.equal(half.half().float(), half)
    for array in (*seen.linear_outputs.values(), *seen.unit_outputs.values()):
        held = torch.from_numpy(array)
        assert torch.equal(held.half().float(), held)
    difference = float((half - plain).norm() / plain.norm())
    assert 1e-5 < difference < 1e-2  # FP16 has 11 bits, FP32 24


def test_half_precision_keeps_codes_and_overflows(checkpoint: Checkpoint, probe: Tensor) -> None:
    with torch.inference_mode(), HalfPrecision():
        x = torch.tensor([1.0 + 2**-12, 300.0])
        assert (x * 1).tolist() == [1.0, 300.0]
        assert (x[1] * x[1]).isinf()
        assert x[:1].item() == 1.0 + 2**-12  # a view holds what it held
        assert (torch.tensor([3], dtype=torch.int8) + 1).dtype == torch.int8
        seen = Capture(checkpoint.model, probe)
    assert all(abs(codes).max() <= 128 for codes in seen.codes.values())


@pytest.mark.parametrize("groups", [1, 2])
def test_largest_sum_of_a_convolution_is_that_of_its_worst_pixels(groups: int) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3, groups=groups)
    codes = torch.randint(-8, 8, conv.weight.shape, dtype=torch.int8)
    scale = torch.rand(6) + 0.1
    x = torch.randint(-8, 8, (2, 4, 5, 5)).float()
    found = largest_sum(IntegerConv(conv, codes, scale, None, 4, "conv"), Codes(x, torch.tensor(0.5)))
    worst = (0.5 * x.abs()).amax((0, 2, 3))
    for channel, weight in enumerate(codes.abs().double() * scale[:, None, None, None]):
        inputs = worst.view(groups, -1)[channel * groups // 6]
        assert found[channel] == pytest.approx(float((weight.sum((1, 2)) * inputs).sum()), rel=1e-6)


@torch.inference_mode()
def test_largest_sum_bounds_what_a_linear_returns(checkpoint: Checkpoint, probe: Tensor) -> None:
    seen = Capture(checkpoint.model, probe)
    for name, linear in integer_linears(checkpoint.model).items():
        bias = 0 if linear.bias is None else linear.bias.numpy()
        sums = np.abs(seen.linear_outputs[name] - bias).reshape(-1, len(linear.codes)).max(0)
        assert (sums <= seen.linear_terms[name] * (1 + 1e-5) + 1e-6).all()
        assert (sums >= seen.linear_terms[name] / 100).any()
