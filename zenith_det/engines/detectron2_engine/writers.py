"""This toolkit's writers among Detectron2's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from detectron2.utils.events import EventWriter, get_event_storage

from zenith_det.training.logs.events import SMOOTHING_WINDOW


class LoggerWriter(EventWriter):
    """Hand Detectron2's scalars to one of this toolkit's writers.

    Args:
        make: makes it at the first write: where a resumed run starts is known once its checkpoint is loaded.
    """

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make = make
        self._writer: Any = None

    def write(self) -> None:
        """Send what is new in the current storage."""
        if self._writer is None:
            self._writer = self._make()
        self._writer.write(_Scalars())

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class _Scalars:
    """Detectron2's storage as this toolkit's writers ask for it."""

    def latest_smoothed(self) -> dict[str, tuple[float, int]]:
        storage = get_event_storage()
        smoothed: dict[str, tuple[float, int]] = storage.latest_with_smoothing_hint(SMOOTHING_WINDOW)
        return smoothed
