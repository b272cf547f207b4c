"""What an optimizer did in its last step, as scalars for the logs."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import torch
from torch.optim import Optimizer

from zenith_det.optim import zenith_of

ZENITH_SCALARS = ("ratio", "grad_norm", "window_mean", "zenith", "skipped_steps")


def optimizer_scalars(optimizer: Optimizer) -> dict[str, float]:
    """The scalars to log for ``optimizer`` after a step.

    Returns:
        ``"lr"``, the LR of the update itself, not the one a schedule asked for: under ZENITH the group's LR
        times the ratio; under Prodigy and D-Adaptation ``d * lr`` with their own factors (the estimate after
        the step, so the LR of the next one); under Schedule-Free with its warm-up; else the group's LR.
        Under ZENITH also ``zenith/ratio``, ``zenith/grad_norm``, ``zenith/window_mean``, ``zenith/zenith``
        and ``zenith/skipped_steps``.

    Synchronises with the device under ZENITH: call it when logging, not at every step. Put the values with
    ``smoothing=False``: they are states, not noisy samples.
    """
    scalars = {"lr": effective_lr(optimizer)}
    if (zenith := zenith_of(optimizer)) is not None:
        state = zenith.zenith_state()
        scalars.update({f"zenith/{name}": float(state[name]) for name in ZENITH_SCALARS})
    return scalars


def effective_lr(optimizer: Optimizer) -> float:
    """The LR of the update in the group that stands for all; see :func:`optimizer_scalars`."""
    index = representative_group(optimizer)
    if (zenith := zenith_of(optimizer)) is not None:
        return zenith.effective_lrs()[index]
    return _group_lr(optimizer.param_groups[index])


def representative_group(optimizer: Optimizer) -> int:
    """Which group's LR to show: the one with most parameters, as Detectron2 chooses.

    Where every group holds a single parameter (Detectron2's unmerged groups), the first with the LR that
    most groups have.
    """
    groups = optimizer.param_groups
    largest = max(len(group["params"]) for group in groups)
    if largest > 1:
        return next(i for i, group in enumerate(groups) if len(group["params"]) == largest)
    rates = [float(group["lr"]) for group in groups]
    return rates.index(Counter(rates).most_common(1)[0][0])


def _group_lr(group: dict[str, Any]) -> float:
    if "scheduled_lr" in group:
        # Schedule-Free, set at each step. Before the first it is 0, as its warm-up starts.
        return float(group["scheduled_lr"])
    lr = float(group["lr"])
    if "d" not in group:
        return lr
    lr *= float(group["d"])
    if "g0_norm" in group:  # D-Adapted SGD divides by the first gradient's norm
        first_norm = group["g0_norm"]
        first_norm = float(first_norm.item() if isinstance(first_norm, torch.Tensor) else first_norm)
        return lr / first_norm if first_norm > 0 else lr
    if group.get("use_bias_correction"):
        # Prodigy, at the step just taken (it has already counted it).
        step = max(int(group.get("k", 0)), 1)
        beta1, beta2 = group["betas"]
        lr *= math.sqrt(1 - beta2**step) / (1 - beta1**step)
    return lr
