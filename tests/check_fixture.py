"""What several tests of the check need: a lowered graph with a fault in it, fed by PyTorch or checked as a file."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gplq.checkpoint import Checkpoint
from gplq.data import ImageSet, batches
from gplq_export.check.chain import Settings, check
from gplq_export.check.forced import compare_forced
from gplq_export.check.gates import Judge, read_thresholds
from gplq_export.check.report import Forced, Gate, Pair, Report
from gplq_export.check.subject import Files

THRESHOLDS = read_thresholds()
Array = NDArray[Any]


def replaced(graph: ir.Model, name: str, change: Callable[[Array], Any]) -> ir.Model:
    """The graph itself, with one initialiser changed in place by ``change``."""
    value = graph.graph.initializers[name]
    assert value.const_value is not None
    array = value.const_value.numpy().copy()
    change(array)
    assert not (array == value.const_value.numpy()).all()
    value.const_value = ir.Tensor(array, name=name)
    return graph


def feed(
    model: nn.Module, graph: ir.Model, images: ImageSet | Sequence[Tensor], *, batch_size: int = 32, **options: Any
) -> Forced:
    """What :func:`compare_forced` finds, with the limits that gplq comes with."""
    parts = [inputs for inputs, _ in batches(images, batch_size)] if isinstance(images, ImageSet) else images
    count, limit = sum(map(len, parts)), THRESHOLDS["forced_blocks"]
    return compare_forced(model, graph, parts, count, "graph", block_limit=limit, **options)


def judged(forced: Forced) -> dict[str, Gate]:
    """Its gates by metric, such as ``codes``, in their order."""
    judge = Judge(THRESHOLDS)
    judge.forced(Pair(name="int4", reference="", candidate="", file=None, skipped=None), forced)
    return {gate.metric.removeprefix("forced."): gate for gate in judge.gates}


def failed(forced: Forced) -> list[tuple[str, str | None]]:
    """(metric, layer) of the gates that failed, the cause first."""
    return [(metric, gate.layer) for metric, gate in judged(forced).items() if gate.status == "failed"]


def check_graph(
    checkpoint: Checkpoint, graph: ir.Model, images: ImageSet | Sequence[Tensor], folder: Path, **settings: Any
) -> Report:
    """What ``gplq-export check`` finds of one file alone."""
    graph.metadata_props["gplq.checkpoint_sha256"] = checkpoint.sha256
    path = folder / f"model.{graph.metadata_props['gplq.target']}.onnx"
    ir.save(graph, path)
    return check(checkpoint, Files.of([path]), images, Settings(**settings), say=lambda _: None)


def smooth_noise(count: int, seed: int = 0) -> Tensor:
    """Images of a tiny ViT that no data set has: float32 [count, 1, 16, 16]."""
    return torch.randn(count, 1, 16, 16, generator=torch.Generator().manual_seed(seed))
