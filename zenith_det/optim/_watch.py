"""What a training loop is told about its gradients without having asked."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from ._history import NormHistory

__all__ = ["HistoryWatch", "StreakReader"]

logger = logging.getLogger(__name__)

# Norms that a clipping has made equal differ by the rounding of float32, and by 1e-6 in clip_grad_norm_'s divisor.
_EQUAL = 2e-5
# Fewer norms than these may be equal by chance.
_FEWEST = 5
# Looked at every so many steps, or four times a window.
_PERIOD = 10
# Skipped steps that are told: so many, and so large a share of all steps. AMP skips a few while its scale settles.
_MANY = 10
_SHARE = 0.1


class HistoryWatch:
    """Reads a history off the device now and then, without waiting for it, and warns

    * once, when all norms of a full window are equal: the gradients were clipped before they were measured, and
      the ratio stays at 1;
    * when a tenth of all steps were skipped: at the 10th skipped step, and each time there are ten times as many.
    """

    def __init__(self) -> None:
        self._steps = 0
        self._told_equal = False
        self._next_many = _MANY
        self._copy: Tensor | None = None
        self._on_its_way: torch.cuda.Event | None = None

    def look(self, history: NormHistory) -> None:
        """To be called once a step, after ``history`` was updated; not in compiled code."""
        self._steps += 1
        if self._on_its_way is not None and self._copy is not None:
            if self._on_its_way.query():
                self._on_its_way = None
                self._judge(self._copy.tolist(), history.window)
        elif self._steps % max(history.window // 4, _PERIOD) == 0:
            self._ask(history)

    def _ask(self, history: NormHistory) -> None:
        cuda = history.device.type == "cuda"
        if cuda and torch.cuda.is_current_stream_capturing():
            return
        # NaN, hence never equal, until the window is full.
        values = torch.stack([*torch.aminmax(history.norms), *history.counts.to(history.norms.dtype)])
        if not cuda:
            # On other devices reading would wait, and a meta or fake tensor has no values.
            if values.is_cpu and type(values) is Tensor:
                self._judge(values.tolist(), history.window)
            return
        if self._copy is None:
            self._copy = torch.zeros_like(values, device="cpu", pin_memory=True)
        self._copy.copy_(values, non_blocking=True)
        self._on_its_way = torch.cuda.Event()
        self._on_its_way.record()

    def _judge(self, values: list[float], window: int) -> None:
        low, high, _, finite, skipped, _ = values
        if not self._told_equal and window >= _FEWEST and high > 0 and high - low <= _EQUAL * high:
            self._told_equal = True
            logger.warning(
                "the gradient norm was %.4g in each of the last %d steps, as it is where gradients are clipped before "
                "the optimizer measures them: the LR ratio can't fall. Let the optimizer clip (max_norm, "
                "SOLVER.CLIP_GRADIENTS), or call optimizer.record_norm() after backward() and before the clipping",
                high, window,
            )  # fmt: skip
        if skipped >= self._next_many and skipped >= _SHARE * (finite + skipped):
            while skipped >= self._next_many:
                self._next_many *= 10
            logger.warning(
                "%d of %d steps were skipped, as the gradient norm was inf or NaN: look at the learning rate, the "
                "loss and the data; under AMP, at the loss scale",
                skipped, finite + skipped,
            )  # fmt: skip


class StreakReader:
    """Reads a counter off the device without waiting for it: the value is one that it had a few steps ago."""

    def __init__(self) -> None:
        self._copy: Tensor | None = None
        self._copied: torch.cuda.Event | None = None

    def read(self, streak: Tensor) -> int:
        """The newest value of ``streak`` (0-dim, integer) that has arrived on the host; 0 if none has."""
        if type(streak) is not Tensor or streak.is_meta:
            return 0  # a fake tensor's
        if streak.device.type != "cuda":
            return int(streak)
        if torch.cuda.is_current_stream_capturing():
            return 0
        value = 0
        if self._copy is None or self._copied is None:
            self._copy = torch.zeros((), dtype=streak.dtype, device="cpu", pin_memory=True)
            self._copied = torch.cuda.Event()
        elif self._copied.query():
            value = int(self._copy)
        else:
            return 0
        self._copy.copy_(streak, non_blocking=True)
        self._copied.record()
        return value
