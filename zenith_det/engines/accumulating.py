"""The gradient of a batch, taken in parts (``SOLVER.GRADIENT_ACCUMULATION``)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from zenith_det.config import CfgNode
from zenith_det.errors import ConfigError
from zenith_det.training.processes.distributed import get_world_size


def check_batch(cfg: CfgNode) -> None:
    """Refuse a batch that doesn't divide among processes and accumulated parts."""
    ways = get_world_size() * cfg.SOLVER.GRADIENT_ACCUMULATION
    if cfg.SOLVER.IMS_PER_BATCH % ways:
        raise ConfigError(
            f"SOLVER.IMS_PER_BATCH is {cfg.SOLVER.IMS_PER_BATCH}, which doesn't divide by {ways} "
            f"({get_world_size()} processes x SOLVER.GRADIENT_ACCUMULATION {cfg.SOLVER.GRADIENT_ACCUMULATION})"
        )


def backward_in_parts(
    model: nn.Module,
    batch: list[Any],
    parts: int,
    *,
    autocast: Callable[[], AbstractContextManager[Any]],
    scaled: Callable[[Tensor], Tensor],
    before_backward: Callable[[], Any],
) -> dict[str, Tensor]:
    """Forward and backward passes that leave the mean of the parts' gradients.

    Equal parts give the gradient of the whole batch, as far as each image's loss does not depend on the others:
    not with BatchNorm in training. Gradients cross the processes once, with the last part.

    Args:
        model: gives a dict of losses, or their sum; maybe wrapped by DDP.
        parts: of equal length; 1: the whole batch at once.
        autocast: around each forward pass.
        scaled: what to take the gradient of, from the loss.
        before_backward: called after the first forward pass, with the gradients of the step before still there.

    Returns:
        The losses, detached: the means over the parts.
    """
    size = len(batch) // parts
    totals: dict[str, Tensor] = {}
    for number in range(parts):
        last = number == parts - 1 or not isinstance(model, nn.parallel.DistributedDataParallel)
        with nullcontext() if last else model.no_sync():
            with autocast():
                losses = model(batch[number * size : (number + 1) * size])
                if isinstance(losses, Tensor):
                    losses = {"total_loss": losses}
                device = next(iter(losses.values())).device
                total = sum(losses.values(), torch.zeros((), device=device)) / parts
            if number == 0:
                before_backward()
            scaled(total).backward()
        for name, loss in losses.items():
            share = loss.detach() / parts
            totals[name] = totals[name] + share if name in totals else share
    return totals
