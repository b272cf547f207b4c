"""``evaluated.json``: which weights the detections beside it are of."""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from zenith_det.evaluation.results import RESULTS_FILE
from zenith_det.files import write_whole

EVALUATED_FILE = "evaluated.json"


@dataclass(frozen=True)
class EvaluatedWeights:
    """What was evaluated.

    Attributes:
        dataset: name of the set that it was evaluated on.
        averaged: averaged weights, and not those trained.
        iteration: the last one that the weights were trained for; ``None`` for those of a file.
        file: where they were loaded from; "" for those in training.
    """

    dataset: str
    averaged: bool
    iteration: int | None = None
    file: str = ""

    def __str__(self) -> str:
        if self.file:
            return ("averaged weights, " if self.averaged else "") + Path(self.file).name
        return f"{'averaged' if self.averaged else 'trained'} weights, iteration {self.iteration}"


def forget_weights(folder: Path) -> None:
    """Remove the note of detections that are about to be replaced."""
    # Where it can't be removed, the detections can't be written either: that is told then.
    with contextlib.suppress(OSError):
        (folder / EVALUATED_FILE).unlink(missing_ok=True)


def note_weights(folder: Path, weights: EvaluatedWeights) -> None:
    """Write down what the detections in ``folder`` are of; nothing where there are none.

    Raises:
        UserError: it cannot be written.
    """
    if (folder / RESULTS_FILE).exists():
        write_whole(folder / EVALUATED_FILE, json.dumps(asdict(weights)))


def noted_weights(folder: Path) -> EvaluatedWeights | None:
    """What the detections in ``folder`` are of; ``None`` where that was not written down."""
    try:
        content = json.loads((folder / EVALUATED_FILE).read_text(encoding="utf-8"))
        weights = EvaluatedWeights(**content)
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    kinds = (
        (weights.dataset, str),
        (weights.averaged, bool),
        (weights.iteration, int | None),
        (weights.file, str),
    )
    return weights if all(isinstance(value, kind) for value, kind in kinds) else None
