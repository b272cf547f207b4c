"""Memory that runs out in a computation: one line with what was computed, what was free, and what needs less."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from zenith_det.errors import UserError, one_line
from zenith_det.training.logs.memory import memory_left

__all__ = ["OutOfMemoryError", "telling_of_memory"]

# What PyTorch's allocator for the CPU, and CUDA's libraries, say in a RuntimeError of no class of its own.
_SIGNS = ("DefaultCPUAllocator", "CUDA error: out of memory", "STATUS_ALLOC_FAILED")
_TRAINING = (
    "lower SOLVER.IMS_PER_BATCH, or keep it and take the batch in parts (SOLVER.GRADIENT_ACCUMULATION), turn on "
    "SOLVER.AMP.ENABLED, or train on smaller images (INPUT.MIN_SIZE_TRAIN, MAX_SIZE_TRAIN)"
)
_SHOWN = 4
_EVALUATION = "lower INPUT.MIN_SIZE_TEST and MAX_SIZE_TEST, or TEST.DETECTIONS_PER_IMAGE"


class OutOfMemoryError(UserError):
    """A computation that doesn't fit into memory."""


@contextlib.contextmanager
def telling_of_memory(
    what: str, samples: Sequence[Mapping[str, Any]], device: torch.device, *, training: bool
) -> Iterator[None]:
    """Within it, running out of memory is told in one line.

    Args:
        what: is computed: ``"iteration 17"``.
        samples: of which images; each has ``"image"``, ``(3, H, W)``.
        device: where.
        training: or evaluating; for what to do.

    Raises:
        OutOfMemoryError: with nothing of the computation in memory any more.
    """
    asked = None
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        # Subclasses of RuntimeError are many, and most are something else: NotImplementedError, a GPU's faults.
        of_memory = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if not of_memory and not any(sign in str(error) for sign in _SIGNS):
            raise
        traceback.clear_frames(error.__traceback__)  # their tensors
        asked = one_line(str(error).split("\n")[0].split(". Of the allocated")[0], 300)
    if asked is not None:
        advice = _TRAINING if training else _EVALUATION
        raise OutOfMemoryError(
            f"{what}, {_described(samples)}: out of memory on {device}: {_free(device)} ({asked}): {advice}"
        )


def _described(samples: Sequence[Mapping[str, Any]]) -> str:
    """The images of a batch, with the sizes in which the network gets them: ``"images 7 (800 x 1216), …"``."""
    shown = [
        f"{sample.get('image_id', '?')} ({sample['image'].shape[-2]} x {sample['image'].shape[-1]})"
        for sample in samples[:_SHOWN]
    ]
    more = f" and {len(samples) - _SHOWN} more" if len(samples) > _SHOWN else ""
    return f"image{'s' if len(samples) > 1 else ''} {', '.join(shown)}{more}"


def _free(device: torch.device) -> str:
    if device.type != "cuda":
        return memory_left()
    try:
        free, total = torch.cuda.mem_get_info(device)
        own = torch.cuda.memory_allocated(device)
    except (RuntimeError, AssertionError):  # a device that has failed, or isn't one
        return "what is free can't be told"
    return f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB is free, {own / 2**30:.1f} GiB is this process's still"
