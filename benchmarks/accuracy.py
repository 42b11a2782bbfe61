r"""Top-1 of one model under many recipes and seeds, as dated JSON: what each part of the method is worth.

    python benchmarks/accuracy.py calib/fashion_mnist/vit --data calib/fashion_mnist/fashion_mnist.npz \
        --name demo --recipes recipes/demo.yaml recipes/naive.yaml --seeds 0 1 2

    python benchmarks/accuracy.py dinov2_fashion70.safetensors --arch vit_small_patch14_dinov2 --model-arg img_size=70 \
        --data fashion_mnist.npz --name dinov2 --recipes recipes/ablation/*.yaml --images 2000

    python benchmarks/accuracy.py dinov2_clipart224.safetensors --arch vit_small_patch14_dinov2 \
        --model-arg img_size=224 --data clipart-train.tar --eval clipart-val.tar --name clipart224 \
        --recipes recipes/calibrate.yaml recipes/w4a8.yaml recipes/fast.yaml

Every row is a recipe that ``gplq quantize --recipe`` takes. Rows with the same Stage 1 (calibration, Stage 1 and
seed) share its result. Each row is measured on the same test images as the float model, so that differences to it are
paired: their interval is far narrower than those of the accuracies. The file is written after every row; the same
command goes on where it was. ``--fp32-scales`` measures each row once more with scales that FP16 does not hold, to see
what that grid costs; such a network is not for export.
"""

import argparse
import ast
import contextlib
import copy
import hashlib
import json
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gplq import Recipe, fold, load_model, rounding, stage1, stage2
from gplq.calibrate import activation_quantizers, calibrate
from gplq.convert import convert
from gplq.data import ImageSet, batches, open_images
from gplq.evaluate import Accuracy
from gplq.files import write_json
from gplq.labels import check_labels
from gplq.models import FloatModel
from gplq.pca import Features
from gplq.pipeline import prepared
from gplq.progress import progress
from gplq.provenance import environment


@torch.inference_mode()
def outputs_of(model: nn.Module, images: ImageSet) -> tuple[Tensor, Tensor]:
    """Logits [n, classes] and penultimate features [n, D]."""
    logits, vectors = [], []
    with Features(model) as features, progress(len(images), "top-1", "image") as bar:
        for inputs, labels in batches(images, 50):
            logits.append(model(inputs))
            vectors.append(features.value)
            bar.update(len(labels))
    return torch.cat(logits), torch.cat(vectors)


def compare(found: tuple[Tensor, Tensor], reference: tuple[Tensor, Tensor], labels: Tensor) -> dict[str, Any]:
    """Accuracy, the paired difference to the float model in points with its 95 % interval, KL, cosine of features."""
    logits, wanted = found[0], reference[0]
    right, right_before = logits.argmax(1) == labels, wanted.argmax(1) == labels
    difference = right.double() - right_before.double()
    half = 1.96 * float(difference.std()) / len(labels) ** 0.5
    divergence = F.kl_div(logits.log_softmax(1), wanted.log_softmax(1), log_target=True, reduction="none").sum(1)
    return {
        "top1": Accuracy(int(right.sum()), len(labels)).to_dict(),
        "minus_fp32": {"points": round(100 * float(difference.mean()), 3), "half_interval": round(100 * half, 3)},
        "same_label_as_fp32": round(100 * float((logits.argmax(1) == wanted.argmax(1)).double().mean()), 3),
        "kl": round(float(divergence.mean()), 5),
        "kl_standard_error": round(float(divergence.std()) / len(labels) ** 0.5, 5),
        "cosine": round(float(F.cosine_similarity(found[1], reference[1]).mean()), 5),
    }


@torch.no_grad()
def weight_change(before: nn.Module, after: nn.Module) -> dict[str, float]:
    """How far Stage 1 moved the weights of the linears, mean over layers: |dW| and |dW| / |W|."""
    old, new = dict(before.named_parameters()), dict(after.named_parameters())
    pairs = [(old[name], new[name]) for name in old if old[name].ndim == 2]
    absolute = [float((b - a).abs().mean()) for a, b in pairs]
    relative = [float((b - a).abs().mean() / a.abs().mean()) for a, b in pairs]
    return {"mean_absolute": sum(absolute) / len(pairs), "relative": sum(relative) / len(pairs)}


@contextlib.contextmanager
def fp32_scales() -> Iterator[None]:
    """Within the block, Stage 2 takes every scale as it is."""
    with contextlib.ExitStack() as stack:
        for module in (fold, rounding, stage2):
            stack.enter_context(mock.patch.object(module, "round_scale", lambda scale, _: scale))
        yield


class Bench:
    """One float model, its data, and the results so far."""

    def __init__(self, source: FloatModel, data: str, test: str, images: int | None, path: Path) -> None:
        self.source, self.path = source, path
        self.train = open_images(data, "train", source.preprocessing)
        self.test = open_images(test, "test", source.preprocessing).head(images)
        for split in (self.train, self.test):
            check_labels(split, source.spec.num_classes, source.label_names)
        self.labels = torch.as_tensor(list(self.test.labels))
        self.reference = outputs_of(source.model, self.test)
        self.fp32 = Accuracy(int((self.reference[0].argmax(1) == self.labels).sum()), len(self.labels))
        print(f"FP32 {self.fp32}  (n = {self.fp32.n})", flush=True)
        self.rows: dict[str, Any] = json.loads(path.read_text())["rows"] if path.exists() else {}
        self.students: dict[str, tuple[nn.Module, dict[str, Any], tuple[Tensor, Tensor]]] = {}

    def measure(self, model: nn.Module, reference: tuple[Tensor, Tensor]) -> dict[str, Any]:
        """Of a model on the test images."""
        return compare(outputs_of(model, self.test), reference, self.labels)

    def student(self, recipe: Recipe) -> tuple[nn.Module, dict[str, Any], tuple[Tensor, Tensor]]:
        """The model after Stage 1, what was measured on it, and what its float model returns."""
        content = recipe.to_dict()
        parts = {key: content[key] for key in content if key not in ("stage2", "weight_bits", "scale_grid", "limits")}
        key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
        if key not in self.students:
            self.students.clear()  # rows come sorted by Stage 1
            self.students[key] = self._train(recipe)
        return self.students[key]

    def _train(self, recipe: Recipe) -> tuple[nn.Module, dict[str, Any], tuple[Tensor, Tensor]]:
        begin = time.monotonic()
        teacher, rotation = prepared(self.source, recipe)
        student = convert(copy.deepcopy(teacher), recipe)
        calibrate(student, self.train, recipe)
        seconds = time.monotonic() - begin
        reference = self.reference if rotation is None else outputs_of(teacher, self.test)
        calibrated = self.measure(student, reference)
        result: dict[str, Any] = {"calibration_seconds": round(seconds, 1), "calibrated": calibrated}
        print(f"calibrated {_line(calibrated)}", flush=True)
        if recipe.stage1.enabled:
            before, begin = copy.deepcopy(student), time.monotonic()
            stage1.train(student, teacher, self.train, recipe, None, lambda _: None)
            result["stage1_seconds"] = round(time.monotonic() - begin, 1)
            result["weight_change"] = weight_change(before, student)
            quantizers = activation_quantizers(student).values()
            for quantizer in quantizers:
                quantizer.mode = "float"
            few = self.test.head(2000)  # whether the weights are still in their basin shows on a part as well
            labels = torch.as_tensor(list(few.labels))
            result["fp32_inside"] = compare(outputs_of(student, few), outputs_of(teacher, few), labels)
            for quantizer in quantizers:
                quantizer.mode = "quantize"
        result["w32"] = self.measure(student, reference) if recipe.stage1.enabled else calibrated
        return student, result, reference

    def run(self, name: str, recipe: Recipe, any_scale: bool) -> None:
        """Measure one row, unless it is there."""
        if name in self.rows:
            return
        student, row, reference = self.student(recipe)
        model = copy.deepcopy(student)
        begin = time.monotonic()
        with fp32_scales() if any_scale else contextlib.nullcontext():
            reports = stage2.quantize_weights(model, self.train, recipe)
        row = {
            "recipe": recipe.to_dict(),
            **row,
            "stage2_seconds": round(time.monotonic() - begin, 1),
            "w4": self.measure(model, reference),
            "stage2_error_of_last_unit": reports[-1].error,
            "added_bytes": sum(entry.added_bytes for report in reports for entry in report.compensations),
        }
        self.rows[name] = row
        head = {"fp32": self.fp32.to_dict(), "threads": torch.get_num_threads(), "source_sha256": self.source.sha256}
        write_json(self.path, {"schema_version": "3.0", **environment(), **head, "rows": self.rows})
        print(f"{name:40} W32A4 {_line(row['w32'])}   W4A4 {_line(row['w4'])}", flush=True)


def table(rows: dict[str, Any]) -> str:
    """The rows as a table in Markdown: accuracy, and the paired difference to the float model."""
    lines = ["| recipe | W32A4 | W4A4 | W4A4 - FP32 | KL | bytes added |", "|---|---|---|---|---|---|"]
    for name, row in sorted(rows.items(), key=lambda item: item[1]["w4"]["kl"]):
        difference = row["w4"]["minus_fp32"]
        cells = [name, f"{row['w32']['top1']['percent']:.2f}", f"{row['w4']['top1']['percent']:.2f}"]
        cells += [f"{difference['points']:+.2f} ± {difference['half_interval']:.2f}", f"{row['w4']['kl']:.4f}"]
        cells += [f"{row['added_bytes']:,}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _line(result: dict[str, Any]) -> str:
    difference = result["minus_fp32"]
    return (
        f"{result['top1']['percent']:.2f} ({difference['points']:+.2f} ± {difference['half_interval']:.2f}, "
        f"KL {result['kl']:.4f}, cosine {result['cosine']:.4f})"
    )


def model_arguments(texts: list[str]) -> dict[str, Any]:
    """``--model-arg KEY=VALUE``, several times."""
    return {key: _value(value) for key, _, value in (text.partition("=") for text in texts)}


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def main() -> None:
    """Run every recipe with every seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--arch")
    parser.add_argument("--model-arg", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--data", required=True)
    parser.add_argument("--eval", help="test images, if --data has none")
    parser.add_argument("--recipes", type=Path, nargs="+", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--fp32-scales", action="store_true", help="also each row with scales that FP16 does not hold")
    parser.add_argument("--images", type=int, help="measure on so many test images, evenly spread (default: all)")
    parser.add_argument("--name", required=True, help="of the result: DATE-accuracy-NAME.json")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    source = load_model(arguments.model, arch=arguments.arch, model_args=model_arguments(arguments.model_arg))
    path = arguments.out / f"{datetime.now(UTC):%Y-%m-%d}-accuracy-{arguments.name}.json"
    bench = Bench(source, arguments.data, arguments.eval or arguments.data, arguments.images, path)
    rows = []
    for file in arguments.recipes:
        content = Recipe.from_yaml(file).to_dict()
        rows += [(f"{file.stem}, seed {seed}", Recipe.from_dict({**content, "seed": seed})) for seed in arguments.seeds]
    # Neighbours share their Stage 1.
    rows.sort(key=lambda row: json.dumps({**row[1].to_dict(), "stage2": None}, sort_keys=True, default=str))
    for name, recipe in rows:
        bench.run(name, recipe, any_scale=False)
        if arguments.fp32_scales:
            bench.run(f"{name}, FP32 scales", recipe, any_scale=True)
    print(f"wrote {path}\n\n{table(bench.rows)}")


if __name__ == "__main__":
    main()
