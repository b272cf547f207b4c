"""Keeping the model that an evaluation found best."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from zenith_det.config.metric_names import AVERAGED, TASK_APS
from zenith_det.errors import CheckpointError
from zenith_det.training.checkpoints.averaging import PREFIX
from zenith_det.training.checkpoints.checkpoint import SUFFIX, Checkpointer
from zenith_det.training.checkpoints.reading import read_facts

logger = logging.getLogger(__name__)

BEST_NAME = "model_best"
#: What ``CHECKPOINT.BEST`` can name, and the scalar that stands for it.
METRICS = TASK_APS | {AVERAGED + metric: PREFIX + name for metric, name in TASK_APS.items()}


def scalar_named(scalars: Mapping[str, Any], metric: str) -> str | None:
    """The scalar of an evaluation that ``metric``, a key of :data:`METRICS`, stands for; ``None``: not there.

    With several test sets it is the first one's.
    """
    averaged, wanted = metric.startswith(AVERAGED), METRICS[metric].removeprefix(PREFIX)
    for name in scalars:
        if name.startswith(PREFIX) == averaged and f"/{name}".endswith(f"/{wanted}"):
            return name
    return None


class BestCheckpoint:
    """Saves ``model_best.pth`` whenever an evaluation beats all before it, resumed runs included.

    The best value is written into ``model_best.pth`` itself, so that it cannot be lost apart from it.

    Args:
        checkpointer: of the output directory.
        metric: a key of :data:`METRICS`; "": nothing is kept.
        resumed: go on from the value that a ``model_best.pth`` already there has.

    Attributes:
        of_average: the averaged weights are what is compared, and to be saved.
        value: the best so far.
    """

    def __init__(self, checkpointer: Checkpointer, metric: str, *, resumed: bool) -> None:
        self._metric = metric
        self.of_average = metric.startswith(AVERAGED)
        self.value: float | None = None
        path = checkpointer.output_dir / f"{BEST_NAME}{SUFFIX}"
        if metric and resumed and path.exists():
            try:
                best = read_facts(path).get("best")
            except CheckpointError as error:
                logger.warning("%s: the best model so far can't be told from it", error)
                best = None
            if isinstance(best, Mapping) and best.get("metric") == metric:
                self.value = float(best["value"])

    def offer(
        self, scalars: Mapping[str, Any], iteration: int, save: Callable[[str, dict[str, Any]], Any]
    ) -> None:
        """Save the model if it is the best so far.

        Args:
            scalars: of an evaluation (percent); with several test sets, the first one's counts.
            iteration: the last one done.
            save: called with the name and what to add to the checkpoint.
        """
        if not self._metric:
            return
        name = scalar_named(scalars, self._metric)
        if name is None:
            logger.warning("no %s to choose the best model by: the evaluation had none", self._metric)
            return
        value = float(scalars[name])
        if self.value is not None and value <= self.value:
            logger.info("%s %.3f; the best so far is %.3f", self._metric, value, self.value)
            return
        before = "" if self.value is None else f" (before: {self.value:.3f})"
        self.value = value
        save(BEST_NAME, {"best": {"metric": self._metric, "value": value, "iteration": iteration}})
        logger.info("best %s so far: %.3f%s: saved %s%s", self._metric, value, before, BEST_NAME, SUFFIX)
