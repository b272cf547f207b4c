"""Random numbers from a seed and a position alone."""

from __future__ import annotations

import random

import numpy as np
import torch

from zenith_det.training.course.seeding import derived_seed, seed_all, seed_step, seeded


def drawn() -> tuple[float, float, float]:
    return float(torch.rand(1)), float(np.random.rand()), random.random()


def test_derived_seeds_differ_and_stay_what_they_are() -> None:
    seeds = {derived_seed(seed, step, rank) for seed in range(3) for step in range(500) for rank in range(8)}
    assert len(seeds) == 12_000
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derived_seed(1, 23) != derived_seed(12, 3) != derived_seed(3, 12)
    # A checkpoint of today resumes with the same numbers tomorrow, and on another machine.
    assert derived_seed(3, 5) == 6269541567509175653


def test_a_step_draws_the_same_whatever_was_drawn_before() -> None:
    seed_step(7, 3)
    first = drawn()
    drawn()
    seed_step(7, 3)
    assert drawn() == first
    seed_step(7, 4)
    assert not set(drawn()) & set(first)
    seed_step(8, 3)
    assert not set(drawn()) & set(first)


def test_seeded_leaves_no_trace() -> None:
    seed_all(1)
    np.random.randn()  # keeps its twin for the next call: a part of the state that is easily forgotten
    expected = [np.random.randn(), *drawn()]
    seed_all(1)
    np.random.randn()
    inside = []
    for _ in range(2):
        with seeded(5):
            inside.append(drawn())
    assert inside[0] == inside[1]
    assert [np.random.randn(), *drawn()] == expected
