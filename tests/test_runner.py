"""The runner: all that it refuses, how it drives TensorRT (a stand-in), and real plans where there is a GPU."""

import contextlib
import ctypes
import hashlib
import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from gplq.errors import BuildError, MissingError, UsageError
from gplq_export import engine, runner
from gplq_export.runner import PlanHeader, Runner, read_header, read_plan

SHAPE = (2, 4)  # of an image of the stand-in
PLAN = b"ftrt" + bytes(20) + bytes([10, 13, 2, 6]) + b"kernels" * 9


def write_plan(folder: Path, content: bytes = PLAN, sha256: str | None = None) -> Path:
    """A plan with its manifest."""
    path = folder / "model.plan"
    path.write_bytes(content)
    write_manifest(path, sha256 or hashlib.sha256(content).hexdigest())
    return path


def write_manifest(plan: Path, sha256: str) -> None:
    content = {"tool": "gplq-export", "schema_version": "3.0", "files": {plan.name: {"sha256": sha256}}}
    (plan.parent / "manifest.json").write_text(json.dumps(content), encoding="utf-8")


def test_header(tmp_path: Path) -> None:
    assert read_header(write_plan(tmp_path)) == PlanHeader("TensorRT", "10.13.2.6")
    rtx = b"vtrt" + PLAN[4:24] + bytes([1, 7, 1, 116])
    assert read_header(write_plan(tmp_path, rtx)) == PlanHeader("TensorRT-RTX", "1.7.1.116")
    for content in (b"", PLAN[:27], b"ONNX" + PLAN[4:]):
        with pytest.raises(UsageError, match="no TensorRT plan, or it is truncated"):
            read_header(write_plan(tmp_path, content))
    with pytest.raises(UsageError, match=r"absent\.plan is not a file"):
        read_header(tmp_path / "absent.plan")


def test_plan_must_be_the_one_in_the_manifest(tmp_path: Path) -> None:
    plan = write_plan(tmp_path)
    assert read_plan(plan) == PLAN
    altered = PLAN[:-1] + b"!"
    plan.write_bytes(altered)
    with pytest.raises(UsageError, match="is not the plan that was built"):
        read_plan(plan)
    assert read_plan(plan, sha256=hashlib.sha256(altered).hexdigest().upper()) == altered
    write_manifest(tmp_path / "other.plan", "0")
    with pytest.raises(UsageError, match="it is of another export"):
        read_plan(plan)
    (tmp_path / "manifest.json").write_text("[]", encoding="utf-8")
    with pytest.raises(UsageError, match=r"no readable manifest\.json"):
        read_plan(plan)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(UsageError, match=r"no manifest\.json beside it.*pass the SHA-256"):
        read_plan(plan)


def test_import_loads_nothing_heavy() -> None:
    heavy = "{'torch', 'onnx', 'tensorrt', 'tensorrt_rtx', 'tensorrt_rtx_bindings', 'pycuda'}"
    code = f"import sys, gplq_export.runner; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


# A stand-in for TensorRT: its kernel adds up each image, and reads and writes at the addresses that it was given.


class FakeContext:
    def __init__(self, log: list[str], config: Any = None) -> None:
        self.log, self.config = log, config
        self.addresses: dict[str, int] = {}
        self.batch = 0

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self.log.append(f"profile {profile}")
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert (name, shape[1:]) == ("images", SHAPE)
        self.batch = shape[0]
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == 7
        self.log.append(f"run {self.batch}")
        if self.batch == 13:
            return False
        images = (ctypes.c_float * (self.batch * math.prod(SHAPE))).from_address(self.addresses["images"])
        sums = np.frombuffer(images, np.float32).reshape(self.batch, -1).sum(1)
        ctypes.memmove(self.addresses["logits"], sums.ctypes.data, sums.nbytes)
        return True


class FakeEngine:
    num_io_tensors = 2
    num_optimization_profiles = 2

    def __init__(self, log: list[str]) -> None:
        self.log = log

    def get_tensor_name(self, index: int) -> str:
        return ("images", "logits")[index]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (-1, *SHAPE) if name == "images" else (-1, 1)

    def get_tensor_dtype(self, name: str) -> str:
        return "float32"

    def get_tensor_mode(self, name: str) -> str:
        return "in" if name == "images" else "out"

    def get_tensor_profile_shape(self, name: str, index: int) -> list[tuple[int, ...]]:
        return [(size, *SHAPE) for size in ((1, 1, 4), (2, 8, 16))[index]]

    def create_runtime_config(self) -> SimpleNamespace:
        return SimpleNamespace()

    def create_execution_context(self, *config: Any) -> FakeContext:
        self.log.append("context")
        return FakeContext(self.log, *config)


class OnGpu:
    """An array that claims to be on the GPU."""

    def __init__(self, array: np.ndarray) -> None:
        self.array, self.shape, self.dtype = array, array.shape, array.dtype
        self.__cuda_array_interface__ = {**array.__array_interface__, "strides": array.strides}

    def __getitem__(self, part: slice) -> "OnGpu":
        return OnGpu(self.array[part])


class FakeMemory:
    name, captures, handle = "fake", True, 7

    def __init__(self, log: list[str]) -> None:
        self.log = log

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        yield

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> OnGpu:
        whole = np.full(math.prod(shape) + 64, np.nan, dtype)
        start = -whole.ctypes.data % 256 // dtype.itemsize
        return OnGpu(whole[start : start + math.prod(shape)].reshape(shape))

    def fill(self, buffer: OnGpu, array: Any) -> None:
        self.log.append("copy")
        buffer.array[:] = getattr(array, "array", array)

    def capture(self, enqueue: Callable[[], None]) -> Callable[[], None]:
        self.log.append("capture")
        enqueue()
        return enqueue

    def synchronize(self) -> None: ...


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the stand-in was told."""
    said: list[str] = []
    trt = SimpleNamespace(
        __name__="tensorrt",
        __version__="10.13.2.6",
        ILogger=object,
        Runtime=lambda log: SimpleNamespace(deserialize_cuda_engine=lambda content: FakeEngine(said)),
        TensorIOMode=SimpleNamespace(INPUT="in"),
        CudaGraphStrategy=SimpleNamespace(WHOLE_GRAPH_CAPTURE="whole"),
        DynamicShapesKernelSpecializationStrategy=SimpleNamespace(EAGER="eager"),
        nptype=np.dtype,
    )
    monkeypatch.setattr(runner, "optional_module", lambda name: trt if name in ("tensorrt", "tensorrt_rtx") else None)
    monkeypatch.setattr(runner, "_find_memory", lambda device: FakeMemory(said))
    monkeypatch.setattr(runner, "log_recorder", lambda trt: SimpleNamespace(errors=lambda: ["no memory left"]))
    return said


def images(count: int, seed: int = 0) -> OnGpu:
    array = FakeMemory([]).empty((count, *SHAPE), np.dtype(np.float32))
    array.array[:] = np.random.default_rng(seed).normal(size=(count, *SHAPE))
    return array


def expected(array: OnGpu) -> np.ndarray:
    return array.array.reshape(len(array.array), -1).sum(1, keepdims=True)


def test_arrays_on_the_gpu_are_read_in_place_and_outputs_are_allocated_once(tmp_path: Path, log: list[str]) -> None:
    run = Runner(write_plan(tmp_path))
    assert (run.input.name, run.input.shape, list(run.outputs)) == ("images", (-1, *SHAPE), ["logits"])
    assert run.profiles == ((1, 1, 4), (2, 8, 16))
    seen = []
    for count, seed in ((3, 0), (3, 1), (1, 2)):
        batch = images(count, seed)
        (logits,) = run(batch).values()
        np.testing.assert_allclose(logits.array, expected(batch), rtol=1e-5)
        seen.append(logits.array.ctypes.data)
    assert len(set(seen)) == 1
    assert "copy" not in log
    assert log.count("context") == 2  # one a profile: 3 images are nearer to 8 than to 1 in ratio, so is 1 to 1
    assert [entry for entry in log if entry.startswith("profile")] == ["profile 1", "profile 0"]


def test_other_arrays_are_copied(tmp_path: Path, log: list[str]) -> None:
    run = Runner(write_plan(tmp_path))
    batch = images(6)
    every_second = OnGpu(batch.array[::2])
    for array in (batch.array, torch.from_numpy(batch.array), every_second, OnGpu(batch.array[1:])):
        (logits,) = run(array).values()
        wanted = np.asarray(getattr(array, "array", array)).reshape(len(logits.array), -1).sum(1, keepdims=True)
        np.testing.assert_allclose(logits.array, wanted, rtol=1e-5)
    assert log.count("copy") == 4
    run.input_buffer(6).array[:] = batch.array
    run(run.input_buffer(6))
    assert log.count("copy") == 4


def test_graphs_are_captured_once_for_each_batch_from_contexts_of_their_own(tmp_path: Path, log: list[str]) -> None:
    run = Runner(write_plan(tmp_path), cuda_graphs=True)
    for count, seed in ((3, 0), (4, 1), (3, 2)):
        batch = images(count, seed)
        (logits,) = run(batch).values()
        np.testing.assert_allclose(logits.array, expected(batch), rtol=1e-5)
    assert log.count("capture") == log.count("context") == 2
    assert log.count("copy") == 3  # a graph reads from one address
    run.input_buffer(3).array[:] = batch.array
    run(run.input_buffer(3))
    assert log.count("copy") == 3


def test_rtx_captures_graphs_by_itself(tmp_path: Path, log: list[str]) -> None:
    content = b"vtrt" + PLAN[4:]
    run = Runner(write_plan(tmp_path, content), cuda_graphs=True)
    batch = images(2)
    np.testing.assert_allclose(run(batch)["logits"].array, expected(batch), rtol=1e-5)
    (context,) = run._contexts.values()
    assert vars(context.config) == {
        "cuda_graph_strategy": "whole",
        "dynamic_shapes_kernel_specialization_strategy": "eager",
    }
    assert "capture" not in log


def test_what_a_runner_refuses(tmp_path: Path, log: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    plan = write_plan(tmp_path)
    run = Runner(plan)
    with pytest.raises(UsageError, match="a batch of 17 is outside of what the plan was built for: 1 to 4, 2 to 16"):
        run(images(17))
    with pytest.raises(UsageError, match=r"shape \[3, 2\], the plan takes \['batch', 2, 4\]"):
        run(np.zeros((3, 2), np.float32))
    with pytest.raises(UsageError, match="images are float64, the plan takes float32"):
        run(torch.zeros(1, *SHAPE, dtype=torch.float64))
    with pytest.raises(BuildError, match="cannot run a batch of 13: no memory left"):
        run(images(13))
    monkeypatch.setattr(FakeMemory, "captures", False)
    with pytest.raises(UsageError, match="pycuda cannot capture a stream"):
        Runner(plan, cuda_graphs=True)
    other = write_plan(tmp_path, PLAN[:24] + bytes([10, 14, 1, 48]) + PLAN[28:])
    with pytest.raises(MissingError, match=r"built by TensorRT 10\.14\.1\.48, but 10\.13\.2\.6 is installed"):
        Runner(other)
    Runner(other, version_compatible=True)
    with pytest.raises(UsageError, match="not version-compatible"):
        Runner(write_plan(tmp_path, b"vtrt" + PLAN[4:]), version_compatible=True)


@pytest.mark.parametrize(
    ("said", "error", "message"),
    [
        ("engine plan file is generated on an incompatible device", MissingError, "for another kind of GPU"),
        ("Version tag does not match", MissingError, "cannot be loaded: Version tag"),
    ],
)
def test_tensorrt_refuses_a_plan(said: str, error: type[Exception], message: str, tmp_path: Path) -> None:
    runtime = SimpleNamespace(deserialize_cuda_engine=lambda content: None)
    with pytest.raises(error, match=message):
        runner._deserialise(None, runtime, SimpleNamespace(errors=lambda: [said]), PLAN, tmp_path / "a.plan")


@pytest.mark.parametrize(
    ("bits", "error", "message"),
    [(2, MissingError, "not built for this GPU; add the GPU to --sm"), (33, UsageError, "damaged"), (5, MissingError,
     "another version.*; the GPU's driver is too old")],
)  # fmt: skip
def test_rtx_refuses_a_plan(bits: int, error: type[Exception], message: str, tmp_path: Path) -> None:
    trt = pytest.importorskip("tensorrt_rtx_bindings", reason="needs TensorRT-RTX's own names")
    runtime = SimpleNamespace(
        engine_header_size=64, get_engine_validity=lambda head: (trt.EngineValidity.INVALID, bits)
    )
    with pytest.raises(error, match=message):
        runner._deserialise(trt, runtime, SimpleNamespace(errors=list), PLAN, tmp_path / "a.plan")


def test_no_gpu_and_no_tensorrt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "optional_module", lambda name: None)
    with pytest.raises(MissingError, match=r"TensorRT 10\.13\.2\.6, which is not installed: pip install 'gplq\[trt\]'"):
        Runner(write_plan(tmp_path))
    with pytest.raises(MissingError, match="needs an NVIDIA GPU with its driver, and PyTorch or pycuda") as raised:
        runner._find_memory(0)
    assert raised.value.exit_code == 3
    with pytest.raises(MissingError, match="there is no GPU 2: this machine has 2"):
        runner._check_device(2, 2)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real plan, of a matrix multiplication, with its manifest."""
    from onnx import TensorProto, helper, numpy_helper, save

    try:
        backend = engine.find_builder()
    except MissingError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("plan")
    weight = numpy_helper.from_array(np.arange(64, dtype=np.float32).reshape(16, 4) / 64, "w")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["images", "w"], ["logits"], name="head")],
        "linear",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 16])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 4])],
        [weight],
    )
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), folder / "model.onnx")
    report = engine.build_engine(
        folder / "model.onnx",
        folder / "model.plan",
        options=engine.BuilderOptions(profiles=((1, 1, 1),)),
        backend=backend,
    )
    write_manifest(folder / "model.plan", report.plan_sha256)
    header = read_header(folder / "model.plan")
    assert header.backend == backend.name
    assert header.version.startswith(backend.version) or backend.version.startswith(header.version)
    return folder / "model.plan"


@pytest.mark.trt
def test_a_real_plan_without_a_gpu_is_one_clear_line(built: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(MissingError, match="needs an NVIDIA GPU") as raised:
        Runner(built)
    assert "\n" not in str(raised.value)
    assert raised.value.exit_code == 3


@pytest.mark.trt
def test_a_real_plan_of_another_version(built: Path, tmp_path: Path) -> None:
    content = bytearray(built.read_bytes())
    content[25] += 1
    with pytest.raises(MissingError, match="a plan runs on the version that built it alone"):
        Runner(write_plan(tmp_path, bytes(content)))


def test_names_that_the_runner_uses_exist_in_tensorrt_rtx() -> None:
    """Where nothing can run, at least what is called is there."""
    trt = pytest.importorskip("tensorrt_rtx_bindings", reason="needs TensorRT-RTX")
    names = {
        trt.Runtime: "deserialize_cuda_engine engine_header_size get_engine_validity engine_host_code_allowed",
        trt.ICudaEngine: "create_execution_context create_runtime_config get_tensor_profile_shape get_tensor_dtype "
        "get_tensor_mode get_tensor_name get_tensor_shape num_io_tensors num_optimization_profiles",
        trt.IExecutionContext: "execute_async_v3 set_input_shape set_optimization_profile_async set_tensor_address",
        trt.IRuntimeConfig: "cuda_graph_strategy dynamic_shapes_kernel_specialization_strategy",
        trt.CudaGraphStrategy: "WHOLE_GRAPH_CAPTURE",
        trt.DynamicShapesKernelSpecializationStrategy: "EAGER",
        trt.EngineInvalidityDiagnostics: " ".join(runner._INVALID),
        trt.EngineValidity: "INVALID",
        trt.TensorIOMode: "INPUT",
        trt: "nptype __version__",
    }
    missing = [f"{owner}.{name}" for owner, used in names.items() for name in used.split() if not hasattr(owner, name)]
    assert not missing


@pytest.mark.gpu
@pytest.mark.parametrize("cuda_graphs", [False, True])
@pytest.mark.parametrize("memory", ["torch", "pycuda"])
def test_a_real_plan_on_a_gpu(built: Path, memory: str, cuda_graphs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        pytest.skip("there is no NVIDIA GPU that PyTorch sees")
    if memory == "pycuda":
        pytest.importorskip("pycuda.driver", reason="pycuda is not installed")
        if cuda_graphs and read_header(built).backend == "TensorRT":
            pytest.skip("pycuda cannot capture graphs")
        find = runner.optional_module
        monkeypatch.setattr(runner, "optional_module", lambda name: None if name == "torch" else find(name))
    run = Runner(built, cuda_graphs=cuda_graphs)
    weight = np.arange(64, dtype=np.float32).reshape(16, 4) / 64
    for count in (1, 5, 32, 5):
        batch = np.random.default_rng(count).normal(size=(count, 16)).astype(np.float32)
        given = torch.from_numpy(batch).cuda() if memory == "torch" else batch
        logits = run(given)["logits"]
        run.synchronize()
        found = logits.cpu().numpy() if memory == "torch" else logits.get()
        np.testing.assert_allclose(found, batch @ weight, rtol=0.01, atol=0.01)  # TF32
