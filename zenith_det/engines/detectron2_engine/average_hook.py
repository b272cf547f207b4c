"""``SOLVER.AVERAGE`` in a project's own trainer."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any

from detectron2.engine import HookBase
from detectron2.utils import comm

from zenith_det.engines.detectron2_engine.saving import beside
from zenith_det.training.checkpoints import averaging
from zenith_det.training.checkpoints.averaging import WeightAverage
from zenith_det.training.checkpoints.checkpoint import FINAL_NAME

logger = logging.getLogger(__name__)


class AverageWeights(HookBase):
    """Average the weights along the way; see :class:`~zenith_det.training.checkpoints.averaging.WeightAverage`.

    The average is kept in each checkpoint, and at the end saved as ``model_final_averaged.pth`` by the trainer's own
    checkpointer, without the optimizer. Register it before what saves checkpoints.

    Args:
        cfg: ``SOLVER.AVERAGE`` counts.
        average: of the trainer's model.
    """

    def __init__(self, cfg: Any, average: WeightAverage) -> None:
        self._cfg = cfg
        self.average = average
        self._resumed = False

    def before_train(self) -> None:
        if self._resumed:
            return
        if self.trainer.start_iter > 0:
            self.average.resume({}, self.trainer.checkpointer.get_checkpoint_file())
        else:
            self.average.restart()  # from the weights just loaded

    def after_step(self) -> None:
        self.average.update()

    def after_train(self) -> None:
        if self.trainer.iter >= self.trainer.max_iter:  # it has not failed
            self.save(FINAL_NAME + averaging.SUFFIX, iteration=self.trainer.max_iter - 1)

    def save(self, name: str, **facts: Any) -> None:
        """Save the averaged weights; the first process alone does."""
        if not comm.is_main_process():
            return
        checkpointer = self.trainer.checkpointer
        with self.average.applied(), beside(checkpointer, weights_only=True):
            checkpointer.save(name, **facts)
        logger.info("saved %s.pth, with the averaged weights", name)

    def evaluated(self, evaluate: Callable[[], Any]) -> dict[str, Any]:
        """What ``evaluate`` gives of the averaged weights: ``averaged/`` + task -> metric -> percent.

        The trainer's ``cfg.OUTPUT_DIR`` is the folder ``averaged`` meanwhile, so that an evaluator that writes its
        files there leaves the trained weights' alone.
        """
        trainer, cfg = self.trainer, self.trainer.cfg
        logger.info("with averaged weights (SOLVER.AVERAGE.KIND %s):", self._cfg.SOLVER.AVERAGE.KIND)
        elsewhere = cfg.clone()
        elsewhere.defrost()
        elsewhere.OUTPUT_DIR = os.path.join(cfg.OUTPUT_DIR, averaging.FOLDER)
        elsewhere.freeze()
        trainer.cfg = elsewhere
        try:
            with self.average.applied():
                results = evaluate()
        finally:
            trainer.cfg = cfg
        return {averaging.PREFIX + task: metrics for task, metrics in (results or {}).items()}

    def state_dict(self) -> dict[str, Any]:
        return self.average.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.average.resume({"average": state}, "the checkpoint")
        self._resumed = True
