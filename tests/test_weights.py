"""Weight files as people have them: each is read, or refused with what is in the way and what to do."""

import argparse
import collections
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ARCHITECTURE, MODEL_ARGS, make_model
from safetensors.torch import save_file
from torch import Tensor, nn

from gplq.errors import ModelError
from gplq.models import FloatModel, load_model
from gplq.weights import find_weights, read_plain_data

State = dict[str, Tensor]


def state(factor: float = 1.0) -> State:
    return {name: tensor * factor for name, tensor in make_model().state_dict().items()}


def load(path: Path, **options: Any) -> FloatModel:
    return load_model(str(path), arch=ARCHITECTURE, model_args=dict(MODEL_ARGS), **options)


def prefixed(prefix: str, weights: State | None = None) -> State:
    return {f"{prefix}{name}": tensor for name, tensor in (weights or state()).items()}


def holds(model: nn.Module, weights: State) -> bool:
    found = model.state_dict()
    return found.keys() == weights.keys() and all(torch.equal(found[name], weights[name]) for name in found)


def optimiser() -> dict[str, Any]:
    return {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(64, 64)}}, "param_groups": [{"lr": 0.1}]}


@pytest.mark.parametrize(
    "content",
    [
        state,
        lambda: {"state_dict": state(), "epoch": 3, "optimizer": optimiser()},
        lambda: {"model_state_dict": state(), "optimizer_state_dict": optimiser()},
        lambda: {"model": state(), "args": argparse.Namespace(lr=0.1, output_dir=Path("runs"))},
        lambda: {"net": {"weights": state()}},
        lambda: {"state_dict": prefixed("model."), "hyper_parameters": {"lr": 0.1}, "pytorch-lightning_version": "2"},
        lambda: prefixed("_orig_mod."),
        lambda: prefixed("module._orig_mod."),
        lambda: {"state_dict": prefixed("_orig_mod.module.")},
        lambda: prefixed("backbone."),
        lambda: {**prefixed("backbone."), "criterion.weight": torch.ones(4)},
        lambda: prefixed("student.backbone."),
        lambda: {name.replace("blocks.0.", "blocks.0._orig_mod."): each for name, each in state().items()},
        lambda: prefixed("_fsdp_wrapped_module.module."),
        lambda: collections.OrderedDict(prefixed("a.b.c.d.")),
        lambda: (state(), {"epoch": 3}),
        lambda: {"state_dict": state(), "best": np.float64(0.9), "epoch": np.int64(3), "history": np.zeros(3)},
        lambda: {"model": state(), "state_dict": state()},
    ],
)
def test_weights_are_found_wherever_they_lie(content: Callable[[], Any], tmp_path: Path) -> None:
    torch.save(content(), tmp_path / "weights.ckpt")
    found = load(tmp_path / "weights.ckpt")
    assert found.spec.num_classes == 4
    assert holds(found.model, state())


def test_the_old_format_of_torch_is_read(tmp_path: Path) -> None:
    content = {"state_dict": state(), "args": argparse.Namespace(lr=0.1)}
    torch.save(content, tmp_path / "weights.pth.tar", _use_new_zipfile_serialization=False)
    assert holds(load(tmp_path / "weights.pth.tar").model, state())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floating_types_become_fp32(dtype: torch.dtype, tmp_path: Path) -> None:
    stored = {name: tensor.to(dtype) for name, tensor in state().items()}
    save_file(stored, tmp_path / "weights.safetensors")
    assert holds(load(tmp_path / "weights.safetensors").model, {name: each.float() for name, each in stored.items()})


@pytest.mark.parametrize(
    ("raw", "averaged"),
    [("state_dict", "state_dict_ema"), ("model", "model_ema"), ("student", "teacher"), ("model", "ema")],
)
def test_averaged_weights_come_before_raw_ones_and_it_is_said(
    raw: str, averaged: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "weights.pth"
    torch.save({raw: prefixed("module."), averaged: prefixed("module.", state(0.5))}, path)
    assert holds(load(path).model, state(0.5))
    assert f"the weights at '{averaged}.module', averaged ones; not used: '{raw}.module'" in capsys.readouterr().err
    chosen = load(path, checkpoint_key=raw)
    assert holds(chosen.model, state())
    assert chosen.checkpoint_key == raw  # so that whoever looks for the float model later finds the same one


def test_copies_that_nobody_can_tell_apart_are_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save({**prefixed("encoder_q."), **prefixed("encoder_k.", state(0.5))}, path)
    with pytest.raises(ModelError, match=r"at 'encoder_q', 'encoder_k': choose one with --checkpoint-key"):
        load(path)
    assert holds(load(path, checkpoint_key="encoder_k").model, state(0.5))
    with pytest.raises(ModelError, match=r"no weights of this architecture at 'encoder_x'; it has: 'encoder_q', 'enc"):
        load(path, checkpoint_key="encoder_x")


def test_a_key_without_a_file_is_refused() -> None:
    with pytest.raises(ModelError, match="--checkpoint-key belongs to a file"):
        load_model(ARCHITECTURE, checkpoint_key="state_dict")


def test_a_head_beside_the_backbone_is_not_left_out_in_silence(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    weights = state()
    head = {name: weights.pop(name) for name in ("head.weight", "head.bias")}
    torch.save({**prefixed("backbone.", weights), "classify.weight": head["head.weight"]}, path)
    with pytest.raises(ModelError, match=r"'backbone' have no classifier.*classify\.weight \[4, 64\].*--num-classes 0"):
        load(path)
    assert holds(load(path, num_classes=0).model, weights)


def test_weights_without_a_classifier_give_features_and_it_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = {name: tensor for name, tensor in state().items() if not name.startswith("head.")}
    torch.save(weights, tmp_path / "weights.pth")
    assert load(tmp_path / "weights.pth").spec.num_classes == 0
    assert "no classifier: features alone" in capsys.readouterr().err


class Opaque:
    pass


def write(content: Any) -> Callable[[Path], object]:
    return lambda path: torch.save(content, path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.write_bytes(b""), "it is empty"),
        (lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid"), "git lfs pull"),
        (lambda path: path.write_bytes(b"<!DOCTYPE html><html>"), "a web page"),
        (lambda path: path.write_bytes(b"PK\x03\x04 no archive"), "damaged, not complete, or of another kind"),
        (write({"state_dict": {}, "config": Opaque()}), r"holds test_weights\.Opaque, which only running code"),
        (write({"state_dict": {}, "args": collections.deque()}), r"holds collections\.deque, which only running code"),
        (write(make_model()), r"holds a whole model .*torch\.save\(model\.state_dict\(\)"),
        (lambda path: path.write_bytes(pickle.dumps({"args": Opaque()})), r"holds test_weights\.Opaque, which only"),
        (write({"epoch": 3}), "does not hold a state dict"),
        (write([1, 2]), "does not hold a state dict"),
        (write(torch.zeros(3)), "does not hold a state dict"),
    ],
)
def test_what_cannot_be_read_is_refused_with_the_remedy(
    make: Callable[[Path], object], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "weights.pth"
    make(path)
    with pytest.raises(ModelError, match=message) as caught:
        load(path)
    assert "weights.pth" in str(caught.value)
    # Torch's own message is for programmers, in colours and several lines.
    assert "\x1b" not in str(caught.value)
    assert "two options" not in str(caught.value)


def test_what_is_blocked_in_the_old_format_is_named_too(tmp_path: Path) -> None:
    torch.save({"args": Opaque()}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(ModelError, match=r"test_weights\.Opaque, which only running code"):
        read_plain_data(tmp_path / "old.pth")


def test_nothing_runs_while_a_file_is_read(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"state_dict": state(), "args": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(ModelError, match="which only running code could restore"):
        load(tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()


def test_dicts_that_contain_themselves_end(tmp_path: Path) -> None:
    content: dict[str, Any] = {"state_dict": state()}
    content["self"] = content
    torch.save(content, tmp_path / "weights.pth")
    names = state()
    assert find_weights(tmp_path / "weights.pth", names).weights.keys() == names.keys()


def test_truncated_files_are_refused(tmp_path: Path) -> None:
    torch.save(state(), tmp_path / "weights.pth")
    save_file(state(), tmp_path / "weights.safetensors")
    for path in (tmp_path / "weights.pth", tmp_path / "weights.safetensors"):
        whole = path.read_bytes()
        for size in (3, 1000, len(whole) // 2, len(whole) - 30):
            path.write_bytes(whole[:size])
            with pytest.raises(ModelError, match=re.escape(f"{path} cannot be loaded safely: it is damaged")):
                load(path)


def test_the_content_of_a_file_tells_its_format_and_not_its_name(tmp_path: Path) -> None:
    save_file(state(), tmp_path / "weights.bin")
    torch.save(state(), tmp_path / "weights.safetensors")
    for path in (tmp_path / "weights.bin", tmp_path / "weights.safetensors"):
        assert read_plain_data(path).keys() == state().keys()


def test_names_of_classes_in_an_array_are_plain_data(tmp_path: Path) -> None:
    torch.save({"state_dict": state(), "classes": np.array(["ant", "bee"])}, tmp_path / "weights.pth")
    assert load(tmp_path / "weights.pth").spec.num_classes == 4


def test_averaged_weights_without_the_classifier_that_the_raw_ones_have_are_asked_about(tmp_path: Path) -> None:
    backbone = {name: tensor for name, tensor in state(2).items() if not name.startswith("head.")}
    torch.save({"model": state(), "model_ema": backbone}, tmp_path / "weights.pth")
    with pytest.raises(ModelError, match=r"'model_ema' have no classifier, .* model\.head\.weight .*--checkpoint-key"):
        load(tmp_path / "weights.pth")
    assert holds(load(tmp_path / "weights.pth", checkpoint_key="model").model, state())


def test_a_head_of_several_layers_is_asked_about(tmp_path: Path) -> None:
    weights = {name.replace("head.", "head.1."): tensor for name, tensor in state().items()}
    torch.save(weights, tmp_path / "weights.pth")
    with pytest.raises(ModelError, match=r"no classifier, and beside them is head\.1\.weight .*--num-classes 0"):
        load(tmp_path / "weights.pth")
    assert load(tmp_path / "weights.pth", num_classes=0).spec.num_classes == 0
