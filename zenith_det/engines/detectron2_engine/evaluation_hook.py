"""What evaluations decide in a project's own trainer, by its own evaluators."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from detectron2.engine import HookBase, hooks
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils import comm
from detectron2.utils.events import CommonMetricPrinter

from zenith_det.engines.detectron2_engine.average_hook import AverageWeights
from zenith_det.engines.detectron2_engine.endings import RunEnds
from zenith_det.engines.detectron2_engine.engine import ENGINE, test_set
from zenith_det.engines.detectron2_engine.saving import beside
from zenith_det.engines.evaluating import validation_loss
from zenith_det.training.checkpoints import averaging
from zenith_det.training.checkpoints.best_checkpoint import BestCheckpoint
from zenith_det.training.checkpoints.checkpoint import FINAL_NAME, Checkpointer
from zenith_det.training.course.evaluations import Evaluations, follow_evaluations
from zenith_det.training.processes.ddp import unwrap
from zenith_det.training.processes.stopping import stop_code

logger = logging.getLogger(__name__)


class FollowEvaluations(HookBase):
    """Evaluate averaged weights and the validation loss too, keep the best model, and end the run in time.

    Takes in each evaluation that the trainer's first ``EvalHook`` makes. Register it last: a run that it ends ends
    there, with ``model_final.pth`` saved.

    Args:
        cfg: ``TEST.EARLY_STOPPING``, ``TEST.PATIENCE``, ``TEST.VALIDATION_LOSS``, ``SOLVER.ZENITH.UNTIL_SETTLED`` and
            ``CHECKPOINT.BEST`` count.
        average: the trainer's hook that averages weights, if it has one.
        losses: compute the validation losses.
    """

    def __init__(self, cfg: Any, average: AverageWeights | None, *, losses: bool) -> None:
        self._cfg = cfg
        self._average = average
        self._losses = losses
        self._evaluations: Evaluations | None = None
        self._best: BestCheckpoint | None = None
        self._reason: str | None = None
        self._unwritten = False

    def before_train(self) -> None:
        trainer, folder = self.trainer, Path(self._cfg.OUTPUT_DIR)
        if comm.is_main_process():
            self._evaluations = Evaluations(self._cfg, folder, trainer.start_iter)
            self._best = BestCheckpoint(
                Checkpointer(folder), self._cfg.CHECKPOINT.BEST, resumed=trainer.start_iter > 0
            )
        self._follow()
        evaluation = next(hook for hook in trainer._hooks if isinstance(hook, hooks.EvalHook))
        evaluation._func = self._evaluate_by(evaluation._func)

    def before_step(self) -> None:
        if self._reason and self.trainer.iter == self.trainer.start_iter > 0:
            # A resumed run that had ended: nothing is left to train.
            self.trainer.iter -= 1
            self._end()

    def after_step(self) -> None:
        if self._unwritten:
            # Detectron2 writes the newest evaluation alone, every 20 iterations; a resumed run goes by all.
            for hook in self.trainer._hooks:
                for writer in hook._writers if isinstance(hook, hooks.PeriodicWriter) else ():
                    if not isinstance(writer, CommonMetricPrinter):
                        writer.write()
            self._unwritten = False
        if self._reason and self.trainer.iter + 1 < self.trainer.max_iter:
            self._end()

    def _end(self) -> None:
        last = self.trainer.iter
        logger.info("the run ends after iteration %d: %s", last, self._reason)
        if comm.is_main_process():
            self.trainer.checkpointer.save(FINAL_NAME, iteration=last)
        if self._average is not None:
            self._average.save(FINAL_NAME + averaging.SUFFIX, iteration=last)
        raise RunEnds

    def _follow(self) -> None:
        self._reason = follow_evaluations(self._evaluations, getattr(self.trainer, "scheduler", None))

    def _evaluate_by(self, evaluate: Callable[[], Any]) -> Callable[[], Any]:
        def wrapped() -> Any:
            # The averaged weights first: what an evaluator leaves in a folder of its own choice is the trained ones'.
            averaged = self._averaged(evaluate) if self._average is not None else {}
            results = dict(evaluate() or {})
            if self._losses:
                results.update(self._validation_losses())
            results.update(averaged)
            if getattr(self.trainer, "_last_eval_results", None) is not None:
                self.trainer._last_eval_results = results
            last = min(self.trainer.iter, self.trainer.max_iter - 1)
            scalars = flatten_results_dict(results)
            if self._evaluations is not None:
                self._evaluations.add(last, scalars)
            if self._best is not None:
                self._best.offer(scalars, last, lambda name, facts: self._save_best(name, last, facts))
            self._follow()
            self._unwritten = True
            return results

        return wrapped

    def _averaged(self, evaluate: Callable[[], Any]) -> dict[str, Any]:
        assert self._average is not None
        results = self._average.evaluated(evaluate)
        if self._losses:
            with self._average.average.applied():
                losses = self._validation_losses()
            results.update({averaging.PREFIX + name: loss for name, loss in losses.items()})
        return results

    def _save_best(self, name: str, iteration: int, facts: dict[str, Any]) -> None:
        if self._best is not None and self._best.of_average and self._average is not None:
            self._average.save(name, iteration=iteration, **facts)
            return
        with beside(self.trainer.checkpointer):
            self.trainer.checkpointer.save(name, iteration=iteration, **facts)

    def _validation_losses(self) -> dict[str, float]:
        cfg, names = self._cfg, self._cfg.DATASETS.TEST
        found: dict[str, float] = {}
        for name in names:
            losses = validation_loss(
                ENGINE, cfg, unwrap(self.trainer.model), test_set(name), max(cfg.SEED, 0), stop_code
            )
            found |= {key if len(names) == 1 else f"{name}/{key}": value for key, value in losses.items()}
        return found
