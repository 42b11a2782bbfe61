"""A check finds each planted fault where it was planted, ends with exit code 1, and raises no false alarm."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
import torch.nn.functional as F
from conftest import fast_recipe, make_arrays, write_model
from faults import (
    Change,
    attributes,
    clamped,
    dequantized_otherwise,
    edited,
    exchanged,
    half_up,
    node,
    nudged,
    one_level_wide,
    plant,
    rehash,
    scaled,
    shortened,
    swapped,
    together,
    unclamped,
    without_bias,
    without_quantizer,
)
from safetensors.torch import save_file

from gplq.checkpoint import integer_linears, load_checkpoint
from gplq.data import open_images
from gplq.errors import MissingError
from gplq.models import load_model
from gplq.pipeline import quantize
from gplq_export.check.report import Report, read_report
from gplq_export.cli import main
from gplq_export.export import export
from gplq_export.manifest import CHECKPOINT

QUANTIZED = ("int4", "cpu")


@dataclass(frozen=True)
class Source:
    """A model that knows its task, its images, and the export of what it became."""

    model: Path
    data: Path
    folder: Path


def write_data(path: Path, images: int = 600) -> Path:
    """Pictures of another size than the model takes, so that interpolation matters, and enough to judge accuracy."""
    content = {}
    for split, count, seed in (("train", 256, 1), ("test", images, 2)):
        small, content[f"{split}_labels"] = make_arrays(count, seed)
        content[f"{split}_images"] = small.repeat(3, 1).repeat(3, 2)[:, ::2, ::2]
    np.savez(path, **content)
    return path


def train(folder: Path, data: Path, seed: int) -> None:
    """Until the labels are known; without that, their order would not matter."""
    source = load_model(str(folder))
    images = open_images(data, "train", source.preprocessing)
    inputs, labels = torch.stack([images[index][0] for index in range(len(images))]), torch.tensor(images.labels)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(source.model.parameters(), 1e-3)
    for _ in range(60):
        some = torch.randint(len(inputs), [64], generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(source.model(inputs[some]), labels[some]).backward()
        optimizer.step()
    save_file(source.model.state_dict(), folder / "model.safetensors")


def make(root: Path, *, seed: int = 0, images: int = 600, **changes: Any) -> Source:
    """Train, quantise and export."""
    root.mkdir(exist_ok=True)
    data = write_data(root / "data.npz", images)
    model = write_model(root / "model", **changes)
    train(model, data, seed)
    recipe = fast_recipe().model_copy(update={"seed": seed})
    quantize(load_model(str(model)), data, root / CHECKPOINT, recipe, say=lambda _: None)
    export(load_checkpoint(root / CHECKPOINT), root / "dist", say=lambda _: None)
    return Source(model, data, root / "dist")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """Shared: copy what you change."""
    return make(tmp_path_factory.mktemp("faults"))


@pytest.fixture
def folder(source: Source, tmp_path: Path) -> Path:
    """A copy of the export."""
    return Path(shutil.copytree(source.folder, tmp_path / "dist"))


def check(data: Path, *paths: Path, options: Sequence[str] = ("--images", "48")) -> tuple[int, Report]:
    """What the command returns and reports."""
    code = main(["check", *map(str, paths), "--data", str(data), "--forced-images", "48", *options])
    return code, read_report((paths[0] if paths[0].is_dir() else paths[0].parent) / "reports" / "parity.json")


def cause(report: Report, pair: str = "") -> tuple[str, str | None]:
    """The first gate that failed, and the layer that it names; of a pair or of all."""
    first = next((gate for gate in report.failed if pair in ("", gate.pair)), None)
    return ("", None) if first is None else (first.id, first.layer)


def test_a_clean_export_passes(source: Source, folder: Path) -> None:
    code, report = check(source.data, folder, options=())
    assert (code, report.failed) == (0, [])
    judged = {gate.id for gate in report.gates if gate.status == "passed"}
    # What the tests below plant faults for is judged here, on enough images.
    assert judged > {
        *(
            f"{kind}.{metric}"
            for kind in QUANTIZED
            for metric in ("forced.codes", "forced.floats", "free.codes", "top1")
        ),
        *("data.golden", "data.top1", "fp16.range", "twin-fp32.free.kl", "twin-fp16.free.cosine_p01", "float.top1"),
    }


QUANTIZER, LINEAR = "blocks.0.attn.input_quantizer", "blocks.1.mlp.fc1.linear"
# What is wrong: the change, the gate that says so first, and the layer that it names.
GRAPH_FAULTS: dict[str, tuple[Change, str, str]] = {
    "scale of images": (
        scaled("patch_embed.proj.input_quantizer.scale", 1.02),
        "forced.codes",
        "patch_embed.proj.input_quantizer",
    ),
    "scale": (scaled(f"{QUANTIZER}.scale", 1.02), "forced.codes", QUANTIZER),
    "scale of softmax": (
        scaled("blocks.1.attn.pv.a_quantizer.scale", 1.02),
        "forced.codes",
        "blocks.1.attn.pv.a_quantizer",
    ),
    "scale of classifier": (scaled("head.input_quantizer.scale", 1.02), "forced.codes", "head.input_quantizer"),
    "scale in front of a quantiser": (
        scaled("blocks.1.mlp.fc2.input_quantizer.pre_scale", 1.02, (3,)),
        "forced.codes",
        "blocks.1.mlp.fc2.input_quantizer",
    ),
    "shift in front of a quantiser": (
        scaled("blocks.0.mlp.fc2.input_quantizer.pre_shift", 1.02),
        "forced.codes",
        "blocks.0.mlp.fc2.input_quantizer",
    ),
    "scale of a channel": (scaled("blocks.1.attn.k.weight_scale", 1.02, (3,)), "forced.linears", "blocks.1.attn.k"),
    "code": (nudged(LINEAR, (5, 7)), "forced.linears", LINEAR),
    "code of the first layer": (nudged("patch_embed.proj.linear", (0, 0)), "forced.linears", "patch_embed.proj.linear"),
    "code of the last layer": (nudged("head.linear", (9, 2)), "forced.linears", "head.linear"),
    "input channels of a weight": (swapped([f"{LINEAR}.codes"], (5, 7), axis=0), "forced.linears", LINEAR),
    "output channels of a linear": (
        swapped([f"{LINEAR}.{tensor}" for tensor in ("codes", "weight_scale", "bias")], (5, 7)),
        "forced.linears",
        LINEAR,
    ),
    "channels of a bias": (
        swapped(["blocks.0.attn.proj.linear.bias"], (0, 1)),
        "forced.linears",
        "blocks.0.attn.proj.linear",
    ),
    "channels of a LayerNorm": (
        swapped(["blocks.1.norm2.weight", "blocks.1.norm2.bias"], (5, 7)),
        "forced.floats",
        "blocks.1.mlp.fc1.input_quantizer",
    ),
    "queries and keys": (exchanged("blocks.1.attn.q", "blocks.1.attn.k"), "forced.linears", "blocks.1.attn.q"),
    # Exact halves come only from the grid: in images there may be none.
    "half up": (half_up("blocks.0.attn.qk.a_quantizer"), "forced.grid", "blocks.0.attn.qk.a_quantizer"),
    "half up in the softmax": (half_up("blocks.1.attn.pv.a_quantizer"), "forced.grid", "blocks.1.attn.pv.a_quantizer"),
    "highest level missing": (
        clamped("blocks.0.attn.qk.b_quantizer", -8, 6),
        "forced.codes",
        "blocks.0.attn.qk.b_quantizer",
    ),
    "lowest level missing": (
        clamped("blocks.1.attn.pv.b_quantizer", -7, 7),
        "forced.codes",
        "blocks.1.attn.pv.b_quantizer",
    ),
    "highest level of the images missing": (
        clamped("patch_embed.proj.input_quantizer", -128, 126),
        "forced.grid",
        "patch_embed.proj.input_quantizer",
    ),
    "element of a LayerNorm": (scaled("norm.weight", 1.001, (5,)), "forced.floats", "head.input_quantizer"),
    "element of a position embedding": (scaled("pos_embed", 1.02, (0, 5, 5)), "forced.floats", QUANTIZER),
    "element of a bias": (scaled("blocks.0.attn.v.bias", 1.02, (5,)), "forced.linears", "blocks.0.attn.v"),
    "approximate GELU": (
        attributes("Gelu", approximate="tanh"),
        "forced.floats",
        "blocks.0.mlp.fc2.input_quantizer",
    ),
    "another epsilon": (attributes("LayerNormalization", epsilon=1e-5), "forced.floats", QUANTIZER),
    "no number": (edited("head.linear.bias", lambda bias: bias.fill(np.nan)), "forced.linears", "head.linear"),
}
# The same where the two files hold things in other forms.
FILE_FAULTS: dict[str, tuple[str, Change, str, str]] = {
    "scale behind the codes": ("int4", dequantized_otherwise(QUANTIZER, 1.001), "forced.linears", "blocks.0.attn.q"),
    "no clamp": ("int4", unclamped(QUANTIZER), "forced.codes", QUANTIZER),
    "one level more": ("cpu", one_level_wide(QUANTIZER), "forced.codes", QUANTIZER),
    "no bias": ("cpu", without_bias("blocks.0.attn.v"), "forced.linears", "blocks.0.attn.v"),
}


@pytest.mark.parametrize("name", GRAPH_FAULTS)
def test_wrong_in_both_files(source: Source, folder: Path, name: str) -> None:
    change, metric, layer = GRAPH_FAULTS[name]
    for kind in QUANTIZED:
        plant(folder, kind, change)
    code, report = check(source.data, *(folder / f"model.{kind}.onnx" for kind in QUANTIZED))
    assert code == 1
    assert [cause(report, kind) for kind in QUANTIZED] == [(f"{kind}.{metric}", layer) for kind in QUANTIZED]
    assert {gate.pair for gate in report.failed} <= {*QUANTIZED, "int4-optimised"}


@pytest.mark.parametrize("name", FILE_FAULTS)
def test_wrong_in_one_file(source: Source, folder: Path, name: str) -> None:
    kind, change, metric, layer = FILE_FAULTS[name]
    plant(folder, kind, change)
    code, report = check(source.data, folder)
    assert code == 1
    assert cause(report) == (f"{kind}.{metric}", layer)
    blamed = {pair.file for gate in report.failed if (pair := report.pair(gate.pair)) is not None}
    assert blamed == {f"model.{kind}.onnx"}  # and no other file


OPENVINO_FAULTS: dict[str, tuple[Change, str, str]] = {
    "lower limit": (scaled(f"{QUANTIZER}.low", 1.02), "forced.codes", QUANTIZER),
    "code": (nudged(LINEAR, (5, 7)), "forced.linears", LINEAR),
    "element of a LayerNorm": (scaled("norm.weight", 1.001, (5,)), "forced.floats", "head.input_quantizer"),
}


@pytest.fixture(scope="module")
def for_openvino(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The export with the file for OpenVINO; shared."""
    out = tmp_path_factory.mktemp("openvino") / "dist"
    export(load_checkpoint(source.folder / CHECKPOINT), out, openvino=True, say=lambda _: None)
    return out


@pytest.mark.parametrize("name", OPENVINO_FAULTS)
def test_wrong_in_the_file_for_openvino(source: Source, for_openvino: Path, tmp_path: Path, name: str) -> None:
    change, metric, layer = OPENVINO_FAULTS[name]
    folder = Path(shutil.copytree(for_openvino, tmp_path / "dist"))
    plant(folder, "openvino", change)
    code, report = check(source.data, folder / "model.openvino.onnx")
    assert (code, cause(report)) == (1, (f"openvino.{metric}", layer))


@pytest.mark.parametrize("kind", QUANTIZED)
def test_one_code_in_every_linear(source: Source, folder: Path, kind: str) -> None:
    """Of the channel that the code is in: each linear is blamed by itself, as all codes in front of it are given."""
    linears = integer_linears(load_checkpoint(folder / CHECKPOINT).model)
    random = np.random.default_rng(0)
    plant(folder, kind, together(*(nudged(n, tuple(random.integers(x.codes.shape[::-1]))) for n, x in linears.items())))
    code, report = check(source.data, folder / f"model.{kind}.onnx")
    assert code == 1
    pair = report.pair(kind)
    assert pair is not None and pair.forced is not None
    assert min(pair.forced.linears.values()) > 1e-4
    assert pair.forced.linears.keys() == linears.keys()


@pytest.mark.parametrize("kind", ["fp32", "fp16"])
def test_wrong_twin(source: Source, folder: Path, kind: str) -> None:
    """It is found without any quantisation, and quantisation is not blamed."""
    plant(folder, kind, swapped(["blocks.1.norm2.weight"], (5, 7)))
    code, report = check(source.data, folder)
    assert code == 1
    assert {gate.pair for gate in report.failed} == {f"twin-{kind}"}


# The checkpoint, the images and their labels.


def alter(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the checkpoint of an export, and nothing else but hashes."""
    content = torch.load(folder / CHECKPOINT, weights_only=True)
    change(content)
    torch.save(content, folder / CHECKPOINT)
    rehash(folder)


@pytest.mark.parametrize(
    "wrong",
    [
        {"mean": [0.501]},
        {"std": [0.2505]},
        {"interpolation": "bicubic"},
        {"interpolation": "nearest"},
        {"crop_pct": 0.9},
    ],
)
def test_images_prepared_otherwise(source: Source, folder: Path, wrong: dict[str, Any]) -> None:
    alter(folder, lambda content: content["preprocessing"].update(wrong))
    code, report = check(source.data, folder / "model.int4.onnx")
    assert (code, cause(report)) == (1, ("data.golden", None))
    assert {gate.pair for gate in report.failed} == {"data"}


@pytest.mark.parametrize("wrong", ["labels", "images"])
@pytest.mark.parametrize("trusted", [False, True])
def test_other_labels_or_images(source: Source, folder: Path, tmp_path: Path, wrong: str, trusted: bool) -> None:
    with np.load(source.data) as file:
        content = dict(file)
    key = f"test_{wrong}"
    content[key] = content[key][np.random.default_rng(0).permutation(len(content[key]))]
    np.savez(tmp_path / "other.npz", **content)
    if not trusted:  # the answers speak against the labels, before anything is compared
        assert main(["check", str(folder / "model.int4.onnx"), "--data", str(tmp_path / "other.npz")]) == 2
        return
    alter(folder, lambda content: content["provenance"]["arguments"].update(trust_labels=True))
    code, report = check(tmp_path / "other.npz", folder / "model.int4.onnx", options=())
    assert (code, cause(report)) == (1, ("data.top1", None))
    assert {gate.pair for gate in report.failed} == {"data"}
    golden = next(gate for gate in report.gates if gate.id == "data.golden")
    assert golden.status == "skipped" and "other images" in golden.sentence


def test_fp16_overflow(source: Source, tmp_path: Path) -> None:
    """A LayerNorm and what reads it, scaled by a power of two: in FP32 nothing changes, FP16 ends at 65504."""
    large = 2.0**13

    def change(content: dict[str, Any]) -> None:
        for name in ("weight", "bias"):
            content["floats"][f"blocks.1.norm2.{name}"] *= large
        content["quantizers"]["blocks.1.mlp.fc1.input_quantizer"]["scale"] *= large
        content["linears"][LINEAR]["scale"] /= large

    content = torch.load(source.folder / CHECKPOINT, weights_only=True)
    change(content)
    torch.save(content, tmp_path / CHECKPOINT)
    export(load_checkpoint(tmp_path / CHECKPOINT), tmp_path / "dist", say=lambda _: None)
    code, report = check(source.data, tmp_path / "dist")
    assert code == 1
    gates = {gate.id: gate for gate in report.gates}
    assert cause(report) == ("fp16.range", "layer_norm_3")
    assert "layer_norm_3 (LayerNormalization)" in gates["fp16.range"].sentence
    assert gates["twin-fp16.free.cosine_p01"].status == "failed"
    assert {gate.pair for gate in report.failed} == {"fp16", "twin-fp16"}


# Files that do not belong together.


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """Another training run of the same architecture."""
    return make(tmp_path_factory.mktemp("other"), seed=1)


def test_file_of_another_checkpoint(source: Source, folder: Path, other: Source) -> None:
    shutil.copy(other.folder / "model.int4.onnx", folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["model.int4.onnx"] = json.loads((other.folder / "manifest.json").read_text())["files"][
        "model.int4.onnx"
    ]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    code, report = check(source.data, folder)
    assert (code, cause(report)) == (1, ("export.hash.int4", None))
    assert "another checkpoint" in report.failed[0].sentence
    assert cause(report, "int4") == ("int4.forced.codes", "patch_embed.proj.input_quantizer")  # as its numbers say, too
    assert {gate.pair for gate in report.failed} == {"export", "int4", "int4-optimised"}


def test_checkpoint_of_another_training_run(source: Source, folder: Path, other: Source) -> None:
    path = str(other.folder / CHECKPOINT)
    code, report = check(source.data, folder, options=("--images", "48", "--checkpoint", path))
    assert (code, cause(report)) == (1, ("export.checkpoint", None))
    shutil.copy(path, folder)
    rehash(folder)
    code, report = check(source.data, folder)
    assert code == 1
    assert cause(report)[0].startswith("twin-fp32.free.")
    assert cause(report, "int4")[0] == "int4.forced.codes"


def test_altered_file(source: Source, folder: Path) -> None:
    plan_manifest = (folder / "manifest.json").read_text()
    plant(folder, "cpu", scaled("pos_embed", 1 + 1e-6, (0, 0, 0)))
    (folder / "manifest.json").write_text(plan_manifest)
    code, report = check(source.data, folder / "model.cpu.onnx")
    assert (code, cause(report)) == (1, ("export.hash.cpu", None))
    assert {gate.pair for gate in report.failed} == {"export"}  # too little for the numbers to tell


@pytest.fixture(scope="module")
def with_engine(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The export with a real engine; shared."""
    out = tmp_path_factory.mktemp("engines") / "dist"
    result = export(load_checkpoint(source.folder / CHECKPOINT), out, engines=["int4"], say=lambda _: None)
    assert {"model.trt-int4.plan", "model.fp16.plan"} < result.files.keys(), result.problems
    return out


@pytest.mark.trt
def test_plan_of_another_onnx_file(source: Source, with_engine: Path, tmp_path: Path) -> None:
    """The ONNX file was exported anew, and everything in the folder has its right hash; the plan was not built anew."""
    folder = Path(shutil.copytree(with_engine, tmp_path / "dist"))
    built_from = json.loads((folder / "manifest.json").read_text())["engines"]["trt-int4"]["onnx_sha256"]
    plant(folder, "trt-int4", nudged(LINEAR, (5, 7)))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["engines"]["trt-int4"]["onnx_sha256"] = built_from
    (folder / "manifest.json").write_text(json.dumps(manifest))
    code, report = check(source.data, folder)
    assert (code, cause(report)) == (1, ("export.hash.trt-int4.plan", None))
    assert "is stale" in report.failed[0].sentence
    assert len(report.failed) == 1


@pytest.mark.trt
def test_altered_plan_is_never_loaded(
    source: Source, with_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(with_engine, tmp_path / "dist"))
    with (folder / "model.trt-int4.plan").open("r+b") as file:
        file.seek(1000)
        byte = file.read(1)
        file.seek(1000)
        file.write(bytes([byte[0] ^ 1]))
    loaded: list[Path] = []

    def runner(plan: Path, **_: Any) -> None:
        loaded.append(plan)
        raise MissingError("no GPU")

    monkeypatch.setattr("gplq_export.check.members.Runner", runner)
    code, report = check(source.data, folder)
    assert (code, cause(report)) == (1, ("export.hash.trt-int4.plan", None))
    pair = report.pair("trt-int4.plan")
    assert pair is not None and pair.skipped is not None and "replaced or altered" in pair.skipped
    assert loaded == [folder / "model.fp16.plan"]


# Graphs that cannot be compared: a gate that failed, no traceback.


def drop_marks(model: ir.Model) -> None:
    del model.metadata_props["gplq.marks"]


def fixed_batch(size: int) -> Change:
    """Written for batches of one size, as tools do that know no other."""

    def change(model: ir.Model) -> None:
        for value in (*model.graph.inputs, *model.graph.outputs):
            assert value.shape is not None
            value.shape = ir.Shape([size, *value.shape[1:]])

    return change


def rename_input(model: ir.Model) -> None:
    model.graph.inputs[0].name = "pixels"


UNUSABLE: dict[str, tuple[Change, str]] = {
    "a quantiser is missing": (without_quantizer(QUANTIZER), f"lacks quantiser {QUANTIZER}"),
    "a linear has another name": (lambda model: setattr(node(model, LINEAR), "name", "x"), f"lacks linear {LINEAR}"),
    "nothing says where units begin": (drop_marks, "lacks unit blocks.0"),
    "a bias is too short": (shortened("blocks.0.attn.q.bias"), "ONNX Runtime cannot run the graph: "),
    "its batch is fixed to 1": (fixed_batch(1), "index: 0 Got: 2 Expected: 1"),
    "its input has another name": (rename_input, "takes pixels, where an export takes 'images' alone"),
    "its batch is fixed to 2": (fixed_batch(2), "index: 0 Got: 1 Expected: 2"),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_graphs_that_cannot_be_compared(source: Source, folder: Path, name: str) -> None:
    change, message = UNUSABLE[name]
    plant(folder, "int4", change)
    code, report = check(source.data, folder)
    assert (code, cause(report)) == (1, ("int4.compared", None))
    assert message in report.failed[0].sentence


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": 1}, "lacks quantiser blocks.1."),
        ({"depth": 3}, "also has unit blocks.2"),
        ({"embed_dim": 32}, "the codes of "),
        ({"img_size": 20}, "cannot run the graph"),
    ],
)
def test_another_architecture(
    source: Source, folder: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    foreign = make(tmp_path / "foreign", images=32, **changes)
    for kind in QUANTIZED:
        shutil.copy(foreign.folder / f"model.{kind}.onnx", folder)
    rehash(folder)
    code, report = check(source.data, *(folder / f"model.{kind}.onnx" for kind in QUANTIZED))
    assert code == 1
    assert [cause(report, kind) for kind in QUANTIZED] == [(f"{kind}.compared", None) for kind in QUANTIZED]
    assert all(message in gate.sentence for gate in report.failed if gate.metric == "compared")


# No false alarm: networks that have learnt their task, on all images or some. benchmarks/check_faults.py has more runs.


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "depth", "images"), [(1, 2, 64), (4, 2, 33), (2, 4, 511)])
def test_no_false_alarm(tmp_path: Path, seed: int, depth: int, images: int) -> None:
    source = make(tmp_path / "made", seed=seed, depth=depth)
    options = ("--images", str(images), "--max-drop", "100")  # what 4 bits cost such a small network is no fault
    code, report = check(source.data, source.folder, options=options)
    assert (code, [f"{gate.id}: {gate.sentence}" for gate in report.failed]) == (0, [])
