"""What the runs of a comparison gave: read from their folders, put together by arm."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from zenith_det.comparing.arms import Arm
from zenith_det.comparing.plan import Run
from zenith_det.comparing.runner import Result, read_result
from zenith_det.comparing.statistics import Estimate, estimate, first_crossing, paired
from zenith_det.config.metric_names import TASKS
from zenith_det.config.optimizer_names import ZENITH_OPTIMIZERS
from zenith_det.errors import UserError
from zenith_det.training.course.metrics_file import Series, by_test_set, read_metrics

logger = logging.getLogger(__name__)

AP_TITLES = {task: f"{name} AP" for task, name in TASKS.items()}
AVERAGED = "averaged/"
#: The part of the reference arm's final AP that is timed.
TARGET = 0.95


@dataclass(frozen=True)
class Outcome:
    """One run, read.

    Attributes:
        run: as planned.
        result: what the runner noted; ``None``: not started.
        metrics: everything in metrics.json; empty where there is nothing.
        max_mem_mb: peak memory on a GPU, MiB, as logged; ``None`` on the CPU.
    """

    run: Run
    result: Result | None
    metrics: Mapping[str, Series] = field(default_factory=dict)
    max_mem_mb: float | None = None

    @property
    def ok(self) -> bool:
        """Whether it came to its end."""
        return self.result is not None and self.result.status == "ok"

    def ap(self, task: str) -> Series | None:
        """AP over iterations, of the averaged weights where the arm is about those."""
        # Several test sets: the first one's.
        name = f"{task}/AP"
        for scalars in by_test_set(self.metrics).values():
            if name in scalars:
                return scalars.get(AVERAGED + name if self.run.arm.averaged else name)
        return None

    def final_ap(self, task: str) -> float | None:
        """The AP at the end of a run that came to its end."""
        series = self.ap(task)
        return float(series.values[-1]) if self.ok and series is not None else None

    def training_seconds(self, iterations: npt.ArrayLike, clock: str = "time") -> npt.NDArray[np.float64]:
        """Time spent in iterations up to each of ``iterations``; without evaluations, saving and start-up.

        Args:
            clock: ``"time"``, or ``"cpu_time"`` for seconds of CPU time; NaN where a run has not logged it.
        """
        at = np.asarray(iterations, dtype=np.float64)
        series = self.metrics.get(clock)
        if series is None:
            return np.full(at.shape, np.nan)
        # A line holds the median of the iterations since the last one.
        gaps = np.diff(series.iterations, prepend=-1)
        done = np.concatenate([[0.0], series.iterations + 1.0])
        return np.interp(at, done, np.concatenate([[0.0], np.cumsum(gaps * series.values)]))

    @property
    def seconds_per_iteration(self) -> float | None:
        """The median over the run, its first tenth left out where there is more (start-up)."""
        series = self.metrics.get("time")
        if series is None:
            return None
        return float(np.median(series.values[len(series) // 10 :]))

    def reach(self, task: str, target: float) -> tuple[float, float, float] | None:
        """The iteration at which an AP is reached, and the training and CPU time, in seconds; ``None``: never."""
        series = self.ap(task)
        if series is None:
            return None
        at = first_crossing(series.iterations.tolist(), series.values.tolist(), target)
        if at is None:
            return None
        return at, float(self.training_seconds(at)), float(self.training_seconds(at, "cpu_time"))


def read_outcome(run: Run) -> Outcome:
    """Read what a run has left so far; nothing where what lies there is of another config."""
    result = read_result(run.folder)
    if result is not None and result.fingerprint != run.fingerprint:
        logger.warning("%s: what is in %s is of another config: left out", run.title, run.folder)
        return Outcome(run, None)
    try:
        metrics = read_metrics(run.folder)
    except UserError:
        metrics = {}
    memory = metrics.get("max_mem_mb")
    peak = None if memory is None else float(memory.values.max())
    return Outcome(run, result, metrics, peak)


@dataclass(frozen=True)
class Group:
    """An arm at one learning rate, over all seeds.

    Attributes:
        arm: which.
        lr: η₀.
        outcomes: one a seed.
    """

    arm: Arm
    lr: float
    outcomes: Sequence[Outcome]

    def finals(self, task: str) -> dict[int, float]:
        """The final AP by seed, of the runs that came to their end."""
        found = {o.run.seed: o.final_ap(task) for o in self.outcomes}
        return {seed: value for seed, value in found.items() if value is not None}

    def final(self, task: str) -> Estimate | None:
        """The mean over seeds."""
        return estimate(list(self.finals(task).values()))


@dataclass(frozen=True)
class Reached:
    """What it takes to an AP, over the seeds that reach it.

    Attributes:
        iterations: how many.
        seconds: of training.
        cpu_seconds: of CPU time in training; ``None`` where runs have not logged it.
        never: how many seeds don't reach it.
    """

    iterations: Estimate
    seconds: Estimate
    cpu_seconds: Estimate | None
    never: int


@dataclass(frozen=True)
class Comparison:
    """All runs of a comparison, as far as they have come.

    Attributes:
        arms: in the order asked for.
        groups: one for each arm and learning rate.
        reference: the arm that the others are compared with.
        chosen_on: on which other images η₀ was chosen, a sentence; "": on those reported.
    """

    arms: Sequence[Arm]
    groups: Sequence[Group]
    reference: Arm
    chosen_on: str = ""

    @property
    def outcomes(self) -> list[Outcome]:
        """Every run."""
        return [outcome for group in self.groups for outcome in group.outcomes]

    @property
    def tasks(self) -> list[str]:
        """Those that any run was evaluated on: ``bbox``, ``segm``, ``keypoints``."""
        return [task for task in AP_TITLES if any(o.ap(task) is not None for o in self.outcomes)]

    def groups_of(self, arm: Arm) -> list[Group]:
        """An arm's, by rising learning rate."""
        return sorted((group for group in self.groups if group.arm == arm), key=lambda group: group.lr)

    def best(self, arm: Arm) -> Group:
        """The arm at the learning rate with the most seeds that came to their end, then the highest mean of
        the AP of all tasks. Every arm chooses from the same number of runs and on the same images, so what
        choosing adds to the AP it adds to all."""

        def quality(group: Group) -> tuple[int, float]:
            means = [final.mean for task in self.tasks if (final := group.final(task))]
            return sum(o.ok for o in group.outcomes), float(np.mean(means)) if means else -1.0

        return max(self.groups_of(arm), key=quality)

    def difference(self, arm: Arm, task: str) -> Estimate | None:
        """The final AP minus the reference's, paired by seed, each at its best learning rate."""
        return paired(self.best(arm).finals(task), self.best(self.reference).finals(task))

    def target(self, task: str) -> float | None:
        """The AP that is timed: 95 % of the reference's mean; ``None`` where that is nothing yet."""
        final = self.best(self.reference).final(task)
        return None if final is None or final.mean <= 0 else TARGET * final.mean

    def reaching(self, arm: Arm, task: str, target: float | None = None) -> Reached | None:
        """What an AP takes, :meth:`target`'s by default; ``None`` where no seed reaches it."""
        target = self.target(task) if target is None else target
        if target is None:
            return None
        outcomes = [o for o in self.best(arm).outcomes if o.ok]
        reached = [at for o in outcomes if (at := o.reach(task, target)) is not None]
        iterations, seconds, cpu = (estimate([at[n] for at in reached]) for n in range(3))
        if iterations is None or seconds is None:
            return None
        return Reached(
            iterations,
            seconds,
            None if cpu is None or np.isnan(cpu.mean) else cpu,
            len(outcomes) - len(reached),
        )

    @property
    def zenith_arms(self) -> list[Arm]:
        """Those that train with ZENITH."""
        names = {o.run.arm.name for o in self.outcomes if o.run.optimizer in ZENITH_OPTIMIZERS}
        return [arm for arm in self.arms if arm.name in names]

    @property
    def baseline_arms(self) -> list[Arm]:
        """Those that train with something else."""
        zenith = self.zenith_arms
        return [arm for arm in self.arms if arm not in zenith]


def collect(runs: Sequence[Run], arms: Sequence[Arm], reference: Arm, chosen_on: str = "") -> Comparison:
    """Read all runs; ``chosen_on`` as in :class:`Comparison`."""
    by_group: dict[tuple[str, float], list[Outcome]] = {}
    for run in runs:
        by_group.setdefault((run.arm.name, run.lr), []).append(read_outcome(run))
    groups = [Group(outcomes[0].run.arm, lr, outcomes) for (_, lr), outcomes in by_group.items()]
    return Comparison(arms, groups, reference, chosen_on)


def default_reference(runs: Sequence[Run]) -> Arm:
    """The first that isn't ZENITH's: what people use today; else the first."""
    return next((run.arm for run in runs if run.optimizer not in ZENITH_OPTIMIZERS), runs[0].arm)
