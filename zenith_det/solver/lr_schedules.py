"""LR schedules: warm-up, then constant for ZENITH, lowered on plateaus, or one of Detectron2's."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from fvcore.common.param_scheduler import (
    CompositeParamScheduler,
    ConstantParamScheduler,
    CosineParamScheduler,
    LinearParamScheduler,
    MultiStepParamScheduler,
    ParamScheduler,
)
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from zenith_det.errors import ConfigError
from zenith_det.solver.decay import tell_of_decay
from zenith_det.solver.registry import LR_SCHEDULER_REGISTRY

logger = logging.getLogger(__name__)

#: Names that Detectron2 knows too.
DETECTRON2_SCHEDULES = frozenset({"WarmupMultiStepLR", "WarmupCosineLR", "WarmupStepWithFixedGammaLR"})


def build_lr_scheduler(cfg: Any, optimizer: torch.optim.Optimizer) -> LRScheduler:
    """Return the schedule that ``SOLVER.LR_SCHEDULER_NAME`` names.

    Args:
        cfg: this toolkit's configuration, or Detectron2's after ``add_zenith_config``.

    Raises:
        ConfigError: an unknown name, or values that make no schedule.
    """
    scheduler: LRScheduler = LR_SCHEDULER_REGISTRY.get(cfg.SOLVER.LR_SCHEDULER_NAME)(cfg, optimizer)
    tell_of_decay(cfg, scheduler, optimizer)
    return scheduler


class MultiplierLR(LRScheduler):
    """Every group's LR is its initial one times a function of the iteration.

    It is the one owner of ``group["lr"]``: a loaded optimizer or scheduler state never changes what the LRs
    start from, so that a run resumed under another ``BASE_LR`` follows the new one, in whatever order the two
    are loaded. A group added later is scheduled with the LR it came with.
    """

    base_lrs: list[float]

    def __init__(
        self, optimizer: torch.optim.Optimizer, multiplier: Callable[[int], float], last_epoch: int = -1
    ) -> None:
        """
        Args:
            multiplier: from the iteration (counted from 0) to the factor on the LRs. It must be defined for
                the iteration after the last one too, as trainers step the schedule once more.
            last_epoch: the last finished iteration, -1 for a new run.
        """
        self._multiplier = multiplier
        super().__init__(optimizer, last_epoch)
        optimizer.register_load_state_dict_post_hook(lambda _: self._write_lrs())

    def get_lr(self) -> list[float]:  # type: ignore[override, unused-ignore]
        """Return this iteration's LRs, one a group."""
        for group in self.optimizer.param_groups[len(self.base_lrs) :]:
            self.base_lrs.append(group.setdefault("initial_lr", group["lr"]))
        multiplier = self._multiplier(self.last_epoch)
        return [base_lr * multiplier for base_lr in self.base_lrs]

    def state_dict(self) -> dict[str, Any]:
        """Return the iteration; everything else is the configuration's."""
        return {"last_epoch": self.last_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved iteration. Detectron2's own scheduler state is read too, but not its LRs."""
        self.last_epoch = state_dict["last_epoch"]
        self._step_count = self.last_epoch + 1
        self._write_lrs()

    def scale(self, factor: float) -> None:
        """Multiply what the LRs start from, from now on."""
        self.base_lrs = [lr * factor for lr in self.base_lrs]
        self._write_lrs()

    def _write_lrs(self) -> None:
        for group, base_lr, lr in zip(self.optimizer.param_groups, self.base_lrs, self.get_lr()):
            group["initial_lr"] = base_lr
            group["lr"] = lr
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]


class PlateauLR(MultiplierLR):
    """Lowers the LR when evaluations stop improving, as torch's ``ReduceLROnPlateau`` decides.

    A function of the iteration and of the evaluations so far, which :meth:`follow` is told. It has no other
    state, so that a resumed run that knows its evaluations goes on as the uninterrupted one.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        multiplier: Callable[[int], float],
        *,
        factor: float,
        patience: int,
    ) -> None:
        """
        Args:
            multiplier: see :class:`MultiplierLR`; of the warm-up.
            factor: on the LR, each time.
            patience: so many evaluations without a better one are borne.
        """
        self._factor = factor
        self._patience = patience
        self._lowered = 1.0
        super().__init__(optimizer, lambda iteration: multiplier(iteration) * self._lowered)

    def follow(self, scores: Mapping[int, float]) -> None:
        """Set the LRs by the whole history of evaluations.

        Args:
            scores: iteration -> score; a higher one is better.
        """
        unit = torch.optim.SGD([torch.zeros(())], lr=1.0)
        rule = ReduceLROnPlateau(unit, mode="max", factor=self._factor, patience=self._patience, eps=0.0)
        for iteration in sorted(scores):
            rule.step(scores[iteration])
        lowered, before = float(unit.param_groups[0]["lr"]), self._lowered
        self._lowered = lowered
        self._write_lrs()
        if lowered < before:
            logger.info("the LR is %g times BASE_LR from here on: the AP has stopped rising", lowered)


@LR_SCHEDULER_REGISTRY.register()
def WarmupZenithLR(cfg: Any, optimizer: torch.optim.Optimizer) -> MultiplierLR:
    """Warm-up, then constant. ``MAX_ITER`` plays no part: any run can be made longer."""
    return MultiplierLR(optimizer, _warmup_then_constant(cfg))


@LR_SCHEDULER_REGISTRY.register()
def WarmupConstantLR(cfg: Any, optimizer: torch.optim.Optimizer) -> MultiplierLR:
    """The same as ``WarmupZenithLR``, for the optimizers that aren't ZENITH. ``WARMUP_ITERS 0``: constant."""
    return MultiplierLR(optimizer, _warmup_then_constant(cfg))


@LR_SCHEDULER_REGISTRY.register()
def WarmupPlateauLR(cfg: Any, optimizer: torch.optim.Optimizer) -> PlateauLR:
    """Warm-up, then constant, times ``GAMMA`` after ``PLATEAU_PATIENCE`` + 1 evaluations without a better AP.

    Raises:
        ConfigError: a ``GAMMA`` that lowers nothing, or no evaluations to go by.
    """
    if cfg.SOLVER.GAMMA >= 1:
        raise ConfigError(
            f"SOLVER.GAMMA is {cfg.SOLVER.GAMMA}: WarmupPlateauLR lowers the LR by it, so it must be below 1"
        )
    if not cfg.TEST.EVAL_PERIOD:
        raise ConfigError(
            "SOLVER.LR_SCHEDULER_NAME WarmupPlateauLR goes by evaluations: set TEST.EVAL_PERIOD"
        )
    return PlateauLR(
        optimizer,
        _warmup_then_constant(cfg),
        factor=cfg.SOLVER.GAMMA,
        patience=cfg.SOLVER.PLATEAU_PATIENCE,
    )


@LR_SCHEDULER_REGISTRY.register()
def WarmupMultiStepLR(cfg: Any, optimizer: torch.optim.Optimizer) -> MultiplierLR:
    """Times ``GAMMA`` at each of ``STEPS``, as Detectron2 computes it."""
    solver = cfg.SOLVER
    steps = list(solver.STEPS)
    if not all(type(step) is int and step > 0 for step in steps) or sorted(set(steps)) != steps:
        raise ConfigError(f"SOLVER.STEPS is {solver.STEPS!r}: iterations above 0 in rising order are needed")
    counted = [step for step in steps if step < solver.MAX_ITER]
    if len(counted) < len(steps):
        logger.warning(
            "SOLVER.STEPS %s from SOLVER.MAX_ITER %d on are not reached",
            steps[len(counted) :],
            solver.MAX_ITER,
        )
    return _over_the_run(
        cfg,
        optimizer,
        MultiStepParamScheduler(
            values=[solver.GAMMA**k for k in range(len(counted) + 1)],
            milestones=counted,
            num_updates=solver.MAX_ITER,
        ),
    )


@LR_SCHEDULER_REGISTRY.register()
def WarmupCosineLR(cfg: Any, optimizer: torch.optim.Optimizer) -> MultiplierLR:
    """From ``BASE_LR`` down to ``BASE_LR_END`` by half a cosine, as Detectron2 computes it."""
    solver = cfg.SOLVER
    if not 0 <= solver.BASE_LR_END <= solver.BASE_LR:
        raise ConfigError(
            f"SOLVER.BASE_LR_END is {solver.BASE_LR_END}: it must be from 0 to BASE_LR, {solver.BASE_LR}"
        )
    return _over_the_run(cfg, optimizer, CosineParamScheduler(1, solver.BASE_LR_END / solver.BASE_LR))


@LR_SCHEDULER_REGISTRY.register()
def WarmupStepWithFixedGammaLR(cfg: Any, optimizer: torch.optim.Optimizer) -> MultiplierLR:
    """Times ``GAMMA``, ``NUM_DECAYS`` times at equal distances, as Detectron2 computes it."""
    values = [1.0]
    for _ in range(cfg.SOLVER.NUM_DECAYS):
        values.append(values[-1] * cfg.SOLVER.GAMMA)
    return _over_the_run(cfg, optimizer, _EqualSteps(values))


class _EqualSteps(ParamScheduler):
    """One value after another, each for the same part of the run; the last one at progress 1 as well.

    fvcore's ``StepParamScheduler`` raises an ``IndexError`` there, before the final checkpoint is written.
    """

    def __init__(self, values: list[float]) -> None:
        self._values = values

    def __call__(self, where: float) -> float:
        index = int((where + self.WHERE_EPSILON) * len(self._values))
        return self._values[min(index, len(self._values) - 1)]


def _warmup_then_constant(cfg: Any) -> Callable[[int], float]:
    warmup_iters = cfg.SOLVER.WARMUP_ITERS
    warmup = _warmup(cfg.SOLVER.WARMUP_METHOD, cfg.SOLVER.WARMUP_FACTOR, 1.0)

    def multiplier(iteration: int) -> float:
        return warmup(iteration / warmup_iters) if iteration < warmup_iters else 1.0

    return multiplier


def _over_the_run(cfg: Any, optimizer: torch.optim.Optimizer, schedule: ParamScheduler) -> MultiplierLR:
    """Put the warm-up in front of a schedule over a run's progress, 0 to 1."""
    solver = cfg.SOLVER
    max_iter = solver.MAX_ITER
    length = min(solver.WARMUP_ITERS / max_iter, 1.0)
    # A warm-up as long as the run leaves nothing to rescale the schedule to.
    rescale = solver.RESCALE_INTERVAL and length < 1.0
    end = schedule(0.0) if rescale else schedule(length)
    warmed_up = CompositeParamScheduler(
        [_warmup(solver.WARMUP_METHOD, solver.WARMUP_FACTOR * schedule(0.0), end), schedule],
        lengths=[length, 1 - length],
        interval_scaling=["rescaled", "rescaled" if rescale else "fixed"],
    )
    return MultiplierLR(optimizer, lambda iteration: warmed_up(min(iteration / max_iter, 1.0)))


def _warmup(method: str, start: float, end: float) -> ParamScheduler:
    if method == "linear":
        return LinearParamScheduler(start, end)
    if method == "constant":
        return ConstantParamScheduler(start)
    raise ConfigError(f"SOLVER.WARMUP_METHOD {method!r} is not one of linear, constant")
