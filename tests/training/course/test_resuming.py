"""Where a resumed run goes on in its stream of images."""

from __future__ import annotations

import pytest

from zenith_det.training.course.resuming import batches_done


@pytest.mark.parametrize(
    ("seen", "batch", "done"), [(0, 4, 0), (24, 4, 6), (24, 8, 3), (26, 8, 3), (7, 8, 0)]
)
def test_images_are_rather_seen_twice_than_never(seen: int, batch: int, done: int) -> None:
    assert batches_done(seen, batch) == done
    assert 0 <= seen - done * batch < batch
