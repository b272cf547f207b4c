"""What a measurement was taken on, as far as it explains the figures: no names, no paths."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import psutil
import torch

__all__ = ["describe_machine"]


def describe_machine() -> dict[str, Any]:
    """CPU, cores, memory, threads, load, versions and GPU, for the JSON and for the line under a table."""
    facts: dict[str, Any] = {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "torch_threads": torch.get_num_threads(),
        "vector_instructions": torch.backends.cpu.get_cpu_capability(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
        facts["cuda"] = torch.version.cuda
    return facts


def _cpu_model() -> str:
    """The processor's name: Linux gives it in a file, others to :mod:`platform`."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        values: dict[str, str] = {}
        for line in cpuinfo.read_text().splitlines():
            key, _, value = line.partition(":")
            values.setdefault(key.strip(), value.strip())
        if "model name" in values:
            family, model = values.get("cpu family"), values.get("model")
            return values["model name"] + (f" (family {family}, model {model})" if family else "")
    return platform.processor() or platform.machine()
