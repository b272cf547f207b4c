"""What the scores of a run's detections are worth, for its page: which to keep, what is taken for what."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure

from zenith_det.evaluation import Judgement, SizeBin
from zenith_det.evaluation.judging import MATCH_IOU, SCORES, ScoredClass
from zenith_det.report.curves import AP_LINES, BLUE, GREY, line_style
from zenith_det.report.figures import INK, Picture, draw
from zenith_det.report.html import Html, figure, grid, paragraph, table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Classes that have lines of their own in a figure; of more, each is grey.
MOST_LINES = 8
#: Classes that the table of confusions shows: those with the most errors.
MOST_CONFUSED = 20
BACKGROUND = "background"


def judged_parts(judgement: Judgement, sizes: Sequence[SizeBin], score: float) -> list[Html]:
    """The parts of a section.

    Args:
        judgement: of all detections.
        sizes: AP by size.
        score: detections from this score on are counted in the tables.
    """
    with_objects = [one for one in judgement.classes if one.objects]
    figures = [
        _precision_recall(with_objects),
        _f1(judgement, with_objects),
        _calibration(judgement),
        _sizes(sizes),
    ]
    return [
        paragraph(_advice(judgement, score)),
        grid([figure(picture) for picture in figures if picture is not None]),
        _classes(with_objects, score),
        _confusion(judgement, score),
    ]


def _advice(judgement: Judgement, score: float) -> str:
    best = judgement.recommended_score
    if best is None:
        return f"No detection finds an object of its class (IoU of boxes {MATCH_IOU:g}): no score can be recommended."
    values = judgement.mean_f1
    at = values[int(SCORES.searchsorted(best))]
    text = f"Recommended score: {best:.3g}. Detections from it on have the highest F1, {at:.3f} averaged over classes"
    if score != best:
        kept = np.mean([one.f1(score) for one in judgement.classes if one.objects])
        text += f"; from {score:g} on, which the tables here are of, it is {kept:.3f}"
    return text + (
        f". A detection is right where its box has an IoU of {MATCH_IOU:g} with an object of its class that no better "
        "one has taken; what lies in a crowd region doesn't count."
    )


# ---- figures


def _precision_recall(classes: Sequence[ScoredClass]) -> Picture | None:
    if not any(len(one.scores) for one in classes):
        return None
    recalls = np.linspace(0, 1, 101)
    rows = [_best_precision(one, recalls) for one in classes]

    def paint(axes: Axes) -> None:
        _lines(axes, classes, [(recalls, row) for row in rows], np.mean(rows, axis=0), recalls)
        axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.03))

    area = float(np.mean(rows))
    return _draw(
        "precision_recall",
        f"Precision over recall (IoU {MATCH_IOU:g})",
        f"Highest precision at each recall or a higher one; its mean, AP50, is {100 * area:.1f}.",
        paint,
    )


def _best_precision(one: ScoredClass, recalls: np.ndarray) -> np.ndarray:
    """As COCO's AP takes it: the highest precision at each recall or a higher one, 0 beyond what is reached."""
    best = np.maximum.accumulate(one.precision[::-1])[::-1]
    places = np.searchsorted(one.recall, recalls, side="left")
    return np.concatenate((best, [0.0]))[places]


def _f1(judgement: Judgement, classes: Sequence[ScoredClass]) -> Picture | None:
    best = judgement.recommended_score
    if best is None:
        return None

    def paint(axes: Axes) -> None:
        lines = [(SCORES, one.f1(SCORES)) for one in classes]
        _lines(axes, classes, lines, judgement.mean_f1, SCORES)
        axes.axvline(best, color=GREY, linestyle="--", linewidth=1)
        axes.annotate(f"{best:.3g}", (best, 1.03), (3, -2), textcoords="offset points", va="top", color=INK)
        axes.set(xlabel="lowest score that is kept", ylabel="F1", xlim=(0, 1), ylim=(0, 1.03))

    return _draw("f1", "F1 over score", f"The mean of the classes is highest at {best:.3g}.", paint)


def _lines(
    axes: Axes,
    classes: Sequence[ScoredClass],
    lines: Sequence[tuple[np.ndarray, np.ndarray]],
    mean: np.ndarray,
    at: np.ndarray,
) -> None:
    few = len(classes) <= MOST_LINES
    for n, (one, (x, y)) in enumerate(zip(classes, lines)):
        color, dashes = line_style(n) if few else (GREY, "-")
        axes.plot(
            x, y, color=color, linestyle=dashes, linewidth=1.6 if few else 0.6, alpha=1 if few else 0.5,
            label=one.name if few else "each class" if n == 0 else None,
        )  # fmt: skip
    if len(classes) > 1:
        axes.plot(at, mean, color=INK, linewidth=2.2, label="mean")
        axes.legend(loc="lower left")


def _calibration(judgement: Judgement) -> Picture | None:
    bins = judgement.calibration()
    if not bins:
        return None
    error = judgement.calibration_error()

    def paint(axes: Axes) -> None:
        axes.plot(
            [0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1, label="a score that is a probability"
        )
        middles = [(one.low + one.high) / 2 for one in bins]
        axes.bar(
            middles,
            [one.precision for one in bins],
            width=0.085,
            color=BLUE,
            label="detections that are right",
        )
        axes.set_xticks(middles, [f"{at:.2f}\n({_short(one.count)})" for at, one in zip(middles, bins)])
        axes.set(xlabel="score (detections)", ylabel="share that is right", xlim=(0, 1), ylim=(0, 1.08))
        axes.grid(axis="x", visible=False)
        axes.legend(loc="upper left")

    return _draw(
        "calibration",
        "Calibration",
        f"Scores and the share of right detections differ by {error:.3f} on average; in brackets: how many "
        "detections have such a score.",
        paint,
    )


def _short(count: int) -> str:
    return str(count) if count < 10_000 else f"{count / 1000:.0f}k"


def _sizes(sizes: Sequence[SizeBin]) -> Picture | None:
    tasks = [
        (task, label, color) for task, label, color, _ in AP_LINES if any(task in one.ap for one in sizes)
    ]
    if not sizes or not tasks:
        return None

    def paint(axes: Axes) -> None:
        width = 0.8 / len(tasks)
        for n, (task, label, color) in enumerate(tasks):
            places = np.arange(len(sizes)) + (n - (len(tasks) - 1) / 2) * width
            heights = [0 if math.isnan(one.ap[task]) else one.ap[task] for one in sizes]
            axes.bar(places, heights, width=0.92 * width, color=color, label=label)
            for place, one in zip(places, sizes):
                text = "n/a" if math.isnan(one.ap[task]) else f"{one.ap[task]:.0f}"
                axes.annotate(
                    text, (place, 0 if text == "n/a" else one.ap[task]), (0, 2), textcoords="offset points",
                    ha="center", fontsize=7.5, color=INK,
                )  # fmt: skip
        axes.set_xticks(range(len(sizes)), [f"{_range(one)}\n({one.objects})" for one in sizes])
        axes.set(xlabel="side in pixels (objects)", ylabel="AP, percent", ylim=(0, 108))
        axes.grid(axis="x", visible=False)
        if len(tasks) > 1:
            axes.legend(loc="upper left")

    return _draw("sizes", "AP by object size", "The side of a square of the object's area, in pixels.", paint)


def _range(one: SizeBin) -> str:
    return f"{one.low:g}–{one.high:g}" if math.isfinite(one.high) else f"{one.low:g}–"


def _draw(name: str, title: str, told: str, paint_axes: Callable[[Axes], None]) -> Picture:
    def paint(canvas: Figure) -> None:
        axes = canvas.add_subplot()
        axes.set_title(title)
        paint_axes(axes)

    return draw(f"judged_{name}", f"{title}. {told}", paint)


# ---- tables


def _classes(classes: Sequence[ScoredClass], score: float) -> Html:
    rows = []
    for one in sorted(classes, key=lambda one: float(one.f1(score))):
        kept, right = (int(count) for count in one.counts(score))
        best = one.best_score
        rows.append(
            [
                one.name,
                one.objects,
                f"{right / kept:.3f}" if kept else "n/a",
                f"{right / one.objects:.3f}",
                f"{float(one.f1(score)):.3f}",
                f"{float(one.f1(best)):.3f}" if best is not None else "0",
                f"{best:.3g}" if best is not None else "n/a",
            ]
        )
    return table(
        f"Detections with a score of {score:.3g} or more, lowest F1 first; the last two columns: the best that a score "
        "of its own gives the class",
        ["class", "objects", "precision", "recall", "F1", "highest F1", "at score"],
        rows,
    )


def _confusion(judgement: Judgement, score: float) -> Html:
    counts = judgement.confusion(score)
    names = [one.name for one in judgement.classes]
    present = np.flatnonzero(counts[:-1].sum(axis=1) + counts[:, :-1].sum(axis=0))
    if not len(present):
        return Html("")
    told = ""
    if len(present) > MOST_CONFUSED:
        own = np.diag(counts)[:-1]
        errors = counts[:-1].sum(axis=1) + counts[:, :-1].sum(axis=0) - 2 * own
        chosen = sorted(present, key=lambda n: -errors[n])[:MOST_CONFUSED]
        told = f"; the {MOST_CONFUSED} of {len(present)} classes with the most errors"
        present = np.sort(chosen)
    order = [*present.tolist(), len(names)]
    shown = counts[np.ix_(order, order)]
    labels = [*(names[n] for n in present), BACKGROUND]
    totals = counts[order].sum(axis=1)
    cells = [
        [label, *["–" if last_row and n == len(order) - 1 else int(count) for n, count in enumerate(row)]]
        for label, row, last_row in zip(labels, shown, [False] * len(present) + [True])
    ]
    shades = [
        [0.0, *(0.6 * count / total if total else 0.0 for count in row)] for row, total in zip(shown, totals)
    ]
    return table(
        f"What is there (rows) and what was detected with a score of {score:.3g} or more (columns){told}. The "
        f"row “{BACKGROUND}” counts detections where nothing is, or an object that was found already; the column "
        f"“{BACKGROUND}” counts missed objects",
        ["", *labels],
        cells,
        shades=shades,
    )
