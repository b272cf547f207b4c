"""Single iterations of Detectron2's training loop, for timing them and for LR range tests."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable

import torch
from detectron2.utils.events import EventStorage

from zenith_det.config import LoadedConfig
from zenith_det.engines.detectron2_engine.config import to_detectron2
from zenith_det.engines.detectron2_engine.data import register_datasets
from zenith_det.engines.detectron2_engine.trainer import ZenithTrainer
from zenith_det.engines.lr_range_test import CYCLE, lr_setter
from zenith_det.solver import train_mode

__all__ = ["lr_probe", "one_iteration"]


def one_iteration(loaded: LoadedConfig, fixed_batches: int = 0) -> Callable[[], None]:
    """As :func:`zenith_det.engines.torchvision_engine.stepping.one_iteration`, by Detectron2's trainer.

    Its hooks run too (Detectron2's LR schedule is one of them), but those that write or evaluate do so only
    every so many iterations: give ``loaded`` long periods.
    """
    return functools.partial(iterate, make_trainer(loaded, fixed_batches))


def lr_probe(loaded: LoadedConfig) -> Callable[[float], float]:
    """As :func:`zenith_det.engines.torchvision_engine.stepping.lr_probe`, by Detectron2's trainer."""
    trainer = make_trainer(loaded, CYCLE)
    set_lr = lr_setter(trainer.optimizer, float(trainer.cfg.SOLVER.BASE_LR))

    def probe(lr: float) -> float:
        set_lr(lr)
        iteration = trainer.iter
        iterate(trainer)
        loss, at = trainer.storage.latest().get("total_loss", (math.nan, -1))
        return float(loss) if at == iteration else math.nan  # one that isn't finite is not logged

    return probe


def make_trainer(loaded: LoadedConfig, fixed_batches: int = 0) -> ZenithTrainer:
    """A trainer as a run makes it, before its first iteration.

    Args:
        fixed_batches: go round so many batches that were loaded beforehand; 0: the loader gives each.
    """
    register_datasets(loaded, training=True)
    cfg = to_detectron2(loaded)
    torch.manual_seed(max(cfg.SEED, 0))
    trainer = ZenithTrainer(cfg)
    trainer.resume_or_load(resume=False)
    inner = trainer._trainer
    if fixed_batches:
        loader = iter(inner.data_loader)
        inner._data_loader_iter_obj = itertools.cycle([next(loader) for _ in range(fixed_batches)])
    trainer.iter = trainer.start_iter
    trainer.storage = EventStorage(trainer.start_iter)
    with trainer.storage:
        trainer.before_train()
    train_mode(trainer.optimizer)
    return trainer


def iterate(trainer: ZenithTrainer) -> None:
    """One iteration with its hooks."""
    with trainer.storage:
        trainer.before_step()
        trainer.run_step()
        trainer.after_step()
    trainer.iter += 1
