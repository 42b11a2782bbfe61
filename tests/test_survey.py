"""What a model multiplies, for which images it is built, and what of timm's is refused by name."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from gplq.coverage import cover
from gplq.errors import ModelError
from gplq.models import ModelSpec
from gplq.survey import input_size, output_samples, survey

PAGE = Path(__file__).parent.parent / "docs" / "families.md"


@pytest.mark.parametrize(
    ("architecture", "args", "size"),
    [
        ("volo_d1_224", {"img_size": 96}, (3, 96, 96)),  # keeps the size nowhere
        ("tnt_s_legacy_patch16_224", {"img_size": 64}, (3, 64, 64)),  # in pixel_embed
        ("crossvit_9_240", {"img_size": 120}, (3, 120, 120)),  # two sizes, the model's own first
        ("efficientvit_m0", {}, (3, 224, 224)),  # as one number
        ("vit_tiny_patch16_224", {"img_size": (96, 64), "in_chans": 1}, (1, 96, 64)),
        ("swin_tiny_patch4_window7_224", {"features_only": True, "in_chans": 4, "img_size": 112}, (4, 112, 112)),
    ],
)
def test_size_of_the_images(architecture: str, args: dict[str, Any], size: tuple[int, int, int]) -> None:
    with torch.device("meta"):
        model = ModelSpec(architecture, args, 0 if "features_only" in args else 5).build()
    assert input_size(model) == size


@pytest.mark.parametrize(
    ("architecture", "layer"),
    [
        ("csatv2", "stem_dct.transform.transform"),
        ("tresnet_m", r"body\.layer2\.0\.conv1\.aa"),
        ("coat_tiny", "aggregate"),
        ("botnet26t_256", r"stages\.2\.1\.self_attn\.pos_embed"),  # a table of positions, between two products
        ("sequencer2d_s", r"stages\.0\.blocks\.0\.rnn_tokens\.rnn_v"),
    ],
)
def test_what_stands_in_the_way_is_named(architecture: str, layer: str) -> None:
    with pytest.raises(ModelError, match=rf"layer '{layer}' \(\w+\) .*(would have to be|would need)"):
        cover(architecture)


def test_size_that_does_not_fit_is_refused_with_the_layer() -> None:
    with torch.device("meta"), pytest.raises(ModelError, match=r"images of 3 x 100 x 100, at layer 'stages.*window"):
        ModelSpec("maxvit_tiny_rw_224", {"img_size": 100}, 5).build()


@pytest.mark.parametrize("args", [{"img_size": "large"}, {"img_size": (1, 2, 3)}, {"depth": -1.5}])
def test_arguments_that_no_model_takes_are_refused(args: dict[str, Any]) -> None:
    with torch.device("meta"), pytest.raises(ModelError, match="timm cannot build vit_tiny_patch16_224 with"):
        ModelSpec("vit_tiny_patch16_224", args, 5).build()


def test_page_of_all_architectures_is_that_of_this_timm() -> None:
    text = PAGE.read_text(encoding="utf-8")
    if f"timm {timm.__version__};" not in text:
        pytest.skip("written with another version of timm")
    assert [name for name in timm.list_models() if not any(f"{name}{end}" in text for end in (", ", " (", " |"))] == []
    for name in ("vit_tiny_patch16_224", "coat_tiny", "efficientvit_m0", "densenet121"):
        quantised = name in text.split("## Refused")[0]
        try:
            cover(name)
        except ModelError:
            assert not quantised
        else:
            assert quantised


def test_samples_are_of_the_first_output_of_each_module_and_few() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Any:
            return self.conv(self.conv(x))

    model = Twice().eval()
    samples = output_samples(model, (3, 64, 64))
    assert list(samples) == ["conv", ""]
    assert not torch.equal(samples["conv"], samples[""])
    assert len(samples[""]) <= 4096
    seen = survey(model, (3, 64, 64))
    assert seen.repeated == ["conv"]
    assert all(torch.equal(seen.samples[name], sample) for name, sample in samples.items())
