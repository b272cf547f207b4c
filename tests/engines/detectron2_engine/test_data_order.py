"""The order of images after resuming, against Detectron2's own loader, with and without loader workers."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("detectron2.engine", reason="needs the real Detectron2: see docs/DETECTRON2.md")

from detectron2.data import build_detection_train_loader
from detectron2.data.samplers import RandomSubsetTrainingSampler, TrainingSampler

from tests.engines.detectron2_engine.d2_helpers import forget, rcnn_cfg, register_synthetic, synthetic_set
from zenith_det.engines.detectron2_engine.data import build_test_loader
from zenith_det.engines.detectron2_engine.data_order import (
    PositionedDataset,
    ResumableSampler,
    build_train_loader,
    sampler_of,
    start_loader,
)

pytestmark = pytest.mark.detectron2

IMAGES = [{"image_id": i, "width": 30 if i % 3 else 10, "height": 20} for i in range(13)]
LANDSCAPE = [record["width"] > record["height"] for record in IMAGES]


def with_draws(record: dict[str, Any]) -> dict[str, Any]:
    """A mapper that draws from every generator that augmentations draw from."""
    draws = (float(np.random.rand()), random.random(), float(torch.rand(1)))
    return {**record, "draws": draws, "process": os.getpid()}


def detectron2s_loader(workers: int, grouped: bool) -> Any:
    return build_detection_train_loader(
        IMAGES,
        mapper=dict,
        sampler=TrainingSampler(len(IMAGES), seed=5),
        total_batch_size=3,
        aspect_ratio_grouping=grouped,
        num_workers=workers,
    )


def ours(workers: int, grouped: bool, skip: int = 0, order_workers: int | None = None) -> Any:
    sampler = ResumableSampler(
        TrainingSampler(len(IMAGES), seed=0), len(IMAGES), 3, workers, LANDSCAPE if grouped else None
    )
    loader = build_detection_train_loader(
        PositionedDataset(IMAGES, with_draws),
        mapper=None,
        sampler=sampler,
        total_batch_size=3,
        aspect_ratio_grouping=grouped,
        num_workers=workers,
        seed=0,
    )
    start_loader(loader, 5, skip, order_workers)
    return loader


def batches(source: Any, count: int) -> list[list[int]]:
    stream = iter(source)
    return [[sample["image_id"] for sample in next(stream)] for _ in range(count)]


def draws(source: Any, count: int) -> list[list[Any]]:
    stream = iter(source)
    return [[(sample["image_id"], *sample["draws"]) for sample in next(stream)] for _ in range(count)]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("grouped", [True, False])
def test_a_resumed_order_is_the_uninterrupted_one(workers: int, grouped: bool) -> None:
    # 13 images in batches of 3: an epoch ends within a batch, and groups hold images over from it.
    expected = batches(detectron2s_loader(workers, grouped), 24)
    assert batches(ours(workers, grouped), 24) == expected
    for done in (1, 2, 4, 9, 13):
        assert batches(ours(workers, grouped, done), 24 - done) == expected[done:]


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize(("before", "after"), [(0, 2), (2, 0), (3, 2), (0, 0)])
def test_other_workers_go_on_with_the_same_images_and_draws(before: int, after: int, grouped: bool) -> None:
    whole = draws(ours(before, grouped), 12)
    assert len({sample[1:] for batch in whole for sample in batch}) == 36
    for done in (0, 1, 5):
        assert draws(ours(after, grouped, done, before), 12 - done) == whole[done:]


def test_loading_leaves_the_random_state_of_training_alone() -> None:
    for workers in (0, 1):
        stream = iter(ours(workers, True))
        torch.manual_seed(1), np.random.seed(1), random.seed(1)
        next(stream)
        after = (float(torch.rand(1)), float(np.random.rand()), random.random())
        torch.manual_seed(1), np.random.seed(1), random.seed(1)
        assert after == (float(torch.rand(1)), float(np.random.rand()), random.random())


def test_a_loader_starts_again_from_anywhere() -> None:
    """As a run does that goes back to a checkpoint: nothing of the batches begun is left over."""
    loader = ours(0, True)
    expected = batches(loader, 10)
    start_loader(loader, 5, 2)
    assert batches(loader, 8) == expected[2:]


def test_a_random_subset_comes_from_the_seed() -> None:
    def subset(seed: int) -> set[int]:
        sampler = ResumableSampler(RandomSubsetTrainingSampler(13, 0.5), 13, 3, 0, None)
        sampler.reseed(seed)
        sampler.start(0)
        stream = iter(sampler)
        return {next(stream) % 13 for _ in range(12)}

    assert len(subset(1)) == 6
    assert subset(1) == subset(1)
    assert len({frozenset(subset(seed)) for seed in range(5)}) > 1


def test_only_our_own_loaders_have_a_resumable_sampler() -> None:
    assert isinstance(sampler_of(ours(0, True)), ResumableSampler)
    assert isinstance(sampler_of(ours(0, False)), ResumableSampler)
    assert sampler_of(detectron2s_loader(0, False)) is None
    assert sampler_of(iter([1])) is None


@pytest.mark.parametrize(("loader", "grouped"), [("train", True), ("train", False), ("test", False)])
def test_workers_live_through_signals_that_stop_the_main_process(
    tmp_path: Path, loader: str, grouped: bool
) -> None:
    files = synthetic_set(tmp_path, train=12, val=12)
    register_synthetic("signals", files["val"])
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    try:
        cfg = rcnn_cfg(
            tmp_path, "signals", DATALOADER__NUM_WORKERS=2, DATALOADER__ASPECT_RATIO_GROUPING=grouped
        )
        made = build_train_loader(cfg) if loader == "train" else build_test_loader(cfg, "signals")
        stream = iter(made)
        next(stream), next(stream)
        workers = multiprocessing.active_children()
        assert len(workers) == 2
        for worker in workers:
            for name in ("INT", "TERM", "USR1"):
                # By another process: the loader's own may end its workers.
                subprocess.run(["kill", "-s", name, str(worker.pid)], check=True)
        time.sleep(0.2)
        assert all(worker.is_alive() for worker in workers)
        for _ in range(8):
            assert next(stream)
        after = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
        assert after == before
    finally:
        forget("signals")
