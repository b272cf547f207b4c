"""What sets hold, as parts of a page and as pictures: the table, histograms, labelled images."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from zenith_det.data import CocoDataset, read_image
from zenith_det.data.overview import columns_of, shown_classes
from zenith_det.data.statistics import SIZE_BINS, SetStatistics
from zenith_det.errors import UserError
from zenith_det.files import write_whole
from zenith_det.report.curves import line_style
from zenith_det.report.figures import Picture, draw
from zenith_det.report.html import (
    Html,
    Page,
    bullets,
    code,
    figure,
    grid,
    heading,
    paragraph,
    photo,
    table,
)
from zenith_det.report.pictures import ByteImage, Instances, draw_instances, labelled_sheet

PAGE_FILE = "dataset.html"
#: Classes that the bars show; of more, the most frequent and the rarest.
MOST_BARS = 30
#: Labelled images of a set.
LABELLED = 12
_CELL = 420


def statistics_parts(sets: Sequence[SetStatistics], notes: Sequence[str]) -> list[Html]:
    """The parts of a page that tell of sets: what is worth knowing, files, the table, histograms."""
    if not sets:
        return []
    names, _ = shown_classes(sets)
    columns, groups = [["all", *names]], [("", 1)]
    header = ["class"]
    for one in sets:
        own = columns_of(one, names)
        header += [title for title, _ in own]
        columns += [cells for _, cells in own]
        groups.append((one.title, len(own)))
    inputs = "; ".join(dict.fromkeys(f"{one.role or one.name}: {one.input_size}" for one in sets))
    caption = (
        "Objects and the images they are on; sizes are the root of a box's area in pixels at the network's input "
        f"({inputs})"
    )
    files = [f"{one.title}: {one.json_file}, images in {one.image_root}" for one in sets]
    return [
        bullets(notes),
        table(caption, header, list(zip(*columns, strict=True)), marked=(0,), groups=groups),
        grid([figure(picture) for picture in histograms(sets)]),
        bullets(files),
        *found_parts(sets),
    ]


def found_parts(sets: Sequence[SetStatistics]) -> list[Html]:
    """What reading the sets found: a line each, and the tables of problems."""
    lines = [line for one in sets for line in one.found]
    tables = [
        part for one in sets if one.problems for part in (heading(f"{one.title}: found"), code(one.problems))
    ]
    return [bullets(lines), *tables]


def histograms(sets: Sequence[SetStatistics]) -> list[Picture]:
    """Objects by class and by size; without any object there are none."""
    return [_class_bars(sets), _size_bars(sets)] if any(one.total.objects for one in sets) else []


def _class_bars(sets: Sequence[SetStatistics]) -> Picture:
    names, left_out = shown_classes(sets, MOST_BARS)
    names = sorted(names, key=lambda name: -sets[0].of_class(name).objects)
    counts = [[one.of_class(name).objects for name in names] for one in sets]
    biggest = max(map(max, counts))
    # So that rare classes are seen beside frequent ones.
    least = min((count for row in counts for count in row if count), default=1)
    logarithmic = biggest > 50 * least

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        axes.set_title(
            "Objects by class" + (f" ({left_out} classes in between left out)" if left_out else "")
        )
        thick = 0.8 / len(sets)
        for number, (one, row) in enumerate(zip(sets, counts, strict=True)):
            at = np.arange(len(names)) + (number - (len(sets) - 1) / 2) * thick
            axes.barh(at, row, thick * 0.92, color=line_style(number)[0], label=one.title)
        axes.set_yticks(range(len(names)), [name if len(name) <= 24 else name[:23] + "…" for name in names])
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.grid(False, axis="y")
        if logarithmic:
            axes.set_xscale("log")
            axes.set_xlim(left=0.7)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.set_xlabel("objects" + (", logarithmic" if logarithmic else ""))
        figure.legend(loc="outside lower right", ncols=min(2, len(sets)))

    told = "; ".join(
        f"{one.title}: {', '.join(f'{name} {count}' for name, count in zip(names, row, strict=True))}"
        for one, row in zip(sets, counts, strict=True)
    )
    return draw(
        "classes", f"Objects by class. {told}.", paint, height=1.5 + 0.21 * len(names) * max(1, len(sets) / 2)
    )


def _size_bars(sets: Sequence[SetStatistics]) -> Picture:
    edges = [f"{low}–{high}" for low, high in pairwise(SIZE_BINS)] + [f"{SIZE_BINS[-1]}+"]
    filled = [n for n in range(len(edges)) if any(one.side_counts[n] for one in sets)]
    shown = range(min(filled), max(filled) + 1)
    shares = [[100 * one.side_counts[n] / max(1, one.total.objects) for n in shown] for one in sets]

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        axes.set_title("Objects by size at the network's input")
        wide = 0.84 / len(sets)
        for number, (one, row) in enumerate(zip(sets, shares, strict=True)):
            at = np.arange(len(row)) + (number - (len(sets) - 1) / 2) * wide
            axes.bar(at, row, wide * 0.92, color=line_style(number)[0], label=one.title)
        axes.set_xticks(range(len(shown)), [edges[n] for n in shown])
        axes.grid(False, axis="x")
        axes.set_xlabel("root of the box's area, pixels")
        axes.set_ylabel("% of the objects")
        figure.legend(loc="outside lower right", ncols=min(2, len(sets)))

    told = "; ".join(
        f"{one.title}: {', '.join(f'{edges[n]} pixels {value:.0f} %' for n, value in zip(shown, row, strict=True))}"
        for one, row in zip(sets, shares, strict=True)
    )
    return draw("sizes", f"Objects by size at the network's input. {told}.", paint)


# ---- labelled images


def pick_records(dataset: CocoDataset) -> list[dict[str, Any]]:
    """Images to look at: with each class at least once where there is room, rare classes first."""
    having: dict[int, list[int]] = {}
    for number, record in enumerate(dataset.records):
        for label in {item["category_id"] for item in record["annotations"]}:
            having.setdefault(label, []).append(number)
    picked: list[int] = []
    covered: set[int] = set()
    for label in sorted(having, key=lambda label: len(having[label])):
        if len(picked) < LABELLED and label not in covered:
            # Among those that have it, one with few objects: there its label can be read.
            best = min(having[label], key=lambda number: len(dataset.records[number]["annotations"]))
            picked.append(best)
            covered |= {item["category_id"] for item in dataset.records[best]["annotations"]}
    with_objects = sorted({number for numbers in having.values() for number in numbers})
    rest = [number for number in with_objects if number not in picked]
    missing = LABELLED - len(picked)
    if missing > 0 and rest:
        picked += rest[:: max(1, len(rest) // missing)][:missing]
    if not picked:
        picked = list(range(min(LABELLED, len(dataset.records))))
    return [dataset.records[number] for number in sorted(picked)]


def _labelled(dataset: CocoDataset, width: int) -> list[tuple[ByteImage, str]]:
    """Images with their labels drawn, and their names."""
    cells = []
    for record in pick_records(dataset):
        try:
            image = read_image(record["file_name"], value_range=record.get("value_range"))
        except UserError:
            continue
        objects = Instances.from_record(record)
        scale = width / max(image.shape[:2])
        drawn = draw_instances(
            image, objects.boxes, objects.classes, None, objects.masks, objects.keypoints, dataset.metadata,
            crowd=objects.crowd, scale=scale,
        )  # fmt: skip
        cells.append((drawn, Path(record["file_name"]).name))
    return cells


def write_dataset_page(
    folder: Path,
    sets: Sequence[SetStatistics],
    notes: Sequence[str],
    datasets: Sequence[CocoDataset],
) -> list[Path]:
    """Write a page about sets, and its pictures as files beside it.

    Args:
        folder: where to; made where it isn't there.
        sets, notes: what was counted.
        datasets: the sets themselves, in the same order.

    Returns:
        The files: ``dataset.html``, ``classes.png``, ``sizes.png``, and ``labelled_training.png`` and so on.

    Raises:
        UserError: a file cannot be written.
    """
    page = Page("Datasets", ", ".join(one.title for one in sets))
    page.section("What they hold", *statistics_parts(sets, notes))
    written = [write_whole(folder / f"{picture.name}.png", picture.png) for picture in histograms(sets)]
    for number, (one, dataset) in enumerate(zip(sets, datasets, strict=True), start=1):
        cells = _labelled(dataset, 640)
        if not cells:
            continue
        alone = [other.role for other in sets].count(one.role) == 1
        name = f"labelled_{one.role or 'set'}{'' if alone else number}.png"
        written.append(labelled_sheet(cells, one.title, folder / name))
        photos = [photo(image, f"Labels of {name}", name, width=_CELL) for image, name in cells]
        lead = paragraph("As training sees them.", "soft")
        page.section(f"Labelled images: {one.title}", lead, grid(photos, "cells wide"))
    return [page.save(folder / PAGE_FILE), *written]
