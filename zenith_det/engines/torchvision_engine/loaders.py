"""Which images go into which batch: a pure function of the seed and the iteration."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from zenith_det.config import CfgNode
from zenith_det.engines.torchvision_engine.input_pipeline import (
    TestDataset,
    TestMapper,
    TrainingDataset,
    TrainingMapper,
)
from zenith_det.training.worker_signals import ignore_stop_signals

LANDSCAPE, PORTRAIT = 0, 1


class ResumableBatches(Sampler[list[tuple[int, int]]]):
    """An endless stream of batches that can start anywhere and that every rank agrees on.

    Epoch after epoch the images are shuffled (by ``seed`` and epoch number) and put into batches of one
    orientation, as Detectron2's ``AspectRatioGroupedDataset`` does; an unfinished batch waits for the
    next epoch. A batch is cut into equal parts for the ranks, so that the number of processes changes
    nothing about the data. Each image comes with a seed of its own for augmentation; so batch ``i`` is
    the same whether the run started at 0 or was resumed at ``i``, with any number of loader workers
    (https://github.com/facebookresearch/detectron2/issues/829).

    Args:
        orientations: per image 0 or 1; equal values for no grouping.
        batch_size: images over all ranks.
        seed: of the whole stream.
        start: the first batch to give.
        rank, world_size: of this process.
    """

    def __init__(
        self,
        orientations: Sequence[int],
        batch_size: int,
        seed: int,
        *,
        start: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.orientations = np.asarray(orientations)
        self.batch_size = batch_size
        self.seed = seed
        self.start = start
        part = batch_size // world_size
        self.mine = slice(rank * part, (rank + 1) * part)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for number, batch in enumerate(self._batches()):
            if number >= self.start:
                yield batch[self.mine]

    def _batches(self) -> Iterator[list[tuple[int, int]]]:
        buckets: dict[int, list[tuple[int, int]]] = {LANDSCAPE: [], PORTRAIT: []}
        epoch = 0
        while True:
            rng = np.random.default_rng((self.seed, epoch))
            order = rng.permutation(len(self.orientations)).tolist()
            seeds = rng.integers(2**62, size=len(order)).tolist()
            for index, seed in zip(order, seeds):
                bucket = buckets[int(self.orientations[index])]
                bucket.append((index, seed))
                if len(bucket) == self.batch_size:
                    yield bucket.copy()
                    bucket.clear()
            epoch += 1


def build_train_loader(
    cfg: CfgNode,
    records: Sequence[dict[str, Any]],
    mapper: TrainingMapper,
    *,
    seed: int,
    start: int,
    rank: int,
    world_size: int,
) -> DataLoader[dict[str, Any]]:
    """Endless batches (lists of samples) for this rank, from iteration ``start`` on."""
    if cfg.DATALOADER.ASPECT_RATIO_GROUPING:
        orientations = [LANDSCAPE if r["width"] > r["height"] else PORTRAIT for r in records]
    else:
        orientations = [LANDSCAPE] * len(records)
    batches = ResumableBatches(
        orientations, cfg.SOLVER.IMS_PER_BATCH, seed, start=start, rank=rank, world_size=world_size
    )
    return DataLoader(
        TrainingDataset(records, mapper),
        batch_sampler=batches,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        collate_fn=as_list,
        worker_init_fn=_start_worker,
        pin_memory=cfg.MODEL.DEVICE.split(":")[0] == "cuda",
    )


def build_test_loader(
    cfg: CfgNode, records: Sequence[dict[str, Any]], *, rank: int, world_size: int
) -> DataLoader[dict[str, Any]]:
    """Every image of this rank's share once, one at a time, in order."""
    share = range(rank, len(records), world_size)
    return DataLoader(
        TestDataset(records, TestMapper(cfg)),
        batch_size=1,
        sampler=list(share),
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        collate_fn=as_list,
        worker_init_fn=_start_worker,
    )


def build_loss_loader(
    cfg: CfgNode, records: Sequence[dict[str, Any]], mapper: TrainingMapper, *, rank: int, world_size: int
) -> DataLoader[dict[str, Any]]:
    """As :func:`build_test_loader`, with the targets that losses take."""
    return DataLoader(
        TrainingDataset(records, mapper),
        batch_size=1,
        sampler=[(index, index) for index in range(rank, len(records), world_size)],
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        collate_fn=as_list,
        worker_init_fn=_start_worker,
    )


def as_list(samples: list[Any]) -> list[Any]:
    """Images differ in size: a batch stays a list."""
    return samples


def _start_worker(worker: int) -> None:
    ignore_stop_signals()
    torch.set_num_threads(1)
