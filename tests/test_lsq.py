"""The trainable quantiser: gradients, and where calibration puts its scales."""

import numpy as np
import pytest
import reference
import torch
from torch import Tensor

from gplq import lsq
from gplq.errors import DataError
from gplq.lsq import ActivationQuantizer


def calibrated(x: Tensor, method: str, bits: int = 4, signed: bool = True, per_channel: bool = False) -> Tensor:
    quantizer = ActivationQuantizer(bits, signed, per_channel, "linear")
    quantizer.mode = "observe"
    for part in x.chunk(3):
        assert quantizer(part) is part
    quantizer.calibrate(method, 1.0)
    assert quantizer.mode == "quantize"
    return quantizer.scale.detach()


def detached_composition(x: Tensor, scale: Tensor, low: int, high: int, values: int) -> Tensor:
    """LSQ as its paper composes it: detach() around round(), and a gradient scale g by (s - s g).detach() + s g."""
    g = 1 / (values * high) ** 0.5
    scale = (scale - scale * g).detach() + scale * g
    ratio = (x / scale).clamp(low, high)
    return ((ratio.round() - ratio).detach() + ratio) * scale


@pytest.mark.parametrize(("bits", "signed"), [(4, True), (4, False), (8, True), (2, True)])
@pytest.mark.parametrize("per_channel", [True, False])
def test_gradients_are_those_of_the_composition(bits: int, signed: bool, per_channel: bool) -> None:
    generator = torch.Generator().manual_seed(bits)
    x = torch.randn(5, 7, 6, dtype=torch.float64, generator=generator) * 2
    weights = torch.randn(5, 7, 6, dtype=torch.float64, generator=generator)
    start = (
        torch.full((6,), 0.3, dtype=torch.float64) * torch.arange(1, 7) if per_channel else torch.tensor(0.3).double()
    )
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)

    results = []
    for function in ("gplq", "composition"):
        x_leaf, log_scale = x.clone().requires_grad_(), start.log().clone().requires_grad_()
        scale = log_scale.exp()
        if function == "gplq":
            y = lsq._FakeQuantize.apply(x_leaf, scale, bits, signed)
        else:
            y = detached_composition(x_leaf, scale, low, high, x.numel() // scale.numel())
        (y * weights).sum().backward()
        results.append((y.detach(), x_leaf.grad, log_scale.grad))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_scale_gradient_is_the_numerical_one_where_every_value_is_clipped() -> None:
    # Beyond the range x_hat = limit * scale, without rounding: a difference quotient is exact there.
    x = torch.tensor([50.0, -60.0, 70.0], dtype=torch.float64)
    scale = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    lsq._FakeQuantize.apply(x, scale, 4, True).sum().backward()
    values = [
        (reference.quantize(x.numpy(), np.array(s), 4, signed=True) * s).sum() for s in (0.5 - 2.0**-20, 0.5 + 2.0**-20)
    ]
    numerical = (values[1] - values[0]) / 2.0**-19
    assert scale.grad is not None
    assert scale.grad.item() == pytest.approx(numerical / (3 * 7) ** 0.5, rel=1e-9)


def test_output_lies_on_the_grid_of_the_reference() -> None:
    x = torch.randn(100, 8, generator=torch.Generator().manual_seed(0))
    quantizer = ActivationQuantizer(4, signed=True, per_channel=True, kind="linear")
    quantizer.mode = "observe"
    quantizer(x)
    quantizer.calibrate("minmax", 1.0)
    scale = quantizer.scale.detach().numpy()
    codes = reference.quantize(x.numpy(), scale, 4, signed=True)
    np.testing.assert_array_equal(quantizer(x).detach().numpy(), (codes * scale).astype(np.float32))


@pytest.mark.parametrize("per_channel", [True, False])
def test_minmax_covers_the_range_and_no_more(per_channel: bool) -> None:
    x = torch.randn(300, 5, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 6)
    axis = 0 if per_channel else None
    expected = np.maximum(x.numpy().max(axis) / 7, x.numpy().min(axis) / -8)
    np.testing.assert_allclose(calibrated(x, "minmax", per_channel=per_channel).numpy(), expected, rtol=1e-6)


def test_unsigned_minmax_ends_at_the_largest_value() -> None:
    x = torch.rand(300, 4, generator=torch.Generator().manual_seed(0))
    assert calibrated(x, "minmax", signed=False).item() == pytest.approx(x.max().item() / 15, rel=1e-6)


def test_percentile_ignores_outliers() -> None:
    x = torch.linspace(-1, 1, 3001).reshape(-1, 1)[torch.randperm(3001, generator=torch.Generator().manual_seed(0))]
    x[5] = 1000.0
    low, high = np.percentile(x.numpy(), [1, 99])
    assert calibrated(x, "percentile").item() == pytest.approx(max(high / 7, low / -8), rel=1e-5)


@pytest.mark.parametrize("signed", [True, False])
def test_mse_is_the_best_of_a_fine_search(signed: bool) -> None:
    x = torch.randn(2000, 3, generator=torch.Generator().manual_seed(0)) ** 3
    x = x if signed else x.abs()

    def error(channel: int, scale: float) -> float:
        column = x[:, channel].double().numpy()
        return float(((reference.quantize(column, np.array(scale), 4, signed) * scale - column) ** 2).sum())

    scales = calibrated(x, "mse", signed=signed, per_channel=True).tolist()
    largest = calibrated(x, "minmax", signed=signed, per_channel=True).tolist()
    for channel in range(3):
        best = min(error(channel, largest[channel] * share) for share in np.linspace(0.2, 1, 801))
        assert best <= error(channel, scales[channel]) <= best * 1.01
        assert error(channel, scales[channel]) < error(channel, largest[channel])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_activations_that_are_not_finite_are_refused(bad: float) -> None:
    x = torch.zeros(9, 2)
    x[4, 1] = bad
    with pytest.raises(DataError, match="NaN or infinite"):
        calibrated(x, "minmax")


def test_constant_zero_input_gets_a_positive_scale() -> None:
    for method in ("minmax", "percentile", "mse"):
        assert calibrated(torch.zeros(9, 2), method).item() >= 2.0**-14 * 0.19


def test_memory_of_the_observer_is_bounded() -> None:
    quantizer = ActivationQuantizer(4, signed=True, per_channel=True, kind="linear")
    quantizer.mode = "observe"
    for _ in range(40):
        quantizer(torch.ones(3000, 16))
    assert sum(sample.numel() for sample in quantizer._samples) <= lsq.SAMPLE_VALUES
