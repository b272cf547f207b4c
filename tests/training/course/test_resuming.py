"""Where a resumed run goes on in its stream of images."""

from __future__ import annotations

import pytest

from zenith_det.training.course.resuming import batches_done, what_changed


@pytest.mark.parametrize(
    ("seen", "batch", "done"), [(0, 4, 0), (24, 4, 6), (24, 8, 3), (26, 8, 3), (7, 8, 0)]
)
def test_images_are_rather_seen_twice_than_never(seen: int, batch: int, done: int) -> None:
    assert batches_done(seen, batch) == done
    assert 0 <= seen - done * batch < batch


def test_what_changed_names_new_and_old() -> None:
    before = {"SOLVER.IMS_PER_BATCH": 2, "number of processes": 1}
    assert what_changed(before, before) == ""
    now = {"SOLVER.IMS_PER_BATCH": 4, "number of processes": 2, "of a later version": 1}
    assert what_changed(before, now) == "SOLVER.IMS_PER_BATCH 4 (was 2), number of processes 2 (was 1)"
