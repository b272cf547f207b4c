"""Which images go into which batch, a pure function of the seed and the iteration, and the loaders that read them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset, Sampler

from zenith_det import cli
from zenith_det.config import CfgNode
from zenith_det.engines.engine import Batch, Engine, Record, Sample, TrainingSet
from zenith_det.errors import DatasetError
from zenith_det.training.processes.distributed import get_rank, get_world_size
from zenith_det.training.processes.loader_wait import WatchedBatches, begin_worker

logger = logging.getLogger(__name__)

LANDSCAPE, PORTRAIT = 0, 1
MAX_UNREADABLE_IN_A_ROW = 10


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
        repeats: how often each image comes in an epoch on average (repeat-factor sampling, Gupta et al., arXiv
            1908.03195, appendix B.2): the fraction by chance, anew in each epoch. ``None``: once.
        subset: take so many of the images alone, chosen by ``seed``; 0: all.
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
        repeats: np.ndarray | None = None,
        subset: int = 0,
    ) -> None:
        self.orientations = np.asarray(orientations)
        self.batch_size = batch_size
        self.seed = seed
        self.start = start
        self.repeats = None if repeats is None else np.asarray(repeats, dtype=np.float64)
        self.subset = subset
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
            order = self._epoch(rng).tolist()
            seeds = rng.integers(2**62, size=len(order)).tolist()
            for index, seed in zip(order, seeds):
                bucket = buckets[int(self.orientations[index])]
                bucket.append((index, seed))
                if len(bucket) == self.batch_size:
                    yield bucket.copy()
                    bucket.clear()
            epoch += 1

    def _epoch(self, rng: np.random.Generator) -> np.ndarray:
        """The images of one epoch in their order."""
        if self.subset:
            chosen = np.random.default_rng(self.seed).permutation(len(self.orientations))[: self.subset]
            return rng.permutation(chosen)
        if self.repeats is None:
            return rng.permutation(len(self.orientations))
        whole = np.floor(self.repeats)
        times = whole + (rng.random(len(whole)) < self.repeats - whole)
        return rng.permutation(np.repeat(np.arange(len(whole)), times.astype(np.int64)))


class TrainingDataset(Dataset[Sample]):
    """Training samples by (index, seed): the same pair gives the same sample in any process.

    An image that cannot be read (it could when the run started) is replaced by the next one that can,
    with a warning, instead of ending a run hours in.

    Args:
        records: of the training set.
        mapper: see :meth:`~zenith_det.engines.engine.Engine.training_mapper`.
    """

    def __init__(
        self, records: Sequence[Record], mapper: Callable[[Record, np.random.Generator], Sample]
    ) -> None:
        self.records = records
        self.mapper = mapper

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        index, seed = key
        for attempt in range(MAX_UNREADABLE_IN_A_ROW):
            record = self.records[(index + attempt) % len(self.records)]
            try:
                return self.mapper(record, np.random.default_rng(seed))
            except DatasetError as error:
                logger.warning("image replaced by the next one in the set: %s", error)
        raise DatasetError(
            f"{MAX_UNREADABLE_IN_A_ROW} images in a row could not be read, from {record['file_name']} "
            f"backwards: run {cli.command('check-dataset')} --full"
        )


class TestDataset(Dataset[Sample]):
    """Inference samples by index."""

    __test__ = False

    def __init__(self, records: Sequence[Record], mapper: Callable[[Record], Sample]) -> None:
        self.records = records
        self.mapper = mapper

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Sample:
        return self.mapper(self.records[index])


def build_train_loader(
    cfg: CfgNode,
    data: TrainingSet,
    mapper: Callable[[Record, np.random.Generator], Sample],
    *,
    seed: int,
    start: int,
) -> DataLoader[Sample]:
    """Endless batches (lists of samples) for this rank, from iteration ``start`` on."""
    orientations = [LANDSCAPE] * len(data.records)
    if cfg.DATALOADER.ASPECT_RATIO_GROUPING:
        try:
            orientations = [LANDSCAPE if r["width"] > r["height"] else PORTRAIT for r in data.records]
        except KeyError as error:
            logger.warning(
                "%s: a record without %s: batches are not grouped by orientation "
                "(DATALOADER.ASPECT_RATIO_GROUPING)",
                ", ".join(data.names),
                error,
            )
    batches = ResumableBatches(
        orientations,
        cfg.SOLVER.IMS_PER_BATCH,
        seed,
        start=start,
        rank=get_rank(),
        world_size=get_world_size(),
        repeats=data.repeats,
        subset=data.subset,
    )
    return DataLoader(
        TrainingDataset(data.records, mapper),
        batch_sampler=batches,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        collate_fn=as_list,
        worker_init_fn=begin_worker,
        pin_memory=cfg.MODEL.DEVICE.split(":")[0] == "cuda",
    )


def train_batches(
    engine: Engine, cfg: CfgNode, data: TrainingSet, *, seed: int, start: int
) -> Iterator[Batch]:
    """The batches of :func:`build_train_loader`, by the engine's mapper, the loader's workers started."""
    mapper = engine.training_mapper(cfg, data.names, data.metadata)
    return WatchedBatches(build_train_loader(cfg, data, mapper, seed=seed, start=start))


def one_by_one(cfg: CfgNode, dataset: Dataset[Sample], keys: Sequence[Any]) -> DataLoader[Sample]:
    """This rank's share of ``dataset[key] for key in keys``, one at a time, in order."""
    return DataLoader(
        dataset,
        batch_size=1,
        sampler=list(keys[get_rank() :: get_world_size()]),
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        collate_fn=as_list,
        worker_init_fn=begin_worker,
    )


def as_list(samples: list[Any]) -> list[Any]:
    """Images differ in size: a batch stays a list."""
    return samples
