"""Whether a checkpoint is near its float model: what was recorded, what is measured, and what nobody knows."""

import dataclasses
from typing import Any

import pytest
from check_fixture import THRESHOLDS

from gplq.checkpoint import Checkpoint
from gplq.recipe import Limits
from gplq_export.check.accumulate import share_estimate
from gplq_export.check.baseline import judge_closeness
from gplq_export.check.gates import Judge
from gplq_export.check.report import Closeness, Estimate, Gate, Pair, Top

EXACT = Estimate(value=1.0, low=1.0, high=1.0, n=100)


def recorded(percent: float = 95.0, cosine: float = 0.95, n: int = 128) -> dict[str, Any]:
    """What ``gplq quantize`` writes down; the first entry is that of calibration, which Stage 1 may have mended."""
    final = {"percent": percent, "interval": [percent - 4, percent + 4], "n": n, "cosine": cosine}
    return {"closeness": {"calibrated": {**final, "cosine": 0.1}, "W4A4": final}}


def compared(labels: int, n: int = 100, cosine: float = 1.0, top1: tuple[int, int] | None = None) -> Pair:
    found = Closeness(
        n=n,
        agreement=share_estimate(labels, n),
        cosine=Estimate(value=cosine, low=cosine, high=cosine, n=n),
        cosine_p01=EXACT,
        sqnr_db=None,
        kl=None,
        max_difference=0.0,
    )
    pair = Pair(name="float", reference="", candidate="", file=None, skipped=None, found=found)
    if top1 is None:
        return pair
    float_top, ours = (Top(top1=share_estimate(right, n), top5=None) for right in top1)
    return pair.model_copy(update={"reference_top": float_top, "candidate_top": ours})


def judged(checkpoint: Checkpoint, provenance: Any, pair: Pair | None = None, classes: int = 4) -> Gate:
    spec = dataclasses.replace(checkpoint.spec, num_classes=classes)
    recipe = checkpoint.recipe.model_copy(update={"limits": Limits(agreement=80.0)})
    judge = Judge(THRESHOLDS)
    judge_closeness(judge, dataclasses.replace(checkpoint, spec=spec, recipe=recipe, provenance=provenance), pair)
    (gate,) = judge.gates
    assert gate.id == "float.closeness"
    return gate


@pytest.mark.parametrize(
    ("record", "status", "words"),
    [
        (recorded(), "passed", "cosine of its features 0.9500, measured when the checkpoint was made."),
        (recorded(cosine=0.39), "failed", "too far (features, limit 0.8)"),
        (recorded(cosine=float("nan")), "failed", "too far (features, limit 0.8)"),
        (recorded(percent=75.9), "failed", "75.9 % of its labels are the float model's"),
        (recorded(percent=76.1), "passed", "76.1 % of its labels"),  # the interval ends at 80.1
        ({**recorded(cosine=0.39), "top1": {"FP32": {"percent": 80.0}, "W4A4": {"percent": 79.0}}}, "passed", "as acc"),
        ({**recorded(cosine=0.39), "top1": {"FP32": {"percent": 80.0}, "W4A4": {"percent": 78.9}}}, "failed", "far"),
    ],
)
def test_without_the_float_model_the_record_decides(
    checkpoint: Checkpoint, record: dict[str, Any], status: str, words: str
) -> None:
    gate = judged(checkpoint, record)
    assert gate.status == status
    assert words in gate.sentence
    assert gate.n == 128


@pytest.mark.parametrize("record", [{}, {"closeness": {}}, {"closeness": 3}, {"closeness": {"W4A4": {"n": "many"}}}])
def test_a_checkpoint_that_does_not_say_is_not_judged(checkpoint: Checkpoint, record: dict[str, Any]) -> None:
    gate = judged(checkpoint, record)
    assert gate.status == "skipped"
    assert "--float" in gate.sentence


@pytest.mark.parametrize(
    ("pair", "classes", "status"),
    [
        (compared(95), 4, "passed"),
        (compared(60), 4, "failed"),  # [50.2, 69.1] %
        (compared(60, top1=(60, 60)), 4, "passed"),
        (compared(60, top1=(62, 60)), 4, "failed"),
        (compared(0, cosine=0.39), 0, "failed"),
        (compared(0, cosine=0.81), 0, "passed"),
        (compared(0, cosine=0.39, n=2), 0, "failed"),  # far off on few images, too
        (compared(2, n=2), 4, "reported"),
    ],
)
def test_with_the_float_model_it_is_measured(checkpoint: Checkpoint, pair: Pair, classes: int, status: str) -> None:
    assert pair.found is not None
    changes = {} if classes else {"agreement": None}
    pair = pair.model_copy(update={"found": pair.found.model_copy(update=changes)})
    gate = judged(checkpoint, {}, pair, classes)
    assert gate.status == status
    assert "measured now" in gate.sentence


def test_record_goes_before_a_measurement_on_few_images(checkpoint: Checkpoint) -> None:
    assert judged(checkpoint, recorded(), compared(29, n=29)).n == 128
    assert judged(checkpoint, recorded(), compared(30, n=30)).n == 30
    # Nor do few labels say how accurate it is.
    accurate = {**recorded(percent=10), "top1": {"FP32": {"percent": 50.0}, "W4A4": {"percent": 60.0}}}
    assert judged(checkpoint, accurate, compared(0, n=8, top1=(3, 1))).status == "passed"
    # What stands in front of the classifier is not compared again.
    assert judged(checkpoint, recorded(cosine=0.39), compared(30, n=30)).status == "failed"
