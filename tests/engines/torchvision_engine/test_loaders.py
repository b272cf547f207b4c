"""Which images go where: the same stream whoever asks, and wherever it is resumed."""

from __future__ import annotations

import os
import signal
import subprocess
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import SmallSet
from tests.engines.torchvision_engine.small_models import small_config, training_set
from zenith_det.data import load_coco_dataset
from zenith_det.engines.batches import (
    ResumableBatches,
    TestDataset,
    build_train_loader,
    one_by_one,
)
from zenith_det.engines.torchvision_engine.input_pipeline import TestMapper, TrainingMapper

ORIENTATIONS = np.random.default_rng(0).integers(2, size=53).tolist()


def take(count: int, **settings: int) -> list[list[tuple[int, int]]]:
    return list(islice(ResumableBatches(ORIENTATIONS, 8, 5, **settings), count))


@pytest.mark.parametrize("start", [1, 6, 7, 25])
def test_a_stream_resumed_anywhere_goes_on_with_the_same_images(start: int) -> None:
    """https://github.com/facebookresearch/detectron2/issues/829"""
    assert take(10, start=start) == take(40)[start : start + 10]


def test_ranks_share_out_the_very_same_batches() -> None:
    whole = take(20)
    parts = [take(20, rank=rank, world_size=4) for rank in range(4)]
    assert [[key for part in parts for key in part[i]] for i in range(20)] == whole


def test_batches_are_of_one_orientation_and_every_image_comes_once_an_epoch() -> None:
    batches = take(200)
    assert all(len({ORIENTATIONS[index] for index, _ in batch}) == 1 for batch in batches)
    counts = np.bincount([index for batch in batches for index, _ in batch], minlength=53)
    epochs = 200 * 8 / 53
    assert counts.min() >= int(epochs) - 1
    assert counts.max() <= int(epochs) + 2


def test_augmentation_differs_from_epoch_to_epoch() -> None:
    seeds = [seed for batch in take(40) for index, seed in batch if index == 3]
    assert len(seeds) > 3
    assert len(set(seeds)) == len(seeds)


@pytest.mark.parametrize("workers", [0, 2])
def test_samples_do_not_depend_on_workers_or_resuming(shapes: SmallSet, workers: int) -> None:
    dataset = load_coco_dataset(shapes.train)
    cfg = small_config(
        "mask",
        DATALOADER__NUM_WORKERS=workers,
        SOLVER__IMS_PER_BATCH=4,
        INPUT__MIN_SIZE_TRAIN=(48, 64, 80),
    ).cfg

    def stream(start: int, num_workers: int) -> list[tuple[int, tuple[int, ...], float]]:
        cfg.DATALOADER.NUM_WORKERS = num_workers
        loader = build_train_loader(
            cfg,
            training_set(dataset),
            TrainingMapper(cfg, dataset.metadata),
            seed=1,
            start=start,
        )
        return [
            (s["image_id"], tuple(s["image"].shape), float(s["image"].float().sum()))
            for batch in islice(iter(loader), 12 - start)
            for s in batch
        ]

    torch.manual_seed(workers)  # another global state changes nothing
    whole = stream(0, 0)
    assert len({shape for _, shape, _ in whole}) > 2, "multi-scale resizing is off"
    assert stream(5, workers) == whole[20:]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux's /proc to count open files")
def test_many_bitmaps_come_from_a_worker_under_one_descriptor(shapes: SmallSet) -> None:
    """Ten batches in waiting would otherwise pass the usual limit of 1024 open files."""
    dataset = load_coco_dataset(shapes.train)
    record = max(dataset.records, key=lambda r: len(r["annotations"]))
    crowded = [{**record, "annotations": 20 * record["annotations"]}]

    def batch(workers: int) -> list[Any]:
        cfg = small_config(
            "mask",
            DATALOADER__NUM_WORKERS=workers,
            SOLVER__IMS_PER_BATCH=1,
            INPUT__MASK_FORMAT="bitmask",
        ).cfg
        mapper = TrainingMapper(cfg, dataset.metadata)
        loader = build_train_loader(cfg, training_set(dataset, crowded), mapper, seed=1, start=0)
        before = len(os.listdir("/proc/self/fd"))
        masks = next(iter(loader))[0]["targets"].masks
        assert len(os.listdir("/proc/self/fd")) - before < len(masks) / 2
        return masks

    expected, masks = batch(0), batch(1)
    assert len(masks) > 40
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(masks, expected))


@pytest.mark.parametrize("kind", ["train", "test"])
def test_workers_live_through_signals_that_stop_the_main_process(shapes: SmallSet, kind: str) -> None:
    dataset = load_coco_dataset(shapes.train)
    cfg = small_config("mask", DATALOADER__NUM_WORKERS=1, SOLVER__IMS_PER_BATCH=2).cfg
    if kind == "train":
        mapper = TrainingMapper(cfg, dataset.metadata)
        loader = build_train_loader(cfg, training_set(dataset), mapper, seed=1, start=0)
    else:
        loader = one_by_one(cfg, TestDataset(dataset.records, TestMapper(cfg)), range(len(dataset.records)))
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    stream = iter(loader)
    next(stream)
    for name in ("INT", "TERM", "USR1"):
        # By another process: the loader's own may end its workers.
        subprocess.run(["kill", "-s", name, str(stream._workers[0].pid)], check=True)
    assert len(list(islice(stream, 10))) == 10
    assert stream._workers[0].is_alive()
    assert [signal.getsignal(number) for number in numbers] == before
