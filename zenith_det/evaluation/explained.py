"""Why an AP is 0, told: all of it in ``explained.json`` beside the detections, the first of it in the log."""

from __future__ import annotations

import contextlib
import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from zenith_det import cli
from zenith_det.evaluation.explain import NO_GROUND_TRUTH
from zenith_det.files import write_whole

logger = logging.getLogger(__name__)

EXPLAINED_FILE = "explained.json"
#: Warnings of a run, and of one evaluation: a model that finds nothing yet is evaluated many times.
MOST_WARNINGS = 3
MOST_AT_ONCE = 2
_METRIC_LINE = re.compile(r"(\w+) \S.* (?:is|are) (?:0|nan): ")


@dataclass
class _Told:
    """What a run was told already: subjects and reasons, and how many of them as warnings."""

    lines: set[str] = field(default_factory=set)
    warnings: int = 0


_runs: dict[str, _Told] = {}


def log_explanations(explanations: Sequence[str], run: str = "") -> None:
    """Log what :func:`~zenith_det.evaluation.explain_results` found: warnings, but for what a set merely lacks.

    Args:
        explanations: the lines.
        run: its OUTPUT_DIR. At most :data:`MOST_WARNINGS` are logged for it, of each task the first, and nothing
            twice: the same reason with other numbers is the same. "": all are logged.
    """
    if not run:
        for line in explanations:
            logger.log(logging.INFO if line.startswith(NO_GROUND_TRUTH) else logging.WARNING, "%s", line)
        return
    told = _runs.setdefault(run, _Told())
    shown: dict[str, str] = {}  # what a line is about -> the line
    for line in explanations:
        subject, reason = _parts(line)
        if reason in told.lines or subject in shown:
            continue
        if line.startswith(NO_GROUND_TRUTH):
            told.lines.add(reason)
            logger.info("%s", line)
        elif len(shown) < min(MOST_AT_ONCE, MOST_WARNINGS - told.warnings):
            shown[subject] = line
            told.lines.add(reason)
            told.warnings += 1
    rest = sum(not line.startswith(NO_GROUND_TRUTH) for line in explanations) - len(shown)
    for number, line in enumerate(shown.values(), start=1):
        more = rest and number == len(shown)
        logger.warning(
            "%s%s", line, f" ({cli.command('report')} and {EXPLAINED_FILE} tell {rest} more)" if more else ""
        )


def _parts(line: str) -> tuple[str, str]:
    """What a line is about, a task or the whole of it, and its reason without numbers and sizes."""
    match = _METRIC_LINE.match(line)
    plain = re.sub(r"[\d.]+|small |medium |large ", "", line)
    return (match[1], f"{match[1]}: {re.sub('.*?: ', '', plain, count=1)}") if match else (plain, plain)


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
