"""Which TensorRT and ONNX Runtime the images of Triton Inference Server hold: NVIDIA's table, as read on a day."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gplq.errors import UsageError

_TABLE = Path(__file__).with_suffix(".json")
OLDEST_ONNXRUNTIME = "1.23"  # that our files for CPUs were tried with; a check needs the newer one of pyproject.toml
_FLAVOURS = ("py3", "trtllm-python-py3")  # the first is the standard image


@dataclass(frozen=True)
class TritonImage:
    """An image of nvcr.io/nvidia/tritonserver. ``tensorrt``: None if NVIDIA's table does not say."""

    release: str
    flavour: str
    tensorrt: str | None
    onnxruntime: str
    source: str
    read: str

    @property
    def name(self) -> str:
        """What docker pulls."""
        return f"nvcr.io/nvidia/tritonserver:{self.release}-{self.flavour}"


def triton_image(tag: str) -> TritonImage:
    """What is known about an image by its tag: "26.06", "26.06-py3" or "26.06-trtllm-python-py3".

    Raises:
        UsageError: the tag is of another form, or the table has no such release.
    """
    table = _read_table()
    releases = table["releases"]
    found = re.fullmatch(rf"(\d\d\.\d\d)(?:-({'|'.join(_FLAVOURS)}))?", tag)
    if found is None or found[1] not in releases:
        raise UsageError(
            f"--triton {tag}: not in the table, which has releases {min(releases)} to {max(releases)}, each as "
            f"RELEASE, {' or '.join(f'RELEASE-{image}' for image in _FLAVOURS)} (NVIDIA's, read {table['read']})."
        )
    release, flavour = found[1], found[2] or _FLAVOURS[0]
    entry = releases[release]
    return TritonImage(release, flavour, entry.get(flavour), entry["onnxruntime"], table["source"], table["read"])


def newest_image(tensorrt: str | None = None) -> TritonImage | None:
    """The newest standard image that runs our ONNX files; and, if given, whose release has that version of TensorRT."""
    for release in sorted(_read_table()["releases"], reverse=True):
        image = triton_image(release)
        theirs = release_tensorrt(image)
        fits = tensorrt is None or (theirs is not None and same_version(tensorrt, theirs))
        if fits and version_numbers(image.onnxruntime) >= version_numbers(OLDEST_ONNXRUNTIME):
            return image
    return None


def release_tensorrt(image: TritonImage) -> str | None:
    """The TensorRT of an image; of its release, if the table does not say it for the image; None if it says neither."""
    releases = _read_table()["releases"]
    return image.tensorrt or releases[image.release].get("trtllm-python-py3")


def _read_table() -> Any:
    return json.loads(_TABLE.read_text(encoding="utf-8"))


def same_version(ours: str, theirs: str) -> bool:
    """Whether versions agree as far as both are given.

    >>> same_version("10.7.0.23", "10.7.0"), same_version("10.7.0.23", "10.7.1"), same_version("11.0", "1")
    (True, False, False)
    """
    parts = version_numbers(ours), version_numbers(theirs)
    length = min(map(len, parts))
    return length > 1 and parts[0][:length] == parts[1][:length]


def version_numbers(text: str) -> tuple[int, ...]:
    """The numbers that a version begins with.

    >>> version_numbers("2.15.0+cpu"), version_numbers("10.14.1.48.post1") < version_numbers("10.14.2")
    ((2, 15, 0), True)
    """
    found = re.match(r"\d+(\.\d+)*", text)
    return tuple(int(part) for part in found[0].split(".")) if found else ()
