"""False positives and misses, on detections whose errors are known."""

from __future__ import annotations

from typing import Any

from zenith_det.data.metadata import DatasetMetadata
from zenith_det.report.findings import find_errors

# The file's ids are 10 and 20.
METADATA = DatasetMetadata(
    name="set", json_file="set.json", image_root="images", thing_classes=("cat", "dog"),
    thing_dataset_id_to_contiguous_id={10: 0, 20: 1},
)  # fmt: skip


def thing(label: int, box: list[float], crowd: int = 0) -> dict[str, Any]:
    return {"category_id": label, "bbox": box, "iscrowd": crowd}


def found(category: int, score: float, box: list[float]) -> dict[str, Any]:
    return {"image_id": 1, "category_id": category, "score": score, "bbox": box}


def errors(objects: list[dict[str, Any]], detections: list[dict[str, Any]], threshold: float = 0.5) -> Any:
    record = {"image_id": 1, "file_name": "1.png", "annotations": objects}
    return find_errors([record], {1: detections}, METADATA, threshold)


def test_a_perfect_detection_is_no_error() -> None:
    findings = errors([thing(0, [0, 0, 10, 10])], [found(10, 0.9, [0, 0, 10, 10])])
    assert (findings.false_positives, findings.misses) == ([], [])
    assert (findings.objects[0], findings.found[0], findings.wrong[0]) == (1, 1, 0)


def test_each_error_has_its_reason() -> None:
    objects = [thing(0, [0, 0, 10, 10]), thing(1, [50, 50, 30, 30]), thing(0, [100, 100, 5, 5])]
    findings = errors(
        objects,
        [
            found(10, 0.95, [0, 0, 10, 10]),
            found(10, 0.9, [0, 0, 10, 11]),  # the same cat again
            found(10, 0.8, [50, 50, 30, 30]),  # the dog
            found(10, 0.7, [104, 104, 5, 5]),  # hardly on the second cat
            found(20, 0.6, [200, 200, 5, 5]),  # nothing is there
            found(20, 0.4, [300, 200, 5, 5]),  # below the threshold
        ],
    )
    assert [fp.reason for fp in findings.false_positives] == [
        "duplicate",
        "in truth: dog",
        "background",
        "background",
    ]
    assert [(miss.annotation["category_id"], miss.reason) for miss in findings.misses] == [
        (1, "taken for cat"),  # the larger one first
        (0, "no detection there"),
    ]
    assert findings.wrong == {0: 3, 1: 1}


def test_a_poor_box_is_both() -> None:
    findings = errors([thing(0, [0, 0, 10, 10])], [found(10, 0.9, [0, 0, 10, 30])])
    assert findings.false_positives[0].reason == "poor box"
    assert findings.misses[0].reason == "only a poor box (IoU 0.33)"
    near = errors([thing(1, [0, 0, 10, 10])], [found(10, 0.9, [0, 0, 10, 30])])
    assert near.false_positives[0].reason == "near: dog"


def test_the_better_score_takes_the_object() -> None:
    findings = errors(
        [thing(0, [0, 0, 10, 10])], [found(10, 0.6, [0, 0, 10, 10]), found(10, 0.9, [0, 0, 10, 12])]
    )
    assert [fp.result["score"] for fp in findings.false_positives] == [0.6]


def test_crowds_are_neither_found_nor_missed() -> None:
    findings = errors([thing(0, [0, 0, 100, 100], crowd=1)], [found(10, 0.9, [10, 10, 20, 20])])
    assert (findings.false_positives, findings.misses, findings.objects[0]) == ([], [], 0)


def test_images_without_anything() -> None:
    assert errors([], []).misses == []
    assert errors([], [found(10, 0.9, [0, 0, 5, 5])]).false_positives[0].reason == "background"
    assert errors([thing(1, [0, 0, 5, 5])], []).misses[0].reason == "no detection there"
