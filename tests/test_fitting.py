"""Weights into a model: of older names, of another image size, of other channels, and what is no weight at all."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from conftest import ARCHITECTURE, MODEL_ARGS, make_model, write_model
from torch import Tensor, nn

from gplq.errors import ModelError
from gplq.models import FloatModel, load_model

SWIN = "swin_tiny_patch4_window7_224"
SWIN_ARGS = {"img_size": 56, "embed_dim": 32, "depths": (1, 1), "num_heads": (1, 2)}


def save(folder: Path, weights: dict[str, Tensor]) -> Path:
    torch.save(weights, folder / "weights.pth")
    return folder / "weights.pth"


def load(path: Path, **model_args: Any) -> FloatModel:
    return load_model(str(path), arch=ARCHITECTURE, model_args={**MODEL_ARGS, **model_args})


def same_outputs(one: nn.Module, other: nn.Module, size: tuple[int, ...]) -> bool:
    x = torch.rand(2, *size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return torch.equal(one.eval()(x), other.eval()(x))


def test_older_swin_goes_through_timms_own_filter(tmp_path: Path) -> None:
    """Until 2023 timm, and the authors until today, had the head in ``head`` and merged at the end of a stage."""
    torch.manual_seed(0)
    model = timm.create_model(SWIN, num_classes=5, **SWIN_ARGS)
    older = {
        name.replace("head.fc.", "head.").replace("layers.1.downsample", "layers.0.downsample"): tensor
        for name, tensor in model.state_dict().items()
    }
    older["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(49, 49, dtype=torch.long)
    found = load_model(str(save(tmp_path, {"model": older})), arch=SWIN, model_args=SWIN_ARGS)  # type: ignore[dict-item]
    assert found.spec.num_classes == 5
    assert same_outputs(found.model, model, (3, 56, 56))


def test_tables_that_timm_computes_itself_do_not_matter(tmp_path: Path) -> None:
    args = {"img_size": 32, "depth": 1, "embed_dim": 64, "num_heads": 2}
    model = timm.create_model("beit_base_patch16_224", num_classes=3, **args)
    table = dict(model.named_buffers())["blocks.0.attn.relative_position_index"]
    weights = {**model.state_dict(), "blocks.0.attn.relative_position_index": table}
    found = load_model(str(save(tmp_path, weights)), arch="beit_base_patch16_224", model_args=args)
    assert same_outputs(found.model, model, (3, 32, 32))


def test_position_embedding_is_resampled_for_the_size_that_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = save(tmp_path, make_model().state_dict())
    found = load(path, img_size=32)
    # The judge: timm's function, on its own.
    expected = timm.layers.resample_abs_pos_embed(make_model().pos_embed, [8, 8])  # type: ignore[arg-type]
    torch.testing.assert_close(found.model.pos_embed, expected, rtol=0, atol=0)
    assert found.preprocessing.input_size == (1, 32, 32)
    assert "pos_embed [1, 17, 64] resampled to [1, 65, 64] by timm" in capsys.readouterr().err


def test_another_size_that_nobody_asked_for_is_refused_with_both(tmp_path: Path) -> None:
    path = save(tmp_path, make_model().state_dict())
    args = {name: value for name, value in MODEL_ARGS.items() if name != "img_size"}  # 224 px
    with pytest.raises(ModelError, match=r"pos_embed .* is \[1, 17, 64\], .* \[1, 3137, 64\].*img_size=16"):
        load_model(str(path), arch=ARCHITECTURE, model_args=args)


def test_another_patch_size_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, make_model(patch_size=8).state_dict())
    args = {name: value for name, value in MODEL_ARGS.items() if name != "patch_size"}  # 16 px
    with pytest.raises(ModelError, match=r"patch_embed\.proj\.weight .* trained for another patch_size"):
        load_model(str(path), arch=ARCHITECTURE, model_args={**args, "img_size": 32})


def test_channels_are_those_of_the_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = {name: value for name, value in MODEL_ARGS.items() if name != "in_chans"}
    for channels in (1, 4):
        model = make_model(in_chans=channels)
        path = save(tmp_path, model.state_dict())
        given = {"mean": (0.5,) * channels, "std": (0.5,) * channels}
        found = load_model(str(path), arch=ARCHITECTURE, model_args=args, preprocessing=given)
        assert f"so in_chans={channels}" in capsys.readouterr().err
        assert found.spec.model_args["in_chans"] == channels
        assert same_outputs(found.model, model, (channels, 16, 16))


def test_grey_images_for_weights_of_colour_sum_the_channels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_model(in_chans=3)
    found = load_model(
        str(save(tmp_path, model.state_dict())),
        arch=ARCHITECTURE,
        model_args=MODEL_ARGS,
        preprocessing={"mean": (0.5,), "std": (0.5,)},
    ).model
    grey = torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(found(grey), model(grey.expand(-1, 3, -1, -1)))
    assert "the sum of the three, as in timm" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "number", "what"),
    [
        ("blocks.0.mlp.fc1.weight", float("nan"), "1 of the 16,384 numbers of blocks.0.mlp.fc1.weight are NaN"),
        ("norm.bias", float("inf"), "1 of the 64 numbers of norm.bias are infinite"),
        ("head.bias", 1e300, "1 of the 4 numbers of head.bias are infinite"),  # beyond FP32
    ],
)
def test_tensor_that_is_not_finite_is_named(name: str, number: float, what: str, tmp_path: Path) -> None:
    weights = {key: tensor.double() for key, tensor in make_model().state_dict().items()}
    weights[name].flatten()[0] = number
    with pytest.raises(ModelError, match=what):
        load(save(tmp_path, weights))


@pytest.mark.parametrize(
    "change",
    [
        lambda tensor: tensor.mul(100).to(torch.int8),
        lambda tensor: tensor.to_sparse(),
        lambda tensor: tensor.to(torch.complex64),
        lambda tensor: torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_is_no_float_weight_is_named(change: Any, tmp_path: Path) -> None:
    weights = dict(make_model().state_dict())
    weights["blocks.1.attn.proj.weight"] = change(weights["blocks.1.attn.proj.weight"])
    with pytest.raises(ModelError, match=r"blocks\.1\.attn\.proj\.weight"):
        load(save(tmp_path, weights))


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("blocks.0.attn.qkv.lora_A.default.weight", "an adapter .LoRA. that is not merged"),
        ("blocks.0.mlp.fc1.parametrizations.weight.original0", "under a parametrisation"),
        ("blocks.0.mlp.fc1.weight_g", "remove_weight_norm"),
        ("blocks.0.mlp.fc1.weight_mask", "prune.remove"),
        ("blocks.0.mlp.fc1.weight_scale", "quantised already"),
        ("fc_norm.weight", "global_pool=avg"),
        ("reg_token", "reg_tokens=N"),
        ("blocks.0.ls1.gamma", "init_values=1"),
        ("decoder_blocks.0.norm.weight", "1 unexpected .first: decoder_blocks.0.norm.weight."),
    ],
)
def test_what_does_not_belong_to_the_architecture_is_named(extra: str, message: str, tmp_path: Path) -> None:
    weights = {**make_model().state_dict(), extra: torch.ones(4)}
    with pytest.raises(ModelError, match=message):
        load(save(tmp_path, weights))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["vit.embeddings.patch_embeddings.projection.weight", "vit.encoder.layer.0.output.dense.weight"],
            "transformers",
        ),
        (["encoder.layers.encoder_layer_0.ln_1.weight", "conv_proj.weight"], "torchvision"),
        (["patch_embed.proj.weight"], "timm's own conversion of them fails, too"),
    ],
)
def test_names_of_another_library_are_recognised(names: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=message):
        load(save(tmp_path, {name: torch.ones(4, 4) for name in names}))


def test_folder_with_pytorch_model_bin(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"lacks model\.safetensors or pytorch_model\.bin"):
        load_model(str(folder))
    torch.save({"state_dict": make_model().state_dict()}, folder / "pytorch_model.bin")
    found = load_model(str(folder))
    assert same_outputs(found.model, make_model(), (1, 16, 16))
    assert found.label_names is not None


def test_folder_of_transformers_is_recognised(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["ViTForImageClassification"], "model_type": "vit"}')
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ModelError, match=r"written by the package transformers \(vit\)"):
        load_model(str(tmp_path))
