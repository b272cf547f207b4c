"""Detectron2's trainer with ZENITH, for people who have none of their own."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from detectron2.engine import DefaultTrainer, hooks
from detectron2.engine.train_loop import HookBase
from detectron2.evaluation import DatasetEvaluator
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.modeling import GeneralizedRCNNWithTTA
from detectron2.utils import comm
from detectron2.utils.events import EventStorage, EventWriter, JSONWriter
from torch import nn

from zenith_det.engines.detectron2_engine.accumulation import accumulated_step
from zenith_det.engines.detectron2_engine.checkpoint import SafeCheckpointer
from zenith_det.engines.detectron2_engine.data import build_loss_loader, build_test_loader
from zenith_det.engines.detectron2_engine.data_order import DataOrder, build_train_loader, run_seed
from zenith_det.engines.detectron2_engine.evaluation import build_evaluator, note_evaluated, results_dir
from zenith_det.engines.detectron2_engine.mixin import ZenithTrainerMixin
from zenith_det.engines.detectron2_engine.models import connect_top_level, skip_missing_masks
from zenith_det.engines.detectron2_engine.own_trainer import ZenithHooks
from zenith_det.engines.detectron2_engine.writers import LoggerWriter, MetricsWriter
from zenith_det.errors import CheckpointError, RunStopped, UserError
from zenith_det.evaluation import check_expected
from zenith_det.training.checkpoints import averaging
from zenith_det.training.checkpoints.averaging import WeightAverage
from zenith_det.training.checkpoints.best_checkpoint import BestCheckpoint
from zenith_det.training.checkpoints.checkpoint import FINAL_NAME, Checkpointer
from zenith_det.training.course.evaluations import Evaluations, follow_evaluations
from zenith_det.training.course.resuming import configured_groups, reapply, shares_state
from zenith_det.training.course.seeding import seed_all, seed_step
from zenith_det.training.course.validation_loss import validation_losses
from zenith_det.training.failures.bad_steps import StepGuard, bad_step_limit, guard_forward
from zenith_det.training.failures.divergence import LossWatch
from zenith_det.training.failures.recovery import Diverged
from zenith_det.training.logs.loggers import build_loggers
from zenith_det.training.logs.zenith_metrics import effective_lr, optimizer_scalars
from zenith_det.training.processes.agreement import check_steps_agree
from zenith_det.training.processes.distributed import (
    agree_on_maximum,
    all_gather_objects,
    barrier,
)
from zenith_det.training.processes.stopping import EvaluationStopped, StopRequest, describe_stop, stop_code
from zenith_det.training.processes.worker_signals import starting_workers

logger = logging.getLogger(__name__)

LOG_PERIOD = 20


class ZenithTrainer(ZenithTrainerMixin, DefaultTrainer):  # type: ignore[misc]
    """Detectron2's ``DefaultTrainer`` with ZENITH, made for runs that must not be lost.

    Checkpoints are written whole or not at all and never run code when they are read. A resumed run repeats the
    uninterrupted one bit for bit: the images and all random choices come from ``seed``, see :class:`DataOrder`.
    Steps whose loss or gradient isn't finite are skipped and reported (:class:`StepGuard`); signals and a
    deadline end a run with everything saved (:class:`StopRequest`). There is an evaluator for each of
    Detectron2's datasets.

    Attributes:
        seed: ``SEED``, or one drawn at random where that is negative; a resumed run's is its checkpoint's.
    """

    def __init__(self, cfg: Any, *args: Any, **kwargs: Any) -> None:
        self.seed = run_seed(cfg)
        seed_all(self.seed)  # the model's initialisation
        self._why_stop = 0
        self._unwritten = False  # an evaluation is not in metrics.json yet
        self._metrics_writer: MetricsWriter | None = None
        super().__init__(cfg, *args, **kwargs)
        output_dir = Path(self.cfg.OUTPUT_DIR)
        self.guard = StepGuard(
            self._plain_model(),
            self.optimizer,
            getattr(self._trainer, "grad_scaler", None),
            output_dir,
            limit=bad_step_limit(self.cfg),
            last_good=lambda: self.checkpointer.last_good,
        )
        self.watch = LossWatch(self.cfg.RECOVERY.DIVERGENCE_FACTOR)
        self.average = WeightAverage.of(self.cfg, self._plain_model())
        self._evaluations: Evaluations | None = None
        self._end_reason: str | None = None
        self.checkpointer.live_facts = self._facts

    def _plain_model(self) -> nn.Module:
        model: nn.Module = self.model
        return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model

    def _facts(self) -> dict[str, Any]:
        average = {} if self.average is None else {"average": self.average.state_dict()}
        return average | {
            "seed": self.seed,
            "guard": self.guard.state_dict(),
            "watch": self.watch.state_dict(),
            "good": self.guard.streak == 0 and self.watch.looks_good(),
        }

    def resume_or_load(self, resume: bool = True) -> None:
        """Go on from the newest whole checkpoint, or load ``MODEL.WEIGHTS``.

        Raises:
            CheckpointError: see :class:`SafeCheckpointer`; the state of another model or optimizer.
        """
        state = self.checkpointer.resume_or_load(self.cfg.MODEL.WEIGHTS, resume=resume)
        if resume and self.checkpointer.has_checkpoint():
            self.start_iter = int(state["iteration"]) + 1
            if "guard" in state:
                self.guard.load_state_dict(state["guard"])
                self.watch.load_state_dict(state["watch"])
            if self.average is not None:
                self.average.resume(state, self.checkpointer.get_checkpoint_file())
        elif self.average is not None:
            self.average.restart()  # from the weights just loaded

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint's state; the present configuration's hyperparameters win.

        Another optimizer starts with an empty state (SGD and ZENITH share theirs).
        """
        before = self.checkpointer.saved_config.get("SOLVER.OPTIMIZER", self.cfg.SOLVER.OPTIMIZER)
        now = self.cfg.SOLVER.OPTIMIZER
        if not shares_state(before, now):
            fresh = {**state_dict["_trainer"], "optimizer": self.optimizer.state_dict()}
            state_dict = {**state_dict, "_trainer": fresh}
        scaler = getattr(self._trainer, "grad_scaler", None)
        if scaler is not None and not state_dict["_trainer"].get("grad_scaler"):
            # The run so far had none, or one that was off.
            kept = {**state_dict["_trainer"], "grad_scaler": scaler.state_dict()}
            state_dict = {**state_dict, "_trainer": kept}
        configured = configured_groups(self.optimizer)
        try:
            super().load_state_dict(state_dict)
        except (RuntimeError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"the checkpoint in {self.cfg.OUTPUT_DIR} is of another optimizer or parameter groups "
                f"({' '.join(str(error).split())[:300]}): use another OUTPUT_DIR, or give it as MODEL.WEIGHTS to "
                "load its weights"
            ) from error
        reapply(self.optimizer, configured)
        base_lrs = [values["initial_lr"] for values in configured]
        if self.scheduler.base_lrs != base_lrs:  # Detectron2's own schedulers load them
            self.scheduler.base_lrs = base_lrs
            for group, lr in zip(self.optimizer.param_groups, self.scheduler.get_lr()):
                group["lr"] = lr

    def train(self, stop: StopRequest | None = None, *, evaluate_first: bool = False) -> Any:
        """Detectron2's training loop, which ends when it is asked to.

        Args:
            stop: asked after each iteration; default: one that catches signals while training.
            evaluate_first: the evaluation that was due where a resumed run stopped did not take place.

        Returns:
            The results of the last evaluation, as ``DefaultTrainer.train`` does.

        Raises:
            RunStopped: ``stop`` said so; everything is saved.
            Diverged: the loss, or gradients that stayed non-finite, left nothing to go on with.
            RanksDisagreeError: the processes have drifted apart.
            UnexpectedResultsError: the last evaluation is not what ``TEST.EXPECTED_RESULTS`` says.
        """
        with contextlib.ExitStack() as stack:
            if stop is None:
                stop = stack.enter_context(StopRequest(main=comm.is_main_process()))
            self.storage = stack.enter_context(EventStorage(self.start_iter))
            logger.info("Starting training from iteration %d", self.start_iter)
            self.iter = self.start_iter
            finished = False
            try:
                self.before_train()
                with starting_workers():
                    _ = self._trainer._data_loader_iter  # made when it is first asked for
                if comm.is_main_process():
                    self._evaluations = Evaluations(self.cfg, Path(self.cfg.OUTPUT_DIR), self.start_iter)
                self._end_reason = follow_evaluations(self._evaluations, self.scheduler)
                if evaluate_first:
                    self.iter = self.start_iter - 1
                    for hook in self._hooks:
                        if isinstance(hook, hooks.EvalHook) and hook._period:
                            hook._do_eval()
                    self._write_evaluation()
                for iteration in range(self.start_iter, self.max_iter):
                    if self._end_reason:
                        self._end(iteration - 1)
                        break
                    self.iter = iteration
                    started = time.perf_counter()
                    self.before_step()
                    self.run_step()
                    took = time.perf_counter() - started
                    self._why_stop = self._agree(stop)
                    self.after_step()
                    self._write_evaluation()
                    stop.note_iteration(took)
                    if self._why_stop:
                        self._save_and_stop(stop)
                if self.average is not None and comm.is_main_process():
                    path = self._save_averaged(FINAL_NAME + averaging.SUFFIX, iteration=self.iter)
                    logger.info("saved %s, with the averaged weights", path)
                self.iter += 1
                finished = True
                self.after_train()
            except EvaluationStopped:
                (self._why_stop,) = agree_on_maximum([stop.code()])
                self._save_and_stop(stop)
            except Exception as error:
                if not isinstance(error, UserError | Diverged):
                    logger.exception("Exception during training:")
                raise
            finally:
                if not finished:
                    for hook in self._hooks:
                        if not isinstance(hook, hooks.EvalHook):
                            hook.after_train()
        results = getattr(self, "_last_eval_results", None)
        if comm.is_main_process():
            check_expected(self.cfg.TEST.EXPECTED_RESULTS, flatten_results_dict(results or {}))
        return results

    def _write_evaluation(self) -> None:
        """Log an evaluation at once: Detectron2's writers take the newest alone, every 20 iterations."""
        if self._unwritten and self._metrics_writer is not None:
            self._metrics_writer.write()
        self._unwritten = False

    def _end(self, last: int) -> None:
        """End the run before ``SOLVER.MAX_ITER``, as the evaluations ask for."""
        logger.info("the run ends after iteration %d: %s", last, self._end_reason)
        self.iter = last
        self.guard.inspect()
        if comm.is_main_process():
            self.checkpointer.save(FINAL_NAME, iteration=last)

    def run_step(self) -> None:
        """One iteration, with the random numbers that belong to it, unless its gradient isn't finite."""
        seed_step(self.seed, self.iter)
        self._trainer.iter = self.iter
        loss = accumulated_step(self._trainer, self.cfg.SOLVER.GRADIENT_ACCUMULATION, self.guard)
        self.watch.add(loss if loss is not None else math.nan)
        if self.average is not None:
            self.average.update()
        done = self.iter + 1
        if done % LOG_PERIOD == 0:
            check_steps_agree(self.iter, optimizer_scalars(self.optimizer))
        if done % self.cfg.SOLVER.CHECKPOINT_PERIOD == 0 or done == self.max_iter:
            self.guard.inspect()  # by all processes, before the first one alone saves

    def _agree(self, stop: StopRequest) -> int:
        """All processes come to one decision: 0 to go on, or the code to stop with."""
        lost = self.guard.verdict() or self.watch.verdict()
        why, any_lost = agree_on_maximum([stop.code(), int(lost is not None)])
        if any_lost:
            reason = next(r for r in all_gather_objects(lost) if r)
            raise Diverged(self.iter, reason, effective_lr(self.optimizer))
        return why

    def _save_and_stop(self, stop: StopRequest) -> None:
        """Save where the run stands, unless that has been done, and end it."""
        done = min(self.iter + 1, self.max_iter)
        started = time.perf_counter()
        if done < self.max_iter and done % self.cfg.SOLVER.CHECKPOINT_PERIOD:
            self.guard.inspect()
            if comm.is_main_process():
                self.checkpointer.save(f"model_{done - 1:07d}", iteration=done - 1)
        barrier()
        stop.note_save(time.perf_counter() - started)
        raise RunStopped(
            f"after iteration {done - 1}: {describe_stop(self._why_stop)}; everything is saved in "
            f"{self.cfg.OUTPUT_DIR}: go on with --resume"
        )

    def _make_zenith_hooks(self) -> ZenithHooks:
        return ZenithHooks(self, metrics_alone=True)

    def before_train(self) -> None:
        """Only the hooks' part: the command has logged the rest."""
        DefaultTrainer.before_train(self)

    def build_hooks(self) -> list[HookBase]:
        """The hooks of ``DefaultTrainer``, with a checkpointer that is safe to interrupt."""
        # The base class makes a DetectionCheckpointer just before it asks for the hooks that use it.
        self.checkpointer = SafeCheckpointer(
            self.model,
            self.cfg.OUTPUT_DIR,
            allow_mismatch=self.cfg.MODEL.WEIGHTS_ALLOW_MISMATCH,
            keep=self.cfg.CHECKPOINT.KEEP or None,
            trainer=weakref.proxy(self),
        )
        built = [*super().build_hooks(), DataOrder()]
        for hook in built:
            if isinstance(hook, hooks.EvalHook):
                hook._func = self._unless_stopping(hook._func)
        if self.cfg.TEST.AUG.ENABLED and self.cfg.DATASETS.TEST:
            # Before the writers: they close when training ends.
            writers = [i for i, hook in enumerate(built) if isinstance(hook, hooks.PeriodicWriter)]
            place = writers[0] if writers else len(built)
            built.insert(place, hooks.EvalHook(0, lambda: self.test_with_tta(self.cfg, self.model)))
        return built

    def _unless_stopping(self, evaluate: Callable[[], Any]) -> Callable[[], Any]:
        """An evaluation that leaves itself out in a run that has to end, and keeps the best model."""
        best: BestCheckpoint | None = None

        def wrapped() -> Any:
            nonlocal best
            if self._why_stop:
                return {}
            results = evaluate()
            last = min(self.iter, self.max_iter - 1)
            note_evaluated(self.cfg, averaged=False, iteration=last)
            if self.cfg.TEST.VALIDATION_LOSS:
                results = {**(results or {}), **self._validation_losses()}
            if self.average is not None:
                results = self._last_eval_results = {**results, **self._test_averaged()}
            if self._evaluations is not None:
                self._evaluations.add(self.iter, flatten_results_dict(results or {}))
            self._end_reason = follow_evaluations(self._evaluations, self.scheduler)
            self._unwritten = True
            if comm.is_main_process():
                if best is None:
                    folder = Checkpointer(self.cfg.OUTPUT_DIR)
                    rolled_back = self.checkpointer.facts.get("recovery", {}).get("rollbacks", 0) > 0
                    best = BestCheckpoint(
                        folder, self.cfg.CHECKPOINT.BEST, resumed=self.start_iter > 0 or rolled_back
                    )
                best.offer(
                    flatten_results_dict(results or {}),
                    last,
                    functools.partial(self._save_best, averaged=best.of_average, iteration=last),
                )
            return results

        return wrapped

    def _save_best(self, name: str, more: dict[str, Any], *, averaged: bool, iteration: int) -> None:
        if averaged:
            self._save_averaged(name, iteration=iteration, **more)
        else:
            self.checkpointer.save(name, mark_last=False, iteration=iteration, **more)

    def _save_averaged(self, name: str, **facts: Any) -> Path:
        assert self.average is not None
        state = self.average.checkpoint({**self.checkpointer.facts, **facts})
        return Checkpointer(self.cfg.OUTPUT_DIR).save(name, state, mark_last=False)

    def _test_averaged(self) -> dict[str, Any]:
        """Evaluate the averaged weights: ``averaged/`` + task -> metric -> percent."""
        assert self.average is not None
        logger.info("with averaged weights (SOLVER.AVERAGE.KIND %s):", self.cfg.SOLVER.AVERAGE.KIND)
        names = self.cfg.DATASETS.TEST
        evaluators = [
            self.build_evaluator(self.cfg, name, results_dir(self.cfg, name, averaged=True)) for name in names
        ]
        with self.average.applied():
            results = self.test(self.cfg, self.model, evaluators)
            note_evaluated(self.cfg, averaged=True, iteration=min(self.iter, self.max_iter - 1))
            if self.cfg.TEST.VALIDATION_LOSS:
                results.update(self._validation_losses())
        return {averaging.PREFIX + task: metrics for task, metrics in results.items()}

    def _validation_losses(self) -> dict[str, float]:
        """The training losses on the test sets; the models' own scalars go nowhere."""
        found: dict[str, float] = {}
        for name in self.cfg.DATASETS.TEST:
            with EventStorage():
                losses = validation_losses(
                    self._plain_model(),
                    build_loss_loader(self.cfg, name),
                    seed=self.seed,
                    should_stop=stop_code,
                )
            if any(agree_on_maximum([stop_code()])):
                raise EvaluationStopped
            prefix = "" if len(self.cfg.DATASETS.TEST) == 1 else f"{name}/"
            found |= {prefix + key: value for key, value in losses.items()}
        return found

    def build_writers(self) -> list[EventWriter]:
        """Detectron2's writers, with a ``metrics.json`` that stays one run's when it is resumed."""
        path = os.path.join(self.cfg.OUTPUT_DIR, "metrics.json")
        ours = self._metrics_writer = MetricsWriter(path, weakref.proxy(self))
        theirs = [ours if isinstance(writer, JSONWriter) else writer for writer in super().build_writers()]
        loggers = build_loggers(self.cfg, self.cfg.OUTPUT_DIR) if "LOGGERS" in self.cfg else []
        return [*theirs, *(LoggerWriter(logger) for logger in loggers)]

    @classmethod
    def build_model(cls, cfg: Any) -> nn.Module:
        """Detectron2's model; see :func:`connect_top_level` and :func:`skip_missing_masks`."""
        model: nn.Module = super().build_model(cfg)
        connect_top_level(model)
        skip_missing_masks(model)
        guard_forward(model)
        return model

    @classmethod
    def build_train_loader(cls, cfg: Any) -> Any:
        """Detectron2's loader, in an order that a resumed run goes on with."""
        return build_train_loader(cfg)

    @classmethod
    def build_test_loader(cls, cfg: Any, dataset_name: str) -> Any:
        """The base class's loader, of the first ``TEST.MAX_IMAGES`` images (0: all)."""
        return build_test_loader(cfg, dataset_name)

    @classmethod
    def build_evaluator(
        cls, cfg: Any, dataset_name: str, output_folder: str | None = None
    ) -> DatasetEvaluator:
        """See :func:`zenith_det.engines.detectron2_engine.build_evaluator`."""
        return build_evaluator(cfg, dataset_name, output_folder)

    @classmethod
    def test_with_tta(cls, cfg: Any, model: nn.Module) -> OrderedDict[str, Any]:
        """Evaluate with test-time augmentation (``TEST.AUG``): task + "_TTA" -> metric -> percent."""
        logger.info("Evaluating with test-time augmentation")
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        folder = os.path.join(cfg.OUTPUT_DIR, "inference_TTA")
        evaluators = [cls.build_evaluator(cfg, name, folder) for name in cfg.DATASETS.TEST]
        results = cls.test(cfg, GeneralizedRCNNWithTTA(cfg, model), evaluators)
        return OrderedDict((f"{task}_TTA", metrics) for task, metrics in results.items())
