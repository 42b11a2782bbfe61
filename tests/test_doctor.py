"""What the doctor says of this machine, of machines that lack things, and of Triton images."""

import argparse
import importlib.metadata
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from gplq.errors import MissingError, UsageError
from gplq_export import doctor
from gplq_export.doctor import Check, add_arguments, examine, run, triton_answers, what_works
from gplq_export.engine import Backend
from gplq_export.triton.images import triton_image

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"
NO_BUILDER = MissingError("cannot build an engine: install TensorRT")
RTX = Backend("TensorRT-RTX", "1.7.1.116", None)


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(arguments)


def status(checks: list[Check]) -> dict[str, str]:
    return {check.name: check.status for check in checks}


def hide(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    """Make packages neither installed nor importable."""
    version, import_module = importlib.metadata.version, doctor.importlib.import_module

    def hidden_version(name: str) -> str:
        if name in packages:
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    def hidden_import(name: str) -> Any:
        if name in packages:
            raise ModuleNotFoundError(f"No module named '{name}'")
        return import_module(name)

    monkeypatch.setattr(importlib.metadata, "version", hidden_version)
    monkeypatch.setattr(doctor.importlib, "import_module", hidden_import)


def test_this_machine_runs_the_cpu_path(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxruntime")
    run(parse("--json"))
    content = json.loads(capsys.readouterr().out)
    assert content["schema_version"] == "1.0"
    assert content["triton"] is None
    found = {check["name"]: check for check in content["checks"]}
    assert found["torch"]["found"] == importlib.metadata.version("torch")
    assert found["ONNX Runtime"]["found"].startswith(importlib.metadata.version("onnxruntime"))
    assert "CPUExecutionProvider" in found["ONNX Runtime"]["found"]
    works = {feature["name"]: feature["works"] for feature in content["features"]}
    assert works["quantise models"] and works["export ONNX"] and works["check with ONNX Runtime"]


def test_versions_are_those_of_pyproject() -> None:
    project = tomllib.loads(PYPROJECT.read_text())["project"]
    extras = project["optional-dependencies"]
    required = [*project["dependencies"], *(line for name in extras for line in extras[name])]
    for name, (_, floor, ceiling, install) in doctor.PACKAGES.items():
        wanted = [line for line in required if line.split(">=")[0].split("[")[0] == name]
        assert wanted and all(line.endswith(f">={floor},<{ceiling}") for line in wanted), name
        if install.startswith("gplq["):
            assert any(line.startswith(name) for line in extras[install[5:-1]])
    floor, ceiling = doctor._ORT_FLOOR, doctor._ORT_CEILING
    assert extras["cpu"] == [f"onnxruntime>={floor},<{ceiling}"]
    assert extras["gpu"] == [f"onnxruntime-gpu>={floor},<{ceiling}"]


@pytest.mark.parametrize(
    ("package", "lost"),
    [
        ("torch", ["quantise models", "export ONNX"]),
        ("timm", ["quantise models", "export ONNX"]),
        ("onnxruntime", ["check with ONNX Runtime"]),
        ("onnxscript", ["export ONNX"]),
        ("onnx", ["export ONNX", "check with ONNX Runtime"]),
    ],
)
def test_what_is_missing_is_said_with_its_remedy(
    package: str, lost: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxruntime")
    hide(monkeypatch, package)
    with pytest.raises(MissingError, match=f"cannot {', '.join(lost)};") as caught:
        run(parse())
    assert caught.value.exit_code == 3
    answers = [line for line in capsys.readouterr().out.splitlines() if line.startswith(lost[0])]
    install = "gplq[cpu]" if package == "onnxruntime" else package
    assert len(answers) == 1
    assert " no " in answers[0] and f"pip install '{install}'" in answers[0]


def test_it_works_where_neither_torch_nor_onnx_runtime_load() -> None:
    """In a new interpreter: nothing may import them by the way."""
    program = """
import argparse, sys
class Broken:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "onnxruntime", "onnx", "onnx_ir", "timm", "numpy", "tensorrt_rtx_bindings"):
            raise OSError(f"lib{name}.so: cannot open shared object file")
sys.meta_path.insert(0, Broken())
from gplq_export import doctor
from gplq.errors import MissingError
parser = argparse.ArgumentParser()
doctor.add_arguments(parser)
try:
    doctor.run(parser.parse_args(["--triton", "26.06"]))
except MissingError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 3, done.stderr
    assert "Traceback" not in done.stderr
    assert "libtorch.so: cannot open shared object file" in done.stdout
    assert done.stderr.startswith("on this machine gplq cannot quantise models, export ONNX, check with ONNX Runtime")


def test_both_packages_of_onnx_runtime_are_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    version = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "1.31.1" if name.startswith("onnxruntime") else version(name)
    )
    check = next(check for check in examine() if check.name == "ONNX Runtime")
    assert check.status == "broken"
    assert check.found == "onnxruntime and onnxruntime-gpu are installed: they overwrite each other's files"
    assert check.fix.startswith("pip uninstall -y onnxruntime onnxruntime-gpu")


def test_providers_without_a_device_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    listed = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: listed)
    check = next(check for check in examine() if check.name == "ONNX Runtime")
    assert check.status == "ok"
    assert check.found.endswith("not usable here: TensorrtExecutionProvider, CUDAExecutionProvider")


@pytest.mark.parametrize(
    ("version", "expected"), [("2.10.9", "too old"), ("2.11", "ok"), ("2.99.1+cu130", "ok"), ("3.0.0", "untested")]
)
def test_versions_are_compared_as_numbers(version: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version if name == "torch" else original(name))
    assert status(examine())["torch"] == expected


def test_a_half_installed_package_is_no_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.delattr(torch, "version")
    assert status(examine())["PyTorch on GPU"] == "broken"


NVIDIA_SMI = """#!/bin/sh
echo "{}"
exit {}
"""


@pytest.mark.parametrize(
    ("said", "code", "expected", "works"),
    [
        ("NVIDIA L4, 8.9, 550.54.15, 23034 MiB", 0, "ok", (True, True)),
        ("Tesla T4, 7.5, 550.54.15, 15360 MiB", 0, "ok", (True, False)),
        ("Tesla V100, 7.0, 550.54.15, 16160 MiB", 0, "ok", (False, False)),
        ("Failed to initialize NVML: Driver/library version mismatch", 18, "broken", (False, False)),
        ("", 0, "broken", (False, False)),
    ],
)
def test_gpu_and_what_its_generation_can(
    said: str, code: int, expected: str, works: tuple[bool, bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(NVIDIA_SMI.format(said, code))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    checks = examine()
    assert status(checks)["GPU"] == expected
    features = {feature.name.split(" (")[0]: feature.works for feature in what_works(checks, RTX)}
    assert (features["INT8 tensor cores"], features["FP8 tensor cores"]) == works


def test_engines_need_a_builder_and_a_gpu() -> None:
    checks = [check for check in examine() if check.name != "GPU"] + [Check("GPU", "missing", "none")]
    features = {feature.name: feature for feature in what_works(checks, NO_BUILDER)}
    assert features["build engines"].why == str(NO_BUILDER)
    assert not features["run engines"].works
    assert {feature.name: feature.works for feature in what_works(checks, RTX)}["build engines"]


@pytest.mark.parametrize(
    ("tag", "image", "tensorrt", "onnxruntime"),
    [
        ("26.07", "nvcr.io/nvidia/tritonserver:26.07-py3", None, "1.27.0"),
        ("25.09-py3", "nvcr.io/nvidia/tritonserver:25.09-py3", None, "1.23.0"),
        ("26.07-trtllm-python-py3", "nvcr.io/nvidia/tritonserver:26.07-trtllm-python-py3", "10.14.1.48", "1.27.0"),
        ("24.12-trtllm-python-py3", "nvcr.io/nvidia/tritonserver:24.12-trtllm-python-py3", "10.7.0", "1.20.1"),
    ],
)
def test_triton_table(tag: str, image: str, tensorrt: str | None, onnxruntime: str) -> None:
    found = triton_image(tag)
    assert (found.name, found.tensorrt, found.onnxruntime) == (image, tensorrt, onnxruntime)
    assert found.source.startswith("https://github.com/triton-inference-server/server/")


@pytest.mark.parametrize("tag", ["26.09", "23.01", "latest", "26.07-vllm-python-py3", "26.07-", "", "26.7"])
def test_unknown_tag_names_the_known_range(tag: str) -> None:
    with pytest.raises(UsageError, match=r"releases 24\.04 to 26\.08"):
        run(parse("--triton", tag))


@pytest.mark.parametrize(
    ("tag", "builder", "loads", "why"),
    [
        ("26.07", NO_BUILDER, False, "nothing can build one here; build in nvcr.io/nvidia/tensorrt:26.07-py3"),
        ("26.07", RTX, False, "not those of TensorRT-RTX"),
        ("26.07", Backend("TensorRT", "11.4.0.106", None), False, "not known: docker run .* must show 11.4.0.106"),
        ("26.07-trtllm-python-py3", Backend("TensorRT", "11.4.0.106", None), False, "built with TensorRT 11.4.0.106"),
        ("26.07-trtllm-python-py3", Backend("TensorRT", "10.14.1.48.post1", None), True, "the same version"),
        ("24.12-trtllm-python-py3", Backend("TensorRT", "10.7.0.23", None), True, "the same version"),
    ],
)
def test_a_plan_loads_in_its_own_version_only(tag: str, builder: Backend | MissingError, loads: bool, why: str) -> None:
    answer = triton_answers(triton_image(tag), builder)[0]
    assert answer.works == loads
    assert re.search(why, answer.why)


def test_onnx_files_need_a_tested_onnx_runtime() -> None:
    assert triton_answers(triton_image("25.09"), RTX)[1].works
    assert not triton_answers(triton_image("25.07"), RTX)[1].works
    assert "1.23" in triton_answers(triton_image("25.07"), RTX)[1].why
