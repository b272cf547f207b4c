"""What training and validation sets hold, side by side in words: a table, and what about them is worth knowing."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.cells import cell_len

from zenith_det.data.statistics import SetStatistics
from zenith_det.errors import listed, one_line

#: Classes that a short table shows; of more, the most frequent and the rarest.
SHORT = 12
#: A share of objects below 8 pixels from which a line says so.
MANY_SMALL = 0.25
_NAME_WIDTH = 32


@dataclass(frozen=True)
class Note:
    """A line about the sets.

    Attributes:
        text: the line.
        warning: whether it is likely to be a mistake.
    """

    text: str
    warning: bool = False


def overview_table(sets: Sequence[SetStatistics], *, short: bool = False) -> str:
    """Classes by rows, sets side by side: images, objects, sizes at the network's input, masks, keypoints.

    Args:
        sets: in the order of the columns.
        short: of many classes, show the most frequent and the rarest.
    """
    names, left_out = shown_classes(sets, SHORT if short else 0)
    first = ["", "", "all", *(_shortened(name) for name in names)]
    if left_out:
        first.insert(3 + SHORT // 2, f"({left_out} more)")
    lines = [_padded(first, left=True)]
    for one in sets:
        columns = [_padded([title, *cells]) for title, cells in columns_of(one, names)]
        block = ["  ".join(cells) for cells in zip(*columns, strict=True)]
        if left_out:
            block.insert(2 + SHORT // 2, "")
        lines.append(
            _padded([_shortened(one.title, max(_NAME_WIDTH, cell_len(block[0]))), *block], left=True)
        )
    table = ["   ".join(cells).rstrip() for cells in zip(*lines, strict=True)]
    inputs = dict.fromkeys(f"{one.role or one.name}: {one.input_size}" for one in sets)
    table.append(f"sizes: root of the box's area at the network's input ({'; '.join(inputs)})")
    return "\n".join([*table, *(f"{one.title}: {one.json_file}, images in {one.image_root}" for one in sets)])


def shown_classes(sets: Sequence[SetStatistics], most: int = 0) -> tuple[list[str], int]:
    """Names of the classes of all sets, and how many are left out in the middle of them.

    Args:
        most: of more classes, the most frequent and the rarest; 0: all.
    """
    names = list(dict.fromkeys(each.name for one in sets for each in one.classes))
    if not most or len(names) <= most + 1:
        return names, 0
    names.sort(key=lambda name: -sets[0].of_class(name).objects)
    return names[: most // 2] + names[-(most // 2) :], len(names) - 2 * (most // 2)


def columns_of(one: SetStatistics, names: Sequence[str]) -> list[tuple[str, list[str]]]:
    """A set's columns of the table: title, and a cell for all classes together, then for each of ``names``."""
    rows = [one.total, *(one.of_class(name) for name in names)]
    columns = [
        ("images", [str(one.images), *(str(row.images) for row in rows[1:])]),
        ("objects", [str(row.objects) for row in rows]),
        ("median", [f"{row.median_side:.0f} px" if row.objects else "-" for row in rows]),
        ("<4 px", [share(row.under_4, row.objects) for row in rows]),
        ("<8 px", [share(row.under_8, row.objects) for row in rows]),
    ]
    for title, counts in (
        ("masks", [row.masks for row in rows]),
        ("keypoints", [row.keypoints for row in rows]),
        ("crowds", [row.crowds for row in rows]),
    ):
        if counts[0]:
            columns.append((title, [str(count) for count in counts]))
    return columns


def share(part: int, whole: int) -> str:
    """A part in percent, ``"-"`` of nothing; never rounded to none or to all."""
    if not whole:
        return "-"
    percent = 100 * part / whole
    if part and percent < 1:
        return "<1%"
    return "99%" if part < whole and percent > 99 else f"{percent:.0f}%"


def _shortened(text: str, width: int = _NAME_WIDTH) -> str:
    if cell_len(text) <= width:
        return text
    while cell_len(text) >= width:
        text = text[:-1]
    return text + "…"


def _padded(cells: Sequence[str], *, left: bool = False) -> list[str]:
    """Cells of the same width as a terminal shows them: Chinese letters are twice as wide."""
    width = max(map(cell_len, cells))
    blanks = [" " * (width - cell_len(cell)) for cell in cells]
    return [cell + blank if left else blank + cell for cell, blank in zip(cells, blanks, strict=True)]


def _one_of(singular: str, plural: str, count: int) -> str:
    return f"{count} {singular if count == 1 else plural}"


def notes(sets: Sequence[SetStatistics]) -> list[Note]:
    """What the sets, seen together, are good for and are not.

    Args:
        sets: with their roles; without a training set only the classes without objects are told.
    """
    training = [one for one in sets if one.role == "training"]
    validation = [one for one in sets if one.role == "validation"]
    lines: list[Note] = []
    trained = {each.name for one in training for each in one.classes if each.objects}
    for one in sets if not training else []:
        if empty := [each.name for each in one.classes if not each.objects]:
            lines.append(Note(f"{one.title}: no object of {listed(empty)}"))
    declared = list(dict.fromkeys(each.name for one in training for each in one.classes))
    judged = {each.name for one in validation for each in one.classes if each.objects}
    if idle := [name for name in declared if name not in trained and name not in judged]:
        lines.append(Note(f"no training object of {listed(idle)}: the model can't learn to find any"))
    for one in validation if training else []:
        for each in one.classes:
            if each.objects and each.name not in trained:
                objects = _one_of("object", "objects", each.objects)
                lines.append(
                    Note(
                        f"AP of {one_line(each.name)} can only be 0: {one.title} has {objects} of it, no training set "
                        "has any",
                        warning=True,
                    )
                )
        lacking = [n for n in declared if n in trained and not one.of_class(n).objects]
        if lacking and one.total.objects:
            lines.append(Note(f"{one.title} has no object of {listed(lacking)}: there is no AP of them"))
    for one in validation:
        if not one.total.objects:
            lines.append(Note(f"{one.title} has no object: there is no AP", warning=True))
        lines += [_repeated(one, other) for other in training if same_file(one.json_file, other.json_file)]
    for one in sets:
        small = one.total.under_8
        if small > MANY_SMALL * one.total.objects:
            key = "INPUT.MIN_SIZE_TEST" if one.role == "validation" else "INPUT.MIN_SIZE_TRAIN"
            lines.append(
                Note(
                    f"{one.title}: {share(small, one.total.objects)} of the objects are under 8 pixels at the "
                    f"network's input, {share(one.total.under_4, one.total.objects)} under 4, hard to learn: a larger "
                    f"{key}, or images cut into tiles, makes them larger"
                )
            )
    return lines


def _repeated(one: SetStatistics, other: SetStatistics) -> Note:
    return Note(
        f"{one.title} is the file that is trained on ({other.json_file}): its AP says nothing about new images; give "
        "a file of other images",
        warning=True,
    )


def same_file(first: str, second: str) -> bool:
    """Whether two annotation files are one, or have the same content."""
    if os.path.realpath(first) == os.path.realpath(second):
        return True
    try:
        if os.path.getsize(first) != os.path.getsize(second):
            return False
        return _digest(first) == _digest(second)
    except OSError:
        return False


def _digest(path: str) -> str:
    return hashlib.blake2b(Path(path).read_bytes()).hexdigest()
