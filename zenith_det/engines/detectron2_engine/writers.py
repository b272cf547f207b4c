"""``metrics.json`` of a Detectron2 run, and services that are told the same."""

from __future__ import annotations

from typing import Any

from detectron2.utils.events import EventWriter, get_event_storage

from zenith_det.training.logs.events import SMOOTHING_WINDOW, JsonWriter
from zenith_det.training.logs.loggers import ServiceWriter


class MetricsWriter(EventWriter):
    """Write Detectron2's scalars into ``metrics.json`` as the built-in engine does.

    The layout is Detectron2's. What differs: NaN, which JSON does not have, becomes ``null``, and lines of an
    earlier attempt at the same iterations are moved aside.

    Args:
        path: the file.
        trainer: whose ``start_iter`` tells where this attempt began.
    """

    def __init__(self, path: str, trainer: Any) -> None:
        self._path = path
        self._trainer = trainer
        self._writer: JsonWriter | None = None

    def write(self) -> None:
        """Append what is new in the current storage."""
        if self._writer is None:
            # Not before: where a resumed run starts is known once its checkpoint is loaded.
            self._writer = JsonWriter(self._path, start_iter=self._trainer.start_iter)
        self._writer.write(_Scalars())  # type: ignore[arg-type]

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class LoggerWriter(EventWriter):
    """Hand Detectron2's scalars to one of this toolkit's writers.

    Args:
        writer: of a service, see :mod:`zenith_det.training.logs.loggers`.
    """

    def __init__(self, writer: ServiceWriter) -> None:
        self._writer = writer

    def write(self) -> None:
        """Send what is new in the current storage."""
        self._writer.write(_Scalars())  # type: ignore[arg-type]

    def close(self) -> None:
        self._writer.close()


class _Scalars:
    """Detectron2's storage as this toolkit's writers ask for it."""

    def latest_smoothed(self) -> dict[str, tuple[float, int]]:
        storage = get_event_storage()
        smoothed: dict[str, tuple[float, int]] = storage.latest_with_smoothing_hint(SMOOTHING_WINDOW)
        return smoothed
