"""Which timm models gplq quantises, and what of each: ``gplq models``.

Nothing here decides anything: :func:`cover` builds an architecture on the meta device and asks :mod:`gplq.convert`.
"""

from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import nn

from gplq.convert import is_plain_attention, plan
from gplq.errors import ModelError
from gplq.models import ModelSpec
from gplq.survey import input_size, survey

# One architecture of each family, which the tests take through quantise, save, load, export and parity.
FAMILIES = {
    "ViT, AugReg": "vit_tiny_patch16_224",
    "ViT, relative positions": "vit_relpos_small_patch16_224",
    "ViT, rotary positions": "vit_small_patch16_rope_224",
    "CLIP": "vit_base_patch16_clip_224",
    "SigLIP": "vit_base_patch16_siglip_224",
    "DeiT": "deit_tiny_patch16_224",
    "DeiT, distilled": "deit_tiny_distilled_patch16_224",
    "DeiT-3": "deit3_small_patch16_224",
    "DINOv2": "vit_small_patch14_dinov2",
    "DINOv2, registers": "vit_small_patch14_reg4_dinov2",
    "DINOv3": "vit_small_patch16_dinov3",
    "EVA-02": "eva02_tiny_patch14_224",
    "BEiT": "beit_base_patch16_224",
    "BEiT-3": "beit3_base_patch16_224",
    "Swin": "swin_tiny_patch4_window7_224",
    "Swin v2": "swinv2_tiny_window8_256",
    "Swin v2, CR": "swinv2_cr_tiny_224",
    "CaiT": "cait_xxs24_224",
    "XCiT": "xcit_nano_12_p16_224",
    "PiT": "pit_ti_224",
    "MViT v2": "mvitv2_tiny",
    "Hiera": "hiera_tiny_224",
    "LeViT": "levit_128s",
    "LeViT, convolutions": "levit_conv_128s",
    "MaxViT": "maxvit_rmlp_pico_rw_256",
    "CoAtNet": "coatnet_nano_rw_224",
}


@dataclass(frozen=True)
class Coverage:
    """What of a model is quantised.

    Attributes:
        linears, convolutions, products: how many are; a product multiplies two activations.
        fused_attentions: attentions that are rebuilt so that an engine can run them in one kernel.
        share: of the linears' and convolutions' weights, those that are quantised, 0 … 1.
        floats: linears and convolutions that stay in floating point, with the reason.
        units: see :mod:`gplq.convert`.
    """

    architecture: str
    linears: int
    convolutions: int
    products: int
    fused_attentions: int
    share: float
    floats: dict[str, str]
    units: list[str]


def cover(architecture: str) -> Coverage:
    """Look at an architecture without its weights; takes well under a second and no memory.

    Raises:
        ModelError: timm does not know it, or gplq cannot quantise it; the message names the layer.
    """
    if not timm.is_model(architecture):
        raise ModelError(f"timm {timm.__version__} has no model '{architecture}'. See timm.list_models().")
    with torch.device("meta"):
        model = ModelSpec(architecture, {}, 1000).build()
    seen = survey(model, input_size(model))
    structure = plan(model, seen)
    layers: dict[str, Any] = {name: model.get_submodule(name) for name in seen.layers}
    quantised = {name: layer for name, layer in layers.items() if name not in structure.floats}
    weights = {name: layer.weight.numel() for name, layer in layers.items() if name not in seen.constant}
    return Coverage(
        architecture,
        linears=sum(isinstance(layer, nn.Linear) for layer in quantised.values()),
        convolutions=sum(isinstance(layer, nn.Conv2d) for layer in quantised.values()),
        products=sum(seen.products.values()),
        fused_attentions=sum(is_plain_attention(model.get_submodule(name)) for name in seen.products),
        share=sum(weights.get(name, 0) for name in quantised) / max(sum(weights.values()), 1),
        floats=structure.floats,
        units=structure.units,
    )
