"""What the mix-in adds to a project's own trainer by hooks, and what it tells where a key can't be honoured there."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterator
from typing import Any

from detectron2.engine import AMPTrainer, HookBase, hooks
from detectron2.utils import comm

from zenith_det.config.defaults import MOVED_KEYS, ZENITH_DEFAULTS
from zenith_det.config.keys import leaves
from zenith_det.config.metric_names import VALIDATION_LOSS
from zenith_det.config.old_names import moved_value
from zenith_det.engines.detectron2_engine.average_hook import AverageWeights
from zenith_det.engines.detectron2_engine.evaluation_hook import FollowEvaluations
from zenith_det.engines.detectron2_engine.guard_hook import GuardSteps
from zenith_det.engines.detectron2_engine.hooks import ZenithMetrics
from zenith_det.engines.detectron2_engine.overrides import own
from zenith_det.engines.detectron2_engine.saving import KeepNewest
from zenith_det.engines.detectron2_engine.writers import LoggerWriter
from zenith_det.optim import zenith_of
from zenith_det.training.checkpoints.averaging import WeightAverage
from zenith_det.training.course.run_record import short_run_lines
from zenith_det.training.logs.loggers import build_loggers
from zenith_det.training.processes.ddp import unwrap

logger = logging.getLogger(__name__)

_OF_THE_COMMAND = (
    "TRAIN_JSON",
    "TRAIN_IMAGES",
    "VAL_JSON",
    "VAL_IMAGES",
    "CROWDS",
    "MAX_BAD_IMAGES",
    "CACHE",
    "STRICT",
)
#: Keys that no trainer of a project's own honours, and why.
NEVER: dict[str, str] = {
    **{f"DATASETS.{name}": "tools/train_net.py alone reads sets by their files" for name in _OF_THE_COMMAND},
    "INPUT.AUGMENTATIONS": "the project's loader has a mapper of its own",
    "SOLVER.AUTO_LR": "tools/find_lr.py finds the LR before a run",
    "INPUT.VALUE_RANGE": "the project's own mapper reads the images",
    "TEST.MAX_IMAGES": "the project's evaluator takes all images",
}
#: Keys that an evaluation is needed for.
OF_EVALUATIONS = (
    "TEST.EARLY_STOPPING",
    "TEST.VALIDATION_LOSS",
    "SOLVER.ZENITH.UNTIL_SETTLED",
    "CHECKPOINT.BEST",
)


class ZenithHooks:
    """The hooks that a trainer gets, made once and put where they belong whenever it registers others.

    Args:
        trainer: a ``DefaultTrainer`` with all its parts.
    """

    def __init__(self, trainer: Any) -> None:
        cfg = trainer.cfg
        self._cfg = cfg
        self.metrics = ZenithMetrics(
            batch_size=cfg.SOLVER.IMS_PER_BATCH, keep_history=cfg.SOLVER.ZENITH.KEEP_HISTORY
        )
        self.guard = GuardSteps(cfg)
        average = WeightAverage.of(cfg, unwrap(trainer.model))
        self.average = None if average is None else AverageWeights(cfg, average)
        self.keep = KeepNewest(cfg.CHECKPOINT.KEEP, self.guard) if cfg.CHECKPOINT.KEEP else None
        self.evaluations: FollowEvaluations | None = None
        follows = callable(getattr(getattr(trainer, "scheduler", None), "follow", None))
        if average is not None or follows or any(_is_set(cfg, key) for key in OF_EVALUATIONS):
            losses = cfg.TEST.VALIDATION_LOSS and own(trainer, "build_train_loader") is None
            self.evaluations = FollowEvaluations(cfg, self.average, losses=losses)
        self._logs = bool(cfg.LOGGERS) and comm.is_main_process()

    def place(self, trainer: Any) -> None:
        """Put the hooks among those that ``trainer`` has registered so far."""
        ours = [self.metrics, self.guard, self.average, self.keep, self.evaluations]
        own_hooks: list[HookBase] = [hook for hook in trainer._hooks if hook not in ours]
        first: list[HookBase | None] = [self.guard, self.average]
        if not any(isinstance(hook, ZenithMetrics) for hook in own_hooks):
            first.insert(0, self.metrics)
        # After the schedule, whose LR would else be the one logged, and before what saves, evaluates and writes.
        _insert(own_hooks, _after(own_hooks, hooks.LRScheduler), first)
        if self.keep is not None and (place := _after(own_hooks, hooks.PeriodicCheckpointer)):
            _insert(own_hooks, place, [self.keep])
        if any(isinstance(hook, hooks.EvalHook) for hook in own_hooks):
            _insert(own_hooks, len(own_hooks), [self.evaluations])
        if self._logs and (writers := [hook for hook in own_hooks if isinstance(hook, hooks.PeriodicWriter)]):
            self._logs = False
            writers[0]._writers += [
                LoggerWriter(lambda one=one: one)  # type: ignore[misc]
                for one in build_loggers(self._cfg, self._cfg.OUTPUT_DIR)
            ]
        for hook in own_hooks:
            if hook in ours:
                hook.trainer = weakref.proxy(trainer)
        trainer._hooks[:] = own_hooks


def tell_at_the_start(trainer: Any) -> None:
    """Warn of keys that have no effect in ``trainer``, and of a run too short for its warm-up or ZENITH's window."""
    if not comm.is_main_process():
        return
    cfg = trainer.cfg
    idle = [f"{key} ({why})" for key, why in without_effect(trainer)]
    if idle:
        logger.warning("without effect in %s: %s", trainer.__class__.__name__, ", ".join(idle))
    if trainer.start_iter < trainer.max_iter:
        for line in short_run_lines(cfg, zenith=zenith_of(trainer.optimizer) is not None):
            logger.warning(line)


def without_effect(trainer: Any) -> Iterator[tuple[str, str]]:
    """Keys set to other than their default that ``trainer`` can't honour, each with the reason."""
    cfg = trainer.cfg
    for key, why in NEVER.items():
        if _is_set(cfg, key):
            yield key, why
    kinds = {kind for hook in trainer._hooks for kind in type(hook).__mro__}
    if hooks.EvalHook not in kinds:
        for key in OF_EVALUATIONS:
            if _is_set(cfg, key):
                yield key, "the trainer has no EvalHook"
        if callable(getattr(getattr(trainer, "scheduler", None), "follow", None)):
            yield f"SOLVER.LR_SCHEDULER_NAME {cfg.SOLVER.LR_SCHEDULER_NAME}", "the trainer has no EvalHook"
        if cfg.SOLVER.AVERAGE.KIND:
            yield "SOLVER.AVERAGE", "saved and not evaluated, as the trainer has no EvalHook"
    elif cfg.TEST.VALIDATION_LOSS and (owner := own(trainer, "build_train_loader")):
        yield "TEST.VALIDATION_LOSS", f"{owner.__name__} has its own build_train_loader"
        if cfg.TEST.EARLY_STOPPING == VALIDATION_LOSS:
            yield "TEST.EARLY_STOPPING", "by the validation loss, for the same reason"
    if cfg.SOLVER.ZENITH.UNTIL_SETTLED and zenith_of(trainer.optimizer) is None:
        yield "SOLVER.ZENITH.UNTIL_SETTLED", f"{type(trainer.optimizer).__name__} has no ratio to settle"
    if cfg.CHECKPOINT.KEEP and hooks.PeriodicCheckpointer not in kinds:
        yield "CHECKPOINT.KEEP", "the trainer has no PeriodicCheckpointer"
    if cfg.LOGGERS and hooks.PeriodicWriter not in kinds:
        yield "LOGGERS", "the trainer has no PeriodicWriter"
    amp = cfg.SOLVER.AMP
    if amp.ENABLED and _is_set(cfg, "SOLVER.AMP.DTYPE") and not isinstance(trainer._trainer, AMPTrainer):
        yield "SOLVER.AMP.DTYPE", f"{type(trainer._trainer).__name__} has a precision of its own"


def _is_set(cfg: Any, key: str) -> bool:
    default = dict(leaves(ZENITH_DEFAULTS))[key]
    if key in MOVED_KEYS.values():
        return bool(moved_value(cfg, key) != default)
    value = cfg
    for part in key.split("."):
        value = value[part]
    return bool(value != default)


def _after(own_hooks: list[HookBase], kind: type) -> int:
    """The place after the last hook of this kind; 0: there is none."""
    return max((i + 1 for i, hook in enumerate(own_hooks) if isinstance(hook, kind)), default=0)


def _insert(own_hooks: list[HookBase], place: int, more: list[HookBase | None]) -> None:
    own_hooks[place:place] = [hook for hook in more if hook is not None]
