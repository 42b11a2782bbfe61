r"""What an export proves, and how long it takes: parity and engine precisions of several models, as dated JSON.

    python benchmarks/export_proof.py dinov2.pt --data fashion_mnist.npz --images 1000 --name dinov2
    python benchmarks/export_proof.py --random vit_small_patch16_224 deit_tiny_patch16_224 --data fashion_mnist.npz

CHECKPOINT is what ``gplq quantize`` wrote. ``--random`` quantises a timm architecture with random weights, calibrated
on the same data and not trained: lowering, proof and time do not depend on what the weights are. The images are those
of the data set, brought to the model's size by its own transform. Engines are built with TensorRT if there is a GPU,
else with TensorRT-RTX, of all four kinds. The file is written after every model; models that it has are skipped.
"""

import argparse
import importlib.util
import json
import os
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import timm
import torch

from gplq import Recipe
from gplq.checkpoint import Checkpoint, load_checkpoint
from gplq.data import open_test_images
from gplq.files import write_json
from gplq.models import FloatModel, ModelSpec
from gplq.pipeline import quantize
from gplq.preprocessing import Preprocessing
from gplq.provenance import environment
from gplq_export.export import ExportResult, export
from gplq_export.reports.words import compared

ENGINES = ("int4", "int8", "fp8", "fp16")


def random_checkpoint(architecture: str, data: str, folder: Path, recipe: dict[str, Any]) -> Checkpoint:
    """A calibrated checkpoint of random weights, with as many classes as the architecture has."""
    torch.manual_seed(0)
    model = timm.create_model(architecture, pretrained=False).eval()
    config = timm.data.resolve_model_data_config(model)
    source = FloatModel(model, ModelSpec(architecture, {}, 1000), Preprocessing.from_dict(config), None, "random", "")
    path = folder / f"{architecture}.pt"
    cheap = {
        "calibration": {"images": 16},
        "stage1": {"enabled": False, "task_weight": 0},
        "stage2": {"images": 16, "rounding": "nearest", "range": "mse"},
    }
    quantize(source, data, path, Recipe.from_dict({**cheap, **recipe}), eval_images=1)
    return load_checkpoint(path)


def measure(checkpoint: Checkpoint, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Export with every check; what it proved, and how long it took."""
    labelled = checkpoint.provenance.get("source") != "random"
    images = open_test_images(arguments.data, checkpoint, arguments.images, need_labels=labelled)
    started = time.perf_counter()
    openvino = importlib.util.find_spec("openvino") is not None
    settings: dict[str, Any] = {"images": images, "forced_images": arguments.forced, "openvino": openvino}
    result = export(checkpoint, folder / "dist", engines=ENGINES, **settings)
    return {"seconds": round(time.perf_counter() - started, 1), **summary(result)}


def summary(result: ExportResult) -> dict[str, Any]:
    """The part of a manifest and of a report that a table wants."""
    bytes_of = {name: entry["bytes"] for name, entry in result.files.items()}
    engines = {
        name: {
            "precision": table.summary() if (table := result.precision.get(name)) else None,
            "unfused": sorted({row.note for row in table.of("attention") if row.note}) if table else [],
            "layers": len(built.layers),
            "plan_bytes": built.plan_bytes,
            "build_seconds": round(built.build_seconds, 2),
            "backend": f"{built.backend} {built.backend_version}",
        }
        for name, built in result.engines.items()
    }
    report = result.report
    assert report is not None  # there were images
    return {
        "bytes": bytes_of,
        "int4_over_fp32": round(bytes_of["model.int4.onnx"] / bytes_of["model.fp32.onnx"], 4),
        "parity": {pair.name: pair.skipped or compared(pair) for pair in report.pairs},
        "gates": {gate.id: gate.sentence for gate in report.gates if gate.status in ("passed", "failed")},
        "engines": engines,
        "problems": [str(problem) for problem in result.problems],
    }


def main() -> None:
    """Measure the models and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="*", type=Path, metavar="CHECKPOINT")
    parser.add_argument("--random", nargs="*", default=[], metavar="ARCHITECTURE")
    parser.add_argument("--recipe", type=Path, help="of the random ones; what it says replaces the cheap defaults")
    parser.add_argument("--data", required=True, help="training and test images; see 'gplq quantize --help'")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--forced", type=int, default=256, help="so many of them teacher-forced")
    parser.add_argument("--name", default="export-proof")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    path = arguments.out / f"{datetime.now(UTC):%Y-%m-%d}-{arguments.name}.json"
    content: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"schema_version": "1.0", "models": {}}
    content |= {**environment(), "images": arguments.images, "forced": arguments.forced, "cpus": os.cpu_count()}
    recipe = Recipe.from_yaml(arguments.recipe).model_dump(exclude_unset=True) if arguments.recipe else {}
    for source in (*map(str, arguments.checkpoints), *arguments.random):
        if source in content["models"]:
            continue
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            random = source in arguments.random
            checkpoint = (
                random_checkpoint(source, arguments.data, folder, recipe) if random else load_checkpoint(Path(source))
            )
            content["models"][Path(source).name] = measure(checkpoint, arguments, folder)
        write_json(path, content)
    for model, row in content["models"].items():
        print(f"\n{model}: {row['seconds']} s, INT4 ONNX {row['int4_over_fp32']} x FP32")
        for name, text in (*row["parity"].items(), *((k, v["precision"]) for k, v in row["engines"].items())):
            print(f"  {name:10} {text}")


if __name__ == "__main__":
    main()
