"""The order of training images and their augmentation, as pure functions of a seed and a position.

Detectron2 starts its sampler anew (https://github.com/facebookresearch/detectron2/issues/829): a run resumed
often sees the first images again and again.
"""

from __future__ import annotations

import itertools
import logging
import operator
import secrets
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from detectron2.data import DatasetFromList, build_detection_train_loader
from detectron2.data.common import AspectRatioGroupedDataset, ToIterableDataset
from detectron2.data.samplers import (
    RandomSubsetTrainingSampler,
    RepeatFactorTrainingSampler,
    TrainingSampler,
)
from detectron2.engine import HookBase, hooks
from detectron2.utils import comm
from detectron2.utils.serialize import PicklableWrapper
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from zenith_det.engines.detectron2_engine.data import mapper_for
from zenith_det.training.course.resuming import batches_done, what_changed
from zenith_det.training.course.seeding import derived_seed, seeded
from zenith_det.training.processes.ddp import settle_buckets
from zenith_det.training.processes.worker_signals import ignore_stop_signals, starting_workers

logger = logging.getLogger(__name__)


def run_seed(cfg: Any) -> int:
    """``SEED``, or where that is negative one drawn at random, the same on all processes.

    To be called by all processes together.
    """
    return int(cfg.SEED if cfg.SEED >= 0 else comm.all_gather(secrets.randbits(31))[0])


class ResumableSampler(Sampler[int]):
    """Detectron2's sampler from any batch on, each image with its position in the endless stream.

    It yields ``position * num_images + index``, in one number because Detectron2 passes a single one on;
    :class:`PositionedDataset` takes it apart. ``position`` counts over all processes.

    Args:
        inner: a sampler of an endless stream that is the same at each iteration.
        num_images: in the dataset.
        batch_size: images per batch and process.
        num_workers: loader processes, each of which Detectron2 lets run the sampler.
        landscape: per image whether it is wider than high, where batches are grouped by that; else ``None``.

    Attributes:
        order_workers: ``num_workers`` of the run that began: the order of the images depends on it.
    """

    def __init__(
        self,
        inner: Sampler[int],
        num_images: int,
        batch_size: int,
        num_workers: int,
        landscape: Sequence[bool] | None,
    ) -> None:
        self.inner = inner
        self.num_images = num_images
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.landscape = landscape
        # Not asked for later: a worker process may be in no process group.
        self._rank, self._world_size = comm.get_rank(), comm.get_world_size()
        self.start(0)

    def start(self, skip: int, order_workers: int | None = None) -> None:
        """Leave out the images of the first ``skip`` batches, as ``order_workers`` would have made them."""
        self.order_workers = self.num_workers if order_workers is None else order_workers
        # Here once, not in the workers: each of them iterates several times.
        self._waiting: list[int] = []
        self._taken = skip * self.batch_size
        if self.landscape is not None:
            self._waiting, self._taken = self._after(skip, self.landscape)

    def reseed(self, seed: int) -> None:
        """Another endless stream; to be followed by :meth:`start`."""
        self.inner._seed = seed
        if isinstance(self.inner, RandomSubsetTrainingSampler):
            generator = torch.Generator().manual_seed(seed)
            order = torch.randperm(self.inner._size, generator=generator)
            self.inner._indexes_subset = order[: self.inner._size_subset]

    def __iter__(self) -> Iterator[int]:
        if get_worker_info() is not None:
            # Detectron2 has a worker_init_fn of its own; this is the first of ours that runs in a worker.
            ignore_stop_signals()
        if self.landscape is None:
            # Without grouping each worker makes whole batches, and they come in the sampler's order.
            yield from itertools.islice(self._codes(), self._taken, None)
        elif self._taken == 0 and max(self.order_workers, 1) == max(self.num_workers, 1):
            yield from self._codes()
        else:
            rest = itertools.islice(self._order(), self._taken, None)
            yield from _as_workers_take_them(
                itertools.chain(self._waiting, rest), self.num_workers, self.batch_size
            )

    def _codes(self) -> Iterator[int]:
        """The images of this process as the sampler gives them."""
        first, step = self._rank * self.num_images, self._world_size * self.num_images
        return map(operator.add, itertools.count(first, step), self.inner)

    def _order(self) -> Iterator[int]:
        """The images in the order in which they reach the grouping."""
        return _as_workers_give_them(self._codes(), self.order_workers, self.batch_size)

    def _after(self, skip: int, landscape: Sequence[bool]) -> tuple[list[int], int]:
        """After so many batches: the images that wait for their group's next one, and how many were taken."""
        waiting: dict[bool, list[int]] = {True: [], False: []}
        order = self._order()
        done = taken = 0
        while done < skip:
            code = next(order)
            taken += 1
            group = waiting[landscape[code % self.num_images]]
            group.append(code)
            if len(group) == self.batch_size:
                group.clear()
                done += 1
        return waiting[True] + waiting[False], taken


def _as_workers_give_them(stream: Iterator[int], workers: int, chunk: int) -> Iterator[int]:
    """The order in which ``workers`` processes, each with every so manieth chunk, deliver a stream.

    The loader takes one image from each worker in turn.
    """
    while True:
        block = list(itertools.islice(stream, max(workers, 1) * chunk))
        for place in range(chunk):
            yield from block[place::chunk]


def _as_workers_take_them(order: Iterator[int], workers: int, chunk: int) -> Iterator[int]:
    """The stream that ``workers`` processes deliver in the given order: the inverse of the above."""
    workers = max(workers, 1)
    while True:
        block = list(itertools.islice(order, workers * chunk))
        for worker in range(workers):
            yield from block[worker::workers]


class PositionedDataset(Dataset[Any]):
    """Mapped records for :class:`ResumableSampler`: each image draws by its position what augmentation needs.

    So it does not matter which process maps it, and after which others. (Detectron2's ``MapDataset`` would
    remember every number it was ever asked for.)

    Args:
        records: a list, or a dataset, of Detectron2's records.
        mapper: makes a sample of a record, and never ``None``.

    Attributes:
        seed: of the random numbers.
    """

    def __init__(self, records: Any, mapper: Any) -> None:
        self._records = DatasetFromList(records, copy=False) if isinstance(records, list) else records
        self._mapper = PicklableWrapper(mapper)
        self.seed = 0

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, code: int) -> Any:
        position, index = divmod(int(code), len(self._records))
        with seeded(derived_seed(self.seed, position)):
            return self._mapper(self._records[index])


class _StartedSafely:
    """The loader below Detectron2's grouping, which starts its workers no sooner than for the first batch."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        self._loader = loader
        self.dataset = loader.dataset

    def __iter__(self) -> Iterator[Any]:
        with starting_workers():
            return iter(self._loader)


def build_train_loader(cfg: Any) -> Any:
    """Detectron2's training loader, in an order that a resumed run can go on with.

    Args:
        cfg: Detectron2's configuration.
    """
    mapper = mapper_for(cfg, cfg.DATASETS.TRAIN, is_train=True)
    parts = build_detection_train_loader.from_config(cfg, mapper=mapper)
    # Subset and weighted samplers are of these classes, too.
    if not isinstance(parts["sampler"], (TrainingSampler, RepeatFactorTrainingSampler)):
        return build_detection_train_loader(**parts)
    landscape = None
    if parts["aspect_ratio_grouping"]:
        landscape = [record["width"] > record["height"] for record in parts["dataset"]]
    parts["sampler"] = ResumableSampler(
        parts["sampler"],
        len(parts["dataset"]),
        parts["total_batch_size"] // comm.get_world_size(),
        parts["num_workers"],
        landscape,
    )
    parts["dataset"] = PositionedDataset(parts["dataset"], parts["mapper"])
    parts["mapper"] = None
    # With a generator of its own the loader draws nothing from the random state that a training step uses.
    loader = build_detection_train_loader(**parts, seed=0)
    if isinstance(loader, AspectRatioGroupedDataset):
        loader.dataset = _StartedSafely(loader.dataset)
    start_loader(loader, run_seed(cfg))
    return loader


def sampler_of(loader: Any) -> ResumableSampler | None:
    """The sampler behind a loader of :func:`build_train_loader`; ``None`` for any other loader."""
    if not isinstance(loader, (AspectRatioGroupedDataset, DataLoader)):
        return None
    dataset = _inner(loader)
    sampler = dataset.sampler if isinstance(dataset, ToIterableDataset) else None
    return sampler if isinstance(sampler, ResumableSampler) else None


def start_loader(loader: Any, seed: int, skip: int = 0, order_workers: int | None = None) -> None:
    """Let the next iteration over a loader of :func:`build_train_loader` begin after ``skip`` batches.

    Args:
        seed: of the order and of the augmentation.
        order_workers: the ``NUM_WORKERS`` that the order is of, where it isn't the loader's own.
    """
    sampler = sampler_of(loader)
    assert sampler is not None
    sampler.reseed(seed)
    sampler.start(skip, order_workers)
    _inner(loader).dataset.seed = seed
    if isinstance(loader, AspectRatioGroupedDataset):
        for images_of_a_batch_begun in loader._buckets:
            images_of_a_batch_begun.clear()


def _inner(loader: Any) -> Any:
    """The dataset that Detectron2 runs the sampler in."""
    return (loader.dataset if isinstance(loader, AspectRatioGroupedDataset) else loader).dataset


class DataOrder(HookBase):
    """Keep the run's seed and its place in the stream of images in the checkpoint, and go on there.

    For a :class:`ZenithTrainer`: it sets ``trainer.seed``. All random choices are functions of the seed and of
    iteration, rank and position, so a resumed run repeats the uninterrupted one bit for bit, with any number
    of loader workers. With another batch size or number of processes the images go on; images that were
    waiting for others of their orientation may then come twice or be left out once. With another dataset or
    sampler the order starts again, from another seed. A line says each of these.
    """

    def __init__(self) -> None:
        self._saved: dict[str, Any] | None = None
        self._first_iter: int | None = None  # where this process began or went back to
        self._order_seed = 0
        self._images_seen = 0  # up to there, since the order began

    def state_dict(self) -> dict[str, Any]:
        seed = {"seed": self.trainer.seed}
        sampler = sampler_of(self.trainer.data_loader)
        if sampler is None:
            return seed
        if self._first_iter is None:  # saved before training
            return self._saved or seed
        iterations = self.trainer.iter + 1 - self._first_iter
        return {
            **seed,
            "order_seed": self._order_seed,
            "order_workers": sampler.order_workers,
            "images_seen": self._images_seen + iterations * sampler.batch_size * comm.get_world_size(),
            "stream": self._stream(sampler),
            "layout": self._layout(sampler),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._saved = state
        own = self.trainer.cfg.SEED
        self.trainer.seed = int(state["seed"])
        if own >= 0 and own != self.trainer.seed:
            logger.info(
                "SEED %d is not applied: a resumed run goes on with its own seed, %d", own, self.trainer.seed
            )

    def before_train(self) -> None:
        settle_buckets(self.trainer._trainer.model)
        self.go_on(self.trainer.start_iter)

    def before_step(self) -> None:
        for hook in self._precise_bn():
            if hook._data_iter is not None:
                # From the same images each time, as a resumed run's first time.
                start_loader(hook._data_loader, self.trainer.seed)
                hook._data_iter = None

    def go_on(self, iteration: int) -> None:
        """Give the trainer the images from ``iteration`` on, by the state loaded last.

        Called before training; call it again after loading a checkpoint to go back to.
        """
        self._first_iter = iteration
        for hook in self._precise_bn():
            start_loader(hook._data_loader, self.trainer.seed)
        loader = self.trainer.data_loader
        sampler = sampler_of(loader)
        if sampler is None:
            return
        self._order_seed, self._images_seen = self.trainer.seed, 0
        skip, order_workers = 0, None
        if iteration > 0:
            saved = self._saved or {}
            stream, layout = self._stream(sampler), self._layout(sampler)
            if saved.get("stream") == stream:
                total = sampler.batch_size * comm.get_world_size()
                skip = batches_done(saved["images_seen"], total)
                self._images_seen = skip * total
                self._order_seed, order_workers = saved["order_seed"], saved["order_workers"]
                if changed := what_changed(saved["layout"], layout):
                    logger.info(
                        "Resumed with %s: the training images go on after the %d seen",
                        changed,
                        saved["images_seen"],
                    )
            else:
                self._order_seed = derived_seed(self.trainer.seed, iteration)
                why = what_changed(saved.get("stream", {}), stream) or "the checkpoint does not hold it"
                logger.info("The order of the training images starts again: %s", why)
        start_loader(loader, self._order_seed, skip, order_workers)
        self.trainer._trainer.reset_data_loader(lambda: loader)

    def _stream(self, sampler: ResumableSampler) -> dict[str, Any]:
        """What makes the endless stream of images, beside its seed."""
        return {
            "number of training images": sampler.num_images,
            "DATALOADER.SAMPLER_TRAIN": self.trainer.cfg.DATALOADER.SAMPLER_TRAIN,
        }

    def _layout(self, sampler: ResumableSampler) -> dict[str, int]:
        """How the stream is put into batches."""
        return {
            "SOLVER.IMS_PER_BATCH": sampler.batch_size * comm.get_world_size(),
            "number of processes": comm.get_world_size(),
            "DATALOADER.NUM_WORKERS": sampler.num_workers,
        }

    def _precise_bn(self) -> list[Any]:
        """Detectron2's hooks that read images of their own."""
        found = [hook for hook in self.trainer._hooks if isinstance(hook, hooks.PreciseBN)]
        return [hook for hook in found if sampler_of(hook._data_loader) is not None]
