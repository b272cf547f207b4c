"""The most memory that something takes, in a process of its own."""

from __future__ import annotations

import multiprocessing
import resource
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

__all__ = ["peak_memory"]


def peak_memory(function: Callable[..., object], *args: Any, device: torch.device) -> float:
    """Bytes: what torch allocated on a CUDA device at most, elsewhere the process's largest resident size.

    Args:
        function: of a module, so that a new process finds it; called once there, with ``args``.
        device: that it works on.

    Raises:
        RuntimeError: it failed; with its traceback.
    """
    context = multiprocessing.get_context("spawn")
    mine, its = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(its, function, args, device, torch.get_num_threads()))
    process.start()
    its.close()
    try:
        peak, failure = mine.recv()
    except EOFError:
        process.join()
        peak, failure = 0.0, f"the process ended with exit code {process.exitcode}"
    process.join()
    if failure:
        raise RuntimeError(failure)
    return float(peak)


def _measure(
    answer: Connection,
    function: Callable[..., object],
    args: tuple[Any, ...],
    device: torch.device,
    threads: int,
) -> None:
    torch.set_num_threads(threads)
    # A spawned process would spawn its loader's workers, too, and not fork them as a training run does.
    multiprocessing.set_start_method(None, force=True)
    try:
        function(*args)
    except Exception:
        answer.send((0.0, traceback.format_exc()))
        return
    answer.send((torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _largest_size(), ""))


def _largest_size() -> float:
    status = Path("/proc/self/status")
    if status.exists():
        # Not ru_maxrss, which on Linux counts the parent that the process was made from.
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return float(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
