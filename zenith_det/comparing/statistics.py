"""Means, spreads and paired differences over seeds, with Student's t."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

#: 97.5 % quantiles of Student's t with 1 to 30 degrees of freedom.
_T_975 = (
    12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281,
    2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860,
    2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423,
)  # fmt: skip
_Z_975 = 1.959964


def t_975(degrees: int) -> float:
    """The 97.5 % quantile of Student's t: tabulated up to 30 degrees of freedom, beyond by the first two terms
    of its expansion about the normal one (right to 0.001).

    Raises:
        ValueError: fewer than 1 degree.
    """
    if degrees < 1:
        raise ValueError(f"{degrees} degrees of freedom: 1 or more are needed")
    if degrees <= len(_T_975):
        return _T_975[degrees - 1]
    z = _Z_975
    return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds.

    Attributes:
        mean: of the values.
        std: their standard deviation (n - 1); NaN for one value.
        half_width: of the 95 % confidence interval of the mean; NaN for one value.
        n: how many values.
    """

    mean: float
    std: float
    half_width: float
    n: int

    @property
    def low(self) -> float:
        """The interval's lower end."""
        return self.mean - self.half_width

    @property
    def high(self) -> float:
        """The interval's upper end."""
        return self.mean + self.half_width

    @property
    def decided(self) -> bool:
        """Whether the interval is known and leaves out 0."""
        return self.n > 1 and (self.low > 0 or self.high < 0)


def estimate(values: Sequence[float]) -> Estimate | None:
    """Mean, standard deviation and t-interval; ``None`` for no values."""
    n = len(values)
    if n == 0:
        return None
    mean = float(np.mean(values))
    if n == 1:
        return Estimate(mean, math.nan, math.nan, 1)
    std = float(np.std(values, ddof=1))
    return Estimate(mean, std, t_975(n - 1) * std / math.sqrt(n), n)


def paired(values: dict[int, float], reference: dict[int, float]) -> Estimate | None:
    """The mean difference from a reference, over the seeds that both have; ``None`` where there is none.

    Pairing by seed takes out what a seed does to both: the initial weights and the order of the images.
    """
    seeds = sorted(values.keys() & reference.keys())
    return estimate([values[seed] - reference[seed] for seed in seeds])


def first_crossing(xs: Sequence[float], values: Sequence[float], target: float) -> float | None:
    """Where a curve first reaches ``target``, on straight lines between its points; ``None``: never."""
    for n, value in enumerate(values):
        if value >= target:
            if n == 0:
                return float(xs[0])
            share = (target - values[n - 1]) / (value - values[n - 1])
            return float(xs[n - 1] + share * (xs[n] - xs[n - 1]))
    return None


def signed(value: float) -> str:
    """``"+1.2"``, ``"−0.4"``: for a sentence or a page."""
    return f"{value:+.1f}".replace("-", "−")
