"""Scalars of a run: kept in memory while training, written to ``metrics.json`` and TensorBoard.

The names, the file layout and the smoothing (a median over the last 20 iterations) are Detectron2's
(``detectron2/utils/events.py``), so that scripts which read its ``metrics.json`` read ours.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from fvcore.common.history_buffer import HistoryBuffer

from zenith_det.errors import UserError
from zenith_det.files import append_whole, write_whole

logger = logging.getLogger(__name__)

SMOOTHING_WINDOW = 20
# Enough for the longest window anything asks for (the ETA's median); bounded, so that a run of a
# million iterations holds no more than a short one.
HISTORY_LENGTH = 1000


class EventStorage:
    """The scalars of a run by name, each with its history.

    Args:
        start_iter: the first iteration of this run (0, or where a resumed run goes on).

    ``iter`` is the current iteration; the loop sets it before it puts scalars.
    """

    def __init__(self, start_iter: int = 0) -> None:
        self.iter = start_iter
        self._histories: dict[str, HistoryBuffer] = {}
        self._latest: dict[str, tuple[float, int]] = {}
        self._smoothing: dict[str, bool] = {}
        #: (name, image, iteration): RGB ``(3, H, W)``, uint8 or in [0, 1]; until the next writing.
        self.images: list[tuple[str, Any, int]] = []
        #: Arguments of TensorBoard's ``add_histogram_raw``; until the next writing.
        self.histograms: list[dict[str, Any]] = []

    def put_scalar(
        self, name: str, value: Any, smoothing: bool = True, *, iteration: int | None = None
    ) -> None:
        """Record one value.

        Args:
            name: e.g. ``"total_loss"``, ``"bbox/AP"``.
            value: anything ``float()`` takes; a tensor on an accelerator is synchronised here.
            smoothing: whether writers show the median of the last iterations in place of the value.
            iteration: where it belongs, if not at :attr:`iter`.
        """
        at = self.iter if iteration is None else iteration
        number = float(value)
        history = self._histories.get(name)
        if history is None:
            history = self._histories[name] = HistoryBuffer(max_length=HISTORY_LENGTH)
        history.update(number, at)
        self._latest[name] = (number, at)
        self._smoothing[name] = smoothing

    def put_scalars(self, *, smoothing: bool = True, **scalars: Any) -> None:
        """Record several values; names that are no identifiers go in as ``**{"zenith/ratio": r}``."""
        for name, value in scalars.items():
            self.put_scalar(name, value, smoothing)

    def forget_pictures(self) -> None:
        """Let go of images and histograms: those who wanted them have them."""
        self.images.clear()
        self.histograms.clear()

    def latest(self) -> dict[str, tuple[float, int]]:
        """The last value of every scalar and the iteration it was put at."""
        return dict(self._latest)

    def latest_smoothed(self) -> dict[str, tuple[float, int]]:
        """As :meth:`latest`, with the median (:meth:`median`) for scalars that want smoothing."""
        return {
            name: (self.median(name) if self._smoothing[name] else value, at)
            for name, (value, at) in self._latest.items()
        }

    def history(self, name: str) -> HistoryBuffer:
        """The history of one scalar (its newest values, at most 1000).

        Raises:
            KeyError: nothing was put under ``name``.
        """
        return self._histories[name]

    def names(self) -> Iterator[str]:
        """The names of all scalars, in the order in which they first came."""
        return iter(self._latest)

    def median(self, name: str, window: int = SMOOTHING_WINDOW) -> float:
        """The median of the values that ``name`` got in its last ``window`` iterations."""
        history = self._histories[name]
        return float(history.median(self._count(history, window)))

    def average(self, name: str, window: int = SMOOTHING_WINDOW) -> float:
        """The mean of the values that ``name`` got in its last ``window`` iterations."""
        history = self._histories[name]
        return float(history.avg(self._count(history, window)))

    @staticmethod
    def _count(history: HistoryBuffer, window: int) -> int:
        # A scalar put every tenth iteration is smoothed over its last `window` iterations, not over
        # its last `window` values, which would reach back ten times as far.
        values = history.values()
        newest = values[-1][1]
        count = 0
        for _, at in reversed(values):
            if at <= newest - window:
                break
            count += 1
        return count


class Writer(Protocol):
    """What takes the scalars out of an :class:`EventStorage`, each logging period."""

    def write(self, storage: EventStorage) -> None:
        """Write what is new since the last call."""

    def close(self) -> None:
        """Finish; nothing is written afterwards."""


class NewScalars:
    """Picks out the scalars that one writer has not written yet."""

    def __init__(self) -> None:
        self._written: dict[str, int] = {}

    def take(self, storage: EventStorage) -> dict[int, dict[str, float]]:
        """Scalars not taken before, by iteration (ascending)."""
        # Remembered by name: an AP put after the losses of the same iteration were written still counts.
        fresh: dict[int, dict[str, float]] = {}
        for name, (value, at) in storage.latest_smoothed().items():
            if at > self._written.get(name, -1):
                fresh.setdefault(at, {})[name] = value
                self._written[name] = at
        return dict(sorted(fresh.items()))


def json_line(record: Mapping[str, Any]) -> str:
    """One JSON object on one line; a number that JSON cannot say (NaN, infinity) becomes ``null``."""
    clean = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in record.items()
    }
    return json.dumps(clean, sort_keys=True, allow_nan=False)


class JsonWriter:
    """Appends to ``metrics.json``, one object a line: ``{"iteration": 19, "lr": 0.02, "total_loss": …}``.

    Args:
        path: the file; made if absent.
        start_iter: where this run starts. What an older attempt wrote from there on describes steps that
            are about to be taken again: those lines move to ``metrics.superseded.json`` beside it, so that
            the file holds one step axis, rising without overlap. (An evaluation made exactly at
            ``start_iter``, when the older run ended there, still holds and stays.) ``None`` keeps every line.

    Raises:
        UserError: the file cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str], *, start_iter: int | None = None) -> None:
        self.path = Path(path)
        self._new = NewScalars()
        try:
            if start_iter is not None and self.path.exists():
                self._supersede(start_iter)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read: {error.strerror or error}") from error
        append_whole(self.path, "")  # told now, not in twenty iterations

    def _supersede(self, start_iter: int) -> None:
        kept: list[str] = []
        superseded: list[str] = []
        with self.path.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    record = json.loads(line)
                    at = record["iteration"]
                    holds = at < start_iter or (at == start_iter > 0 and "total_loss" not in record)
                except (ValueError, TypeError, KeyError):
                    continue  # a line torn by a crash: no reader could use it
                (kept if holds else superseded).append(line if line.endswith("\n") else line + "\n")
        if superseded:
            aside = self.path.with_name(f"{self.path.stem}.superseded{self.path.suffix}")
            append_whole(aside, "".join(superseded))
            logger.info(
                "%s: %d lines of an earlier attempt, from iteration %d on, moved to %s",
                self.path, len(superseded), start_iter, aside.name,
            )  # fmt: skip
        write_whole(self.path, "".join(kept))

    def write(self, storage: EventStorage) -> None:
        """Append a line for each iteration with scalars not written yet.

        Raises:
            UserError: the disk is full or the file cannot be written.
        """
        lines = [json_line({**scalars, "iteration": at}) for at, scalars in self._new.take(storage).items()]
        if lines:
            append_whole(self.path, "\n".join(lines) + "\n")

    def close(self) -> None:
        """Nothing is open."""


class TensorBoardWriter:
    """Writes the scalars as TensorBoard events.

    Args:
        log_dir: where the event files go.
        start_iter: a resumed run hides what an older attempt wrote from this step on.

    Raises:
        UserError: the package ``tensorboard`` is not installed, or ``log_dir`` cannot be written.
    """

    def __init__(
        self,
        log_dir: str | os.PathLike[str],
        *,
        start_iter: int | None = None,
    ) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError(
                f"TensorBoard events need the package 'tensorboard' ({error}): pip install tensorboard"
            ) from error
        self._new = NewScalars()
        self._log_dir = log_dir
        _quieten_threads()
        with self._told():
            self._writer = SummaryWriter(os.fspath(log_dir), purge_step=start_iter or None)

    def write(self, storage: EventStorage) -> None:
        """Add the scalars not written yet, each at its own iteration.

        Raises:
            UserError: the disk is full or the file cannot be written.
        """
        with self._told():
            for at, scalars in self._new.take(storage).items():
                for name, value in scalars.items():
                    self._writer.add_scalar(name, value, at)
            for name, image, at in storage.images:
                self._writer.add_image(name, image, at)
            for histogram in storage.histograms:
                self._writer.add_histogram_raw(**histogram)
            self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        with contextlib.suppress(OSError):  # told when it was written to
            self._writer.close()

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{self._log_dir}: TensorBoard events cannot be written: {error.strerror or error}"
            ) from error


def _quieten_threads() -> None:
    """Let the thread that writes TensorBoard's events fail without a traceback: the next write raises the same."""
    global _hook
    if threading.excepthook is not _without_writers:
        _hook, threading.excepthook = threading.excepthook, _without_writers


def _without_writers(args: threading.ExceptHookArgs) -> None:
    if not (isinstance(args.exc_value, OSError) and type(args.thread).__name__ == "_AsyncWriterThread"):
        _hook(args)


_hook: Callable[[threading.ExceptHookArgs], Any] = threading.excepthook
