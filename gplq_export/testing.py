"""Parity as an assertion, for the tests of one's own repository; ``gplq-export check`` is the same code.

::

    from gplq_export.testing import assert_parity

    def test_the_export_computes_what_the_checkpoint_does():
        assert_parity("dist/model.pt", "dist", "images.npz", require=["trt"])

With pytest the fixture ``gplq_parity`` does without any code, see :mod:`gplq_export.pytest_plugin`.
"""

from collections.abc import Collection, Sequence
from os import PathLike
from pathlib import Path

from torch import Tensor

from gplq.checkpoint import Checkpoint
from gplq.data import ImageSet, open_test_images
from gplq_export.check.chain import Settings, check
from gplq_export.check.command import raise_failures
from gplq_export.check.gates import read_thresholds
from gplq_export.check.report import Report
from gplq_export.check.subject import Files, find_checkpoint, find_float_model


def assert_parity(
    checkpoint: Checkpoint | str | PathLike[str],
    files: str | PathLike[str] | Sequence[str | PathLike[str]],
    images: ImageSet | Sequence[Tensor] | str | PathLike[str],
    *,
    limit: int | None = None,
    thresholds: str | PathLike[str] | None = None,
    require: Collection[str] = (),
) -> Report:
    """Compare the files of an export with their checkpoint on ``images``, and fail with what is wrong.

    Args:
        checkpoint: read, or its file.
        files: the folder of the export; or ONNX files and plans.
        images: opened with the checkpoint's preprocessing; or batches, float32 [B, C, H, W], as the model gets them;
            or what --data takes, whose test images must have labels if the model has classes.
        limit: of the images that a name stands for, take so many, evenly spread; all if None.
        thresholds: a YAML file with limits that replace those that come with gplq.
        require: pairs that must not be skipped, as --require of ``gplq-export check``, such as "trt". Others are, if
            they cannot run here, with the reason in the report.

    Returns:
        The report: what ``gplq-export check`` writes to ``parity.json``.

    Raises:
        AssertionError: a gate failed. The message has a line for each, the first of which is the cause of the others.
        UsageError: an argument is wrong, a file cannot be read, or the export has nothing that is required.
        MissingError: something that is required cannot run here, or ONNX Runtime is not installed.
    """
    __tracebackhide__ = True
    found = Files.of([Path(path) for path in ([files] if isinstance(files, str | PathLike) else files)])
    loaded = checkpoint if isinstance(checkpoint, Checkpoint) else find_checkpoint(found, Path(checkpoint))
    if isinstance(images, str | PathLike):
        images = open_test_images(str(images), loaded, limit, need_labels=loaded.spec.num_classes > 0)
    limits = read_thresholds(None if thresholds is None else Path(thresholds))
    settings = Settings(thresholds=limits, float_model=find_float_model(loaded, None))
    report = check(loaded, found, images, settings, say=lambda _: None)
    if report.failed:
        raise AssertionError(failures(report))
    raise_failures(report, tuple(require))
    return report


def failures(report: Report) -> str:
    """The gates that failed, a line each below a headline."""
    judged = [gate for gate in report.gates if gate.status in ("passed", "failed")]
    lines = [f"{len(report.failed)} of {len(judged)} parity gates failed, the cause first:"]
    return "\n".join([*lines, *(f"  {gate.id}: {gate.sentence}" for gate in report.failed)])
