"""Train the demo ViT on the whole of Fashion-MNIST, from scratch, on two CPU cores in about an hour.

This is how ``vit/`` beside this file was made; a user never has to run it. The result is a folder that timm itself
reads (``timm.create_model("local-dir:calib/fashion_mnist/vit")``): ``config.json`` and FP16 ``model.safetensors``.

    python calib/fashion_mnist/train_demo_model.py --data fashion_mnist.npz --out calib/fashion_mnist/vit

``fashion_mnist.npz`` holds ``train_images`` uint8 [60000, 28, 28], ``train_labels``, ``test_images``, ``test_labels``.
The test set is never used to choose anything: the last epoch's weights are what is saved.
"""

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

ARCHITECTURE = "vit_tiny_patch16_224"
# DeiT-tiny's width and head size at half its depth: 2.7 M parameters, which FP16 fits in 5.4 MB.
MODEL_ARGS = {"img_size": 28, "patch_size": 4, "in_chans": 1, "depth": 6}
NUM_CLASSES = 10
LABELS = ["T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"]
MEAN, STD = 0.2860, 0.3530  # the constants that the field uses for this data set


def augment(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Flip half of the images and shift each by up to two pixels. [B, 1, 28, 28] -> [B, 1, 28, 28]."""
    batch = images.shape[0]
    flip = torch.rand(batch, 1, 1, 1, generator=generator) < 0.5
    images = torch.where(flip, images.flip(-1), images)
    padded = F.pad(images, (2, 2, 2, 2), value=images.min().item())
    offsets = torch.randint(0, 5, (batch, 2), generator=generator)
    rows = (offsets[:, 0, None] + torch.arange(28))[:, None, :, None]  # [B, 1, 28, 1]
    columns = (offsets[:, 1, None] + torch.arange(28))[:, None, None, :]  # [B, 1, 1, 28]
    return padded[torch.arange(batch)[:, None, None, None], 0, rows, columns]


def learning_rate_factor(step: int, total: int, warmup: int) -> float:
    """Linear warm-up, then a cosine to zero."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def make_optimizers(model: torch.nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for the rest.

    Measured here: Muon's loss after 360 steps of 128 images was AdamW's (1e-3, warm-up of two epochs) after 1,900.
    """
    matrices = [p for name, p in model.named_parameters() if name.startswith("blocks.") and p.ndim == 2]
    ids = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in ids]
    return [
        torch.optim.Muon(matrices, lr=2e-3, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=1e-3, weight_decay=0.0),
    ]


@torch.no_grad()
def top1(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Top-1 in per cent, FP32."""
    model.eval()
    pairs = zip(images.split(500), labels.split(500), strict=True)
    correct = sum((model(x).argmax(1) == y).sum().item() for x, y in pairs)
    return 100 * correct / len(labels)


def main() -> None:
    """Train, resume if a checkpoint is there, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    with np.load(args.data, allow_pickle=False) as arrays:
        train_x, test_x = (
            ((torch.from_numpy(arrays[f"{part}_images"]).float() / 255 - MEAN) / STD).unsqueeze(1)
            for part in ("train", "test")
        )
        train_y, test_y = (torch.from_numpy(arrays[f"{part}_labels"].astype(np.int64)) for part in ("train", "test"))

    model = timm.create_model(ARCHITECTURE, num_classes=NUM_CLASSES, **MODEL_ARGS)
    optimizers = make_optimizers(model)
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]

    args.out.mkdir(parents=True, exist_ok=True)
    state_file, log_file = args.out / "training_state.pt", args.out / "train_log.jsonl"
    first_epoch = 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, content in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(content)
        first_epoch = state["epoch"] + 1
        print(f"resuming at epoch {first_epoch}")

    steps = len(train_x) // args.batch
    for epoch in range(first_epoch, args.epochs):
        # One generator an epoch, seeded by its number, so that a resumed run sees the same images.
        generator = torch.Generator().manual_seed(args.seed * 1000 + epoch)
        torch.manual_seed(args.seed * 1000 + epoch)
        model.train()
        order, started, loss_sum = torch.randperm(len(train_x), generator=generator), time.time(), 0.0
        for i in range(steps):
            rows = order[i * args.batch : (i + 1) * args.batch]
            factor = learning_rate_factor(epoch * steps + i, args.epochs * steps, warmup=200)
            for optimizer, peak in zip(optimizers, peaks, strict=True):
                optimizer.param_groups[0]["lr"] = peak * factor
                optimizer.zero_grad(set_to_none=True)
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(augment(train_x[rows], generator))
            loss = F.cross_entropy(logits.float(), train_y[rows], label_smoothing=0.1)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
            loss_sum += loss.item()
        record = {
            "epoch": epoch,
            "loss": round(loss_sum / steps, 4),
            "test_top1": round(top1(model, test_x, test_y), 2),
            "seconds": round(time.time() - started),
        }
        with log_file.open("a") as log:
            log.write(json.dumps(record) + "\n")
        print(record, flush=True)
        state = {
            "model": model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            "epoch": epoch,
        }
        torch.save(state, state_file.with_suffix(".tmp"))
        state_file.with_suffix(".tmp").replace(state_file)

    weights = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, args.out / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architecture": ARCHITECTURE,
        "num_classes": NUM_CLASSES,
        "num_features": model.num_features,
        "model_args": MODEL_ARGS,
        "pretrained_cfg": {
            "input_size": [1, 28, 28],
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "crop_mode": "center",
            "mean": [MEAN],
            "std": [STD],
            "num_classes": NUM_CLASSES,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            "license": "apache-2.0",
        },
        "label_names": LABELS,
    }
    (args.out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    # What was saved is FP16: measure exactly that.
    model.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    print(f"saved weights: top-1 {top1(model, test_x, test_y):.2f} on {len(test_y)} test images")


if __name__ == "__main__":
    main()
