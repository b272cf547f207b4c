"""Batches on their way to the device: the same ones, in the same order, and failures where they belong."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.engines.torchvision_engine.small_models import samples, square_targets
from zenith_det.engines.prefetch import Prefetcher
from zenith_det.engines.torchvision_engine.roi_heads import Targets

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(
                not torch.cuda.is_available(), reason="needs a GPU: streams and pinned memory"
            ),
        ],
    ),
]


def source(count: int, pinned: bool) -> Iterator[list[dict[str, Any]]]:
    for number in range(count):
        batch: list[dict[str, Any]] = samples(square_targets(17), square_targets(17))
        for sample in batch:
            sample["image"] = torch.full((3, 512, 512), number, dtype=torch.uint8)
            if pinned:
                sample["image"] = sample["image"].pin_memory()
                sample["targets"] = sample["targets"].pin_memory()
            sample["image_id"] = number
        yield batch
    raise OSError("the disk is gone")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("ahead", [False, True])
def test_every_batch_comes_once_and_whole_and_the_failure_after_the_last(device: str, ahead: bool) -> None:
    batches = Prefetcher(source(6, device == "cuda"), torch.device(device))
    sums = []
    for number in range(6):
        batch = next(batches)
        assert batches.waited > 0
        if device == "cuda":
            torch.cuda._sleep(50_000_000)  # work that the next copy must not run into
        total = sum(sample["image"].long().sum() for sample in batch)
        for sample in batch:
            targets: Targets = sample["targets"]
            assert sample["image_id"] == number
            assert {t.device.type for t in (sample["image"], *targets.tensors())} == {device}
            assert torch.equal(targets.boxes.cpu(), square_targets().boxes)
            assert targets.masks is not None
        del batch, sample, targets
        if ahead:
            batches.prefetch()  # of the failure, too, at the end: it is told by the next call
        sums.append(total)
    assert [int(total) for total in sums] == [number * 2 * 3 * 512 * 512 for number in range(6)]
    with pytest.raises(OSError, match="the disk is gone"):
        next(batches)


def test_on_the_cpu_nothing_is_copied_and_one_batch_is_taken_early() -> None:
    given = [[{"image": torch.zeros(3, 4, 4)}], [{"image": torch.ones(3, 4, 4)}]]
    taken = []

    def counting() -> Iterator[list[dict[str, Any]]]:
        for batch in given:
            taken.append(batch)
            yield batch

    batches = Prefetcher(counting(), torch.device("cpu"))
    assert next(batches) is given[0]
    batches.prefetch()
    batches.prefetch()
    assert len(taken) == 2
    assert next(batches) is given[1]
