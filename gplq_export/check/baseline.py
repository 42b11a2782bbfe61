"""What holds whatever is exported: images as they were meant, a checkpoint near its float model, what FP16 holds."""

import itertools
from typing import Any

import onnx_ir as ir

from gplq import golden
from gplq.checkpoint import Checkpoint
from gplq.data import ImageSet
from gplq.errors import MissingError
from gplq.pipeline import NOISE_POINTS
from gplq_export.check.gates import Judge
from gplq_export.check.images import Source
from gplq_export.check.report import Estimate, Pair, Top
from gplq_export.lowering import lower
from gplq_export.overflow import probe
from gplq_export.targets import TARGETS
from gplq_export.trace import trace

DATA = "data"  # what gates on the images are filed under, where others have a pair
FLOAT = "float"  # the pair of the float model and the checkpoint
_PROBED, _AT_ONCE = 16, 2  # images


def judge_golden(source: Source, checkpoint: Checkpoint, judge: Judge) -> None:
    """Whether images are prepared as they were when the checkpoint was made, see :mod:`gplq.golden`."""
    if not isinstance(source.images, ImageSet):
        judge.skip(DATA, "golden", "tensors were given, not images")
        return
    moved = golden.difference(checkpoint.provenance.get("golden"), checkpoint.model, source.images)
    if isinstance(moved, str):
        judge.skip(DATA, "golden", moved)
        return
    same = moved <= judge.thresholds["golden"]
    judge.add(
        DATA,
        "golden",
        same,
        f"the network without rounding differs by {moved:.1e} from what it said when the checkpoint was made"
        + (
            "."
            if same
            else ": the images, or how they are prepared (size, crop, interpolation, mean, deviation), are others."
        ),
        "golden",
        found=moved,
        unit="relative",
        n=golden.IMAGES,
    )


def judge_baseline(
    judge: Judge, provenance: dict[str, Any], float_top: Top | None, our_top: Top | None, expected: float | None
) -> None:
    """Accuracy in PyTorch against what is known of the weights: the images, their labels and their order.

    Args:
        judge: where the gate goes.
        provenance: of the checkpoint; tells what was measured when it was made.
        float_top: of the float model, if it is here and there are labels.
        our_top: of the checkpoint, likewise.
        expected: of the float model, in per cent; None: what was measured then.
    """
    known = provenance.get("top1")
    then = known if isinstance(known, dict) else {}
    if float_top is not None:
        measured, which, entry = float_top, "the float model", then.get("FP32")
    elif our_top is None:
        judge.skip(DATA, "top1", "the images have no labels")
        return
    elif expected is not None:
        judge.skip(DATA, "top1", "--expect-top1 is of the float model, which is not here (--float)")
        return
    else:
        measured, which, entry = our_top, "the checkpoint", next(reversed(then.values()), None)
    if expected is None:
        try:
            expected = float(entry["percent"])  # type: ignore[index]  # whatever it is, it may not have it
        except (LookupError, TypeError, ValueError):
            judge.skip(DATA, "top1", f"nothing says which accuracy to expect of {which} (--expect-top1)")
            return
    _judge_top1(judge, measured.top1, expected, which)


def _judge_top1(judge: Judge, found: Estimate, expected: float, which: str) -> None:
    limit = expected - judge.thresholds["expected_top1"]
    enough, good = found.n >= judge.thresholds["enough_images"], found.high >= limit
    judge.add(
        DATA,
        "top1",
        good if enough else "reported",
        f"top-1 of {which} in PyTorch is {found.value:.2f} % [{found.low:.2f}, {found.high:.2f}], expected "
        f"{expected:.2f} %"
        + ("" if enough else ", too few images to judge")
        + (
            "."
            if good or not enough
            else ": the labels are in another order, or the images are others or prepared otherwise; if they are meant "
            "to be, say what to expect with --expect-top1."
        ),
        "expected_top1",
        found=found.value,
        interval=(found.low, found.high),
        limit=limit,
        unit="%",
        n=found.n,
    )


def judge_closeness(judge: Judge, checkpoint: Checkpoint, pair: Pair | None) -> None:
    """Whether the checkpoint is near its float model, by the limits of its recipe, as ``gplq quantize`` judges it.

    Labels, or what a network without a classifier returns, are compared now if the float model is here. What stands in
    front of a classifier, and everything if the float model or images are missing, is what was measured when the
    checkpoint was made. With labels a network may leave the float model behind: what is as accurate is not lost.

    Args:
        judge: where the gate goes.
        checkpoint: its provenance tells what was measured then.
        pair: the float model and the checkpoint on the images at hand; None if they could not be compared.
    """
    limits, classifies = checkpoint.recipe.limits, checkpoint.spec.num_classes > 0
    then = _measured_then(checkpoint.provenance)
    now = None if pair is None else pair.found
    if now is not None and now.n < judge.thresholds["few_images"] and then:
        now = None
    labels = then.get("labels") if now is None else now.agreement
    cosine = now.cosine if now is not None and not classifies else then.get("cosine")
    measured = cosine if labels is None else labels
    if measured is None:
        judge.skip(
            FLOAT,
            "closeness",
            "nothing says how near the checkpoint is to the float model: it does not record it, as those do that 'gplq "
            "quantize' writes today, and the float model is not here (--float)",
        )
        return
    parts, misses = [], []
    if labels is not None:
        parts.append(f"{labels.value:.1f} % of its labels are the float model's")
        if limits.misses_agreement((labels.low, labels.high)):
            misses.append(f"labels, limit {limits.agreement:g} %")
    if cosine is not None:
        what = "features" if classifies else "outputs"
        parts.append(f"cosine of its {what} {cosine.value:.4f}")
        if limits.misses_cosine(cosine.value):
            misses.append(f"{what}, limit {limits.cosine:g}")
    as_good = bool(misses) and _is_as_accurate(None if now is None else pair, checkpoint.provenance)
    few = measured.n < judge.thresholds["few_images"]
    judge.add(
        FLOAT,
        "closeness",
        "reported" if few and not misses else as_good or not misses,
        f"{', '.join(parts)}, measured {'when the checkpoint was made' if now is None else 'now'}"
        + (f": too far ({', '.join(misses)})" if misses else "")
        + (", but it is as accurate" if as_good else "")
        + (", too few images to judge" if few and not misses else "")
        + ("." if as_good or not misses else ". Its files may compute what it does, and not what the model did."),
        found=measured.value,
        interval=(measured.low, measured.high),
        limit=limits.cosine if labels is None else limits.agreement,
        unit="cosine" if labels is None else "% of labels equal",
        n=measured.n,
        why="The limits of the recipe: what misses them ends 'gplq quantize' with exit code 1, too.",
    )


def _measured_then(provenance: dict[str, Any]) -> dict[str, Estimate]:
    """What was measured of the finished checkpoint when it was made: "labels" and "cosine", those that are known."""
    try:
        *_, entry = provenance["closeness"].values()
        n, cosine = int(entry["n"]), float(entry["cosine"])
        found = {"cosine": Estimate(value=cosine, low=cosine, high=cosine, n=n)}
        if "percent" in entry:
            low, high = entry["interval"]
            found["labels"] = Estimate(value=entry["percent"], low=low, high=high, n=n)
    except (LookupError, TypeError, ValueError, AttributeError):  # whatever it is, it may not have it
        return {}
    return found


def _is_as_accurate(pair: Pair | None, provenance: dict[str, Any]) -> bool:
    if pair is not None and pair.reference_top is not None and pair.candidate_top is not None:
        return pair.candidate_top.top1.value >= pair.reference_top.top1.value - NOISE_POINTS
    try:
        exact, *_, last = (float(entry["percent"]) for entry in provenance["top1"].values())
    except (LookupError, TypeError, ValueError, AttributeError):
        return False
    return last >= exact - NOISE_POINTS


def judge_range(source: Source, checkpoint: Checkpoint, target: str, judge: Judge) -> None:
    """Whether what an FP16 file or engine of ``target`` computes fits into FP16, see :mod:`gplq_export.overflow`."""
    graph = lower(trace(checkpoint), TARGETS[target](ir.DataType.FLOAT), {})
    images = [inputs for inputs, _ in itertools.islice(source.batches(_AT_ONCE), _PROBED // _AT_ONCE)]
    try:
        found = probe(graph, images, limit=_PROBED)
    except MissingError as error:
        judge.skip("fp16", "range", str(error))
        return
    failures, worst = found.failures(), found.peaks[0]
    judge.add(
        "fp16",
        "range",
        not failures,
        failures[0] if failures else f"{found.summary()}.",
        "fp16_range",
        layer=worst.tensor if failures else None,
        found=worst.value,
        unit="largest magnitude",
        n=found.images,
    )
