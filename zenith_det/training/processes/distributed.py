"""Several processes: telling them apart, and what they tell one another.

Every helper also works in a single process without a process group.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import os
import socket
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

# Collectives wait this long; evaluation on the main process alone must be shorter (Detectron2's value).
COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=30)


def _initialized() -> bool:
    return dist.is_available() and dist.is_initialized()


def get_rank() -> int:
    """This process's rank among all, 0 when it is alone."""
    return dist.get_rank() if _initialized() else 0


def get_world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if _initialized() else 1


def get_local_rank() -> int:
    """This process's rank on its machine, which is also its CUDA device."""
    return int(os.environ.get("LOCAL_RANK", "0")) if _initialized() else 0


def is_main_process() -> bool:
    """Whether this is rank 0, which writes the files."""
    return get_rank() == 0


def process_line() -> str:
    """Who this process is, for the log: ``process 0 of 2 on host7 (gloo)``."""
    backend = f" ({dist.get_backend()})" if _initialized() else ""
    return f"process {get_rank()} of {get_world_size()} on {socket.gethostname()}{backend}"


def barrier() -> None:
    """Wait until all processes are here."""
    if get_world_size() > 1:
        if dist.get_backend() == "nccl":
            dist.barrier(device_ids=[torch.cuda.current_device()])
        else:
            dist.barrier()


@contextlib.contextmanager
def first_on_each_machine(wanted: bool, local_rank: int) -> Iterator[None]:
    """Let the first process of each machine go ahead; the others begin when it is through, or has failed.

    For what leaves something on the disk that the others then find there. All processes call it together.

    Args:
        wanted: else all go at once.
        local_rank: of this process on its machine.
    """
    if wanted and local_rank != 0:
        barrier()
    try:
        yield
    finally:
        if wanted and local_rank == 0:
            barrier()


@functools.cache
def _object_group() -> Any:
    # Objects travel as bytes in host memory: through gloo, so that none of it goes over the GPU.
    if dist.get_backend() == "gloo":
        return None
    return dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT)


def all_gather_objects(value: Any) -> list[Any]:
    """Every process's ``value`` (anything that pickles), by rank, on every process."""
    size = get_world_size()
    if size == 1:
        return [value]
    gathered: list[Any] = [None] * size
    dist.all_gather_object(gathered, value, group=_object_group())
    return gathered


def broadcast_object(value: Any) -> Any:
    """The main process's ``value``, on every process; what the others give is ignored."""
    if get_world_size() == 1:
        return value
    holder = [value]
    dist.broadcast_object_list(holder, src=0, group=_object_group())
    return holder[0]


def agree_on_maximum(values: Sequence[int]) -> list[int]:
    """Elementwise the largest value of any process: how all come to the same decision.

    One small exchange between hosts, not over the GPUs. All processes must call it at the same point.
    """
    if get_world_size() == 1:
        return list(values)
    agreed = torch.tensor(values, dtype=torch.int64)
    dist.all_reduce(agreed, dist.ReduceOp.MAX, group=_object_group())
    largest: list[int] = agreed.tolist()
    return largest


def join_group(store: Any, rank: int, world_size: int, local_rank: int, cuda: bool) -> None:
    """Make the process group."""
    if cuda:
        torch.cuda.set_device(local_rank)
    dist.init_process_group(
        "nccl" if cuda else "gloo", store=store, rank=rank, world_size=world_size, timeout=COLLECTIVE_TIMEOUT
    )


def leave_group() -> None:
    """End the process group."""
    _object_group.cache_clear()
    dist.destroy_process_group()


def restart_count() -> int:
    """How often torchrun has restarted this group of processes; 0 without torchrun."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def would_be_restarted() -> bool:
    """Whether torchrun starts this group of processes once more if it fails."""
    return restart_count() < int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
