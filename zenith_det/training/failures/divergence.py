"""Telling a run that is lost from one that is merely noisy."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping
from typing import Any

WINDOW = 20


class LossWatch:
    """Whether the loss has diverged though it stayed finite.

    It has when its median over the last 20 iterations is ``factor`` times the lowest such median so far *and*
    twice the first one: a model that is that much worse than before it learned anything does not come back
    under the same learning rate. Losses that are not finite are left out here: their steps are skipped and
    counted elsewhere. Of a loss that can be negative no factor tells anything: a run with one is never lost by it.

    Args:
        factor: ``RECOVERY.DIVERGENCE_FACTOR``; 0: never.
        window: iterations that the median is taken over.
    """

    def __init__(self, factor: float, window: int = WINDOW) -> None:
        self._factor = factor
        self._recent: deque[float] = deque(maxlen=window)
        self._first = math.inf
        self._lowest = math.inf

    def add(self, loss: float) -> None:
        """Take in one iteration's total loss."""
        if not math.isfinite(loss):
            return
        self._recent.append(loss)
        if len(self._recent) == self._recent.maxlen:
            median = statistics.median(self._recent)
            if math.isinf(self._first):
                self._first = median
            self._lowest = min(self._lowest, median)

    def verdict(self) -> str | None:
        """Why the run is lost; ``None`` while it is not."""
        median = self._exceeds(self._factor, 2.0)
        if median is None:
            return None
        return (
            f"the loss has diverged: its median over {len(self._recent)} iterations is {median:.4g}, after "
            f"{self._lowest:.4g} at best and {self._first:.4g} at the start"
        )

    def looks_good(self) -> bool:
        """Whether the weights are worth coming back to: by the newest losses, well before the run is lost."""
        quarter = max((self._recent.maxlen or 0) // 4, 1)
        return self._exceeds(max(self._factor / 3, 1.0), 1.0, newest=quarter) is None

    def _exceeds(self, of_lowest: float, of_first: float, newest: int = 0) -> float | None:
        if not self._factor or len(self._recent) < (self._recent.maxlen or 0) or self._lowest <= 0:
            return None
        median = statistics.median(list(self._recent)[-newest:])
        return median if median > max(of_lowest * self._lowest, of_first * self._first) else None

    def state_dict(self) -> dict[str, Any]:
        """Numbers for a checkpoint."""
        return {"recent": list(self._recent), "first": self._first, "lowest": self._lowest}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self._recent.clear()
        self._recent.extend(state["recent"])
        self._first, self._lowest = state["first"], state["lowest"]
