"""The load test where no server is needed: its arithmetic, and NVIDIA's client in place of ours."""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest

from gplq.errors import MissingError, UsageError
from gplq_export.triton import load as load_command
from gplq_export.triton import perf_analyzer
from gplq_export.triton.client import Feeds, Tensor, TritonRun
from gplq_export.triton.load import load
from gplq_export.triton.perf_analyzer import find_perf_analyzer, load_with_perf_analyzer
from gplq_export.triton.samples import make_images
from gplq_export.triton.served import Latencies

# What perf_analyzer 2.51 writes.
TABLE = """Concurrency,Inferences/Second,Client Send,Network+Server Send/Recv,Server Queue,Server Compute Input,\
Server Compute Infer,Server Compute Output,Client Recv,p50 latency,p90 latency,p95 latency,p99 latency
4,800.5,20,310,150,12,4300,9,2,4700,6100,7250,11000
"""
# Notes what it is asked, and answers as perf_analyzer does.
PROGRAM = """#!{python}
import json, pathlib, sys
here = pathlib.Path(__file__).parent
arguments = sys.argv[1:]
if arguments != ["--version"]:
    data = json.loads(pathlib.Path(arguments[arguments.index("--input-data") + 1]).read_text())
    (here / "asked.json").write_text(json.dumps([arguments, data]))
    {act}
"""


class Model:
    """A served model without a server; a wrong answer for every ``wrong``-th image, an error for every ``lost``-th."""

    model, version, url, protocol, max_batch_size = "net", "2", "localhost:1", "grpc", 8
    inputs = (Tensor("x", "FP32", (-1, 3)),)

    def __init__(self, wrong: int = 0, lost: int = 0) -> None:
        self.wrong, self.lost, self.asked = wrong, lost, 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def statistics(self) -> dict[str, int]:
        return {"requests": self.asked, "images": self.asked * 2, "runs": self.asked, "queue_ns": 0, "compute_ns": 0}

    def infer(self, feeds: Feeds) -> Feeds:
        self.asked += 1
        if self.lost and self.asked % self.lost == 0:
            raise MissingError(f"lost {self.asked}")
        answer = 2 * feeds["x"]
        if self.wrong and self.asked % self.wrong == 0:
            answer = answer[::-1].copy()
        return {"y": answer}


def ask(model: Any, **settings: Any) -> Any:
    feeds = [{"x": np.arange(6, dtype=np.float32).reshape(2, 3) + i} for i in range(5)]
    return load(lambda: model, feeds, [{"y": 2 * feed["x"]} for feed in feeds], 1, batch=2, **settings)


@pytest.fixture(autouse=True)
def _no_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_command, "_WARM_UP_SECONDS", 0)


def test_latencies_are_the_quantiles_of_all() -> None:
    seconds = np.random.default_rng(0).lognormal(-5, 1, 5000)
    latencies = Latencies()
    for each in seconds:
        latencies.add(each)
    for share in (0.5, 0.95, 0.99):
        assert latencies.quantile_ms(share) == pytest.approx(1000 * np.quantile(seconds, share), rel=0.01)
    assert math.isnan(Latencies().quantile_ms(0.5))
    latencies.add(0)
    latencies.add(1e9)  # beyond the last step
    assert latencies.counts.sum() == 5002


def test_every_answer_is_compared() -> None:
    right = ask(Model(), requests=100)
    assert (right.requests, right.wrong, right.lost, right.largest_difference) == (100, 0, 0, 0)
    assert right.images_per_second == pytest.approx(200 / right.seconds)
    wrong = ask(Model(wrong=10), requests=100)
    assert (wrong.requests, wrong.wrong, wrong.largest_difference) == (100, 10, 6)
    assert ask(Model(wrong=10), requests=100, tolerance=6).wrong == 0
    lost = ask(Model(lost=4), requests=100)
    assert (lost.requests, lost.lost, lost.wrong) == (75, 25, 0)
    assert len(lost.errors) == 10  # messages; the memory is bounded
    assert sum(lost.errors.values()) <= 25


def test_answers_of_another_kind_are_wrong() -> None:
    from gplq_export.triton.load import _difference

    one = np.ones((2, 2), np.float32)
    for other in (one[:1], one.astype(np.float64), one * np.nan, np.array([[b"a", b"b"]] * 2)):
        assert _difference(other, one) == math.inf
    assert _difference(one + np.float32(0.5), one) == 0.5
    labels = np.array([[b"a", b"b"]], object)
    assert (_difference(labels, labels.copy()), _difference(labels[:, ::-1], labels)) == (0, math.inf)


def test_a_client_gives_up() -> None:
    found = ask(Model(lost=1), seconds=60)
    assert (found.requests, found.lost, found.images_per_second) == (0, 10, 0)
    json.dumps(found.to_dict(), allow_nan=False)


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "bin" / "perf_analyzer"
    path.parent.mkdir()
    monkeypatch.setenv("PATH", str(path.parent))
    act = f"pathlib.Path(arguments[arguments.index('-f') + 1]).write_text({TABLE!r})"
    path.write_text(PROGRAM.format(python=sys.executable, act=act))
    path.chmod(0o755)
    return path


def run_perf_analyzer(program: str) -> Any:
    feeds = [{"x": np.array([[1, 2, 3]], np.float32)}]
    model: Any = Model()
    return load_with_perf_analyzer(program, model, feeds, 4, batch=2, seconds=6)


def test_perf_analyzer_is_asked_and_read(program: Path) -> None:
    assert find_perf_analyzer() == str(program)
    found = run_perf_analyzer(str(program))
    assert found.client == "perf_analyzer"
    assert found.latency_ms == {"p50": 4.7, "p95": 7.25, "p99": 11.0}
    assert found.images_per_second == pytest.approx(800.5, rel=0.001)
    assert (found.requests, found.seconds, found.wrong) == (2402, 6, None)
    arguments, data = json.loads((program.parent / "asked.json").read_text())
    assert arguments[:10] == ["-m", "net", "-u", "localhost:1", "-i", "grpc", "-b", "2", "-x", "2"]
    assert arguments[arguments.index("--concurrency-range") + 1] == "4"
    assert arguments[arguments.index("--measurement-interval") + 1] == "2000"
    assert data == {"data": [{"x": {"content": {"b64": "AACAPwAAAEAAAEBA"}, "shape": [3]}}]}


def test_perf_analyzer_that_fails(program: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    act = "sys.exit('thread 3 had error: model is gone')"
    program.write_text(PROGRAM.format(python=sys.executable, act=act))
    with pytest.raises(
        MissingError, match=r"perf_analyzer failed: thread 3 had error: model is gone; use --client gpl"
    ):
        run_perf_analyzer(str(program))
    program.write_text("#!/bin/sh\necho \"libc.so.6: version 'GLIBC_2.38' not found\" >&2; exit 1\n")
    assert find_perf_analyzer() is None
    monkeypatch.setenv("PATH", "/nowhere")
    assert find_perf_analyzer() is None
    assert perf_analyzer.find_perf_analyzer() is None


def test_tolerance_has_no_effect_with_perf_analyzer(program: Path) -> None:
    parser = argparse.ArgumentParser()
    load_command.add_arguments(parser)
    arguments = parser.parse_args(["--url", "localhost:1", "--model", "net", "--tolerance", "0.1"])
    with pytest.raises(UsageError, match="--tolerance has no effect with perf_analyzer"):
        load_command.run(arguments)


def test_noise_is_made_for_images_only() -> None:
    model: Any = Model()
    first, *rest = make_images(model, [])
    assert first["x"].shape == (1, 3)
    assert first["x"].dtype == np.float32
    assert len(rest) == 15
    assert not any(np.array_equal(first["x"], other["x"]) for other in rest)
    model.inputs = (Tensor("x", "INT64", (-1, 3)),)
    with pytest.raises(UsageError, match=r"INT64 \[-1, 3\]; load can make batches of FP32 images only"):
        make_images(model, [])
    model.inputs = (Tensor("x", "FP32", (-1, 3)), Tensor("mask", "FP32", (-1, 3)))
    with pytest.raises(UsageError, match="takes 2 tensors"):
        make_images(model, [])


def test_url_is_checked_before_anything_is_loaded() -> None:
    for url in ("http://localhost:8000", "localhost", "localhost:8000/v2", ":8000"):
        with pytest.raises(UsageError, match=r"--url .*: takes HOST:PORT"):
            TritonRun(url, "net")
