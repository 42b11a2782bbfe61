"""The ``gplq-export`` command: a checkpoint in; ONNX files, engines and their proof out."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from gplq import __version__
from gplq.cli import EXIT_CODES, positive, run_command
from gplq.errors import UsageError


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``gplq-export``; returns the exit code."""
    return run_command(_parser(), argv)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gplq-export",
        description="Lower a gplq checkpoint to ONNX with explicit INT4 nodes, prove it, and build TensorRT engines.",
        epilog=f"example: gplq-export model.pt --int4 --trt --data images.npz --out dist\n\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument("checkpoint", type=Path, help="what 'gplq quantize' wrote")
    parser.add_argument(
        "--int4",
        action="store_true",
        required=True,
        help="INT4 weights in storage and a 4-bit activation grid (carried by INT8 in TensorRT)",
    )
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--trt", action="store_true", help="build engines with TensorRT or TensorRT-RTX")
    parser.add_argument("--data", help="test images to check ONNX against PyTorch with; see 'gplq eval --help'")
    parser.add_argument("--no-labels", action="store_true", help="--data has no labels: compare, but measure no top-1")
    parser.add_argument("--images", type=positive, help="use so many of them (default: all)")
    parser.add_argument("--batch-min", type=positive, default=1, help="smallest batch of the engines (default: 1)")
    parser.add_argument("--batch-opt", type=positive, default=8, help="most likely batch (default: 8)")
    parser.add_argument("--batch-max", type=positive, default=32, help="largest batch (default: 32)")
    parser.add_argument("--sm", type=_capabilities, help="GPUs to build for, such as 86,89 (default: the builder's)")
    parser.add_argument("--force", action="store_true", help="overwrite --out")
    parser.set_defaults(run=_export)
    return parser


def _export(arguments: argparse.Namespace) -> None:
    _check_flags(arguments)
    from gplq.checkpoint import load_checkpoint
    from gplq.data import open_test_images
    from gplq_export.export import export

    checkpoint = load_checkpoint(arguments.checkpoint)
    images = None
    if arguments.data is not None:
        labels = not arguments.no_labels and checkpoint.spec.num_classes > 0
        images = open_test_images(arguments.data, checkpoint, arguments.images, need_labels=labels)
    else:
        print("parity: skipped, no images given (--data)")
    result = export(
        checkpoint,
        arguments.out,
        trt=arguments.trt,
        images=images,
        batch=(arguments.batch_min, arguments.batch_opt, arguments.batch_max),
        compute_capabilities=arguments.sm or (),
        force=arguments.force,
    )
    if result.parity is not None:
        parity = result.parity
        forced, free = parity.forced_equal(), parity.free_equal()
        count = f"(n = {parity.agreement.n})"
        if parity.torch_top1 is not None:
            print(f"top-1: PyTorch {parity.torch_top1}, ONNX Runtime {parity.onnx_top1} {count}")
        print(f"{parity.compared}: {parity.agreement}; noise floor of PyTorch itself: {parity.noise_floor} {count}")
        print(f"codes equal, same input: {forced.total - forced.different:,} of {forced.total:,}")
        print(f"codes equal, free-running: {100 * (1 - free.share):.3f} %")
    print(f"wrote {arguments.out}")
    if arguments.data is not None:
        print(f"next: look at {arguments.out / 'reports' / 'layers.svg'} and {arguments.out / 'manifest.json'}")
    else:
        again = f"gplq-export {arguments.checkpoint} --int4 --data IMAGES --out {arguments.out} --force"
        print(f"next, to check the numbers: {again}")
    if result.problems:
        raise result.problems[0]


def _check_flags(arguments: argparse.Namespace) -> None:
    """A flag without effect is an error: the user believes in something that does not happen."""
    smallest, likely, largest = arguments.batch_min, arguments.batch_opt, arguments.batch_max
    if not smallest <= likely <= largest:
        raise UsageError(f"batches must not fall: --batch-min {smallest}, --batch-opt {likely}, --batch-max {largest}.")
    if not arguments.trt and (arguments.sm or (smallest, likely, largest) != (1, 8, 32)):
        raise UsageError("--sm and --batch-… are about engines: they have no effect without --trt.")
    for flag, given in (("--images", arguments.images is not None), ("--no-labels", arguments.no_labels)):
        if given and arguments.data is None:
            raise UsageError(f"{flag} has no effect without --data.")


def _capabilities(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"takes numbers such as 86,89; found '{text}'") from error
