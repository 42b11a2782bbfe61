"""What a genuine Triton server says to our repositories, and what our client says to it; see :mod:`triton_server`."""

import argparse
import functools
import hashlib
import io
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from conftest import CLASSES, make_arrays
from PIL import Image
from triton_fixture import require_server
from triton_server import ServerError, TritonServer, serve

from gplq.checkpoint import Checkpoint
from gplq.errors import DataError, GateError, GplqError, MissingError, UsageError
from gplq.preprocessing import Preprocessing
from gplq_export import cli
from gplq_export.check.report import read_report
from gplq_export.export import export
from gplq_export.triton import client as client_command
from gplq_export.triton import load as load_command
from gplq_export.triton.check import read_config
from gplq_export.triton.client import Protocol, TritonRun, classify
from gplq_export.triton.config import CONFIG, ServingOptions, print_config
from gplq_export.triton.load import load
from gplq_export.triton.repository import add_version, write_repository

pytestmark = pytest.mark.triton

PLAN = b"ftrt" + bytes(20) + bytes([10, 13, 2, 6]) + b"kernels"
PROTOCOLS: list[Protocol] = ["http", "grpc"]
# Model -> the file of the export that computes it, and how much of it ONNX Runtime rearranges.
NETWORKS = {
    "tiny-cpu": ("model.cpu.onnx", "ENABLE_ALL"),
    "tiny-fp32": ("model.fp32.onnx", "ENABLE_ALL"),
    "tiny-int4": ("model.int4.onnx", "DISABLE_ALL"),
    "tiny-fp16-onnx": ("model.fp16.onnx", "ENABLE_ALL"),  # with the configuration for GPUs, on the CPU
    "tiny-fp16": ("model.fp16.onnx", "ENABLE_ALL"),  # the plan's twin: see triton_backends/tensorrt
}


@pytest.fixture(scope="session", autouse=True)
def _server_is_here() -> None:
    require_server()


@pytest.fixture(autouse=True)
def _short_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_command, "_WARM_UP_SECONDS", 0.2)
    monkeypatch.setenv("PATH", os.defpath)  # without any perf_analyzer


@pytest.fixture(scope="session")
def exported(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared: do not change it. The plan is one by its first bytes only."""
    folder = tmp_path_factory.mktemp("served") / "dist"
    export(checkpoint, folder, say=lambda _: None)
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    (folder / "model.fp16.plan").write_bytes(PLAN)
    plan = hashlib.sha256(PLAN).hexdigest()
    manifest["files"]["model.fp16.plan"] = {"bytes": len(PLAN), "sha256": plan}
    manifest["engines"]["fp16"] = {
        "plan_sha256": plan,
        "onnx_sha256": manifest["files"]["model.fp16.onnx"]["sha256"],
        "batch": [1, 4, 8],
        "backend": "TensorRT",
        "compute_capabilities": [],
        "options": {},
    }
    path.write_text(json.dumps(manifest), encoding="utf-8")
    return folder


def write(exported: Path, out: Path, *kinds: str) -> Path:
    """A repository with one instance of each model, which may run without a GPU."""
    options = ServingOptions(instances=1)
    write_repository(exported, out, serve=kinds, name="tiny", options=options, say=lambda _: None)
    for config_file in (out / "models").glob(f"*/{CONFIG}"):
        config = read_config(config_file.parent)
        if any(group.kind != 2 for group in config.instance_group):  # KIND_CPU
            config.ClearField("instance_group")
            config_file.write_text(print_config(config), encoding="utf-8")
    return out / "models"


@pytest.fixture(scope="session")
def repository(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared: do not change it. Every kind of model that the writer knows."""
    out = tmp_path_factory.mktemp("served") / "repository"
    models = write(exported, out, "cpu", "fp32", "int4", "fp16", "fp16.plan")
    (models / "tiny-fp16" / "1" / "twin.onnx").write_bytes((exported / "model.fp16.onnx").read_bytes())
    return models


@pytest.fixture(scope="session")
def server(repository: Path) -> Iterator[TritonServer]:
    with serve(repository) as running:
        yield running
        assert running.stop() == 0, running.log()[-4000:]
        assert running.leftovers() == []


@pytest.fixture(scope="session")
def images() -> np.ndarray:
    """Float32 [19, 1, 16, 16], no two alike."""
    noise: np.ndarray = np.random.default_rng(0).standard_normal((19, 1, 16, 16), dtype=np.float32)
    return noise


@pytest.fixture(scope="session")
def pictures() -> list[bytes]:
    """PNG and JPEG files, larger than the network's images and not square."""
    found = []
    for index, pixels in enumerate(make_arrays(4, seed=3)[0]):
        file = io.BytesIO()
        Image.fromarray(pixels).resize((40, 30)).save(file, "JPEG" if index % 2 else "PNG")
        found.append(file.getvalue())
    return found


@functools.cache
def direct(path: Path, level: str = "ENABLE_ALL") -> Any:
    """ONNX Runtime in this process, with the options of the served model."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, f"ORT_{level}")
    options.log_severity_level = 3
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def expected(exported: Path, images: np.ndarray, model: str = "tiny-cpu") -> np.ndarray:
    name, level = NETWORKS[model]
    [logits] = direct(exported / name, level).run(None, {"images": images})
    return np.asarray(logits)


def address(server: TritonServer, protocol: Protocol) -> str:
    return server.http if protocol == "http" else server.grpc


def command(module: ModuleType, *arguments: object) -> None:
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    module.run(parser.parse_args([str(argument) for argument in arguments]))


# What is served


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", NETWORKS)
def test_served_is_direct_bit_for_bit(
    server: TritonServer, exported: Path, images: np.ndarray, name: str, protocol: Protocol
) -> None:
    with TritonRun(address(server, protocol), name, protocol) as model:
        for batch in (1, 3, 8):
            [logits] = model({"images": images[:batch]})
            wanted = expected(exported, images[:batch], name)
            assert logits.dtype == wanted.dtype == np.float32
            np.testing.assert_array_equal(logits, wanted)
            assert len(np.unique(logits, axis=0)) == batch  # not one row for all


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_more_images_than_a_request_may_hold_are_split(
    server: TritonServer, exported: Path, images: np.ndarray, protocol: Protocol
) -> None:
    with TritonRun(address(server, protocol), "tiny-cpu", protocol) as model:
        before = model.statistics()
        [logits] = model({"images": images})
        after, deadline = model.statistics(), time.monotonic() + 10
        while after["requests"] - before["requests"] < 3 and time.monotonic() < deadline:
            time.sleep(0.02)  # the server counts a request when it has answered it
            after = model.statistics()
    assert model.max_batch_size == 8
    assert {key: after[key] - before[key] for key in ("requests", "images")} == {"requests": 3, "images": 19}
    wanted = [expected(exported, images[start : start + 8]) for start in (0, 8, 16)]
    np.testing.assert_array_equal(logits, np.concatenate(wanted))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_encoded_images_end_to_end(
    server: TritonServer, exported: Path, checkpoint: Checkpoint, pictures: list[bytes], protocol: Protocol
) -> None:
    with (
        TritonRun(address(server, protocol), "tiny", protocol) as model,
        TritonRun(address(server, protocol), "tiny-cpu", protocol) as network,
    ):
        for encoded in pictures:
            # The reference: Pillow and timm's own transform, ONNX Runtime, softmax in float64.
            transform = Preprocessing.from_dict(checkpoint.preprocessing.to_dict()).transform()
            image = transform(Image.open(io.BytesIO(encoded)).convert("L")).numpy()[None]
            logits = expected(exported, image).astype(np.float64)[0]
            shares = np.exp(logits) / np.exp(logits).sum()
            order = np.argsort(-shares)
            answer = model.infer({"image": np.frombuffer(encoded, np.uint8)})
            np.testing.assert_array_equal(answer["logits"][0], logits.astype(np.float32))
            for found in (classify(model, encoded, 4), classify(network, encoded, 4)):
                assert [label.name for label in found] == [CLASSES[i] for i in order]
                np.testing.assert_allclose([label.score for label in found], shares[order], atol=1e-5)
        with pytest.raises(UsageError, match=r"tiny at .*cannot read the image"):
            model.infer({"image": np.frombuffer(b"GIF89a, or so it says", np.uint8)})
        assert classify(model, pictures[0], 1)  # as if nothing had been


def test_client_command(
    server: TritonServer,
    exported: Path,
    pictures: list[bytes],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    paths = [tmp_path / "a.png", tmp_path / "b.jpg"]
    for path, encoded in zip(paths, pictures, strict=False):
        path.write_bytes(encoded)
    said = []
    for flags in (
        ["--model", "tiny"],
        ["--model", "tiny-cpu"],
        ["--model", "tiny-cpu", "--preprocessing", exported, "--model-version", 1],
        ["--model", "tiny", "--grpc"],
    ):
        url = server.grpc if "--grpc" in flags else server.http
        command(client_command, *paths, "--url", url, "--top", 2, *flags)
        said.append(capsys.readouterr().out)
    assert len(set(said)) == 1
    lines = said[0].splitlines()
    assert [lines[0], lines[3]] == [str(path) for path in paths]
    assert {line.split()[1] for line in (*lines[1:3], *lines[4:])} <= set(CLASSES)
    (tmp_path / "b.jpg").write_bytes(b"no image")
    for name in ("tiny", "tiny-cpu"):
        with pytest.raises(UsageError, match=r"b\.jpg: .*cannot read the image"):
            command(client_command, *paths, "--url", server.http, "--model", name)
    with pytest.raises(UsageError, match="preprocesses itself: --preprocessing has no effect"):
        command(client_command, *paths, "--url", server.http, "--model", "tiny", "--preprocessing", exported)
    with pytest.raises(DataError, match=r"cannot read .*absent"):
        command(client_command, tmp_path / "absent", "--url", server.http, "--model", "tiny")
    with pytest.raises(UsageError, match="does not say how its images are preprocessed"):
        command(client_command, paths[0], "--url", server.http, "--model", "tiny-top")


# Load


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_concurrent_requests_get_their_own_answers(
    server: TritonServer, exported: Path, images: np.ndarray, protocol: Protocol
) -> None:
    connect = functools.partial(TritonRun, address(server, protocol), "tiny-cpu", protocol)
    feeds = [{"images": image[None]} for image in images]
    answers = [{"logits": expected(exported, feed["images"])} for feed in feeds]
    success = functools.partial(server.metric, "nv_inference_request_success", model="tiny-cpu")
    for concurrency in (1, 4, 16):
        found = load(connect, feeds, answers, concurrency, requests=400)
        assert (found.requests, found.wrong, found.lost, found.largest_difference) == (400, 0, 0, 0.0)
        assert 0 < found.latency_ms["p50"] <= found.latency_ms["p95"] <= found.latency_ms["p99"]
        assert (found.server["mean_batch"] > 1) == (concurrency > 1)
        assert success() >= 400
    # The tool would notice: one answer belongs to another image, another has a different last bit.
    answers[3], answers[5] = answers[5], {"logits": np.nextafter(answers[3]["logits"], np.float32(np.inf))}
    found = load(connect, feeds, answers, 2, requests=len(feeds) * 2)
    assert found.wrong >= 2
    assert found.lost == 0


def test_load_command(
    server: TritonServer, tmp_path: Path, pictures: list[bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    numbers, picture = tmp_path / "load.json", tmp_path / "a.png"
    picture.write_bytes(pictures[0])
    flags = ["--seconds", 1, "--concurrency", "1,3", "--json", numbers]
    command(load_command, "--url", server.http, "--model", "tiny-cpu", "--batch", 4, *flags)
    said = capsys.readouterr().out
    assert said.startswith(
        f"served latency of tiny-cpu at {server.http} over HTTP, 4 image(s) a request\nby gplq's own"
    )
    content = json.loads(numbers.read_text(encoding="utf-8"))
    assert [(row["concurrency"], row["batch"]) for row in content["served_latency"]] == [(1, 4), (3, 4)]
    for row in content["served_latency"]:
        assert (row["client"], row["wrong"], row["lost"], row["largest_difference"]) == ("gplq", 0, 0, 0)
        assert row["images_per_second"] == pytest.approx(row["requests"] * 4 / row["seconds"], abs=0.01)
        assert row["server"]["mean_batch"] >= 4
    command(load_command, "--url", server.grpc, "--grpc", "--model", "tiny", "--images", picture, *flags)
    command(load_command, "--url", server.http, "--model", "tiny-cpu", "--images", picture, *flags)
    for wrong, why in (
        (["--model", "tiny-cpu", "--batch", 9], "takes 8 at most"),
        (["--model", "tiny", "--batch", 2], "takes 1 at most"),
        (["--model", "tiny-cpu", "--images", "absent"], "cannot read absent"),
    ):
        with pytest.raises(UsageError, match=why):
            command(load_command, "--url", server.http, *wrong)
    with pytest.raises(MissingError, match="no perf_analyzer that runs is on the path"):
        command(load_command, "--url", server.http, "--model", "tiny-cpu", "--client", "perf_analyzer")


def test_metrics_count_what_was_asked(server: TritonServer, images: np.ndarray) -> None:
    names = ("nv_inference_request_success", "nv_inference_count", "nv_inference_exec_count")
    before = [server.metric(name, model="tiny-fp32") for name in names]
    with TritonRun(server.http, "tiny-fp32") as model:
        for batch in (1, 3, 8):
            model({"images": images[:batch]})
    deadline = time.monotonic() + 5
    grown = [0.0]
    while grown != [3, 12, 3] and time.monotonic() < deadline:  # counted after the answer is sent
        grown = [server.metric(name, model="tiny-fp32") - old for name, old in zip(names, before, strict=True)]
    assert grown == [3, 12, 3]


# What clients do wrong


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_wrong_requests_are_refused_and_harm_nobody(
    server: TritonServer, exported: Path, images: np.ndarray, protocol: Protocol
) -> None:
    with TritonRun(address(server, protocol), "tiny-cpu", protocol) as model:
        for feeds, why in (
            ({"images": images[:1, :, :8]}, r"unexpected shape for input 'images'"),
            ({"images": images[:9]}, r"batch-size must be <= 8"),
            ({"images": images[:1].astype(np.float64)}, r"data-type is 'FP64', but .* expects 'FP32'"),
            ({"images": images[:0]}, r"."),
            ({"image": images[:1]}, r"takes images; given image"),
        ):
            with pytest.raises(UsageError, match=why):
                model.infer(feeds)
            [logits] = model({"images": images[:2]})
            np.testing.assert_array_equal(logits, expected(exported, images[:2]))
    with pytest.raises(UsageError, match=r"unknown model: 'nope'.*Ready are .*tiny-cpu:1"):
        TritonRun(address(server, protocol), "nope", protocol)
    with pytest.raises(UsageError, match=r"'tiny-cpu' version 7 is not found"):
        TritonRun(address(server, protocol), "tiny-cpu", protocol, version="7")


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_nobody_answers(server: TritonServer, protocol: Protocol) -> None:
    other = server.grpc if protocol == "http" else server.http
    for url in ("127.0.0.1:9", other):
        with pytest.raises(
            MissingError, match=f"no answer from {url} over {protocol.upper()}.*8001 for gRPC"
        ) as raised:
            TritonRun(url, "tiny", protocol, timeout=5)
        assert raised.value.exit_code == 3
    for url in ("http://localhost:8000", "localhost", "localhost:8000/v2"):
        with pytest.raises(UsageError, match="takes HOST:PORT"):
            TritonRun(url, "tiny", protocol)


# Faults. What is said here of recovery is what docs say.


@pytest.fixture
def small(exported: Path, tmp_path: Path) -> Path:
    return write(exported, tmp_path / "small", "cpu")


def control(server: TritonServer, verb: str, model: str) -> str | None:
    """Ask the server to "load" or "unload" a model; what it says against it."""
    from tritonclient.http import InferenceServerClient
    from tritonclient.utils import InferenceServerException

    client = InferenceServerClient(server.http, network_timeout=30)
    try:
        getattr(client, f"{verb}_model")(model)
    except InferenceServerException as error:
        return str(error.message())
    finally:
        client.close()
    return None


EXPLICIT = ("--model-control-mode=explicit", "--load-model=tiny-cpu")


def test_versions(small: Path, exported: Path, images: np.ndarray) -> None:
    """A corrupt version or model is not served and disturbs nobody; a good version is served beside the first."""
    wanted = expected(exported, images[:3])
    with serve(small, *EXPLICIT) as server:
        bad = small / "tiny-cpu" / "2"
        bad.mkdir()
        (bad / "model.onnx").write_bytes(b"\x08\x07truncated")
        said = control(server, "load", "tiny-cpu")
        assert said is not None
        assert "version 2 is at UNAVAILABLE state" in said
        shutil.copytree(small / "tiny-top", small / "typo")
        text = (small / "typo" / CONFIG).read_text(encoding="utf-8").replace("tiny-top", "typo")
        (small / "typo" / CONFIG).write_text(f"{text}max_batchsize: 4\n", encoding="utf-8")
        assert "failed to poll from model repository" in str(control(server, "load", "typo"))
        assert 'has no field named "max_batchsize"' in server.log()  # the reason is nowhere else
        with TritonRun(server.http, "tiny-cpu") as model:
            np.testing.assert_array_equal(model({"images": images[:3]})[0], wanted)
        for protocol in PROTOCOLS:
            with pytest.raises(MissingError, match=r"version 2 is not at ready state.*Ready are .*tiny-cpu:1\."):
                TritonRun(address(server, protocol), "tiny-cpu", protocol, version="2")
        (bad / "model.onnx").unlink()
        bad.rmdir()
        [added] = add_version(exported, small.parent, say=lambda _: None)
        assert added == bad
        assert control(server, "load", "tiny-cpu") is None
        for version in ("1", "2", ""):
            with TritonRun(server.grpc, "tiny-cpu", "grpc", version=version) as model:
                np.testing.assert_array_equal(model({"images": images[:3]})[0], wanted)
        assert server.metric("nv_inference_request_success", model="tiny-cpu", version="2") >= 2
        assert server.stop() == 0
        assert server.leftovers() == []


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ("max_batch_size: 8", "max_batchsize: 8", 'has no field named "max_batchsize"'),
        ("data_type: TYPE_FP32", "data_type: TYPE_FLOAT", "TYPE_FLOAT"),
        ('name: "tiny-cpu"', 'name: "tiny"', "directory name must equal model name"),
        ("dims: 16", "dims: 15", r"input 'images': \[-1, 1, 15, 15\] configured, the model has \[-1, 1, 16, 16\]"),
        ("kind: KIND_CPU", "kind: KIND_GPU", "has kind KIND_GPU but no GPUs are available"),
    ],
)
def test_configuration_with_a_typo(small: Path, old: str, new: str, why: str) -> None:
    path = small / "tiny-cpu" / CONFIG
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")
    with pytest.raises(ServerError, match=why) as raised, serve(small, *EXPLICIT):
        pass
    assert "ended with exit code 1" in str(raised.value)


def under_load(server: TritonServer, folder: Path, event: Callable[[], object]) -> dict[Protocol, Any]:
    """What 'gplq-export load' reports when something happens meanwhile; over both protocols at a time."""
    errors: dict[Protocol, GplqError] = {}

    def work(protocol: Protocol) -> None:
        flags = ["--concurrency", 4, "--seconds", 3, "--timeout", 5, "--json", folder / f"{protocol}.json"]
        flags += ["--grpc"] if protocol == "grpc" else []
        try:
            command(load_command, "--url", address(server, protocol), "--model", "tiny-cpu", *flags)
        except GplqError as error:
            errors[protocol] = error

    threads = [threading.Thread(target=work, args=[protocol]) for protocol in PROTOCOLS]
    for thread in threads:
        thread.start()
    while server.metric("nv_inference_request_success", model="tiny-cpu") < 50:
        assert any(thread.is_alive() for thread in threads), errors
        time.sleep(0.05)
    time.sleep(0.5)
    event()
    for thread in threads:
        thread.join()
    return errors


def test_stub_killed_under_load(small: Path, exported: Path, images: np.ndarray, tmp_path: Path) -> None:
    """What a back end does that crashes: clients get errors until the model is loaded anew, and no wrong answer."""
    survived = False
    for _ in range(3):
        with serve(small, *EXPLICIT) as server:
            [stub] = server.stubs()
            errors = under_load(server, tmp_path, stub.kill)
            # A stub that dies while it holds a lock in shared memory may take the server with it. Then start again.
            survived = server.process.poll() is None
            if survived:
                _check_losses(server, errors, tmp_path)
                _check_recovery(server, images[:3], expected(exported, images[:3]))
            server.stop(signal.SIGKILL)  # a server with a crashed back end does not end by itself
            server.sweep()
            assert server.leftovers() == []
        if survived:
            return
        assert all("0 wrong and " in str(error) for error in errors.values()), errors
    pytest.fail("the server died with its stub three times")


def _check_losses(server: TritonServer, errors: dict[Protocol, GplqError], folder: Path) -> None:
    for protocol in PROTOCOLS:
        assert isinstance(errors[protocol], GateError), (errors, server.log())
        [row] = json.loads((folder / f"{protocol}.json").read_text(encoding="utf-8"))["served_latency"]
        assert row["requests"] > 0
        assert row["wrong"] == 0
        assert row["lost"] > 0
        assert f"0 wrong and {row['lost']} lost" in str(errors[protocol])
        assert all("is not healthy" in message for message in row["errors"]), row["errors"]


def _check_recovery(server: TritonServer, images: np.ndarray, wanted: np.ndarray) -> None:
    # The server believes that all is well: only requests show that it is not, and the count of those that failed.
    assert server.get("v2/health/ready")[0] == server.get("v2/models/tiny-cpu/ready")[0] == 200
    assert server.metric("nv_inference_request_failure", model="tiny-cpu") >= 2
    assert control(server, "load", "tiny-cpu") is None  # which changes nothing
    with TritonRun(server.grpc, "tiny-cpu", "grpc") as model:
        with pytest.raises(MissingError, match="is not healthy"):
            model({"images": images})
        assert control(server, "unload", "tiny-cpu") is None
        assert control(server, "load", "tiny-cpu") is None
        np.testing.assert_array_equal(model({"images": images})[0], wanted)


def test_server_killed_under_load(small: Path, exported: Path, images: np.ndarray, tmp_path: Path) -> None:
    with serve(small, *EXPLICIT) as server:
        errors = under_load(server, tmp_path, functools.partial(server.stop, signal.SIGKILL))
        for protocol in PROTOCOLS:
            assert isinstance(errors[protocol], GateError), errors
            [row] = json.loads((tmp_path / f"{protocol}.json").read_text(encoding="utf-8"))["served_latency"]
            assert row["requests"] > 0
            assert row["wrong"] == 0
            assert row["lost"] >= 4  # each client gives up after some
            assert all("no answer" in message for message in row["errors"]), row["errors"]
            with pytest.raises(MissingError, match="no answer"):
                TritonRun(address(server, protocol), "tiny-cpu", protocol, timeout=5)
        server.sweep()
        assert server.leftovers() == []
    with serve(small, *EXPLICIT) as server, TritonRun(server.http, "tiny-cpu") as model:
        np.testing.assert_array_equal(model({"images": images[:3]})[0], expected(exported, images[:3]))


def test_plan_is_checked_against_its_sidecar(exported: Path, tmp_path: Path) -> None:
    """The core reads the configuration of an engine; the stand-in refuses what TensorRT would."""
    models = write(exported, tmp_path / "plan", "fp16.plan")
    config = read_config(models / "tiny-fp16")
    config.ClearField("model_warmup")  # nothing here runs a plan
    (models / "tiny-fp16" / CONFIG).write_text(print_config(config), encoding="utf-8")
    flags = ("--model-control-mode=explicit", "--load-model=tiny-fp16")
    with serve(models, *flags) as server, TritonRun(server.http, "tiny-fp16") as model:
        assert model.max_batch_size == 8
        with pytest.raises(MissingError, match="runs no plan"):
            model({"images": np.zeros((1, 1, 16, 16), np.float32)})
    config.max_batch_size = 16
    (models / "tiny-fp16" / CONFIG).write_text(print_config(config), encoding="utf-8")
    why = "specified max-batch 16 but TensorRT engine only supports max-batch 8"
    with pytest.raises(ServerError, match=why), serve(models, *flags):
        pass


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_check_puts_a_served_model_into_the_chain(
    exported: Path, server: TritonServer, npz_file: Path, tmp_path: Path, protocol: Protocol
) -> None:
    def check(model: str) -> int:
        address = server.grpc if protocol == "grpc" else server.http
        arguments = ["check", str(exported / "model.cpu.onnx"), "--data", str(npz_file), "--forced-images", "8"]
        arguments += ["--triton", address, "--model", model, "--report", str(tmp_path), "--require", "triton"]
        return cli.main([*arguments, *(["--grpc"] if protocol == "grpc" else [])])

    assert check("tiny-cpu") == 0
    report = read_report(tmp_path / "parity.json")
    served, direct = report.pair("served"), report.pair("cpu")
    assert served is not None and direct is not None and served.found == direct.found
    assert f"tiny-cpu on Triton at {server.grpc if protocol == 'grpc' else server.http}, {protocol}" in served.candidate
    assert check("tiny-fp32") == 1  # the network without quantisers answers, too, but something else
    assert {gate.pair for gate in read_report(tmp_path / "parity.json").failed} == {"served"}
    assert check("nobody") == 2
