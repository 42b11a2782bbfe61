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
from torch import Tensor, nn

from gplq import Recipe
from gplq.checkpoint import read_plain
from gplq.errors import CheckpointError, ModelError, UsageError
from gplq.models import FloatModel
from gplq.pipeline import quantize
from gplq.processes import processes
from gplq.shard import shard

# The step after which TRAIN stores the state.
STOP = 3

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
from gplq.shard import local
torch.set_num_threads(1)
model, data, recipe, out, noise, resume, stop = sys.argv[1:]
recipe = Recipe.from_yaml(Path(recipe))
source = load_model(model)
images = open_images(data, "train", source.preprocessing)
student = convert(copy.deepcopy(source.model), recipe)
calibrate(student, images, recipe)
with torch.no_grad():
    for quantizer in activation_quantizers(student).values():
        quantizer.raw_scale += float(noise)
start = copy.deepcopy(student.state_dict())
held = 0

class Watched(stage1.Trainer):
    def advance(self, parts):
        global held
        terms = super().advance(parts)
        held = sum(local(moment).numel() for entry in self.optimizer.state.values() for moment in entry.values())
        return terms

def save(state):
    if state["step"] == int(stop):
        torch.save(state, f"{out}.state.{processes().process_index}")

stage1.Trainer = Watched
state = torch.load(resume, weights_only=True) if resume else None
stage1.train(student, source.model, images, recipe, state, save)
result = {"count": processes().num_processes, "start": start, "end": student.state_dict(), "held": held}
torch.save(result, f"{out}.{processes().process_index}")
"""


def torchrun(*arguments: str, count: int = 2, fsdp: bool = False) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(count), "--standalone"]
    environ = {**os.environ, "ACCELERATE_USE_CPU": "true", "ACCELERATE_USE_FSDP": str(fsdp)}
    return subprocess.run([*command, *arguments], capture_output=True, text=True, env=environ, timeout=200, check=False)


class Training:
    """Runs Stage 1 in processes of its own; the files are those of a folder."""

    def __init__(self, model_folder: Path, npz_file: Path, folder: Path, **stage1: Any) -> None:
        self.inputs, self.folder, self.stage1 = (str(model_folder), str(npz_file)), folder, stage1
        (folder / "train.py").write_text(TRAIN)

    def run(
        self, name: str, count: int, *, fsdp: bool = False, noise: float = 0, resume: Path | str = "", **stage1: Any
    ) -> list[dict[str, Any]]:
        """What each process ends with."""
        # With percentiles or the squared error a sample decides each scale; the extremes are the same for all.
        recipe = fast_recipe(lr=1e-4, scale_lr=1e-3, **{**self.stage1, **stage1}).to_dict()
        recipe["calibration"] |= {"linear_range": "minmax", "matmul_range": "minmax", "equalize": False, "shift": False}
        recipe_file, out = self.folder / f"{name}.yaml", self.folder / name
        recipe_file.write_text(Recipe.from_dict(recipe).to_yaml())
        script = str(self.folder / "train.py")
        arguments = (str(recipe_file), str(out), str(noise), str(resume), str(STOP))
        done = torchrun(script, *self.inputs, *arguments, count=count, fsdp=fsdp)
        assert done.returncode == 0, done.stderr
        assert "Warning" not in done.stderr
        results = [torch.load(f"{out}.{rank}", weights_only=True) for rank in range(count)]
        assert [result["count"] for result in results] == [count] * count
        for result in results:  # the processes stay in step
            assert_equal(result["end"], results[0]["end"])
        return results


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


def apart(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    return sum(float((ours[name] - tensor).square().sum()) for name, tensor in theirs.items())


@pytest.mark.slow
def test_two_processes_train_what_one_trains(model_folder: Path, npz_file: Path, tmp_path: Path) -> None:
    training = Training(model_folder, npz_file, tmp_path, accumulate=2)
    one = training.run("one", 1)[0]
    # How far apart two correct runs are: the same images in each step, summed in another order, and scales whose last
    # bits differ, as they do if the activations that they come from were computed in batches of another size.
    noise = training.run("noise", 1, noise=1e-6, accumulate=1)[0]
    floor, moved = apart(noise["end"], one["end"]), apart(one["start"], one["end"])
    held = {}
    for fsdp in (False, True):
        two = training.run(f"fsdp{fsdp}", 2, fsdp=fsdp)[0]
        for name, tensor in one["start"].items():
            torch.testing.assert_close(two["start"][name], tensor, rtol=1e-5, atol=1e-6)
        # Sums in another order flip a code here and there, and Adam's first steps are as long for a small gradient as
        # for a large one.
        assert apart(two["end"], one["end"]) < 2 * floor < moved
        held[fsdp] = two["held"]
    assert held[False] == one["held"]
    assert held[True] < 0.52 * one["held"]  # the scales' moments are held by both


@pytest.mark.slow
def test_a_sharded_run_resumes_exactly(model_folder: Path, npz_file: Path, tmp_path: Path) -> None:
    training = Training(model_folder, npz_file, tmp_path, checkpoint_seconds=1e-9, precision="bf16")
    whole = training.run("whole", 2, fsdp=True)[0]
    assert torch.load(tmp_path / "whole.state.1", weights_only=True)["student"]["norm.weight"].numel() == 0
    again = training.run("again", 2, fsdp=True, resume=tmp_path / "whole.state.0")[0]
    assert_equal(again["end"], whole["end"])
    # The state is that of any other run: one process can go on with it.
    alone = training.run("alone", 1, resume=tmp_path / "whole.state.0")[0]
    assert 0 < apart(alone["end"], whole["end"]) < apart(whole["start"], whole["end"])


# A loss that drops one of its terms after a while.
CHANGES = """
import copy, sys
from pathlib import Path
import torch
import gplq
from gplq.convert import convert
from gplq.errors import UsageError
torch.set_num_threads(1)
model = convert(copy.deepcopy(gplq.load_model(sys.argv[1]).model), gplq.Recipe())
model.extra = torch.nn.Linear(4, 4)
recipe = gplq.Recipe.from_dict({"stage1": {"batch_size": 4}, "calibration": {"images": 4}})
calls = 0

def loss(model, batch):
    global calls
    calls += 1
    logits = model(batch)
    return (logits if calls > 5 else model.extra(logits)).square().mean()

try:
    gplq.train_activations(model, [torch.randn(2, 1, 16, 16)] * 8, loss=loss, recipe=recipe)
except UsageError as error:
    print(error)
"""


@pytest.mark.slow
def test_a_loss_that_changes_its_parameters_is_refused(model_folder: Path, tmp_path: Path) -> None:
    script = tmp_path / "changes.py"
    script.write_text(CHANGES)
    done = torchrun(str(script), str(model_folder))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("the loss depends on other parameters than at first") == 2


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [False, True])
def test_only_the_first_of_two_processes_prints_and_writes(
    fsdp: bool, model_folder: Path, npz_file: Path, recipe_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out" / "model.pt"
    arguments = [str(model_folder), "--data", str(npz_file), "--out", str(out), "--recipe", str(recipe_file)]
    done = torchrun("-m", "gplq", "quantize", *arguments, fsdp=fsdp)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
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


def test_deepspeed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    processes.cache_clear()
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(UsageError, match="DeepSpeed"):
        processes()


def test_a_single_number_cannot_be_divided() -> None:
    objective = nn.Module()
    objective.temperature = nn.Parameter(torch.ones(()))
    with pytest.raises(ModelError, match="parameter 'temperature' is a single number"):
        shard(objective, [], torch.device("cpu"))
