"""The reference file in a session as anybody opens it: convolutions on patches, whose quantisers could be merged."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from check_fixture import check_graph

from gplq import stage2
from gplq.calibrate import calibrate
from gplq.checkpoint import Checkpoint
from gplq.convert import convert
from gplq.data import Preprocessing, open_images
from gplq.models import ModelSpec
from gplq.recipe import Recipe
from gplq_export.check.report import Gate, Report
from gplq_export.lint import lint
from gplq_export.lowering import lower
from gplq_export.targets import Int4
from gplq_export.trace import trace

IMAGES = 5


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, torch.Tensor]:
    """A network that begins with convolutions and Relu, and images for it."""
    arguments = {"img_size": 32, "embed_dim": 64, "init_channels": 16, "depth": (1, 1, 1), "num_heads": 2}
    spec = ModelSpec("visformer_tiny", arguments, 5)
    path = tmp_path_factory.mktemp("images") / "images.npz"
    coarse = np.random.default_rng(0).integers(0, 256, (IMAGES, 4, 4, 3), dtype=np.uint8)
    np.savez(path, images=coarse.repeat(8, 1).repeat(8, 2), labels=np.zeros(IMAGES, np.int64))
    preprocessing = Preprocessing((3, 32, 32), "bicubic", 1.0, "center", (0.5,) * 3, (0.5,) * 3)
    data = open_images(path, "test", preprocessing)
    settings = {"images": IMAGES, "matmul_range": "minmax"}
    recipe = Recipe.from_dict({"calibration": settings, "stage1": {"enabled": False}, "stage2": {"images": IMAGES}})
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = spec.build()
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.05)
    convert(model, recipe)
    calibrate(model, data, recipe)
    stage2.quantize_weights(model, data, recipe)
    return Checkpoint(model, spec, preprocessing, None, recipe, {}), torch.stack([data[i][0] for i in range(IMAGES)])


def broken_rules(graph: ir.Model) -> set[str]:
    return {finding.rule.id for finding in lint(graph.clone(), "ort")}


def failed(report: Report) -> list[Gate]:
    assert report.pair("int4") is not None and report.pair("int4-optimised") is not None
    return report.failed


def test_file_computes_the_same_in_a_default_session(
    checkpoint: tuple[Checkpoint, torch.Tensor], tmp_path: Path
) -> None:
    graph = lower(trace(checkpoint[0]), Int4(), {})
    assert "merged-quantizer" not in broken_rules(graph)
    report = check_graph(checkpoint[0], graph, [checkpoint[1]], tmp_path)
    assert failed(report) == []
    pair = report.pair("int4-optimised")
    assert pair is not None and pair.found is not None and pair.forced is not None
    assert pair.found.cosine_p01.value > 0.9999
    assert [layer.different for layer in pair.forced.blocks] == [0] * len(pair.forced.blocks)


def test_file_that_does_not_is_found_in_its_very_block_on_few_images(
    checkpoint: tuple[Checkpoint, torch.Tensor], tmp_path: Path
) -> None:
    class Merged(Int4):
        passes = Int4.passes[:-1]  # without that which holds quantisers

    graph = lower(trace(checkpoint[0]), Merged(), {})
    assert "merged-quantizer" in broken_rules(graph)
    report = check_graph(checkpoint[0], graph, [checkpoint[1]], tmp_path)
    first = failed(report)[0]
    assert (first.id, first.layer) == ("int4-optimised.forced.blocks", "stem")
    assert {gate.pair for gate in failed(report)} == {"int4-optimised"}
