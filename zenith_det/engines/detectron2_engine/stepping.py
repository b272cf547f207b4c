"""Single iterations of Detectron2's training loop, for timing them."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from detectron2.utils.events import EventStorage

from zenith_det.config import LoadedConfig
from zenith_det.engines.detectron2_engine.data import register_datasets
from zenith_det.engines.detectron2_engine.run import to_detectron2
from zenith_det.engines.detectron2_engine.trainer import ZenithTrainer
from zenith_det.solver import train_mode

__all__ = ["one_iteration"]


def one_iteration(loaded: LoadedConfig, fixed_batches: int = 0) -> Callable[[], None]:
    """As :func:`zenith_det.engines.torchvision_engine.stepping.one_iteration`, by Detectron2's trainer.

    Its hooks run too (Detectron2's LR schedule is one of them), but those that write or evaluate do so only
    every so many iterations: give ``loaded`` long periods.
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
    storage = EventStorage(trainer.start_iter)
    with storage:
        trainer.storage = storage
        trainer.before_train()
    train_mode(trainer.optimizer)

    def iterate() -> None:
        with storage:
            trainer.before_step()
            trainer.run_step()
            trainer.after_step()
        trainer.iter += 1

    return iterate
