"""Top-1 of the demo model for several recipes and seeds, as dated JSON: what method, scale grid and rounding are worth.

    python benchmarks/accuracy.py --out benchmarks/results                       # the embedded 2,048 test images
    python benchmarks/accuracy.py --eval fashion_mnist.npz --out …               # the full 10,000

The recipe in ``recipes/demo.yaml`` was chosen by looking at the embedded test images, so that its figures on them are
slightly optimistic; the differences between rows are what this is for.
"""

import argparse
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from gplq import Recipe, load_model, quantize
from gplq.files import write_json
from gplq.provenance import environment

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "calib/fashion_mnist/fashion_mnist.npz"


def variants() -> dict[str, dict[str, Any]]:
    """Name -> recipe as plain data."""
    demo = Recipe.from_yaml(ROOT / "recipes/demo.yaml").to_dict()
    found = {"naive": Recipe.from_yaml(ROOT / "recipes/naive.yaml").to_dict()}
    found |= {f"demo, seed {seed}": {**demo, "seed": seed} for seed in (0, 1, 2)}
    found["demo, exact scale grid"] = {**demo, "scale_grid": "exact"}
    found["demo, rounding to nearest"] = {**demo, "stage2": {**demo["stage2"], "rounding": "nearest"}}
    found["demo, no Stage 1"] = {**demo, "stage1": {**demo["stage1"], "enabled": False}}
    return found


def main() -> None:
    """Run every variant and write one file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--eval", type=Path, help="npz with other test images")
    parser.add_argument("--out", type=Path, required=True, help="folder of the JSON")
    arguments = parser.parse_args()
    results = {}
    for name, content in variants().items():
        print(f"== {name}")
        source = load_model(str(ROOT / "calib/fashion_mnist/vit"))
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "model.pt"
            accuracies = quantize(source, DATA, out, Recipe.from_dict(content), eval_data=arguments.eval)
            results[name] = {"recipe": content, "checkpoint_bytes": out.stat().st_size}
        results[name]["top1"] = {key: accuracy.to_dict() for key, accuracy in accuracies.items()}
    path = arguments.out / f"{datetime.now(UTC):%Y-%m-%d}-accuracy.json"
    write_json(path, {"schema_version": "1.0", **environment(), "threads": torch.get_num_threads(), "results": results})
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
