"""A detector with a 4-bit Swin backbone: torchvision's RetinaNet, quantised, exported and checked.

    python examples/detector.py --out dist

It draws its own images of bright and dark rectangles, trains a tiny detector in floating point, and then does what one
does with a real detector and real data:

1. put quantisers into the backbone: ``convert(detector.backbone.body, ...)``
2. Stage 1 with the detector's own losses: ``gplq.train_activations``
3. Stage 2 on what the detector feeds its backbone: ``stage2.quantize_weights``
4. a checkpoint of the backbone, which goes into the detector again and is exported

The feature pyramid, the heads, the anchors and the selection of boxes stay in floating point, in torchvision. The
engine takes images of one size, so that the detector resizes to one (``fixed_size``).
"""

import argparse
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork, box_iou

import gplq
from gplq.checkpoint import save_checkpoint
from gplq.convert import convert
from gplq.models import ModelSpec
from gplq.preprocessing import Preprocessing
from gplq.stage2 import BlockReport, quantize_weights
from gplq_export.export import ExportResult, export

HEIGHT, WIDTH = 64, 96  # pixels
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
CLASSES = {"dark": 0, "bright": 1}
Batch = tuple[list[Tensor], list[dict[str, Tensor]]]  # images [3, H, W] in 0 … 1; boxes [n, 4] in pixels, labels [n]

BACKBONE = ModelSpec(
    "swin_tiny_patch4_window7_224",
    {
        "img_size": (HEIGHT, WIDTH),
        "window_size": 4,
        "embed_dim": 32,
        "depths": (2, 2),
        "num_heads": (2, 4),
        "features_only": True,
        "feature_cls": "getter",  # feature maps [B, C, H, W], as the pyramid wants them, also from a Swin
        "out_indices": (0, 1),
    },
    num_classes=0,
)


class Backbone(nn.Module):
    """A timm backbone with torchvision's feature pyramid behind it."""

    def __init__(self, body: Any, out_channels: int) -> None:
        super().__init__()
        self.body = body
        self.fpn = FeaturePyramidNetwork(body.feature_info.channels(), out_channels)
        self.out_channels = out_channels  # RetinaNet asks for it

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Feature maps [B, out_channels, H / 4, W / 4] and [.., H / 8, W / 8] of ``images`` [B, 3, H, W]."""
        maps = self.body(images)
        pyramid: dict[str, Tensor] = self.fpn(OrderedDict((str(level), x) for level, x in enumerate(maps)))
        return pyramid


def make_detector() -> RetinaNet:
    """A small RetinaNet on a Swin, random weights."""
    anchors = AnchorGenerator(sizes=((12, 18), (24, 36)), aspect_ratios=((0.5, 1.0, 2.0),) * 2)
    body = BACKBONE.build()
    return RetinaNet(
        Backbone(body, out_channels=48),
        num_classes=len(CLASSES),
        anchor_generator=anchors,
        image_mean=MEAN,
        image_std=STD,
        fixed_size=(WIDTH, HEIGHT),  # in this order
        detections_per_img=20,
    )


def draw_batches(count: int, batch_size: int, seed: int) -> list[Batch]:
    """Grey noise with one to three rectangles an image, darker or brighter than it."""
    generator = torch.Generator().manual_seed(seed)

    def between(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    def draw() -> tuple[Tensor, dict[str, Tensor]]:
        image = 0.35 + 0.3 * torch.rand(3, HEIGHT, WIDTH, generator=generator)
        boxes, labels = [], []
        for _ in range(between(1, 4)):
            width, height = between(12, 36), between(12, 36)
            left, top = between(0, WIDTH - width), between(0, HEIGHT - height)
            label = between(0, len(CLASSES))
            image[:, top : top + height, left : left + width] += 0.3 if label == CLASSES["bright"] else -0.3
            boxes.append([left, top, left + width, top + height])
            labels.append(label)
        return image.clamp(0, 1), {"boxes": torch.tensor(boxes, dtype=torch.float32), "labels": torch.tensor(labels)}

    return [
        (list(images), list(targets))
        for images, targets in (zip(*(draw() for _ in range(batch_size)), strict=True) for _ in range(count))
    ]


def losses(detector: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Those that a torchvision detector returns in training mode, by name."""
    terms: dict[str, Tensor] = detector(*batch)
    return terms


def train_float(detector: RetinaNet, batches: list[Batch], epochs: int) -> None:
    """Ordinary training; prints the loss after each epoch."""
    detector.train()
    steps = epochs * len(batches)
    optimizer = torch.optim.AdamW(detector.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.5e-3, total_steps=steps)
    for epoch in range(epochs):
        mean = 0.0
        for batch in batches:
            loss = torch.stack(list(losses(detector, batch).values())).sum()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(detector.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            mean += loss.item() / len(batches)
        print(f"float training, epoch {epoch + 1} of {epochs}: loss {mean:.3f}")


@torch.no_grad()
def recall(detector: RetinaNet, batches: list[Batch]) -> float:
    """Share of the rectangles that are found: of n in an image, the n best boxes count, at an IoU of 0.5."""
    detector.eval()
    found = total = 0
    for images, targets in batches:
        for result, target in zip(detector(images), targets, strict=True):
            count = len(target["boxes"])
            total += count
            best = result["scores"].argsort(descending=True)[:count]
            same = result["labels"][best][:, None] == target["labels"]
            hits = (box_iou(result["boxes"][best], target["boxes"]) >= 0.5) & same
            found += int(hits.any(0).sum())
    return found / total


def body_inputs(detector: RetinaNet, batches: list[Batch]) -> list[Tensor]:
    """What the detector feeds its backbone: normalised and resized, [B, 3, HEIGHT, WIDTH]."""
    return [detector.transform(images)[0].tensors for images, _ in batches]


def quantize(detector: RetinaNet, batches: list[Batch], recipe: gplq.Recipe) -> list[BlockReport]:
    """Both stages, on the backbone and in place."""
    convert(detector.backbone.body, recipe, image_size=(3, HEIGHT, WIDTH))
    detector.train()
    detector.backbone.body.eval()  # no stochastic depth: it should mimic what is deployed
    gplq.train_activations(detector, batches, loss=losses, recipe=recipe)
    return quantize_weights(detector.backbone.body, body_inputs(detector, batches), recipe)


def backbone_checkpoint(detector: RetinaNet, recipe: gplq.Recipe) -> gplq.Checkpoint:
    """The quantised backbone with what belongs to it; no labels, no classifier."""
    preprocessing = Preprocessing((3, HEIGHT, WIDTH), "bilinear", 1.0, "squash", MEAN, STD)
    return gplq.Checkpoint(detector.backbone.body, BACKBONE, preprocessing, None, recipe, provenance={})


@dataclass(frozen=True)
class Outcome:
    """What :func:`run` found: recall of the detector in floating point and with the 4-bit backbone, and the export."""

    float_recall: float
    quantized_recall: float
    exported: ExportResult


def run(out: Path, *, train_batches: int, epochs: int, test_batches: int, force: bool = False) -> Outcome:
    """The whole way; ``out`` gets ``backbone.pt`` and the folder ``onnx``."""
    torch.manual_seed(0)
    train, test = draw_batches(train_batches, 8, seed=1), draw_batches(test_batches, 8, seed=2)
    detector = make_detector()
    train_float(detector, train, epochs)
    float_recall = recall(detector, test)
    print(f"recall, floating point: {float_recall:.3f}")

    recipe = gplq.Recipe.from_dict(
        {
            "calibration": {"images": 64},
            "stage1": {"batch_size": 8, "lr": 1e-4, "scale_lr": 1e-3},
        }
    )
    for report in quantize(detector, train, recipe):
        print(report)
    quantized_recall = recall(detector, test)
    print(f"recall, backbone W{recipe.weight_bits}A{recipe.activation_bits}: {quantized_recall:.3f}")

    save_checkpoint(backbone_checkpoint(detector, recipe), out / "backbone.pt")
    loaded = gplq.load_checkpoint(out / "backbone.pt")
    detector.backbone.body = loaded.model
    assert recall(detector, test) == quantized_recall  # the file holds the same backbone, bit for bit
    exported = export(loaded, out / "onnx", images=body_inputs(detector, test), force=force)
    print(f"outputs: {exported.outputs}")
    pair = exported.report.pair("int4") if exported.report else None
    for block in pair.forced.blocks if pair and pair.forced else ():
        print(f"  {block.name}: {block.different:,} of {block.total:,} codes differ for the same input")
    return Outcome(float_recall, quantized_recall, exported)


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--force", action="store_true", help="overwrite an earlier result in it")
    arguments = parser.parse_args()
    outcome = run(arguments.out, train_batches=60, epochs=6, test_batches=8, force=arguments.force)
    for problem in outcome.exported.problems:
        raise problem


if __name__ == "__main__":
    main()
