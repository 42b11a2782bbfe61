"""Rotation: the same function in other bases, for every family, and a refusal with the reason where it is not."""

import copy
import json
from dataclasses import dataclass, field

import pytest
import timm
import torch
from test_families import FAMILY, TINY, VIT, build, recipe
from torch import Tensor, nn

import gplq.transforms.rotate as rotate_module
from gplq.convert import convert
from gplq.errors import ModelError
from gplq.survey import input_size
from gplq.transforms.heads import Rows, rotate_values
from gplq.transforms.orthogonal import head_rotations, mean_keeping_rotation, reflect
from gplq.transforms.rotate import rotate
from gplq.transforms.streams import find_streams

GARBLED = "more than a division into heads stands between linear and product"


@dataclass(frozen=True)
class Expected:
    """What a family gets: streams, how many attentions' queries and keys, and values; and all reasons for the rest."""

    streams: tuple[str, ...]
    scores: int
    values: int
    reasons: dict[str, str] = field(default_factory=dict)  # the end of a name, and a part of the reason


ALL = Expected(("blocks.0.norm1",), 2, 2)
NO_SCORES = Expected(("blocks.0.norm1",), 0, 2, {"attn: queries and keys": GARBLED})
POST_NORM = "writes to it, and the weight of a norm cannot hold a rotation"
NOTHING = {
    "queries and keys": GARBLED,
    "values": GARBLED,
    "model: residual stream": "no norm reads a sum of layers whose channels can be followed",
}
EXPECTED = {
    "ViT, AugReg": ALL,
    "ViT, relative positions": ALL,
    "ViT, rotary positions": NO_SCORES,
    "CLIP": Expected(
        (),
        2,
        2,
        {
            "norm_pre: residual stream": "of the norm 'norm_pre' that reads it: what it returns is no mere input",
            "blocks.0.norm1: residual stream": f"the norm 'norm_pre' {POST_NORM}",
        },
    ),
    "SigLIP": Expected(("blocks.0.norm1", "attn_pool.norm"), 3, 3),
    "DeiT": ALL,
    "DeiT, distilled": ALL,
    "DeiT-3": ALL,
    "DINOv2": ALL,
    "DINOv2, registers": ALL,
    "DINOv3": NO_SCORES,
    "EVA-02": NO_SCORES,
    "BEiT": ALL,
    "BEiT-3": Expected(("blocks.0.norm1",), 2, 0, {"attn: values": "no linear reads the weighted values as they are"}),
    "Swin": Expected(
        ("layers.1.blocks.0.norm1",), 4, 4, {"layers.0.blocks.0.norm1: residual stream": "in 'layers.1.downsample'"}
    ),
    "Swin v2": Expected((), 0, 4, {"norm: residual stream": POST_NORM, "attn: queries and keys": GARBLED}),
    "Swin v2, CR": Expected((), 0, 4, {"norm3: residual stream": POST_NORM, "attn: queries and keys": GARBLED}),
    "CaiT": Expected(("blocks.0.norm1",), 4, 4),
    "XCiT": Expected((), 2, 2, NOTHING),
    "PiT": Expected((), 3, 3, {"norm1: residual stream": "'transformers.1.pool.conv', a convolution in groups, reads"}),
    "MViT v2": Expected(("stages.0.blocks.0.norm1",), 0, 0, {"queries and keys": GARBLED, "values": GARBLED}),
    "Hiera": Expected(("blocks.0.norm1",), 2, 5, {"attn: queries and keys": "the output changes: by"}),
    "LeViT": Expected((), 0, 0, NOTHING),
    "LeViT, convolutions": Expected((), 0, 0, NOTHING),
    "MaxViT": Expected((), 22, 22, {"norm1: residual stream": "does not commute with a rotation"}),
    "CoAtNet": Expected(
        ("stages.2.blocks.0.norm2", "stages.3.blocks.0.norm2"), 0, 0, {"queries and keys": GARBLED, "values": GARBLED}
    ),
}


def disturbed(model: nn.Module) -> nn.Module:
    """Biases, norms and scales that are not what they are initialised with, so that no mistake cancels."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def vit(**changes: object) -> nn.Module:
    torch.manual_seed(0)
    return disturbed(
        timm.create_model("vit_small_patch14_dinov2", **{**VIT, "img_size": 56, "num_classes": 7, **changes})
    )


def outputs(model: nn.Module, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(2, *input_size(model), generator=generator, dtype=torch.float64)
    with torch.no_grad():
        found: Tensor = model(images.to(dtype))
    return found


def difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def rounded(model: nn.Module) -> nn.Module:
    """A copy whose weights differ by no more than FP32's rounding: what another basis does to them in any case."""
    copied = copy.deepcopy(model)
    with torch.no_grad(), torch.random.fork_rng():
        for parameter in copied.parameters():
            parameter.mul_(1 + 2.0**-24 * torch.randn_like(parameter))
    return copied


def test_every_family_is_in_the_table() -> None:
    assert EXPECTED.keys() == TINY.keys()


@pytest.mark.parametrize("family", FAMILY)
def test_family_computes_the_same(family: str) -> None:
    model = disturbed(build(family)[1])
    double = copy.deepcopy(model).double()
    before, exact = outputs(model, torch.float32), outputs(double)
    shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in model.state_dict().items()}
    noise = difference(outputs(rounded(model), torch.float32), before)
    found = rotate(model)
    assert difference(outputs(model, torch.float32), before) < max(1e-5, 3 * noise)
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in model.state_dict().items()} == shapes
    assert rotate(double) == found
    assert difference(outputs(double), exact) < 1e-9

    expected = EXPECTED[family]
    assert tuple(found.residual) == expected.streams
    assert (len(found.scores), len(found.values)) == (expected.scores, expected.values)
    for name, reason in found.skipped.items():
        assert [part for end, part in expected.reasons.items() if name.endswith(end) and part in reason], (name, reason)
    for end, part in expected.reasons.items():
        assert [name for name, reason in found.skipped.items() if name.endswith(end) and part in reason], end


@pytest.mark.parametrize(
    "changes",
    [
        {"norm_layer": "rmsnorm"},
        {"qkv_bias": False},
        {"proj_bias": False},
        {"global_pool": "avg", "fc_norm": True},
        {"dynamic_img_size": True},
        {"num_heads": 1},
        {"embed_dim": 72, "num_heads": 3},  # no powers of two
    ],
    ids=str,
)
def test_variants_of_a_plain_vit_are_rotated_throughout(changes: dict[str, object]) -> None:
    model = vit(**changes).double()
    before = outputs(model)
    found = rotate(model)
    assert difference(outputs(model), before) < 1e-9
    assert (list(found.residual), len(found.scores), len(found.values)) == (["blocks.0.norm1"], 2, 2)
    assert found.skipped == {}


def test_rotated_model_can_be_quantised() -> None:
    model = vit().double()
    before = outputs(model)
    rotate(model)
    convert(model, recipe())
    # All but for the last bit of the query weights that take 1 / sqrt(head_dim).
    assert difference(outputs(model.double()), before) < 1e-6
    with pytest.raises(ModelError, match=r"rotate\(\) belongs before convert\(\)"):
        rotate(model)


def test_weights_fit_a_rebuilt_architecture() -> None:
    model, rebuilt = vit(), vit()
    rotate(model)
    rebuilt.load_state_dict(model.state_dict())
    assert torch.equal(outputs(rebuilt, torch.float32), outputs(model, torch.float32))


def test_parts_that_are_rotated_become_plain() -> None:
    model = vit()
    weight = model.get_parameter("blocks.1.attn.proj.weight").clone()
    rotate(model)
    parameters = dict(model.named_parameters())
    for name in ("blocks.0.norm1", "blocks.1.norm2", "norm"):
        assert bool((parameters[f"{name}.weight"] == 1).all()) and not parameters[f"{name}.bias"].any()
    assert bool((parameters["blocks.0.ls1.gamma"] == 1).all())
    assert not torch.allclose(parameters["blocks.1.attn.proj.weight"], weight, atol=1e-3)


def test_norm_keeps_a_bias_that_no_linear_can_take() -> None:
    model = vit(qkv_bias=False).double()
    before = outputs(model)
    rotate(model)
    assert model.get_parameter("blocks.0.norm1.bias").any() and not model.get_parameter("blocks.0.norm2.bias").any()
    assert difference(outputs(model), before) < 1e-9
    # Where it would have to be divided by nearly nothing, the stream stays as it is.
    model = vit(qkv_bias=False)
    with torch.no_grad():
        model.get_parameter("blocks.1.norm1.weight")[5] = 1e-6
    found = rotate(model)
    assert found.residual == {}
    assert "its weight is too close to 0" in found.skipped["blocks.0.norm1: residual stream"]
    assert len(found.values) == 2


def test_features_stay_in_their_basis() -> None:
    model = vit(num_classes=0).double()
    before = outputs(model)
    found = rotate(model)
    assert difference(outputs(model), before) < 1e-9
    assert found.skipped == {
        "blocks.0.norm1: residual stream": "of the norm 'norm' that reads it: the model returns it"
    }
    assert (len(found.scores), len(found.values)) == (2, 2)


def test_feature_maps_stay_in_their_basis() -> None:
    model = timm.create_model("vit_tiny_patch16_224", features_only=True, out_indices=(0, 1), **VIT).eval()
    found = rotate(model)
    assert "the model returns it" in found.skipped["model.blocks.0.norm1: residual stream"]
    assert len(found.values) == 2


def test_seed_decides() -> None:
    models = [vit() for _ in range(3)]
    found = [rotate(model, seed=seed) for model, seed in zip(models, (1, 1, 2), strict=True)]
    states = [model.state_dict() for model in models]
    assert found[0] == found[1] and found[2].seed == 2
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    for name in ("pos_embed", "blocks.0.attn.qkv.weight", "blocks.1.mlp.fc2.weight", "head.weight"):
        assert not torch.allclose(states[0][name], states[2][name], atol=1e-3)


def test_mistake_is_taken_back_and_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def one_sided(model: nn.Module, value: Rows, columns: Rows, rotations: Tensor) -> None:
        if value.linear == "blocks.1.attn.qkv":
            columns = Rows(columns.linear, columns.indices.flip(0))  # the heads' columns, exchanged
        rotate_values(model, value, columns, rotations)

    monkeypatch.setattr(rotate_module, "rotate_values", one_sided)
    model = vit()
    before = outputs(copy.deepcopy(model).double())
    found = rotate(model)
    assert list(found.skipped) == ["blocks.1.attn: values"]
    assert found.skipped["blocks.1.attn: values"].startswith("the output changes: by ")
    assert found.values == ["blocks.0.attn"] and len(found.scores) == 2 and found.residual
    assert difference(outputs(model.double()), before) < 1e-5


def test_mistake_in_the_residual_stream_leaves_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    change = rotate_module.change_basis

    def wrong(model: nn.Module, **arguments: object) -> None:
        change(model, **arguments)  # type: ignore[arg-type]  # passed on
        with torch.no_grad():
            model.get_parameter("cls_token").neg_()

    monkeypatch.setattr(rotate_module, "change_basis", wrong)
    model = vit()
    state = copy.deepcopy(model.state_dict())
    found = rotate(model)
    assert list(found.skipped) == ["blocks.0.norm1: residual stream"]
    assert (len(found.scores), len(found.values)) == (2, 2)
    for name in ("cls_token", "norm.weight", "blocks.0.mlp.fc1.weight", "patch_embed.proj.weight"):
        assert torch.equal(model.state_dict()[name], state[name])


def test_outlier_is_spread() -> None:
    model = vit(embed_dim=256, num_heads=4)
    with torch.no_grad():  # one channel of the residual stream that every norm lets through
        model.get_parameter("patch_embed.proj.bias")[17] = 40
        for name, parameter in model.named_parameters():
            if name.endswith(("norm1.weight", "norm2.weight")):
                parameter.fill_(1)

    def peaks() -> list[float]:
        found: list[float] = []
        names = ("blocks.0.norm1", "blocks.0.norm2", "blocks.1.norm1", "blocks.1.norm2")
        handles = [
            model.get_submodule(name).register_forward_hook(
                lambda _, __, y: found.append(float(y.abs().max() / y.square().mean().sqrt()))
            )
            for name in names
        ]
        outputs(model, torch.float32)
        for handle in handles:
            handle.remove()
        return found

    before = peaks()
    rotate(model)
    after = peaks()
    assert min(before) > 10
    assert max(after) < 5


@pytest.mark.parametrize("size", [1, 2, 3, 6, 7, 8, 64, 72, 192, 384])
def test_rotation_keeps_the_mean(size: int) -> None:
    matrix = mean_keeping_rotation(size, torch.Generator().manual_seed(0))
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(matrix.sum(1), torch.ones(size, dtype=torch.float64), rtol=0, atol=1e-12)
    x = torch.randn(5, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    layer_norm = nn.functional.layer_norm
    torch.testing.assert_close(layer_norm(x @ matrix, (size,)), layer_norm(x, (size,)) @ matrix, rtol=0, atol=1e-9)
    if size >= 64:  # a dense one: sqrt(2 ln C), 2.9 to 3.4
        assert float(matrix.abs().max()) < 2.5 / size**0.5


@pytest.mark.parametrize("size", [1, 2, 24, 64])
def test_rotations_of_heads_are_orthogonal(size: int) -> None:
    matrices = head_rotations((3, size), torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        matrices @ matrices.mT, torch.eye(size, dtype=torch.float64).expand(3, size, size), rtol=0, atol=1e-12
    )
    if size == 64:
        assert float(matrices.abs().max()) == 1 / 8
        assert not torch.equal(matrices[0], matrices[1])


def test_reflection_is_orthogonal_and_keeps_the_mean() -> None:
    x = torch.randn(2, 5, 7, dtype=torch.float64)
    torch.testing.assert_close(reflect(reflect(x, -2), -2), x)
    torch.testing.assert_close(reflect(x, -2).mean(1), x.mean(1))
    assert not torch.allclose(reflect(x, -2), x)


def test_result_is_plain_data_and_two_lines() -> None:
    found = rotate(vit(num_classes=0))
    assert json.loads(json.dumps(found.to_dict())) == found.to_dict()
    assert str(found) == (
        "rotated: residual streams: 0, queries and keys: 2, values: 2 (seed 0)\n"
        "not rotated: blocks.0.norm1: residual stream: of the norm 'norm' that reads it: the model returns it"
    )
    assert "\n" not in str(rotate(vit()))


class Skipping(nn.Module):
    """Two streams that are joined by what does not commute with a rotation."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(8, 3)
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 4] -> [B, 3]."""
        y: Tensor = self.c(self.norm(self.a(x) + self.b(x).relu()))
        return y


def test_sum_with_what_cannot_be_followed_is_no_stream() -> None:
    assert find_streams(Skipping().double(), torch.randn(2, 4, dtype=torch.float64)) == []
