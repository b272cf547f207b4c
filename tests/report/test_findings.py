"""False positives and misses, on detections whose errors are known."""

from __future__ import annotations

from typing import Any

from zenith_det.evaluation import judge
from zenith_det.report.findings import FalsePositive, Miss, find_errors

CAT, DOG = 20, 10  # not in the order of their ids


def thing(category: int, box: list[float], crowd: int = 0) -> dict[str, Any]:
    return {"image_id": 1, "category_id": category, "bbox": box, "iscrowd": crowd}


def found(category: int, score: float, box: list[float]) -> dict[str, Any]:
    return {"image_id": 1, "category_id": category, "score": score, "bbox": box}


def errors(
    objects: list[dict[str, Any]], detections: list[dict[str, Any]]
) -> tuple[list[FalsePositive], list[Miss]]:
    truth = {
        "images": [{"id": 1, "height": 400, "width": 400}],
        "annotations": objects,
        "categories": [{"id": CAT, "name": "cat"}, {"id": DOG, "name": "dog"}],
    }
    return find_errors(judge(truth, detections), 0.5)


def test_each_error_has_its_reason() -> None:
    wrong, missed = errors(
        [thing(CAT, [0, 0, 10, 10]), thing(DOG, [50, 50, 30, 30]), thing(CAT, [100, 100, 5, 5])],
        [
            found(CAT, 0.95, [0, 0, 10, 10]),
            found(CAT, 0.7, [104, 104, 5, 5]),  # hardly on the second cat
            found(CAT, 0.9, [0, 0, 10, 11]),  # the first cat again
            found(CAT, 0.8, [50, 50, 30, 30]),  # the dog
            found(DOG, 0.6, [200, 200, 5, 5]),  # nothing is there
            found(DOG, 0.4, [300, 200, 5, 5]),  # below the threshold
        ],
    )
    assert [(one.detection["score"], one.reason) for one in wrong] == [
        (0.9, "duplicate"),
        (0.8, "in truth: dog"),
        (0.7, "background"),
        (0.6, "background"),
    ]
    assert [(miss.annotation["category_id"], miss.reason) for miss in missed] == [
        (DOG, "taken for cat"),  # the larger one first
        (CAT, "no detection there"),
    ]


def test_a_poor_box_is_both() -> None:
    wrong, missed = errors([thing(CAT, [0, 0, 10, 10])], [found(CAT, 0.9, [0, 0, 10, 30])])
    assert wrong[0].reason == "poor box"
    assert missed[0].reason == "only a poor box (IoU 0.33)"
    wrong, _ = errors([thing(DOG, [0, 0, 10, 10])], [found(CAT, 0.9, [0, 0, 10, 30])])
    assert wrong[0].reason == "near: dog"


def test_one_detection_for_two_objects() -> None:
    _, missed = errors(
        [thing(CAT, [0, 0, 10, 10]), thing(CAT, [0, 0, 10, 13])], [found(CAT, 0.9, [0, 0, 10, 11])]
    )
    assert [miss.reason for miss in missed] == ["its detection went to a neighbour"]


def test_crowds_are_neither_found_nor_missed() -> None:
    objects = [thing(CAT, [0, 0, 100, 100], crowd=1), thing(DOG, [10, 10, 20, 20])]
    wrong, missed = errors(objects, [found(CAT, 0.9, [10, 10, 20, 20])])
    assert wrong == []
    assert [miss.reason for miss in missed] == ["no detection there"]


def test_images_without_anything() -> None:
    assert errors([], []) == ([], [])
    assert errors([], [found(CAT, 0.9, [0, 0, 5, 5])])[0][0].reason == "background"
    assert errors([thing(DOG, [0, 0, 5, 5])], [])[1][0].reason == "no detection there"
