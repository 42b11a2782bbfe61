"""Pictures of every kind -> 8 bits a channel, as timm and torchvision read them; refused where that leaves nothing.

gplq_export/triton/preprocess.py does the same in the server, where this package is not.
"""

from PIL import Image

# Pillow converts these to 8 bits by cutting off, not by scaling: nearly every picture becomes white, or black.
_TOO_WIDE = "it has {} pixels, whose range nobody knows: convert it to 8 bits a channel"
_WIDE_MODES = {
    **{mode: _TOO_WIDE.format("16-bit grey") for mode in ("I;16", "I;16L", "I;16B", "I;16N")},
    "I": _TOO_WIDE.format("16- or 32-bit integer"),
    "F": _TOO_WIDE.format("floating-point"),
}


def as_mode(image: Image.Image, mode: str) -> Image.Image:
    """The first picture of a file in "RGB" or "L". Transparency is dropped, orientation is left as it is stored.

    Raises:
        ValueError: its pixels have more than 8 bits, or all there is to see is in its transparency.
    """
    if image.mode in _WIDE_MODES:
        raise ValueError(_WIDE_MODES[image.mode])
    converted = image.convert(mode)
    if image.has_transparency_data and _is_constant(converted) and not _is_constant(_alpha(image)):
        raise ValueError("its picture is in its transparency alone, which models do not see: paint it on a background")
    return converted


def _alpha(image: Image.Image) -> Image.Image:
    return image.convert("RGBA").getchannel("A")


def _is_constant(image: Image.Image) -> bool:
    return all(low == high for low, high in (band.getextrema() for band in image.split()))
