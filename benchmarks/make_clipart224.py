r"""Put DINOv2 ViT-S/14 and a linear classifier of clip art together: the model of the benchmarks at 224 px.

    python benchmarks/make_clipart224.py --backbone dinov2_vits14.safetensors --head clipart224_head.safetensors \
        --out dinov2_clipart224.safetensors --data clipart-val.tar

``--backbone``: a state dict of timm's ``vit_small_patch14_dinov2`` at any size, without a classifier; its position
embedding is resampled to 16 x 16 patches. ``--head``: ``head.weight`` [classes, 384] and ``head.bias``, on the class
token behind the final norm. ``--data``: measure what was written on these pictures. What is written is read with
``--arch vit_small_patch14_dinov2 --model-arg img_size=224``.
"""

import argparse
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from gplq import load_model
from gplq.data import open_images
from gplq.evaluate import top1
from gplq.labels import check_labels

ARCHITECTURE = "vit_small_patch14_dinov2"
PIXELS, PATCH = 224, 14


def assemble(backbone: dict[str, Tensor], head: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of :data:`ARCHITECTURE` at :data:`PIXELS`, FP32."""
    weights = {key: value.float().contiguous() for key, value in {**backbone, **head}.items()}
    side = PIXELS // PATCH
    weights["pos_embed"] = resample_abs_pos_embed(weights["pos_embed"], [side, side]).contiguous()
    return weights


def main() -> None:
    """Write the file; measure it if pictures are given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", type=Path, required=True)
    parser.add_argument("--head", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", help="pictures with labels to measure on")
    arguments = parser.parse_args()
    save_file(assemble(load_file(arguments.backbone), load_file(arguments.head)), arguments.out)
    print(f"wrote {arguments.out}")
    if arguments.data:
        source = load_model(str(arguments.out), arch=ARCHITECTURE, model_args={"img_size": PIXELS})
        images = open_images(arguments.data, "test", source.preprocessing)
        check_labels(images, source.spec.num_classes, source.label_names)
        with torch.inference_mode():
            accuracy = top1(source.model, images, "top-1")
        print(f"FP32 {accuracy}  (n = {accuracy.n})")


if __name__ == "__main__":
    main()
