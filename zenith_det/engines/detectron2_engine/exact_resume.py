"""A run of Detectron2's loop that goes on, when it is resumed, as if it had never stopped.

Detectron2 starts its sampler anew (https://github.com/facebookresearch/detectron2/issues/829): a run resumed
often sees the first images again and again.
"""

from __future__ import annotations

from typing import Any

import torch
from detectron2.engine import HookBase

from zenith_det.engines.batches import build_train_loader
from zenith_det.engines.detectron2_engine.data import SeededMapper, mapper_for, training_set_of
from zenith_det.engines.prefetch import Prefetcher
from zenith_det.training.course.resume_report import config_facts, log_changes
from zenith_det.training.course.seeding import seed_step
from zenith_det.training.processes.ddp import settle_buckets
from zenith_det.training.processes.distributed import get_world_size
from zenith_det.training.processes.loader_wait import WatchedBatches


class TrainLoader:
    """The batches of Detectron2's training sets in the order of ``zenith-det train``, from any of them on.

    Args:
        cfg: Detectron2's configuration.

    Attributes:
        seed: of the order and of the augmentation.
        start: the first batch of the next iterator.
    """

    def __init__(self, cfg: Any) -> None:
        self.seed, self.start = max(cfg.SEED, 0), 0
        self._cfg = cfg
        self._data = training_set_of(cfg, None)
        self._mapper = SeededMapper(mapper_for(cfg, cfg.DATASETS.TRAIN, is_train=True))

    def __iter__(self) -> Prefetcher:
        loader = build_train_loader(self._cfg, self._data, self._mapper, seed=self.seed, start=self.start)
        return Prefetcher(WatchedBatches(loader), torch.device("cpu"))  # the model moves what it takes


class ResumeExactly(HookBase):
    """Keep the run's seed and the number of images seen in the checkpoint, and go on there.

    All random choices are functions of the seed and of iteration, rank and image, so a resumed run repeats the
    uninterrupted one bit for bit, with any number of loader workers. With another batch size or number of
    processes the images go on after those seen. A table in the log says which keys have changed.

    For a trainer with an attribute ``seed``, and a :class:`TrainLoader` as its loader: the order of another one is
    that one's.
    """

    def __init__(self) -> None:
        self._saved: dict[str, Any] = {}
        self._first: int | None = None  # where this process began
        self._images_before = 0  # up to there

    def state_dict(self) -> dict[str, Any]:
        cfg = self.trainer.cfg
        iterations = 0 if self._first is None else self.trainer.iter + 1 - self._first
        return {
            "seed": self.trainer.seed,
            "images_seen": self._images_before + iterations * cfg.SOLVER.IMS_PER_BATCH,
            "config": config_facts(cfg),
            "processes": get_world_size(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._saved = state
        self.trainer.seed = int(state["seed"])

    def before_train(self) -> None:
        trainer, cfg, saved = self.trainer, self.trainer.cfg, self._saved
        settle_buckets(trainer._trainer.model)
        self._first = trainer.start_iter
        batch, done = cfg.SOLVER.IMS_PER_BATCH, 0
        if self._first > 0:
            log_changes(
                saved.get("config"),
                cfg,
                seed=trainer.seed,
                iteration=self._first,
                processes=(saved.get("processes", get_world_size()), get_world_size()),
            )
            done = saved.get("images_seen", self._first * batch) // batch
        self._images_before = done * batch
        loader = trainer.data_loader
        if isinstance(loader, TrainLoader):
            loader.seed, loader.start = trainer.seed, done
            # Made here, and not in the first step: what making it draws at random is no part of a step.
            trainer._trainer.reset_data_loader(lambda: iter(loader))

    def before_step(self) -> None:
        seed_step(self.trainer.seed, self.trainer.iter)
