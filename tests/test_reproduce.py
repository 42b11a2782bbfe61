"""reproduce.sh: run for real, and with names that no shell may take for commands."""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_model

from gplq.checkpoint import Checkpoint, load_checkpoint
from gplq.files import sha256
from gplq_export import cli
from gplq_export.check.report import read_report
from gplq_export.reproduce import network_sha256, script, typed

HOSTILE = """it's $(touch pwned) `touch pwned` "a" ; touch pwned #\n-"""


def run(text: str, folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    path = folder / "reproduce.sh"
    path.write_text(text)
    subprocess.run(["bash", "-n", str(path)], check=True)
    environment = {**os.environ, "PYTHON": sys.executable, **variables}
    command = ["bash", str(path), *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture
def recorder(tmp_path: Path) -> Callable[[], list[list[str]]]:
    """A program that takes the interpreter's place; returns what it was called with."""
    calls = tmp_path / "calls"
    program = tmp_path / "recorder"
    lines = [f"#!{sys.executable}", "import json, sys", f"file = open({str(calls)!r}, 'a')"]
    program.write_text("\n".join([*lines, "print(json.dumps(sys.argv[1:]), file=file)"]) + "\n")
    program.chmod(0o755)

    def read() -> list[list[str]]:
        return [json.loads(line) for line in calls.read_text().splitlines()]

    return read


@pytest.mark.slow
def test_the_script_makes_the_same_network_again_and_checks_it(
    checkpoint: Checkpoint, npz_file: Path, tmp_path: Path
) -> None:
    text = script(checkpoint, export=["--openvino"], check=["--images=16", "--require=openvino"], data=str(npz_file))
    done = run(text, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(": verified\n") == 3
    assert "codes, scales and all other tensors: bit-identical" in done.stdout
    again = load_checkpoint(tmp_path / "reproduced" / "model.pt")
    for name, tensor in checkpoint.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], tensor), name
    assert again.recipe == checkpoint.recipe
    report = read_report(tmp_path / "reproduced" / "dist" / "reports" / "parity.json")
    assert report.data.images == 16
    assert not report.failed
    assert any(gate.metric == "golden" and gate.status == "passed" for gate in report.gates)
    # A second time, the checkpoint of the first is not overwritten.
    done = run(text, tmp_path)
    assert done.returncode == 2
    assert "exists" in done.stderr


def test_every_command_as_it_was_given(
    checkpoint: Checkpoint, model_folder: Path, npz_file: Path, tmp_path: Path, recorder: Callable[[], list[list[str]]]
) -> None:
    text = script(checkpoint, export=["--trt", "--sm=86,89"], check=["--require=trt"], data=str(npz_file))
    done = run(text, tmp_path, "out put", PYTHON=str(tmp_path / "recorder"), INSTALL="1")
    assert done.returncode == 0, done.stderr
    install, train, test, quantize, compare, export, check = recorder()
    versions = checkpoint.provenance["versions"]
    assert install[:3] == ["-m", "pip", "install"]
    assert f"torch=={versions['torch'].partition('+')[0]}" in install
    fingerprint = f"{sha256(npz_file)}/"
    assert train == ["-", str(npz_file), "train", f"{fingerprint}train_images"]
    assert test == ["-", str(npz_file), "test", f"{fingerprint}test_images"]
    model_args = [f"--model-arg={name}={value!r}" for name, value in checkpoint.spec.model_args.items()]
    assert "--model-arg=depth=2" in model_args
    last = [f"--data={npz_file}", "--recipe=out put/recipe.yaml", "--out=out put/model.pt", "--", str(model_folder)]
    assert quantize == ["-m", "gplq", "quantize", *model_args, *last]
    assert compare[1:3] == ["out put/model.pt", network_sha256(checkpoint.model)]
    options = ["--trt", "--sm=86,89", f"--data={npz_file}"]
    assert export == ["-m", "gplq_export", "out put/model.pt", "--out=out put/dist", "--force", *options]
    check_options = ["--require=trt", f"--data={npz_file}"]
    assert check == ["-m", "gplq_export", "check", "out put/dist", *check_options]
    assert "export OMP_NUM_THREADS=1 ACCELERATE_USE_CPU=true\n" in text
    assert (tmp_path / "out put" / "recipe.yaml").read_text() == checkpoint.recipe.to_yaml()


def test_hostile_names_stay_names(
    checkpoint: Checkpoint, tmp_path: Path, recorder: Callable[[], list[list[str]]]
) -> None:
    write_model(tmp_path / HOSTILE)
    arguments = {"data": HOSTILE, "eval_data": f"-{HOSTILE}", "eval_images": 7, "bad_images": "skip"}
    provenance = {**checkpoint.provenance, "source": HOSTILE, "arguments": arguments}
    spec = replace(checkpoint.spec, model_args={"name": HOSTILE})
    text = script(
        replace(checkpoint, provenance=provenance, spec=spec),
        export=[HOSTILE],
        check=[f"--x={HOSTILE}"],
        data="$(touch pwned)",
    )
    done = run(text, tmp_path, HOSTILE, PYTHON=str(tmp_path / "recorder"))
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.rglob("pwned"))
    *_, quantize, _, export, check = recorder()
    assert f"--model-arg=name={HOSTILE!r}" in quantize
    assert {f"--data={HOSTILE}", f"--eval=-{HOSTILE}", "--eval-images=7", "--skip-bad-images"} < {*quantize}
    assert quantize[-2:] == ["--", HOSTILE]
    assert export[-2:] == [HOSTILE, "--data=$(touch pwned)"]
    assert check[-2:] == [f"--x={HOSTILE}", "--data=$(touch pwned)"]


@pytest.mark.parametrize("order", ["natural", "list.txt"])
def test_what_the_user_said_of_labels_and_preprocessing_is_said_again(
    order: str, checkpoint: Checkpoint, tmp_path: Path, recorder: Callable[[], list[list[str]]]
) -> None:
    arguments = {**checkpoint.provenance["arguments"], "class_order": order, "trust_labels": True}
    origins = {"mean": "given", "std": "elsewhere", "crop_pct": "given"}
    provenance = {**checkpoint.provenance, "arguments": arguments, "preprocessing": origins}
    names = [HOSTILE, "a b", "$(touch pwned)", "-n"]
    changed = replace(checkpoint, provenance=provenance, label_names=names)
    assert run(script(changed, export=[]), tmp_path, "out", PYTHON=str(tmp_path / "recorder")).returncode == 0
    assert not list(tmp_path.rglob("pwned"))
    *_, quantize, _, _ = recorder()
    expected = "natural" if order == "natural" else "out/classes.txt"
    assert {"--trust-labels", "--mean=0.5", "--crop-pct=1.0", f"--class-order={expected}"} < {*quantize}
    assert not any(option.startswith("--std") for option in quantize)
    if order != "natural":
        assert (tmp_path / "out" / "classes.txt").read_text() == "".join(f"{name}\n" for name in names)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source_sha256": "0" * 64}, "is not the file that was used; its SHA-256 was 0000"),
        ({"train_data": {"sha256": "0" * 64}}, "does not hold the train images that were used"),
        ({"source": "/nowhere/at/all", "train_data": {"sha256": "0" * 64}}, "does not hold the train images"),
    ],
)
def test_other_inputs_end_it_before_it_starts(
    change: dict[str, Any], message: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    changed = replace(checkpoint, provenance={**checkpoint.provenance, **change})
    done = run(script(changed, export=[]), tmp_path)
    assert (done.returncode, message in done.stderr) == (2, True), done.stderr
    assert not (tmp_path / "reproduced").exists()


def test_missing_data_is_one_line(checkpoint: Checkpoint, tmp_path: Path) -> None:
    done = run(script(checkpoint, export=[]), tmp_path, TRAIN="/nowhere.npz")
    assert done.returncode == 2
    assert done.stderr.startswith("reproduce.sh: /nowhere.npz does not exist.")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "damage",
    [
        lambda provenance: provenance.pop("arguments"),
        lambda provenance: provenance.update(source_sha256="$(touch pwned)"),
        lambda provenance: provenance.update(versions={"torch": "1; touch pwned"}),
        lambda provenance: provenance.update(threads="$(touch pwned)"),
        lambda provenance: provenance.update(golden=None),
        lambda provenance: provenance["train_data"].update(sha256="0" * 64 + "\ntouch pwned"),
    ],
)
def test_a_checkpoint_of_unknown_origin_is_where_it_starts(
    damage: Callable[[dict[str, Any]], None],
    altered: Callable[..., Path],
    tmp_path: Path,
    recorder: Callable[[], list[list[str]]],
) -> None:
    path = altered(lambda content: damage(content["provenance"]))
    text = script(load_checkpoint(path), export=["--openvino"], data="images.npz")
    done = run(text, tmp_path, PYTHON=str(tmp_path / "recorder"))
    assert done.returncode != 0  # no copy lies beside the script
    assert "model.pt: No such file" in done.stderr
    done = run(text, tmp_path, PYTHON=str(tmp_path / "recorder"), CHECKPOINT=str(path))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "reproduced" / "model.pt").read_bytes() == path.read_bytes()
    assert [call[:2] for call in recorder()] == [["-m", "gplq_export"]] * 2
    assert not list(tmp_path.rglob("pwned"))


def test_several_processes_are_started_as_they_were(checkpoint: Checkpoint) -> None:
    def of(**changes: Any) -> str:
        return script(replace(checkpoint, provenance={**checkpoint.provenance, **changes}), export=[])

    assert '"$python" -m torch.distributed.run --standalone --nproc_per_node 2 -m gplq quantize' in of(processes=2)
    gpus = of(processes=4, device="NVIDIA A100")
    assert '"$python" -m accelerate.commands.launch --multi_gpu --num_processes 4 -m gplq quantize' in gpus
    assert "ACCELERATE_USE_CPU=false" in gpus


def test_options_are_those_that_were_typed() -> None:
    parser = cli._parser()
    given = [
        "--trt",
        "--int8",
        "--sm=86,89",
        "--workspace=64",
        "--images=7",
        "--timing-cache=/c",
        "--batch-max=64",
        "--no-labels",
        "--fp16",
    ]
    arguments = parser.parse_args(["model.pt", "--out", "dist", "--data", "x.npz", "--force", *given])
    found = typed(parser, arguments, {"data", "out", "force"})
    assert sorted(found) == sorted(given)
    again = parser.parse_args(["model.pt", "--out", "dist", "--data", "x.npz", "--force", *found])
    assert again == arguments


def test_an_option_given_twice_is_typed_twice() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--require", action="append", default=[])
    arguments = parser.parse_args(["--require", "trt", "--require=-x"])
    assert typed(parser, arguments, ()) == ["--require=trt", "--require=-x"]
