"""``recommended_score.json``: from which score on detections are worth keeping, beside the detections it is of."""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from zenith_det.errors import UserError
from zenith_det.evaluation.judging import SCORES, Judgement
from zenith_det.evaluation.results import RESULTS_FILE
from zenith_det.files import write_whole

RECOMMENDED_FILE = "recommended_score.json"
#: Detections from this score on are shown where nothing recommends another.
DEFAULT_SCORE = 0.5


@dataclass(frozen=True)
class RecommendedScore:
    """Where F1 is highest.

    Attributes:
        score: lowest score to keep.
        f1: there, in [0, 1], the mean over the classes.
        detections: bytes of the file of detections, by which a note of earlier ones is known.
    """

    score: float
    f1: float
    detections: int


def note_recommended(folder: Path, judgement: Judgement) -> RecommendedScore | None:
    """Write down what the detections in ``folder`` recommend; ``None`` where they find nothing.

    A folder that can't be written to does without the note.
    """
    score = judgement.recommended_score
    if score is None:
        return None
    f1 = float(judgement.mean_f1[int(SCORES.searchsorted(score))])
    recommended = RecommendedScore(score, f1, (folder / RESULTS_FILE).stat().st_size)
    with contextlib.suppress(UserError):
        write_whole(folder / RECOMMENDED_FILE, json.dumps(asdict(recommended)))
    return recommended


def noted_recommended(folder: Path) -> RecommendedScore | None:
    """What was written down for the detections in ``folder``; ``None`` where nothing was, or for other ones."""
    try:
        noted = RecommendedScore(**json.loads((folder / RECOMMENDED_FILE).read_text(encoding="utf-8")))
        size = (folder / RESULTS_FILE).stat().st_size
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    good = isinstance(noted.score, float) and 0 <= noted.score <= 1 and isinstance(noted.f1, float)
    return noted if good and noted.detections == size else None
