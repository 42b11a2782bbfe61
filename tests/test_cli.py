"""The command: exit codes, messages, and what is left on disk."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Quantised, fast_recipe

import gplq
from gplq.cli import main
from gplq.recipe import Recipe


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_quantise_then_measure(
    model_folder: Path, npz_file: Path, recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "model.pt"
    common = ["quantize", str(model_folder), "--data", str(npz_file), "--recipe", str(recipe_file), "--out", str(out)]
    assert main(common) == 0
    output = capsys.readouterr().out
    assert [name in output for name in ("FP32 ", "W32A4 ", "W4A4 ", f"wrote {out}")] == [True] * 4
    assert listing(out.parent) == ["model.pt"]
    line = next(line for line in output.splitlines() if line.startswith("W4A4 "))
    assert main(["eval", str(out), "--data", str(npz_file)]) == 0
    assert capsys.readouterr().out.split("top-1")[1] == line.split("top-1")[1] + "\n"

    before = out.read_bytes()
    assert main(common) == 2
    assert "--force" in capsys.readouterr().err
    assert out.read_bytes() == before
    assert main([*common, "--force"]) == 0


def test_result_far_from_the_float_model_exits_with_1_and_is_kept(
    model_folder: Path, npz_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = fast_recipe(task_weight=0.0, max_images=16).to_dict()
    recipe.update(activation_bits=2, limits={"agreement": 100.0, "cosine": 1.0})
    (tmp_path / "strict.yaml").write_text(Recipe.from_dict(recipe).to_yaml())
    out = tmp_path / "new" / "model.pt"
    arguments = ["--data", npz_file, "--recipe", tmp_path / "strict.yaml", "--out", out]
    assert main(["quantize", str(model_folder), *map(str, arguments)]) == 1
    output, error = capsys.readouterr()
    provenance = torch.load(out, weights_only=True)["provenance"]
    found = provenance["closeness"]["W4A2"]
    assert error.startswith("gplq: error: the quantised model is not close to the float model: ")
    assert f"{found['percent']:.1f} % of its labels agree, limit 100.0 %" in error
    assert f"cosine of its features {found['cosine']:.4f}, limit 1.0 (n = {found['n']})" in error
    assert f"{out} is kept" in error
    assert "stage1.max_images" in error  # what to do
    assert listing(out.parent) == ["model.pt"]
    with torch.no_grad():
        assert gplq.load(out)(torch.zeros(1, 1, 16, 16)).shape == (1, 4)
    # Whoever looks on need not wait for the end of Stage 1.
    lines = output.splitlines()
    warned = next(index for index, line in enumerate(lines) if line.startswith("WARNING: calibration alone leaves"))
    assert "Stage 1 may mend it" in lines[warned]
    assert warned < next(index for index, line in enumerate(lines) if line.startswith("W32A2"))


def test_recipe_prints_what_it_reads(recipe_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe"]) == 0
    assert capsys.readouterr().out == Recipe().to_yaml()
    assert main(["recipe", "--recipe", str(recipe_file)]) == 0
    assert capsys.readouterr().out == Recipe.from_yaml(recipe_file).to_yaml() != Recipe().to_yaml()


@pytest.mark.parametrize("arguments", [[], ["bogus"], ["quantize"], ["eval", "x", "--data", "y", "--images", "0"]])
def test_wrong_usage_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: gplq" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "vit_tinny_patch16"}, "neither an existing file or folder nor a model of timm"),
        ({"model": "gone.safetensors"}, "gone.safetensors does not exist"),
        ({"--data": "gone.npz"}, "gone.npz does not exist"),
        ({"--recipe": "gone.yaml"}, "cannot read the recipe gone.yaml"),
        ({"--out": "."}, "is a folder"),
        ({"--model-arg": "depth"}, "takes KEY=VALUE"),
        ({"--model-arg": "depth=3"}, "do not fit the architecture"),
        ({"--model-arg": "num_heads=0"}, "timm cannot build"),
        ({"--model-arg": "checkpoint_path='x'"}, "no argument of an architecture"),
    ],
)
def test_mistake_exits_with_2_and_leaves_nothing(
    change: dict[str, str],
    message: str,
    model_folder: Path,
    npz_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    options = {"model": str(model_folder), "--data": str(npz_file), "--out": "model.pt", **change}
    arguments = ["quantize", options.pop("model")]
    for key, value in options.items():
        arguments += [key, value]
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("gplq: error: ")
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert listing(tmp_path) == []


def test_damaged_checkpoint_exits_with_2(
    quantised: Quantised, npz_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cut.pt").write_bytes(quantised.path.read_bytes()[:5000])
    assert main(["eval", str(tmp_path / "cut.pt"), "--data", str(npz_file)]) == 2
    assert "cut.pt" in capsys.readouterr().err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to read-only folders")
def test_read_only_folder_exits_with_2(
    model_folder: Path, npz_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tmp_path.chmod(0o500)
    out = tmp_path / "model.pt"
    assert main(["quantize", str(model_folder), "--data", str(npz_file), "--out", str(out)]) == 2
    assert "choose a folder that you may write to" in capsys.readouterr().err


def command(*arguments: Any) -> list[str]:
    return [sys.executable, "-m", "gplq", *map(str, arguments)]


def test_module_runs_as_a_program() -> None:
    done = subprocess.run(command("--version"), capture_output=True, text=True, check=True)
    assert done.stdout.startswith("gplq 0.")


def test_ctrl_c_inside_exec_exits_with_130(tmp_path: Path) -> None:
    # What dataclasses do while a module is imported; it made CPython forget the exit code.
    (tmp_path / "program.py").write_text(
        "import argparse, sys\n"
        "from gplq.cli import run_command\n"
        "parser = argparse.ArgumentParser(prog='program')\n"
        "code = 'import signal; signal.raise_signal(signal.SIGINT)'\n"
        "parser.set_defaults(run=lambda _: exec(code))\n"
        "sys.exit(run_command(parser, []))\n"
    )
    done = subprocess.run([sys.executable, "-m", "program"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "\nprogram: interrupted\n")


def test_program_prints_errors_without_a_traceback(tmp_path: Path) -> None:
    done = subprocess.run(
        command("eval", tmp_path / "none.pt", "--data", tmp_path), capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("gplq: error: ")
    assert "Traceback" not in done.stderr


def same_tensors(ours: Any, theirs: Any) -> bool:
    if isinstance(theirs, dict):
        return ours.keys() == theirs.keys() and all(same_tensors(ours[key], theirs[key]) for key in theirs)
    return torch.equal(ours, theirs) if isinstance(theirs, torch.Tensor) else bool(ours == theirs)


@pytest.fixture(scope="module")
def long_run(
    model_folder: Path, npz_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[Any], dict[str, Any]]:
    """A run whose Stage 1 takes some seconds and is saved after every step; and what it gives if left alone."""
    folder = tmp_path_factory.mktemp("long")
    recipe = folder / "long.yaml"
    recipe.write_text(fast_recipe(epochs=25, checkpoint_seconds=1e-6).to_yaml())
    arguments = ["quantize", model_folder, "--data", npz_file, "--recipe", recipe, "--out"]
    assert main([str(argument) for argument in (*arguments, folder / "whole.pt")]) == 0
    return arguments, torch.load(folder / "whole.pt", weights_only=True)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -9), (signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_run_goes_on_and_ends_like_an_uninterrupted_one(
    number: signal.Signals,
    code: int,
    long_run: tuple[list[Any], dict[str, Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments, expected = long_run
    out, state = tmp_path / "model.pt", tmp_path / "model.pt.resume"
    with subprocess.Popen(
        command(*arguments, out), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        deadline = time.monotonic() + 120
        while not state.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(number)
        error = process.communicate(timeout=60)[1]
    assert process.returncode == code, error
    assert "Traceback" not in error
    assert not out.exists()
    assert state.exists()
    assert 0 < torch.load(state, weights_only=True)["stage1"]["step"] < 200

    assert main([str(argument) for argument in (*arguments, out)]) == 0
    assert "resuming Stage 1 at step" in capsys.readouterr().out
    assert not state.exists()
    actual = torch.load(out, weights_only=True)
    for part in ("quantizers", "linears", "floats"):
        assert same_tensors(actual[part], expected[part]), part
    assert actual["provenance"]["top1"] == expected["provenance"]["top1"]
    # What was resumed was trained against a rotated teacher, and begins with a rotated student.
    assert actual["recipe"]["calibration"]["rotate"]
    assert actual["provenance"]["rotation"] == expected["provenance"]["rotation"]
    assert actual["provenance"]["rotation"]["residual"]


@pytest.mark.parametrize(("option", "shown"), [([], False), (["-W", "default"], True)])
def test_what_libraries_warn_of_is_shown_on_request_only(option: list[str], shown: bool) -> None:
    program = (
        "import argparse, logging, warnings\n"
        "from gplq.cli import run_command\n"
        "def run(_):\n"
        "    warnings.warn('odd palette'); logging.getLogger('library').warning('odd shape'); print('table')\n"
        "parser = argparse.ArgumentParser(); parser.set_defaults(run=run); run_command(parser, [])\n"
        "logging.getLogger('library').warning('afterwards')"
    )
    done = subprocess.run([sys.executable, *option, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "table\n"
    assert ("odd palette" in done.stderr, "odd shape" in done.stderr) == (shown, shown)
    assert "afterwards" in done.stderr


SLOW = """
import sys, time
from gplq.cli import main
from gplq.sources import Files

read = Files.read
Files.read = lambda self, row: time.sleep(0.5) or read(self, row)
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="asks Linux for the children of a process")
def test_sigterm_leaves_no_process_behind(quantised: Quantised, image_folder: Path, tmp_path: Path) -> None:
    script = tmp_path / "slow.py"
    script.write_text(SLOW)
    arguments = [sys.executable, str(script), "eval", str(quantised.path), "--data", str(image_folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}  # as many read images
    with subprocess.Popen(arguments, env=environment, stderr=subprocess.PIPE, text=True) as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        deadline = time.monotonic() + 60
        while len(workers := children.read_text().split()) < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        process.terminate()
        error = process.communicate(timeout=60)[1]
    assert (process.returncode, error) == (143, "\ngplq: terminated\n")
    assert len(workers) == 2
    assert [worker for worker in workers if Path(f"/proc/{worker}").exists()] == []
