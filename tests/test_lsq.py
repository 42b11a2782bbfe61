"""The trainable quantiser: gradients, and where calibration puts its scales."""

import contextlib
import weakref
from typing import Any

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
            y = lsq._FakeQuantize.apply(x_leaf, scale, bits, signed, True, torch.float64)
        else:
            y = detached_composition(x_leaf, scale, low, high, x[0].numel() // scale.numel())
        (y * weights).sum().backward()
        results.append((y.detach(), x_leaf.grad, log_scale.grad))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_scale_gradient_is_the_numerical_one_where_every_value_is_clipped() -> None:
    # Beyond the range x_hat = limit * scale, without rounding: a difference quotient is exact there.
    x = torch.tensor([50.0, -60.0, 70.0], dtype=torch.float64)
    scale = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    lsq._FakeQuantize.apply(x[None], scale, 4, True, True, torch.float64).sum().backward()
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


@pytest.mark.parametrize("channels", [8, 64])
def test_an_observer_keeps_as_many_rows_whatever_the_width_and_the_number_of_batches(channels: int) -> None:
    for batches in (3, 40):
        quantizer = ActivationQuantizer(4, signed=True, per_channel=True, kind="linear")
        quantizer.observe(batches)
        for _ in range(batches):
            quantizer(torch.ones(3000, channels, requires_grad=True)).sum().backward()
        for kept in zip(*quantizer._samples, strict=True):
            rows = sum(len(part) for part in kept if part is not None)
            assert lsq.SAMPLE_ROWS <= rows <= lsq.SAMPLE_ROWS + batches


@pytest.mark.parametrize("channels", [16, 512])
def test_ranges_stay_if_the_images_are_doubled(channels: int) -> None:
    # What 21 rows a batch for 1,536 channels did to a network: most channels' scales were wrong by tens of per cent.
    def scale(batches: int) -> Tensor:
        generator = torch.Generator().manual_seed(batches)
        quantizer = ActivationQuantizer(4, signed=True, per_channel=True, kind="linear")
        quantizer.observe(batches)
        for _ in range(batches):
            quantizer(torch.randn(2000, channels, generator=generator))
        quantizer.calibrate("mse", 1.0)
        return quantizer.scale.detach()

    change = (scale(8) / scale(4)).log().abs()
    assert float(change.median()) < 0.05
    assert float(change.max()) < 0.15


def test_a_channel_in_which_nothing_matters_is_calibrated_as_without_importance() -> None:
    rows = torch.randn(500, 2, generator=torch.Generator().manual_seed(0))
    weight = torch.stack([torch.ones(500), torch.zeros(500)], 1)

    scale = lsq.best_scale(rows, rows.abs().amax(0) / 7, 4, signed=True, weight=weight)

    assert torch.equal(scale, lsq.best_scale(rows, rows.abs().amax(0) / 7, 4, signed=True))


def test_importance_decides_which_values_a_scale_serves() -> None:
    # Two kinds of rows: many small ones, and few large ones that alone matter.
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 1, generator=generator)
    x[:20] *= 20
    matter = torch.zeros(2000, 1)
    matter[:20] = 1
    scales = {}
    for name, gradient in (("none", None), ("small", 1 - matter), ("large", matter)):
        quantizer = ActivationQuantizer(4, signed=True, per_channel=True, kind="linear")
        quantizer.observe(1)
        inputs = x.clone().requires_grad_(gradient is not None)
        y = quantizer(inputs)
        if gradient is not None:
            (y * gradient).sum().backward()
        quantizer.calibrate("mse", 1.0)
        scales[name] = float(quantizer.scale.detach())
        # The independent judge: no other scale has a smaller weighted error.
        weight = np.ones((2000, 1)) if gradient is None else gradient.numpy()
        errors = [
            float((weight * (reference.quantize(x.numpy(), s, 4, signed=True) * s - x.numpy()) ** 2).sum())
            for s in [scales[name], *np.geomspace(0.02, 1, 60) * float(x.abs().max()) / 7]
        ]
        assert errors[0] <= min(errors) * 1.02
    assert scales["small"] < scales["none"] < scales["large"]


@pytest.fixture
def class_tokens() -> tuple[Tensor, Tensor]:
    """Batches [8, 64 images, 257 tokens, 4], and gradients, by which the first token of each image matters most."""
    generator = torch.Generator().manual_seed(0)
    x, gradient = torch.randn(2, 8, 64, 257, 4, generator=generator)
    x[:, :, 0] *= 8
    gradient[:, :, 1:] *= 1e-3
    return x, gradient


def observed(x: Tensor, gradient: Tensor) -> ActivationQuantizer:
    quantizer = ActivationQuantizer(4, signed=True, per_channel=True, kind="linear")
    quantizer.observe(len(x))
    for batch, matter in zip(x, gradient, strict=True):
        (quantizer(batch.clone().requires_grad_()) * matter).sum().backward()
    return quantizer


def weighted_error(x: Tensor, gradient: Tensor, scale: Any) -> Any:
    """Sum of |gradient| * squared error over all values of each channel, [4], FP64."""
    rows, weight = (part.double().reshape(-1, 4).numpy() for part in (x, gradient.abs()))
    return (weight * (reference.quantize(rows, scale, 4, signed=True) * scale - rows) ** 2).sum(0)


def test_sample_meets_the_rare_rows_that_matter(class_tokens: tuple[Tensor, Tensor]) -> None:
    x, gradient = class_tokens
    quantizer = observed(x, gradient)
    sample = torch.cat([rows for rows, _ in quantizer._samples])
    # Drawn alike, one row in 257 would be a class token: 16 of 4096.
    assert int((sample.abs().amax(1) > 6).sum()) > 1000
    quantizer.calibrate("mse", 1.0)
    scale = quantizer.scale.detach().numpy().astype(np.float64)
    largest = x.abs().amax((0, 1, 2)).double().numpy() / 7
    best = np.min([weighted_error(x, gradient, share * largest) for share in np.geomspace(0.02, 1, 80)], axis=0)
    assert (weighted_error(x, gradient, scale) < 1.05 * best).all()
    # They decided: for all tokens alike, another scale would be the best.
    ones = torch.ones_like(gradient)
    alike = np.min([weighted_error(x, ones, share * largest) for share in np.geomspace(0.02, 1, 20)], axis=0)
    assert (weighted_error(x, ones, scale) > 1.5 * alike).all()


def test_gradient_beside_a_quantiser_is_not_its_importance() -> None:
    # A residual stream, as behind the norms of Swin v2, mostly goes past the layer that reads it.
    x, matter = torch.randn(2, 100, 4, generator=torch.Generator().manual_seed(0))
    quantizer = ActivationQuantizer(4, signed=True, per_channel=True, kind="linear")
    quantizer.observe(1)
    stream = x.clone().requires_grad_() * 1
    (quantizer(stream) * matter + 100 * stream).sum().backward()
    ((_, weight),) = quantizer._samples
    assert weight is not None
    torch.testing.assert_close(weight, matter.abs())


def test_weights_of_a_sample_undo_how_it_was_drawn(class_tokens: tuple[Tensor, Tensor]) -> None:
    x, gradient = class_tokens
    gradient[:, :, 1:] *= 30  # so that both kinds of rows count
    quantizer = observed(x, gradient)
    sample, weight = (torch.cat(parts).double().numpy() for parts in zip(*quantizer._samples, strict=True))  # type: ignore[arg-type]
    assert len(sample) == lsq.SAMPLE_ROWS
    for scale in (0.2, 0.8, 2.0):
        error = (reference.quantize(sample, np.array(scale), 4, signed=True) * scale - sample) ** 2
        expected = weighted_error(x, gradient, np.array(scale)).sum() / x[..., 0].numel()
        assert (weight * error).sum() / len(sample) == pytest.approx(expected, rel=0.1)  # 5 % is its standard error


@pytest.mark.parametrize("offset", [0.0, 0.5])
def test_sign_is_what_was_observed(offset: float) -> None:
    quantizer = ActivationQuantizer(4, signed=None, per_channel=False, kind="matmul")
    quantizer.mode = "observe"
    x = torch.rand(100, 4, generator=torch.Generator().manual_seed(0))
    quantizer(x)
    quantizer(x - offset)
    quantizer.calibrate("minmax", 1.0)
    assert quantizer.signed is (offset > 0)
    largest = x.max().item()
    assert quantizer.scale.item() == pytest.approx(largest / 7 if offset else largest / 15, rel=1e-6)


def test_linear_scale_is_its_own_parameter_and_stays_positive() -> None:
    quantizer = ActivationQuantizer(4, signed=True, per_channel=True, kind="linear")
    quantizer.parametrization = "linear"
    quantizer.set_scale(torch.tensor([0.5, 2.0]))
    assert quantizer.raw_scale.tolist() == quantizer.scale.tolist() == [0.5, 2.0]
    with torch.no_grad():
        quantizer.raw_scale[0] = -3.0
    quantizer.guard()
    assert quantizer.scale.tolist() == [2.0**-14, 2.0]


class Mixture(torch.nn.Module):
    """Shared and transposed operands, what stands in front of them, and an attention. [B, N, 16] -> [B, N, 16]."""

    def __init__(self, quantizer: ActivationQuantizer) -> None:
        super().__init__()
        self.quantizer = quantizer
        self.seen: dict[str, weakref.ref[torch.UntypedStorage]] = {}
        self.norm = torch.nn.LayerNorm(16, eps=1e-3)
        self.q, self.k, self.v, self.out = (torch.nn.Linear(16, 16, bias=False) for _ in range(4))
        for seed, parameter in enumerate(self.parameters()):
            if parameter.ndim:
                torch.nn.init.normal_(parameter, std=0.5, generator=torch.Generator().manual_seed(seed))

    def forward(self, x: Tensor) -> Tensor:
        x_hat = self.note("quantised", self.quantizer(self.note("norm", self.norm(x))))
        q, k, v = (linear(x_hat).unflatten(-1, (2, 8)).transpose(1, 2) for linear in (self.q, self.k, self.v))
        y = lsq.recomputed(self.weigh, q, k, v).transpose(1, 2).flatten(2)
        z = self.note("gelu", torch.nn.functional.gelu(y, approximate="tanh"))
        return self.out(self.quantizer(self.note("shifted", lsq.shifted(z, 0.17))))

    def weigh(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = self.quantizer(q) @ self.quantizer(k.transpose(-2, -1))
        return self.quantizer(self.note("scores", scores.softmax(-1))) @ self.quantizer(v)

    def note(self, name: str, tensor: Tensor) -> Tensor:
        """See later whether a tensor lives on."""
        self.seen[name] = weakref.ref(tensor.untyped_storage())
        return tensor


def signed_quantizer() -> ActivationQuantizer:
    quantizer = ActivationQuantizer(4, signed=True, per_channel=False, kind="linear")
    quantizer.mode = "quantize"
    quantizer.set_scale(torch.tensor(0.3))
    return quantizer


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_recomputing_changes_no_gradient(dtype: torch.dtype | None) -> None:
    mixture = Mixture(signed_quantizer())
    x = torch.randn(5, 6, 16, generator=torch.Generator().manual_seed(0), requires_grad=True)
    results = []
    for context in (contextlib.nullcontext(), lsq.recompute_quantized()):
        with context, torch.autocast("cpu", dtype, enabled=dtype is not None):
            loss = mixture(x).square().sum()
        results.append(torch.autograd.grad(loss, [x, *mixture.parameters()]))
    for expected, gradient in zip(*results, strict=True):
        assert torch.equal(gradient, expected)
        assert gradient.dtype == torch.float32
        assert gradient.norm() > 0


@pytest.mark.parametrize(
    ("context", "alive"),
    [(contextlib.nullcontext(), {"norm", "quantised", "scores", "shifted"}), (lsq.recompute_quantized(), set())],
    ids=["plain", "recomputed"],
)
def test_recomputing_keeps_only_what_cannot_be_made_again(
    context: contextlib.AbstractContextManager[None], alive: set[str]
) -> None:
    mixture = Mixture(signed_quantizer())
    with context:
        y = mixture(torch.randn(5, 6, 16))
    assert {name for name, storage in mixture.seen.items() if storage() is not None} == alive
    y.sum().backward()
    assert all(parameter.grad is not None for parameter in mixture.parameters())


def test_recomputing_keeps_no_low_precision_copy_of_a_weight() -> None:
    linear, x = torch.nn.Linear(64, 64), torch.randn(8, 64)
    pointers = []
    for context in (contextlib.nullcontext(), lsq.recompute_quantized()):
        with context, torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            node = linear(x.requires_grad_()).grad_fn
        copies = [node._saved_mat2, node._saved_mat2]  # as the backward pass asks for it
        assert torch.equal(copies[0], linear.weight.bfloat16().T)
        pointers.append(len({copy.data_ptr() for copy in copies}))
    assert pointers == [1, 2]


def test_low_precision_in_and_out_with_arithmetic_in_fp32() -> None:
    quantizer = ActivationQuantizer(4, signed=True, per_channel=True, kind="linear")
    quantizer.mode = "quantize"
    x = torch.randn(200, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    scale = torch.rand(8, generator=torch.Generator().manual_seed(1)) + 0.1
    quantizer.set_scale(scale)
    with torch.autocast("cpu", torch.bfloat16):
        y = quantizer(x)
    exact = quantizer.scale.detach().double().numpy()
    codes = reference.quantize(x.double().numpy(), exact, 4, signed=True)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, torch.from_numpy(codes * exact).float().bfloat16())
