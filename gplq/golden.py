"""The golden probe: a few outputs that a checkpoint carries with it, to notice when its images are prepared otherwise.

What is stored is what the network *without rounding* says to eight test images. With rounding, a last bit may move a
code and with it all that follows, so that two correct machines agree only on average; without, the network is smooth,
and they agree to 1e-6: with DINOv2-S, another order of summation moves the outputs by 7e-7 of themselves, FP64 by 6e-7.
Images prepared otherwise move them by far more: a single pixel off by 1 / 255 by 5e-5, a mean off by 1e-4 by 7e-5, and
bilinear interpolation instead of bicubic by 0.09.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from gplq.data import BadImage, ImageSet
from gplq.errors import DataError
from gplq.integer import set_rounding
from gplq.processes import device_of

IMAGES = 8
_NUMBERS = 1000  # of an image, at most: about 80 kB as text for eight


class Golden(BaseModel):
    """What a checkpoint carries.

    Attributes:
        source: of the images, for messages. ``fingerprint``: of all of them, see :class:`gplq.data.ImageSet`.
        rows: numbers of the images in the source.
        shape: of an image as the model gets it, [C, H, W].
        outputs: for each output of the model and each image, at most 1,000 numbers in all of an image: the output
            itself, or the means of as many pieces of it.
    """

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    source: str
    fingerprint: str
    rows: list[int]
    shape: list[int]
    outputs: list[list[list[float]]]


def record(model: nn.Module, images: ImageSet) -> dict[str, Any]:
    """What ``model``, frozen, says without rounding to eight of ``images``, evenly spread; plain data, see `Golden`.

    Raises:
        DataError: none of the images can be read.
    """
    rows: list[int] = []
    inputs: list[Tensor] = []
    # Of each eighth the first that can be read; whether an unreadable one is fatal is not decided here.
    for part in torch.arange(len(images)).tensor_split(IMAGES):
        for index in part.tolist():
            found = images.read_row(images.rows[index])
            if not isinstance(found, BadImage):
                rows.append(images.rows[index])
                inputs.append(found)
                break
    if not inputs:
        raise DataError(f"{images.source}: none of {len(images)} images can be read.")
    batch = torch.stack(inputs)
    outputs = [[[float(f"{x:.7g}") for x in image] for image in output.tolist()] for output in _outputs(model, batch)]
    return Golden(
        source=images.source,
        fingerprint=images.source_fingerprint,
        rows=rows,
        shape=list(batch.shape[1:]),
        outputs=outputs,
    ).model_dump()


def difference(golden: Any, model: nn.Module, images: ImageSet) -> float | str:
    """How far ``model``, prepared for images as ``images`` are, is from what was recorded; or why that cannot be said.

    Args:
        golden: what :func:`record` returned, as the checkpoint has it; None if it has none.
        model: frozen; [B, C, H, W] -> outputs.
        images: the test images, all or some of them, with the preprocessing to be judged.

    Returns:
        Of the image that differs most: the norm of the difference of its outputs, relative to that of the recorded
        ones; infinite if an image can no longer be read, or an output is not finite.
    """
    if golden is None:
        return "the checkpoint has no golden outputs: it was written by an older version, or by other means"
    try:
        known = Golden.model_validate(golden)
    except ValidationError as error:
        return f"the checkpoint's golden outputs are damaged: {error.errors()[0]['msg']}"
    if known.fingerprint != images.source_fingerprint:
        return f"they are of other images: {known.source}, not {images.source}"
    if not known.rows or not all(0 <= row < len(images.pictures) for row in known.rows):
        return "the checkpoint's golden outputs are damaged: they name images that do not exist"
    inputs = [found for row in known.rows if not isinstance(found := images.read_row(row), BadImage)]
    if len(inputs) < len(known.rows):
        return math.inf
    batch = torch.stack(inputs)
    if list(batch.shape[1:]) != known.shape:
        return f"they are for images of {known.shape}, not {list(batch.shape[1:])}"
    now, then = _outputs(model, batch), [_as_matrix(output) for output in known.outputs]
    if [x.shape for x in now] != [x.shape for x in then]:
        return "the checkpoint's golden outputs are damaged: they are not of this network"
    ours, theirs = torch.cat(now, 1), torch.cat(then, 1)
    each = (ours - theirs).norm(dim=1) / theirs.norm(dim=1)
    return float(each.nan_to_num(nan=math.inf).max())


@torch.inference_mode()
def _outputs(model: nn.Module, batch: Tensor) -> list[Tensor]:
    """Of each of the model's outputs, without rounding, at most so many numbers that they fit: [B, N], FP64."""
    set_rounding(model, rounding=False)
    try:
        outputs = [output.cpu().double().flatten(1) for output in tree_leaves(model(batch.to(device_of(model))))]
    finally:
        set_rounding(model, rounding=True)
    most = _NUMBERS // len(outputs)
    return [output if output.shape[1] <= most else F.adaptive_avg_pool1d(output, most) for output in outputs]


def _as_matrix(rows: list[list[float]]) -> Tensor:
    """[B, N], FP64; empty if the rows are not of one length."""
    return torch.tensor(rows if len({len(row) for row in rows}) == 1 else [[]], dtype=torch.float64)
