"""One run as one HTML page that needs nothing beside it."""

from __future__ import annotations

import itertools
import json
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from zenith_det.config.metric_names import TASKS, TTA
from zenith_det.data import read_image
from zenith_det.data.statistics import STATISTICS_FILE, read_statistics
from zenith_det.errors import UserError
from zenith_det.evaluation import Judgement, SizeBin, evaluate_by_size, note_recommended, read_explanations
from zenith_det.evaluation.coco import METRICS
from zenith_det.evaluation.explained import EXPLAINED_FILE
from zenith_det.evaluation.judging import ScoredClass
from zenith_det.evaluation.recommended import DEFAULT_SCORE
from zenith_det.report import curves
from zenith_det.report.dataset_page import statistics_parts
from zenith_det.report.diagnosis import config_window, diagnose, sentences
from zenith_det.report.figures import Picture, draw
from zenith_det.report.findings import FalsePositive, Miss, find_errors
from zenith_det.report.html import (
    Html,
    Page,
    bullets,
    code,
    figure,
    folded,
    grid,
    heading,
    paragraph,
    photo,
    table,
    verdict,
)
from zenith_det.report.judged import judged_parts
from zenith_det.report.pictures import ByteImage, draw_instances
from zenith_det.report.run_data import Evaluated, read_evaluated, run_config
from zenith_det.training.checkpoints import averaging
from zenith_det.training.course.metrics_file import Series, by_test_set, read_metrics
from zenith_det.training.course.run_record import CONFIG_FILE, short_run_lines

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HTML_FILE = "report.html"
#: False positives and misses that are shown.
SHOWN = 12
#: The longer side of a cell, pixels.
_CELL = 300
#: Lines of a file that are shown whole; of longer ones the last.
_MAX_EVENTS = 30
_KEYS = (
    "SOLVER.OPTIMIZER", "SOLVER.LR_SCHEDULER_NAME", "SOLVER.BASE_LR", "SOLVER.ZENITH.WINDOW",
    "SOLVER.IMS_PER_BATCH", "SOLVER.MAX_ITER", "SOLVER.WARMUP_ITERS", "SOLVER.MOMENTUM", "SOLVER.WEIGHT_DECAY",
    "MODEL.WEIGHTS", "MODEL.DEVICE", "DATASETS.TRAIN", "DATASETS.TRAIN_JSON", "DATASETS.TEST",
    "DATASETS.VAL_JSON", "SEED",
)  # fmt: skip

Metrics = Mapping[str, Series]
#: What comes after a task's name, and how that is told.
_HOW = {"": "", TTA: ", test-time augmentation"}


def write_run_report(
    output_dir: Path,
    path: Path | None = None,
    *,
    threshold: float | None = None,
    say: Callable[[str], None] = print,
) -> Path:
    """Write ``OUTPUT_DIR/report.html``, from whatever the run has left so far.

    Args:
        output_dir: of a run of either engine, finished or not.
        path: the page, if it is to be elsewhere.
        threshold: detections from this score on count as found, in the pictures and counts; default: the score that
            F1 recommends, or 0.5 where nothing is found at any.
        say: told what is missing, a line each.

    Raises:
        UserError: the folder holds no run, or the page can't be written.
    """
    if not output_dir.is_dir():
        raise UserError(f"{output_dir}: no such folder; give a run's OUTPUT_DIR")
    missing: list[str] = []

    def have(read: Callable[[], Any]) -> Any:
        try:
            return read()
        except UserError as error:
            missing.append(str(error))
            return None

    cfg = have(lambda: run_config(output_dir))
    metrics: Metrics = have(lambda: read_metrics(output_dir)) or {}
    if cfg is None and not metrics:
        raise UserError(f"{output_dir}: neither config.yaml nor metrics.json: no run was made there")
    evaluated: Evaluated | None = (
        have(lambda: read_evaluated(output_dir, averaged=None)) if cfg is not None else None
    )
    if metrics and not any(name.endswith("/AP") for name in metrics):
        missing.append("no evaluation yet: there is no AP in metrics.json")
    sizes = have(lambda: _by_size(cfg, evaluated)) if evaluated is not None else []
    page = _page(output_dir, cfg, metrics, evaluated, sizes or [], threshold, missing)
    for line in missing:
        say(f"missing: {line}")
    return page.save(path or output_dir / HTML_FILE)


@dataclass(frozen=True)
class _Judged:
    """Detections of a run, and the score from which on they count."""

    evaluated: Evaluated
    judgement: Judgement
    score: float


def _page(
    output_dir: Path,
    cfg: Any,
    metrics: Metrics,
    evaluated: Evaluated | None,
    sizes: Sequence[SizeBin],
    threshold: float | None,
    missing: list[str],
) -> Page:
    done = max((int(s.iterations[-1]) + 1 for name, s in metrics.items() if name == "total_loss"), default=0)
    length = int(cfg.SOLVER.MAX_ITER) if cfg is not None else None
    state = f"{done} of {length} iterations" if length else f"{done} iterations"
    page = Page(f"Run: {output_dir.resolve().name}", f"{state}; {time.strftime('%Y-%m-%d %H:%M')}")
    window = config_window(cfg) if cfg is not None else None
    notes = diagnose(metrics, window=window, max_iter=length) if metrics else []
    if cfg is not None:
        notes = [f"{line[0].upper()}{line[1:]}." for line in short_run_lines(cfg)] + notes
    page.lead(
        verdict(_finals(metrics), warn=length is not None and done < length),
        heading("What the curves say"),
        bullets(sentences(notes)),
    )
    data = _data(output_dir, missing)
    if missing:
        page.lead(heading("What is missing"), bullets(missing))
    page.section("Curves", grid([figure(picture) for picture in _curves(metrics)]))
    sets = by_test_set(metrics)
    tables = [
        _ap_table(scalars, name, prefix)
        for name, scalars in sets.items()
        for prefix in ("", averaging.PREFIX)
    ]
    page.section("Average precision", *tables, *_explained(output_dir))
    judged, of = None, ""
    if evaluated is not None:
        judgement = evaluated.judge()
        note_recommended(evaluated.folder, judgement)
        score = threshold if threshold is not None else judgement.recommended_score or DEFAULT_SCORE
        judged = _Judged(evaluated, judgement, score)
        of = evaluated.dataset.metadata.name if evaluated.dataset.metadata.name in sets else ""
    # One kind of weights for AP and errors: those to use.
    averaged = any(_has_averaged(scalars) for scalars in sets.values())
    averaged = averaged if evaluated is None else evaluated.averaged
    other = _other_weights(evaluated, sets.get(of, {})) if evaluated is not None else ""
    classes = [paragraph(other)] if other else []
    for name, scalars in sets.items():
        prefix = averaging.PREFIX if averaged and _has_averaged(scalars) else ""
        classes.append(_class_table(scalars, name, prefix, judged if name == of else None))
    kind = "averaged weights" if averaged else "trained weights"
    page.section(f"Classes, hardest first ({kind})", *classes)
    if judged is not None:
        false_positives, misses = find_errors(judged.judgement, judged.score)
        for title, parts in (
            ("Scores and confusions", judged_parts(judged.judgement, sizes, judged.score)),
            ("False positives with the highest scores", _false_positives(judged, false_positives)),
            ("Largest objects missed", _misses(judged, misses)),
        ):
            page.section(f"{curves.of_test_set(title, of)} ({judged.evaluated.of})", *parts)
    page.section("Skipped steps and roll-backs", _events(output_dir))
    page.section("Data", *data)
    page.section("Configuration", *_config(output_dir, cfg))
    return page


def _by_size(cfg: Any, evaluated: Evaluated) -> list[SizeBin]:
    return evaluate_by_size(
        evaluated.ground_truth,
        evaluated.results,
        oks_sigmas=list(cfg.TEST.KEYPOINT_OKS_SIGMAS)
        or evaluated.dataset.metadata.keypoint_oks_sigmas
        or None,
        image_ids=set(evaluated.by_image),
    )


def _finals(metrics: Metrics) -> list[str]:
    """The last AP, a line for each test set."""
    lines = []
    for name, scalars in by_test_set(metrics).items():
        told, at = [], 0
        for prefix, what in (("", ""), (averaging.PREFIX, " with averaged weights")):
            for (task, title), (suffix, how) in itertools.product(TASKS.items(), _HOW.items()):
                series = scalars.get(f"{prefix}{task}{suffix}/AP")
                if series is not None:
                    how = how.replace(",", " with" if not what else " and")
                    told.append(f"{title} AP {series.values[-1]:.1f}{what}{how}")
                    at = int(series.iterations[-1])
        if told:
            text = ", ".join(told)
            text = f"{name}: {text}" if name else f"{text[0].upper()}{text[1:]}"
            lines.append(f"{text}, at iteration {at}.")
    return lines or ["No AP yet: the run was not evaluated."]


# ---- curves


def _curves(metrics: Metrics) -> list[Picture]:
    panels: list[Picture] = []

    def add(name: str, title: str, paint: Callable[[Axes], None], told: Series | None = None) -> None:
        panels.append(_panel(name, title, paint, told))

    if "total_loss" in metrics:
        loss = metrics["total_loss"]
        add("loss", "Total loss", lambda axes: curves.draw_total_loss(axes, metrics), loss)
    for number, (name, scalars) in enumerate(curves.with_ap(metrics).items()):
        title = curves.of_test_set("Average precision", name)
        paint = partial(curves.draw_ap, metrics=scalars)
        trained = scalars.get("bbox/AP")
        add(f"ap{number or ''}", title, paint, scalars.get(f"{averaging.PREFIX}bbox/AP", trained))
    if "lr" in metrics:
        lr = metrics["lr"]
        add("lr", "Effective learning rate", lambda axes: curves.draw_lr(axes, lr), lr)
    if "zenith/ratio" in metrics:
        ratio = metrics["zenith/ratio"]
        add("ratio", "LR ratio: window mean / zenith", lambda axes: curves.draw_ratio(axes, ratio), ratio)
    if "zenith/grad_norm" in metrics or "zenith/window_mean" in metrics:
        mean = metrics.get("zenith/window_mean")
        add("norm", "Gradient norm", lambda axes: curves.draw_norm(axes, metrics), mean)
    if components := curves.loss_components(metrics):
        add("parts", "Loss components", lambda axes: curves.draw_components(axes, metrics, components))
    return panels


def _panel(name: str, title: str, paint_axes: Callable[[Axes], None], series: Series | None) -> Picture:
    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        axes.set_title(title)
        paint_axes(axes)
        axes.set_xlabel("iteration")
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(7, integer=True, steps=[1, 2, 5, 10]))

    told = ""
    if series is not None:
        told = (
            f", from {series.values[0]:.3g} at iteration {series.iterations[0]} to {series.values[-1]:.3g} at "
            f"{series.iterations[-1]}; lowest {series.values.min():.3g}, highest {series.values.max():.3g}"
        )
    return draw(f"curve_{name}", f"{title} over iterations{told}.", paint)


# ---- tables


def _ap_table(metrics: Metrics, test_set: str, prefix: str) -> Html:
    """Of one test set, its name taken off; ``prefix``: of averaged weights."""
    rows = []
    columns = METRICS["bbox"]
    for (task, title), (suffix, how) in itertools.product(TASKS.items(), _HOW.items()):
        series = metrics.get(f"{prefix}{task}{suffix}/AP")
        if series is None:
            continue
        best = int(series.values.argmax())
        at = int(series.iterations[-1])
        row = [title + how]
        for name in columns:
            values = metrics.get(f"{prefix}{task}{suffix}/{name}")
            there = values is not None and int(values.iterations[-1]) == at
            row.append(f"{values.values[-1]:.1f}" if values is not None and there else "n/a")
        rows.append([*row, at, f"{series.values[best]:.1f} at {series.iterations[best]}"])
    what = "averaged weights" if prefix else "last evaluation"
    where = f" on {test_set}" if test_set else ""
    return table(
        f"COCO AP in percent{where}, {what}; n/a: no object of that kind",
        ["", *columns, "iteration", "highest AP"],
        rows,
    )


def _explained(output_dir: Path) -> list[Html]:
    """Why an AP is 0, or there is none, as the last evaluations wrote it down."""
    told: dict[tuple[str, tuple[str, ...]], list[str]] = {}  # test set and lines: of which weights
    for folder, weights in ((output_dir, "trained"), (output_dir / averaging.FOLDER, "averaged")):
        # With several test sets, each has a folder, in each engine's own place.
        for pattern in ("inference", "inference/*", "*/inference"):
            for path in sorted(folder.glob(f"{pattern}/{EXPLAINED_FILE}")):
                of = path.parent if pattern == "inference/*" else path.parent.parent
                name = "" if pattern == "inference" else of.name
                if name == averaging.FOLDER:
                    continue  # its turn comes
                told.setdefault((name, tuple(read_explanations(path.parent))), []).append(weights)
    parts: list[Html] = []
    for (name, lines), kinds in told.items():
        title = curves.of_test_set(f"Why an AP is 0 or n/a ({' and '.join(kinds)} weights)", name)
        parts += [heading(title), bullets(lines)]
    return parts


def _has_averaged(metrics: Metrics) -> bool:
    """Whether averaged weights were evaluated on a test set, its name taken off."""
    return any(f"{averaging.PREFIX}{task}/AP" in metrics for task in TASKS)


def _other_weights(evaluated: Evaluated, metrics: Metrics) -> str:
    """A line where the detections are not those of the last AP; ``metrics`` of their test set, its name taken off."""
    weights = evaluated.weights
    prefix = averaging.PREFIX if evaluated.averaged else ""
    ends = [int(s.iterations[-1]) for task in TASKS if (s := metrics.get(f"{prefix}{task}/AP")) is not None]
    if weights is None or not ends:
        return ""
    # Detectron2 logs its last evaluation under the number of iterations, one more than the last one's.
    if weights.iteration is not None and abs(weights.iteration - ends[0]) <= 1:
        return ""
    of = f"iteration {weights.iteration}"
    if weights.file:
        of = f"{weights.file}, which was evaluated by itself"
    return (
        f"Objects found, missed and false positives are of {of}; the AP are of the run's last evaluation, at "
        f"iteration {ends[0]}."
    )


def _class_table(metrics: Metrics, test_set: str, prefix: str, judged: _Judged | None) -> Html:
    """Of one test set, its name taken off; ``prefix``: of averaged weights."""
    tasks = [task for task in TASKS if f"{prefix}{task}/AP" in metrics]
    own = re.compile(rf"{prefix}(?:bbox|segm|keypoints)/AP-(.*)")
    names = sorted({match[1] for name in metrics if (match := own.fullmatch(name))})
    classes: dict[str, ScoredClass] = {}
    if judged is not None:
        classes = {one.name: one for one in judged.judgement.classes}
        names = names or ([] if not tasks else list(classes))
    rows = []
    for name in names:
        values = []
        for task in tasks:
            series = metrics.get(f"{prefix}{task}/AP-{name}")
            if series is None and len(classes) == 1:
                series = metrics[f"{prefix}{task}/AP"]
            values.append(float(series.values[-1]) if series is not None else float("nan"))
        counts: list[Any] = []
        if judged is not None and name in classes:
            one = classes[name]
            kept, found = map(int, one.counts(judged.score))
            counts = [one.objects, found, one.objects - found, kept - found]
        rows.append((values, name, counts))
    rows.sort(key=lambda row: row[0][0] if row[0] and not np.isnan(row[0][0]) else 1e9)
    header = ["class", *[f"{TASKS[task]} AP" for task in tasks]]
    told = ""
    if judged is not None:
        header += ["objects", "found", "missed", "false positives"]
        told = f"; found: a box of IoU 0.5 with a score of {judged.score:g} or more"
    shown = [
        [name, *["n/a" if np.isnan(value) else f"{value:.1f}" for value in values], *counts]
        for values, name, counts in rows
    ]
    where = f" on {test_set}" if test_set else ""
    return table(f"Each class, in the last evaluation{where}{told}", header, shown)


# ---- pictures of errors


def _false_positives(judged: _Judged, found: Sequence[FalsePositive]) -> list[str]:
    kinds: Counter[str] = Counter()
    for one in found:
        word, colon, _ = one.reason.partition(":")
        kinds[{"in truth": "another class", "near": "near another class"}[word] if colon else word] += 1
    if not kinds:
        return [paragraph(f"None with a score of {judged.score:g} or more.")]
    told = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    cells = []
    for one in found[:SHOWN]:
        iou = f" (IoU {one.iou:.2f})" if one.iou > 0 else ""
        score = one.detection["score"]
        reason = f" {score * 100:.0f} %: {one.reason}{iou}"
        cells.append(_cell(judged.evaluated, one.detection, "False positive", reason, [score]))
    lead = paragraph(f"{len(found)} in all: {told}.", "soft")
    return [lead, grid([cell for cell in cells if cell], "cells")]


def _misses(judged: _Judged, misses: Sequence[Miss]) -> list[str]:
    total = len(judged.judgement.objects())
    if not misses:
        return [paragraph(f"All {total} objects are found.")]
    cells = [
        _cell(judged.evaluated, miss.annotation, "Missed", f": {miss.reason}") for miss in misses[:SHOWN]
    ]
    lead = paragraph(
        f"{len(misses)} of {total} objects have no box of IoU 0.5 with a score of {judged.score:g} or more.",
        "soft",
    )
    return [lead, grid([cell for cell in cells if cell], "cells")]


def _cell(
    evaluated: Evaluated, one: Mapping[str, Any], title: str, told: str, scores: list[float] | None = None
) -> str:
    """The surroundings of a detection or an annotation; nothing where the image can't be read."""
    metadata = evaluated.dataset.metadata
    record = next(record for record in evaluated.records if record["image_id"] == one["image_id"])
    cut = _cut(record, one["bbox"])
    if cut is None:
        return ""
    image, box = cut
    label = metadata.thing_dataset_id_to_contiguous_id[one["category_id"]]
    picture = draw_instances(image, [box], [label], scores, metadata=metadata, scale=_scale(image))
    name = evaluated.name_of(record)
    text = f"{metadata.thing_classes[label]}{told}"
    return photo(picture, f"{title} in {name}: {text}", f"{text}, {name}", width=_CELL)


def _cut(record: Mapping[str, Any], box: Sequence[float]) -> tuple[ByteImage, list[float]] | None:
    """The image around a box (x y w h), square where it can be, and the box (x0 y0 x1 y1) in it."""
    try:
        image = read_image(record["file_name"], value_range=record.get("value_range"))
    except UserError:
        return None
    height, width = image.shape[:2]
    x, y, w, h = (float(value) for value in box)
    side = min(max(1.8 * max(w, h), 48.0), float(max(width, height)))
    left = int(np.clip(x + w / 2 - side / 2, 0, max(0.0, width - side)))
    top = int(np.clip(y + h / 2 - side / 2, 0, max(0.0, height - side)))
    right, bottom = min(width, int(left + side) + 1), min(height, int(top + side) + 1)
    part = np.ascontiguousarray(image[top:bottom, left:right])
    return part, [x - left, y - top, x + w - left, y + h - top]


def _scale(image: ByteImage) -> float:
    """To a size at which lines and letters are legible in a small cell."""
    return _CELL / max(image.shape[:2])


# ---- what happened, data, configuration


def _events(output_dir: Path) -> str:
    path = output_dir / "bad_steps.jsonl"
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return paragraph("None: every step was taken, and the run never went back.")
    rows = []
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if not isinstance(event, dict):
            continue
        if event.get("event") == "rolled back":
            to = Path(str(event["to"])).name if event.get("to") else "the beginning"
            what = f"{event.get('reason', '')}; back to {to}, LR x {event.get('lr_scale', '?')}"
        else:
            ids = [
                str(image[0])
                for rank in event.get("ranks", [])
                for image in rank.get("images", [])
                if isinstance(image, list) and image
            ]
            parts = " and ".join(event.get("loss_parts", [])) or "the gradient"
            what = f"{parts} not finite; images {', '.join(ids) or '–'}; {event.get('evidence', '')}"
        rows.append([str(event.get("event", "–")), event.get("iteration", "–"), what])
    more = f", the last {_MAX_EVENTS} of {len(rows)}" if len(rows) > _MAX_EVENTS else ""
    return table(
        f"From bad_steps.jsonl{more}",
        ["event", "iteration", "what"],
        rows[-_MAX_EVENTS:],
        text_columns=(0, 2),
        wrap_columns=(2,),
    )


def _data(output_dir: Path, missing: list[str]) -> list[Html]:
    """What the sets hold, and what reading them found."""
    if not (output_dir / STATISTICS_FILE).exists():
        return [
            paragraph(
                f"There is no {STATISTICS_FILE}: what the sets held at the start of the run is not known."
            )
        ]
    try:
        return statistics_parts(*read_statistics(output_dir))
    except UserError as error:
        missing.append(str(error))
        return []


def _config(output_dir: Path, cfg: Any) -> list[str]:
    if cfg is None:
        return []
    rows = []
    for key in _KEYS:
        value = cfg
        for part in key.split("."):
            value = getattr(value, part)
        if value in ("", (), []):
            continue
        rows.append([key, ", ".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)])
    text = (output_dir / CONFIG_FILE).read_text(encoding="utf-8", errors="replace")
    return [
        table("What matters most", ["key", "value"], rows, text_columns=(0, 1), wrap_columns=(1,)),
        folded("all of config.yaml", code(text)),
    ]
