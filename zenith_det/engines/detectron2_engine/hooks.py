"""Hooks for Detectron2's trainers."""

from __future__ import annotations

import logging
from typing import Any

from detectron2.engine import HookBase, hooks
from detectron2.utils import comm
from torch.optim import Optimizer

from zenith_det.solver import train_mode
from zenith_det.training.resuming import forget_history
from zenith_det.training.zenith_metrics import optimizer_scalars

logger = logging.getLogger(__name__)

DEFAULT_PERIOD = 20  # of Detectron2's own PeriodicWriter


class ZenithMetrics(HookBase):
    """Log the LR that the update used as ``lr``, and what it was made from under ``zenith/``.

    Puts ``lr``, ``zenith/ratio``, ``zenith/grad_norm``, ``zenith/window_mean``, ``zenith/zenith`` and
    ``zenith/skipped_steps`` into the trainer's storage, from where ``metrics.json``, TensorBoard and the
    console take them. For an optimizer without such a ratio it puts ``lr`` alone.

    Register it after Detectron2's ``LRScheduler`` hook, which puts the *scheduled* LR as ``lr`` and would
    otherwise win, and before the writers::

        trainer.register_hooks([hooks.LRScheduler(...), ZenithMetrics(), ..., hooks.PeriodicWriter(...)])

    Reading the values synchronises with the device, so that it happens only at iterations that a writer
    writes. In the storage's history of ``lr``, the iterations between hold the scheduled LR.

    Before training it also forgets ZENITH's history where a run is resumed with another batch size, which changes
    the noise in the norm.

    Args:
        optimizer: default: the trainer's.
        period: iterations between two readings. Default: whenever one of the trainer's ``PeriodicWriter``
            hooks writes; processes without one (all but the first) read nothing.
        batch_size: images per iteration over all processes; ``None``: not compared on resuming.
        keep_history: keep ZENITH's history where it differs.
    """

    def __init__(
        self,
        optimizer: Optimizer | None = None,
        period: int | None = None,
        *,
        batch_size: int | None = None,
        keep_history: bool = False,
    ) -> None:
        if period is not None and period < 1:
            raise ValueError(f"period is {period}: it must be 1 or more")
        self._optimizer = optimizer
        self._period = period
        self._batch_size = batch_size
        self._keep_history = keep_history
        self._saved_batch_size = batch_size
        self._scalars: dict[str, float] | None = None
        self._handle: Any = None

    def before_train(self) -> None:
        optimizer = self._optimizer or self.trainer.optimizer
        train_mode(optimizer)  # Schedule-Free's checkpoints hold the averaged weights
        if self._saved_batch_size is not None and self._batch_size is not None:
            forget_history(optimizer, self._saved_batch_size, self._batch_size, keep=self._keep_history)
            self._saved_batch_size = self._batch_size
        self._periods = [self._period] if self._period else self._writer_periods()
        # Right after the step, not in after_step: the scheduler hook has moved the LR on by then.
        self._handle = optimizer.register_step_post_hook(self._after_optimizer_step)

    def after_train(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def after_step(self) -> None:
        if self._scalars is None:
            return
        storage = self.trainer.storage
        storage.put_scalars(**self._scalars, smoothing_hint=False)
        if len(self._scalars) > 1 and comm.is_main_process():
            # Detectron2's console printer shows losses, times and the LR only.
            shown = "  ".join(f"{name}: {value:.4g}" for name, value in self._scalars.items())
            logger.info("iter: %d  %s", storage.iter, shown)
        self._scalars = None

    def state_dict(self) -> dict[str, Any]:
        return {} if self._batch_size is None else {"batch_size": self._batch_size}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        # The optimizer's own state is loaded after the hooks': compared in before_train.
        self._saved_batch_size = state["batch_size"] if self._batch_size is not None else None

    def _after_optimizer_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        iteration, last = self.trainer.iter, self.trainer.max_iter - 1
        if self._periods and (iteration == last or any((iteration + 1) % p == 0 for p in self._periods)):
            self._scalars = optimizer_scalars(optimizer)

    def _writer_periods(self) -> list[int]:
        writers = [hook for hook in self.trainer._hooks if isinstance(hook, hooks.PeriodicWriter)]
        if not writers and comm.is_main_process():
            return [DEFAULT_PERIOD]
        return [writer._period for writer in writers]
