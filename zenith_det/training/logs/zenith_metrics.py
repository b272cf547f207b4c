"""What an optimizer did in its last step, as scalars for the logs."""

from __future__ import annotations

from collections import Counter

from torch.optim import Optimizer

from zenith_det.optim import zenith_of
from zenith_det.solver import effective_lrs

ZENITH_SCALARS = ("ratio", "grad_norm", "window_mean", "zenith", "skipped_steps")


def optimizer_scalars(optimizer: Optimizer) -> dict[str, float]:
    """The scalars to log for ``optimizer`` after a step.

    Returns:
        ``"lr"``, the LR of the update itself, not the one a schedule asked for: see
        :func:`zenith_det.solver.effective_lrs`. Under ZENITH also ``zenith/ratio``, ``zenith/grad_norm``,
        ``zenith/window_mean``, ``zenith/zenith`` and ``zenith/skipped_steps``.

    Synchronises with the device under ZENITH: call it when logging, not at every step. Put the values with
    ``smoothing=False``: they are states, not noisy samples.
    """
    scalars = {"lr": effective_lr(optimizer)}
    if (zenith := zenith_of(optimizer)) is not None:
        state = zenith.zenith_state()
        scalars.update({f"zenith/{name}": float(state[name]) for name in ZENITH_SCALARS})
    return scalars


def effective_lr(optimizer: Optimizer) -> float:
    """The LR of the update in the group that stands for all; see :func:`zenith_det.solver.effective_lrs`."""
    return effective_lrs(optimizer)[representative_group(optimizer)]


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
