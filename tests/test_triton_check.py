"""Every rule about a model repository, with a repository that breaks it and one that does not."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

pytest.importorskip("tritonclient.grpc", reason="needs gplq[triton]")

from gplq.errors import UsageError
from gplq_export.triton.check import check_repository
from gplq_export.triton.config import CONFIG, parse_config, print_config, schema
from gplq_export.triton.images import triton_image
from gplq_export.triton.repository import write_repository
from tests.triton_fixture import add_plan, change_config, change_json, copy

Break = Callable[[Path], object]
NET, PLAN, PRE, TOP, ALL = (f"classifier{it}" for it in ("-cpu", "-fp16", "-preprocess", "-top", ""))


@pytest.fixture(scope="module")
def good(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """models/ of a repository with everything that we write; shared: copy it before you change it."""
    folder = tmp_path_factory.mktemp("good")
    export = copy(exported, folder / "dist")
    add_plan(export, batch=(1, 4, 16))
    write_repository(export, folder / "repo", say=lambda _: None)
    return folder / "repo" / "models"


@pytest.fixture
def models(good: Path, tmp_path: Path) -> Path:
    return copy(good, tmp_path / "models")


def config(model: str, change: Callable[[Any], Any]) -> Break:
    return lambda models: change_config(models / model, change)


def text(model: str, old: str, new: str) -> Break:
    """Changes the text itself, as an editor does."""

    def apply(models: Path) -> None:
        path = models / model / CONFIG
        content = path.read_text()
        assert old in content
        path.write_text(content.replace(old, new, 1))

    return apply


def remove(path: str) -> Break:
    def apply(models: Path) -> None:
        target = models / path
        shutil.rmtree(target) if target.is_dir() else target.unlink()

    return apply


def write(path: str, content: bytes) -> Break:
    """Replaces a file that no sidecar protects, or the sidecar with it."""

    def apply(models: Path) -> None:
        (models / path).write_bytes(content)
        (models / path).parent.joinpath("gplq.json").unlink(missing_ok=True)

    return apply


def replace(path: str, content: bytes) -> Break:
    return lambda models: (models / path).write_bytes(content)


def static_batch(models: Path) -> None:
    path = models / NET / "1" / "model.onnx"
    model = onnx.load(path)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 8
    del model.graph.value_info[:]
    path.with_name("gplq.json").unlink()
    onnx.save(model, path)


def flat_images(models: Path) -> None:
    config(ALL, lambda it: only(it.input[0], "dims", 3))(models)
    config(PRE, lambda it: only(it.input[0], "dims", -1, 1))(models)


def kind(name: str) -> int:
    return int(schema().ModelInstanceGroup.Kind.Value(name))


def dtype(name: str) -> int:
    return int(schema().DataType.Value(name))


def only(message: Any, field: str, *values: Any) -> None:
    """Make these the only values of a repeated field."""
    message.ClearField(field)
    getattr(message, field).extend(values)


ERRORS: dict[str, tuple[str, str, str, Break]] = {
    # name: rule, model, part of what is found, what breaks it
    "unknown field": (
        "config-parses",
        NET,
        'no field named "max_batchsize"',
        text(NET, "max_batch_size", "max_batchsize"),
    ),
    "unknown enum value": ("config-parses", NET, "TYPE_FLOAT", text(NET, "TYPE_FP32", "TYPE_FLOAT")),
    "missing bracket": ("config-parses", NET, "line", text(NET, "instance_group {", "instance_group")),
    "field given twice": (
        "config-parses",
        NET,
        "max_batch_size",
        text(NET, "max_batch_size: 8", "max_batch_size: 8 max_batch_size: 8"),
    ),
    "config is no text": ("config-parses", NET, "cannot be read", replace(f"{NET}/{CONFIG}", b"\xff\xfe")),
    "no config": ("config-exists", NET, "is missing", remove(f"{NET}/{CONFIG}")),
    "another name": ("name", NET, "name is 'other'", config(NET, lambda it: setattr(it, "name", "other"))),
    "no backend": ("backend", NET, "neither backend nor platform", config(NET, lambda it: it.ClearField("backend"))),
    "platform tensorrt": (
        "platform",
        PLAN,
        "no platform 'tensorrt'",
        config(PLAN, lambda it: setattr(it, "platform", "tensorrt")),
    ),
    "platform of another backend": (
        "backend",
        PLAN,
        "not of backend 'onnxruntime'",
        config(PLAN, lambda it: setattr(it, "backend", "onnxruntime")),
    ),
    "ensemble without steps": (
        "ensemble",
        ALL,
        "need each other",
        config(ALL, lambda it: it.ClearField("ensemble_scheduling")),
    ),
    "tensor twice": (
        "tensors",
        NET,
        "input given 2 times",
        config(NET, lambda it: it.input.add().CopyFrom(it.input[0])),
    ),
    "tensor without a name": ("tensors", NET, "without a name", config(NET, lambda it: it.input[0].ClearField("name"))),
    "no data_type": ("tensors", NET, "has no data_type", config(NET, lambda it: it.input[0].ClearField("data_type"))),
    "no dims": ("dims", NET, "has no dims", config(NET, lambda it: it.output[0].ClearField("dims"))),
    "dims 0": ("dims", NET, "has dims [0]", config(NET, lambda it: only(it.output[0], "dims", 0))),
    "negative batch": ("batch", NET, "max_batch_size is -1", config(NET, lambda it: setattr(it, "max_batch_size", -1))),
    "preferred batch too large": (
        "batch",
        NET,
        "preferred_batch_size 16 is more than max_batch_size 8",
        config(NET, lambda it: it.dynamic_batching.preferred_batch_size.append(16)),
    ),
    "preferred batch below 1": (
        "batch",
        NET,
        "is below 1",
        config(NET, lambda it: it.dynamic_batching.preferred_batch_size.append(0)),
    ),
    "TensorRT on the CPU": (
        "instances",
        PLAN,
        "TensorRT with KIND_CPU",
        config(PLAN, lambda it: setattr(it.instance_group[0], "kind", kind("KIND_CPU"))),
    ),
    "CPU with GPUs": (
        "instances",
        NET,
        "with a list of gpus",
        config(NET, lambda it: it.instance_group[0].gpus.append(0)),
    ),
    "negative GPU": ("instances", PLAN, "gpus are [-1]", config(PLAN, lambda it: it.instance_group[0].gpus.append(-1))),
    "negative count": (
        "instances",
        NET,
        "count is -2",
        config(NET, lambda it: setattr(it.instance_group[0], "count", -2)),
    ),
    "unknown accelerator": (
        "accelerator",
        NET,
        "'tensorRT' is none",
        config(NET, lambda it: it.optimization.execution_accelerators.gpu_execution_accelerator.add(name="tensorRT")),
    ),
    "unknown precision": (
        "accelerator",
        NET,
        "precision_mode is 'INT4'",
        config(
            NET,
            lambda it: it.optimization.execution_accelerators.gpu_execution_accelerator.add(
                name="tensorrt", parameters={"precision_mode": "INT4"}
            ),
        ),
    ),
    "calibration table beside quantisers": (
        "accelerator",
        NET,
        "calibration table",
        config(
            NET,
            lambda it: it.optimization.execution_accelerators.gpu_execution_accelerator.add(
                name="tensorrt", parameters={"int8_calibration_table_name": "x"}
            ),
        ),
    ),
    "labels missing": ("labels", NET, "cannot be read", remove(f"{NET}/labels.txt")),
    "labels too few": ("labels", NET, "1 labels for 4 classes", replace(f"{NET}/labels.txt", b"one\n")),
    "warm-up too large": (
        "warm-up",
        NET,
        "batch_size 9 is more than max_batch_size 8",
        config(NET, lambda it: setattr(it.model_warmup[0], "batch_size", 9)),
    ),
    "warm-up of another input": (
        "warm-up",
        NET,
        "no such input",
        config(NET, lambda it: it.model_warmup[0].inputs["picture"].dims.append(1)),
    ),
    "warm-up without an input": (
        "warm-up",
        NET,
        "has no data",
        config(NET, lambda it: it.model_warmup[0].inputs.clear()),
    ),
    "warm-up of another shape": (
        "warm-up",
        NET,
        "has dims [1, 16, 17]",
        config(NET, lambda it: only(it.model_warmup[0].inputs["images"], "dims", 1, 16, 17)),
    ),
    "warm-up file missing": (
        "warm-up",
        NET,
        "is not in warmup/",
        config(NET, lambda it: setattr(it.model_warmup[0].inputs["images"], "input_data_file", "x")),
    ),
    "no version": ("version", NET, "no version is served", remove(f"{NET}/1")),
    "ensemble without a version": ("version", ALL, "no version is served", remove(f"{ALL}/1")),
    "version that is not there": (
        "version",
        NET,
        "asks for it",
        config(NET, lambda it: only(it.version_policy.specific, "versions", 1, 7)),
    ),
    "only a version that is not there": (
        "version",
        NET,
        "no version is served",
        config(NET, lambda it: only(it.version_policy.specific, "versions", 7)),
    ),
    "ONNX missing": ("model-file", NET, "model.onnx is missing", remove(f"{NET}/1/model.onnx")),
    "model.py missing": ("model-file", PRE, "wait for it for ever", remove(f"{PRE}/1/model.py")),
    "ONNX replaced": ("hash", NET, "model.onnx is not the file", replace(f"{NET}/1/model.onnx", b"garbage")),
    "plan replaced": ("hash", PLAN, "model.plan is not the file", replace(f"{PLAN}/1/model.plan", b"ftrt" + bytes(40))),
    "preprocessing replaced": ("hash", PRE, "preprocess.py is not the file", replace(f"{PRE}/1/preprocess.py", b"")),
    "sidecar damaged": ("sidecar", NET, "is damaged", replace(f"{NET}/1/gplq.json", b"{}")),
    "ONNX garbage": ("onnx", NET, "model.onnx", write(f"{NET}/1/model.onnx", b"garbage")),
    "input of another name": (
        "tensors",
        NET,
        "no such input",
        config(NET, lambda it: setattr(it.input[0], "name", "pixels")),
    ),
    "input not given": (
        "tensors",
        NET,
        "input images is not given",
        config(NET, lambda it: setattr(it.input[0], "name", "pixels")),
    ),
    "output of another name": (
        "tensors",
        NET,
        "no such output",
        config(NET, lambda it: setattr(it.output[0], "name", "y")),
    ),
    "another type": (
        "dtype",
        NET,
        "TYPE_FP16, the file has TYPE_FP32",
        config(NET, lambda it: setattr(it.input[0], "data_type", dtype("TYPE_FP16"))),
    ),
    "dims with the batch": (
        "dims",
        NET,
        "shape [-1, 1, 1, 16, 16]",
        config(NET, lambda it: only(it.input[0], "dims", 1, 1, 16, 16)),
    ),
    "dims of another size": (
        "dims",
        NET,
        "shape [-1, 1, 16, 18]",
        config(NET, lambda it: only(it.input[0], "dims", 1, 16, 18)),
    ),
    "batch 0 and dims without it": (
        "dims",
        NET,
        "shape [1, 16, 16], the file has [-1, 1, 16, 16]",
        config(NET, lambda it: setattr(it, "max_batch_size", 0)),
    ),
    "ONNX of one batch": ("batch", NET, "takes batches of 8 only", static_batch),
    "larger batch than the profile": (
        "batch",
        PLAN,
        "max_batch_size 32, the engine's profile ends at 16",
        config(PLAN, lambda it: setattr(it, "max_batch_size", 32)),
    ),
    "profile that is not there": (
        "profile",
        PLAN,
        "asks for profile 3, it has 1",
        config(PLAN, lambda it: only(it.instance_group[0], "profile", "3")),
    ),
    "plan of another shape": (
        "dims",
        PLAN,
        "shape [-1, 3, 16, 16]",
        config(PLAN, lambda it: only(it.input[0], "dims", 3, 16, 16)),
    ),
    "plan garbage": ("plan", PLAN, "is no TensorRT plan", write(f"{PLAN}/1/model.plan", b"garbage")),
    "plan of TensorRT-RTX": ("plan", PLAN, "built by TensorRT-RTX", write(f"{PLAN}/1/model.plan", b"vtrt" + bytes(40))),
    "model.py is no Python": ("model-py", PRE, "is no Python", write(f"{PRE}/1/model.py", b"def:")),
    "model.py without the class": ("model-py", PRE, "no class TritonPythonModel", write(f"{PRE}/1/model.py", b"x = 1")),
    "model.py that answers nothing": (
        "model-py",
        PRE,
        "no method execute",
        write(f"{PRE}/1/model.py", b"class TritonPythonModel: pass"),
    ),
    "ensemble with instances": (
        "ensemble-has",
        ALL,
        "instance_group",
        config(ALL, lambda it: it.instance_group.add(count=1)),
    ),
    "step that is not there": (
        "ensemble-step",
        ALL,
        "'nobody' is no model",
        config(ALL, lambda it: setattr(it.ensemble_scheduling.step[0], "model_name", "nobody")),
    ),
    "step of smaller batches": (
        "ensemble-batch",
        ALL,
        "takes batches of 9, its step classifier-cpu of 8",
        config(ALL, lambda it: setattr(it, "max_batch_size", 9)),
    ),
    "step's input that is not there": (
        "ensemble-map",
        ALL,
        "has no input 'x'",
        config(ALL, lambda it: it.ensemble_scheduling.step[0].input_map.update({"x": "image"})),
    ),
    "step's input mapped to nothing": (
        "ensemble-map",
        ALL,
        "is mapped to nothing",
        config(ALL, lambda it: it.ensemble_scheduling.step[1].input_map.clear()),
    ),
    "step's output that is not there": (
        "ensemble-map",
        ALL,
        "has no output 'y'",
        config(ALL, lambda it: it.ensemble_scheduling.step[0].output_map.update({"y": "z"})),
    ),
    "output that no step makes": (
        "ensemble-map",
        ALL,
        "no step makes its output 'scores'",
        config(ALL, lambda it: it.ensemble_scheduling.step[2].output_map.pop("scores")),
    ),
    "types that do not meet": (
        "ensemble-tensor",
        ALL,
        "'scores' is",
        config(ALL, lambda it: setattr(it.output[1], "data_type", dtype("TYPE_FP16"))),
    ),
    "shapes that do not meet": (
        "ensemble-tensor",
        ALL,
        "'image' is [3] in classifier, [-1, 1] in",
        flat_images,
    ),
}

WARNINGS: dict[str, tuple[str, str, str, Break]] = {
    "no count": (
        "instances",
        NET,
        "gets 2 instances",
        config(NET, lambda it: it.instance_group[0].ClearField("count")),
    ),
    "accelerator of GPUs on the CPU": (
        "accelerator",
        NET,
        "on the CPU only",
        config(NET, lambda it: it.optimization.execution_accelerators.gpu_execution_accelerator.add(name="tensorrt")),
    ),
    "parameter misspelt": (
        "parameters",
        NET,
        "is no parameter",
        config(NET, lambda it: setattr(it.parameters["intra_op_threads_count"], "string_value", "1")),
    ),
    "threads not given": (
        "threads",
        NET,
        "wait actively",
        config(NET, lambda it: it.parameters.pop("intra_op_thread_count")),
    ),
    "cache": (
        "response-cache",
        NET,
        "silently off",
        config(NET, lambda it: setattr(it.response_cache, "enable", True)),
    ),
    "dynamic batching without batches": (
        "batch",
        NET,
        "does nothing",
        config(NET, lambda it: setattr(it, "max_batch_size", 0)),
    ),
    "no inputs": ("tensors", NET, "no input is given", config(NET, lambda it: it.ClearField("input"))),
    "leading zero": ("version", NET, "is passed over", lambda models: (models / NET / "01").mkdir()),
    "plan of unknown tensors": ("plan", PLAN, "they are not checked", remove(f"{PLAN}/1/gplq.json")),
    "as_numpy with NumPy 2": (
        "numpy",
        PRE,
        "silently wrong",
        write(f"{PRE}/1/model.py", b"class TritonPythonModel:\n def execute(self, r):\n  return r[0].as_numpy()"),
    ),
}


def test_what_we_write_breaks_no_rule(good: Path) -> None:
    assert check_repository(good) == check_repository(good.parent) == []


@pytest.mark.parametrize("name", ERRORS)
def test_errors(models: Path, name: str) -> None:
    rule, model, found, apply = ERRORS[name]
    apply(models)
    problems = check_repository(models)
    assert any(
        it.severity == "error" and it.rule == rule and it.where.split(":")[0] == model and found in it.found
        for it in problems
    ), problems
    assert problems[0].severity == "error"  # errors come first


@pytest.mark.parametrize("name", WARNINGS)
def test_warnings(models: Path, name: str) -> None:
    rule, model, found, apply = WARNINGS[name]
    apply(models)
    matching = [it for it in check_repository(models) if it.rule == rule and it.where.split(":")[0] == model]
    assert any(it.severity == "warning" and found in it.found for it in matching), matching


def test_every_rule_is_tested() -> None:
    from tests.test_triton_judge import BAD  # which shows them to a server, and these errors as well

    folder = Path(__file__).parent.parent / "gplq_export" / "triton"
    sources = "".join((folder / name).read_text() for name in ("check.py", "config_rules.py", "version_rules.py"))
    planted = {it[0] for it in (*ERRORS.values(), *WARNINGS.values(), *BAD.values())}
    written = set(re.findall(r'(?:error|warning)\(\s*"([a-z-]+)"', sources)) | {"config-parses", "config-exists"}
    assert written == planted | {"image"}  # which has tests of its own below


def test_a_broken_model_does_not_hide_the_others(models: Path) -> None:
    text(NET, "TYPE_FP32", "TYPE_FLOAT")(models)
    config(PLAN, lambda it: setattr(it, "name", "other"))(models)
    assert {it.rule for it in check_repository(models)} == {"config-parses", "name"}


@pytest.mark.parametrize(
    ("tag", "rules"),
    [
        ("26.07", set()),  # TensorRT 10.14.1.48, as the plan
        ("26.08", {("warning", "image")}),  # the table does not say
        ("25.10", {("error", "image")}),  # TensorRT 10.11
        ("25.07", {("error", "image"), ("warning", "image")}),  # ONNX Runtime 1.22, too
    ],
)
def test_image(good: Path, tag: str, rules: set[tuple[str, str]]) -> None:
    assert {(it.severity, it.rule) for it in check_repository(good, triton_image(tag))} == rules


def test_a_stranger_s_repository_needs_no_sidecar(models: Path) -> None:
    for path in models.rglob("gplq.json"):
        path.unlink()
    assert [it.rule for it in check_repository(models)] == ["plan"]  # not checked, which is said
    config(NET, lambda it: only(it.input[0], "dims", 3, 16, 16))(models)
    assert "dims" in {it.rule for it in check_repository(models)}


def test_a_newer_sidecar_is_not_guessed_at(models: Path) -> None:
    change_json(models / NET / "1" / "gplq.json", lambda it: it.update(schema_version="9.0"))
    [problem] = check_repository(models)
    assert problem.rule == "sidecar" and "newer gplq" in problem.found


def test_a_sidecar_cannot_point_outside(models: Path) -> None:
    change_json(models / NET / "1" / "gplq.json", lambda it: it["files"].update({"../config.pbtxt": "0"}))
    assert [it.rule for it in check_repository(models)] == ["hash"]


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir(), lambda path: path.write_text("")])
def test_what_is_no_repository_is_refused(tmp_path: Path, make: Callable[[Path], Any]) -> None:
    make(tmp_path / "x")
    with pytest.raises(UsageError, match="is no model repository"):
        check_repository(tmp_path / "x")


def test_a_configuration_survives_printing_and_reading(good: Path) -> None:
    for path in good.glob(f"*/{CONFIG}"):
        config = parse_config(path.read_text(), path)
        assert parse_config(print_config(config), path) == config


def test_where_a_mistake_is_stands_in_the_message(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r'config\.pbtxt is no model configuration: line 2:.*"max_batchsize"'):
        parse_config('name: "x"\nmax_batchsize: 8', tmp_path / CONFIG)
