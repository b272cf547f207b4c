"""Where a resumed run goes on in its endless stream of images."""

from __future__ import annotations

from collections.abc import Mapping


def batches_done(images_seen: int, batch_size: int) -> int:
    """How many batches a resumed run leaves out, so that its images go on after those seen.

    With the batch size of the run before these are that run's batches exactly. With another one the remainder
    is rounded down: up to ``batch_size - 1`` images come twice rather than never. The run then counts on from
    ``batches_done(images_seen, batch_size) * batch_size`` images, and is exact again when it is resumed.

    Args:
        images_seen: by all processes together, since the stream began.
        batch_size: of the resumed run, over all processes.
    """
    return images_seen // batch_size


def what_changed(before: Mapping[str, object], now: Mapping[str, object]) -> str:
    """One phrase for the log: ``SOLVER.IMS_PER_BATCH 4 (was 2), ...``; "" where nothing differs.

    Names that ``before``, from a checkpoint, does not have are not compared.
    """
    return ", ".join(
        f"{name} {value} (was {before[name]})"
        for name, value in now.items()
        if name in before and before[name] != value
    )
