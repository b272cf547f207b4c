"""What evaluations decide about a run: early stopping, training until ZENITH has settled, LRs that follow them.

All of it is a function of what ``metrics.json`` holds, so a resumed run comes to the decision that an
uninterrupted one comes to.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
from torch.optim.lr_scheduler import LRScheduler

from zenith_det.config.metric_names import AVERAGED, VALIDATION_LOSS
from zenith_det.errors import UserError
from zenith_det.training.checkpoints import averaging
from zenith_det.training.checkpoints.best_checkpoint import METRICS, scalar_named
from zenith_det.training.course import validation_loss
from zenith_det.training.course.metrics_file import Series, read_metrics
from zenith_det.training.processes.distributed import broadcast_object

logger = logging.getLogger(__name__)

RATIO = "zenith/ratio"
#: The ratio has settled when its mean over one patience is no less than this share of that over the one before.
SETTLED_RATIO = 0.95
#: The AP has settled when its mean over one patience is no more than this above that over the one before, percent.
SETTLED_GAIN = 0.2


class Evaluations:
    """A run's evaluations so far, and whether it is to end before ``SOLVER.MAX_ITER``; asked after each.

    Args:
        cfg: ``TEST.EARLY_STOPPING``, ``TEST.PATIENCE``, ``SOLVER.ZENITH.UNTIL_SETTLED`` count, and of several
            ``DATASETS.TEST`` the first.
        output_dir: with the ``metrics.json`` of the run so far.
        start: iterations done; what was logged beyond is of a past that no longer counts.
    """

    def __init__(self, cfg: Any, output_dir: Path, start: int) -> None:
        self._metric: str = cfg.TEST.EARLY_STOPPING
        self._patience: int = cfg.TEST.PATIENCE
        self._until_settled: bool = cfg.SOLVER.ZENITH.UNTIL_SETTLED
        self._sets: tuple[str, ...] = tuple(cfg.DATASETS.TEST)
        self._folder = output_dir
        self._scores: dict[int, float] = {}
        self._aps: dict[int, float] = {}
        if start > 0:
            self._read(start)

    def _read(self, start: int) -> None:
        series = _metrics(self._folder)
        at: dict[int, dict[str, float]] = {}
        for name, one in series.items():
            for iteration, value in zip(one.iterations.tolist(), one.values.tolist()):
                at.setdefault(iteration, {})[name] = value
        for iteration, scalars in at.items():
            # The evaluation after the last of `start` iterations is logged at either number; the others are of steps.
            if iteration <= start:
                # The file has them by name, an evaluation by test set; of several sets the first one counts.
                self.add(min(iteration, start - 1), dict(sorted(scalars.items(), key=self._place)))

    def _place(self, scalar: tuple[str, float]) -> int:
        name = scalar[0].removeprefix(averaging.PREFIX)
        return next((i for i, test_set in enumerate(self._sets) if name.startswith(f"{test_set}/")), 0)

    def add(self, iteration: int, scalars: Mapping[str, float]) -> None:
        """Take in an evaluation after ``iteration`` (counted from 0)."""
        if self._metric == VALIDATION_LOSS:
            losses = [
                value
                for name, value in scalars.items()
                if f"/{name}".endswith(f"/{validation_loss.PREFIX}total_loss")
                and not name.startswith(averaging.PREFIX)
            ]
            if losses:
                self._scores[iteration] = -losses[0]
        elif self._metric:
            name = scalar_named(scalars, self._metric)
            if name is not None:
                self._scores[iteration] = scalars[name]
        averaged = any(name.startswith(averaging.PREFIX) for name in scalars)
        aps = [
            scalars[name]
            for metric in METRICS
            if metric.startswith(AVERAGED) == averaged and (name := scalar_named(scalars, metric)) is not None
        ]
        if aps:
            self._aps[iteration] = float(np.mean(aps))

    @property
    def aps(self) -> dict[int, float]:
        """Iteration -> mean AP over the tasks, percent; of the averaged weights where there are any."""
        return dict(self._aps)

    def reason(self) -> str | None:
        """Why to end now; ``None``: go on."""
        return self._early() or (self._settled() if self._until_settled else None)

    def _early(self) -> str | None:
        if not self._metric or len(self._scores) <= self._patience:
            return None
        iterations = sorted(self._scores)
        best = max(iterations, key=lambda i: (self._scores[i], -i))
        since = len([i for i in iterations if i > best])
        if since < self._patience:
            return None
        value = abs(self._scores[best])
        return (
            f"{self._metric} has not been better than {value:.3f} at iteration {best} in {since} evaluations "
            f"(TEST.EARLY_STOPPING, TEST.PATIENCE {self._patience})"
        )

    def _settled(self) -> str | None:
        iterations = sorted(self._aps)
        if len(iterations) < 2 * self._patience:
            return None
        newest, before = iterations[-self._patience :], iterations[-2 * self._patience : -self._patience]
        gain = float(np.mean([self._aps[i] for i in newest]) - np.mean([self._aps[i] for i in before]))
        if gain > SETTLED_GAIN:
            return None
        ratio = _metrics(self._folder).get(RATIO)
        if ratio is None:
            return None
        first = iterations[-2 * self._patience - 1] if len(iterations) > 2 * self._patience else 0
        late = _mean_between(ratio, before[-1], newest[-1])
        early = _mean_between(ratio, first, before[-1])
        if late is None or early is None or late < SETTLED_RATIO * early:
            return None
        return (
            f"settled: over the last {self._patience} evaluations the LR ratio was {late:.3f}, {early:.3f} over "
            f"the {self._patience} before, and the mean AP changed by {gain:+.2f} (SOLVER.ZENITH.UNTIL_SETTLED)"
        )


def follow_evaluations(evaluations: Evaluations | None, scheduler: LRScheduler) -> str | None:
    """Let the schedule follow the evaluations, if it is one that does; why to end the run now, or ``None``.

    Called by all processes of a run.

    Args:
        evaluations: of the main process; ``None`` on the others.
    """
    found = None if evaluations is None else (evaluations.reason(), evaluations.aps)
    reason, aps = broadcast_object(found)
    if callable(follow := getattr(scheduler, "follow", None)):
        follow(aps)
    return cast("str | None", reason)


def _metrics(folder: Path) -> dict[str, Series]:
    try:
        return read_metrics(folder)
    except UserError:
        return {}


def _mean_between(series: Series, after: int, to: int) -> float | None:
    """The mean of the values logged in (after, to]."""
    inside = (series.iterations > after) & (series.iterations <= to)
    return float(series.values[inside].mean()) if inside.any() else None
