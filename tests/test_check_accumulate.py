"""What is counted while images stream by, against NumPy on everything at once; estimates against brute force."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gplq_export.check.accumulate import (
    CodeCounts,
    Outputs,
    State,
    UnitErrors,
    decibel,
    mean_estimate,
    percentile_estimate,
    share_estimate,
)


def codes(seed: int, images: int = 10) -> tuple[np.ndarray, np.ndarray]:
    """Reference and candidate, int8 [images, 7, 5]; in every second image some differ, by up to 15."""
    random = np.random.default_rng(seed)
    reference = random.integers(-8, 8, (images, 7, 5)).astype(np.int8)
    candidate = reference.copy()
    candidate[::2] = np.where(random.random((images + 1) // 2 * 35).reshape(-1, 7, 5) < 0.2, 7, candidate[::2])
    return reference, candidate


def test_codes_are_counted_as_numpy_counts_them() -> None:
    counts = CodeCounts(["a", "b"])
    parts = [codes(seed, images) for seed, images in ((0, 10), (1, 3), (2, 1))]
    for reference, candidate in parts:
        counts.add("b", reference, candidate, len(reference))
    a, b = (np.concatenate(each).astype(np.int64) for each in zip(*parts, strict=True))
    steps = np.abs(a - b)
    layer = counts.layer("b", "quantizer", None, inside=True)
    assert (layer.total, layer.different) == (a.size, int((steps > 0).sum()))
    assert layer.steps == (int((steps == 1).sum()), int((steps == 2).sum()), int((steps > 2).sum()))
    assert layer.max_step == steps.max() > 8
    assert layer.sqnr_db == pytest.approx(10 * np.log10((a**2).sum() / (steps**2).sum()), abs=0.01)
    shares = 100 * (steps > 0).reshape(len(a), -1).mean(1)
    assert layer.share is not None
    assert layer.share.n == 14
    assert layer.share.value == pytest.approx(shares.mean())
    assert layer.share.high - layer.share.value == pytest.approx(1.96 * shares.std() / 14**0.5)
    assert (counts.different(), counts.different("b"), counts.different("a")) == (layer.different, layer.different, 0)
    nothing = counts.layer("a", "quantizer", None, inside=True)
    assert (nothing.total, nothing.share, nothing.sqnr_db) == (0, None, None)


def test_codes_at_both_ends_of_eight_bits_do_not_wrap_around() -> None:
    counts = CodeCounts(["a"])
    counts.add("a", np.array([[-128, 127, 0]], np.int8), np.array([[127, -128, 0]], np.int16), 1)
    layer = counts.layer("a", "quantizer", None, inside=True)
    assert (layer.different, layer.max_step, layer.steps) == (2, 255, (0, 0, 2))


def test_units_keep_the_energy_of_signal_and_difference() -> None:
    errors, random = UnitErrors(["stem", "head"]), np.random.default_rng(0)
    reference = random.normal(size=(6, 3, 4)).astype(np.float32)
    for rows in (slice(0, 4), slice(4, 6)):
        errors.add("head", reference[rows], reference[rows] * np.float32(1.1))
    stem, head = errors.layers()
    assert head.sqnr_db == pytest.approx(20.0, abs=0.01)  # a tenth of the amplitude
    assert (stem.sqnr_db, head.kind, head.total) == (None, "block", 0)


def logits(count: int, seed: int, classes: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """Reference and candidate, float32 [count, classes], and labels."""
    generator = torch.Generator().manual_seed(seed)
    reference = torch.randn(count, classes, generator=generator)
    candidate = reference + 0.3 * torch.randn(count, classes, generator=generator)
    return reference, candidate, torch.randint(0, classes, (count,), generator=generator)


def test_outputs_of_a_classifier_are_what_numpy_says_of_all_at_once() -> None:
    outputs, (a, b, labels) = Outputs(classifies=True), logits(300, 0)
    for rows in (slice(0, 128), slice(128, 256), slice(256, 300)):
        outputs.add([a[rows]], [b[rows]], labels[rows])
    found = outputs.closeness()
    x, y, truth = (each.numpy().astype(np.float64) for each in (a, b, labels))
    assert found.n == outputs.images == 300
    assert found.agreement is not None and found.kl is not None
    assert found.agreement.value == pytest.approx(100 * (x.argmax(1) == y.argmax(1)).mean())
    cosine = (x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)
    assert found.cosine.value == pytest.approx(cosine.mean(), abs=1e-6)
    assert found.cosine_p01.value == pytest.approx(np.sort(cosine)[3], abs=1e-6)
    assert found.sqnr_db == pytest.approx(10 * np.log10((x**2).sum() / ((x - y) ** 2).sum()), abs=0.01)
    assert found.max_difference == pytest.approx(np.abs(x - y).max())
    p, q = (np.exp(z) / np.exp(z).sum(1, keepdims=True) for z in (x, y))
    assert found.kl.value == pytest.approx((p * np.log(p / q)).sum(1).mean())
    for side, z in (("reference", x), ("candidate", y)):
        top = outputs.top(side, 8)  # type: ignore[arg-type]
        best = np.argsort(-z, axis=1)[:, :5]
        assert top is not None and top.top5 is not None
        assert top.top1.value == pytest.approx(100 * (best[:, 0] == truth).mean())
        assert top.top5.value == pytest.approx(100 * (best == truth[:, None]).any(1).mean())
    five = outputs.top("reference", 5)
    assert five is not None and five.top5 is None


def test_accuracy_needs_labels_and_classes() -> None:
    a, b, labels = logits(8, 0)
    unlabelled, features = Outputs(classifies=True), Outputs(classifies=False)
    unlabelled.add([a], [b], torch.full([8], -1))
    features.add([a], [b], labels)
    assert unlabelled.top("reference", 8) is None
    assert features.top("reference", 0) is None
    found = features.closeness()
    assert (found.agreement, found.kl) == (None, None)


def test_one_answer_that_is_no_number_spoils_the_estimate() -> None:
    outputs, (a, b, labels) = Outputs(classifies=True), logits(100, 0)
    b[17, 3] = float("nan")
    outputs.add([a[:50]], [b[:50]], labels[:50])
    outputs.add([a[50:]], [b[50:]], labels[50:])
    found = outputs.closeness()
    assert found.kl is not None
    for number in (found.cosine.value, found.cosine_p01.high, found.kl.value, found.max_difference, found.sqnr_db):
        assert number is not None and math.isnan(number)


def all_state(parts: Any) -> State:
    return {f"{type(part).__name__}.{key}": array for part in parts for key, array in part.state().items()}


@pytest.mark.parametrize("cut", [0, 1, 3])
@pytest.mark.parametrize("size", [2, 40])
def test_restored_counts_go_on_as_if_nothing_had_happened(cut: int, size: int) -> None:
    """Also if a batch has fewer outputs than are kept of it, and until no more of them are kept."""

    def fresh() -> tuple[Outputs, CodeCounts, UnitErrors]:
        return Outputs(classifies=True), CodeCounts(["q"]), UnitErrors(["u"])

    def add(parts: tuple[Outputs, CodeCounts, UnitErrors], seed: int) -> None:
        a, b, labels = logits(size, seed)
        parts[0].add([a], [b], labels)
        parts[1].add("q", *codes(seed, size), size)
        parts[2].add("u", a.numpy(), b.numpy())

    whole, before, after = fresh(), fresh(), fresh()
    for seed in range(150):
        add(whole, seed)
    for seed in range(cut):
        add(before, seed)
    for old, new in zip(before, after, strict=True):
        new.restore({key: array.copy() for key, array in old.state().items()})  # type: ignore[attr-defined]
    for seed in range(cut, 150):
        add(after, seed)
    expected, found = all_state(whole), all_state(after)
    assert expected.keys() == found.keys()
    for key, array in expected.items():
        assert np.array_equal(found[key], array), key
    assert whole[0].closeness() == after[0].closeness()
    assert len(expected["Outputs.scatter"]) < 1516


# Estimates


@pytest.mark.parametrize("n", [1, 2, 20, 100, 999])
@pytest.mark.parametrize("share", [0.01, 0.25])
def test_percentile_has_as_many_values_below_it(n: int, share: float) -> None:
    values = np.random.default_rng(n).permutation(n).astype(float)
    estimate = percentile_estimate(values, share)
    assert int((values < estimate.value).sum()) == min(round(n * share), n - 1)
    assert estimate.low <= estimate.value <= estimate.high
    assert {estimate.low, estimate.high} <= set(values.tolist())


@pytest.mark.parametrize(("n", "share"), [(100, 0.01), (1000, 0.01), (200, 0.25)])
def test_interval_of_a_percentile_holds_it_95_times_of_100(n: int, share: float) -> None:
    """By brute force: samples of a population whose percentile is known."""
    random = np.random.default_rng(0)
    truth = -math.log(1 - share)  # of the exponential distribution
    samples = random.exponential(size=(2000, n))
    estimates = [percentile_estimate(sample, share) for sample in samples]
    assert sum(estimate.high >= truth for estimate in estimates) >= 0.975 * 2000
    if n == 100:  # in a third of all samples not one value lies below: then the smallest is all that is known
        assert all(estimate.low == sample.min() for estimate, sample in zip(estimates, samples, strict=True))
        return
    assert sum(estimate.low <= truth <= estimate.high for estimate in estimates) >= 0.95 * 2000
    # And it is not so wide that it says nothing.
    assert sum(estimate.low <= truth / 3 and 3 * truth <= estimate.high for estimate in estimates) < 0.1 * 2000


def test_percentile_of_constants_and_of_no_number() -> None:
    same = percentile_estimate(np.full(50, 0.75), 0.01)
    assert (same.low, same.value, same.high, same.n) == (0.75, 0.75, 0.75, 50)
    spoilt = percentile_estimate(np.array([1.0, math.nan, 2.0]), 0.01)
    assert all(math.isnan(number) for number in (spoilt.low, spoilt.value, spoilt.high))


def test_interval_of_a_share_solves_wilsons_equation() -> None:
    for count, n in ((80, 100), (1, 10), (499, 500)):
        estimate = share_estimate(count, n)
        assert estimate.value == pytest.approx(100 * count / n)
        for end in (estimate.low / 100, estimate.high / 100):
            assert abs(end - count / n) == pytest.approx(1.96 * math.sqrt(end * (1 - end) / n), rel=1e-3)
    assert share_estimate(10, 10).high == pytest.approx(100)


def test_mean_and_its_interval() -> None:
    values = np.random.default_rng(0).normal(5, 2, 400)
    estimate = mean_estimate(values.sum(), np.square(values).sum(), 400)
    assert estimate.value == pytest.approx(values.mean())
    assert estimate.high - estimate.low == pytest.approx(2 * 1.96 * values.std() / 20)
    exact = mean_estimate(3.0, 3.0, 3)
    assert (exact.low, exact.value, exact.high) == (1.0, 1.0, 1.0)
    assert math.isnan(mean_estimate(math.nan, math.nan, 3).low)


def test_decibel_of_what_is_no_number_or_infinite() -> None:
    assert decibel(1.0, 0.0) is None
    assert decibel(0.0, 1.0) == -math.inf
    assert math.isnan(decibel(1.0, math.nan) or 0.0)
