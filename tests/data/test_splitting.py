"""A split holds out what was asked for, in proportion, always the same, and loses nothing."""

from __future__ import annotations

import copy
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from zenith_det.data.splitting import split_file
from zenith_det.errors import DatasetError


def file_of(names: list[str], classes: list[list[int]]) -> dict[str, Any]:
    """Images by name with objects of these classes."""
    annotations = [
        {"image_id": n, "category_id": label, "bbox": [1, 1, 2, 2], "extra": {"kept": True}}
        for n, labels in enumerate(classes)
        for label in labels
    ]
    return {
        "info": {"year": 2020},
        "images": [{"id": n, "file_name": name, "height": 9, "width": 9} for n, name in enumerate(names)],
        "annotations": [{"id": n, **annotation} for n, annotation in enumerate(annotations, 1)],
        "categories": [{"id": n, "name": f"c{n}"} for n in range(6)],
    }


def parts(folder: Path, data: Any, share: float) -> tuple[dict[str, Any], dict[str, Any]]:
    source = folder / "all.json"
    source.write_text(json.dumps(data))
    split_file(str(source), share, folder / "t.json", folder / "v.json")
    return json.loads((folder / "t.json").read_text()), json.loads((folder / "v.json").read_text())


def names(part: dict[str, Any]) -> set[str]:
    return {image["file_name"] for image in part["images"]}


def skewed(count: int) -> dict[str, Any]:
    """Images of a frequent class, a rarer, a rare one, and some without objects."""
    draw = random.Random(3)
    classes = [
        [label for label, odds in ((0, 0.9), (1, 0.3), (2, 0.05)) if draw.random() < odds]
        for _ in range(count)
    ]
    return file_of([f"{n:04}.jpg" for n in range(count)], classes)


def test_nothing_is_lost_and_classes_are_in_proportion(tmp_path: Path) -> None:
    data = skewed(400)
    train, val = parts(tmp_path, data, 0.2)
    assert (len(train["images"]), len(val["images"])) == (320, 80)
    for key in ("images", "annotations"):
        assert sorted(map(json.dumps, train[key] + val[key])) == sorted(map(json.dumps, data[key]))
    for part in (train, val):
        ids = {image["id"] for image in part["images"]}
        assert {a["image_id"] for a in part["annotations"]} <= ids
        assert (part["info"], part["categories"]) == (data["info"], data["categories"])
    whole, held = (Counter(a["category_id"] for a in part["annotations"]) for part in (data, val))
    for label in (0, 1, 2):
        assert abs(held[label] - 0.2 * whole[label]) <= 1, label
    without = [len(names(p)) - len({a["image_id"] for a in p["annotations"]}) for p in (train, val)]
    assert abs(without[1] - 0.2 * sum(without)) <= 1


def test_the_same_split_whatever_the_order(tmp_path: Path) -> None:
    data = skewed(100)
    first = names(parts(tmp_path, data, 0.25)[1])
    shuffled = copy.deepcopy(data)
    random.Random(1).shuffle(shuffled["images"])
    random.Random(2).shuffle(shuffled["annotations"])
    assert names(parts(tmp_path, shuffled, 0.25)[1]) == first
    assert len(first) == 25


def test_copies_of_an_image_stay_together(tmp_path: Path) -> None:
    files = [f"{n}_jpg.rf.{'0123456789abcdef' * 2}{copy}.jpg" for n in range(10) for copy in range(3)]
    train, val = parts(tmp_path, file_of(files, [[n % 2] for n in range(30)]), 0.3)
    stems = [{name.split(".rf.")[0] for name in names(part)} for part in (train, val)]
    assert not stems[0] & stems[1]
    assert len(stems[1]) == 3


@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
def test_rare_classes_stay_in_training_and_no_part_is_empty(share: float, tmp_path: Path) -> None:
    data = file_of([f"{n}.jpg" for n in range(8)], [[0], [0, 1], [0, 2], [0, 2], [0], [3], [], []])
    train, val = parts(tmp_path, data, share)
    assert {a["category_id"] for a in train["annotations"]} == {0, 1, 2, 3}
    assert val["images"]
    two = file_of(["a.jpg", "b.jpg"], [[0], [1]])
    train, val = parts(tmp_path, two, share)
    assert (len(train["images"]), len(val["images"])) == (1, 1)


def test_one_image_cannot_be_split(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="at least 2 are needed"):
        parts(tmp_path, file_of(["a.jpg"], [[0]]), 0.5)


def test_what_the_check_will_find_is_left_to_it(tmp_path: Path) -> None:
    data = skewed(10)
    broken = [5, {"id": "x", "file_name": "x.jpg"}], [7, {"image_id": 99, "category_id": 0}]
    data["images"] += broken[0]
    data["annotations"] += broken[1]
    train, val = parts(tmp_path, data, 0.2)
    assert train["images"][-2:] == broken[0]
    assert train["annotations"][-2:] == broken[1]
    assert len(val["images"]) == 2
