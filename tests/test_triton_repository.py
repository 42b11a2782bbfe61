"""What is written for Triton; that a real server loads and serves it, tests/test_triton_server.py shows."""

import argparse
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import yaml

pytest.importorskip("tritonclient.grpc", reason="needs gplq[triton]")

from gplq.data import open_images
from gplq.errors import GateError, UsageError
from gplq.preprocessing import Preprocessing
from gplq_export.triton import command, repository
from gplq_export.triton.check import check_repository, read_config
from gplq_export.triton.config import ServingOptions, schema
from gplq_export.triton.images import triton_image
from gplq_export.triton.repository import Repository, add_version, write_repository
from gplq_export.triton.sidecar import read_sidecar
from gplq_export.triton.top import top_model
from tests.conftest import CLASSES
from tests.triton_fixture import add_plan, change_config, change_json, copy


def write(export: Path, out: Path, **settings: Any) -> Repository:
    return write_repository(export, out, say=lambda _: None, **settings)


def run(*arguments: str) -> None:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    command.run(parser.parse_args(arguments))


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def with_plan(exported: Path, tmp_path: Path) -> Path:
    folder = copy(exported, tmp_path / "with-plan")
    add_plan(folder)
    return folder


def test_the_tree_is_the_one_of_the_docstring(exported: Path, tmp_path: Path) -> None:
    warm_up = np.ones((1, 16, 16), np.float32)
    written = write(exported, tmp_path / "repo", serve=["cpu", "fp32"], warm_up=warm_up)
    assert written.models == ["classifier", "classifier-cpu", "classifier-fp32"]
    assert written.warnings == []
    assert set(files(tmp_path / "repo")) == {
        "README.md", "Dockerfile", ".dockerignore", "compose.yaml", "gplq.json",
        *(f"models/classifier-{kind}/{file}" for kind in ("cpu", "fp32")
          for file in ("config.pbtxt", "labels.txt", "warmup/images", "1/model.onnx", "1/gplq.json")),
        *(f"models/classifier-preprocess/{file}"
          for file in ("config.pbtxt", "1/model.py", "1/preprocess.py", "1/preprocessing.json", "1/gplq.json")),
        *(f"models/classifier-top/{file}" for file in ("config.pbtxt", "1/model.onnx", "1/gplq.json")),
        *(f"models/classifier/{file}" for file in ("config.pbtxt", "1/gplq.json")),
    }  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["repo"]  # nothing temporary is left
    model = tmp_path / "repo" / "models" / "classifier-cpu"
    assert (model / "1" / "model.onnx").read_bytes() == (exported / "model.cpu.onnx").read_bytes()
    assert (model / "labels.txt").read_text().splitlines() == CLASSES
    assert (model / "warmup" / "images").read_bytes() == warm_up.tobytes()


def test_configuration_of_a_network_on_the_cpu(exported: Path, tmp_path: Path) -> None:
    write(exported, tmp_path / "repo", serve=["cpu", "int4"])
    config = read_config(tmp_path / "repo" / "models" / "classifier-cpu")
    types, kinds = schema().DataType, schema().ModelInstanceGroup.Kind
    assert (config.name, config.backend, config.platform, config.max_batch_size) == (
        "classifier-cpu", "onnxruntime", "", 8,
    )  # fmt: skip
    [images], [logits] = config.input, config.output
    assert (images.name, types.Name(images.data_type), list(images.dims)) == ("images", "TYPE_FP32", [1, 16, 16])
    assert (logits.name, types.Name(logits.data_type), list(logits.dims)) == ("logits", "TYPE_FP32", [4])
    assert logits.label_filename == "labels.txt"
    [group] = config.instance_group
    assert (kinds.Name(group.kind), group.count) == ("KIND_CPU", 2)
    assert config.HasField("dynamic_batching")
    [warm_up] = config.model_warmup
    assert warm_up.inputs["images"].random_data  # no image was given
    assert config.optimization.graph.level == 0
    reference = read_config(tmp_path / "repo" / "models" / "classifier-int4")
    assert reference.optimization.graph.level == 2  # none: optimised, the reference would return other numbers


def test_every_option_takes_effect(exported: Path, tmp_path: Path) -> None:
    options = ServingOptions(instances=3, threads=5, batch_max=6, queue_delay_us=700, versions=4, top_k=2)
    write(exported, tmp_path / "repo", serve=["cpu"], name="four", options=options)
    models = tmp_path / "repo" / "models"
    config = read_config(models / "four-cpu")
    assert config.instance_group[0].count == 3
    assert read_config(models / "four-preprocess").instance_group[0].count == 3
    assert config.parameters["intra_op_thread_count"].string_value == "5"
    assert config.max_batch_size == read_config(models / "four-top").max_batch_size == 6
    assert config.dynamic_batching.max_queue_delay_microseconds == 700
    assert config.version_policy.latest.num_versions == 4
    assert [list(it.dims) for it in read_config(models / "four").output] == [[-1, 2], [-1, 2], [-1, 4]]


def test_hashes_lead_from_the_checkpoint_to_the_file(with_plan: Path, tmp_path: Path) -> None:
    write(with_plan, tmp_path / "repo", serve=["cpu", "fp16.plan"])
    manifest = json.loads((with_plan / "manifest.json").read_text())
    sidecar = read_sidecar(tmp_path / "repo" / "models" / "classifier-fp16" / "1")
    assert sidecar is not None and sidecar.engine is not None
    expected = {
        "checkpoint_sha256": manifest["checkpoint"]["sha256"],
        "onnx_sha256": manifest["files"]["model.fp16.onnx"]["sha256"],
        "plan_sha256": manifest["files"]["model.fp16.plan"]["sha256"],
    }
    assert sidecar.hashes == expected
    assert sidecar.engine["backend_version"] == "10.14.1.48"
    config = read_config(tmp_path / "repo" / "models" / "classifier-fp16")
    assert {key: config.parameters[f"gplq.1.{key}"].string_value for key in expected} == expected
    stored = json.loads(config.parameters["gplq.preprocessing"].string_value)
    assert stored == manifest["preprocessing"]


def test_configuration_of_an_engine(exported: Path, tmp_path: Path) -> None:
    export = copy(exported, tmp_path / "dist")
    add_plan(export, batch=(1, 4, 16), profiles=[[1, 8, 24]])
    write(export, tmp_path / "repo", serve=["fp16.plan"])
    config = read_config(tmp_path / "repo" / "models" / "classifier-fp16")
    assert (config.platform, config.backend, config.max_batch_size) == ("tensorrt_plan", "tensorrt", 24)
    [group] = config.instance_group
    assert (group.kind, list(group.profile)) == (schema().ModelInstanceGroup.Kind.Value("KIND_GPU"), ["0", "1"])
    assert list(config.dynamic_batching.preferred_batch_size) == [4, 8]
    cuda = config.optimization.cuda
    assert cuda.graphs and [graph.batch_size for graph in cuda.graph_spec] == [1, 4, 8, 24]
    assert list(cuda.graph_spec[0].input["images"].dim) == [1, 16, 16]
    assert [warm_up.batch_size for warm_up in config.model_warmup] == [1, 8]


def test_onnx_runtime_on_the_gpu(exported: Path, tmp_path: Path) -> None:
    write(exported, tmp_path / "repo", serve=["fp16"])
    config = read_config(tmp_path / "repo" / "models" / "classifier-fp16-onnx")
    [accelerator] = config.optimization.execution_accelerators.gpu_execution_accelerator
    assert accelerator.name == "tensorrt"
    assert accelerator.parameters["precision_mode"] == "FP16"
    assert accelerator.parameters["trt_profile_max_shapes"] == "images:8x1x16x16"
    compose = yaml.safe_load((tmp_path / "repo" / "compose.yaml").read_text())
    assert f"engines:{accelerator.parameters['trt_engine_cache_path']}" in compose["services"]["triton"]["volumes"]
    assert "engines" in compose["volumes"]


def test_the_default_is_the_cpu_and_what_triton_loads(with_plan: Path, exported: Path, tmp_path: Path) -> None:
    assert write(exported, tmp_path / "cpu").models == ["classifier", "classifier-cpu"]
    add_plan(with_plan, "fp32", magic=b"vtrt")
    assert write(with_plan, tmp_path / "both").models == ["classifier", "classifier-cpu", "classifier-fp16"]


def test_the_image_has_the_tensorrt_of_the_engines(with_plan: Path, tmp_path: Path) -> None:
    written = write(with_plan, tmp_path / "repo")
    assert written.image.release == "26.07"  # the newest whose TensorRT is 10.14.1.48
    assert "FROM nvcr.io/nvidia/tritonserver:26.07-py3\n" in (tmp_path / "repo" / "Dockerfile").read_text()
    readme = (tmp_path / "repo" / "README.md").read_text()
    assert "TensorRT 10.14.1.48" in readme and "dpkg -l | grep libnvinfer" in readme
    with pytest.raises(UsageError, match=r"built by TensorRT 10\.14\.1\.48, release 25\.10 has 10\.11\.0\.33"):
        write(with_plan, tmp_path / "old", image=triton_image("25.10"))
    assert not (tmp_path / "old").exists()


def test_a_version_compatible_engine_loads_in_others_if_the_server_allows_it(exported: Path, tmp_path: Path) -> None:
    export = copy(exported, tmp_path / "dist")
    add_plan(export, version_compatible=True)
    write(export, tmp_path / "repo", image=triton_image("25.10"))
    assert "--backend-config=tensorrt,version-compatible=true" in (tmp_path / "repo" / "Dockerfile").read_text()


def test_no_release_with_that_tensorrt_is_said(exported: Path, tmp_path: Path) -> None:
    export, said = copy(exported, tmp_path / "dist"), list[str]()
    add_plan(export, version=(10, 99, 0, 1))
    with pytest.raises(UsageError, match=r"built by TensorRT 10\.99\.0\.1, release 26\.07 has"):
        write_repository(export, tmp_path / "repo", image=triton_image("26.07"), say=said.append)
    write_repository(export, tmp_path / "repo", say=said.append)  # 26.08: the table does not say
    assert any("no release of Triton in the table has TensorRT 10.99.0.1" in line for line in said)


def test_a_network_without_classes_has_no_end_to_end_model(exported: Path, tmp_path: Path) -> None:
    export, said = copy(exported, tmp_path / "dist"), list[str]()
    change_json(export / "manifest.json", lambda manifest: manifest["outputs"][0].update(name="features"))
    written = write_repository(export, tmp_path / "repo", say=said.append)
    assert written.models == ["classifier-cpu"]
    assert "end to end: skipped, the network returns features, not classes" in said
    assert "pillow" not in (tmp_path / "repo" / "Dockerfile").read_text()


def test_top_model_is_softmax_and_the_largest() -> None:
    logits = np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32) * 3
    labels = ["a:b", "é", "c d", "d", "e"]
    session = ort.InferenceSession(top_model("x", labels, 3).SerializeToString(), providers=["CPUExecutionProvider"])
    names, scores = session.run(["labels", "scores"], {"x": logits})
    order = np.argsort(-logits, axis=1)[:, :3]
    shares = np.exp(logits.astype(np.float64)) / np.exp(logits.astype(np.float64)).sum(1, keepdims=True)
    assert names.tolist() == [[labels[index] for index in row] for row in order]
    np.testing.assert_allclose(scores, np.take_along_axis(shares, order, 1), rtol=1e-6)
    assert top_model("x", labels, 9).graph.output[0].type.tensor_type.shape.dim[1].dim_value == 5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"serve": ["trt-int4"]}, r"has no 'trt-int4' to serve; it has cpu, fp16, fp32, int4"),
        ({"serve": ["cpu", "cpu"]}, "names a file twice"),
        ({"name": "a/b"}, "--name a/b"),
        ({"warm_up": np.zeros((3, 16, 16), np.float32)}, r"has shape \[3, 16, 16\], not \[1, 16, 16\]"),
    ],
    ids=["kind", "twice", "name", "warm-up"],
)
def test_what_cannot_be_is_refused(exported: Path, tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        write(exported, tmp_path / "repo", **settings)
    assert list(tmp_path.iterdir()) == []


def test_engines_of_another_builder_are_refused_by_name(exported: Path, tmp_path: Path) -> None:
    export = copy(exported, tmp_path / "dist")
    add_plan(export, magic=b"vtrt", version=(1, 7, 1, 116))
    with pytest.raises(UsageError, match="built by TensorRT-RTX, whose plans Triton does not load"):
        write(export, tmp_path / "repo", serve=["fp16.plan"])


def test_altered_exports_are_refused(exported: Path, tmp_path: Path) -> None:
    export = copy(exported, tmp_path / "dist")
    with (export / "model.cpu.onnx").open("ab") as file:
        file.write(b" ")
    with pytest.raises(UsageError, match=r"model\.cpu\.onnx is not the file that was exported"):
        write(export, tmp_path / "repo")
    with pytest.raises(UsageError, match="is no folder that gplq-export wrote"):
        write(tmp_path, tmp_path / "repo")


def test_an_engine_of_another_onnx_file_is_refused(with_plan: Path, tmp_path: Path) -> None:
    change_json(with_plan / "manifest.json", lambda it: it["engines"]["fp16"].update(onnx_sha256="0" * 64))
    with pytest.raises(UsageError, match=r"was not built from the model\.fp16\.onnx beside it"):
        write(with_plan, tmp_path / "repo")


def test_an_engine_that_takes_no_single_image_is_refused(exported: Path, tmp_path: Path) -> None:
    export = copy(exported, tmp_path / "dist")
    add_plan(export, batch=(4, 8, 16))
    with pytest.raises(UsageError, match="the engine's profile begins at 4"):
        write(export, tmp_path / "repo")
    assert not (tmp_path / "repo").exists()


def test_nothing_is_left_of_a_repository_that_fails(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(repository, "write_deployment", fail)
    with pytest.raises(UsageError, match="No space left on device"):
        write(exported, tmp_path / "repo")
    assert list(tmp_path.iterdir()) == []


def test_only_ones_own_is_overwritten(exported: Path, tmp_path: Path) -> None:
    out = tmp_path / "repo"
    write(exported, out, name="first")
    with pytest.raises(UsageError, match="exists"):
        write(exported, out)
    write(exported, out, name="second", force=True)
    assert (out / "models" / "second-cpu").is_dir() and not (out / "models" / "first-cpu").exists()
    (out / "models" / "mine").mkdir()
    with pytest.raises(UsageError, match="mine was not written by gplq-export: --force would delete it"):
        write(exported, out, force=True)
    with pytest.raises(UsageError, match="is no repository that gplq-export wrote"):
        write(exported, exported, force=True)


def test_a_new_version_leaves_what_is_served_alone(with_plan: Path, tmp_path: Path) -> None:
    out = tmp_path / "repo"
    write(with_plan, out)
    before = files(out)
    add_plan(with_plan, batch=(1, 4, 32))  # another engine
    added = add_version(with_plan, out, say=lambda _: None)
    assert [str(path.relative_to(out)) for path in added] == ["models/classifier-cpu/2", "models/classifier-fp16/2"]
    after = files(out)
    assert {name: after[name] for name in before} == before
    assert {name.removeprefix("models/") for name in set(after) - set(before)} == {
        "classifier-cpu/2/model.onnx",
        "classifier-cpu/2/gplq.json",
        "classifier-fp16/2/model.plan",
        "classifier-fp16/2/gplq.json",
    }
    assert [it for it in check_repository(out) if it.severity == "error"] == []
    assert add_version(with_plan, out, say=lambda _: None)[0].name == "3"


def test_a_version_that_does_not_fit_is_refused_before_it_appears(with_plan: Path, tmp_path: Path) -> None:
    out = tmp_path / "repo"
    write(with_plan, out)
    before = files(out)
    add_plan(with_plan, batch=(1, 4, 8))  # smaller batches than the configuration promises
    with pytest.raises(UsageError, match=r"max_batch_size 16, the engine's profile ends at 8"):
        add_version(with_plan, out, say=lambda _: None)
    assert files(out) == before
    assert not list(out.rglob("2"))


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("labels", lambda manifest: manifest["label_names"].reverse()),
        ("preprocessing", lambda manifest: manifest["preprocessing"].update(crop_pct=0.5)),
    ],
    ids=["labels", "preprocessing"],
)
def test_another_model_is_no_new_version(exported: Path, tmp_path: Path, what: str, change: Any) -> None:
    out, other = tmp_path / "repo", copy(exported, tmp_path / "other")
    write(exported, out)
    change_json(other / "manifest.json", change)
    before = files(out)
    with pytest.raises(UsageError, match=f"has other {what} than"):
        add_version(other, out, say=lambda _: None)
    assert files(out) == before


def test_versions_are_added_to_ones_own_only(exported: Path, tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    with pytest.raises(UsageError, match="is no repository that gplq-export wrote"):
        add_version(exported, tmp_path)
    (tmp_path / "gplq.json").write_text('{"tool": "gplq-export", "name": "x", "folders": [], "image": 3}')
    with pytest.raises(UsageError, match="is no repository that gplq-export wrote"):
        add_version(exported, tmp_path)


def test_compose_is_closed_by_default(exported: Path, tmp_path: Path) -> None:
    write(exported, tmp_path / "repo")
    content = yaml.safe_load((tmp_path / "repo" / "compose.yaml").read_text())
    service = content["services"]["triton"]
    assert service["ports"] == [f"127.0.0.1:{port}:{port}" for port in (8000, 8001, 8002)]
    assert service["user"] == "1000:1000" and service["read_only"] is True
    assert service["volumes"] == ["./models:/models:ro"]
    assert service["cap_drop"] == ["ALL"] and service["security_opt"] == ["no-new-privileges:true"]
    assert "deploy" not in service  # no GPU is asked for
    assert int(service["stop_grace_period"].removesuffix("s")) > 10  # the server's own limit, or docker kills it


def test_dockerfile(exported: Path, tmp_path: Path) -> None:
    write(exported, tmp_path / "repo", image=triton_image("26.06"))
    text = (tmp_path / "repo" / "Dockerfile").read_text()
    joined = text.replace("\\\n", " ")
    lines = [line for line in joined.splitlines() if line.strip() and not line.startswith("#")]
    instructions = [(name, rest.strip()) for name, _, rest in (line.partition(" ") for line in lines)]
    assert [name for name, _ in instructions] == ["FROM", "RUN", "ENV", "USER", "EXPOSE", "HEALTHCHECK", "CMD"]
    by_name = dict(instructions)
    assert by_name["FROM"] == "nvcr.io/nvidia/tritonserver:26.06-py3"  # pinned: no "latest"
    assert re.fullmatch(r"pip install .* pillow==[\d.]+", by_name["RUN"])
    assert by_name["USER"] == "1000:1000"
    check = by_name["HEALTHCHECK"]
    assert json.loads(check[check.index("CMD ") + 4 :])[-1] == "http://127.0.0.1:8000/v2/health/ready"
    server = json.loads(by_name["CMD"])
    assert server[0] == "tritonserver"
    assert {"--model-control-mode=none", "--exit-on-error=false", "--exit-timeout-secs=10"} < set(server)
    assert not any("poll" in flag for flag in server)


def test_readme_names_what_is_there(with_plan: Path, tmp_path: Path) -> None:
    written = write(with_plan, tmp_path / "repo")
    readme = (tmp_path / "repo" / "README.md").read_text()
    for model in written.models:
        assert f"`{model}`" in readme
    assert written.image.name in readme and written.image.source in readme and written.image.read in readme
    assert "--publish=127.0.0.1:8000:8000" in readme and '--volume="$PWD/models:/models:ro"' in readme
    assert "--gpus=1" in readme
    assert not re.search(r"\{\w+\}", readme)  # nothing left unfilled


def test_files_can_be_read_by_the_server_s_user(exported: Path, tmp_path: Path) -> None:
    umask = os.umask(0o022)
    try:
        write(exported, tmp_path / "repo")
    finally:
        os.umask(umask)
    for path in (tmp_path / "repo").rglob("*"):
        assert path.stat().st_mode & 0o044 == 0o044, path
        assert path.is_file() or path.stat().st_mode & 0o055 == 0o055, path


def test_command_writes_and_checks(
    exported: Path, npz_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "repo"
    run(str(exported), "--out", str(out), "--data", str(npz_file), "--instances", "1", "--image", "26.06")
    said = capsys.readouterr().out
    assert "nvcr.io/nvidia/tritonserver:26.06-py3, by https://" in said
    preprocessing = Preprocessing.from_dict(json.loads((exported / "manifest.json").read_text())["preprocessing"])
    image = open_images(npz_file, "test", preprocessing)[0][0].numpy()
    assert (out / "models" / "classifier-cpu" / "warmup" / "images").read_bytes() == image.tobytes()
    run("--check", str(out))
    assert "0 error(s), 0 warning(s)" in capsys.readouterr().out
    run(str(exported), "--add-version", str(out))
    assert (out / "models" / "classifier-cpu" / "2").is_dir()
    change_config(out / "models" / "classifier-cpu", lambda config: config.input[0].dims.append(3))
    with pytest.raises(GateError, match=r"breaks \d rule\(s\): dims"):
        run("--check", str(out / "models"), "--json")
    content = json.loads(capsys.readouterr().out.split("\n", 1)[1])
    assert {problem["rule"] for problem in content["problems"]} >= {"dims"}


@pytest.mark.parametrize("arguments", [("--check", "x", "y"), ("--out", "x")], ids=["both", "neither"])
def test_an_export_is_needed_to_write_and_none_to_check(arguments: tuple[str, ...]) -> None:
    order = [arguments[-1], *arguments[:-1]] if len(arguments) == 3 else arguments
    with pytest.raises(UsageError, match="give an export to write from"):
        run(*order)


@pytest.mark.parametrize(
    ("arguments", "flag"),
    [
        (["--check", "x", "--instances", "3"], "--instances"),
        (["--check", "x", "--force"], "--force"),
        (["e", "--add-version", "x", "--top-k", "2"], "--top-k"),
        (["e", "--add-version", "x", "--image", "26.06"], "--image"),
        (["e", "--out", "x", "--json"], "--json"),
    ],
)
def test_flags_without_effect_are_errors(arguments: list[str], flag: str) -> None:
    with pytest.raises(UsageError, match=f"{flag} has no effect"):
        run(*arguments)
