"""What computes something in a check: networks in PyTorch, files in runtimes, engines, servers."""

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from gplq.errors import UsageError
from gplq.files import sha256
from gplq_export.check.capture import Capture, without_rounding
from gplq_export.check.free import Member, Seen
from gplq_export.runner import Runner


def torch_member(model: nn.Module, mode: Callable[[], object] | None = None, *, rounding: bool = True) -> Member:
    """A frozen model in PyTorch, in a mode of :mod:`gplq_export.check.capture` if one is given."""

    def run(inputs: Tensor) -> Seen:
        with contextlib.ExitStack() as stack:
            if not rounding:
                stack.enter_context(without_rounding(model))
            if mode is not None:
                stack.enter_context(mode())  # type: ignore[arg-type]  # they are context managers
            seen = Capture(model, inputs, everything=False)
        return Seen(seen.outputs, seen.codes, seen.unit_outputs)

    return run


def array_member(run: Callable[[dict[str, np.ndarray]], Sequence[np.ndarray]], name: str) -> Member:
    """What takes and returns arrays; ``name``: of its input."""
    return lambda inputs: Seen([torch.from_numpy(np.asarray(y, np.float32)) for y in run({name: inputs.numpy()})])


@torch.inference_mode()
def check_shapes(candidate: Member, reference: Member, inputs: Tensor) -> None:
    """Make sure that what two networks return can be compared, for an image and for two: a batch may be fixed.

    Raises:
        UsageError: it cannot, or the candidate cannot run.
    """
    for batch in (inputs, torch.cat([inputs, inputs])):
        found, expected = candidate(batch), reference(batch)
        _compare_shapes(found, expected)


def _compare_shapes(found: Seen, expected: Seen) -> None:
    ours = {f"output {i}": tuple(y.shape) for i, y in enumerate(found.outputs)}
    theirs = {f"output {i}": tuple(y.shape) for i, y in enumerate(expected.outputs)}
    ours |= {f"the codes of {name}": codes.shape for name, codes in found.codes.items()}
    theirs |= {f"the codes of {name}": expected.codes[name].shape for name in found.codes}
    for what in {**theirs, **ours}:
        if ours.get(what) != theirs.get(what):
            raise UsageError(
                f"{what}: {ours.get(what, 'missing')}, in PyTorch {theirs.get(what, 'missing')}: it is of another "
                "network. Export again."
            )


def module_member(model: nn.Module) -> Member:
    """Any network in PyTorch."""
    return lambda inputs: Seen(tree_leaves(model(inputs)))


def engine_member(plan: Path, trust: bool) -> Member:
    """A plan on the GPU, in batches as large as its largest profile."""
    runner = Runner(plan, sha256=sha256(plan) if trust else None)
    most = max(profile[2] for profile in runner.profiles)

    def run(inputs: Tensor) -> Seen:
        parts = [[_to_host(y) for y in runner(part.numpy()).values()] for part in inputs.split(most)]
        return Seen([torch.cat(column) for column in zip(*parts, strict=True)])

    return run


def _to_host(array: Any) -> Tensor:
    """A copy in main memory: the buffer is overwritten by the next call. Of PyTorch or of pycuda."""
    return array.float().cpu().clone() if isinstance(array, Tensor) else torch.from_numpy(array.get()).float()
