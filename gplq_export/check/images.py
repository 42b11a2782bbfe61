"""The images of a check: batches from anywhere on, a few of them, and what to call each."""

import base64
import hashlib
import io
import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from gplq.data import ImageSet, batches
from gplq.preprocessing import Preprocessing
from gplq_export.check.report import Data

Images = ImageSet | Sequence[Tensor]
_THUMBNAIL = 48  # pixels


class Source:
    """An image set, with labels or without; or batches [B, C, H, W], just as the model gets them."""

    def __init__(self, images: Images) -> None:
        self.images = images
        self.count = len(images) if isinstance(images, ImageSet) else sum(map(len, images))

    def few(self, count: int) -> "Source":
        """At least so many of them, if there are."""
        if isinstance(self.images, ImageSet):
            return Source(self.images.head(count))
        sizes = itertools.accumulate(map(len, self.images))
        return Source(self.images[: sum(size < count for size in sizes) + 1])

    def batches(self, size: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Images and labels from number ``start`` on; the label is -1 where there is none."""
        if isinstance(self.images, ImageSet):
            yield from batches(self.images, size, range(start, self.count))
            return
        for inputs in self.images:
            rest = inputs[start:]
            start = max(start - len(inputs), 0)
            for part in rest.split(size) if len(rest) else ():
                yield part, torch.full([len(part)], -1)

    @property
    def labelled(self) -> bool:
        """Whether every image has a label."""
        return isinstance(self.images, ImageSet) and min(self.images.labels) >= 0

    def name(self, index: int) -> str:
        """What to call an image."""
        if isinstance(self.images, ImageSet):
            return self.images.pictures.name(self.images.rows[index])
        return f"image {index}"

    def picture(self, index: int) -> str | None:
        """A thumbnail, PNG in base64."""
        if not isinstance(self.images, ImageSet):
            return None
        with self.images.pictures.open(self.images.rows[index]) as image:
            small = image.convert("RGB")
            small.thumbnail((_THUMBNAIL, _THUMBNAIL))
            buffer = io.BytesIO()
            small.save(buffer, "PNG")
        return base64.b64encode(buffer.getvalue()).decode()

    def fingerprint(self) -> str:
        """Identifies the images."""
        if isinstance(self.images, ImageSet):
            return self.images.fingerprint
        digest = hashlib.sha256()
        for inputs in self.images:
            digest.update(np.ascontiguousarray(inputs.numpy()).tobytes())
        return digest.hexdigest()

    def describe(self, preprocessing: Preprocessing, *, random: bool) -> Data:
        """For the report."""
        images = self.images
        return Data(
            source="random numbers" if random else images.source if isinstance(images, ImageSet) else "",
            sha256=self.fingerprint(),
            images=self.count,
            labels=self.labelled,
            random=random,
            transform=preprocessing.steps() if isinstance(images, ImageSet) else [],
        )
