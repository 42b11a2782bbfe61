"""How an image becomes a tensor: timm's evaluation transform, and where its settings come from."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from timm.data import DEFAULT_CROP_PCT, create_transform


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes a tensor; timm's data config of the model.

    ``input_size``: (channels, height, width) in pixels; ``mean``, ``std``: per channel, of pixels in 0 … 1.
    """

    input_size: tuple[int, int, int]
    interpolation: str
    crop_pct: float
    crop_mode: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "Preprocessing":
        """Inverse of :meth:`to_dict`; also takes timm's data config. Unknown keys are ignored."""
        channels, height, width = (int(size) for size in content["input_size"])
        return cls(
            input_size=(channels, height, width),
            interpolation=str(content["interpolation"]),
            crop_pct=float(content["crop_pct"]),
            crop_mode=str(content["crop_mode"]),
            mean=tuple(float(value) for value in content["mean"]),
            std=tuple(float(value) for value in content["std"]),
        )

    def transform(self) -> Any:
        """The evaluation transform: PIL image -> float32 [C, H, W]."""
        return create_transform(**asdict(self), is_training=False)

    def steps(self) -> list[str]:
        """The same in words, for whoever writes it in another language: from the image to the tensor.

        >>> photos = Preprocessing((3, 224, 224), "bicubic", 0.875, "center", (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
        >>> print(photos.steps()[1])
        resize, bicubic with antialiasing: the shorter side to 256 pixels, the other in proportion (rounded down)
        """
        channels, height, width = self.input_size
        # As timm does: fractions of a pixel are cut off, and 0 stands for its default.
        tall, wide = (math.floor(side / (self.crop_pct or DEFAULT_CROP_PCT)) for side in (height, width))
        if self.crop_mode == "squash":
            resized = f"to {tall} x {wide} pixels, whatever the proportions"
        elif self.crop_mode == "border":
            resized = f"in proportion (rounded), as large as fits into {tall} x {wide} pixels"
        elif tall == wide:
            resized = f"the shorter side to {tall} pixels, the other in proportion (rounded down)"
        else:
            resized = f"in proportion (rounded), as small as covers {tall} x {wide} pixels"
        fill = [round(255 * mean) for mean in self.mean] if self.crop_mode == "border" else [0]
        padded = self.crop_mode == "border" or tall < height or wide < width
        # Pillow's, which averages over all pixels that fall together.
        smooth = "" if self.interpolation == "nearest" else " with antialiasing"
        return [
            f"convert to {'grey' if self.image_mode == 'L' else 'RGB'}, 8 bits a channel",
            f"resize, {self.interpolation}{smooth}: {resized}",
            f"crop the middle {height} x {width} pixels" + f", filled up with {_listed(fill)}" * padded,
            f"divide by 255, channels first: float32 [{channels}, {height}, {width}], 0 to 1",
            f"subtract {_listed(self.mean)}",
            f"divide by {_listed(self.std)}",
        ]

    @property
    def image_mode(self) -> str:
        """The PIL mode that the model wants."""
        return "L" if self.input_size[0] == 1 else "RGB"


def _listed(numbers: Sequence[float]) -> str:
    """Numbers of the channels, or the one that is all of theirs.

    >>> _listed((0.485, 0.456)), _listed((0.5, 0.5))
    ('(0.485, 0.456)', '0.5')
    """
    if len(set(numbers)) == 1:
        return f"{numbers[0]:.9g}"
    return f"({', '.join(f'{number:.9g}' for number in numbers)})"
