"""``gplq-export triton``: a model repository for Triton Inference Server, written from an export or checked."""

import argparse
import json
import sys
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING

from gplq.cli import positive
from gplq.errors import GateError, UsageError
from gplq_export.triton.check import check_repository
from gplq_export.triton.config import ServingOptions
from gplq_export.triton.images import triton_image
from gplq_export.triton.problem import Problem
from gplq_export.triton.repository import add_version, write_repository

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SCHEMA_VERSION = "1.0"
_DEFAULT, _NAME = ServingOptions(), "classifier"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.add_argument("export", type=Path, nargs="?", help="a folder that gplq-export wrote")
    todo = parser.add_mutually_exclusive_group(required=True)
    todo.add_argument("--out", type=Path, help="the repository to write")
    todo.add_argument("--add-version", type=Path, metavar="REPOSITORY", help="add the export to one that was written")
    todo.add_argument("--check", type=Path, metavar="REPOSITORY", help="only check a repository, anybody's")
    parser.add_argument(
        "--image", metavar="TAG", help="the server's release, such as 26.06 (default: newest that fits)"
    )
    parser.add_argument("--json", action="store_true", help="print what --check finds as JSON")
    add_serving_arguments(parser.add_argument_group("what is written"))
    parser.add_argument("--name", default=_NAME, help=f"what the models' names begin with (default: {_NAME})")
    parser.add_argument("--data", help="images, one of which the server warms up with (default: noise)")
    parser.add_argument("--force", action="store_true", help="overwrite --out")


def add_serving_arguments(group: argparse._ArgumentGroup) -> None:
    """What can be chosen about serving."""
    group.add_argument(
        "--serve",
        type=lambda text: text.split(","),
        default=[],
        metavar="FILE,…",
        help="such as cpu,fp32,trt-int4.plan,fp16.plan; end to end with the first (default: cpu and every engine)",
    )
    group.add_argument("--instances", type=positive, default=_DEFAULT.instances, help=_help("copies on the CPU"))
    group.add_argument("--threads", type=positive, default=_DEFAULT.threads, help=_help("threads of each", "threads"))
    group.add_argument(
        "--batch-max", type=positive, default=_DEFAULT.batch_max, help=_help("of ONNX files", "batch_max")
    )
    group.add_argument(
        "--queue-delay-us",
        type=_not_negative,
        default=_DEFAULT.queue_delay_us,
        help=_help("how long a request may wait for others to share a batch with, in µs", "queue_delay_us"),
    )
    group.add_argument(
        "--versions", type=positive, default=_DEFAULT.versions, help=_help("newest to serve", "versions")
    )
    group.add_argument("--top-k", type=positive, default=_DEFAULT.top_k, help=_help("labels to return", "top_k"))


def serving_options(arguments: argparse.Namespace) -> ServingOptions:
    """What :func:`add_serving_arguments` read."""
    return ServingOptions(**{field.name: getattr(arguments, field.name) for field in fields(ServingOptions)})


def run(arguments: argparse.Namespace) -> None:
    """Write, add to, or check a repository.

    Raises:
        UsageError: arguments do not go together, or see :func:`gplq_export.triton.repository.write_repository`.
        GateError: ``--check`` found an error.
        MissingError: tritonclient is not installed.
    """
    if (arguments.check is None) != (arguments.export is not None):
        raise UsageError("give an export to write from, or --check REPOSITORY and no export.")
    _check_flags(arguments)
    image = None if arguments.image is None else triton_image(arguments.image)
    if arguments.check is not None:
        _report(arguments.check, check_repository(arguments.check, image), as_json=arguments.json)
    elif arguments.add_version is not None:
        add_version(arguments.export, arguments.add_version, say=_say)
    else:
        written = write_repository(
            arguments.export,
            arguments.out,
            serve=arguments.serve,
            name=arguments.name,
            options=serving_options(arguments),
            image=image,
            warm_up=None if arguments.data is None else _first_image(arguments.export, arguments.data),
            force=arguments.force,
            say=_say,
        )
        for problem in written.warnings:
            _say(str(problem))
        _say(f"image: {written.image.name}, by {written.image.source} (read {written.image.read})")
        _say(f"next: cd {arguments.out}, and see README.md there; docker compose up --build")


def _check_flags(arguments: argparse.Namespace) -> None:
    """A flag without effect is an error: the user believes in something that does not happen."""
    defaults = {**asdict(_DEFAULT), "serve": [], "name": _NAME, "data": None, "force": False}
    useless = [] if arguments.out is not None else [it for it in defaults if getattr(arguments, it) != defaults[it]]
    useless += ["image"] * (arguments.add_version is not None and arguments.image is not None)
    if useless:
        raise UsageError(f"--{useless[0].replace('_', '-')} has no effect here; it is about --out.")
    if arguments.json and arguments.check is None:
        raise UsageError("--json has no effect without --check.")


def _report(folder: Path, problems: list[Problem], *, as_json: bool) -> None:
    errors = [problem for problem in problems if problem.severity == "error"]
    if as_json:
        content = {"schema_version": SCHEMA_VERSION, "repository": str(folder), "problems": list(map(asdict, problems))}
        _say(json.dumps(content, indent=2))
    else:
        for problem in problems:
            _say(str(problem))
        _say(f"{folder}: {len(errors)} error(s), {len(problems) - len(errors)} warning(s)")
    if errors:
        raise GateError(f"{folder} breaks {len(errors)} rule(s): {', '.join(sorted({it.rule for it in errors}))}.")


def _first_image(export: Path, data: str) -> "NDArray[np.float32]":
    """A test image after preprocessing, [C, H, W]."""
    from gplq.data import open_images
    from gplq.preprocessing import Preprocessing
    from gplq_export.triton.export_folder import Export

    preprocessing = Preprocessing.from_dict(Export(export).preprocessing)
    image: NDArray[np.float32] = open_images(data, "test", preprocessing, need_labels=False)[0][0].numpy()
    return image


def _not_negative(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"takes 0 or more; found {text}")
    return value


def _help(text: str, name: str = "instances") -> str:
    return f"{text} (default: {getattr(_DEFAULT, name)})"


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
