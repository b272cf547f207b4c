"""Every AP that is 0 or nan gets the reason that is true, and no other AP gets one."""

from __future__ import annotations

from typing import Any

import pytest

from zenith_det.evaluation import evaluate_coco, explain_results
from zenith_det.evaluation.explain import NO_GROUND_TRUTH

from .coco_cases import perturb, random_ground_truth
from .test_coco import hit, one_object


def explained(
    ground_truth: dict[str, Any],
    detections: list[dict[str, Any]],
    tasks: tuple[str, ...] = ("bbox",),
    class_names: tuple[str, ...] | None = None,
    **facts: Any,
) -> list[str]:
    results = evaluate_coco(ground_truth, detections, tasks, class_names=class_names)
    return explain_results(results, ground_truth, detections, **facts)


def test_nothing_above_the_threshold_names_it() -> None:
    lines = explained(one_object(), [], score_threshold=0.05)
    assert lines[0] == "bbox AP, AP50, AP75, APm, AP-a are 0: no detection above the score threshold 0.05"


def test_no_object_of_a_size_or_class() -> None:
    lines = explained(one_object(), [hit()])
    assert lines == ["no ground truth, so n/a: bbox APs, bbox APl, AP of b"]


def test_a_class_that_lacks_masks_alone() -> None:
    ground_truth = one_object()
    second = {**ground_truth["annotations"][0], "id": 2, "category_id": 9}
    second.pop("segmentation", None)
    first = {
        **ground_truth["annotations"][0],
        "segmentation": {"size": [200, 200], "counts": [0, 1600, 38400]},
    }
    ground_truth["annotations"] = [first, second]
    lines = explained(ground_truth, [], ("bbox", "segm"))
    assert lines[-1] == "no ground truth, so n/a: bbox APs, bbox APl, segm APs, segm APl, segm AP of b"


def test_no_object_at_all() -> None:
    lines = explained({**one_object(), "annotations": []}, [hit()])
    assert "bbox AP, AP50, AP75, APs, APm, APl are nan: the ground truth has no object" in lines


def test_weights_that_did_not_load_are_named_only_when_some_are_missing() -> None:
    assert explained(one_object(), [], weights=(12, 295))[0].endswith(
        "weights: only 12 of the model's 295 were loaded, the rest is random"
    )
    assert "weights" not in "".join(explained(one_object(), [], weights=(295, 295)))
    # An AP that is nan is not the weights' fault.
    assert "weights" not in "".join(explained(one_object(), [hit()], weights=(12, 295)))


def test_category_ids_that_the_ground_truth_does_not_declare() -> None:
    lines = explained(one_object(), [hit(category_id=0), hit(category_id=0)])
    assert lines[0] == (
        "category ids: 2 of 2 detections have ids that the ground truth does not declare (0; "
        "it declares 7, 9) and don't count"
    )
    assert "bbox AP, AP50, AP75, APm are 0: no detection has a category id of the ground truth" in lines
    assert "bbox AP-a is 0: no detection of this class" in lines


def test_image_ids_of_another_split() -> None:
    results = evaluate_coco(one_object(), [], ("bbox",))
    lines = explain_results(results, one_object(), [hit(image_id=777)])
    assert lines[0] == (
        "image ids: 1 of 1 detections are of images that the ground truth does not have (777; it has 5) "
        "and don't count"
    )


def test_detections_on_the_wrong_images() -> None:
    ground_truth = one_object()
    ground_truth["images"].append({"id": 6, "height": 200, "width": 200, "file_name": "6.jpg"})
    lines = explained(ground_truth, [hit(image_id=6)])
    reason = "the 1 detections are all of images without any object; do the image ids match?"
    assert f"bbox AP, AP50, AP75 are 0: {reason}" in lines


def test_detections_that_match_nothing() -> None:
    lines = explained(one_object(), [hit(bbox=[100.0, 100.0, 50.0, 50.0], score=0.75)])
    assert lines[0] == (
        "bbox AP, AP50 are 0: none of the 1 detections (highest score 0.75) reaches IoU 0.5 with one of "
        "the 1 objects of its class"
    )
    assert lines[1].startswith("bbox AP75 is 0: ")
    assert "IoU 0.75" in lines[1]
    assert "bbox AP-a is 0: none of the class's detections matches an object (highest score 0.8)" in lines


def test_classes_the_model_or_the_file_lacks() -> None:
    lines = explained(one_object(), [hit()], class_names=("c",))
    assert lines[0] == (
        "classes: the ground truth has 1 objects of classes that the model does not have (a); "
        "they count as missed"
    )
    assert "bbox AP-c is nan: the ground truth has no category of this name (it has a, b)" in lines


def test_keypoint_task_without_visible_keypoints() -> None:
    lines = explained(one_object(), [hit(keypoints=[1.0, 1.0, 0.5] * 17)], ("keypoints",))
    told = (
        "keypoints AP, AP50, AP75, APm, APl are nan: the ground truth has no object with a visible keypoint"
    )
    assert told in lines


def test_objects_without_masks_and_a_subset_are_mentioned() -> None:
    ground_truth = random_ground_truth(30, num_images=4)
    for annotation in ground_truth["annotations"]:
        del annotation["segmentation"]
    image_ids = [image["id"] for image in ground_truth["images"][:2]]
    results = evaluate_coco(ground_truth, [], ("segm",), image_ids=image_ids)
    lines = explain_results(results, ground_truth, [], image_ids=image_ids)
    count = sum(a["image_id"] in image_ids for a in ground_truth["annotations"])
    assert f"masks: {count} objects of the ground truth have none; mask AP ignores them" in lines
    assert "images: evaluated on 2 of 4" in lines


def test_every_zero_and_nan_is_explained_and_nothing_else() -> None:
    for seed in range(4):
        ground_truth = random_ground_truth(seed, num_images=3)
        detections = perturb(ground_truth, seed, copies=1)
        results = evaluate_coco(ground_truth, detections)
        lines = explain_results(results, ground_truth, detections)
        for task, metrics in results.items():
            own = [line.split(" is ")[0].split(" are ")[0] for line in lines if line.startswith(f"{task} ")]
            named = [name for line in own for name in line.removeprefix(f"{task} ").split(", ")]
            notes = [line.removeprefix(NO_GROUND_TRUTH) for line in lines if line.startswith(NO_GROUND_TRUTH)]
            for note in notes:
                sizes, _, classes = note.partition("AP of ")
                named += [s.removeprefix(f"{task} ") for s in sizes.split(", ") if s.startswith(f"{task} ")]
                named += [f"AP-{name}" for name in classes.split(", ") if name]
            assert sorted(named) == sorted(m for m, value in metrics.items() if not value > 0)


@pytest.mark.parametrize(("count", "told"), [(100, False), (130, True)])
def test_more_objects_than_coco_counts_are_told(count: int, told: bool) -> None:
    boxes = [[i % 20 * 20, i // 20 * 20, 15, 15] for i in range(count)]
    truth = {
        "images": [{"id": 1, "height": 400, "width": 400}, {"id": 2, "height": 400, "width": 400}],
        "categories": [{"id": 1, "name": "cell"}],
        "annotations": [
            {"id": i, "image_id": 1, "category_id": 1, "bbox": box, "area": 225, "iscrowd": 0}
            for i, box in enumerate(boxes, 1)
        ],
    }
    found = [
        {"image_id": 1, "category_id": 1, "bbox": box, "score": 1 - i / 1000} for i, box in enumerate(boxes)
    ]
    results = evaluate_coco(truth, found, ["bbox"])
    assert (results["bbox"]["AP"] < 99) == told
    lines = [line for line in explain_results(results, truth, found) if line.startswith("objects: ")]
    assert len(lines) == told
    for line in lines:
        assert "1 of 2 images have more than 100 objects of a class (up to 130)" in line
