"""The genuine server as the judge of ``gplq-export triton --check``: every planted error is shown to both.

One server gets one model for each plant; which of them it refuses has to be which of them the check calls wrong. Names,
types and shapes against the model's file are judged by the stand-in for ONNX Runtime's back end, everything else by the
server's core.
"""

import json
import re
import shutil
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

pytest.importorskip("tritonclient.grpc", reason="needs gplq[triton]")

from gplq_export.triton.check import check_repository
from gplq_export.triton.config import CONFIG
from gplq_export.triton.repository import write_repository
from tests.test_triton_check import ERRORS, PLAN
from tests.triton_fixture import copy, require_server
from tests.triton_server import TritonServer, serve

pytestmark = [pytest.mark.triton, pytest.mark.slow]

X = "[3, 8, 8]"
BASE = """backend: "onnxruntime" max_batch_size: 4
input { name: "x" data_type: TYPE_FP32 dims: [3, 8, 8] }
output { name: "y" data_type: TYPE_FP32 dims: [3, 8, 8] }
instance_group { kind: KIND_CPU count: 1 }
parameters { key: "intra_op_thread_count" value { string_value: "1" } }
"""
STEP = (
    'step { model_name: "good" model_version: -1 input_map { key: "x" value: "a" } output_map { key: "y" value: "b" } }'
)
NO_BATCH = (("max_batch_size: 4", "max_batch_size: 0"), ("dims: [3", "dims: [-1, 3"), ("dims: [3", "dims: [-1, 3"))


def changed(*changes: tuple[str, str], more: str = "") -> str:
    text = BASE
    for old, new in changes:
        assert old in text
        text = text.replace(old, new, 1)
    return text + more


def x(given: str) -> tuple[str, str]:
    """Other words about the input."""
    return ("dims: [3, 8, 8]", given)


def y(given: str) -> tuple[str, str]:
    """Other words about the output."""
    return ('name: "y" data_type: TYPE_FP32 dims: [3, 8, 8]', f'name: "y" data_type: TYPE_FP32 {given}')


def warm_up(text: str) -> str:
    return f'model_warmup {{ name: "w" batch_size: 1 inputs {{ key: "x" value {{ data_type: TYPE_FP32 {text} }} }} }}'


def ensemble(steps: str, more: str = "", inputs: str = "a", outputs: str = "b") -> str:
    kinds = (("input", inputs), ("output", outputs))
    tensors = " ".join(
        f'{kind} {{ name: "{name}" data_type: TYPE_FP32 dims: [-1, 3, 8, 8] }}'
        for kind, names in kinds
        for name in names
    )
    return f'platform: "ensemble" max_batch_size: 0 {tensors} ensemble_scheduling {{ {steps} }} {more}'


def step(read: str, made: str) -> str:
    return STEP.replace('"a"', f'"{read}"').replace('"b"', f'"{made}"')


BATCHED = "format: FORMAT_NCHW dims: [1, 3, 8, 8]"
START = "kind: CONTROL_SEQUENCE_START"
# name: (configuration, shape of the file's tensors; None for an ensemble); of those that are wrong the rule goes before
Plants = dict[str, tuple[str, tuple[object, ...] | None]]
IMAGES = ("N", 3, 8, 8)
GOOD: Plants = {
    "good": (BASE, IMAGES),
    "no-batch": (changed(*NO_BATCH), IMAGES),
    "format": (changed(x(f"format: FORMAT_NCHW dims: {X}")), IMAGES),
    "reshape": (changed(x("dims: [192] reshape { shape: [3, 8, 8] }")), IMAGES),
    "reshape-varies": (changed(x("dims: [-1, 64] reshape { shape: [-1, 8, 8] }")), IMAGES),
    "reshape-adds-a-batch": (
        changed(NO_BATCH[0], *2 * (x("dims: [3, 8, 8 ] reshape { shape: [1, 3, 8, 8] }"),)),
        (1, 3, 8, 8),
    ),
    "priority": (changed(more="dynamic_batching { priority_levels: 2 default_priority_level: 1 }"), IMAGES),
    "sequence": (
        changed(
            more=f'sequence_batching {{ control_input {{ name: "S" control {{ {START} fp32_false_true: [0, 1] }} }} }}'
        ),
        IMAGES,
    ),
    "all-versions": (changed(more="version_policy { all { } }"), IMAGES),
    "ensemble": (ensemble(STEP), None),
    "ensemble-of-two": (ensemble(step("a", "c") + step("c", "b")), None),
}
BAD: dict[str, tuple[str, str, tuple[object, ...] | None]] = {
    "format-of-four": ("format", changed(x(BATCHED), y("dims: [1, 3, 8, 8]")), ("N", 1, 3, 8, 8)),
    "format-of-two": ("format", changed(x("format: FORMAT_NHWC dims: [8, 8]"), y("dims: [8, 8]")), ("N", 8, 8)),
    "format-without-batches": (
        "format",
        changed(NO_BATCH[0], x("format: FORMAT_NCHW dims: [-1, 3, 8, 8]"), y("dims: [-1, 3, 8, 8]")),
        IMAGES,
    ),
    "reshape-loses": ("reshape", changed(x("dims: [191] reshape { shape: [3, 8, 8] }")), IMAGES),
    "reshape-of-output-loses": ("reshape", changed(y("dims: [191] reshape { shape: [3, 8, 8] }")), IMAGES),
    "reshape-to-nothing": ("reshape", changed(x("dims: [192] reshape { shape: [0] }")), IMAGES),
    "reshape-begins-to-vary": ("reshape", changed(x("dims: [192] reshape { shape: [-1] }")), IMAGES),
    "reshape-of-a-part": ("reshape", changed(x("dims: [-1, 64] reshape { shape: [-1, 8, 9] }")), IMAGES),
    "reshape-of-two-that-vary": ("reshape", changed(x("dims: [-1, -1] reshape { shape: [-1] }")), IMAGES),
    "reshape-crosses": ("reshape", changed(x("dims: [3, -1] reshape { shape: [-1, 3] }")), IMAGES),
    "reshape-to-a-scalar": ("reshape", changed(NO_BATCH[0], x("dims: [1] reshape { shape: [] }")), ()),
    "reshape-to-another-file": ("dims", changed(x("dims: [192] reshape { shape: [8, 8, 3] }")), IMAGES),
    "shape-tensor": ("shape-tensor", changed(x(f"is_shape_tensor: true dims: {X}")), IMAGES),
    "profile-on-onnx": ("instances", changed(("count: 1", 'count: 1 profile: "0"')), IMAGES),
    "priority-default": (
        "priority",
        changed(more="dynamic_batching { priority_levels: 2 default_priority_level: 3 }"),
        IMAGES,
    ),
    "priority-no-default": ("priority", changed(more="dynamic_batching { priority_levels: 2 }"), IMAGES),
    "priority-policy": (
        "priority",
        changed(
            more="dynamic_batching { priority_levels: 2 default_priority_level: 1 "
            "priority_queue_policy { key: 5 value { } } }"
        ),
        IMAGES,
    ),
    "priority-and-order": (
        "priority",
        changed(more="dynamic_batching { preserve_ordering: true priority_levels: 2 default_priority_level: 1 }"),
        IMAGES,
    ),
    "sequence-twice": (
        "sequence",
        changed(
            more='sequence_batching { control_input { name: "S" '
            f"control {{ {START} fp32_false_true: [0, 1] }} control {{ {START} fp32_false_true: [0, 1] }} }} }}"
        ),
        IMAGES,
    ),
    "sequence-without-name": (
        "sequence",
        changed(more=f"sequence_batching {{ control_input {{ control {{ {START} fp32_false_true: [0, 1] }} }} }}"),
        IMAGES,
    ),
    "sequence-without-values": (
        "sequence",
        changed(more=f'sequence_batching {{ control_input {{ name: "S" control {{ {START} }} }} }}'),
        IMAGES,
    ),
    "no-versions-wanted": ("version", changed(more="version_policy { latest { num_versions: 0 } }"), IMAGES),
    "no-version-named": ("version", changed(more="version_policy { specific { } }"), IMAGES),
    "warm-up-without-data": ("warm-up", changed(more=warm_up(f"dims: {X}")), IMAGES),
    "warm-up-that-varies": ("warm-up", changed(more=warm_up("dims: [3, 8, -1] zero_data: true")), IMAGES),
    "warm-up-of-no-file": ("warm-up", changed(more=warm_up(f'dims: {X} input_data_file: "f"')), IMAGES),
    "batch-input-of-nobody": (
        "batch-tensor",
        changed(
            more='batch_input { kind: BATCH_ELEMENT_COUNT target_name: "c" data_type: TYPE_FP32 source_input: "q" }'
        ),
        IMAGES,
    ),
    "batch-input-of-two": (
        "batch-tensor",
        changed(
            more='batch_input { kind: BATCH_ITEM_SHAPE target_name: "c" data_type: TYPE_FP32 source_input: ["x", "x"] }'
        ),
        IMAGES,
    ),
    "batch-output-of-nobody": (
        "batch-tensor",
        changed(more='batch_output { kind: BATCH_SCATTER_WITH_INPUT_SHAPE target_name: "q" source_input: "x" }'),
        IMAGES,
    ),
    "cache-of-many-answers": (
        "response-cache",
        changed(more="model_transaction_policy { decoupled: true } response_cache { enable: true }"),
        IMAGES,
    ),
    "agent-without-name": ("agents", changed(more="model_repository_agents { agents { } }"), IMAGES),
    "runtime-of-nobody": ("backend", changed(more='runtime: "libfoo.so"'), IMAGES),
    "backend-of-nobody": ("backend", changed(('"onnxruntime"', '"onnx"')), IMAGES),
    "file-of-another-name": ("model-file", changed(more='default_model_filename: "other.onnx"'), IMAGES),
    "no-name-of-input": ("tensors", changed(('name: "x" ', "")), IMAGES),
    "no-name-of-output": ("tensors", changed(('name: "y" ', "")), IMAGES),
    "ensemble-without-steps": ("ensemble-map", ensemble(""), None),
    "ensemble-step-without-model": ("ensemble-step", ensemble(STEP.replace('model_name: "good" ', "")), None),
    "ensemble-step-of-no-version": ("ensemble-step", ensemble(STEP.replace("version: -1", "version: 7")), None),
    "ensemble-maps-to-nothing": ("ensemble-map", ensemble(step("", "b")), None),
    "ensemble-of-itself": ("ensemble-map", ensemble(STEP.replace('"good"', '"ensemble-of-itself"')), None),
    "ensemble-input-unused": ("ensemble-map", ensemble(STEP, inputs="ac"), None),
    "ensemble-tensor-unused": ("ensemble-map", ensemble(STEP + step("a", "c")), None),
    "ensemble-tensor-made-twice": ("ensemble-map", ensemble(STEP + STEP), None),
    "ensemble-tensor-of-nobody": ("ensemble-map", ensemble(STEP + step("z", "c")), None),
    "ensemble-in-a-circle": ("ensemble-map", ensemble(STEP + step("d", "c") + step("c", "d")), None),
    "ensemble-without-inputs": ("ensemble-map", ensemble(STEP, inputs=""), None),
    "ensemble-with-optimisation": ("ensemble-has", ensemble(STEP, "optimization { priority: PRIORITY_MAX }"), None),
    "ensemble-with-warm-up": (
        "ensemble-has",
        ensemble(STEP, warm_up("dims: [1, 3, 8, 8] zero_data: true").replace('"x"', '"a"')),
        None,
    ),
}
# Plants of test_triton_check.py that this server takes, and why they are errors all the same.
STRICTER = {
    "no config": "it guesses from the file what this model is",
    "no backend": "it guesses from the file's name, and nothing could be checked",
    "negative count": "it takes it for 1",
    "unknown accelerator": "ONNX Runtime's genuine back end reads it, the stand-in does not",
    "unknown precision": "the same",
    "calibration table beside quantisers": "the same",
    "labels too few": "classes without a label are answered without one",
    "version that is not there": "it serves the others without a word",
    "sidecar damaged": "it does not know our sidecars",
    "model.py that answers nothing": "the first request fails",
}


@dataclass(frozen=True)
class Judged:
    """By name of the model: what the server says against it; what the check says. Empty: nothing."""

    server: dict[str, str]
    check: dict[str, str]


# One model at a time. A server that dies all the same says nothing of any model, and is started again.
_FLAGS = ("--exit-on-error=false", "--strict-readiness=false", "--model-load-thread-count=1")
_STARTS = 3


def identity(shape: tuple[object, ...]) -> onnx.ModelProto:
    tensors = [helper.make_tensor_value_info(name, TensorProto.FLOAT, list(shape)) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", tensors[:1], tensors[1:])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def judge(models: Path) -> Judged:
    """Let the check and the server look at every model of a repository."""
    said: dict[str, str] = {}
    for problem in check_repository(models):
        if problem.severity == "error":
            said.setdefault(problem.where.split(":")[0], f"{problem.rule}: {problem.found}")
    for _ in range(_STARTS):
        with serve(models, *_FLAGS, wait=False) as server:
            states = _states(server)
            log = server.log()
        if states is not None:
            break
    else:
        pytest.fail(f"the server died {_STARTS} times: {log[-2000:]}")
    names = [path.name for path in models.iterdir()]
    return Judged({name: _refusal(states.get(name, {}), name, log) for name in names}, said)


def _states(server: TritonServer) -> dict[str, dict[str, str]] | None:
    """The server's index by model, once every model has been tried, which is when it listens; None if it died."""
    request = urllib.request.Request(f"http://{server.http}/v2/repository/index", data=b"{}", method="POST")
    deadline = time.monotonic() + 240
    while server.process.poll() is None:
        try:
            with urllib.request.urlopen(request, timeout=5) as answer:
                return {entry["name"]: entry for entry in json.load(answer)}
        except OSError:
            assert time.monotonic() < deadline, server.log()[-2000:]
            time.sleep(0.2)
    return None


def _refusal(entry: dict[str, str], name: str, log: str) -> str:
    if entry.get("state") == "READY":
        return ""
    # What is wrong with a configuration is told to the log only.
    lines = (line for line in log.splitlines() if re.search(rf"(^|[^\w-]){re.escape(name)}($|[^\w-])", line))
    return entry.get("reason") or next((line for line in lines if line.startswith("E")), "not there, without a word")


@pytest.fixture(scope="module", autouse=True)
def _server_is_here() -> None:
    require_server()


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Judged:
    models = tmp_path_factory.mktemp("judged")
    for name, (text, shape) in (GOOD | {name: plant[1:] for name, plant in BAD.items()}).items():
        (models / name / "1").mkdir(parents=True)
        (models / name / CONFIG).write_text(text)
        if shape is not None:
            onnx.save(identity(shape), models / name / "1" / "model.onnx")
    return judge(models)


@pytest.mark.parametrize("name", GOOD)
def test_what_the_server_takes_is_no_error(planted: Judged, name: str) -> None:
    assert planted.server[name] == ""
    assert planted.check.get(name, "") == ""


@pytest.mark.parametrize("name", BAD)
def test_what_the_server_refuses_is_an_error(planted: Judged, name: str) -> None:
    assert planted.server[name] != ""
    assert planted.check.get(name, "").startswith(f"{BAD[name][0]}: ")


def shown(good: Path, models: Path, folder: Path, name: str) -> str:
    """Plant an error of test_triton_check.py in a copy, and put the model beside the good ones; returns its name."""
    _, model, _, break_ = ERRORS[name]
    broken = copy(good, folder / "broken")
    break_(broken)
    new = f"{model}-{list(ERRORS).index(name)}"
    shutil.move(broken / model, models / new)
    shutil.rmtree(broken)
    path = models / new / CONFIG
    if path.exists():
        path.write_bytes(re.sub(rb'(?m)^name: "%b"$' % model.encode(), b'name: "%b"' % new.encode(), path.read_bytes()))
    return new


# A plan runs on GPUs only; one of these breaks two models, for a missing model.py a server waits for ever, and of a
# warm-up that fails while it runs the core at times dies (SIGSEGV), and with it the judgement of all others.
APART = ("shapes that do not meet", "model.py missing", "warm-up too large", "ONNX of one batch")
SHOWN = [name for name, (_, model, _, _) in ERRORS.items() if model != PLAN and name not in APART]


@pytest.fixture(scope="module")
def broken(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """By name of the plant, what the server says against it."""
    folder = tmp_path_factory.mktemp("broken")
    write_repository(copy(exported, folder / "dist"), folder / "repo", say=lambda _: None)
    good = folder / "repo" / "models"
    models = copy(good, folder / "models")
    names = {name: shown(good, models, folder, name) for name in SHOWN}
    found = judge(models)
    assert not any(found.server[path.name] for path in good.iterdir())
    return {name: found.server[model] for name, model in names.items()}


@pytest.mark.parametrize("name", SHOWN)
def test_server_refuses_every_error_but_what_is_listed(broken: dict[str, str], name: str) -> None:
    assert (broken[name] == "") == (name in STRICTER), broken[name]
    assert ("directory name must equal" in broken[name]) == (name == "another name")
