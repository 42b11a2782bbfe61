"""What pyproject.toml allows is what `make test-oldest` installs, and what a server's image is held against."""

import re
import tomllib
from pathlib import Path

import pytest

from gplq_export.triton.images import OLDEST_ONNXRUNTIME, version_numbers

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
# Not installed there: builders for machines with a GPU, and the tools that look at the source.
ABSENT = {"onnxruntime-gpu", "tensorrt", "polygraphy", "pycuda", "build", "mypy", "ruff", "types-pyyaml", "types-tqdm"}


def bounds() -> dict[str, str]:
    """Package -> its lower bound."""
    wanted = [*PROJECT["dependencies"], *(requirement for extra in EXTRAS.values() for requirement in extra)]
    found = [re.fullmatch(r"([\w-]+)(?:\[[\w,]+\])?>=([\d.]+),<[\d.]+", requirement) for requirement in wanted]
    assert all(found), wanted
    return {match[1].lower(): match[2] for match in found if match is not None}


def oldest() -> dict[str, str]:
    """Package -> its version in constraints-oldest.txt."""
    lines = (ROOT / "constraints-oldest.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def test_every_lower_bound_is_tried() -> None:
    assert oldest().keys() == bounds().keys() - ABSENT


@pytest.mark.parametrize("package", oldest())
def test_lower_bound_is_the_version_that_is_tried(package: str) -> None:
    bound, tried = version_numbers(bounds()[package]), version_numbers(oldest()[package])
    assert tried[: len(bound)] == bound
    assert not any(tried[len(bound) :]) or package.startswith("tensorrt")  # 1.6 was never released as such


def test_image_of_a_server_may_be_older_than_what_checks() -> None:
    assert bounds()["onnxruntime"] == bounds()["onnxruntime-gpu"]
    assert version_numbers(OLDEST_ONNXRUNTIME) <= version_numbers(bounds()["onnxruntime"])
