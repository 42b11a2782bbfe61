r"""Fine-tune a DINOv2 ViT-S/14 on Fashion-MNIST to convergence, on two CPU cores: the FP32 model of the benchmarks.

    python benchmarks/train_dinov2.py --weights dinov2_vits14_fashion70.safetensors --data fashion_mnist.npz \
        --out dinov2_fashion70.safetensors

``--weights``: a state dict of timm's ``vit_small_patch14_dinov2`` at 70 px with 10 classes. Interrupted, the same
command goes on where it was (``<out>.state``). The test images choose nothing: the last step's weights are saved.
"""

import argparse
import math
import time
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

MEAN = torch.tensor([0.485, 0.456, 0.406])[None, :, None, None]
STD = torch.tensor([0.229, 0.224, 0.225])[None, :, None, None]
PIXELS = 70


def preprocess(images: torch.Tensor) -> torch.Tensor:
    """What timm's evaluation transform does to a grey image: uint8 [B, 28, 28] -> float32 [B, 3, 70, 70]."""
    x = F.interpolate(images[:, None].float(), size=(PIXELS, PIXELS), mode="bicubic", antialias=True)
    return (x.round().clamp(0, 255) / 255 - MEAN) / STD


def augment(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Flip half of the images and shift each by up to two pixels. uint8 [B, 28, 28], black outside."""
    batch = len(images)
    flip = torch.rand(batch, 1, 1, generator=generator) < 0.5
    padded = F.pad(torch.where(flip, images.flip(-1), images), (2, 2, 2, 2))
    offsets = torch.randint(0, 5, (batch, 2), generator=generator)
    rows = (offsets[:, 0, None] + torch.arange(28))[:, :, None]
    columns = (offsets[:, 1, None] + torch.arange(28))[:, None, :]
    return padded[torch.arange(batch)[:, None, None], rows, columns]


@torch.inference_mode()
def top1(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Top-1 in per cent, FP32."""
    model.eval()
    pairs = zip(images.split(250), labels.split(250), strict=True)
    correct = sum((model(preprocess(x)).argmax(1) == y).sum().item() for x, y in pairs)
    return 100 * correct / len(labels)


def main() -> None:
    """Train, resume if a state is there, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=3e-5)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    arrays = np.load(arguments.data)
    train_images, test_images = (torch.from_numpy(arrays[f"{split}_images"]) for split in ("train", "test"))
    train_labels, test_labels = (torch.from_numpy(arrays[f"{split}_labels"]).long() for split in ("train", "test"))
    model = timm.create_model("vit_small_patch14_dinov2", img_size=PIXELS, num_classes=10, drop_path_rate=0.1)
    model.load_state_dict({key: value.float() for key, value in load_file(arguments.weights).items()})
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}])
    steps_per_epoch = len(train_images) // arguments.batch
    total, step = arguments.epochs * steps_per_epoch, 0
    state_file = arguments.out.with_name(f"{arguments.out.name}.state")
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
    model.train()
    begin, first = time.monotonic(), step
    running = 0.0
    while step < total:
        order = torch.randperm(len(train_images), generator=torch.Generator().manual_seed(step // steps_per_epoch))
        at = step % steps_per_epoch * arguments.batch
        index = order[at : at + arguments.batch]
        generator = torch.Generator().manual_seed(arguments.seed * 1_000_003 + step)
        torch.manual_seed(step)  # stochastic depth
        inputs = preprocess(augment(train_images[index], generator))
        factor = min((step + 1) / 100, 0.5 * (1 + math.cos(math.pi * step / total)))
        for group in optimizer.param_groups:
            group["lr"] = arguments.lr * factor
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = F.cross_entropy(model(inputs), train_labels[index], label_smoothing=0.05)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        running += (loss.item() - running) / min(step - first, 50)
        if step % 50 == 0 or step == total:
            eta = (time.monotonic() - begin) / (step - first) * (total - step)
            print(f"step {step}/{total}  loss {running:.4f}  {eta / 60:.1f} min to go", flush=True)
        if step % 300 == 0 or step == total:
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, state_file)
    save_file({key: value.half().contiguous() for key, value in model.state_dict().items()}, arguments.out)
    model.load_state_dict({key: value.float() for key, value in load_file(arguments.out).items()})
    print(f"wrote {arguments.out}: FP32 top-1 {top1(model, test_images, test_labels):.2f} % (n = {len(test_labels)})")
    state_file.unlink()


if __name__ == "__main__":
    main()
