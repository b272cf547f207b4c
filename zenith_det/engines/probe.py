"""Single iterations of a run's training loop, for timing them and for LR range tests."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import torch

from zenith_det.config import LoadedConfig, settle_files
from zenith_det.engines.batches import train_batches
from zenith_det.engines.engine import Engine
from zenith_det.engines.lr_range_test import CYCLE, lr_setter
from zenith_det.engines.prefetch import Prefetcher
from zenith_det.engines.trainer import Progress, Trainer, build_parts
from zenith_det.solver import train_mode
from zenith_det.training.checkpoints.best_checkpoint import BestCheckpoint
from zenith_det.training.checkpoints.checkpoint import Checkpointer

__all__ = ["iteration_of", "lr_probe", "make_trainer"]


def lr_probe(engine: Engine, loaded: LoadedConfig) -> Callable[[float], float]:
    """A training run as ``loaded`` says; each call is one iteration with the LR given, and returns its loss.

    It goes round the same :data:`~zenith_det.engines.lr_range_test.CYCLE` batches. Groups keep the proportions
    of their LRs.
    """
    trainer = make_trainer(engine, loaded, CYCLE)
    set_lr = lr_setter(trainer.optimizer, float(loaded.cfg.SOLVER.BASE_LR))
    iterate = iteration_of(engine, trainer)

    def probe(lr: float) -> float:
        set_lr(lr)
        iterate()
        return trainer.take_loss()

    return probe


def iteration_of(engine: Engine, trainer: Trainer) -> Callable[[], None]:
    """One iteration of ``trainer`` a call: no logs, checkpoints, evaluations."""

    def iterate() -> None:
        with engine.recording(trainer.storage):
            trainer.iterate()
        trainer.storage.forget_pictures()

    return iterate


def make_trainer(engine: Engine, loaded: LoadedConfig, fixed_batches: int = 0) -> Trainer:
    """A trainer as a run makes it, in training mode, without writers.

    Args:
        loaded: with the device resolved; ``SEED`` must be set for runs that are to start alike.
        fixed_batches: go round so many batches that were loaded beforehand; 0: the loader gives each.
    """
    settle_files(loaded)
    engine.prepare(loaded)
    cfg = loaded.cfg
    data = engine.training_set(loaded)
    seed = max(cfg.SEED, 0)
    parts = build_parts(engine, cfg, seed)
    batches = train_batches(engine, cfg, data, seed=seed, start=0)
    if fixed_batches:
        batches = itertools.cycle([next(batches) for _ in range(fixed_batches)])
    checkpointer = Checkpointer(Path(cfg.OUTPUT_DIR))
    trainer = Trainer(
        cfg,
        parts.model,
        parts.optimizer,
        parts.scheduler,
        Prefetcher(batches, torch.device(cfg.MODEL.DEVICE)),
        Progress(0, seed),
        checkpointer,
        BestCheckpoint(checkpointer, "", resumed=False),
        lambda should_stop, averaged: {},
    )
    trainer.guard.output_dir = None  # a probe leaves nothing
    parts.model.train()
    train_mode(parts.optimizer)
    return trainer
