"""A dense task, as a user of torchvision has it: the example of a detector with a 4-bit Swin backbone, in small."""

import copy
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import fast_recipe
from torch import nn
from torchvision.models.detection import RetinaNet

import gplq
from gplq.convert import QuantLayer, convert
from gplq.layers import QuantMatMul
from gplq.lsq import ActivationQuantizer
from gplq.pipeline import train_activations
from gplq.stage2 import quantize_weights
from gplq_export.runtimes import reference_session

EXAMPLE = Path(__file__).parents[1] / "examples" / "detector.py"


def load_example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("detector_example", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


example = load_example()


@pytest.fixture
def detector() -> RetinaNet:
    torch.manual_seed(0)
    model: RetinaNet = example.make_detector()
    return model.eval()


def test_quantisers_are_in_the_backbone_only(detector: RetinaNet) -> None:
    """The pyramid, the heads and the anchors stay in floating point, and what the heads say stays the same."""
    [images] = example.body_inputs(detector, example.draw_batches(1, 2, seed=0))
    outside = {name: type(module) for name, module in detector.named_modules() if ".body" not in name}
    with torch.no_grad():
        before = detector.head(list(detector.backbone(images).values()))
        convert(detector.backbone.body, gplq.Recipe(), image_size=(3, example.HEIGHT, example.WIDTH))
        # Quantisers pass through until they are calibrated.
        after = detector.head(list(detector.backbone(images).values()))
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
    assert {name: type(module) for name, module in detector.named_modules() if ".body" not in name} == outside
    kinds = (ActivationQuantizer, QuantMatMul, QuantLayer)
    quantised = [name for name, module in detector.named_modules() if isinstance(module, kinds)]
    assert quantised and all(name.startswith("backbone.body.") for name in quantised)
    assert isinstance(detector.backbone.fpn.layer_blocks[0][0], nn.Conv2d)


def test_stage1_learns_from_the_losses_of_the_detector(detector: RetinaNet) -> None:
    batches = example.draw_batches(4, 4, seed=0)
    recipe = fast_recipe(batch_size=4, epochs=2, lr=1e-3)
    convert(detector.backbone.body, recipe, image_size=(3, example.HEIGHT, example.WIDTH))
    untrained = copy.deepcopy(detector)
    head = detector.head.classification_head.cls_logits.weight.detach().clone()

    def loss_of(model: RetinaNet) -> float:
        model.train()
        model.backbone.body.eval()
        with torch.no_grad():
            return sum(float(sum(example.losses(model, batch).values())) for batch in batches)

    # Without Stage 1, but calibrated: what training has to beat.
    train_activations(untrained, batches, loss=example.losses, recipe=fast_recipe(batch_size=4, enabled=False))
    before = loss_of(untrained)
    detector.train()
    train_activations(detector, batches, loss=example.losses, recipe=recipe)
    assert loss_of(detector) < 0.98 * before
    assert not torch.equal(detector.head.classification_head.cls_logits.weight, head)
    reports = quantize_weights(detector.backbone.body, example.body_inputs(detector, batches), recipe)
    assert [report.name for report in reports] == [
        "model.layers.0.blocks.0",
        "model.layers.0.blocks.1",
        "model.layers.1.downsample",
        "model.layers.1.blocks.0",
        "model.layers.1.blocks.1",
    ]
    assert all(report.error < 0.1 for report in reports)


@pytest.mark.slow
def test_example_goes_from_training_to_a_checked_export(tmp_path: Path) -> None:
    outcome = example.run(tmp_path, train_batches=5, epochs=1, test_batches=1)
    assert outcome.exported.problems == []
    report = outcome.exported.report
    assert report is not None and report.failed == []
    pair = report.pair("int4")
    assert pair is not None and pair.found is not None and pair.forced is not None
    assert (pair.found.n, sum(layer.different for layer in pair.forced.quantizers)) == (8, 0)
    assert [layer.name for layer in pair.forced.blocks] == [
        "stem",
        "model.layers.0.blocks.0",
        "model.layers.0.blocks.1",
        "model.layers.1.downsample",
        "model.layers.1.blocks.0",
        "model.layers.1.blocks.1",
    ]
    session = reference_session(str(tmp_path / "onnx" / "model.int4.onnx"))
    assert [(value.name, value.shape) for value in session.get_outputs()] == [
        ("features_0", ["batch", 32, example.HEIGHT // 4, example.WIDTH // 4]),
        ("features_1", ["batch", 64, example.HEIGHT // 8, example.WIDTH // 8]),
    ]
    body = gplq.load(tmp_path / "backbone.pt")
    images = torch.rand(2, 3, example.HEIGHT, example.WIDTH)
    with torch.no_grad():
        expected = body(images)
    for found, maps in zip(session.run(None, {"images": images.numpy()}), expected, strict=True):
        assert torch.cosine_similarity(torch.from_numpy(found).flatten(1), maps.flatten(1)).min() > 0.99
