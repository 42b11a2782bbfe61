"""The FP16 overflow probe, against PyTorch's own integers and on graphs whose peaks are known."""

import json
from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn

from gplq.checkpoint import Checkpoint, integer_linears
from gplq.data import ImageSet
from gplq.errors import UsageError
from gplq_export.lowering import lower
from gplq_export.overflow import FP16_MAX, OverflowReport, Peak, probe
from gplq_export.runtimes import reference_session
from gplq_export.targets import TARGETS, TensorRTInt4
from gplq_export.trace import INPUT


@pytest.fixture(scope="module")
def engine_graph(dialect: ir.Model) -> ir.Model:
    return lower(dialect, TensorRTInt4(ir.DataType.FLOAT), {})


@pytest.fixture(scope="module")
def images(checkpoint: Checkpoint) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    return [torch.randn(size, 1, 16, 16, generator=random) for size in (3, 2)]


def test_sums_before_the_weight_scales_are_those_of_pytorch(
    checkpoint: Checkpoint, engine_graph: ir.Model, images: list[torch.Tensor]
) -> None:
    """Products of codes times the activation's scale, from the integers of the PyTorch model."""
    expected: dict[str, float] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(linear: nn.Module, args: tuple[object, ...], _: object) -> None:
            codes, scale = args[0].values, args[0].scale  # type: ignore[attr-defined]  # gplq.ops.Codes
            sums = codes.double() @ linear.codes.double().T * scale  # type: ignore[operator,union-attr]
            expected[name] = max(expected.get(name, 0.0), float(sums.abs().max()))

        return hook

    linears = {name: linear for name, linear in integer_linears(checkpoint.model).items() if linear.codes.ndim == 2}
    handles = [linear.register_forward_hook(keep(name)) for name, linear in linears.items()]
    with torch.inference_mode():
        for batch in images:
            checkpoint.model(batch)
    for handle in handles:
        handle.remove()
    report = probe(engine_graph, images)
    found = {peak.tensor.removesuffix(".product"): peak.value for peak in report.peaks if peak.before_scale}
    assert expected.keys() <= found.keys()
    for name, value in expected.items():
        # A code that flips between the two changes a sum by a few per cent at most.
        assert found[name] == pytest.approx(value, rel=0.05), name


def test_peaks_are_the_largest_magnitudes_of_all_images(engine_graph: ir.Model, images: list[torch.Tensor]) -> None:
    report = probe(engine_graph, images)
    assert report.images == 5
    peaks = {peak.tensor: peak.value for peak in report.peaks if not peak.before_scale}
    tapped = engine_graph.clone()
    values = ir.convenience.create_value_mapping(tapped.graph)
    names = [name for name in peaks if values[name].producer() is not None]
    assert len(names) > 20
    for name in names:
        values[name].type = ir.TensorType(ir.DataType.FLOAT)
    tapped.graph.outputs[:] = [values[name] for name in names]
    session = reference_session(ir.to_proto(tapped).SerializeToString())
    largest = np.max([[np.abs(x).max() for x in session.run(None, {INPUT: b.numpy()})] for b in images], axis=0)
    np.testing.assert_allclose([peaks[name] for name in names], largest, rtol=1e-3)
    weight = next(name for name in peaks if name.endswith("norm1.weight"))
    assert peaks[weight] == np.abs(engine_graph.graph.initializers[weight].const_value.numpy()).max()  # type: ignore[union-attr]
    assert [peak.value for peak in report.peaks] == sorted((peak.value for peak in report.peaks), reverse=True)


def test_graph_stays_as_it_is_and_image_sets_are_read_up_to_the_limit(
    dialect: ir.Model, engine_graph: ir.Model, train_set: ImageSet
) -> None:
    before = ir.to_proto(engine_graph).SerializeToString()
    report = probe(engine_graph, train_set, limit=10, batch_size=4)
    assert report.images == 10
    assert ir.to_proto(engine_graph).SerializeToString() == before
    assert "head-room" in report.summary()
    content = json.loads(json.dumps(report.to_dict()))
    assert content["images"] == 10
    assert content["largest"][0]["value"] == report.peaks[0].value
    twin = probe(lower(dialect, TARGETS["fp32"](), {}), train_set, limit=4)
    assert not any(peak.before_scale for peak in twin.peaks)  # nothing is quantised
    assert not twin.failures()


def test_overflow_names_the_tensor(dialect: ir.Model, images: list[torch.Tensor]) -> None:
    model = lower(dialect, TARGETS["fp32"](), {})
    weight = next(value for name, value in model.graph.initializers.items() if "fc1" in name and name.endswith(".bias"))
    assert weight.const_value is not None
    changed = weight.const_value.numpy().copy()
    changed[3] = -1e5
    weight.const_value = ir.Tensor(changed, name=weight.name)
    failures = probe(model, images).failures()
    assert any(f"{weight.name} (constant) reaches 100,000" in failure for failure in failures)
    output = str(weight.name).removesuffix("bias") + "output"
    assert any(f"{output} (Add) reaches" in failure and "65504" in failure for failure in failures)


def test_failures_and_warnings() -> None:
    peaks = (
        Peak("a", "Add", float("nan")),
        Peak("b", "MatMul", 70000.0, before_scale=True),
        Peak("c", "Add", FP16_MAX),
        Peak("d", "Add", 20000.0),
        Peak("e", "Add", FP16_MAX / 4),
    )
    report = OverflowReport(8, peaks)
    assert [text.split(" (")[0] for text in report.failures()] == ["a", "the sum before the weights' scales of b"]
    assert "first_last_bits" in report.failures()[1]
    assert [text.split(" (")[0] for text in report.warnings()] == ["c", "d"]
    assert "31 % of what FP16 holds (head-room 3.3x)" in report.warnings()[1]
    assert Peak("zero", "Add", 0.0).headroom == float("inf")


def test_no_images(engine_graph: ir.Model) -> None:
    with pytest.raises(UsageError, match="no images"):
        probe(engine_graph, [])
