"""Where a resumed run goes on in its endless stream of images."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from zenith_det.config.optimizer_names import ADAMW_OPTIMIZERS, SGD_OPTIMIZERS
from zenith_det.errors import CheckpointError
from zenith_det.optim import zenith_of

logger = logging.getLogger(__name__)

#: What of a parameter group is the configuration's, also in a resumed run.
CONFIGURED = ("initial_lr", "weight_decay", "momentum", "nesterov", "betas", "eps")


def scaled_lr(lr: float, batch_before: int, batch: int, optimizer: str) -> float:
    """The LR that goes with another batch size.

    In proportion to it for SGD (Goyal et al., arXiv 1706.02677), to its square root for AdamW (Malladi et al.,
    arXiv 2205.10287), to six digits.

    Args:
        lr: for ``batch_before`` images a batch.
        optimizer: as ``SOLVER.OPTIMIZER``.
    """
    if batch == batch_before:
        return lr
    power = 0.5 if optimizer in ADAMW_OPTIMIZERS else 1.0
    return float(f"{lr * (batch / batch_before) ** power:.6g}")


def shares_state(before: str, now: str) -> bool:
    """Whether an optimizer, by its name in the registry, can go on with another one's state."""
    return before == now or any({before, now} <= {*kin} for kin in (SGD_OPTIMIZERS, ADAMW_OPTIMIZERS))


def forget_history(optimizer: Optimizer, batch_before: int, batch: int, *, keep: bool) -> None:
    """Resumed with another batch size: ZENITH's history starts again, for the noise in the norm is another.

    Args:
        keep: ``SOLVER.ZENITH.KEEP_HISTORY``: it is kept nevertheless.
    """
    zenith = zenith_of(optimizer)
    if batch == batch_before or zenith is None:
        return
    changed = f"{batch_before} images a batch before, {batch} now"
    if keep:
        logger.info("ZENITH's history is kept (SOLVER.ZENITH.KEEP_HISTORY): %s", changed)
    else:
        zenith.reset_history(changed)


@contextlib.contextmanager
def loading_state(optimizer: Optimizer, source: str) -> Iterator[None]:
    """Around loading a checkpoint's state: the present configuration's hyperparameters stay.

    Args:
        source: of the state, for messages.

    Raises:
        CheckpointError: it is of another model, optimizer or parameter groups.
    """
    configured = [
        {key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups
    ]
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}; to start a new run from what fits: another OUTPUT_DIR, and this file as MODEL.WEIGHTS"
        ) from error
    except (RuntimeError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{source} is of another optimizer or parameter groups ({reason[:300]}): use another OUTPUT_DIR, or give "
            "it as MODEL.WEIGHTS to load its weights"
        ) from error
    _reapply(optimizer, configured)


def _reapply(optimizer: Optimizer, configured: list[dict[str, Any]]) -> None:
    """After loading: the configuration wins, and a group of another optimizer gets what it lacks.

    State of the shape of its parameter is put into that parameter's order in memory: fused kernels want them
    alike, and a run may have begun with another ``MODEL.CHANNELS_LAST``.
    """
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if (
                isinstance(value, Tensor)
                and value.shape == parameter.shape
                and value.stride() != parameter.stride()
            ):
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
    for group, values in zip(optimizer.param_groups, configured):
        for key, value in values.items():
            if key in CONFIGURED:
                group[key] = value
            else:
                group.setdefault(key, value)
