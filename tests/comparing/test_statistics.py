"""Means, intervals and paired differences against values worked out by hand."""

from __future__ import annotations

import math

import pytest

from zenith_det.comparing.statistics import estimate, first_crossing, paired, signed, t_975


def test_quantiles_are_those_of_students_table() -> None:
    # Any statistics textbook's table, column 0.975.
    assert [t_975(n) for n in (1, 2, 4, 9, 30)] == [12.7062, 4.3027, 2.7764, 2.2622, 2.0423]
    # 40, 60 and 120 degrees are in the tables too, and are computed here.
    assert t_975(40) == pytest.approx(2.0211, abs=1e-3)
    assert t_975(60) == pytest.approx(2.0003, abs=1e-3)
    assert t_975(120) == pytest.approx(1.9799, abs=1e-3)
    assert t_975(10**6) == pytest.approx(1.959964, abs=1e-4)
    with pytest.raises(ValueError, match="degrees"):
        t_975(0)


def test_an_interval_by_hand() -> None:
    # Mean 62; deviations -2, 0, 2; variance 8 / 2 = 4; standard error 2 / sqrt 3.
    found = estimate([60.0, 62.0, 64.0])
    assert found is not None
    assert (found.mean, found.std, found.n) == (62.0, 2.0, 3)
    assert found.half_width == pytest.approx(4.3027 * 2 / math.sqrt(3))
    assert (found.low, found.high) == pytest.approx((57.0317, 66.9683), abs=1e-3)


def test_pairing_takes_out_what_the_seeds_share() -> None:
    # The seeds differ by 10 AP, the arms by 1 to 1.2: unpaired nothing could be told.
    first = {0: 51.0, 1: 61.1, 2: 71.2, 7: 99.0}
    second = {0: 50.0, 1: 60.0, 2: 70.0, 8: 1.0}
    found = paired(first, second)
    assert found is not None
    assert found.n == 3  # seeds 7 and 8 have no partner
    assert found.mean == pytest.approx(1.1)
    assert found.half_width == pytest.approx(4.3027 * 0.1 / math.sqrt(3))
    assert found.decided


def test_one_seed_decides_nothing() -> None:
    found = paired({0: 90.0}, {0: 10.0})
    assert found is not None
    assert found.n == 1
    assert math.isnan(found.half_width)
    assert not found.decided
    assert paired({0: 1.0}, {1: 1.0}) is None
    assert estimate([]) is None


def test_an_interval_that_holds_zero_is_open() -> None:
    found = estimate([1.0, -1.0, 0.6])
    assert found is not None
    assert not found.decided


def test_crossing_is_on_the_line_between_two_points() -> None:
    assert first_crossing([100, 200, 300], [10.0, 30.0, 20.0], 25.0) == pytest.approx(175.0)
    assert first_crossing([100, 200], [10.0, 30.0], 5.0) == 100.0
    assert first_crossing([100, 200], [10.0, 30.0], 31.0) is None


def test_signs_are_always_written() -> None:
    assert (signed(1.25), signed(-0.4)) == ("+1.2", "−0.4")
