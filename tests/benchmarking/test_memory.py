"""The peak of a process of its own, not of the one that asks."""

from __future__ import annotations

import pytest
import torch

from zenith_det.benchmarking.memory import peak_memory

CPU = torch.device("cpu")


def take(megabytes: int) -> None:
    torch.zeros(megabytes * 250_000)


def fail() -> None:
    raise ValueError("what went wrong")


def test_what_is_taken_for_a_moment_counts_and_what_the_parent_has_does_not() -> None:
    kept = torch.ones(100_000_000)  # 400 MB
    little, much = peak_memory(take, 1, device=CPU), peak_memory(take, 300, device=CPU)
    assert (much - little) / 1e6 == pytest.approx(299, rel=0.1)
    del kept


def test_a_failure_comes_with_its_reason() -> None:
    with pytest.raises(RuntimeError, match="what went wrong"):
        peak_memory(fail, device=CPU)
