"""The ``gplq-export`` command: a checkpoint in; ONNX files, engines and their proof out. And what looks at them."""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gplq import __version__
from gplq.cli import EXIT_CODES, positive, run_command
from gplq.errors import GateError, UsageError
from gplq_export.engine import BuilderOptions

if TYPE_CHECKING:
    from gplq.checkpoint import Checkpoint
    from gplq.data import ImageSet
    from gplq_export.export import ExportResult

# Each is a module with add_arguments(parser) and run(arguments).
COMMANDS = {
    "check": ("gplq_export.check.command", "Check an export against PyTorch: codes, accuracy, latency; for CI."),
    "report": ("gplq_export.reports.command", "Write the report of a check once more, in any format."),
    "diff": ("gplq_export.reports.diff", "Say what changed between the reports of two checks."),
    "triton": ("gplq_export.triton.command", "Write or check a model repository for Triton Inference Server."),
    "client": ("gplq_export.triton.client", "Ask a served model what is on images."),
    "load": ("gplq_export.triton.load", "Measure a served model under load, and check every answer."),
    "lint": ("gplq_export.lint", "Find in any ONNX file what engines refuse, slow down or compute differently."),
    "inspect": ("gplq_export.inspect", "Say what a checkpoint, ONNX file or engine holds."),
    "bench": ("gplq_export.bench", "Time the files of an export and PyTorch, interleaved, and give a verdict."),
    "doctor": ("gplq_export.doctor", "Say what works on this machine, and what is missing for the rest."),
}
# What --trt builds; the ONNX files of the other kinds are always written.
ENGINES = {
    "int4": "4-bit weights in storage, multiplied in INT8 (the default)",
    "int8": "the same codes stored in INT8: larger, fewer kernels",
    "fp8": "the same codes carried by FP8 (--sm 89 and later)",
    "fp16": "the twin without quantisers, alone",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``gplq-export``; returns the exit code."""
    # PyTorch's threads would wait actively and take the time of the runtime that is next; read when it is imported.
    for variable, value in (("OMP_WAIT_POLICY", "PASSIVE"), ("GOMP_SPINCOUNT", "0")):
        os.environ.setdefault(variable, value)
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] in COMMANDS:
        return run_command(_command(arguments[0]), arguments[1:])
    return run_command(_parser(), arguments)


def _command(name: str) -> argparse.ArgumentParser:
    module_name, description = COMMANDS[name]
    module = importlib.import_module(module_name)
    parser = argparse.ArgumentParser(
        prog=f"gplq-export {name}",
        description=description,
        epilog="\n\n".join([*getattr(module, "EPILOGS", []), EXIT_CODES]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    parser.set_defaults(run=module.run)
    return parser


def _parser() -> argparse.ArgumentParser:
    others = "\n".join(f"  gplq-export {name:8} {description}" for name, (_, description) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="gplq-export",
        description="Lower a gplq checkpoint to ONNX with explicit INT4 nodes, prove it, and build TensorRT engines.",
        epilog=f"example: gplq-export model.pt --int4 --trt --data images.npz --out dist\n\n"
        f"other commands (--help after each):\n{others}\n\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument("checkpoint", type=Path, help="what 'gplq quantize' wrote")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--img-size", type=positive, help="for square images of so many pixels (default: as trained)")
    parser.add_argument("--data", help="test images to check ONNX against PyTorch with; see 'gplq eval --help'")
    parser.add_argument("--no-labels", action="store_true", help="--data has no labels: compare, but measure no top-1")
    parser.add_argument("--images", type=positive, help="use so many of them (default: all)")
    parser.add_argument("--force", action="store_true", help="overwrite --out (and --triton)")
    parser.add_argument("--openvino", action="store_true", help="also write and check the file for OpenVINO on CPUs")
    parser.add_argument(
        "--triton", type=Path, metavar="DIR", help="also write a repository for Triton Inference Server"
    )
    engines = parser.add_argument_group("engines, each beside its FP16 twin")
    engines.add_argument("--trt", action="store_true", help="build engines with TensorRT or TensorRT-RTX")
    for name, text in ENGINES.items():
        engines.add_argument(f"--{name}", action="store_true", help=text)
    engines.add_argument("--batch-min", type=positive, default=1, help="smallest batch (default: 1)")
    engines.add_argument("--batch-opt", type=positive, default=8, help="most likely batch (default: 8)")
    engines.add_argument("--batch-max", type=positive, default=32, help="largest batch (default: 32)")
    engines.add_argument("--sm", type=_capabilities, help="GPUs to build for, such as 86,89 (default: the builder's)")
    engines.add_argument("--workspace", type=positive, help="most MiB of GPU memory a kernel may use as scratch")
    engines.add_argument("--timing-cache", type=Path, help="file of measured kernel times, read and written (TensorRT)")
    engines.add_argument(
        "--version-compatible", action="store_true", help="plans that later versions run, too; slower (TensorRT)"
    )
    parser.set_defaults(run=_export)
    return parser


def _export(arguments: argparse.Namespace) -> None:
    _check_flags(arguments)
    from gplq.checkpoint import at_image_size, load_checkpoint
    from gplq.data import open_test_images
    from gplq_export.export import export

    checkpoint = load_checkpoint(arguments.checkpoint)
    if arguments.img_size is not None:
        checkpoint = at_image_size(checkpoint, arguments.img_size)
    images = None
    if arguments.data is not None:
        labels = not arguments.no_labels and checkpoint.spec.num_classes > 0
        images = open_test_images(arguments.data, checkpoint, arguments.images, need_labels=labels)
    else:
        print("check: skipped, no images given (--data)")
    result = export(
        checkpoint,
        arguments.out,
        openvino=arguments.openvino,
        engines=_engines(arguments) if arguments.trt else (),
        images=images,
        batch=(arguments.batch_min, arguments.batch_opt, arguments.batch_max),
        compute_capabilities=arguments.sm or (),
        options=_builder_options(arguments),
        reproduce=_reproduce(arguments, checkpoint),
        force=arguments.force,
    )
    print(f"wrote {arguments.out}")
    if arguments.triton is not None:
        _write_repository(arguments, images, result)
    if arguments.data is not None:
        print(
            f"next: look at {arguments.out / 'reports' / 'report.html'}, and bench: gplq-export bench {arguments.out}"
        )
    else:
        print(f"next, to check the numbers: gplq-export check {arguments.out} --data IMAGES")
    if result.problems:
        raise result.problems[0]


def _reproduce(arguments: argparse.Namespace, checkpoint: "Checkpoint") -> str:
    from gplq_export.reproduce import script, typed

    check = ["--no-labels"] * arguments.no_labels + ([f"--images={arguments.images}"] if arguments.images else [])
    options = typed(_parser(), arguments, {"data", "images", "no_labels", "out", "force", "triton"})
    return script(checkpoint, export=options, check=check, data=arguments.data)


def _write_repository(arguments: argparse.Namespace, images: "ImageSet | None", result: "ExportResult") -> None:
    if any(isinstance(problem, GateError) for problem in result.problems):
        print(f"{arguments.triton}: not written, because a gate failed")
        return
    from gplq_export.triton.repository import write_repository

    warm_up = None if images is None else images[0][0].numpy()
    write_repository(arguments.out, arguments.triton, warm_up=warm_up, force=arguments.force, say=print)
    print(f"next, to serve it: see {arguments.triton / 'README.md'}; more options: gplq-export triton --help")


def _engines(arguments: argparse.Namespace) -> list[str]:
    return [name for name in ENGINES if getattr(arguments, name)] or ["int4"]


def _builder_options(arguments: argparse.Namespace) -> BuilderOptions:
    return BuilderOptions(
        workspace=None if arguments.workspace is None else arguments.workspace * 2**20,
        timing_cache=arguments.timing_cache,
        version_compatible=arguments.version_compatible,
    )


def _check_flags(arguments: argparse.Namespace) -> None:
    """A flag without effect is an error: the user believes in something that does not happen."""
    smallest, likely, largest = arguments.batch_min, arguments.batch_opt, arguments.batch_max
    if not smallest <= likely <= largest:
        raise UsageError(f"batches must not fall: --batch-min {smallest}, --batch-opt {likely}, --batch-max {largest}.")
    given = {
        "--batch-min, --batch-opt and --batch-max": (smallest, likely, largest) != (1, 8, 32),
        "--sm": arguments.sm is not None,
        "--workspace": arguments.workspace is not None,
        "--timing-cache": arguments.timing_cache is not None,
        "--version-compatible": arguments.version_compatible,
        **{f"--{name}": getattr(arguments, name) for name in ENGINES if name != "int4"},
    }
    if not arguments.trt and (useless := [flag for flag, is_given in given.items() if is_given]):
        raise UsageError(f"{useless[0]} is about engines, and has no effect without --trt.")
    for flag, is_given in (("--images", arguments.images is not None), ("--no-labels", arguments.no_labels)):
        if is_given and arguments.data is None:
            raise UsageError(f"{flag} has no effect without --data.")


def _capabilities(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"takes numbers such as 86,89; found '{text}'") from error
