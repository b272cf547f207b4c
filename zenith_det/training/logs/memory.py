"""How much memory the process holds."""

from __future__ import annotations

import os
import sys

import torch

MIB = 2**20


def resident_mib() -> float | None:
    """Resident memory of this process in MiB, ``None`` where the system does not tell."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / MIB
    except (OSError, ValueError):
        pass
    try:
        import resource
    except ImportError:  # Windows
        return None
    # No /proc (macOS): the peak is what can be had; macOS counts it in bytes, others in KiB.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / MIB if sys.platform == "darwin" else peak / 1024


def peak_cuda_mib() -> float | None:
    """Peak memory that this process allocated on its CUDA device in MiB, ``None`` without CUDA in use."""
    if not (torch.cuda.is_available() and torch.cuda.is_initialized()):
        return None
    return torch.cuda.max_memory_allocated() / MIB


def memory_scalars() -> dict[str, float]:
    """``{"rss_mb": …, "max_mem_mb": …}`` in MiB for the logs; what the system does not tell is left out."""
    values = {"rss_mb": resident_mib(), "max_mem_mb": peak_cuda_mib()}
    return {name: value for name, value in values.items() if value is not None}
