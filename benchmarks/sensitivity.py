r"""What breaks a model: activations quantised one kind of tensor at a time, one block at a time, as dated JSON.

    python benchmarks/sensitivity.py dinov2_clipart224.safetensors --arch vit_small_patch14_dinov2 \
        --model-arg img_size=224 --data clipart-train.tar --name clipart224

The model is calibrated once, as the recipe says; then its quantisers are switched on by groups, and each group alone
is compared with the float model, on training images that calibration has not seen: no label is needed. Beside each
kind stands what makes it hard: how far the largest value of a channel, and of a token, lies above the typical one.
Weights stay in floating point.
"""

import argparse
import copy
import re
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accuracy import model_arguments, outputs_of
from torch import Tensor, nn

from gplq import Recipe, load_model
from gplq.calibrate import activation_quantizers, calibrate
from gplq.convert import convert
from gplq.data import ImageSet, batches, draw, open_images
from gplq.files import write_json
from gplq.lsq import ActivationQuantizer
from gplq.pipeline import prepared
from gplq.provenance import environment


def place(name: str) -> tuple[str, str]:
    """Block and kind of a quantiser, from its name: ``blocks.3`` and ``attn.qk.a``, or an empty block."""
    short = name.removesuffix(".input_quantizer").removesuffix("_quantizer")
    found = re.match(r"(.*\.\d+)\.(.+)$", short)
    return (found[1], found[2]) if found else ("", short)


class Peaks:
    """How uneven what a quantiser sees is, on one batch: the largest value by the root mean square, in two ways."""

    def __init__(self) -> None:
        self.channel: list[float] = []
        self.token: list[float] = []

    def see(self, x: Tensor) -> None:
        """x: [..., C]."""
        rows = x.flatten(0, -2).float()
        size = rows.square().mean().sqrt().clamp_min(1e-12)
        self.channel.append(float(rows.square().mean(0).max().sqrt() / size))
        self.token.append(float(rows.square().mean(1).max().sqrt() / size))

    def __str__(self) -> str:
        return f"channel {sum(self.channel) / len(self.channel):.1f}, token {sum(self.token) / len(self.token):.1f}"


def peaks(model: nn.Module, quantizers: dict[str, ActivationQuantizer], inputs: Tensor) -> dict[str, Peaks]:
    """By kind of quantiser, on one batch."""
    found: dict[str, Peaks] = {}
    handles = []
    for name, quantizer in quantizers.items():
        note = found.setdefault(place(name)[1], Peaks())
        handles.append(quantizer.register_forward_pre_hook(lambda _, args, note=note: note.see(args[0])))
    with torch.inference_mode():
        model(inputs)
    for handle in handles:
        handle.remove()
    return found


class Table:
    """Runs a calibrated model with some of its quantisers and compares it with the float model."""

    def __init__(self, model: nn.Module, reference: tuple[Tensor, Tensor], images: ImageSet) -> None:
        self.model, self.reference, self.images = model, reference, images
        self.quantizers = activation_quantizers(model)
        self.rows: dict[str, Any] = {}

    def row(self, name: str, on: Iterable[str], note: str = "") -> None:
        """Measure with the named quantisers on and the others passing through."""
        chosen = set(on)
        for other, quantizer in self.quantizers.items():
            quantizer.mode = "quantize" if other in chosen else "float"
        logits, features = outputs_of(self.model, self.images)
        wanted, target = self.reference
        each = F.kl_div(logits.log_softmax(1), wanted.log_softmax(1), log_target=True, reduction="none").sum(1)
        row = {
            "kl": round(float(each.mean()), 5),
            "kl_standard_error": round(float(each.std()) / len(each) ** 0.5, 5),
            "cosine": round(float(F.cosine_similarity(features, target).mean()), 5),
            "same_label_as_fp32": round(100 * float((logits.argmax(1) == wanted.argmax(1)).double().mean()), 2),
            "quantisers": len(chosen),
        }
        self.rows[name] = row
        print(
            f"{name:32} KL {row['kl']:.4f} ± {row['kl_standard_error']:.4f}   cosine {row['cosine']:.4f}   "
            f"labels {row['same_label_as_fp32']:5.1f} %   {note}",
            flush=True,
        )


def main() -> None:
    """Calibrate, then one row a group."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--arch")
    parser.add_argument("--model-arg", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--data", required=True, help="training images")
    parser.add_argument("--recipe", type=Path)
    parser.add_argument("--images", type=int, default=64, help="to measure on")
    parser.add_argument("--but", action="store_true", help="also with everything quantised but one kind")
    parser.add_argument("--name", required=True, help="of the result: DATE-sensitivity-NAME.json")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    recipe = Recipe() if arguments.recipe is None else Recipe.from_yaml(arguments.recipe)
    source = load_model(arguments.model, arch=arguments.arch, model_args=model_arguments(arguments.model_arg))
    images = open_images(arguments.data, "train", source.preprocessing, need_labels=False)
    # Calibration draws from the front of the same order: the rear is unseen.
    order = draw(len(images), len(images), recipe.seed)
    if len(order) < recipe.calibration.images + arguments.images:
        parser.error(f"{len(order)} images are too few for calibration ({recipe.calibration.images}) and --images")
    unseen = copy.copy(images)
    unseen.rows = [images.rows[i] for i in order[-arguments.images :]]
    unseen.labels = [images.labels[i] for i in order[-arguments.images :]]

    teacher, _ = prepared(source, recipe)
    model = convert(copy.deepcopy(teacher), recipe)
    inputs, _ = next(iter(batches(unseen, 16)))
    uneven = peaks(model, activation_quantizers(model), inputs)
    calibrate(model, images, recipe)
    table = Table(model, outputs_of(teacher, unseen), unseen)
    names = list(table.quantizers)
    kinds = list(dict.fromkeys(place(name)[1] for name in names))
    blocks = [block for block in dict.fromkeys(place(name)[0] for name in names) if block]
    table.row("all", names)
    for kind in kinds:
        table.row(f"only {kind}", [name for name in names if place(name)[1] == kind], str(uneven[kind]))
    for block in blocks:
        table.row(f"only {block}", [name for name in names if place(name)[0] == block])
    for kind in kinds if arguments.but else []:
        table.row(f"all but {kind}", [name for name in names if place(name)[1] != kind])
    path = arguments.out / f"{datetime.now(UTC):%Y-%m-%d}-sensitivity-{arguments.name}.json"
    content = {"recipe": recipe.to_dict(), "n": arguments.images, "source_sha256": source.sha256, "rows": table.rows}
    unevenness = {kind: {"channel": note.channel, "token": note.token} for kind, note in uneven.items()}
    write_json(path, {"schema_version": "1.0", **environment(), **content, "peak_by_rms": unevenness})
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
