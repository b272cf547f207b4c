"""Whether a schedule lowers the LR over a run, which ZENITH's ratio then multiplies with."""

from __future__ import annotations

import copy
import logging
import warnings
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from fvcore.common.param_scheduler import ParamScheduler
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from zenith_det.optim import zenith_of

logger = logging.getLogger(__name__)

_SAMPLES = 200  # of a run, where a schedule can be asked for any iteration
_STEPS = 20_000  # at most, where it has to be stepped through

_told: weakref.WeakSet[Any] = weakref.WeakSet()


def tell_of_decay(cfg: Any, schedule: Any, optimizer: torch.optim.Optimizer) -> None:
    """Warn, once for each schedule, where it lowers the LR of an optimizer that ZENITH's ratio is on."""
    if zenith_of(optimizer) is None or schedule in _told:
        return
    _told.add(schedule)
    if lowers_lr(schedule, cfg.SOLVER.MAX_ITER):
        logger.warning(
            "SOLVER.LR_SCHEDULER_NAME %s (%s) lowers the LR over the run: its decay and ZENITH's ratio multiply; "
            "WarmupZenithLR leaves the LR to ZENITH",
            cfg.SOLVER.LR_SCHEDULER_NAME,
            type(schedule).__name__,
        )


def lowers_lr(schedule: Any, iterations: int) -> bool:
    """Whether any group's LR is lower at some iteration than at an earlier one.

    The schedule and its optimizer stay as they are: a copy is asked, about some 200 of the ``iterations``, or stepped
    through up to 20,000 of them if it is one that goes on from the LR of the step before. False for what isn't a
    schedule of torch's or fvcore's kind, or can't be copied.
    """
    if isinstance(schedule, ReduceLROnPlateau) or hasattr(schedule, "follow"):
        return True
    if isinstance(schedule, ParamScheduler):
        return _falls([schedule(i / iterations)] for i in _sampled(iterations))
    parts = getattr(schedule, "_schedulers", None)  # SequentialLR, ChainedScheduler
    if parts:
        return any(lowers_lr(part, iterations) for part in parts)
    if not isinstance(schedule, LRScheduler):
        return False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, on the order of steps
            return _falls(_lrs(schedule, iterations))
    except Exception as error:  # a project's code, in a use that it was not written for
        logger.debug("%s can't be looked at ahead: %s", type(schedule).__name__, error)
        return False


def _sampled(iterations: int) -> Iterable[int]:
    step = max(iterations // _SAMPLES, 1)
    return [*range(0, iterations, step), iterations - 1]


def _falls(values: Iterable[Iterable[float | Tensor]]) -> bool:
    highest: list[float] = []
    for lrs in values:
        now = [float(lr) for lr in lrs]
        if any(lr < high * (1 - 1e-6) for lr, high in zip(now, highest)):
            return True
        highest = [max(pair) for pair in zip(now, highest)] if highest else now
    return False


def _lrs(schedule: LRScheduler, iterations: int) -> Iterator[Iterable[float | Tensor]]:
    first = _copy_of(schedule)
    if type(schedule).step is LRScheduler.step:
        closed = getattr(first, "_get_closed_form_lr", None)
        if closed is None and _is_a_function_of_the_iteration(schedule, iterations):
            closed = first.get_lr
        if closed is not None:
            for iteration in _sampled(iterations):
                first.last_epoch = iteration
                yield closed()
            return
    groups = first.optimizer.param_groups
    for _ in range(min(iterations, _STEPS)):
        yield [group["lr"] for group in groups]
        first.step()


def _is_a_function_of_the_iteration(schedule: LRScheduler, iterations: int) -> bool:
    """Whether other LRs of the step before lead to the same ones."""
    one, other = _copy_of(schedule), _copy_of(schedule)
    for group in other.optimizer.param_groups:
        group["lr"] = group["lr"] * 0.5
    for iteration in (1, iterations // 2, iterations - 1):
        one.last_epoch = other.last_epoch = iteration
        if list(one.get_lr()) != list(other.get_lr()):
            return False
    return True


def _copy_of(schedule: LRScheduler) -> LRScheduler:
    """A copy at the run's beginning, over a stand-in for its optimizer."""
    twin = copy.copy(schedule)
    for name, value in vars(schedule).items():
        if isinstance(value, list | dict):
            setattr(twin, name, copy.copy(value))
    groups = []
    for group in schedule.optimizer.param_groups:
        values = {k: v for k, v in group.items() if k not in ("params", "param_names")}
        values["lr"] = float(values["lr"])
        groups.append({"params": [torch.zeros(())], **values})
    twin.optimizer = torch.optim.Optimizer(groups, {})
    twin._get_lr_called_within_step = True  # type: ignore[attr-defined]
    return twin
