"""Single iterations of the built-in engine's training loop, for timing them and for LR range tests."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import torch

from zenith_det.config import LoadedConfig, follow_dataset
from zenith_det.data import SerializedList
from zenith_det.engines.lr_range_test import CYCLE, lr_setter
from zenith_det.engines.model_format import compile_backbone
from zenith_det.engines.torchvision_engine.datasets import load_training_set
from zenith_det.engines.torchvision_engine.input_pipeline import TrainingMapper
from zenith_det.engines.torchvision_engine.loaders import build_train_loader
from zenith_det.engines.torchvision_engine.rcnn import build_model
from zenith_det.engines.torchvision_engine.support import check_supported
from zenith_det.engines.torchvision_engine.trainer import Progress, Trainer
from zenith_det.engines.torchvision_engine.weights import load_weights
from zenith_det.solver import build_lr_scheduler, build_optimizer, train_mode
from zenith_det.training.best_checkpoint import BestCheckpoint
from zenith_det.training.checkpoint import Checkpointer

__all__ = ["lr_probe", "make_trainer", "one_iteration"]


def one_iteration(loaded: LoadedConfig, fixed_batches: int = 0) -> Callable[[], None]:
    """A training run as ``loaded`` says; each call is one iteration of it: no logs, checkpoints, evaluations.

    See :func:`make_trainer`.
    """
    return make_trainer(loaded, fixed_batches).iterate


def lr_probe(loaded: LoadedConfig) -> Callable[[float], float]:
    """A training run as ``loaded`` says; each call is one iteration with the LR given, and returns its loss.

    It goes round the same :data:`~zenith_det.engines.lr_range_test.CYCLE` batches. Groups keep the proportions
    of their LRs.
    """
    trainer = make_trainer(loaded, CYCLE)
    set_lr = lr_setter(trainer.optimizer, float(loaded.cfg.SOLVER.BASE_LR))

    def probe(lr: float) -> float:
        set_lr(lr)
        trainer.iterate()
        return trainer.take_loss()

    return probe


def make_trainer(loaded: LoadedConfig, fixed_batches: int = 0) -> Trainer:
    """A trainer as a run makes it, in training mode, without writers.

    Args:
        loaded: with the device resolved; ``SEED`` must be set for runs that are to start alike.
        fixed_batches: go round so many batches that were loaded beforehand; 0: the loader gives each.
    """
    check_supported(loaded)
    cfg = loaded.cfg
    training_set = load_training_set(cfg)
    metadata = training_set.metadata
    follow_dataset(
        loaded, metadata.name, metadata.num_classes, metadata.num_keypoints, metadata.keypoint_oks_sigmas
    )
    seed = max(cfg.SEED, 0)
    torch.manual_seed(seed)
    model = build_model(cfg)
    load_weights(cfg, model)
    compile_backbone(cfg, model)
    optimizer = build_optimizer(cfg, model)
    scheduler = build_lr_scheduler(cfg, optimizer)
    records, mapper = SerializedList(training_set.records), TrainingMapper(cfg, metadata)
    batches = iter(build_train_loader(cfg, records, mapper, seed=seed, start=0, rank=0, world_size=1))
    if fixed_batches:
        batches = itertools.cycle([next(batches) for _ in range(fixed_batches)])
    checkpointer = Checkpointer(Path(cfg.OUTPUT_DIR))
    trainer = Trainer(
        cfg,
        model,
        optimizer,
        scheduler,
        batches,
        Progress(0, seed),
        checkpointer,
        BestCheckpoint(checkpointer, "", resumed=False),
        [],
        lambda should_stop, averaged: {},
    )
    model.train()
    train_mode(optimizer)
    return trainer
