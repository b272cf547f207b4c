"""Why an AP is 0, told: all of it in ``explained.json`` beside the detections, the first of it in the log."""

from __future__ import annotations

import contextlib
import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path

from zenith_det.evaluation.explain import NO_GROUND_TRUTH
from zenith_det.evaluation.results import write_whole

logger = logging.getLogger(__name__)

EXPLAINED_FILE = "explained.json"
#: Warnings of a run, and of one evaluation: a model that finds nothing yet is evaluated many times.
MOST_WARNINGS = 3
MOST_AT_ONCE = 2

_told: set[str] = set()


def begin_telling() -> None:
    """A run begins: what an earlier one in this process was told counts no more."""
    _told.clear()


def log_explanations(explanations: Sequence[str]) -> None:
    """Log what :func:`~zenith_det.evaluation.explain_results` found: warnings, but for what a set merely lacks.

    At most :data:`MOST_WARNINGS` a run, and none twice: the same with other numbers is the same.
    """
    lines = {line: _kind(line) for line in explanations if not line.startswith(NO_GROUND_TRUTH)}
    new = [line for line, kind in lines.items() if kind not in _told]
    shown = new[: min(MOST_AT_ONCE, MOST_WARNINGS - len(_told))]
    _told.update(lines[line] for line in shown)
    rest = len(lines) - len(shown)
    for number, line in enumerate(shown, start=1):
        more = (
            f" ({EXPLAINED_FILE} and tools/report.py tell {rest} more)"
            if rest and number == len(shown)
            else ""
        )
        logger.warning("%s%s", line, more)
    for line in explanations:
        if line.startswith(NO_GROUND_TRUTH):
            logger.info("%s", line)


def _kind(line: str) -> str:
    return re.sub(r"\d+", "0", line)


def write_explanations(folder: Path, explanations: Sequence[str]) -> None:
    """Write them to :data:`EXPLAINED_FILE`; without any there is none.

    Raises:
        DatasetError: it cannot be written.
    """
    if explanations:
        write_whole(folder / EXPLAINED_FILE, json.dumps(list(explanations), indent=1))
    else:
        with contextlib.suppress(OSError):
            (folder / EXPLAINED_FILE).unlink(missing_ok=True)


def read_explanations(folder: Path) -> list[str]:
    """What :func:`write_explanations` wrote; nothing where there is no such file."""
    try:
        content = json.loads((folder / EXPLAINED_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return []
    return [line for line in content if isinstance(line, str)] if isinstance(content, list) else []
