"""Detectron2's trainer with ZENITH, for people who have none of their own."""

from __future__ import annotations

import functools
import weakref
from pathlib import Path
from typing import Any

from detectron2.engine import DefaultTrainer, hooks
from detectron2.engine.train_loop import HookBase
from detectron2.evaluation import DatasetEvaluator, inference_context
from detectron2.utils import comm
from detectron2.utils.events import EventWriter, JSONWriter
from torch import nn

from zenith_det.engines.detectron2_engine.checkpoint import SafeCheckpointer
from zenith_det.engines.detectron2_engine.data import build_test_loader
from zenith_det.engines.detectron2_engine.endings import ending_the_run
from zenith_det.engines.detectron2_engine.engine import ENGINE, check_tta, test_set
from zenith_det.engines.detectron2_engine.evaluation import build_evaluator, unless_stopped
from zenith_det.engines.detectron2_engine.exact_resume import ResumeExactly, TrainLoader
from zenith_det.engines.detectron2_engine.mixin import ZenithTrainerMixin
from zenith_det.engines.detectron2_engine.models import as_the_built_in_engine
from zenith_det.engines.detectron2_engine.writers import LoggerWriter
from zenith_det.engines.evaluating import Evaluator
from zenith_det.engines.input_format import check_channels
from zenith_det.engines.prefetch import Prefetcher
from zenith_det.engines.trainer import LOG_PERIOD
from zenith_det.errors import RunStopped, UserError
from zenith_det.training.course.resuming import loading_state, shares_state
from zenith_det.training.course.seeding import seed_all
from zenith_det.training.course.starting import choose_seed
from zenith_det.training.logs.events import JsonWriter
from zenith_det.training.logs.zenith_metrics import optimizer_scalars
from zenith_det.training.processes.agreement import check_steps_agree, raise_together
from zenith_det.training.processes.ddp import unwrap
from zenith_det.training.processes.distributed import agree_on_maximum, barrier
from zenith_det.training.processes.stopping import (
    EvaluationStopped,
    StopRequest,
    WaitStopped,
    describe_stop,
    stop_code,
)


class ZenithTrainer(ZenithTrainerMixin, DefaultTrainer):  # type: ignore[misc]
    """Detectron2's ``DefaultTrainer`` under :class:`ZenithTrainerMixin`, with an evaluator for each of Detectron2's
    datasets, for runs that must not be lost.

    Checkpoints are written whole or not at all and never run code when they are read
    (:class:`SafeCheckpointer`). A resumed run repeats the uninterrupted one bit for bit, and the images come in the
    order of ``zenith-det train`` (:class:`ResumeExactly`). A signal ends a run with everything saved.

    Attributes:
        seed: ``SEED``, or one drawn at random where that is negative; a resumed run's is its checkpoint's.
    """

    _done = 0  # iterations

    def __init__(self, cfg: Any, *args: Any, **kwargs: Any) -> None:
        check_channels(cfg)
        check_tta(cfg)
        self.seed = choose_seed(cfg.SEED)
        seed_all(self.seed)  # the model's initialisation
        super().__init__(cfg, *args, **kwargs)

    def build_hooks(self) -> list[HookBase]:
        """The hooks of ``DefaultTrainer``, with a checkpointer that is safe to interrupt."""
        # The base class makes a DetectionCheckpointer just before it asks for the hooks that use it.
        self.checkpointer = SafeCheckpointer(
            self.model,
            self.cfg.OUTPUT_DIR,
            allow_mismatch=self.cfg.MODEL.WEIGHTS_ALLOW_MISMATCH,
            trainer=weakref.proxy(self),
        )
        built = [*super().build_hooks(), ResumeExactly()]
        for hook in built:
            if isinstance(hook, hooks.PreciseBN):
                hook.update_stats = functools.partial(
                    _exact_statistics, weakref.proxy(self), hook._data_loader
                )
        if self.cfg.TEST.AUG.ENABLED:
            evaluation = next(i for i, hook in enumerate(built) if isinstance(hook, hooks.EvalHook))
            built.insert(evaluation + 1, hooks.EvalHook(0, self._evaluate_with_tta))
        return built

    def _evaluate_with_tta(self) -> dict[str, float]:
        sets = [test_set(name) for name in self.cfg.DATASETS.TEST]
        evaluator = Evaluator(ENGINE, sets, Path(self.cfg.OUTPUT_DIR))
        model = unwrap(self.model)
        with inference_context(model):
            return evaluator.with_tta(self.cfg, model)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint's state; the present configuration's hyperparameters win.

        Another optimizer starts with an empty state (SGD and ZENITH share theirs).

        Raises:
            CheckpointError: it is of another optimizer or parameter groups.
        """
        now = self.cfg.SOLVER.OPTIMIZER
        config = state_dict.get("hooks", {}).get("ResumeExactly", {}).get("config", {})
        saved, fresh = state_dict["_trainer"], self._trainer.state_dict()
        kept = {key: value for key, value in saved.items() if value != {}}  # a GradScaler that was off
        if not shares_state(config.get("SOLVER.OPTIMIZER", now), now):
            kept["optimizer"] = fresh["optimizer"]
        with loading_state(self.optimizer, f"the checkpoint in {self.cfg.OUTPUT_DIR}"):
            super().load_state_dict({**state_dict, "_trainer": {**fresh, **kept}})
        base_lrs = [group["initial_lr"] for group in self.optimizer.param_groups]
        if self.scheduler.base_lrs != base_lrs:  # Detectron2's own schedulers load them
            self.scheduler.base_lrs = base_lrs
            for group, lr in zip(self.optimizer.param_groups, self.scheduler.get_lr()):
                group["lr"] = lr

    def train(self) -> Any:
        """Detectron2's training loop, which ends when it is asked to.

        Returns:
            The results of the last evaluation.

        Raises:
            RunStopped: by a signal; everything is saved.
            TrainingDivergedError: going back did not help.
            RanksDisagreeError: the processes have drifted apart.
        """
        with StopRequest(main=comm.is_main_process()):
            try:
                super().train()
            except EvaluationStopped:
                (why,) = agree_on_maximum([stop_code(waiting=True)])
                self._save()
                raise RunStopped(self._ended(describe_stop(why))) from None
        return getattr(self, "_last_eval_results", None)

    def before_train(self) -> None:
        """The hooks'; then the first batch is waited for."""
        with ending_the_run():
            super().before_train()
            self._done = self.start_iter
            self._go_on(self._next_batch())

    def run_step(self) -> None:
        """The mix-in's; an image that can't be used ends the run in one line."""
        with ending_the_run():
            super().run_step()

    def after_step(self) -> None:
        """The hooks'; then the processes see whether they agree, and whether to end."""
        with ending_the_run():
            self._done = self.iter + 1
            failure = self._next_batch()  # first, so that Detectron2's timer counts the wait
            super().after_step()
            if self._done % LOG_PERIOD == 0:
                check_steps_agree(self.iter, optimizer_scalars(self.optimizer))
            self._go_on(failure)

    def _next_batch(self) -> Exception | None:
        """Wait for it; why there is none."""
        batches = self._trainer.data_loader
        if self._done >= self.max_iter or not isinstance(batches, Prefetcher):
            return None
        batches.prefetch()
        return batches.failure

    def _go_on(self, failure: Exception | None) -> None:
        """End the run on all processes where one was told to, or has no next batch, for ``failure``.

        Raises:
            EvaluationStopped: a signal came.
            UserError: what the loader of a process has failed with; everything is saved.
        """
        waiting = isinstance(failure, WaitStopped)
        why, no_batch = agree_on_maximum([stop_code(waiting=waiting), int(failure is not None)])
        if why:
            raise EvaluationStopped
        if no_batch:
            self._save()
            raise_together(UserError(self._ended(failure)) if isinstance(failure, UserError) else failure)

    def _save(self) -> None:
        """Save where the run stands, unless that has been done."""
        done = self._done
        if self.start_iter < done < self.max_iter and done % self.cfg.SOLVER.CHECKPOINT_PERIOD:
            self.checkpointer.save(f"model_{done - 1:07d}", iteration=done - 1)
        barrier()

    def _ended(self, why: object) -> str:
        if self._done == self.start_iter:
            return f"before iteration {self._done}: {why}; no step was taken: start it again"
        return (
            f"after iteration {self._done - 1}: {why}; everything is saved in {self.cfg.OUTPUT_DIR}: go on with "
            "resume_or_load(resume=True)"
        )

    def build_writers(self) -> list[EventWriter]:
        """Detectron2's writers, with a ``metrics.json`` that stays one run's when it is resumed."""
        trainer = weakref.proxy(self)

        def metrics() -> JsonWriter:
            return JsonWriter(Path(trainer.cfg.OUTPUT_DIR, "metrics.json"), start_iter=trainer.start_iter)

        theirs = super().build_writers()
        return [LoggerWriter(metrics) if isinstance(writer, JSONWriter) else writer for writer in theirs]

    @classmethod
    def build_model(cls, cfg: Any) -> nn.Module:
        """Detectron2's model; see :func:`as_the_built_in_engine`."""
        model: nn.Module = super().build_model(cfg)
        as_the_built_in_engine(model)
        return model

    @classmethod
    def build_train_loader(cls, cfg: Any) -> Any:
        """Detectron2's images, in an order that a resumed run goes on with."""
        return TrainLoader(cfg)

    @classmethod
    def build_test_loader(cls, cfg: Any, dataset_name: str) -> Any:
        """The base class's loader, of the first ``TEST.MAX_IMAGES`` images (0: all)."""
        return build_test_loader(cfg, dataset_name)

    @classmethod
    def build_evaluator(
        cls, cfg: Any, dataset_name: str, output_folder: str | None = None
    ) -> DatasetEvaluator:
        """See :func:`zenith_det.engines.detectron2_engine.build_evaluator`."""
        return unless_stopped(build_evaluator(cfg, dataset_name, output_folder))


def _exact_statistics(trainer: Any, loader: Any) -> None:
    """What Detectron2's hook does, from the same images each time."""
    if isinstance(loader, TrainLoader):
        loader.seed = trainer.seed
    ENGINE.before_evaluation(trainer.cfg, trainer.model, lambda: iter(loader))
