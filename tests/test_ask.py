"""What is answered for runtimes that take a file, refuse it, are not there, die of it or never answer."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from gplq_export import ask as module
from gplq_export.ask import ask


@pytest.fixture
def file(tmp_path: Path) -> Path:
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 4]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"], name="relu")], "g", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


@pytest.mark.parametrize("runtime", ["ort", pytest.param("trt", marks=pytest.mark.trt)])
def test_file_that_loads(file: Path, runtime: str) -> None:
    answer = ask(file, runtime)
    if answer.silent:
        pytest.skip(answer.silent)
    assert answer.refusals == ()
    assert str(answer) == f"{answer.name} {'loads' if runtime == 'ort' else 'parses'} the file"


@pytest.mark.parametrize("runtime", ["ort", pytest.param("trt", marks=pytest.mark.trt)])
def test_file_that_is_refused(file: Path, runtime: str) -> None:
    model = onnx.load(file)
    model.graph.node[0].op_type = "Rectify"
    onnx.save(model, file)
    answer = ask(file, runtime)
    if answer.silent:
        pytest.skip(answer.silent)
    (refusal,) = answer.refusals
    assert refusal.words and "\n" not in refusal.words
    assert "Rectify" in f"{refusal.node} {refusal.words}" or refusal.node == "relu"
    assert str(answer).endswith(" refuses the file")


@pytest.fixture
def instead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Lets a Python program run where a runtime would be asked."""

    def use(program: str) -> None:
        (tmp_path / "gplq_export").mkdir()
        (tmp_path / "gplq_export" / "__init__.py").touch()
        (tmp_path / "gplq_export" / "ask.py").write_text(program)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        monkeypatch.chdir(tmp_path)

    return use


def test_runtime_that_dies_of_a_file_has_refused_it(file: Path, instead: Any) -> None:
    instead("import os, signal, sys; print('boom', file=sys.stderr, flush=True); os.kill(os.getpid(), signal.SIGABRT)")
    answer = ask(file, "trt")
    assert [refusal.words for refusal in answer.refusals] == [
        f"the process that loaded the file ended with signal {signal.SIGABRT.value}: boom"
    ]


def test_runtime_without_an_answer_is_not_said_to_agree(
    file: Path, instead: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    instead("import time; time.sleep(60)")
    monkeypatch.setattr(module, "_SECONDS", 1)
    answer = ask(file, "ort")
    assert answer.refusals == () and "was not asked: no answer within 1 seconds" in str(answer)


def test_runtime_that_is_not_installed_is_named_with_the_remedy(file: Path, tmp_path: Path) -> None:
    for name in ("onnxruntime", "tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings"):
        (tmp_path / f"{name}.py").write_text("raise ImportError")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{Path(module.__file__).parents[1]}"}
    for runtime in ("ort", "trt"):
        command = [sys.executable, "-m", "gplq_export.ask", runtime, str(file)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        assert "pip install" in done.stdout
