"""How an image becomes a tensor: timm's evaluation transform, and where its settings come from."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from timm.data import DEFAULT_CROP_PCT, create_transform, resolve_data_config
from torch import nn

from gplq.errors import ModelError
from gplq.survey import input_size

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")
CROP_MODES = ("center", "squash", "border")
GIVEN = "given"  # where a setting comes from: the user
# What weights were trained with; the size of the images is the network's.
SETTINGS = ("mean", "std", "interpolation", "crop_pct", "crop_mode")


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

    def __post_init__(self) -> None:
        """Refuse what would fail at every image, or prepare it wrongly.

        Raises:
            ValueError: see above.
        """
        channels = self.input_size[0]
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != channels:
                raise ValueError(f"{name} has {len(values)} numbers {_listed(values)} for {channels} channel(s)")
        if not all(0 <= value <= 1 for value in self.mean):
            raise ValueError(f"mean {_listed(self.mean)} is not of pixels in 0 … 1; divide those of 0 … 255 by 255")
        if not all(0 < value <= 1 for value in self.std):
            raise ValueError(
                f"std {_listed(self.std)} is not of pixels in 0 … 1, or not positive; divide those of 0 … 255 by 255"
            )
        if not 0 <= self.crop_pct < math.inf:
            raise ValueError(f"crop_pct {self.crop_pct} is no share of the image")
        for name, value, known in (
            ("interpolation", self.interpolation, INTERPOLATIONS),
            ("crop_mode", self.crop_mode, CROP_MODES),
        ):
            if value not in known:
                raise ValueError(f"{name} '{value}' is none of {', '.join(known)}")

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

    def settings(self) -> dict[str, Any]:
        """Those of :data:`SETTINGS`; plain data."""
        return {key: value for key, value in self.to_dict().items() if key in SETTINGS}

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

    def __str__(self) -> str:
        channels, height, width = self.input_size
        crop = f"crop_pct {self.crop_pct or DEFAULT_CROP_PCT} ({self.crop_mode})"
        scale = f"mean {_listed(self.mean)}, std {_listed(self.std)}"
        return f"{channels} x {height} x {width}, {self.interpolation}, {crop}, {scale}"

    @property
    def image_mode(self) -> str:
        """The PIL mode that the model wants."""
        return "L" if self.input_size[0] == 1 else "RGB"


@dataclass(frozen=True)
class Resolved:
    """A preprocessing, and for each of :data:`SETTINGS` where it comes from.

    Attributes:
        assumed: in words, what nobody has said; empty if there is nothing.
    """

    preprocessing: Preprocessing
    origins: dict[str, str]
    assumed: str


def resolve(model: nn.Module, config: Mapping[str, Any] | None, where: str, given: Mapping[str, Any]) -> Resolved:
    """What is ``given``, or else what the weights' configuration says, or else what timm assumes, which is said.

    A mean or deviation of another length than the model has channels is spread over them if it is one number, or one
    number repeated, and refused otherwise.

    Args:
        model: a timm model, for the size and the channels of its images, and what its architecture's own weights want.
        config: timm's, of the weights (its ``pretrained_cfg``); None if they have none.
        where: it is from, for messages.
        given: any of :data:`SETTINGS`, by the user.

    Raises:
        ModelError: some of it cannot be used.
    """
    own: dict[str, Any] = dict(getattr(model, "pretrained_cfg", {})) if config is None else {}
    config = config or {}
    merged = {**own, **config, **given}
    origins = dict.fromkeys(SETTINGS, "assumed: timm's default")
    for source, name in ((own, _weights_of(own)), (config, where), (given, GIVEN)):
        origins |= {key: name for key in SETTINGS if source.get(key)}
    try:
        size = input_size(model)
        found = resolve_data_config({"input_size": size}, pretrained_cfg=merged)
        spread = {key: _spread(found[key], size[0]) for key in ("mean", "std")}
        preprocessing = Preprocessing.from_dict({**found, **spread})
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        raise ModelError(
            f"the preprocessing cannot be used ({_sources(origins)}): {error}. Give the right one with --mean, --std, "
            "--interpolation, --crop-pct or --crop-mode."
        ) from error
    values = preprocessing.settings()
    unknown = [key for key in SETTINGS if origins[key].startswith("assumed")]
    told = ", ".join(f"{key} {_said(values[key])}" for key in unknown)
    assumed = ""
    if unknown:
        as_of = " and ".join(sorted({origins[key].removeprefix("assumed: ") for key in unknown}))
        assumed = f"{told}, which is {as_of}; {where} does not say ({', '.join(map(option, unknown))})"
    return Resolved(preprocessing, origins, assumed)


def _weights_of(own: Mapping[str, Any]) -> str:
    tag = f".{own['tag']}" if own.get("tag") else ""
    return f"assumed: what timm's own weights {own.get('architecture', '')}{tag} want"


def _sources(origins: Mapping[str, str]) -> str:
    return "; ".join(dict.fromkeys(f"{key} {origin}" for key, origin in origins.items() if key in ("mean", "std")))


def option(setting: str) -> str:
    """The option of ``gplq quantize`` that gives one of :data:`SETTINGS`."""
    return f"--{setting.replace('_', '-')}"


def _said(value: Any) -> str:
    return _listed(value) if isinstance(value, list) else str(value)


def _spread(values: Any, channels: int) -> tuple[float, ...]:
    """Numbers of the channels, from one, or from equal ones of other channels; as they are if that cannot be."""
    numbers = (float(values),) if isinstance(values, int | float) else tuple(float(value) for value in values)
    return numbers[:1] * channels if len(set(numbers)) == 1 else numbers


def _listed(numbers: Sequence[float]) -> str:
    """Numbers of the channels, or the one that is all of theirs.

    >>> _listed((0.485, 0.456)), _listed((0.5, 0.5))
    ('(0.485, 0.456)', '0.5')
    """
    if len(set(numbers)) == 1:
        return f"{numbers[0]:.9g}"
    return f"({', '.join(f'{number:.9g}' for number in numbers)})"
