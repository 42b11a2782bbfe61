"""Several processes on one model: which images are whose, and sums over all of them.

    accelerate launch --multi_gpu --num_processes 4 -m gplq quantize …                     # GPUs of one machine
    accelerate launch --use_fsdp --fsdp_version 2 --num_processes 4 -m gplq quantize …     # see gplq.shard
    ACCELERATE_USE_CPU=true torchrun --standalone --nproc_per_node 2 -m gplq quantize …    # CPU

On a CPU ``accelerate launch --cpu --num_processes 2`` starts a single process: without an MPI it has no launcher there.

Without a launcher there is one process, and every function here costs nothing.
"""

import functools
import os
from collections.abc import Sequence
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, reduce
from torch import Tensor

from gplq.errors import UsageError

T = TypeVar("T")


@functools.cache
def processes() -> PartialState:
    """The processes, joined at the first call: their number, our rank, our device (a GPU if there is one).

    Raises:
        UsageError: they were started for DeepSpeed.
    """
    if _is_set("ACCELERATE_USE_DEEPSPEED"):
        raise UsageError(
            "gplq does not train with DeepSpeed. Use 'accelerate launch --multi_gpu', or for a model whose optimiser "
            "state is too large for one GPU 'accelerate launch --use_fsdp --fsdp_version 2'."
        )
    # accelerate takes CPU processes for independent ones unless it is told.
    return PartialState(cpu=_is_set("ACCELERATE_USE_CPU") or not torch.accelerator.is_available())


def are_to_shard() -> bool:
    """Whether each process is to hold a part of what is trained (FSDP), and not all of it (DDP)."""
    return _is_set("ACCELERATE_USE_FSDP") and processes().num_processes > 1


def _is_set(flag: str) -> bool:
    return os.environ.get(flag, "false").lower() in ("true", "1")


def computes_in_bf16(device: torch.device) -> bool:
    """Whether a device multiplies in BF16 and does not emulate it."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and bool(torch.cpu._is_avx512_bf16_supported())


def share(items: Sequence[T]) -> list[T]:
    """What of ``items`` is ours: every n-th of n processes, all of it if there is one process.

    Raises:
        UsageError: there are fewer items than processes.
    """
    state = processes()
    if len(items) < state.num_processes:
        raise UsageError(f"{len(items)} images are not enough for {state.num_processes} processes: start fewer.")
    return list(items[state.process_index :: state.num_processes])


def total(value: Tensor) -> Tensor:
    """The sum of a tensor over all processes, on its device."""
    result: Tensor = reduce(value.to(processes().device), "sum") if processes().num_processes > 1 else value
    return result.to(value.device)


def gathered(items: list[T]) -> list[T]:
    """The items of all processes, those of the first process first."""
    found: list[T] = gather_object(items)
    return found


def average(tensors: Sequence[Tensor]) -> None:
    """Replace tensors, in place, by their means over all processes."""
    flat = total(torch.cat([tensor.flatten() for tensor in tensors])) / processes().num_processes
    for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def first_says(answer: bool) -> bool:
    """The first process's answer to a question that each may answer differently, such as what the time is."""
    return bool(total(torch.tensor(float(answer and processes().is_main_process))))


def device_of(model: torch.nn.Module) -> torch.device:
    """Where a model lives: on the device of its first parameter or buffer."""
    tensor = next(model.parameters(), next(model.buffers(), None))
    return torch.device("cpu") if tensor is None else tensor.device
