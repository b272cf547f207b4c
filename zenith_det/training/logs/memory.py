"""How much memory the process holds."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

MIB = 2**20


def resident_mib() -> float:
    """Resident memory of this process in MiB."""
    return float(psutil.Process().memory_info().rss / MIB)


def peak_cuda_mib() -> float | None:
    """Peak memory that this process allocated on its CUDA device in MiB, ``None`` without CUDA in use."""
    if not (torch.cuda.is_available() and torch.cuda.is_initialized()):
        return None
    return torch.cuda.max_memory_allocated() / MIB


def memory_left() -> str:
    """What memory is left for this process, for messages: ``"1.2 of 15.6 GiB is free now"``.

    Where a container or a job has a limit of its own, that is told as well.
    """
    machine = psutil.virtual_memory()
    told = f"{machine.available / 2**30:.1f} of {machine.total / 2**30:.1f} GiB is free now"
    limit = _number("memory.max") or _number("memory/memory.limit_in_bytes")
    if limit is not None and limit < machine.total:
        used = _number("memory.current") or _number("memory/memory.usage_in_bytes") or 0
        told += (
            f"; the container's or job's limit is {limit / 2**30:.1f} GiB, with {used / 2**30:.1f} GiB in use"
        )
    return told


def _number(name: str) -> int | None:
    """What a file of this process's control group says, ``None`` where it has no such limit."""
    try:
        return int(Path("/sys/fs/cgroup", name).read_text())
    except (OSError, ValueError):
        return None
