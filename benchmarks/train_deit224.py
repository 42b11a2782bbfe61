r"""Train a DeiT-Tiny on clip art at 224 px, on one CPU core: a second trained family beside DINOv2 for the benchmarks.

    python benchmarks/train_deit224.py --teacher dinov2_clipart224.safetensors --data clipart-train.tar \
        --test-data clipart-val.tar --out deit_clipart224.safetensors

``--teacher``: what ``make_clipart224.py`` writes. A thousand pictures are too few to train a transformer on their
labels, so its tokens also learn those of the teacher, through a linear projection that is thrown away. It begins as
every second channel and head of the teacher (weight selection, Xu et al. 2024), with patches of 16 pixels for 14. The
teacher sees every picture once; a crop's targets are the same crop of its tokens. Interrupted, the same command goes
on where it was (``<out>.state``). The test pictures choose nothing: the last step's weights are saved.
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
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from torch import Tensor, nn

from gplq import load_model
from gplq.data import open_images
from gplq.evaluate import top1
from gplq.labels import check_labels
from gplq.preprocessing import Preprocessing

ARCHITECTURE, TEACHER = "deit_tiny_patch16_224", "vit_small_patch14_dinov2"
PIXELS, PATCH, GRID, TEACHER_GRID = 224, 16, 14, 16
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def select_weights(teacher: dict[str, Tensor], student: nn.Module) -> dict[str, Tensor]:
    """The student's weights out of the teacher's: every second channel and head, LayerScale multiplied in."""
    chosen = {}
    heads = torch.arange(0, 6, 2)
    of_heads = (heads[:, None] * 64 + torch.arange(64)).flatten()  # 192 of 384 channels of q, k, v
    for name, own in student.state_dict().items():
        if name.startswith("head."):
            chosen[name] = own
            continue
        weight = teacher[name]
        block, _, rest = name.rpartition(".")
        if block.endswith(("attn.proj", "mlp.fc2")):
            scale = teacher[f"{block.rsplit('.', 2)[0]}.ls{1 if 'attn' in block else 2}.gamma"]
            weight = weight * (scale[:, None] if rest == "weight" else scale)
        if name == "pos_embed":
            weight = resample_abs_pos_embed(weight, [GRID, GRID])
        if name == "patch_embed.proj.weight":
            weight = resample_patch_embed(weight, [PATCH, PATCH])
        if block.endswith("attn.qkv"):
            weight = weight.view(3, 384, *weight.shape[1:])[:, of_heads].flatten(0, 1)
        elif own.shape[0] != weight.shape[0]:
            weight = weight[:: weight.shape[0] // own.shape[0]]
        if block.endswith("attn.proj") and rest == "weight":
            weight = weight[:, of_heads]
        elif rest in ("weight", "cls_token", "pos_embed") and weight.ndim in (2, 3):
            step = weight.shape[-1] // own.shape[-1]
            # A sum over half of the channels is half as large.
            weight = weight[..., ::step] * (step if weight.ndim == 2 else 1)
        chosen[name] = weight.clone()
    return chosen


@torch.inference_mode()
def teacher_tokens(model: nn.Module, pictures: Tensor) -> Tensor:
    """All tokens behind the final norm, normalised. uint8 [n, 3, 224, 224] -> float16 [n, 257, 384]."""
    found = []
    for batch in pictures.split(32):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            tokens = model.forward_features(normalise(batch))  # type: ignore[operator]  # timm's, on every model
        found.append(F.layer_norm(tokens.float(), tokens.shape[-1:]).half())
        print(f"teacher: {sum(len(part) for part in found)} of {len(pictures)} pictures", flush=True)
    return torch.cat(found)


def normalise(pictures: Tensor) -> Tensor:
    """uint8 [B, 3, H, W] -> float32."""
    mean, std = (torch.tensor(values)[None, :, None, None] for values in (MEAN, STD))
    return (pictures.float() / 255 - mean) / std


def augment(pictures: Tensor, tokens: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Crop 40 to 100 % of each picture and of its tokens, flip half of them.

    uint8 [B, 3, 224, 224], float16 [B, 257, 384] -> uint8 [B, 3, 224, 224], float32 [B, 197, 384].
    """
    views, targets = [], []
    for picture, own in zip(pictures, tokens, strict=True):
        side = math.sqrt(rng.uniform(0.4, 1.0))
        ratio = math.exp(rng.uniform(-0.2, 0.2))
        height, width = min(1.0, side * ratio), min(1.0, side / ratio)
        top, left = rng.uniform(0, 1 - height), rng.uniform(0, 1 - width)
        rows, columns = (
            (int(begin * PIXELS), int((begin + extent) * PIXELS)) for begin, extent in ((top, height), (left, width))
        )
        crop = picture[None, :, rows[0] : rows[1], columns[0] : columns[1]].float()
        view = F.interpolate(crop, size=(PIXELS, PIXELS), mode="bilinear", antialias=True).round().byte()[0]
        # Centres of the student's patches, in the coordinates of the whole picture, -1 to 1.
        centres = (torch.arange(GRID) + 0.5) / GRID
        y, x = 2 * (top + height * centres) - 1, 2 * (left + width * centres) - 1
        grid = torch.stack([x[None, :].expand(GRID, GRID), y[:, None].expand(GRID, GRID)], dim=-1)
        map_ = own[1:].float().T.view(1, -1, TEACHER_GRID, TEACHER_GRID)
        target = F.grid_sample(map_, grid[None], align_corners=False, padding_mode="border")[0]
        if rng.random() < 0.5:
            view, target = view.flip(-1), target.flip(-1)
        views.append(view)
        targets.append(torch.cat([own[:1].float(), target.flatten(1).T]))
    return torch.stack(views), torch.stack(targets)


def pictures_of(data: str) -> tuple[Tensor, Tensor]:
    """All training pictures, as they are: uint8 [n, 3, 224, 224], and labels [n]."""
    plain = Preprocessing((3, PIXELS, PIXELS), "bicubic", 1.0, "center", (0.0,) * 3, (1.0,) * 3)
    images = open_images(data, "train", plain)
    pictures = torch.stack([(images[i][0] * 255).round().byte() for i in range(len(images))])
    return pictures, torch.as_tensor(list(images.labels))


def main() -> None:
    """Train, resume if a state is there, save, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--test-data", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    pictures, labels = pictures_of(arguments.data)
    weights = load_file(arguments.teacher)
    classes = len(weights["head.bias"])
    torch.manual_seed(arguments.seed)
    model = timm.create_model(ARCHITECTURE, num_classes=classes)
    model.load_state_dict(select_weights(weights, model))
    projection = nn.Linear(model.num_features, 384)
    both = nn.ModuleList([model, projection])
    decayed = [p for p in both.parameters() if p.ndim >= 2]
    others = [p for p in both.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}])
    steps_per_epoch = len(pictures) // arguments.batch
    total, step = arguments.epochs * steps_per_epoch, 0
    state_file = arguments.out.with_name(f"{arguments.out.name}.state")
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        both.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, tokens = state["step"], state["tokens"]
    else:
        teacher = load_model(str(arguments.teacher), arch=TEACHER, model_args={"img_size": PIXELS}).model
        tokens = teacher_tokens(teacher, pictures)
    model.train()
    begin, first, running = time.monotonic(), step, 0.0
    while step < total:
        order = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(step // steps_per_epoch))
        at = step % steps_per_epoch * arguments.batch
        index = order[at : at + arguments.batch]
        rng = np.random.default_rng((arguments.seed, step))
        views, targets = augment(pictures[index], tokens[index], rng)
        warm_up = (step + 1) / (2 * steps_per_epoch)
        factor = min(warm_up, 0.5 * (1 + math.cos(math.pi * step / total)))
        for group in optimizer.param_groups:
            group["lr"] = arguments.lr * factor
        with torch.autocast("cpu", dtype=torch.bfloat16):
            own = model.forward_features(normalise(views))
            logits, projected = model.forward_head(own), projection(own)
        of_class = F.cross_entropy(logits.float(), labels[index], label_smoothing=0.1)
        squares = (projected.float() - targets).square().mean(dim=2)
        loss = of_class + squares[:, 0].mean() + squares[:, 1:].mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(both.parameters(), 1.0)
        optimizer.step()
        step += 1
        running += (loss.item() - running) / min(step - first, 20)
        if step % 10 == 0 or step == total:
            eta = (time.monotonic() - begin) / (step - first) * (total - step)
            parts = f"labels {of_class.item():.3f}, class token {squares[:, 0].mean().item():.3f}"
            print(f"step {step}/{total}  loss {running:.4f} ({parts})  {eta / 60:.1f} min to go", flush=True)
        if step % 100 == 0 or step == total:
            content = {"model": both.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "tokens": tokens}
            torch.save(content, state_file)
    save_file({key: value.half().contiguous() for key, value in model.state_dict().items()}, arguments.out)
    source = load_model(str(arguments.out), arch=ARCHITECTURE)
    for name, data, split in (("training", arguments.data, "train"), ("test", arguments.test_data, "test")):
        images = open_images(data, split, source.preprocessing)
        check_labels(images, source.spec.num_classes, source.label_names)
        with torch.inference_mode():
            accuracy = top1(source.model, images, name)
        print(f"FP32 top-1 on the {name} pictures {accuracy}  (n = {accuracy.n})")
    state_file.unlink()


if __name__ == "__main__":
    main()
