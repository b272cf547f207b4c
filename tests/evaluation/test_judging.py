"""Precision, recall, F1, confusions and calibration against cases worked out by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.evaluation.coco_cases import perturb, random_ground_truth
from zenith_det.evaluation import evaluate_by_size, evaluate_coco, judge

CAT, DOG, COW = 3, 7, 9


def truth(*objects: tuple[int, int, list[float]], crowd: tuple[int, ...] = ()) -> dict[str, Any]:
    """Objects as (image, category, box); those whose numbers are in ``crowd`` are regions of many."""
    return {
        "images": [{"id": n, "height": 100, "width": 100} for n in (1, 2)],
        "categories": [{"id": DOG, "name": "dog"}, {"id": CAT, "name": "cat"}, {"id": COW, "name": "cow"}],
        "annotations": [
            {
                "id": n, "image_id": image, "category_id": category, "bbox": box,
                "area": box[2] * box[3], "iscrowd": int(n in crowd),
            }
            for n, (image, category, box) in enumerate(objects)
        ],
    }  # fmt: skip


def found(*detections: tuple[int, int, list[float], float]) -> list[dict[str, Any]]:
    return [
        {"image_id": image, "category_id": category, "bbox": box, "score": score}
        for image, category, box, score in detections
    ]


A, B, C = [0.0, 0.0, 20.0, 20.0], [40.0, 0.0, 20.0, 20.0], [0.0, 50.0, 20.0, 20.0]
#: IoU with A: 360 / 440 and 200 / 600.
NEAR_A, FAR_FROM_A = [0.0, 2.0, 20.0, 20.0], [0.0, 10.0, 20.0, 20.0]
#: Of the size of a whole image, with D inside.
REGION, D = [0.0, 0.0, 100.0, 100.0], [70.0, 70.0, 20.0, 20.0]


def test_precision_recall_and_f1_of_a_class() -> None:
    """Three cats: one found twice, one found, one missed; and a box in the wrong place."""
    judgement = judge(
        truth((1, CAT, A), (1, CAT, B), (2, CAT, C)),
        found(
            (1, CAT, NEAR_A, 0.9), (1, CAT, A, 0.8), (1, CAT, FAR_FROM_A, 0.7), (2, CAT, A, 0.6), (1, CAT, B, 0.5)
        ),
    )  # fmt: skip
    cat = judgement.classes[0]
    assert (cat.name, cat.objects) == ("cat", 3)
    # The first at A takes the object, although the second fits better.
    assert cat.right.tolist() == [True, False, False, False, True]
    assert cat.precision.tolist() == pytest.approx([1, 1 / 2, 1 / 3, 1 / 4, 2 / 5])
    assert cat.recall.tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 1 / 3, 2 / 3])
    # 2 TP / (detections + objects)
    assert cat.f1([0.95, 0.9, 0.8, 0.5, 0.0]).tolist() == pytest.approx([0, 2 / 4, 2 / 5, 4 / 8, 4 / 8])
    # 0.5 is reached by scores up to 0.5, and by those above 0.8 up to 0.9: the first of the two ranges.
    assert cat.best_score == 0.25
    assert judgement.recommended_score == 0.25


def test_the_recommended_score_is_in_the_middle_of_the_best_range() -> None:
    judgement = judge(truth((1, CAT, A)), found((1, CAT, A, 0.8), (1, CAT, B, 0.3)))
    assert judgement.mean_f1.max() == 1
    assert judgement.recommended_score == 0.55  # of 0.301 to 0.8


def test_the_recommended_score_counts_classes_alike() -> None:
    """Two dogs would keep 0.2, the cat 0.9; a class without objects has no say."""
    judgement = judge(
        truth((1, CAT, A), (1, DOG, B), (2, DOG, C)),
        found(
            (1, CAT, A, 0.9), (2, CAT, B, 0.5), (2, CAT, A, 0.5), (1, CAT, D, 0.5),
            (1, DOG, B, 0.95), (2, DOG, C, 0.2), (1, COW, A, 0.99),
        ),
    )  # fmt: skip
    by_name = {one.name: one for one in judgement.classes}
    assert np.isnan(by_name["cow"].f1(0.5))
    assert by_name["cow"].best_score is None
    # From 0.9 on: 1 and 2 * 1 / (1 + 2). From 0.2 on: 2 / (4 + 1) and 1.
    at = judgement.mean_f1
    assert at[900] == pytest.approx((1 + 2 / 3) / 2)
    assert at[200] == pytest.approx((2 / 5 + 1) / 2)
    assert judgement.recommended_score == 0.7  # of 0.501 to 0.9


def test_crowd_regions_are_neither_right_nor_wrong() -> None:
    judgement = judge(
        truth((1, CAT, A), (1, CAT, REGION), crowd=(1,)),
        found((1, CAT, A, 0.9), (1, CAT, D, 0.8), (1, DOG, D, 0.7)),
    )
    cat, dog, _ = judgement.classes
    assert (cat.objects, cat.scores.tolist(), cat.right.tolist()) == (1, [0.9], [True])
    assert dog.right.tolist() == [False]  # a crowd of cats is no excuse for a dog
    assert judgement.confusion(0.5).tolist() == [[1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 1, 0, 0]]


def test_what_is_taken_for_what() -> None:
    """Rows and columns: cat, dog, cow, background."""
    judgement = judge(
        truth((1, CAT, A), (1, DOG, B), (2, COW, C), (2, CAT, A)),
        found(
            (1, CAT, A, 0.9),  # right
            (1, COW, A, 0.8),  # that object is found already
            (1, CAT, B, 0.7),  # a dog taken for a cat
            (1, CAT, B, 0.6),  # once only
            (2, DOG, D, 0.6),  # nothing there
            (2, COW, C, 0.3),  # below the score
        ),
    )
    assert judgement.confusion(0.5).tolist() == [[1, 0, 0, 1], [1, 0, 0, 0], [0, 0, 0, 1], [1, 1, 1, 0]]
    lower = judgement.confusion(0.3)
    assert lower.tolist() == [[1, 0, 0, 1], [1, 0, 0, 0], [0, 0, 1, 0], [1, 1, 1, 0]]
    assert lower[:-1].sum() == 4  # each object once
    assert lower[:, :-1].sum() == 6  # each detection once


def test_calibration_by_hand() -> None:
    """Five of 0.85 of which four are right; two of 0.2, none of them."""
    boxes = [[20.0 * n, 0.0, 10.0, 10.0] for n in range(4)]
    judgement = judge(
        truth(*((1, CAT, box) for box in boxes)),
        found(
            *((1, CAT, box, 0.85) for box in boxes),
            (1, CAT, [0.0, 80.0, 10.0, 10.0], 0.85), (1, CAT, [50.0, 80.0, 10.0, 10.0], 0.2),
            (1, CAT, [80.0, 80.0, 10.0, 10.0], 0.2),
        ),
    )  # fmt: skip
    low, high = judgement.calibration()
    assert (low.low, low.high, low.count, low.precision) == (0.2, 0.3, 2, 0)
    assert (high.low, high.high, high.count) == (0.8, 0.9, 5)
    assert (high.score, high.precision) == (pytest.approx(0.85), pytest.approx(0.8))
    assert judgement.calibration_error() == pytest.approx((5 * 0.05 + 2 * 0.2) / 7)


def test_nothing_found_and_nothing_there() -> None:
    missed = judge(truth((1, CAT, A)), [])
    assert missed.recommended_score is None
    assert missed.confusion(0.5)[0].tolist() == [0, 0, 0, 1]
    assert missed.calibration() == []
    assert np.isnan(missed.calibration_error())
    empty = judge(truth(), found((1, CAT, A, 0.9)))
    assert empty.recommended_score is None
    assert empty.confusion(0.5)[3].tolist() == [1, 0, 0, 0]


@pytest.mark.parametrize("seed", [0, 1])
def test_agrees_with_ap50(seed: int) -> None:
    """The curve of each class has the area that COCO's AP50 says, on data with every case."""
    ground_truth = random_ground_truth(seed)
    results = perturb(ground_truth, seed)
    expected = evaluate_coco(ground_truth, results, ("bbox",))["bbox"]["AP50"]
    areas = []
    for one in judge(ground_truth, results).classes:
        if one.objects:
            best = np.concatenate((np.maximum.accumulate(one.precision[::-1])[::-1], [0.0]))
            areas.append(best[np.searchsorted(one.recall, np.linspace(0, 1, 101), side="left")].mean())
    assert 100 * np.mean(areas) == pytest.approx(expected)


def test_each_object_and_each_detection_is_in_the_table_once() -> None:
    ground_truth = random_ground_truth(3)
    results = perturb(ground_truth, 3)
    ids = sorted(category["id"] for category in ground_truth["categories"])
    for result in results[::4]:
        result["category_id"] = ids[(ids.index(result["category_id"]) + 1) % len(ids)]
    judgement = judge(ground_truth, results)
    table = judgement.confusion(0.4)
    assert table[:-1].sum() == sum(not one["iscrowd"] for one in ground_truth["annotations"])
    assert table[:, :-1].sum() == sum(int(one.counts(0.4)[0]) for one in judgement.classes)
    assert np.diag(table)[:-1].tolist() == [int(one.counts(0.4)[1]) for one in judgement.classes]
    assert table[:-1, :-1].sum() > np.diag(table).sum()  # the case has some taken for others


def test_ap_by_size_by_hand() -> None:
    """Small ones found, one of two large ones; a crowd is none of them."""
    small, large = [0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 40.0, 40.0]
    ground_truth = truth(
        (1, CAT, small), (2, CAT, [50.0, 50.0, 10.0, 10.0]), (1, CAT, [50.0, 50.0, 40.0, 40.0]), (2, CAT, large),
        (2, DOG, REGION), crowd=(4,),
    )  # fmt: skip
    results = found(
        (1, CAT, small, 0.9), (2, CAT, [50.0, 50.0, 10.0, 10.0], 0.8), (1, CAT, [50.0, 50.0, 40.0, 40.0], 0.7)
    )
    bins = evaluate_by_size(ground_truth, results, ("bbox",))
    assert [(one.low, one.high, one.objects) for one in bins] == [(8, 16, 2), (32, 64, 2)]
    # Of 101 recalls, 0 to 0.5 are reached by the one that is found.
    assert [one.ap["bbox"] for one in bins] == pytest.approx([100, 100 * 51 / 101])


@pytest.mark.parametrize("task", ["bbox", "segm", "keypoints"])
def test_ap_by_cocos_sizes_is_cocos(task: str) -> None:
    ground_truth = random_ground_truth(1)
    results = perturb(ground_truth, 1)
    expected = evaluate_coco(ground_truth, results, (task,))[task]
    bins = evaluate_by_size(ground_truth, results, (task,), sides=(0, 32, 96, float("inf")))
    own = {one.low: one.ap[task] for one in bins}
    cocos = {0: expected.get("APs", own[0]), 32: expected["APm"], 96: expected["APl"]}
    assert own == pytest.approx({low: ap for low, ap in cocos.items() if not np.isnan(ap)})
