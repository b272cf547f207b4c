"""Bad steps in a project's own trainer: left out, reported, and gone back from."""

from __future__ import annotations

import contextlib
import copy
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from detectron2.engine import HookBase, SimpleTrainer, hooks
from detectron2.utils import comm
from torch import Tensor, nn

from zenith_det.engines.detectron2_engine.average_hook import AverageWeights
from zenith_det.engines.detectron2_engine.endings import RunEnds
from zenith_det.engines.detectron2_engine.overrides import grad_scaler_of
from zenith_det.errors import TrainingDivergedError
from zenith_det.solver.lr_schedules import MultiplierLR
from zenith_det.training.checkpoints.checkpoint import Checkpointer
from zenith_det.training.failures.divergence import WINDOW, LossWatch
from zenith_det.training.failures.recovery import Diverged, Recovery, roll_back
from zenith_det.training.failures.step_guard import StepGuard
from zenith_det.training.logs.zenith_metrics import effective_lr
from zenith_det.training.processes.ddp import unwrap
from zenith_det.training.processes.distributed import broadcast_object

logger = logging.getLogger(__name__)


class GuardSteps(HookBase):
    """Leave out steps whose loss or gradient isn't finite, report them, and go back when the run is lost.

    ``SOLVER.MAX_NONFINITE_STEPS`` bad steps in a row, or a loss as ``RECOVERY.DIVERGENCE_FACTOR`` says, bring
    weights, optimizer and averaged weights back to the newest checkpoint that was saved while training went well, or
    to how the run began; all LRs are multiplied by ``RECOVERY.LR_FACTOR``. Images and iterations go on, as
    Detectron2's loop only counts forwards. After ``RECOVERY.MAX_ROLLBACKS`` of these the run ends with an error.

    Register it before what saves checkpoints, and after Detectron2's ``LRScheduler``.

    Args:
        cfg: ``SOLVER.MAX_NONFINITE_STEPS``, ``RECOVERY`` and ``OUTPUT_DIR`` count.

    Attributes:
        guard: from ``before_train`` on.
    """

    guard: StepGuard

    def __init__(self, cfg: Any) -> None:
        self._cfg = cfg
        self._recovery = Recovery.of(cfg)
        self._saved: dict[str, Any] = {}
        # Whether training went well at a save that note_saved has not seen.
        self._saved_good: bool | None = None
        self._newest_seen = ""
        self._beginning: dict[str, Any] | None = None
        self._undo: list[Callable[[], Any]] = []

    # The trainer's.

    @property
    def _model(self) -> nn.Module:
        return unwrap(self.trainer.model)

    @property
    def _scheduler(self) -> Any:
        for hook in self.trainer._hooks:
            if isinstance(hook, hooks.LRScheduler):
                return hook.scheduler
        return getattr(self.trainer, "scheduler", None)

    def before_train(self) -> None:
        trainer = self.trainer
        self.guard = StepGuard(self._cfg, self._model, trainer.optimizer, grad_scaler_of(trainer))
        self._newest_seen = self._newest()
        if self._saved:
            self.guard.load_state_dict(self._saved)
            self._recovery = Recovery.of(self._cfg, self._saved["recovery"])
            if isinstance(self._scheduler, MultiplierLR):  # others have loaded what they were scaled to
                self._scheduler.scale(self._recovery.lr_scale)
            if self._saved["good"]:
                self.guard.last_good = Path(self._newest_seen)
        self.guard.attach()
        self._undo.append(self.guard.detach)
        self._tolerate_bad_losses(getattr(trainer, "_trainer", trainer))
        self._tolerate_giving_up()
        if trainer.start_iter == 0 and self._cfg.RECOVERY.MAX_ROLLBACKS:
            self._beginning = {
                "model": {name: _on_the_host(value) for name, value in self._model.state_dict().items()},
                "optimizer": copy.deepcopy(trainer.optimizer.state_dict()),
            }

    def before_step(self) -> None:
        self.guard.begin(self.trainer.iter)
        self.note_saved()

    def note_saved(self) -> None:
        """See whether a checkpoint was saved, and whether while training went well."""
        if self._saved_good is None:
            return
        newest = self._newest()
        if newest != self._newest_seen and self._saved_good:
            self.guard.last_good = Path(newest)
            self._beginning = None
        self._saved_good, self._newest_seen = None, newest

    def after_step(self) -> None:
        guard, trainer = self.guard, self.trainer
        done = trainer.iter + 1
        saves = done % self._cfg.SOLVER.CHECKPOINT_PERIOD == 0 or done >= trainer.max_iter
        if saves or self._model_device() == "cpu":  # else at the next forward pass, without waiting
            guard.inspect()
        guard.watch.add(self._loss())
        # A bad step is bad on all ranks; the loss of all of them the first one alone knows.
        if comm.get_world_size() == 1 or done % WINDOW == 0 or guard.streak >= guard.limit:
            lost = broadcast_object(guard.verdict())
            if lost:
                self._go_back(lost)

    def after_train(self) -> None:
        while self._undo:
            self._undo.pop()()

    def state_dict(self) -> dict[str, Any]:
        if not hasattr(self, "guard"):
            return {}
        self._saved_good = self.guard.good
        return {**self.guard.state_dict(), "recovery": self._recovery.to_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._saved = state

    def _model_device(self) -> str:
        return next((parameter.device.type for parameter in self._model.parameters()), "cpu")

    def _loss(self) -> float:
        loss, at = self.trainer.storage.latest().get("total_loss", (math.nan, -1))
        return float(loss) if at == self.trainer.iter else math.nan

    def _tolerate_bad_losses(self, inner: Any) -> None:
        """Let Detectron2 not end the run, on its first process alone, for a loss that isn't finite."""
        if (
            not isinstance(inner, SimpleTrainer)
            or type(inner)._write_metrics is not SimpleTrainer._write_metrics
        ):
            return

        def write(losses: Any, data_time: float, prefix: str = "", iter: int | None = None) -> None:
            iteration = inner.iter if iter is None else iter
            data_time = getattr(inner.data_loader, "waited", data_time)  # of a batch that came ahead
            if (iteration + 1) % inner.gather_metric_period == 0:
                # Such a loss is reported with the step that is left out for it.
                with contextlib.suppress(FloatingPointError):
                    type(inner).write_metrics(losses, data_time, iteration, prefix)

        inner._write_metrics = write
        self._undo.append(lambda: vars(inner).pop("_write_metrics", None))

    def _tolerate_giving_up(self) -> None:
        """Let a step that raises ``FloatingPointError``, as many projects' do, count as one left out.

        In several processes the others would wait for the one that it happens on: there it ends the run.
        """
        trainer, guard = self.trainer, self.guard
        run_step = trainer.run_step
        if comm.get_world_size() > 1:
            return

        def tolerant() -> None:
            try:
                run_step()
            except FloatingPointError as error:
                logger.warning("the step gave up: %s", " ".join(str(error).split()))
                guard.left_out()

        trainer.run_step = tolerant
        self._undo.append(lambda: trainer.__dict__.pop("run_step", None))

    # Going back.

    def _go_back(self, reason: str) -> None:
        divergence = Diverged(self.trainer.iter, reason, effective_lr(self.trainer.optimizer))
        checkpointer = Checkpointer(self._cfg.OUTPUT_DIR)
        try:
            path, self._recovery = roll_back(
                divergence, self._recovery, self._cfg, checkpointer, self._newest_good
            )
            self._restore(path)
        except TrainingDivergedError as error:
            raise RunEnds(error) from None
        self._scale_lrs(float(self._cfg.RECOVERY.LR_FACTOR))

    def _newest_good(self) -> Path | None:
        good = self.guard.last_good
        if good is not None and good.exists():
            return good
        if self._beginning is None:
            raise TrainingDivergedError(
                "training diverged, and no checkpoint of a time when it went well is left to go back to: lower "
                "SOLVER.CHECKPOINT_PERIOD or SOLVER.BASE_LR"
            )
        return None

    def _restore(self, path: Path | None) -> None:
        """Bring weights, optimizer and hooks back; the LRs, the schedule and the iteration stay."""
        trainer, optimizer, scheduler = self.trainer, self.trainer.optimizer, self._scheduler
        iteration = trainer.iter
        position = copy.deepcopy(scheduler.state_dict()) if scheduler is not None else None
        lrs = [(group["lr"], group.get("initial_lr")) for group in optimizer.param_groups]
        if path is not None:
            trainer.checkpointer.load(str(path))
            self.guard.load_state_dict(self._saved)
        elif self._beginning is not None:
            self._model.load_state_dict(self._beginning["model"])
            optimizer.load_state_dict(copy.deepcopy(self._beginning["optimizer"]))
            self.guard.streak = 0
            self.guard.watch = LossWatch(self._cfg.RECOVERY.DIVERGENCE_FACTOR)
            for hook in trainer._hooks:
                if isinstance(hook, AverageWeights):
                    hook.average.restart()
        trainer.iter = iteration
        if scheduler is not None:
            scheduler.load_state_dict(position)
        for group, (lr, initial) in zip(optimizer.param_groups, lrs):
            group["lr"] = lr
            if initial is not None:
                group["initial_lr"] = initial

    def _scale_lrs(self, factor: float) -> None:
        scheduler = self._scheduler
        if isinstance(scheduler, MultiplierLR):
            scheduler.scale(factor)
            return
        if getattr(scheduler, "base_lrs", None) is not None:
            scheduler.base_lrs = [lr * factor for lr in scheduler.base_lrs]
        for group in self.trainer.optimizer.param_groups:
            group["lr"] = group["lr"] * factor
            if "initial_lr" in group:
                group["initial_lr"] = group["initial_lr"] * factor

    def _newest(self) -> str:
        """The file that ``last_checkpoint`` names; "" where there is none."""
        checkpointer = getattr(self.trainer, "checkpointer", None)
        return (
            str(checkpointer.get_checkpoint_file()) if checkpointer and checkpointer.has_checkpoint() else ""
        )


def _on_the_host(value: Any) -> Any:
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else copy.deepcopy(value)
