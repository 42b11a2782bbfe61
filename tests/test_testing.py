"""Parity in the tests of one's own repository: the assertion, the pytest plugin, and what the plugin costs others."""

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from conftest import Quantised, make_arrays

from gplq.checkpoint import Checkpoint
from gplq.errors import MissingError, UsageError
from gplq_export.check import chain
from gplq_export.export import export
from gplq_export.testing import assert_parity

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def project(quantised: Quantised, checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's repository: an export with its checkpoint, and a few test images."""
    folder = tmp_path_factory.mktemp("project")
    export(checkpoint, folder / "dist", say=lambda _: None)
    if not (folder / "dist" / "model.pt").exists():
        shutil.copy(quantised.path, folder / "dist" / "model.pt")
    images, labels = make_arrays(16, seed=5)
    np.savez(folder / "images.npz", images=images, labels=labels)
    return folder


@pytest.fixture
def broken(project: Path, tmp_path: Path) -> Path:
    """The same, but a bias in one file is another."""
    folder = tmp_path / "broken"
    shutil.copytree(project, folder)
    model = ir.load(folder / "dist" / "model.cpu.onnx")
    name, value = next((k, v) for k, v in model.graph.initializers.items() if k.endswith("head.linear.bias"))
    value.const_value = ir.tensor(value.const_value.numpy() + 1, name=name)  # type: ignore[union-attr]
    ir.save(model, folder / "dist" / "model.cpu.onnx")
    return folder


def pytest_in(folder: Path, *arguments: str, test: str, configuration: str = "") -> str:
    """What a pytest says that runs ``test`` with the plugin."""
    (folder / "test_model.py").write_text(test)
    (folder / "pytest.ini").write_text(f"[pytest]\nfilterwarnings = error\n{configuration}")
    command = [sys.executable, "-m", "pytest", "-p", "gplq_export.pytest_plugin", "-p", "no:cacheprovider", *arguments]
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": ""}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    return f"{done.stdout}{done.stderr}\nexit code {done.returncode}"


def test_a_sound_export_passes_and_returns_its_report(project: Path) -> None:
    report = assert_parity(project / "dist" / "model.pt", project / "dist", project / "images.npz", limit=8)
    assert not report.failed
    assert report.data.images == 8
    cpu = report.pair("cpu")
    assert cpu is not None
    assert cpu.skipped is None
    assert any(gate.metric == "golden" and gate.status == "skipped" for gate in report.gates)  # other images


def test_what_failed_is_the_message(broken: Path) -> None:
    with pytest.raises(AssertionError) as raised:
        assert_parity(broken / "dist" / "model.pt", str(broken / "dist"), str(broken / "images.npz"))
    headline, *lines = str(raised.value).splitlines()
    assert headline.endswith("parity gates failed, the cause first:")
    assert f"{len(lines)} of " in headline
    assert lines[0].startswith("  export.hash.")
    assert "model.cpu.onnx is not the file that was exported" in lines[0]
    assert any(line.startswith("  cpu.forced.outputs") for line in lines)


def test_tensors_serve_as_images(checkpoint: Checkpoint, project: Path, probe: torch.Tensor) -> None:
    report = assert_parity(checkpoint, [project / "dist" / "model.int4.onnx"], [probe[:8]])
    assert [pair.name for pair in report.pairs if pair.skipped is None and pair.file] == ["int4", "int4-optimised"]


def test_thresholds_of_ones_own_decide(project: Path, tmp_path: Path) -> None:
    limits = tmp_path / "strict.yaml"
    limits.write_text("forced_linears: {limit: 0.0, why: nothing may differ}\n")
    with pytest.raises(AssertionError, match=r"int4\.forced\.linears"):
        assert_parity(project / "dist" / "model.pt", project / "dist", project / "images.npz", thresholds=limits)
    with pytest.raises(UsageError, match="cannot be read as thresholds"):
        assert_parity(project / "dist" / "model.pt", project / "dist", project / "images.npz", thresholds="no.yaml")


def test_what_is_required_must_be_there(
    checkpoint: Checkpoint, project: Path, probe: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [project / "dist" / "model.cpu.onnx", project / "dist" / "model.int4.onnx"]
    assert_parity(checkpoint, files, [probe[:8]], require=["int4", "cpu"])
    with pytest.raises(UsageError, match="--require trt: there is no such pair here"):
        assert_parity(checkpoint, files, [probe[:8]], require=["int4", "trt"])

    def absent(_: bytes) -> None:
        raise MissingError("ONNX Runtime is at lunch")

    monkeypatch.setitem(chain.OPTIMISED, "cpu", chain.Back("cpu", absent, "nothing"))  # type: ignore[arg-type]
    assert_parity(checkpoint, files, [probe[:8]])
    with pytest.raises(MissingError, match=r"cpu is required .* and was skipped: ONNX Runtime is at lunch"):
        assert_parity(checkpoint, files, [probe[:8]], require=["cpu"])


USER_TEST = """
def test_export(gplq_parity):
    assert gplq_parity.pair("cpu").skipped is None

def test_data(gplq_parity):
    assert gplq_parity.data.images == 8
"""


def test_a_repository_names_its_export_in_its_configuration(project: Path) -> None:
    configuration = "gplq_export = dist\ngplq_data = images.npz\ngplq_images = 8\n"
    said = pytest_in(project, test=USER_TEST, configuration=configuration)
    assert "2 passed" in said, said
    assert "= parity of the export =" in said
    assert "data.golden: they are of other images" in said
    assert said.endswith("exit code 0")


def test_a_failed_gate_fails_the_test_without_a_traceback(broken: Path) -> None:
    said = pytest_in(broken, "--gplq-export", "dist", "--gplq-data", "images.npz", test=USER_TEST)
    assert "2 errors" in said, said
    assert "model.cpu.onnx is not the file that was exported" in said
    assert "Traceback" not in said
    assert "testing.py" not in said
    assert said.endswith("exit code 1")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "gplq_parity needs --gplq-export and --gplq-data"),
        (["--gplq-export=dist"], "gplq_parity needs --gplq-export and --gplq-data"),
        (["--gplq-export=dist", "--gplq-data=images.npz", "--gplq-images=some"], "takes a number, found 'some'"),
        (["--gplq-export=dist", "--gplq-data=nowhere.npz"], "nowhere.npz does not exist"),
    ],
)
def test_a_fixture_without_what_it_needs_is_no_pass(project: Path, arguments: list[str], message: str) -> None:
    said = pytest_in(project, *arguments, test=USER_TEST)
    assert message in said
    assert "2 errors" in said
    assert said.endswith("exit code 1")


def test_sessions_without_the_fixture_import_nothing(tmp_path: Path) -> None:
    heavy = "{'torch', 'numpy', 'onnx', 'gplq', 'pydantic'}"
    said = pytest_in(tmp_path, test=f"import sys\n\ndef test_other():\n    assert not {heavy} & sys.modules.keys()\n")
    assert "1 passed" in said, said
    assert "parity of the export" not in said


def test_the_package_registers_the_plugin() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["pytest11"] == {"gplq": "gplq_export.pytest_plugin"}
