"""Every family of timm models through everything: quantise, save, load, export, and parity with ONNX Runtime."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from check_fixture import check_graph
from torch import Tensor, nn

from gplq import stage2
from gplq.calibrate import calibrate
from gplq.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from gplq.convert import convert, quant_layers, structure_of, units
from gplq.coverage import FAMILIES, cover
from gplq.data import ImageSet, open_images
from gplq.errors import MissingError, ModelError
from gplq.fold import fold_channels, foldable_norms, readers
from gplq.grid import round_scale
from gplq.integer import FrozenQuantizer, IntegerLinear, integer_layer
from gplq.layers import QuantMatMul
from gplq.lsq import ActivationQuantizer
from gplq.models import ModelSpec
from gplq.ops import Codes
from gplq.preprocessing import Preprocessing
from gplq.recipe import Recipe
from gplq.survey import input_size
from gplq_export.engine import build_engine, find_builder
from gplq_export.kernels import Kernel, check_kernels, onnxruntime_kernels, openvino_kernels
from gplq_export.lowering import linear_nodes, lower
from gplq_export.precision import check_precision
from gplq_export.promise import promise
from gplq_export.targets import TARGETS
from gplq_export.trace import is_dialect, node_name, trace

VIT = {"img_size": 64, "depth": 2, "embed_dim": 64, "num_heads": 2}
SWIN = {"img_size": 56, "embed_dim": 32, "depths": (2, 2), "num_heads": (1, 2)}
# What makes each family small; an empty dict is an architecture that cannot be made smaller from outside.
TINY = {
    "ViT, AugReg": VIT,
    "ViT, relative positions": VIT,
    "ViT, rotary positions": VIT,
    "CLIP": VIT,
    "SigLIP": VIT,
    "DeiT": VIT,
    "DeiT, distilled": VIT,
    "DeiT-3": VIT,
    "DINOv2": {**VIT, "img_size": 56},
    "DINOv2, registers": {**VIT, "img_size": 56},
    "DINOv3": VIT,
    "EVA-02": {"img_size": 56, "depth": 2},
    "BEiT": VIT,
    "BEiT-3": VIT,
    "Swin": SWIN,
    "Swin v2": {**SWIN, "img_size": 64},
    "Swin v2, CR": SWIN,
    "CaiT": {"img_size": 64, "depth": 2},
    "XCiT": {"img_size": 64, "depth": 2},
    "PiT": {"img_size": 64, "depth": (1, 1, 1)},
    "MViT v2": {},
    "Hiera": {"stages": (1, 1, 2, 1)},
    "LeViT": {},
    "LeViT, convolutions": {},
    "MaxViT": {"img_size": 64},
    "CoAtNet": {"img_size": 64},
}
# They compute on images of 224 px, whatever one does, or have a hundred layers.
SLOW = {"MViT v2", "Hiera", "LeViT, convolutions", "MaxViT", "CoAtNet"}
# Within one of their blocks OpenVINO's other order of operations moves more than 0.5 % of the codes: MaxViT's blocks
# are deep; of BEiT-3's it moves a scale across a norm, whose epsilon counts beside the small numbers of a tiny model.
# The softmax of MViT v2 in front of its pooled keys is so steep with random weights that FP32's own noise does it.
DRIFTS = {
    "MViT v2": tuple(f"{file}.forced.blocks" for file in ("int4", "int4-optimised", "cpu", "openvino")),
    "BEiT-3": ("openvino.forced.blocks",),
    "MaxViT": ("openvino.forced.blocks",),
}
IMAGES = 5

FAMILY = [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in TINY]
each_family = pytest.mark.parametrize("family", FAMILY)
each_exported = pytest.mark.parametrize("exported", FAMILY, indirect=True)


def build(family: str) -> tuple[ModelSpec, nn.Module]:
    spec = ModelSpec(FAMILIES[family], dict(TINY[family]), 7)
    torch.manual_seed(0)
    model = spec.build()
    # timm starts many a layer at zero, so that a freshly made model computes next to nothing.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.any():
                parameter.normal_(std=0.05)
            elif name.endswith(("gamma", "gamma1", "gamma_1", "gamma_2", "gamma_3")):
                parameter.uniform_(0.2, 0.8)
            elif name.endswith(("norm1.weight", "norm2.weight")):
                parameter.uniform_(0.5, 2.0)
    return spec, model


@pytest.fixture
def images(tmp_path: Path) -> "Images":
    return Images(tmp_path)


class Images:
    """Random images of the size that a model wants, smoothed so that they have edges and areas as photographs do."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def of(self, model: nn.Module) -> tuple[ImageSet, Preprocessing]:
        size = input_size(model)
        preprocessing = Preprocessing(size, "bicubic", 1.0, "center", (0.5,) * 3, (0.5,) * 3)
        coarse = np.random.default_rng(0).integers(0, 256, (IMAGES, size[1] // 8, size[2] // 8, 3), dtype=np.uint8)
        path = self.folder / "images.npz"
        np.savez(path, images=coarse.repeat(8, 1).repeat(8, 2), labels=np.zeros(IMAGES, np.int64))
        return open_images(path, "test", preprocessing), preprocessing


def batch(images: ImageSet) -> Tensor:
    return torch.stack([images[index][0] for index in range(len(images))])


def recipe() -> Recipe:
    calibration = {"images": IMAGES, "matmul_range": "minmax"}
    weights = {"images": IMAGES, "range": "mse"}  # trying scales is the same for every family, and slow for some
    return Recipe.from_dict({"calibration": calibration, "stage1": {"enabled": False}, "stage2": weights})


def test_every_listed_family_is_tested() -> None:
    assert TINY.keys() == FAMILIES.keys()


@each_family
def test_rebuilt_network_is_the_old_one(family: str, images: Images) -> None:
    """Quantisers pass through until they are calibrated; in FP64, where sums in another order do not show."""
    _, model = build(family)
    x = batch(images.of(model)[0])
    with torch.no_grad():
        expected = copy.deepcopy(model).double()(x.double())
        convert(model, recipe())
        found = model.double()(x.double())
    # All but for the last bit of the query weights that take 1 / sqrt(head_dim).
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))


@dataclass(frozen=True)
class Exported:
    """A family's checkpoint as it was loaded, its images [n, C, H, W], and its traced dialect."""

    family: str
    checkpoint: Checkpoint
    images: Tensor
    dialect: ir.Model


@pytest.fixture(scope="module")
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Quantised, saved, loaded and traced, once for all tests of a family."""
    folder = tmp_path_factory.mktemp("family")
    spec, model = build(request.param)
    data, preprocessing = Images(folder).of(model)
    x = batch(data)
    convert(model, recipe())
    calibrate(model, data, recipe())
    assert all(q.mode == "quantize" for q in model.modules() if isinstance(q, ActivationQuantizer))
    stage2.quantize_weights(model, data, recipe())
    with torch.no_grad():
        logits = model(x)
    assert torch.isfinite(logits).all()
    save_checkpoint(Checkpoint(model, spec, preprocessing, None, recipe(), {}), folder / "model.pt")
    loaded = load_checkpoint(folder / "model.pt")
    with torch.no_grad():
        assert torch.equal(loaded.model(x), logits)
    return Exported(request.param, loaded, x, trace(loaded))


@each_exported
def test_reference_file_computes_what_pytorch_did(exported: Exported, tmp_path: Path) -> None:
    graph = lower(exported.dialect, TARGETS["int4"](), {})
    report = check_graph(exported.checkpoint, graph, [exported.images], tmp_path, forced_images=IMAGES)
    assert unexpected(exported, report) == {}
    pair = report.pair("int4")
    assert pair is not None and pair.forced is not None
    assert sum(layer.different for layer in pair.forced.quantizers) == sum(pair.forced.grid.values()) == 0
    units = structure_of(exported.checkpoint.model).units
    assert {layer.name for layer in pair.forced.blocks} == {"stem", *units, "head"}
    # The other targets write valid graphs of the same network (the checker runs in lower()).
    for target in ("fp16", "trt-int4"):
        lower(exported.dialect, TARGETS[target](), {})


def unexpected(exported: Exported, report: Any) -> dict[str, str]:
    """The gates that failed and are not known to: id, and what they say."""
    return {gate.id: gate.sentence for gate in report.failed if gate.id not in DRIFTS.get(exported.family, ())}


@each_exported
def test_cpu_file_runs_in_integers_and_computes_what_pytorch_did(exported: Exported, tmp_path: Path) -> None:
    model = lower(exported.dialect, TARGETS["cpu"](), {})
    kernels = kernels_of(model, tmp_path, onnxruntime_kernels)
    # Convolutions stay in floating point, and nothing else that is quantised does.
    assert all(kernels[name].note for name in of_type(exported.dialect, "Conv"))
    assert all(kernels[name].integer for name in of_type(exported.dialect, "Linear", "MatMul"))
    report = check_graph(exported.checkpoint, model, [exported.images[:2]], tmp_path)
    assert unexpected(exported, report) == {}


@each_exported
def test_openvino_file_runs_in_integers_and_computes_what_pytorch_did(exported: Exported, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    model = lower(exported.dialect, TARGETS["openvino"](), {})
    kernels = kernels_of(model, tmp_path, openvino_kernels)
    # Among products, only those of LeViT's convolutional twin have an unsigned second factor.
    assert all(kernels[name].integer for name in of_type(exported.dialect, "Linear", "Conv"))
    assert all(kernels[name].integer or kernels[name].note for name in of_type(exported.dialect, "MatMul"))
    report = check_graph(exported.checkpoint, model, [exported.images[:2]], tmp_path)
    assert unexpected(exported, report) == {}


@pytest.mark.trt
@each_exported
def test_engine_keeps_its_promise(exported: Exported, tmp_path: Path) -> None:
    target = TARGETS["trt-int8"]()
    try:
        backend = find_builder()
    except MissingError as error:
        pytest.skip(str(error))
    model = lower(exported.dialect, target, {})
    ir.save(model, tmp_path / "model.onnx")
    linears = linear_nodes(exported.dialect)
    report = build_engine(tmp_path / "model.onnx", tmp_path / "model.plan", batch=(1, 2, 4), backend=backend)
    table = check_precision(report, promise(model, target, linears))
    assert {row.name: row.found for row in table.of("linear") if row.name in linears} == dict.fromkeys(linears, "INT8")
    assert all(row.note for row in table.of("attention") if row.found == "unfused")


def kernels_of(model: ir.Model, folder: Path, read: Callable[[Path], dict[str, Kernel]]) -> dict[str, Kernel]:
    ir.save(model, folder / "model.onnx")
    kernels = read(folder / "model.onnx")
    check_kernels(kernels)
    return kernels


def of_type(dialect: ir.Model, *op_types: str) -> list[str]:
    return [node_name(node) for node in dialect.graph if is_dialect(node, *op_types)]


@each_family
def test_folding_is_exact(family: str, images: Images) -> None:
    """Design contract 2: with quantisers bypassed, the folded network has the logits of the unfolded one."""
    _, model = build(family)
    data, _ = images.of(model)
    x = batch(data).double()
    convert(model, recipe()).double()  # what is left in FP64 is the fold's own
    with torch.no_grad():
        expected = model(x)
    norms = foldable_norms(model)
    generator = torch.Generator().manual_seed(0)
    for name, layer in quant_layers(model):
        if layer.input_quantizer.per_channel:
            linears = readers(layer)
            scale = torch.rand(linears[0].weight.shape[1], generator=generator, dtype=torch.float64) + 0.1
            factor = fold_channels(scale, linears, norms.get(name))
            if factor is not None:
                layer.input_quantizer.register_forward_pre_hook(lambda _, args, factor=factor: (args[0] * factor,))
    with torch.no_grad():
        found = model(x)
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-9


@each_family
def test_folding_keeps_the_codes(family: str, images: Images, monkeypatch: pytest.MonkeyPatch) -> None:
    """Design contract 2: a unit that is fed the same input has the same codes after folding, but for 1 in 10,000."""

    def keep_float(_: object, name: str, linear: nn.Module, weight: Tensor, bias: Any, __: object) -> IntegerLinear:
        # Unrounded weights, so that nothing except the fold can change a code.
        shaped, ones = weight.clone().reshape(linear.weight.shape), torch.ones(len(weight))  # type: ignore[arg-type]
        return integer_layer(linear, shaped, ones, None if bias is None else bias.detach().clone(), 8, name)

    monkeypatch.setattr(stage2._Stage2, "_rounded", keep_float)
    monkeypatch.setattr(stage2, "quantize_rows", lambda weight, scale, _: weight.detach() / scale[:, None])
    _, model = build(family)
    data, _ = images.of(model)
    # The contract is about 4-bit codes over a tensor's range; finer ones flip more.
    plain = recipe().calibration.model_copy(update={"importance": "none", "linear_range": "minmax"})
    settings = recipe().model_copy(update={"softmax_bits": 4, "matmul_bits": 4, "calibration": plain})
    convert(model, settings)
    calibrate(model, data, settings)
    for quantizer in (module for module in model.modules() if isinstance(module, ActivationQuantizer)):
        # Scales that FP16 holds already: their rounding is not part of the fold.
        scale = quantizer.scale.detach()
        exact = 1 / round_scale(1 / scale, "fp16") if quantizer.per_channel else round_scale(scale, "fp16")
        quantizer.set_scale(exact)
        quantizer.parametrization = "linear"
        quantizer.set_scale(exact)
    before = copy.deepcopy(model)
    stage2.quantize_weights(model, data, settings)
    codes: dict[str, Tensor] = {}

    def keep(name: str, quantizer: nn.Module, args: tuple[Tensor], output: Tensor | Codes) -> None:
        if isinstance(output, Codes):
            codes[name] = output.values
        else:
            assert isinstance(quantizer, ActivationQuantizer)
            codes[name] = (output / quantizer.scale).round()

    calls: dict[str, Any] = {}
    for each in (before, model):
        for name, module in each.named_modules():
            if isinstance(module, ActivationQuantizer | FrozenQuantizer):
                module.register_forward_hook(lambda q, args, output, name=name: keep(name, q, args, output))
    for name, unit in units(before):
        unit.register_forward_pre_hook(
            lambda _, args, kwargs, name=name: calls.setdefault(name, (args, kwargs)), with_kwargs=True
        )
    with torch.no_grad():
        labels = before(batch(data)).argmax(1)
        different = total = 0
        for name, unit in units(model):
            args, kwargs = calls[name]
            before.get_submodule(name)(*args, **kwargs)
            expected = {key: value for key, value in codes.items() if key.startswith(f"{name}.")}
            codes.clear()
            unit(*args, **kwargs)
            for key, value in expected.items():
                different += int((codes[key] != value).sum())
                total += value.numel()
        # Free-running, codes drift; random weights leave labels little margin.
        assert int((model(batch(data)).argmax(1) == labels).sum()) >= IMAGES - 1
    # MViT v2: 3.2 in 10,000 since 2026-11-29. 212 codes of softmax flip, of 5 million; nearly all of the others follow
    # from these behind the projection, in fc1 and fc2 of the same unit. Why softmax flips more than before is open.
    assert different <= (1e-3 if family in ("MViT v2", "MaxViT") else 1e-4) * total


def test_products_are_all_quantised() -> None:
    _, model = build("Swin")
    convert(model, recipe())
    products = [module for module in model.modules() if isinstance(module, QuantMatMul)]
    assert len(products) == 2 * sum(SWIN["depths"])  # type: ignore[arg-type]
    assert [name for name, _ in units(model)] == [
        "layers.0.blocks.0",
        "layers.0.blocks.1",
        "layers.1.downsample",
        "layers.1.blocks.0",
        "layers.1.blocks.1",
    ]


def test_norm_that_others_read_is_not_folded() -> None:
    """CaiT's class attention reads one norm through three linears with scales of their own."""
    _, model = build("CaiT")
    convert(model, recipe())
    norms = foldable_norms(model)
    assert "blocks.0.attn.qkv" in norms and "blocks.0.mlp.fc1" in norms
    assert not any(name.endswith((".attn.q", ".attn.k", ".attn.v", ".mlp.fc2")) for name in norms)


@pytest.mark.parametrize("architecture", ["swiftformer_xs", "coat_tiny"])
def test_unsupported_model_is_refused_by_the_name_of_the_layer(architecture: str) -> None:
    with pytest.raises(ModelError, match=r"layer '.*' \(.*\)"):
        cover(architecture)


def test_coverage_counts_what_convert_quantises() -> None:
    found = cover("swin_tiny_patch4_window7_224")
    # 12 blocks of qkv, proj, fc1, fc2; three patch mergings; the classifier; two products in each block.
    assert (found.linears, found.convolutions, found.products, found.share) == (12 * 4 + 3 + 1, 1, 24, 1.0)
    assert cover("swinv2_tiny_window8_256").floats["layers.0.blocks.0.attn.cpb_mlp.0"].startswith("its input does not")
