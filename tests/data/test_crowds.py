"""Crowd regions: what is one in COCO's sense, and what a tool merely wrote as one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from zenith_det.data import coco_ground_truth, examine_coco_dataset, load_coco_dataset
from zenith_det.data.crowds import _largest_piece
from zenith_det.errors import DatasetError
from zenith_det.evaluation import evaluate_coco

from .builders import HEIGHT, WIDTH, content, write

TAKEN = "crowd taken for an object"


def brushed(*boxes: tuple[int, int, int, int]) -> dict[str, Any]:
    """A mask as CVAT writes what a brush has painted: runs in a list. Boxes are x, y, width, height."""
    mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    for x, y, width, height in boxes:
        mask[y : y + height, x : x + width] = 1
    pixels = mask.flatten(order="F")
    ends = np.flatnonzero(np.diff(pixels)) + 1
    return {"size": [HEIGHT, WIDTH], "counts": np.diff([0, *ends, pixels.size]).tolist()}


def crowds(mask: Any, images: int = 3) -> dict[str, Any]:
    """A set of nothing but crowds of this mask."""
    data = content(images)
    for entry in data["annotations"]:
        entry |= {"iscrowd": 1, "segmentation": mask, "attributes": {"occluded": False}}
    return data


def in_two_classes(data: dict[str, Any], plain: int = 1) -> dict[str, Any]:
    """Beside the crowds a plain object of another class."""
    data["categories"].append({"id": 2, "name": "circle"})
    for number in range(plain):
        data["annotations"].append(content()["annotations"][number] | {"id": 100 + number, "category_id": 2})
    return data


ONE = brushed((5, 5, 10, 10))
#: A brush leaves gaps and specks.
WITH_A_SPECK = brushed((5, 5, 4, 10), (10, 5, 5, 10), (20, 20, 1, 1))
TWO = brushed((5, 5, 3, 10), (12, 5, 3, 10))


@pytest.mark.parametrize("mask", [ONE, WITH_A_SPECK, content()["annotations"][0]["segmentation"]])
def test_a_set_of_crowds_in_one_piece_is_one_of_objects(mask: Any, tmp_path: Path) -> None:
    source = write(tmp_path, crowds(mask))
    dataset = load_coco_dataset(source)
    assert [a["iscrowd"] for record in dataset.records for a in record["annotations"]] == [0, 0, 0]
    assert dataset.report.count("filled") == 3 + 1
    assert f"{TAKEN} 3" in dataset.report.summary()
    assert dataset.report.num_without_objects == 0
    (line,) = dataset.report.suspicions()
    assert "all 3 annotations have iscrowd 1" in line
    assert "--crowds regions" in line
    found = [
        {k: a[k] for k in ("image_id", "category_id", "bbox")} | {"score": 0.9}
        for a in content()["annotations"]
    ]
    ground_truth = coco_ground_truth(dataset)
    assert evaluate_coco(ground_truth, found, ["bbox"])["bbox"]["AP"] == pytest.approx(100)
    with pytest.raises(DatasetError, match="--crowds"):
        load_coco_dataset(source, strict=True)
    load_coco_dataset(source, strict=True, crowds="objects")  # asked for: nothing to suspect


def test_what_is_asked_for_is_done(tmp_path: Path) -> None:
    report = load_coco_dataset(write(tmp_path, crowds(ONE)), crowds="regions").report
    assert (report.num_without_objects, report.count()) == (3, 0)
    for mask in (TWO, None):
        report = load_coco_dataset(write(tmp_path, crowds(mask)), crowds="objects").report
        assert (report.num_without_objects, report.counts[TAKEN, "filled"]) == (0, 3)


@pytest.mark.parametrize("mask", [TWO, None, [[5, 5, 9, 5, 9, 9], [15, 15, 19, 15, 19, 19]]])
def test_a_set_of_crowds_that_may_be_several_things_stops(mask: Any, tmp_path: Path) -> None:
    source = write(tmp_path, crowds(mask))
    with pytest.raises(DatasetError, match=r"all 3 annotations have iscrowd 1.*--crowds objects"):
        load_coco_dataset(source)


def test_objects_to_ignore_are_no_crowds_to_take(tmp_path: Path) -> None:
    data = crowds(ONE)
    for entry in data["annotations"]:
        entry["ignore"] = 1
    assert load_coco_dataset(write(tmp_path, data)).report.num_without_objects == 3


def test_a_class_of_crowds_alone_beside_others(tmp_path: Path) -> None:
    dataset = load_coco_dataset(write(tmp_path, in_two_classes(crowds(ONE))))
    assert dataset.report.counts[TAKEN, "filled"] == 3
    (line,) = dataset.report.suspicions()
    assert line.startswith("square: 3 annotations have iscrowd 1, none have 0: taken for")
    dataset = load_coco_dataset(write(tmp_path, in_two_classes(crowds(TWO))))
    assert sum(a["iscrowd"] for record in dataset.records for a in record["annotations"]) == 3
    assert "--crowds objects" in dataset.report.suspicions()[0]


def test_more_crowds_than_objects_of_a_class_are_told(tmp_path: Path) -> None:
    data = crowds(ONE)
    data["annotations"].append(content()["annotations"][0] | {"id": 9})
    report = load_coco_dataset(write(tmp_path, data)).report
    (line,) = report.suspicions()
    assert line.startswith("square: 3 annotations have iscrowd 1, 1 has 0")
    assert "--crowds objects" in line
    assert not report.counts.get((TAKEN, "filled"))


def test_crowds_as_coco_has_them_are_left_alone(tmp_path: Path) -> None:
    data = in_two_classes(content(), plain=3)
    for category in (1, 2):
        data["annotations"].append(
            content()["annotations"][0]
            | {"id": 50 + category, "category_id": category, "iscrowd": 1, "segmentation": ONE}
        )
    report = examine_coco_dataset(write(tmp_path, data)).report
    assert report.count() == 0
    # A class of one crowd and nothing else, as small parts of COCO have.
    data["annotations"] = [a for a in data["annotations"] if a["category_id"] == 1 or a["iscrowd"]]
    assert examine_coco_dataset(write(tmp_path, data)).report.count() == 0


def test_masks_of_any_shape_are_looked_at() -> None:
    """A long line is one thing, however it winds; a mask of many specks is none."""
    line = np.zeros((200, 300), dtype=np.uint8)
    line[10:190, 10] = line[10, 10:290] = line[10:190, 289] = line[189, 150:290] = 1
    assert _largest_piece(line) == 1
    specks = np.zeros((200, 300), dtype=np.uint8)
    specks[::50, ::50] = 1
    assert _largest_piece(specks) < 0.1
