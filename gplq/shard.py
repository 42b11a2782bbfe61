"""A model in training whose weights, gradients and optimiser state are divided among the processes (FSDP 2).

What is divided is a copy. The model itself waits on the CPU, and takes up the result when the training is done: what
comes before (calibration) and after (Stage 2) sees an ordinary model.

What stays whole in every process: the scales of the quantisers, which are small and for the most part single numbers,
that FSDP cannot divide, and the teacher, which has neither gradients nor an optimiser.
"""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map_only

from gplq.convert import Structure, units
from gplq.errors import ModelError
from gplq.processes import processes


def shard(objective: nn.Module, whole: Collection[nn.Parameter], device: torch.device) -> None:
    """Divide a module's parameters, in place, and move it to ``device``.

    Together are gathered, when they are needed, the weights of one unit (:func:`gplq.convert.units`) of each converted
    model inside, and those outside of all units.

    Args:
        objective: what is called in training; it is on the CPU, and shares no parameter with another module.
        whole: parameters that are not divided; their gradients are those of this process.
        device: of this process.

    Raises:
        ModelError: a parameter that is not in ``whole`` is a single number, which FSDP cannot divide.
    """
    kept = set(whole)
    for name, parameter in objective.named_parameters():
        if parameter.ndim == 0 and parameter not in kept:
            raise ModelError(
                f"parameter '{name}' is a single number, which FSDP cannot divide: give it the shape [1], or use "
                "'accelerate launch --multi_gpu'."
            )
    for parameter in whole:  # fully_shard() moves the others
        parameter.data = parameter.data.to(device)
    converted = [part for part in objective.modules() if isinstance(getattr(part, "gplq_structure", None), Structure)]
    parts = [unit for model in converted for _, unit in units(model)]
    mesh = init_device_mesh(device.type, (processes().num_processes,))
    for part in [*parts, objective]:
        part.register_forward_hook(lambda _, __, output: tree_map_only(Tensor, _unshared, output))
        fully_shard(part, mesh=mesh, ignored_params=kept)


def _unshared(tensor: Tensor) -> Tensor:
    """Not a view: changed in place, it would lose the hook that gathers the unit's weights in the backward pass."""
    return tensor.clone() if tensor._is_view() else tensor


def local(tensor: Tensor) -> Tensor:
    """What this process has of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gather(tensor: Tensor) -> Tensor:
    """The whole of a tensor, in every process. All of them have to call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gather_on_first(state: Any) -> Any:
    """Nested data with whole tensors, on the CPU, in the first process; in the others those are empty.

    All processes have to call it. Data in which nothing is divided are returned as they are.
    """

    def collect(tensor: DTensor) -> Tensor:
        full = tensor.full_tensor()
        return full.cpu() if processes().is_main_process else full.new_empty(0)

    return tree_map_only(DTensor, collect, state)


def divide_like(tensor: Tensor, pattern: Tensor) -> Tensor:
    """``tensor``, that every process has as a whole, divided as ``pattern`` is, if it is."""
    if not isinstance(pattern, DTensor) or tensor.shape != pattern.shape:
        return tensor
    mesh, placements = pattern.device_mesh, pattern.placements
    return distribute_tensor(tensor.to(pattern.device), mesh, placements, src_data_rank=None)
