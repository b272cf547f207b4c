"""The order of images after resuming, against Detectron2's own loader, with and without loader workers."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("detectron2.engine", reason="needs the real Detectron2: see docs/DETECTRON2.md")

from detectron2.data import build_detection_train_loader
from detectron2.data.samplers import TrainingSampler

from zenith_det.engines.detectron2_engine.data_order import ResumableSampler, sampler_of

pytestmark = pytest.mark.detectron2

IMAGES = [{"image_id": i, "width": 30 if i % 3 else 10, "height": 20} for i in range(13)]
LANDSCAPE = [record["width"] > record["height"] for record in IMAGES]


def loader(sampler: Any, workers: int, grouped: bool) -> Any:
    return build_detection_train_loader(
        IMAGES,
        mapper=dict,
        sampler=sampler,
        total_batch_size=3,
        aspect_ratio_grouping=grouped,
        num_workers=workers,
    )


def batches(source: Any, count: int) -> list[list[int]]:
    stream = iter(source)
    return [[sample["image_id"] for sample in next(stream)] for _ in range(count)]


def resumable(workers: int, grouped: bool) -> ResumableSampler:
    return ResumableSampler(TrainingSampler(len(IMAGES), seed=5), 3, workers, LANDSCAPE if grouped else None)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("grouped", [True, False])
def test_a_resumed_order_is_the_uninterrupted_one(workers: int, grouped: bool) -> None:
    # 13 images in batches of 3: an epoch ends within a batch, and groups hold images over from it.
    expected = batches(loader(TrainingSampler(len(IMAGES), seed=5), workers, grouped), 24)
    assert batches(loader(resumable(workers, grouped), workers, grouped), 24) == expected
    for done in (1, 2, 4, 9, 13):
        sampler = resumable(workers, grouped)
        sampler.skip = done
        assert batches(loader(sampler, workers, grouped), 24 - done) == expected[done:]


def test_other_workers_go_on_with_the_same_order() -> None:
    expected = batches(loader(TrainingSampler(len(IMAGES), seed=5), 2, True), 12)
    sampler = resumable(0, True)
    sampler.skip, sampler.order_workers = 5, 2
    assert batches(loader(sampler, 0, True), 7) == expected[5:]


def test_only_our_own_loaders_have_a_resumable_sampler() -> None:
    assert isinstance(sampler_of(loader(resumable(0, True), 0, True)), ResumableSampler)
    assert sampler_of(loader(TrainingSampler(len(IMAGES)), 0, False)) is None
    assert sampler_of(iter([1])) is None
