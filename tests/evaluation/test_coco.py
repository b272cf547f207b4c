"""AP equals that of pycocotools (and of Detectron2's evaluator), and the cases around it don't crash."""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import json
import math
import os
import signal
from collections import Counter
from typing import Any

import numpy as np
import pytest

from zenith_det.errors import ConfigError, DatasetError
from zenith_det.evaluation import coco, evaluate_coco, finite_scalars

from .coco_cases import perturb, random_ground_truth, real_coco, reference_stats

TASKS = ("bbox", "segm", "keypoints")
BACKENDS = ("faster", "pycocotools")


def assert_equal(got: dict[str, float], expected: dict[str, float]) -> None:
    assert set(got) == set(expected)
    for metric, value in expected.items():
        assert type(got[metric]) is float, metric
        assert got[metric] == pytest.approx(value, abs=1e-9, rel=0, nan_ok=True), metric


def quiet_reference(*args: Any, **kwargs: Any) -> dict[str, float]:
    with contextlib.redirect_stdout(io.StringIO()):
        return reference_stats(*args, **kwargs)


def one_object(size: float = 50.0, **extra: Any) -> dict[str, Any]:
    """One image with one square object of class "a" (id 7), and a class "b" (id 9) without objects."""
    box = [10.0, 20.0, size, size]
    annotation = {
        "id": 1,
        "image_id": 5,
        "category_id": 7,
        "bbox": box,
        "area": size * size,
        "iscrowd": 0,
        **extra,
    }
    return {
        "images": [{"id": 5, "height": 200, "width": 200, "file_name": "5.jpg"}],
        "annotations": [annotation],
        "categories": [{"id": 7, "name": "a"}, {"id": 9, "name": "b"}],
    }


def hit(**extra: Any) -> dict[str, Any]:
    return {"image_id": 5, "category_id": 7, "bbox": [10.0, 20.0, 50.0, 50.0], "score": 0.9, **extra}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", range(6))
def test_equals_pycocotools_on_crowds_ties_empty_images_and_gaps(backend: str, seed: int) -> None:
    ground_truth = random_ground_truth(seed)
    results = perturb(ground_truth, seed + 50, copies=2 + seed)
    assert any(a["iscrowd"] for a in ground_truth["annotations"])
    assert len({r["score"] for r in results}) < len(results)
    got = evaluate_coco(ground_truth, results, TASKS, backend=backend)
    for task in TASKS:
        assert_equal(got[task], quiet_reference(ground_truth, results, task))
    assert 5 < got["bbox"]["AP"] < 95  # neither trivial


@pytest.mark.parametrize("processes", [2, 3])
def test_several_processes_give_the_same_numbers(processes: int) -> None:
    ground_truth = random_ground_truth(4)
    results = perturb(ground_truth, 54, copies=4)
    one = evaluate_coco(ground_truth, results, TASKS, processes=1)
    several = evaluate_coco(ground_truth, results, TASKS, processes=processes)
    assert several.keys() == one.keys()
    for task in TASKS:
        assert_equal(several[task], one[task])


def killed(_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_process_costs_time_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ground_truth = random_ground_truth(4)
    results = perturb(ground_truth, 54, copies=2)
    expected = evaluate_coco(ground_truth, results, ["bbox"], processes=1)
    monkeypatch.setattr(coco, "_precision_of", killed)
    got = evaluate_coco(ground_truth, results, ["bbox"], processes=2)
    assert_equal(got["bbox"], expected["bbox"])
    assert "a process that evaluated was killed" in caplog.text


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("max_dets", [1, 3, 17, 300])
def test_equals_pycocotools_with_another_limit_of_detections(backend: str, max_dets: int) -> None:
    ground_truth = random_ground_truth(3)
    results = perturb(ground_truth, 4, copies=12)
    got = evaluate_coco(ground_truth, results, ("bbox", "segm"), max_dets_per_image=max_dets, backend=backend)
    for task in ("bbox", "segm"):
        assert_equal(got[task], quiet_reference(ground_truth, results, task, max_dets=max_dets))
    unlimited = evaluate_coco(ground_truth, results, ("bbox",), backend=backend)
    if max_dets < 10:
        assert got["bbox"]["AP"] != unlimited["bbox"]["AP"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_pycocotools_where_more_keypoints_are_detected_than_count(backend: str) -> None:
    ground_truth = random_ground_truth(3, num_classes=2)
    results = perturb(ground_truth, 4, copies=12)
    assert max(Counter((r["image_id"], r["category_id"]) for r in results).values()) > 2 * 20
    got = evaluate_coco(ground_truth, results, ("keypoints",), backend=backend)
    assert_equal(got["keypoints"], quiet_reference(ground_truth, results, "keypoints"))


def test_garbage_is_collected_again_after_an_evaluation_that_failed() -> None:
    with pytest.raises(DatasetError):
        evaluate_coco(one_object(), [hit(image_id=6)])
    assert gc.isenabled()


@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_pycocotools_with_own_keypoints_and_sigmas(backend: str) -> None:
    sigmas = (0.03, 0.05, 0.1, 0.02, 0.08)
    ground_truth = random_ground_truth(8, num_keypoints=5)
    results = perturb(ground_truth, 9, copies=8)  # more than 20 an image: COCO's limit for keypoints counts
    got = evaluate_coco(ground_truth, results, ("keypoints",), oks_sigmas=sigmas, backend=backend)
    assert_equal(got["keypoints"], quiet_reference(ground_truth, results, "keypoints", sigmas=sigmas))
    other = evaluate_coco(ground_truth, results, ("keypoints",), oks_sigmas=(0.2,) * 5, backend=backend)
    assert other["keypoints"]["AP"] > got["keypoints"]["AP"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("name", "tasks"),
    [("instances_val2017", ("bbox", "segm")), ("person_keypoints_val2017", TASKS)],
)
def test_equals_pycocotools_on_real_coco(name: str, tasks: tuple[str, ...], backend: str) -> None:
    ground_truth = real_coco(name)
    if ground_truth is None:
        pytest.skip("no COCO annotations under DETECTRON2_DATASETS")
    # All of COCO's own validation set would take minutes.
    kept = {image["id"] for image in ground_truth["images"][:100]}
    ground_truth["images"] = ground_truth["images"][:100]
    ground_truth["annotations"] = [a for a in ground_truth["annotations"] if a["image_id"] in kept]
    results = perturb(ground_truth, 1, copies=4)
    got = evaluate_coco(ground_truth, results, tasks, backend=backend)
    for task in tasks:
        assert_equal(got[task], quiet_reference(ground_truth, results, task))


@pytest.mark.detectron2
@pytest.mark.parametrize("task", TASKS)
def test_equals_detectron2s_evaluator(task: str, tmp_path: Any) -> None:
    pytest.importorskip("detectron2.config", reason="Detectron2 is not installed")
    from detectron2.data import MetadataCatalog
    from detectron2.evaluation import COCOEvaluator

    ground_truth = random_ground_truth(21)
    results = perturb(ground_truth, 22, copies=5)
    json_file = tmp_path / "gt.json"
    json_file.write_text(json.dumps({"info": {}, **ground_truth}))
    name = f"zenith_det_test_{tmp_path.name}"
    class_names = [category["name"] for category in ground_truth["categories"]]
    MetadataCatalog.get(name).set(json_file=str(json_file), thing_classes=class_names)
    evaluator = COCOEvaluator(name, tasks=(task,), distributed=False, use_fast_impl=False)
    evaluator.reset()
    # As evaluator.process() stores them, an image at a time.
    for image in ground_truth["images"]:
        own = [copy.deepcopy(r) for r in results if r["image_id"] == image["id"]]
        evaluator._predictions.append({"image_id": image["id"], "instances": own})
    expected = evaluator.evaluate()[task]
    by_image = [r for image in ground_truth["images"] for r in results if r["image_id"] == image["id"]]
    assert_equal(evaluate_coco(ground_truth, by_image, (task,), class_names=class_names)[task], expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_mask_area_and_not_box_area_decides_the_size(backend: str) -> None:
    # A thin diagonal: its box is large, its mask small. A false positive of that shape must count among the
    # small.
    ground_truth = random_ground_truth(5)
    results = perturb(ground_truth, 6)
    for result in results:
        result["bbox"] = [0.0, 0.0, 149.0, 149.0]
    without_boxes = [{k: v for k, v in result.items() if k != "bbox"} for result in results]
    with_boxes = evaluate_coco(ground_truth, results, ("segm",), backend=backend)
    assert_equal(
        with_boxes["segm"], evaluate_coco(ground_truth, without_boxes, ("segm",), backend=backend)["segm"]
    )
    assert_equal(with_boxes["segm"], quiet_reference(ground_truth, results, "segm"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_detections_is_zero_and_no_ground_truth_is_nan(backend: str) -> None:
    got = evaluate_coco(one_object(), [], ("bbox", "segm", "keypoints"), backend=backend)
    box = got["bbox"]
    assert [box[m] for m in ("AP", "AP50", "AP75", "APm", "AP-a")] == [0.0] * 5
    assert all(math.isnan(box[m]) for m in ("APs", "APl", "AP-b"))
    assert math.isnan(got["keypoints"]["AP"])  # the object has no keypoints: there is nothing to find


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_detection_set_with_no_ground_truth_at_all(backend: str) -> None:
    ground_truth = {**one_object(), "annotations": []}
    got = evaluate_coco(ground_truth, [hit()], backend=backend)
    assert all(math.isnan(value) for value in got["bbox"].values())
    empty = evaluate_coco({"images": [], "annotations": [], "categories": []}, [], ("bbox",), backend=backend)
    assert math.isnan(empty["bbox"]["AP"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_annotation_id_zero_and_duplicate_ids_can_be_found(backend: str) -> None:
    ground_truth = one_object(id=0)
    assert evaluate_coco(ground_truth, [hit()], backend=backend)["bbox"]["AP"] == pytest.approx(100)
    twin = dict(ground_truth["annotations"][0], bbox=[100.0, 100.0, 50.0, 50.0])
    ground_truth["annotations"].append(twin)
    both = [hit(), hit(bbox=twin["bbox"])]
    assert evaluate_coco(ground_truth, both, backend=backend)["bbox"]["AP"] == pytest.approx(100)


@pytest.mark.parametrize("backend", BACKENDS)
def test_hand_made_file_without_info_area_iscrowd_num_keypoints(backend: str) -> None:
    full = random_ground_truth(11)
    results = perturb(full, 12)
    bare = copy.deepcopy(full)
    bare["annotations"] = [a for a in bare["annotations"] if not a["iscrowd"]]
    full["annotations"] = copy.deepcopy(bare["annotations"])
    for annotation in full["annotations"]:
        annotation["area"] = annotation["bbox"][2] * annotation["bbox"][3]
        del annotation["segmentation"]
    for annotation in bare["annotations"]:
        for key in ("area", "iscrowd", "num_keypoints", "segmentation"):
            del annotation[key]
    got = evaluate_coco(bare, results, ("bbox", "keypoints"), backend=backend)
    for task in ("bbox", "keypoints"):
        assert_equal(got[task], quiet_reference(full, results, task))


def test_missing_area_is_the_masks_where_there_is_one() -> None:
    # A 50 x 50 box (medium) around a triangle of half its area, and around one too thin not to be small.
    triangle = one_object(segmentation=[[10, 20, 60, 20, 10, 70]])
    sliver = one_object(segmentation=[[10, 20, 60, 20, 10, 30]])
    for ground_truth, metric in ((triangle, "APm"), (sliver, "APs")):
        del ground_truth["annotations"][0]["area"]
        assert evaluate_coco(ground_truth, [hit()], ("bbox",))["bbox"][metric] == pytest.approx(100)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_object_without_a_mask_is_ignored_for_mask_ap(backend: str) -> None:
    ground_truth = random_ground_truth(13, num_images=3)
    results = perturb(ground_truth, 14)
    undrawn = copy.deepcopy(ground_truth)
    del undrawn["annotations"][0]["segmentation"]
    ignored = copy.deepcopy(ground_truth)
    x, y, w, h = ignored["annotations"][0]["bbox"]
    ignored["annotations"][0] |= {"iscrowd": 1, "segmentation": [[x, y, x, y + h, x + w, y + h, x + w, y]]}
    got = evaluate_coco(undrawn, results, ("segm",), backend=backend)
    assert_equal(got["segm"], quiet_reference(ignored, results, "segm"))


def test_inputs_are_not_changed() -> None:
    ground_truth = random_ground_truth(1, num_images=3)
    results = perturb(ground_truth, 2)
    before = copy.deepcopy((ground_truth, results))
    for backend in BACKENDS:
        evaluate_coco(ground_truth, results, TASKS, backend=backend)
    assert (ground_truth, results) == before


def test_a_subset_of_images_is_like_a_file_with_only_these() -> None:
    ground_truth = random_ground_truth(15)
    results = perturb(ground_truth, 16)
    kept = [image["id"] for image in ground_truth["images"][:4]]
    smaller = copy.deepcopy(ground_truth)
    smaller["images"] = smaller["images"][:4]
    smaller["annotations"] = [a for a in smaller["annotations"] if a["image_id"] in kept]
    own = [r for r in results if r["image_id"] in kept]
    got = evaluate_coco(ground_truth, results, TASKS, image_ids=kept)
    expected = evaluate_coco(smaller, own, TASKS)
    for task in TASKS:
        assert_equal(got[task], expected[task])


def test_classes_are_matched_by_name_whatever_the_order() -> None:
    got = evaluate_coco(one_object(), [hit()], ("bbox",), class_names=("b", "a", "c"))["bbox"]
    assert [name for name in got if name.startswith("AP-")] == ["AP-b", "AP-a", "AP-c"]
    assert got["AP-a"] == pytest.approx(100)
    assert math.isnan(got["AP-b"])
    assert math.isnan(got["AP-c"])


def test_two_categories_of_one_name_keep_their_own_ap() -> None:
    ground_truth = one_object()
    ground_truth["categories"][1]["name"] = "a"
    got = evaluate_coco(ground_truth, [hit()], ("bbox",))["bbox"]
    assert got["AP-a"] == pytest.approx(100)
    assert math.isnan(got["AP-a (id 9)"])


def test_tasks_follow_what_the_results_carry() -> None:
    ground_truth = random_ground_truth(17, num_images=3)
    results = perturb(ground_truth, 18)
    assert list(evaluate_coco(ground_truth, results)) == ["bbox", "keypoints", "segm"]
    boxes = [{k: r[k] for k in ("image_id", "category_id", "score", "bbox")} for r in results]
    assert list(evaluate_coco(ground_truth, boxes)) == ["bbox"]
    assert list(evaluate_coco(ground_truth, [])) == ["bbox", "keypoints", "segm"]


def test_detections_of_undeclared_categories_do_not_count() -> None:
    stray = hit(category_id=99, score=0.99)
    assert evaluate_coco(one_object(), [hit(), stray], ("bbox",))["bbox"]["AP"] == pytest.approx(100)


def test_finite_scalars_survive_json_and_comparison() -> None:
    results = evaluate_coco(one_object(), [hit()], ("bbox",))
    scalars = finite_scalars(results)
    assert scalars["bbox/AP"] == pytest.approx(100)
    assert "bbox/APs" not in scalars
    assert "NaN" not in json.dumps(scalars, allow_nan=False)


def test_keypoint_counts_that_differ_or_miss_their_sigmas() -> None:
    five = {"keypoints": [30.0, 40.0, 2] * 5}
    ground_truth = one_object(**five, num_keypoints=5)
    with pytest.raises(DatasetError, match=r"5 in annotation 1, 4 in detection 0 of image 5"):
        evaluate_coco(ground_truth, [hit(keypoints=[30.0, 40.0, 0.5] * 4)], ("keypoints",))
    with pytest.raises(ConfigError, match=r"KEYPOINT_OKS_SIGMAS has 3 numbers, but the data has 5 keypoints"):
        evaluate_coco(ground_truth, [hit(**five)], ("keypoints",), oks_sigmas=(0.1, 0.1, 0.1))


def test_unknown_keypoints_without_sigmas_are_evaluated_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    five = {"keypoints": [30.0, 40.0, 2] * 5}
    got = evaluate_coco(one_object(**five), [hit(**five)], ("keypoints",))
    assert got["keypoints"]["AP"] == pytest.approx(100)
    assert "no OKS sigmas for these 5 keypoints" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tasks": ("boxes",)}, "unknown task 'boxes'"),
        ({"backend": "fast"}, "unknown backend 'fast'"),
        ({"max_dets_per_image": 0}, "max_dets_per_image must be at least 1, got 0"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate_coco(one_object(), [hit()], **arguments)


def test_float32_scores_of_a_model_are_taken() -> None:
    result = hit(score=np.float32(0.9), bbox=[np.float32(v) for v in (10, 20, 50, 50)])
    assert evaluate_coco(one_object(), [result], ("bbox",))["bbox"]["AP"] == pytest.approx(100)


def test_nothing_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    for backend in BACKENDS:
        evaluate_coco(one_object(), [hit()], ("bbox",), backend=backend)
    assert capsys.readouterr().out == ""


def test_without_the_compiled_backend_pycocotools_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    expected = evaluate_coco(one_object(), [hit()], ("bbox",))
    # None in sys.modules is how Python says "cannot be imported".
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    assert_equal(evaluate_coco(one_object(), [hit()], ("bbox",))["bbox"], expected["bbox"])
