"""How much memory the process holds."""

from __future__ import annotations

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
