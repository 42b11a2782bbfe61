r"""What becomes of every family of timm models on every target, as a Markdown table.

    python benchmarks/families.py --table benchmarks/families.md --out benchmarks/results/families.json

One tiny model of each family, with random weights (those of ``tests/test_families.py``), quantised by the default
recipe without Stage 1. Engines are built by whichever builder is there, FP8 for compute capability 8.9; kernels are
read back from ONNX Runtime and OpenVINO on this CPU. Nothing runs on a GPU. ``--only`` takes some families.
"""

import argparse
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch

from gplq import stage2
from gplq.calibrate import calibrate
from gplq.checkpoint import Checkpoint
from gplq.convert import convert
from gplq.files import write_json, write_text
from gplq.provenance import environment
from gplq_export.engine import Backend, build_engine, find_builder
from gplq_export.kernels import Kernel, onnxruntime_kernels, openvino_kernels
from gplq_export.lowering import linear_nodes, lower
from gplq_export.precision import PrecisionTable, precision_table
from gplq_export.promise import promise
from gplq_export.targets import TARGETS
from gplq_export.trace import trace

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from test_families import TINY, Images, build, recipe

ENGINES = {"trt-int8": (86,), "trt-fp8": (89,), "fp16": (86,)}
RUNTIMES: dict[str, Callable[[Path], dict[str, Kernel]]] = {"cpu": onnxruntime_kernels, "openvino": openvino_kernels}


def traced(family: str, folder: Path) -> ir.Model:
    """The dialect of a family's tiny model."""
    spec, model = build(family)
    data, preprocessing = Images(folder).of(model)
    convert(model, recipe())
    calibrate(model, data, recipe())
    stage2.quantize_weights(model, data, recipe())
    return trace(Checkpoint(model, spec, preprocessing, None, recipe(), {}))


def engine(dialect: ir.Model, name: str, backend: Backend, folder: Path) -> PrecisionTable:
    """What multiplies in which type in one engine."""
    target = TARGETS[name]()
    model = lower(dialect, target, {})
    ir.save(model, folder / "model.onnx")
    gpus = ENGINES[name] if backend.name == "TensorRT-RTX" else ()
    report = build_engine(
        folder / "model.onnx", folder / "model.plan", batch=(1, 2, 4), compute_capabilities=gpus, backend=backend
    )
    return precision_table(report, promise(model, target, linear_nodes(dialect)))


def measure(family: str, backend: Backend) -> dict[str, Any]:
    """One family on every target."""
    reasons: Counter[str] = Counter()
    row: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        dialect = traced(family, folder)
        for target in ENGINES:
            table = engine(dialect, target, backend, folder)
            row[target] = table.summary()
            row[f"{target} broken"] = [each.name for each in table.rows if not each.kept]
            reasons.update(f"{target}: {each.note}" for each in table.of("attention") if each.note)
        for target, read in RUNTIMES.items():
            ir.save(lower(dialect, TARGETS[target](), {}), folder / "model.onnx")
            kernels = read(folder / "model.onnx")
            wanted = [kernel for kernel in kernels.values() if kernel.promised or kernel.note]
            row[target] = f"{sum(kernel.integer for kernel in wanted)} of {len(wanted)}"
            row[f"{target} broken"] = [each for each, it in kernels.items() if it.promised and not it.integer]
            reasons.update(it.note for it in wanted if it.note)
    return {**row, "reasons": [f"{count} x {reason}" for reason, count in reasons.items()]}


def markdown(rows: dict[str, dict[str, Any]], versions: str) -> str:
    """The table; what breaks a promise is in bold."""
    columns = [*ENGINES, *RUNTIMES]
    lines = [
        "# Families on every target",
        "",
        f"Tiny random models, {versions}; made by `python benchmarks/families.py`. INT8 and FP8 carry the same 4-bit",
        "codes; what the checkpoint leaves in floating point is counted as FP16. CPU columns: integer kernels, of the",
        "multiplications both of whose factors are quantised.",
        "",
        "| family | trt-int8 | trt-fp8 | fp16 | ONNX Runtime | OpenVINO | reason for what is not |",
        "|---|---|---|---|---|---|---|",
    ]
    for family, row in rows.items():
        cells = [row[column] + " **broken**" * bool(row[f"{column} broken"]) for column in columns]
        lines.append(f"| {' | '.join([family, *cells, '; '.join(row['reasons'])])} |")
    return "\n".join(lines)


def main() -> None:
    """Measure the families, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(TINY), default=list(TINY), metavar="FAMILY")
    parser.add_argument("--out", type=Path, help="also write a JSON file; the date is put in front of its name")
    parser.add_argument("--table", type=Path, help="also write the table here: builders print warnings between")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    backend = find_builder()
    rows = {}
    for family in arguments.only:
        print(family, file=sys.stderr, flush=True)
        rows[family] = measure(family, backend)
    table = markdown(rows, f"{backend.name} {backend.version}")
    print(table)
    if arguments.table:
        write_text(arguments.table, f"{table}\n")
    if arguments.out:
        path = arguments.out.with_name(f"{datetime.now(UTC):%Y-%m-%d}-{arguments.out.name}")
        write_json(path, {"schema_version": "1.0", **environment(), "rows": rows})


if __name__ == "__main__":
    main()
