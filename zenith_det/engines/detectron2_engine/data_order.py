"""The order of training images, and the random state, as a resumed run needs them to go on where it stopped.

Detectron2 starts its sampler anew (https://github.com/facebookresearch/detectron2/issues/829): a run resumed
often sees the first images again and again.
"""

from __future__ import annotations

import itertools
import logging
import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.data import build_detection_train_loader
from detectron2.data.common import AspectRatioGroupedDataset, ToIterableDataset
from detectron2.data.samplers import RepeatFactorTrainingSampler, TrainingSampler
from detectron2.engine import HookBase
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from torch.utils.data import DataLoader, Sampler

from zenith_det.engines.detectron2_engine.data import mapper_for

logger = logging.getLogger(__name__)


class ResumableSampler(Sampler[int]):
    """Detectron2's sampler, less the images of the batches that are done.

    Args:
        inner: a sampler of an endless stream that is the same at each iteration.
        batch_size: images per batch and process.
        num_workers: loader processes, each of which Detectron2 lets run the sampler.
        landscape: per image whether it is wider than high, where batches are grouped by that; else ``None``.

    Attributes:
        skip: batches that are done; with 0 the stream is ``inner``'s own.
        order_workers: ``num_workers`` of the run that began: the order of the images depends on it.
    """

    def __init__(
        self, inner: Sampler[int], batch_size: int, num_workers: int, landscape: Sequence[bool] | None
    ) -> None:
        self.inner = inner
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.landscape = landscape
        self.skip = 0
        self.order_workers = num_workers

    def __iter__(self) -> Iterator[int]:
        if self.skip == 0:
            yield from self.inner
        elif self.landscape is None:
            # Without grouping each worker makes whole batches, and they come in the sampler's order.
            yield from itertools.islice(self.inner, self.skip * self.batch_size, None)
        else:
            yield from _as_workers_take_them(
                self._remaining(self.landscape), self.num_workers, self.batch_size
            )

    def _remaining(self, landscape: Sequence[bool]) -> Iterator[int]:
        """The images in the order in which they reach the grouping, without those of finished batches."""
        order = _as_workers_give_them(self.inner, self.order_workers, self.batch_size)
        waiting: dict[bool, list[int]] = {True: [], False: []}
        done = 0
        while done < self.skip:
            index = next(order)
            group = waiting[landscape[index]]
            group.append(index)
            if len(group) == self.batch_size:
                group.clear()
                done += 1
        return itertools.chain(waiting[True], waiting[False], order)


def _as_workers_give_them(stream: Sampler[int], workers: int, chunk: int) -> Iterator[int]:
    """The order in which ``workers`` processes, each with every so manieth chunk, deliver a stream.

    The loader takes one image from each worker in turn.
    """
    endless = iter(stream)
    while True:
        block = list(itertools.islice(endless, max(workers, 1) * chunk))
        for place in range(chunk):
            yield from block[place::chunk]


def _as_workers_take_them(order: Iterator[int], workers: int, chunk: int) -> Iterator[int]:
    """The stream that ``workers`` processes deliver in the given order: the inverse of the above."""
    workers = max(workers, 1)
    while True:
        block = list(itertools.islice(order, workers * chunk))
        for worker in range(workers):
            yield from block[worker::workers]


def build_train_loader(cfg: Any) -> Any:
    """Detectron2's training loader, in an order that a resumed run can go on with.

    Args:
        cfg: Detectron2's configuration.
    """
    mapper = mapper_for(cfg, cfg.DATASETS.TRAIN, is_train=True)
    parts = build_detection_train_loader.from_config(cfg, mapper=mapper)
    if isinstance(parts["sampler"], (TrainingSampler, RepeatFactorTrainingSampler)):
        landscape = None
        if parts["aspect_ratio_grouping"]:
            landscape = [record["width"] > record["height"] for record in parts["dataset"]]
        parts["sampler"] = ResumableSampler(
            parts["sampler"],
            parts["total_batch_size"] // comm.get_world_size(),
            parts["num_workers"],
            landscape,
        )
    return build_detection_train_loader(**parts)


def _begin_again(cfg: Any, loader: Any, sampler: ResumableSampler, seed: int) -> Any:
    """The loader anew, for a sampler whose stream has changed; its workers are seeded by ``seed``."""
    return build_detection_train_loader(
        _inner(loader).dataset,  # a mapped dataset: it goes through as it is
        mapper=None,
        sampler=sampler,
        total_batch_size=cfg.SOLVER.IMS_PER_BATCH,
        aspect_ratio_grouping=cfg.DATALOADER.ASPECT_RATIO_GROUPING,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        seed=seed,
    )


def _inner(loader: Any) -> Any:
    """The dataset that Detectron2 runs the sampler in."""
    return (loader.dataset if isinstance(loader, AspectRatioGroupedDataset) else loader).dataset


def sampler_of(loader: Any) -> ResumableSampler | None:
    """The sampler behind a loader of :func:`build_train_loader`; ``None`` for any other loader."""
    if not isinstance(loader, (AspectRatioGroupedDataset, DataLoader)):
        return None
    dataset = _inner(loader)
    sampler = dataset.sampler if isinstance(dataset, ToIterableDataset) else None
    return sampler if isinstance(sampler, ResumableSampler) else None


class DataOrder(HookBase):
    """Keep the order of the images and the random state in the checkpoint, and go on with them.

    A run of one process without loader workers goes on bit for bit. With more processes or workers the images
    are the same ones in the same batches, and augmentation draws other random numbers. With another batch
    size, number of processes or dataset the order starts anew, from another seed, which a line says.
    """

    def __init__(self) -> None:
        self._saved: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        sampler = sampler_of(self.trainer.data_loader)
        if sampler is None:
            return {}
        return {**self._facts(sampler), "workers": sampler.order_workers, "random": _random_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._saved = state

    def before_train(self) -> None:
        start, sampler = self.trainer.start_iter, sampler_of(self.trainer.data_loader)
        if start == 0 or sampler is None:
            return
        saved = self._saved or {}
        facts = self._facts(sampler)
        changed = [name for name, value in facts.items() if saved.get(name, value) != value]
        if saved and not changed:
            sampler.skip = start
            sampler.order_workers = saved["workers"]
        else:
            why = f"another {' and '.join(changed)}" if changed else "the checkpoint does not hold it"
            logger.info("The order of the training images starts anew: %s", why)
            sampler.inner._seed = sampler.inner._seed + start
        cfg, seed = self.trainer.cfg, max(self.trainer.cfg.SEED, 0) + start
        # A loader with a generator of its own draws nothing from the random state that is restored here.
        loader = _begin_again(cfg, self.trainer.data_loader, sampler, seed)
        self.trainer._trainer.reset_data_loader(lambda: loader)
        if saved and comm.get_world_size() == 1:
            _restore_random_state(saved["random"])
        elif cfg.SEED >= 0:
            # Not the numbers of the first iterations again.
            seed_all_rng(seed + comm.get_rank())

    def _facts(self, sampler: ResumableSampler) -> dict[str, int]:
        """What the order depends on, beside the workers."""
        return {
            "seed": int(sampler.inner._seed),
            "batch size": sampler.batch_size,
            "number of processes": comm.get_world_size(),
            "number of images": len(_inner(self.trainer.data_loader).dataset),
        }


def _random_state() -> dict[str, Any]:
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    version, internal, gauss_next = random.getstate()
    state = {
        "torch": torch.get_rng_state(),
        "numpy": [kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, gauss],
        "python": [version, list(internal), gauss_next],
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _restore_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"].cpu())
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())
