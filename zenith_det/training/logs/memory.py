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
    limits = [
        (limit, folder)
        for folder in _control_groups()
        if (limit := _number(folder, "memory.max", "memory.limit_in_bytes")) is not None
        and limit < machine.total
    ]
    if limits:
        limit, folder = min(limits)
        used = _number(folder, "memory.current", "memory.usage_in_bytes") or 0
        told += (
            f"; the container's or job's limit is {limit / 2**30:.1f} GiB, with {used / 2**30:.1f} GiB in use"
        )
    return told


def _control_groups() -> list[Path]:
    """Folders of this process's control group and those around it, which share its memory's limits."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    folders = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "" or "memory" in controllers.split(","):
            root = Path("/sys/fs/cgroup", "memory" if controllers else "")
            own = root / path.lstrip("/")
            folders += [own, *(parent for parent in own.parents if parent.is_relative_to(root))]
    return folders


def _number(folder: Path, *names: str) -> int | None:
    """What the first of these files says that is there; ``None`` without one, or without a limit."""
    for name in names:
        try:
            return int((folder / name).read_text())
        except (OSError, ValueError):
            continue
    return None
