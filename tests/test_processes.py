"""Stage 1 across processes: several at once, and one that is killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import fast_recipe
from torch import Tensor

from gplq import Recipe
from gplq.checkpoint import read_plain
from gplq.errors import CheckpointError, UsageError
from gplq.models import FloatModel
from gplq.pipeline import quantize
from gplq.processes import processes

# Trains as the pipeline does and stores what Stage 1 is about; ``quantize`` would round the differences away.
TRAIN = """
import copy, sys
from pathlib import Path
import torch
from gplq import Recipe, load_model, stage1
from gplq.calibrate import activation_quantizers, calibrate
from gplq.data import open_images
from gplq.convert import convert
from gplq.processes import processes
torch.set_num_threads(1)
model, data, recipe, out, noise = sys.argv[1:]
recipe = Recipe.from_yaml(Path(recipe))
source = load_model(model)
images = open_images(data, "train", source.preprocessing)
student = convert(copy.deepcopy(source.model), recipe)
calibrate(student, images, recipe)
with torch.no_grad():
    for quantizer in activation_quantizers(student).values():
        quantizer.raw_scale += float(noise)
start = copy.deepcopy(student.state_dict())
stage1.train(student, source.model, images, recipe, None, lambda state: None)
result = {"count": processes().num_processes, "start": start, "end": student.state_dict()}
torch.save(result, f"{out}.{processes().process_index}")
"""


def torchrun(*arguments: str, count: int = 2) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(count), "--standalone"]
    environ = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    return subprocess.run([*command, *arguments], capture_output=True, text=True, env=environ, timeout=200, check=False)


@pytest.mark.slow
def test_two_processes_train_what_one_trains(model_folder: Path, npz_file: Path, tmp_path: Path) -> None:
    # With percentiles or the squared error a sample decides each scale; the extremes are the same for both.
    recipe = fast_recipe(lr=1e-4, scale_lr=1e-3, accumulate=2).to_dict()
    recipe["calibration"] |= {"linear_range": "minmax", "matmul_range": "minmax", "equalize": False, "shift": False}
    recipe_file, script = tmp_path / "recipe.yaml", tmp_path / "train.py"
    recipe_file.write_text(Recipe.from_dict(recipe).to_yaml())
    script.write_text(TRAIN)
    # How far apart two correct runs are: the same images in each step, summed in another order, and scales whose last
    # bits differ, as they do if the activations that they come from were computed in batches of another size.
    recipe["stage1"] |= {"accumulate": 1}
    whole_file = tmp_path / "whole.yaml"
    whole_file.write_text(Recipe.from_dict(recipe).to_yaml())
    for name, count, file, noise in (
        ("one", 1, recipe_file, "0"),
        ("noise", 1, whole_file, "1e-6"),
        ("two", 2, recipe_file, "0"),
    ):
        paths = (str(path) for path in (script, model_folder, npz_file, file, tmp_path / name))
        done = torchrun(*paths, noise, count=count)
        assert done.returncode == 0, done.stderr
    one, other, first, second = (
        torch.load(tmp_path / name, weights_only=True) for name in ("one.0", "noise.0", "two.0", "two.1")
    )
    assert (one["count"], first["count"]) == (1, 2)
    for name, tensor in one["start"].items():
        torch.testing.assert_close(first["start"][name], tensor, rtol=1e-5, atol=1e-6)
    moved = apart = floor = 0.0
    for name, tensor in one["end"].items():
        assert torch.equal(first["end"][name], second["end"][name]), name  # the processes stay in step
        apart += float((first["end"][name] - tensor).square().sum())
        floor += float((other["end"][name] - tensor).square().sum())
        moved += float((one["start"][name] - tensor).square().sum())
    # Sums in another order flip a code here and there, and Adam's first steps are as long for a small gradient as for
    # a large one.
    assert apart < 2 * floor < moved


@pytest.mark.slow
def test_only_the_first_of_two_processes_prints_and_writes(
    model_folder: Path, npz_file: Path, recipe_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out" / "model.pt"
    arguments = [str(model_folder), "--data", str(npz_file), "--out", str(out), "--recipe", str(recipe_file)]
    done = torchrun("-m", "gplq", "quantize", *arguments)
    assert done.returncode == 0, done.stderr
    for line in ("FP32 ", "W32A4", "W4A4 ", "wrote"):
        assert sum(said.startswith(line) for said in done.stdout.splitlines()) == 1, done.stdout
    assert "(n = 64)" in done.stdout
    assert torch.load(out, weights_only=True)["provenance"]["processes"] == 2
    assert [path.name for path in out.parent.iterdir()] == ["model.pt"]


def step_reached(path: Path) -> int:
    """The step of a run's stored state, which may not exist yet."""
    try:
        return int(read_plain(path)["stage1"]["step"])
    except (CheckpointError, KeyError):
        return -1


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"precision": "bf16", "accumulate": 4}])
def test_a_killed_run_ends_in_the_same_codes(
    changes: dict[str, Any], float_model: FloatModel, model_folder: Path, npz_file: Path, tmp_path: Path
) -> None:
    recipe = fast_recipe(epochs=8, checkpoint_seconds=1e-6, **changes)
    recipe_file, out = tmp_path / "recipe.yaml", tmp_path / "model.pt"
    recipe_file.write_text(recipe.to_yaml())
    arguments = [str(model_folder), "--data", str(npz_file), "--out", str(out), "--recipe", str(recipe_file)]
    command = [sys.executable, "-m", "gplq", "quantize", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    state = out.with_name("model.pt.resume")
    deadline = time.monotonic() + 60
    while step_reached(state) < 5 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert 5 <= step_reached(state) < 64
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "resuming Stage 1 at step" in again.stdout
    quantize(float_model, npz_file, tmp_path / "whole.pt", recipe, say=lambda _: None)
    ours, theirs = (torch.load(tmp_path / name, weights_only=True) for name in ("model.pt", "whole.pt"))
    for part in ("linears", "quantizers"):
        assert ours[part].keys() == theirs[part].keys()
        for name, entry in theirs[part].items():
            for key, value in entry.items():
                same = torch.equal(ours[part][name][key], value) if isinstance(value, Tensor) else True
                assert same, (name, key)


def test_fsdp_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    processes.cache_clear()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UsageError, match="FSDP"):
        processes()
