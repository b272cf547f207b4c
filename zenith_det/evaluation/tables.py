"""Results for people (tables) and for scripts (Detectron2's ``copypaste:`` lines)."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence

from zenith_det.config.metric_names import TASKS
from zenith_det.evaluation.coco import METRICS
from zenith_det.evaluation.explained import log_explanations

logger = logging.getLogger(__name__)

_ALL_METRICS = METRICS["bbox"]
#: Widest per-class table, in characters.
_MAX_WIDTH = 110


def results_table(results: Mapping[str, Mapping[str, float]]) -> str:
    """A table with a line per task and, for more than one class, a table of AP per class.

    ``nan`` (no ground truth) is shown as ``n/a``; a metric that a task does not have (small keypoints) as
    ``-``.
    """
    rows = [
        [TASKS.get(task, task), *(_number(metrics[m]) if m in metrics else "-" for m in _ALL_METRICS)]
        for task, metrics in results.items()
    ]
    text = _table(["", *_ALL_METRICS], rows)
    per_class = _per_class_table(results)
    return f"{text}\n\n{per_class}" if per_class else text


def copypaste_lines(results: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Detectron2's three lines a task, which people's scripts search logs for; per-class AP is left out
    there too."""
    lines = []
    for task, metrics in results.items():
        main = {metric: value for metric, value in metrics.items() if "-" not in metric}
        lines.append(f"copypaste: Task: {task}")
        lines.append("copypaste: " + ",".join(main))
        lines.append("copypaste: " + ",".join(f"{value:.4f}" for value in main.values()))
    return lines


def log_results(
    results: Mapping[str, Mapping[str, float]],
    explanations: Sequence[str] = (),
    run: str = "",
    *,
    copypaste: bool = True,
) -> None:
    """Log the tables, the explanations (see :func:`log_explanations`, also for ``run``), and the ``copypaste:`` lines
    last, where scripts expect them, unless somebody else prints them."""
    logger.info("COCO AP in percent:\n%s", results_table(results))
    log_explanations(explanations, run)
    for line in copypaste_lines(results) if copypaste else ():
        logger.info("%s", line)


def _per_class_table(results: Mapping[str, Mapping[str, float]]) -> str:
    classes = list(dict.fromkeys(m for metrics in results.values() for m in metrics if m.startswith("AP-")))
    if len(classes) < 2:
        return ""
    header = ["class", *(f"{TASKS.get(task, task)} AP" for task in results)]
    cells = [
        [
            metric.removeprefix("AP-"),
            *(_number(metrics[metric]) if metric in metrics else "-" for metrics in results.values()),
        ]
        for metric in classes
    ]
    widths = [max(len(row[n]) for row in [header, *cells]) + 3 for n in range(len(header))]
    groups = max(1, min(_MAX_WIDTH // sum(widths), math.ceil(len(cells) / 8)))
    height = math.ceil(len(cells) / groups)
    blank = [""] * len(header)
    rows = []
    for line in range(height):
        row: list[str] = []
        for group in range(groups):
            index = group * height + line
            row += cells[index] if index < len(cells) else blank
        rows.append(row)
    return _table(header * groups, rows)


def _number(value: float) -> str:
    return f"{value:.2f}" if math.isfinite(value) else "n/a"


def _table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table: names to the left, numbers to the right."""
    widths = [max(3, *(len(row[n]) for row in [header, *rows])) for n in range(len(header))]
    left = [title in ("", "class") for title in header]

    def line(cells: Sequence[str]) -> str:
        padded = (
            c.ljust(w) if is_left else c.rjust(w) for c, w, is_left in zip(cells, widths, left, strict=True)
        )
        return "| " + " | ".join(padded) + " |"

    rule = (
        "|"
        + "|".join(
            ":" + "-" * (w + 1) if is_left else "-" * (w + 1) + ":"
            for w, is_left in zip(widths, left, strict=True)
        )
        + "|"
    )
    return "\n".join([line(header), rule, *(line(row) for row in rows)])
