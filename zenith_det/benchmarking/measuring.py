"""Times of things that are compared, taken in turn so that whatever else a machine does hits all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

__all__ = ["Case", "Samples", "interleave"]


_HEAD_START_CYCLES = 10_000_000
"""About 5 ms at the clock of a datacenter GPU; an optimizer's launches take less than 1."""


@dataclass(frozen=True)
class Case:
    """One of the things compared.

    ``run`` is timed; ``before``, if given, is called ahead of each run and is not.
    """

    name: str
    run: Callable[[], object]
    before: Callable[[], object] | None = None


@dataclass(frozen=True)
class Samples:
    """The times of a case, in seconds, in the order they were taken."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def least(self) -> float:
        return min(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The first and the third quartile: half of all runs lie between them."""
        if len(self.seconds) < 2:
            return self.least, self.least
        first, _, third = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return first, third


def interleave(
    cases: Sequence[Case], *, rounds: int, warmup: int, device: torch.device | None = None
) -> dict[str, Samples]:
    """Run every case once a round, ``rounds`` times, after ``warmup`` rounds that don't count.

    Each round starts with another case, so that no case always follows the same one. On a CUDA device the
    times are the device's own, from events on its stream, with the host ahead of it as in a training loop;
    between cases the host waits for the device. Elsewhere they are wall-clock times.

    Raises:
        ValueError: no case, two of one name, or fewer than one round.
    """
    names = [case.name for case in cases]
    if not cases or len(set(names)) < len(names) or rounds < 1 or warmup < 0:
        raise ValueError(
            f"cases {names} in {rounds} rounds after {warmup}: names must differ, rounds be >= 1"
        )
    timed = _seconds_on_device if device is not None and device.type == "cuda" else _seconds
    taken: dict[str, list[float]] = {name: [] for name in names}
    for number in range(-warmup, rounds):
        first = number % len(cases)
        for case in [*cases[first:], *cases[:first]]:
            if case.before is not None:
                case.before()
            seconds = timed(case.run)
            if number >= 0:
                taken[case.name].append(seconds)
    return {name: Samples(tuple(seconds)) for name, seconds in taken.items()}


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _seconds_on_device(run: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    # While the device sleeps, the host queues the work: launches are no part of what the device does.
    torch.cuda._sleep(_HEAD_START_CYCLES)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3  # events count milliseconds
