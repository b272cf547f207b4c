"""What sets hold is counted rightly, and what one lacks that the other has is said."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from zenith_det.config import get_cfg
from zenith_det.data import load_coco_dataset
from zenith_det.data.overview import notes, overview_table
from zenith_det.data.statistics import (
    SIZE_BINS,
    STATISTICS_FILE,
    InputSize,
    SetStatistics,
    count_set,
    read_statistics,
    to_json,
)
from zenith_det.errors import DatasetError

from .builders import SQUARE, content, write

SAME = InputSize(0, 0)


def counted(
    folder: Path, data: Any, role: str = "", size: InputSize = SAME, name: str = "set"
) -> SetStatistics:
    dataset = load_coco_dataset(write(folder, data, f"{name}.json"))
    return count_set(dataset.metadata, dataset.records, size, role=role)


def with_boxes(
    *boxes: tuple[int, int, float, float], classes: tuple[str, ...] = ("rbc", "wbc")
) -> dict[str, Any]:
    """Objects by image, class (from 1), width and height."""
    data = content()
    data["categories"] = [{"id": n, "name": name} for n, name in enumerate(classes, 1)]
    template = data["annotations"][0]
    data["annotations"] = [
        {
            **template,
            "id": n,
            "image_id": image,
            "category_id": label,
            "bbox": [1, 1, w, h],
            "segmentation": [],
        }
        for n, (image, label, w, h) in enumerate(boxes, 1)
    ]
    return data


def test_what_is_counted(tmp_path: Path) -> None:
    data = with_boxes((1, 1, 9, 4), (1, 1, 2, 2), (2, 1, 10, 10), (2, 2, 3, 3), (2, 2, 20, 20))
    data["annotations"][0]["segmentation"] = [SQUARE]
    data["annotations"][4]["iscrowd"] = 1
    one = counted(tmp_path, data)
    assert (one.images, one.without_objects) == (3, 1)
    rbc, wbc = one.classes
    assert (rbc.name, rbc.images, rbc.objects, rbc.masks, rbc.crowds) == ("rbc", 2, 3, 1, 0)
    assert (rbc.median_side, rbc.under_4, rbc.under_8) == (6.0, 1, 2)
    assert (wbc.images, wbc.objects, wbc.crowds, wbc.under_4) == (1, 1, 1, 1)
    assert (one.total.objects, one.total.images, one.total.crowds) == (4, 2, 1)
    assert dict(zip(SIZE_BINS, one.side_counts, strict=True)) == {
        **dict.fromkeys(SIZE_BINS, 0), 2: 2, 4: 1, 8: 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("opts", "training", "scale"),
    [
        # Images of 30x40 pixels.
        ({"MIN_SIZE_TRAIN": (60,), "MAX_SIZE_TRAIN": 1000}, True, 2.0),
        ({"MIN_SIZE_TRAIN": (60,), "MAX_SIZE_TRAIN": 60}, True, 1.5),
        ({"MIN_SIZE_TRAIN": (30, 60, 150), "MAX_SIZE_TRAIN": 1000}, True, 2.0),
        (
            {"MIN_SIZE_TRAIN": (60, 120), "MIN_SIZE_TRAIN_SAMPLING": "range", "MAX_SIZE_TRAIN": 1000},
            True,
            3.0,
        ),
        ({"MIN_SIZE_TRAIN": (0,)}, True, 1.0),
        ({"MIN_SIZE_TEST": 15, "MAX_SIZE_TEST": 1000}, False, 0.5),
        ({"MIN_SIZE_TEST": 0}, False, 1.0),
    ],
)
def test_sizes_at_the_network_s_input(
    opts: dict[str, Any], training: bool, scale: float, tmp_path: Path
) -> None:
    cfg = get_cfg()
    for key, value in opts.items():
        cfg.INPUT[key] = value
    size = InputSize.of(cfg, training=training)
    assert counted(tmp_path, with_boxes((1, 1, 8, 8)), size=size).classes[0].median_side == 8 * scale


@pytest.mark.parametrize(
    ("kind", "size", "scale"),
    [("relative", [0.5, 0.5], 4.0), ("relative_range", [0.5, 0.5], 8 / 3), ("absolute", (15, 20), 4.0)],
)
def test_a_crop_enlarges(kind: str, size: Any, scale: float, tmp_path: Path) -> None:
    cfg = get_cfg()
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = (60,), 1000
    cfg.INPUT.CROP.ENABLED, cfg.INPUT.CROP.TYPE, cfg.INPUT.CROP.SIZE = True, kind, list(size)
    one = counted(tmp_path, with_boxes((1, 1, 8, 8)), size=InputSize.of(cfg, training=True))
    assert one.classes[0].median_side == pytest.approx(8 * scale)


def told(training: SetStatistics, validation: SetStatistics) -> list[tuple[str, bool]]:
    return [(note.text, note.warning) for note in notes([training, validation])]


def test_classes_that_one_set_has_and_the_other_has_not(tmp_path: Path) -> None:
    big = (20.0, 20.0)
    classes = ("rbc", "wbc", "plt", "dust")
    training = counted(
        tmp_path, with_boxes((1, 1, *big), (1, 3, *big), classes=classes), "training", name="a"
    )
    data = with_boxes((1, 1, *big), (2, 2, *big), classes=("rbc", "wbc"))
    validation = counted(tmp_path, data, "validation", name="b")
    assert told(training, validation) == [
        ("no training object of dust: the model can't learn to find any", False),
        ("AP of wbc can only be 0: validation: b has 1 object of it, no training set has any", True),
        ("validation: b has no object of plt: there is no AP of them", False),
    ]
    assert told(training, counted(tmp_path, with_boxes(classes=classes), "validation", name="c"))[-1] == (
        "validation: c has no object: there is no AP", True
    )  # fmt: skip


@pytest.mark.parametrize("copied", [False, True])
def test_a_training_file_given_again(copied: bool, tmp_path: Path) -> None:
    data = with_boxes((1, 1, 20, 20), (1, 2, 20, 20))
    training = counted(tmp_path, data, "training")
    again = counted(tmp_path, copy.deepcopy(data), "validation", name="copy" if copied else "set")
    [(text, warning)] = told(training, again)
    assert warning
    assert "is the file that is trained on" in text
    data["images"][0]["license"] = 1
    assert told(training, counted(tmp_path, data, "validation", name="other")) == []


def test_many_small_objects_are_told_with_the_key(tmp_path: Path) -> None:
    small = counted(tmp_path, with_boxes((1, 1, 5, 5), (1, 1, 3, 3), (1, 2, 20, 20)), "training", name="a")
    large = counted(tmp_path, with_boxes((1, 1, 20, 20), (1, 2, 20, 20)), "validation", name="b")
    [(text, _)] = told(small, large)
    assert text.startswith(
        "training: a: 67% of the objects are under 8 pixels at the network's input, 33% under 4"
    )
    assert "INPUT.MIN_SIZE_TRAIN" in text


def test_the_table_is_aligned_also_with_wide_letters(tmp_path: Path) -> None:
    from rich.cells import cell_len

    one = counted(
        tmp_path, with_boxes((1, 1, 9, 9), (2, 2, 9, 9), classes=("红细胞", "platelets")), "training"
    )
    lines = overview_table([one, one]).splitlines()
    assert [line.split()[0] for line in lines[2:5]] == ["all", "红细胞", "platelets"]
    assert len({cell_len(line) for line in lines[1:5]}) == 1
    assert lines[3].split()[1:4] == ["1", "1", "9"]


def test_of_many_classes_the_short_table_has_the_most_frequent_and_the_rarest(tmp_path: Path) -> None:
    boxes = [(1, label, 9.0, 9.0) for label in range(1, 31) for _ in range(label)]
    one = counted(tmp_path, with_boxes(*boxes, classes=tuple(f"c{n}" for n in range(1, 31))))
    lines = overview_table([one], short=True).splitlines()
    assert [line.split()[0] for line in lines[3:16]] == [
        *(f"c{n}" for n in range(30, 24, -1)), "(18", *(f"c{n}" for n in range(6, 0, -1)),
    ]  # fmt: skip
    assert len(overview_table([one]).splitlines()) == len(lines) + 17


def test_a_run_s_file_is_read_back(tmp_path: Path) -> None:
    one = counted(tmp_path, with_boxes((1, 1, 9, 9)), "training")
    (tmp_path / STATISTICS_FILE).write_text(to_json([one], ["a note"]))
    assert read_statistics(tmp_path) == ([one], ["a note"])
    for damage in ("", "[]", '{"sets": [{}], "notes": []}', to_json([one], [])[:-20]):
        (tmp_path / STATISTICS_FILE).write_text(damage)
        with pytest.raises(DatasetError, match=STATISTICS_FILE):
            read_statistics(tmp_path)
