"""ZENITH under Detectron2's trainer: a mix-in for projects that have one, a trainer for those that don't."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
import time
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from detectron2.engine import AMPTrainer, DefaultTrainer, defaults, hooks
from detectron2.engine.train_loop import HookBase
from detectron2.evaluation import DatasetEvaluator
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.modeling import GeneralizedRCNNWithTTA
from detectron2.modeling.backbone.fpn import FPN, LastLevelMaxPool
from detectron2.utils import comm
from detectron2.utils.events import EventStorage, EventWriter, JSONWriter
from detectron2.utils.logger import setup_logger
from torch import nn

from zenith_det.engines.detectron2_engine.accumulation import accumulated_step, check_accumulation
from zenith_det.engines.detectron2_engine.checkpoint import SafeCheckpointer
from zenith_det.engines.detectron2_engine.data import build_loss_loader, build_test_loader
from zenith_det.engines.detectron2_engine.data_order import DataOrder, build_train_loader, run_seed
from zenith_det.engines.detectron2_engine.evaluation import build_evaluator, note_evaluated, results_dir
from zenith_det.engines.detectron2_engine.hooks import ZenithMetrics
from zenith_det.engines.detectron2_engine.pooling import pool_at_exact_boxes
from zenith_det.engines.detectron2_engine.writers import LoggerWriter, MetricsWriter
from zenith_det.engines.device import amp_dtype, make_grad_scaler
from zenith_det.engines.model_format import compile_backbone, use_channels_last
from zenith_det.errors import CheckpointError, ConfigError, RunStopped, UserError
from zenith_det.evaluation import check_expected
from zenith_det.solver import PlateauLR, build_lr_scheduler, build_optimizer, eval_mode, train_mode
from zenith_det.solver.registry import LR_SCHEDULER_REGISTRY
from zenith_det.training import averaging
from zenith_det.training.agreement import check_steps_agree
from zenith_det.training.averaging import WeightAverage
from zenith_det.training.bad_steps import StepGuard, bad_step_limit, guard_forward
from zenith_det.training.best_checkpoint import BestCheckpoint
from zenith_det.training.checkpoint import FINAL_NAME, Checkpointer
from zenith_det.training.distributed import (
    agree_on_maximum,
    all_gather_objects,
    barrier,
)
from zenith_det.training.divergence import LossWatch
from zenith_det.training.evaluations import Evaluations, follow_evaluations
from zenith_det.training.loggers import build_loggers
from zenith_det.training.recovery import Diverged
from zenith_det.training.resuming import configured_groups, reapply, shares_state
from zenith_det.training.seeding import seed_all, seed_step
from zenith_det.training.stopping import EvaluationStopped, StopRequest, describe_stop, stop_code
from zenith_det.training.validation_loss import validation_losses
from zenith_det.training.worker_signals import starting_workers
from zenith_det.training.zenith_metrics import effective_lr, optimizer_scalars

logger = logging.getLogger(__name__)

# Detectron2's schedules that are its own to build under SGD. WarmupStepWithFixedGammaLR is not among them:
# Detectron2's raises at the last iteration, before the final checkpoint is written.
LOG_PERIOD = 20
DETECTRON2_SCHEDULES = ("WarmupMultiStepLR", "WarmupCosineLR")


class ZenithTrainerMixin:
    """Put before a Detectron2 trainer, it trains with what ``SOLVER.OPTIMIZER`` names::

        class Trainer(ZenithTrainerMixin, DefaultTrainer):
            ...

        cfg = get_cfg()
        add_zenith_config(cfg)

    It overrides

    * ``build_model``: under ``MODEL.CHANNELS_LAST`` alone,
    * ``build_optimizer``: from :data:`zenith_det.solver.OPTIMIZER_REGISTRY`; "SGD" is the base class's own,
    * ``build_lr_scheduler``: from :data:`~zenith_det.solver.LR_SCHEDULER_REGISTRY`; under "SGD",
      Detectron2's schedules are the base class's own,
    * ``build_hooks``: adds :class:`ZenithMetrics`, so that ``lr`` in the logs is the one used,
    * ``auto_scale_workers``: rescales this toolkit's iteration keys as well.

    Everything else is the base class's. With ``SOLVER.OPTIMIZER: SGD`` and Detectron2's schedule, training is
    the base class's training, bit for bit.

    A trainer that clips gradients in ``optimizer.step`` keeps doing so; ZENITH measures the norm before. One
    that clips them between ``backward()`` and ``step()`` calls ``optimizer.record_norm()`` before it clips.

    Raises:
        ConfigError: ``cfg`` lacks the keys of :func:`zenith_det.config.add_zenith_config`, or a key cannot be
            honoured.
    """

    def __init__(self, cfg: Any, *args: Any, **kwargs: Any) -> None:
        if "OPTIMIZER" not in cfg.SOLVER:
            raise ConfigError(
                "SOLVER.OPTIMIZER is missing: call zenith_det.config.add_zenith_config(cfg) after get_cfg()"
            )
        if not logging.getLogger("zenith_det").isEnabledFor(logging.INFO):
            # Detectron2's default_setup gives handlers to its own and fvcore's loggers alone.
            setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="zenith_det")
        # DefaultTrainer calls its own auto_scale_workers by name, past an override; after this it has
        # nothing left to do.
        cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        amp = cfg.SOLVER.AMP
        if amp.ENABLED and amp.DTYPE == "float16" and cfg.MODEL.DEVICE == "cpu":
            raise ConfigError(
                "SOLVER.AMP.ENABLED is True, and SOLVER.AMP.DTYPE float16 needs a GPU: take bfloat16 on the CPU"
            )
        with _ddp_on_the_models_device(), warnings.catch_warnings():
            # Detectron2's AMPTrainer makes a loss scaler by a deprecated name; it is replaced below.
            warnings.filterwarnings("ignore", r".*torch\.cuda\.amp\.GradScaler")
            super().__init__(cfg, *args, **kwargs)  # type: ignore[call-arg]
        inner = self._trainer  # type: ignore[attr-defined]
        check_accumulation(cfg, inner)
        if isinstance(inner, AMPTrainer):
            inner.precision, inner.grad_scaler = amp_dtype(cfg), make_grad_scaler(cfg)
        if cfg.MODEL.COMPILE_BACKBONE:
            compile_backbone(cfg, getattr(inner.model, "module", inner.model))

    @classmethod
    def build_model(cls, cfg: Any) -> nn.Module:
        """The base class's model, its memory as ``MODEL.CHANNELS_LAST`` says.

        Raises:
            ConfigError: see :func:`~zenith_det.engines.model_format.use_channels_last`.
        """
        model: nn.Module = super().build_model(cfg)  # type: ignore[misc]
        use_channels_last(cfg, model)
        if cfg.SOLVER.AMP.ENABLED and cfg.SOLVER.AMP.DTYPE == "bfloat16":
            pool_at_exact_boxes(model)
        return model

    @classmethod
    def build_optimizer(cls, cfg: Any, model: nn.Module) -> torch.optim.Optimizer:
        """The optimizer that ``SOLVER.OPTIMIZER`` names, gradient clipping included.

        Raises:
            ConfigError: see :func:`zenith_det.solver.build_optimizer`.
        """
        clip = cfg.SOLVER.CLIP_GRADIENTS
        # Detectron2 itself has no clipping of the whole model's norm.
        if cfg.SOLVER.OPTIMIZER == "SGD" and not (clip.ENABLED and clip.CLIP_TYPE == "full_model"):
            optimizer: torch.optim.Optimizer = super().build_optimizer(cfg, model)  # type: ignore[misc]
            return optimizer
        return build_optimizer(cfg, model)

    @classmethod
    def build_lr_scheduler(
        cls, cfg: Any, optimizer: torch.optim.Optimizer
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """The schedule that ``SOLVER.LR_SCHEDULER_NAME`` names.

        A name that this toolkit doesn't know goes to the base class.

        Raises:
            ConfigError: see :func:`zenith_det.solver.build_lr_scheduler`.
        """
        name = cfg.SOLVER.LR_SCHEDULER_NAME
        theirs = cfg.SOLVER.OPTIMIZER == "SGD" and name in DETECTRON2_SCHEDULES
        if theirs or (name not in LR_SCHEDULER_REGISTRY and _has_own(cls, "build_lr_scheduler")):
            scheduler: torch.optim.lr_scheduler.LRScheduler = super().build_lr_scheduler(  # type: ignore[misc]
                cfg, optimizer
            )
            return scheduler
        built = build_lr_scheduler(cfg, optimizer)
        if isinstance(built, PlateauLR) and not issubclass(cls, ZenithTrainer):
            raise ConfigError(
                f"SOLVER.LR_SCHEDULER_NAME {name} follows the evaluations, of which ZenithTrainer tells it and "
                f"{cls.__name__} does not"
            )
        return built

    def run_step(self) -> None:
        """The base class's step; its batch in parts under ``SOLVER.GRADIENT_ACCUMULATION``."""
        parts = self.cfg.SOLVER.GRADIENT_ACCUMULATION  # type: ignore[attr-defined]
        # Detectron2's own AMP step wants CUDA; bfloat16 on the CPU takes the other one.
        amp_on_cpu = self.cfg.SOLVER.AMP.ENABLED and self.cfg.MODEL.DEVICE == "cpu"  # type: ignore[attr-defined]
        if parts == 1 and not amp_on_cpu:
            super().run_step()  # type: ignore[misc]
            return
        self._trainer.iter = self.iter  # type: ignore[attr-defined]
        accumulated_step(self._trainer, parts)  # type: ignore[attr-defined]

    def build_hooks(self) -> list[HookBase]:
        """The base class's hooks, and :class:`ZenithMetrics` after the scheduler's."""
        built: list[HookBase] = super().build_hooks()  # type: ignore[misc]
        built = [hook for hook in built if hook is not None]
        solver = self.cfg.SOLVER  # type: ignore[attr-defined]
        metrics = ZenithMetrics(batch_size=solver.IMS_PER_BATCH, keep_history=solver.ZENITH.KEEP_HISTORY)
        # Before whatever saves and writes: the checkpoint is to hold its state, the writers its values.
        schedulers = [i for i, hook in enumerate(built) if isinstance(hook, hooks.LRScheduler)]
        built.insert(schedulers[-1] + 1 if schedulers else 0, metrics)
        self._evaluate_averaged_weights(built)
        return built

    def _evaluate_averaged_weights(self, built: list[HookBase]) -> None:
        """Evaluate and save the weights that Schedule-Free averages, and train on with its own."""
        optimizer = self.optimizer  # type: ignore[attr-defined]
        if not callable(getattr(optimizer, "eval", None)):
            return
        for hook in built:
            if isinstance(hook, hooks.EvalHook):
                hook._func = _with_averaged_weights(optimizer, hook._func)
        checkpointer = self.checkpointer  # type: ignore[attr-defined]
        checkpointer.save = _with_averaged_weights(optimizer, checkpointer.save)

    @staticmethod
    def auto_scale_workers(cfg: Any, num_workers: int) -> Any:
        """Detectron2's scaling for another number of processes, with this toolkit's keys.

        ``SOLVER.ZENITH.WINDOW`` and ``SOLVER.ZENITH.RECORD_AFTER`` count iterations, like ``WARMUP_ITERS``
        and ``STEPS``, and are divided by the same factor: they span the same number of images as before. The
        window stays at least 1. ``MAX_NONFINITE_STEPS`` counts failures and stays.
        """
        reference = cfg.SOLVER.REFERENCE_WORLD_SIZE
        scaled = DefaultTrainer.auto_scale_workers(cfg, num_workers)
        if scaled is cfg:
            return cfg
        frozen = scaled.is_frozen()
        scaled.defrost()
        zenith = scaled.SOLVER.ZENITH
        factor = num_workers / reference
        zenith.WINDOW = max(1, round(zenith.WINDOW / factor))
        zenith.RECORD_AFTER = round(zenith.RECORD_AFTER / factor)
        logger.info(
            "Auto-scaling SOLVER.ZENITH to WINDOW %d, RECORD_AFTER %d", zenith.WINDOW, zenith.RECORD_AFTER
        )
        if frozen:
            scaled.freeze()
        return scaled


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

        Under another optimizer its state starts anew (SGD and ZENITH share theirs).
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

    def build_hooks(self) -> list[HookBase]:
        """The hooks of :class:`ZenithTrainerMixin`, with a checkpointer that is safe to interrupt."""
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
        """Detectron2's model; see :func:`connect_top_level`."""
        model: nn.Module = super().build_model(cfg)
        connect_top_level(model)
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


def connect_top_level(model: nn.Module) -> None:
    """Let an FPN's extra level follow its coarsest one, whatever that is called.

    Detectron2 pools it from a level named "p5", and so fails on a backbone without its last stage
    (``MODEL.RESNETS.OUT_FEATURES`` up to "res4"), which the built-in engine trains. Of no effect on others.
    """
    for module in model.modules():
        if isinstance(module, FPN) and isinstance(module.top_block, LastLevelMaxPool):
            module.top_block.in_feature = module._out_features[-1 - module.top_block.num_levels]


def _has_own(trainer: type, method: str) -> bool:
    """Whether a class between the mix-in and Detectron2's trainer defines ``method``."""
    bases = trainer.__mro__[trainer.__mro__.index(ZenithTrainerMixin) + 1 :]
    owner = next((base for base in bases if method in vars(base)), None)
    return owner is not None and owner is not DefaultTrainer


def _with_averaged_weights(
    optimizer: torch.optim.Optimizer, function: Callable[..., Any]
) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        eval_mode(optimizer)
        try:
            return function(*args, **kwargs)
        finally:
            train_mode(optimizer)

    return wrapped


@contextlib.contextmanager
def _ddp_on_the_models_device() -> Iterator[None]:
    """Let Detectron2's trainer wrap a model on the CPU for several processes.

    ``create_ddp_model`` pins DDP to the GPU of the process's rank, which DDP refuses for such a model, and
    ``DefaultTrainer`` leaves no way to pass other arguments.
    """
    original = defaults.create_ddp_model

    def create(model: nn.Module, **kwargs: Any) -> nn.Module:
        if all(parameter.device.type == "cpu" for parameter in model.parameters()):
            kwargs.setdefault("device_ids", None)
        wrapped: nn.Module = original(model, **kwargs)
        return wrapped

    defaults.create_ddp_model = create
    try:
        yield
    finally:
        defaults.create_ddp_model = original
