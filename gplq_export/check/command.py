"""``gplq-export check``: does what was exported compute what PyTorch computes?

Console output, and in the reports folder: parity.json (everything, written first), parity.junit.xml, report.md and
report.html. Exit code 1 if a gate failed; 3 if something that --require names could not run.
"""

import argparse
import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gplq.cli import DATA, TRUST, positive
from gplq.errors import GateError, GplqError, MissingError, UsageError

if TYPE_CHECKING:
    from gplq.checkpoint import Checkpoint
    from gplq.models import FloatModel
    from gplq_export.check.report import Report
    from gplq_export.check.subject import Files
    from gplq_export.runtimes import Run

EPILOGS = ["example: gplq-export check dist --data images.npz", DATA]
_GROUPS = {"trt": ".plan", "triton": "served"}
_NAMED = 5
_ASKED = 512  # images, whether their labels are the model's


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of ``gplq-export check``."""
    parser.add_argument("paths", type=Path, nargs="+", metavar="DIR|FILE", help="an export's folder, or files of it")
    images = parser.add_argument_group("images")
    images.add_argument("--data", help="test images; see below")
    images.add_argument("--no-labels", action="store_true", help="--data has no labels: compare, but measure no top-1")
    images.add_argument("--trust-labels", action="store_true", help=TRUST)
    images.add_argument("--images", type=positive, help="use so many of them, evenly spread (default: all)")
    images.add_argument(
        "--forced-images",
        type=positive,
        default=256,
        help="so many for what is fed by PyTorch, layers and twins (default: 256)",
    )
    images.add_argument("--random", type=positive, metavar="N", help="random numbers instead: proves no accuracy")
    subject = parser.add_argument_group("what to compare with")
    subject.add_argument("--checkpoint", type=Path, help="(default: model.pt in the folder)")
    subject.add_argument(
        "--float", help="the original model, as 'gplq quantize' took it (default: where it was then, if it is the same)"
    )
    subject.add_argument("--expect-top1", type=float, metavar="%", help="of the float model, such as published")
    subject.add_argument("--triton", metavar="HOST:PORT", help="also check a model that a Triton server serves there")
    subject.add_argument("--model", help="its name (with --triton)")
    subject.add_argument("--grpc", action="store_true", help="ask it over gRPC instead of HTTP (with --triton)")
    gates = parser.add_argument_group("gates")
    gates.add_argument("--max-drop", type=float, metavar="POINTS", help="accuracy that quantisation may cost")
    gates.add_argument("--thresholds", type=Path, metavar="YAML", help="other limits; see check/thresholds.yaml")
    gates.add_argument(
        "--require", type=_names, default=(), help="pairs that must not be skipped, such as trt,openvino,float,triton"
    )
    gates.add_argument("--trust-engine", action="store_true", help="run plans that no manifest vouches for")
    latency = parser.add_argument_group("latency (see 'gplq-export bench')")
    how = latency.add_mutually_exclusive_group()
    how.add_argument("--latency", action="store_true", help="time the files, too")
    how.add_argument("--bench", type=Path, metavar="JSON", help="take what 'gplq-export bench --json' measured")
    latency.add_argument("--latency-baseline", type=Path, metavar="JSON", help="fail if slower than in this one")
    parser.add_argument("--report", type=Path, metavar="DIR", help="where to write (default: reports in the folder)")


def run(arguments: argparse.Namespace) -> None:
    """Check, write, print.

    Raises:
        UsageError: an argument is wrong, or an input cannot be read.
        GateError: a gate failed. MissingError: something required could not run.
    """
    _check_flags(arguments)
    from gplq_export.check.chain import Settings, check
    from gplq_export.check.gates import read_thresholds
    from gplq_export.check.subject import Files, find_checkpoint, find_float_model
    from gplq_export.reports import write_reports
    from gplq_export.reports.console import console

    thresholds = read_thresholds(arguments.thresholds)
    if arguments.max_drop is not None:
        thresholds = thresholds.replaced("top1_drop", arguments.max_drop, "Given with --max-drop.")
    files = Files.of(arguments.paths)
    checkpoint = find_checkpoint(files, arguments.checkpoint)
    images = _images(arguments, checkpoint)
    float_model = find_float_model(checkpoint, arguments.float)
    if not arguments.trust_labels:
        _doubt_labels(images, checkpoint, float_model)
    folder = arguments.report or files.folder / "reports"
    with contextlib.ExitStack() as stack:
        settings = Settings(
            forced_images=arguments.forced_images,
            thresholds=thresholds,
            expected_top1=arguments.expect_top1,
            float_model=float_model,
            served=_served(arguments, stack),
            state=folder / ".check.npz",
            trust_engine=arguments.trust_engine,
            random=arguments.random is not None,
        )
        report = check(checkpoint, files, images, settings, say=lambda text: _write(text, sys.stderr))
    report = _with_latency(arguments, files, report, thresholds)
    written = write_reports(report, folder)
    for line in console(report):
        _write(line, sys.stdout)
    _write(f"wrote {', '.join(path.name for path in written)} in {folder}", sys.stdout)
    raise_failures(report, arguments.require)


def raise_failures(report: "Report", require: tuple[str, ...] = ()) -> None:
    """Turn what failed into the error that ends a command.

    Raises:
        GateError: a gate failed. MissingError: a required pair was skipped, or every file. UsageError: there is no such
            pair.
    """
    from gplq_export.check.report import failure

    if report.failed:
        raise GateError(failure(report))
    skipped = [pair.skipped for pair in report.pairs if pair.file is not None]
    if skipped and skipped[0] is not None and None not in skipped and report.pair("served") is None:
        raise MissingError(f"no file could be compared: {skipped[0]}")
    for name in require:
        wanted = [pair for pair in report.pairs if pair.name == name or _GROUPS.get(name, "?") in pair.name]
        if not wanted:
            known = ", ".join([*(pair.name for pair in report.pairs), *_GROUPS])
            raise UsageError(f"--require {name}: there is no such pair here; there are {known}.")
        for pair in wanted:
            if pair.skipped is not None:
                raise MissingError(f"{pair.name} is required (--require {name}) and was skipped: {pair.skipped}")


def _check_flags(arguments: argparse.Namespace) -> None:
    if (arguments.data is None) == (arguments.random is None):
        raise UsageError("check needs images: --data DATA (or --random N, which proves nothing about accuracy).")
    timed = arguments.latency or arguments.bench is not None
    for flag, given, needed, present in (
        ("--images", arguments.images, "--data", arguments.data),
        ("--no-labels", arguments.no_labels, "--data", arguments.data),
        ("--model", arguments.model, "--triton", arguments.triton),
        ("--grpc", arguments.grpc, "--triton", arguments.triton),
        ("--triton", arguments.triton, "--model", arguments.model),
        ("--latency-baseline", arguments.latency_baseline, "--latency or --bench", timed),
    ):
        if given and not present:
            raise UsageError(f"{flag} has no effect without {needed}.")


def _served(arguments: argparse.Namespace, stack: contextlib.ExitStack) -> "tuple[str, Run] | None":
    """A served model, what to call it and a connection to it."""
    if arguments.triton is None:
        return None
    from gplq_export.triton.client import TritonRun

    run_served = stack.enter_context(TritonRun(arguments.triton, arguments.model, "grpc" if arguments.grpc else "http"))
    return f"{arguments.model} on Triton at {arguments.triton}, {run_served.protocol}", run_served


def _images(arguments: argparse.Namespace, checkpoint: "Checkpoint") -> Any:
    if arguments.random is not None:
        import torch

        shape = checkpoint.preprocessing.input_size
        generator = torch.Generator().manual_seed(0)
        return [torch.randn(1, *shape, generator=generator) for _ in range(arguments.random)]
    from gplq.data import open_test_images

    labels = not arguments.no_labels and checkpoint.spec.num_classes > 0
    return open_test_images(arguments.data, checkpoint, arguments.images, need_labels=labels)


def _doubt_labels(images: Any, checkpoint: "Checkpoint", float_model: "FloatModel | None") -> None:
    """Stop before hours of work if the answers of the float model, or else the checkpoint, speak against the labels."""
    from gplq.data import ImageSet
    from gplq.doubt import trusted_top1

    if not isinstance(images, ImageSet) or min(images.labels) < 0 or checkpoint.trusts_labels:
        return
    model, what = (checkpoint.model, "Checkpoint") if float_model is None else (float_model.model, "FP32")
    trusted_top1(model, images.head(_ASKED), checkpoint.spec.num_classes, what)


def _with_latency(arguments: argparse.Namespace, files: "Files", report: "Report", thresholds: Any) -> "Report":
    """The report with times, if they were asked for."""
    from gplq_export.check.gates import Judge
    from gplq_export.check.latency import entries, judge_latency, measure, read_bench

    if not arguments.latency and arguments.bench is None:
        return report
    judge = Judge(thresholds)
    try:
        bench = read_bench(arguments.bench) if arguments.bench else measure(files.folder, ["--seconds", "20"])
    except GplqError as error:
        if isinstance(error, UsageError):
            raise
        judge.skip("latency", "measured", str(error))
        return report.model_copy(update={"gates": [*report.gates, *judge.gates]})
    before = read_bench(arguments.latency_baseline) if arguments.latency_baseline else None
    judge_latency(bench, before, judge)
    return report.model_copy(
        update={
            "gates": [*report.gates, *judge.gates],
            "latency": entries(bench),
            "latency_machine": {**bench["machine"], **bench.get("settings", {})},
        }
    )


def _names(text: str) -> tuple[str, ...]:
    return tuple(part for part in text.split(",") if part)


def _write(text: str, stream: Any) -> None:
    stream.write(f"{text}\n")
