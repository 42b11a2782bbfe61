"""The ``gplq`` command: quantise a model, measure a checkpoint, print the default recipe."""

import argparse
import ast
import contextlib
import io
import logging
import os
import shlex
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from gplq.errors import GplqError, UsageError

EXIT_CODES = """exit codes: 0 fine, 1 a check failed, 2 usage or configuration, 3 something is missing on this machine,
4 export or build failed, 5 built but not at the requested precision, 130 interrupted (Ctrl-C), 143 (SIGTERM)"""
DATA = """data (--data, --eval):
  images.npz               train_images, train_labels, test_images, test_labels; or images, labels
  FOLDER                   train/CLASS/*.jpg and val/CLASS/*.jpg; or CLASS/*.jpg; or tar files instead of CLASS folders
  'shards-{0000..0009}.tar'  WebDataset: key.jpg with key.cls, or with key.json {"label": 3}; also 'shards-*.tar'
  hf:NAME                  Hugging Face data set, of the hub or in a folder (save_to_disk, parquet, ...)
  'hf:NAME?stream=50000'   so many of its images, drawn without downloading all; kept in ~/.cache/gplq
                           more options, with &: split, image, label (columns), config, revision, seed"""
TRUST = "go on although the model's answers speak against the labels (another order of classes, or guessing)"
SKIP = "leave out and report images that cannot be read (default: stop)"


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``gplq``; returns the exit code."""
    return run_command(_parser(), argv)


def run_command(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> int:
    """Parse, run the subcommand's function, turn every error that a user can cause into a message and an exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name that the terminal's encoding lacks is no reason to fail
            stream.reconfigure(errors="backslashreplace")
    arguments = parser.parse_args(argv)
    command: Callable[[argparse.Namespace], None] = arguments.run
    try:
        # Of several processes only the first prints; errors come from all.
        first = os.environ.get("RANK", "0") == "0"
        with _without_warnings(), _ended_in_order(), contextlib.redirect_stdout(sys.stdout if first else io.StringIO()):
            command(arguments)
            sys.stdout.flush()
    except GplqError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt as interruption:
        terminated = isinstance(interruption, _Terminated)
        print(f"\n{parser.prog}: {'terminated' if terminated else 'interrupted'}", file=sys.stderr)
        # CPython notes an interruption inside exec of a string (dataclasses, namedtuples), even one that is caught, and
        # `python -m` then dies of SIGINT whatever code it was to return. The next exec of a string clears the note.
        exec("")
        return 143 if terminated else 130
    except BrokenPipeError:
        # The reader of our output (head, say) went away; there is nobody to tell.
        sys.stderr.close()
        return 0
    return 0


class _Terminated(KeyboardInterrupt):
    """SIGTERM."""


@contextlib.contextmanager
def _ended_in_order() -> Iterator[None]:
    """Make SIGTERM what Ctrl-C is: worker processes and temporary files go with us. A second one ends us at once."""

    def end(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise _Terminated

    ours = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    if ours:
        signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Keep what libraries warn their programmers of out of tables and progress bars, unless Python's -W asks for it.

    Warnings that are to be errors still are.
    """
    before = logging.root.manager.disable
    with warnings.catch_warnings():
        if not sys.warnoptions:
            warnings.showwarning = lambda *_, **__: None
            logging.disable(max(before, logging.WARNING))
        try:
            yield
        finally:
            logging.disable(before)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gplq",
        description="Quantise a timm Vision Transformer to 4-bit weights and activations (GPLQ).",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    from gplq import __version__

    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    quantize = commands.add_parser(
        "quantize",
        help="quantise a model: Stage 1 (activations), Stage 2 (weights)",
        description="Quantise a model. An interrupted run goes on where it was when the same command is given again.",
        epilog=f"example: gplq quantize deit_small_patch16_224 --data /data/imagenet --out model.pt\n\n{DATA}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    quantize.add_argument("model", help="timm model name, folder that timm wrote, or weights file (then --arch)")
    quantize.add_argument("--data", required=True, help="training images, and test images if there are some; see below")
    quantize.add_argument("--out", type=Path, required=True, help="the checkpoint to write, such as model.pt")
    quantize.add_argument("--eval", metavar="DATA", help="test images, if --data has none")
    quantize.add_argument("--eval-images", type=positive, help="measure on so many test images (default: all)")
    quantize.add_argument(
        "--class-order",
        metavar="ORDER",
        help="of class folders: alphabetical (torchvision), natural (timm's train.py), or a file, one class a line",
    )
    quantize.add_argument("--trust-labels", action="store_true", help=TRUST)
    quantize.add_argument("--skip-bad-images", action="store_true", help=SKIP)
    quantize.add_argument("--recipe", type=Path, help="YAML recipe (default: the paper's; see 'gplq recipe')")
    quantize.add_argument("--arch", help="timm architecture, if MODEL is a weights file")
    quantize.add_argument(
        "--num-classes",
        type=not_negative,
        help="classes of a weights file (default: from its head); 0: without the classifier, any model",
    )
    quantize.add_argument("--model-arg", action="append", default=[], metavar="KEY=VALUE", help="such as img_size=70")
    quantize.add_argument(
        "--checkpoint-key",
        metavar="KEY",
        help="which weights of a file that holds several, such as state_dict (default: averaged ones, EMA, if any)",
    )
    quantize.add_argument("--force", action="store_true", help="overwrite --out")
    images = quantize.add_argument_group("preprocessing (default: what the weights' configuration says)")
    images.add_argument("--mean", type=numbers, metavar="M[,M,M]", help="of pixels in 0 … 1, such as 0.485,0.456,0.406")
    images.add_argument("--std", type=numbers, metavar="S[,S,S]", help="likewise")
    images.add_argument("--interpolation", help="nearest, bilinear, bicubic, lanczos, box or hamming")
    images.add_argument(
        "--crop-pct", type=float, metavar="SHARE", help="of the resized image that is seen, such as 0.9"
    )
    images.add_argument("--crop-mode", help="center, squash or border, as timm means them")
    quantize.set_defaults(run=_quantize)

    evaluate = commands.add_parser(
        "eval",
        help="measure the top-1 accuracy of a checkpoint",
        epilog=DATA,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    evaluate.add_argument("checkpoint", type=Path)
    evaluate.add_argument("--data", required=True, help="test images; see below")
    evaluate.add_argument("--images", type=positive, help="measure on so many of them (default: all)")
    evaluate.add_argument("--trust-labels", action="store_true", help=TRUST)
    evaluate.add_argument("--skip-bad-images", action="store_true", help=SKIP)
    evaluate.set_defaults(run=_eval)

    models = commands.add_parser(
        "models",
        help="which models can be quantised, and what of each",
        description="Without a name: one architecture of each family of timm that the tests cover. With one: what of "
        "it is quantised and what stays in floating point, with the reason. Needs no weights.",
    )
    models.add_argument("architecture", nargs="?", help="a timm architecture, such as swin_tiny_patch4_window7_224")
    models.set_defaults(run=_models)

    recipe = commands.add_parser("recipe", help="print a recipe with every key, ready to be edited")
    recipe.add_argument("--recipe", type=Path, help="start from this recipe instead of the defaults")
    recipe.set_defaults(run=_recipe)
    return parser


def _quantize(arguments: argparse.Namespace) -> None:
    from gplq.models import load_model
    from gplq.pipeline import check_output, quantize
    from gplq.recipe import Recipe

    # Whatever can be wrong with the command line is found before the model is loaded.
    recipe = Recipe() if arguments.recipe is None else Recipe.from_yaml(arguments.recipe)
    model_args = dict(_key_value(text) for text in arguments.model_arg)
    check_output(arguments.out, arguments.force)
    settings = {key: getattr(arguments, key) for key in ("mean", "std", "interpolation", "crop_pct", "crop_mode")}
    source = load_model(
        arguments.model,
        arch=arguments.arch,
        model_args=model_args,
        num_classes=arguments.num_classes,
        checkpoint_key=arguments.checkpoint_key,
        preprocessing={key: value for key, value in settings.items() if value is not None},
    )
    print(f"{source.spec.architecture}, {sum(p.numel() for p in source.model.parameters()):,} parameters")
    print(f"preprocessing: {source.preprocessing}")
    quantize(
        source,
        arguments.data,
        arguments.out,
        recipe,
        eval_data=arguments.eval,
        eval_images=arguments.eval_images,
        bad_images="skip" if arguments.skip_bad_images else "fail",
        class_order=arguments.class_order,
        trust_labels=arguments.trust_labels,
        force=arguments.force,
    )
    print(f"wrote {arguments.out} ({arguments.out.stat().st_size:,} bytes)")
    data = shlex.quote(arguments.eval or arguments.data)
    # Labels that it has been done without need not exist.
    unlabelled = source.spec.num_classes > 0 and not arguments.eval and recipe.stage1.task_weight == 0
    flags = "--int4 --trt --no-labels" if unlabelled else "--int4 --trt"
    print(f"next: gplq-export {arguments.out} {flags} --data {data} --out dist")


def _eval(arguments: argparse.Namespace) -> None:
    from gplq.checkpoint import load_checkpoint
    from gplq.data import open_test_images
    from gplq.doubt import trusted_top1

    checkpoint = load_checkpoint(arguments.checkpoint)
    if checkpoint.spec.num_classes == 0:
        raise UsageError(f"{arguments.checkpoint} has no classifier, and so no accuracy. gplq-export --data checks it.")
    images = open_test_images(
        arguments.data, checkpoint, arguments.images, "skip" if arguments.skip_bad_images else "fail"
    )
    trust = arguments.trust_labels or checkpoint.trusts_labels
    accuracy = trusted_top1(checkpoint.model, images, checkpoint.spec.num_classes, "Checkpoint", trust_labels=trust)
    print(f"{arguments.checkpoint} top-1 {accuracy}   (n = {accuracy.n})")


def _models(arguments: argparse.Namespace) -> None:
    from gplq.coverage import FAMILIES, cover

    rows = {"": arguments.architecture} if arguments.architecture else FAMILIES
    print(f"{'family':24} {'architecture':33} {'linears':>7} {'convs':>5} {'products':>8}  weights in 4 or 8 bits")
    for family, architecture in rows.items():
        found = cover(architecture)
        counts = f"{found.linears:7} {found.convolutions:5} {found.products:8}"
        print(f"{family:24} {architecture:33} {counts}  {100 * found.share:.1f} %")
        sys.stdout.flush()
    if not arguments.architecture:
        print("\nconvs: convolutions; products: of two activations, in attention. 'gplq models NAME' tells more of any")
        print(
            "architecture of timm.list_models(), also of other families: what gplq cannot quantise, it refuses by name."
        )
        return
    print(f"\nunits (Stage 2 and parity go unit by unit): {', '.join(found.units)}")
    print("in floating point: norms, activations, softmax, embeddings, biases" + ("; and" if found.floats else ""))
    for name, reason in found.floats.items():
        print(f"  {name}: {reason}")


def _recipe(arguments: argparse.Namespace) -> None:
    from gplq.recipe import Recipe

    recipe = Recipe() if arguments.recipe is None else Recipe.from_yaml(arguments.recipe)
    print(recipe.to_yaml(), end="")


def _key_value(text: str) -> tuple[str, Any]:
    key, separator, value = text.partition("=")
    if not separator or not key.isidentifier():
        raise UsageError(f"--model-arg takes KEY=VALUE, such as img_size=70; found '{text}'.")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value


def numbers(text: str) -> tuple[float, ...]:
    """An argument that is one number or several, with commas."""
    return tuple(float(part) for part in text.split(","))


def positive(text: str) -> int:
    """An argument that is an integer of at least 1."""
    return _at_least(1, text)


def not_negative(text: str) -> int:
    """An argument that is an integer of at least 0."""
    return _at_least(0, text)


def _at_least(lowest: int, text: str) -> int:
    value = int(text)
    if value < lowest:
        raise argparse.ArgumentTypeError(f"must be at least {lowest}, found {value}")
    return value
