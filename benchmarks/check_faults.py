r"""What ``gplq-export check`` catches, how small a fault it still catches, and how far clean runs stay from its limits.

    python benchmarks/check_faults.py demo/model.pt --data fashion_mnist.npz --name demo
    python benchmarks/check_faults.py dinov2.pt --data fashion_mnist.npz --runs 4 --images 200 --name dinov2

The checkpoint is exported once. Clean runs take a random subset of the test images each; for every gate the file says
how near the favourable end of its interval came to the limit: 0 is perfect, beyond 1 would have been an alarm. Faults
(tests/faults.py) are planted in the INT4 file and in the file for ONNX Runtime on CPUs; the file says which gate caught
each first, and which layer it named.
"""

import argparse
import copy
import hashlib
import shutil
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # the faults are those of the tests
from faults import Change, clamped, exchanged, half_up, nudged, plant, scaled, swapped

from gplq.checkpoint import Checkpoint, frozen_quantizers, integer_linears, load_checkpoint
from gplq.data import ImageSet, open_test_images
from gplq.files import write_json
from gplq.grid import code_limits
from gplq.provenance import environment
from gplq_export.check.chain import Settings, check
from gplq_export.check.gates import Thresholds
from gplq_export.check.report import Gate, Report
from gplq_export.check.subject import Files, find_float_model
from gplq_export.export import export
from gplq_export.onnx_file import read_onnx

KINDS = ("int4", "cpu")
FACTORS = (1.02, 1.01, 1.005, 1.002, 1.001, 1.0005, 1.0002, 1.0001)


@dataclass(frozen=True)
class Fault:
    """A change, and the layer that must be named; None if it is not known by its name."""

    name: str
    change: Change
    layer: str | None = None


def subset(images: ImageSet, count: int, seed: int) -> ImageSet:
    """A random part of the images."""
    chosen = np.sort(np.random.default_rng(seed).permutation(len(images))[:count]).tolist()
    few = copy.copy(images)
    few.rows, few.labels = ([column[i] for i in chosen] for column in (images.rows, images.labels))
    few.fingerprint = hashlib.sha256(f"{images.fingerprint} {chosen}".encode()).hexdigest()
    return few


def usages(report: Report, thresholds: Thresholds) -> dict[str, float]:
    """By gate, which part of what it allows was used."""
    found = {gate.id: _usage(gate) for gate in report.gates if gate.status in ("passed", "failed") and gate.limit}
    factor, resolution = thresholds["floor_factor"], thresholds["codes_resolution"]
    for pair in report.pairs:
        shares = [
            layer.share.low / (factor * layer.floor.high + resolution)
            for layer in pair.layers
            if layer.share is not None and layer.floor is not None
        ]
        if shares:
            found[f"{pair.name}.free.codes"] = max(shares)
    return {name: round(value, 5) for name, value in found.items()}


def _usage(gate: Gate) -> float:
    assert gate.found is not None and gate.limit is not None
    best = 100.0 if gate.unit.startswith("%") and "equal" in gate.unit else 1.0 if gate.unit == "cosine" else None
    if best is not None:
        favourable = gate.found if gate.high is None else gate.high
        return (best - favourable) / (best - gate.limit)
    if gate.id == "data.top1":  # what must not be less
        return gate.limit / (gate.found if gate.high is None else gate.high)
    return max(gate.found if gate.low is None else gate.low, 0.0) / gate.limit


def clean_runs(
    files: Files, checkpoint: Checkpoint, images: ImageSet, arguments: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """The same export on many subsets; after each of them, what all so far have shown."""
    table: dict[str, list[float]] = defaultdict(list)
    failed: list[dict[str, Any]] = []
    settings = Settings(forced_images=arguments.forced, float_model=find_float_model(checkpoint))
    for run in range(arguments.runs):
        report = check(checkpoint, files, subset(images, arguments.images, run), settings, say=_silent)
        for name, value in usages(report, settings.thresholds).items():
            table[name].append(value)
        failed += [{"run": run, "gate": gate.id, "sentence": gate.sentence} for gate in report.failed]
        print(f"clean run {run}: {report.seconds} s, failed {[gate.id for gate in report.failed]}", flush=True)
        gates = {name: {"largest": max(v), "mean": round(float(np.mean(v)), 5)} for name, v in table.items()}
        yield {"runs": run + 1, "failed": failed, "used": gates}


def faults(checkpoint: Checkpoint, graph: ir.Model) -> Iterator[Fault]:
    """In early, middle and late layers; and the ladders of sizes."""
    quantizers, linears = frozen_quantizers(checkpoint.model), integer_linears(checkpoint.model)
    constants = graph.graph.initializers
    random = np.random.default_rng(0)
    for name in _spread(list(linears), 6):
        at = tuple(random.integers(size) for size in linears[name].codes.shape[::-1])
        yield Fault(f"one code of {name}", nudged(name, at), name)
        yield Fault(f"input channels of {name}", swapped([f"{name}.codes"], (0, 1), axis=0), name)
    attention = [name for name in linears if name.endswith(".q")]
    for name in _spread(attention, 2):
        yield Fault(f"q and k of {name}", exchanged(name, f"{name[:-1]}k"), name)
    plain = [name for name, each in quantizers.items() if each.pre_scale is None and each.pre_shift is None]
    for name in _spread(plain, 6):
        low, high = code_limits(quantizers[name].bits, quantizers[name].signed)
        yield Fault(f"half up in {name}", half_up(name), name)
        yield Fault(f"one level short in {name}", clamped(name, low, high - 1), name)
    norms = [name for name in constants if name.endswith(("norm1.weight", "norm2.weight", "norm.weight"))]
    for name in _spread(norms, 3):
        yield Fault(f"channels of {name}", swapped([name], (0, 1)))
    for factor in FACTORS:
        for name in _spread(list(quantizers), 2):
            yield Fault(f"scale of {name} x {factor}", scaled(f"{name}.scale", factor), name)
        for name in _spread([name for name in linears if f"{name}.weight_scale" in constants], 2):
            yield Fault(f"weight scale of {name} x {factor}", scaled(f"{name}.weight_scale", factor, (0,)), name)
        for name in [name for name in linears if f"{name}.bias" in constants][1:2]:
            yield Fault(f"all biases of {name} x {factor}", scaled(f"{name}.bias", factor), name)
        for name in norms[-1:]:
            yield Fault(f"element of {name} x {factor}", scaled(name, factor, (0,)))
        yield Fault(f"pos_embed x {factor}", scaled("pos_embed", factor))


def _spread(names: list[str], count: int) -> list[str]:
    return [names[i] for i in np.unique(np.linspace(0, len(names) - 1, min(count, len(names))).astype(int))]


def planted(
    dist: Path, checkpoint: Checkpoint, images: ImageSet, arguments: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Each fault, in both files, and what the check says of it."""
    few = images.head(arguments.fault_images)
    settings = Settings(forced_images=arguments.fault_images)
    for fault in faults(checkpoint, read_onnx(dist / "model.int4.onnx")):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(shutil.copytree(dist, Path(name) / "dist"))
            try:
                for kind in KINDS:
                    plant(folder, kind, fault.change)
            except (AssertionError, KeyError) as error:  # so small that no float changes, or held in another form
                yield {"fault": fault.name, "not planted": str(error)}
                continue
            files = Files.of([folder / f"model.{kind}.onnx" for kind in KINDS])
            report = check(checkpoint, files, few, settings, say=_silent)
        row: dict[str, Any] = {"fault": fault.name, "layer": fault.layer}
        for kind in KINDS:
            first = next((gate for gate in report.failed if gate.pair == kind), None)
            row[kind] = None if first is None else {"gate": first.id, "layer": first.layer, "found": first.found}
        row["caught"] = all(row[kind] is not None for kind in KINDS)
        row["right place"] = fault.layer is None or all(row[k] and row[k]["layer"] == fault.layer for k in KINDS)
        yield row


def _silent(_: str) -> None:
    """No progress of single checks."""


def main() -> None:
    """Measure and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--data", required=True, help="test images with labels; see 'gplq eval --help'")
    parser.add_argument("--runs", type=int, default=20, help="clean runs")
    parser.add_argument("--images", type=int, default=600, help="of a clean run")
    parser.add_argument("--forced", type=int, default=64, help="of these, teacher-forced")
    parser.add_argument("--fault-images", type=int, default=16, help="of a run with a fault")
    parser.add_argument("--no-faults", action="store_true", help="clean runs alone")
    parser.add_argument("--openvino", action="store_true", help="export and check its file, too")
    parser.add_argument("--name", default="model")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    checkpoint = load_checkpoint(arguments.checkpoint)
    images = open_test_images(arguments.data, checkpoint, None)
    path = arguments.out / f"{datetime.now(UTC):%Y-%m-%d}-check-faults-{arguments.name}.json"
    settings = {key: getattr(arguments, key) for key in ("images", "forced", "fault_images")}
    content: dict[str, Any] = {"schema_version": "1.0", **environment(), "settings": settings}
    with tempfile.TemporaryDirectory() as name:
        dist = Path(name) / "dist"
        export(checkpoint, dist, openvino=arguments.openvino, say=_silent)
        for content["clean"] in clean_runs(Files.of([dist]), checkpoint, images, arguments):
            write_json(path, content)
        content["faults"] = []
        for row in () if arguments.no_faults else planted(dist, checkpoint, images, arguments):
            content["faults"].append(row)
            print(row, flush=True)
            write_json(path, content)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
