"""What a step of Stage 1 costs against a training step of the float model, in time and memory, as dated JSON.

    python benchmarks/stage1_cost.py --out benchmarks/results                                   # CPU, FP32
    python benchmarks/stage1_cost.py --device cuda --batch 128 --precision bf16 --out …

Both steps are forward, backward and AdamW on the same model, batch and precision; Stage 1 has its quantisers, the
forward pass of the teacher and the PCA loss in addition. Time: the two are run in turn, in one process; the ratio is of
neighbours. Memory: the most that PyTorch had allocated at a time, in a process of its own each: on CUDA what its
allocator counts, on a CPU what its profiler does. There the resident set is measured too, above what it was before the
model was built; with it come the libraries' own buffers.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gplq import Recipe
from gplq.calibrate import calibrate_on
from gplq.convert import convert
from gplq.files import write_json
from gplq.pca import Features
from gplq.provenance import environment
from gplq.stage1 import AUTOCAST, Trainer, distillation, make_teacher


def build(arguments: argparse.Namespace) -> nn.Module:
    """The float model with random weights."""
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(arguments.model, img_size=arguments.img_size, num_classes=arguments.classes)
    return model.to(arguments.device).eval()


def batch(arguments: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Random images and labels."""
    torch.manual_seed(1)
    images = torch.randn(arguments.batch, 3, arguments.img_size, arguments.img_size, device=arguments.device)
    return images, torch.randint(arguments.classes, (arguments.batch,), device=arguments.device)


def float_step(arguments: argparse.Namespace) -> Callable[[], None]:
    """A training step of the float model."""
    model, (images, labels) = build(arguments), batch(arguments)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    dtype = AUTOCAST[arguments.precision]

    def step() -> None:
        with torch.autocast(arguments.device, dtype, enabled=dtype is not None):
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()

    return step


def stage1_step(arguments: argparse.Namespace) -> Callable[[], None]:
    """A step of Stage 1."""
    settings = {"precision": arguments.precision, "gradient_checkpointing": arguments.checkpointing}
    settings["teacher_precision"] = arguments.teacher_precision
    recipe = Recipe.from_dict({"stage1": {"batch_size": arguments.batch, **settings}})
    teacher, data = build(arguments), batch(arguments)
    make_teacher(teacher, recipe.stage1)
    student = convert(build(arguments), recipe)
    calibrate_on(student, lambda part: student(part[0]), [data], 1, recipe)
    # Never left: the taps stay for as long as the process.
    features, targets = Features(student).__enter__(), Features(teacher).__enter__()
    random = torch.randn(teacher.num_features, arguments.directions, device=arguments.device)
    loss = distillation(teacher, features, targets, torch.linalg.qr(random)[0], recipe.stage1)
    trainer = Trainer(student, loss, recipe)

    def step() -> None:
        trainer.advance([data])

    return step


STEPS = {"float": float_step, "stage1": stage1_step}


def seconds(step: Callable[[], None], device: str) -> float:
    """How long a step takes; both kinds end with reading the loss, which waits for the GPU's forward pass only."""
    start = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_bytes(kind: str, counter: str, arguments: argparse.Namespace) -> int:
    """Peak memory of three steps, in this process; see the top."""

    def steps() -> None:
        step = STEPS[kind](arguments)
        for _ in range(3):
            step()

    if arguments.device == "cuda":
        steps()
        return torch.cuda.max_memory_allocated()
    if counter == "resident":
        before = _resident("VmRSS")
        steps()
        return _resident("VmHWM") - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        steps()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    return max(event["args"]["Total Allocated"] for event in events if event.get("name") == "[memory]")


def _resident(key: str) -> int:
    """Resident bytes of this process on Linux: VmRSS now, VmHWM the most so far."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{key}:")[1].split()[0]) * 1024


def peak_bytes_elsewhere(kind: str, counter: str) -> int:
    """:func:`peak_bytes` in a process of its own."""
    command = [sys.executable, *sys.argv, "--peak", kind, counter]
    # Freed memory goes back at once, so that the peak is what was in use and not what was kept for later.
    environ = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    return int(subprocess.run(command, check=True, capture_output=True, text=True, env=environ).stdout.split()[-1])


def main() -> None:
    """Measure and write one file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_small_patch14_dinov2")
    parser.add_argument("--img-size", type=int, default=70)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--directions", type=int, default=128, help="of the PCA loss")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--precision", choices=list(AUTOCAST), default="fp32")
    parser.add_argument("--teacher-precision", choices=list(AUTOCAST), help="default: the recipe's")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing in Stage 1 (only there)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=7, help="pairs of steps that are timed")
    parser.add_argument("--out", type=Path, required=True, help="folder of the JSON")
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak is not None:
        print(peak_bytes(*arguments.peak, arguments))
        return
    results: dict[str, Any] = {"settings": {**vars(arguments), "out": str(arguments.out)}}
    steps = {kind: make(arguments) for kind, make in STEPS.items()}
    for step in steps.values():  # warm
        step()
    times: dict[str, list[float]] = {kind: [] for kind in STEPS}
    for _ in range(arguments.rounds):
        for kind, step in steps.items():
            times[kind].append(seconds(step, arguments.device))
    ratios = [ours / theirs for ours, theirs in zip(times["stage1"], times["float"], strict=True)]
    results["seconds"] = times
    results["time_ratio"] = {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
    results["peak_bytes"], results["memory_ratio"] = {}, {}
    for counter in ["allocated"] if arguments.device == "cuda" else ["allocated", "resident"]:
        peaks = {kind: peak_bytes_elsewhere(kind, counter) for kind in STEPS}
        results["peak_bytes"][counter] = peaks
        results["memory_ratio"][counter] = peaks["stage1"] / peaks["float"]
    print(json.dumps(results, indent=2))
    name = f"stage1-cost-{arguments.device}-{arguments.precision}-{arguments.img_size}px.json"
    path = arguments.out / f"{datetime.now(UTC):%Y-%m-%d}-{name}"
    write_json(path, {"schema_version": "1.0", **environment(), "threads": torch.get_num_threads(), "results": results})
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
