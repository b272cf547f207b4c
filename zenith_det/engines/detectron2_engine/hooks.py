"""Hooks for Detectron2's trainers."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

from detectron2.engine import HookBase, hooks
from detectron2.utils import comm
from torch.optim import Optimizer

from zenith_det.engines.detectron2_engine.overrides import grad_scaler_of, own_step
from zenith_det.optim import measure_after_backward, zenith_of
from zenith_det.optim.raw_norm import RawNorm
from zenith_det.solver import eval_mode, train_mode
from zenith_det.training.course.resuming import forget_history
from zenith_det.training.logs.zenith_metrics import optimizer_scalars

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

    Reading the values synchronises with the device, so it happens only at iterations that a writer writes. In the
    storage's history of ``lr``, the iterations in between hold the scheduled LR.

    Before training it also forgets ZENITH's history where a run is resumed with another batch size, which changes
    the noise in the norm; and where the trainer's step is the project's own, which may clip gradients between
    ``backward()`` and ``step()``, it has the norm measured as ``backward()`` ends.

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
        self._raw_norm: RawNorm | None = None

    def before_train(self) -> None:
        optimizer = self._optimizer or self.trainer.optimizer
        self._evaluate_averaged_weights(optimizer)
        self._measure_raw_norms(optimizer)
        if self._saved_batch_size is not None and self._batch_size is not None:
            forget_history(optimizer, self._saved_batch_size, self._batch_size, keep=self._keep_history)
            self._saved_batch_size = self._batch_size
        self._periods = [self._period] if self._period else self._writer_periods()
        # Right after the step, not in after_step: the scheduler hook has moved the LR on by then.
        self._handle = optimizer.register_step_post_hook(self._after_optimizer_step)

    def _evaluate_averaged_weights(self, optimizer: Optimizer) -> None:
        """Evaluate and save the weights that Schedule-Free averages, and train on with its own."""
        if not callable(getattr(optimizer, "eval", None)):
            return
        for hook in self.trainer._hooks:
            if isinstance(hook, hooks.EvalHook):
                hook._func = _in_eval_mode(optimizer, hook._func)
        checkpointer = getattr(self.trainer, "checkpointer", None)
        if checkpointer is not None:
            checkpointer.save = _in_eval_mode(optimizer, checkpointer.save)
        train_mode(optimizer)  # what was loaded holds the averaged weights

    def _measure_raw_norms(self, optimizer: Optimizer) -> None:
        """Where a project's own step may clip before ``optimizer.step``, measure the norm as the gradients come."""
        if zenith_of(optimizer) is not None and own_step(self.trainer) is not None:
            self._raw_norm = measure_after_backward(optimizer, grad_scaler_of(self.trainer))

    def after_train(self) -> None:
        for handle in (self._handle, self._raw_norm):
            if handle is not None:
                handle.remove()
        self._handle = self._raw_norm = None

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


def _in_eval_mode(optimizer: Optimizer, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        eval_mode(optimizer)
        try:
            return function(*args, **kwargs)
        finally:
            train_mode(optimizer)

    return wrapped
