"""Reading ``metrics.json`` (a JSON object a line) as it is found after crashes and resumes."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from zenith_det.config.metric_names import TTA
from zenith_det.errors import UserError
from zenith_det.training.checkpoints import averaging
from zenith_det.training.course import validation_loss

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.json"
# The shortest name that a set can have: a class's own (bbox/AP-NAME) may hold slashes, too.
_EVALUATED = re.compile(
    rf"({averaging.PREFIX})?(?:(.+?)/)??((?:bbox|segm|keypoints)(?:{TTA})?/AP.*|{validation_loss.PREFIX}.*)"
)


@dataclass(frozen=True)
class Series:
    """One scalar over a run: iterations (ascending, each once) and finite values."""

    iterations: npt.NDArray[np.int64]
    values: npt.NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.iterations)


def read_metrics(output_dir: str | Path) -> dict[str, Series]:
    """Read every scalar of a run.

    A line that was cut short by a crash is skipped. Where a run was resumed from an earlier checkpoint, what
    it had logged beyond that point is of a past that no longer counts: a training line that goes back drops
    it. A value logged twice for one iteration counts as it was logged last. Values that are not finite are
    left out.

    Args:
        output_dir: the run's folder, or the file itself.

    Raises:
        UserError: there is no such file, or no usable line in it.
    """
    path = Path(output_dir)
    if path.is_dir() or path.suffix != ".json":
        path = path / METRICS_FILE
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise UserError(f"{path}: cannot read the run's metrics: {error.strerror or error}") from error

    collected: dict[str, dict[int, float]] = {}
    last_trained = -1
    unreadable = 0
    for line in lines:
        record = _parse(line)
        if record is None:
            unreadable += bool(line.strip())
            continue
        iteration, scalars = record
        if "total_loss" in scalars:
            if iteration < last_trained:
                for series in collected.values():
                    for stale in [known for known in series if known >= iteration]:
                        del series[stale]
            last_trained = iteration
        for key, value in scalars.items():
            if math.isfinite(value):
                collected.setdefault(key, {})[iteration] = value
    if unreadable:
        logger.info("%s: %d of %d lines were cut short and are left out", path, unreadable, len(lines))
    if not any(collected.values()):
        raise UserError(f"{path}: no metrics in it yet; let the run write at least one line")
    return {key: _series(points) for key, points in collected.items() if points}


def by_test_set(metrics: Mapping[str, Series]) -> dict[str, dict[str, Series]]:
    """What evaluations gave, by the name of the test set, which is taken off: ``NAME/bbox/AP`` is ``bbox/AP`` there,
    ``averaged/NAME/bbox/AP`` is ``averaged/bbox/AP``.

    A run with one test set logs no name: its set is ``""``.
    """
    sets: dict[str, dict[str, Series]] = {}
    for name, series in metrics.items():
        if match := _EVALUATED.fullmatch(name):
            averaged, test_set, scalar = match.groups(default="")
            sets.setdefault(test_set, {})[averaged + scalar] = series
    return sets


def _parse(line: str) -> tuple[int, dict[str, float]] | None:
    """(iteration, its scalars), or None for what is no whole line."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    if not isinstance(record, dict) or not isinstance(iteration := record.pop("iteration", None), int):
        return None
    return iteration, {key: float(value) for key, value in record.items() if isinstance(value, (int, float))}


def _series(points: Mapping[int, float]) -> Series:
    iterations = sorted(points)
    return Series(np.array(iterations, np.int64), np.array([points[i] for i in iterations], np.float64))
