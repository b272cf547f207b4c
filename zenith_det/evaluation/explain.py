"""Why an AP is 0 or nan, in words.

A bare 0, -1 or nan is among the most asked-about outputs of detection trainers
(https://github.com/facebookresearch/detectron2/issues/607, /1059, /4271, /428, /1546).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from zenith_det.evaluation.coco import AREA_RANGES, METRICS, SIZE_OF_METRIC

#: How the line begins that tells of what a set has no objects for, which is no mistake.
NO_GROUND_TRUTH = "no ground truth, so n/a: "
_NAMES_SHOWN = 10
_IDS_SHOWN = 5
#: Detections of a class in an image that COCO's AP counts (cocodataset.org/#detection-eval).
COCO_MAX_DETS = 100


def explain_results(
    results: Mapping[str, Mapping[str, float]],
    ground_truth: Mapping[str, Any],
    detections: Sequence[Mapping[str, Any]],
    *,
    score_threshold: float | None = None,
    weights: tuple[int, int] | None = None,
    image_ids: Collection[int] | None = None,
) -> list[str]:
    """Give each AP that is 0 or nan its reason.

    Args:
        results: what :func:`~zenith_det.evaluation.evaluate_coco` returned.
        ground_truth: the annotation file it was given.
        detections: the results it was given.
        score_threshold: the threshold that detections had to pass (``MODEL.ROI_HEADS.SCORE_THRESH_TEST``).
        weights: (parameters loaded, parameters of the model).
        image_ids: the images evaluated on (default: all).

    Returns:
        Lines such as ``"bbox AP75 is 0: no detection of this class"``. APs with the same reason share a line.
        Those that are nan because the set has no object of a size or class share the last one over all tasks,
        which begins with :data:`NO_GROUND_TRUTH`. Empty when there is nothing to explain.
    """
    wanted = None if image_ids is None else set(image_ids)
    names = {
        category["id"]: str(category.get("name", category["id"]))
        for category in ground_truth.get("categories", [])
    }
    image_set = {
        image["id"] for image in ground_truth.get("images", []) if wanted is None or image["id"] in wanted
    }
    counted = [detection for detection in detections if detection["image_id"] in image_set]

    lines = _notes(results, ground_truth, detections, names, image_set, wanted is not None)
    nothing_found = "" if counted else "no detections at all"
    if nothing_found and score_threshold is not None:
        nothing_found = f"no detection above the score threshold {score_threshold:g}"
    weights_hint = ""
    if weights is not None and weights[0] < weights[1]:
        weights_hint = (
            f"; weights: only {weights[0]} of the model's {weights[1]} were loaded, the rest is random"
        )

    sizes: list[str] = []
    classes: dict[str, list[str]] = {}  # without objects -> tasks
    for task, metrics in results.items():
        objects = [
            o
            for o in ground_truth.get("annotations", [])
            if o["image_id"] in image_set and _demanded(o, task)
        ]
        reasons: dict[tuple[str, str], list[str]] = {}
        for metric, value in metrics.items():
            if value > 0:
                continue
            if metric not in METRICS[task] and _has_no_object(metric.removeprefix("AP-"), objects, names):
                classes.setdefault(metric.removeprefix("AP-"), []).append(task)
                continue
            if objects and metric in SIZE_OF_METRIC and not _of_size(metric, objects):
                sizes.append(f"{task} {metric}")
                continue
            if metric in METRICS[task]:
                reason = _why_metric(metric, objects, counted, names, nothing_found, task)
            else:
                reason = _why_class(metric.removeprefix("AP-"), counted, names, nothing_found)
            shown = "0" if value == 0 else "nan"
            reasons.setdefault((shown, reason), []).append(metric)
        for (shown, reason), which in reasons.items():
            verb = "is" if len(which) == 1 else "are"
            hint = weights_hint if shown == "0" else ""
            lines.append(f"{task} {_shorten(which)} {verb} {shown}: {reason}{hint}")
    if sizes or classes:
        by_tasks: dict[str, list[str]] = {}
        for name, tasks in classes.items():
            by_tasks.setdefault("" if len(tasks) == len(results) else f"{' and '.join(tasks)} ", []).append(
                name
            )
        absent = [f"{tasks}AP of {_shorten(which)}" for tasks, which in by_tasks.items()]
        lines.append(NO_GROUND_TRUTH + ", ".join(sizes + absent))
    return lines


def _notes(
    results: Mapping[str, Mapping[str, float]],
    ground_truth: Mapping[str, Any],
    detections: Sequence[Mapping[str, Any]],
    names: Mapping[int, str],
    image_set: set[int],
    subset: bool,
) -> list[str]:
    """What is wrong with the ids, whether or not it makes an AP 0."""
    lines = []
    stray = [d["category_id"] for d in detections if d["category_id"] not in names]
    if stray:
        lines.append(
            f"category ids: {len(stray)} of {len(detections)} detections have ids that the ground truth does "
            f"not declare ({_ids(set(stray))}; it declares {_ids(names)}) and don't count"
        )
    all_images = {image["id"] for image in ground_truth.get("images", [])}
    stray = [d["image_id"] for d in detections if d["image_id"] not in all_images]
    if stray:
        lines.append(
            f"image ids: {len(stray)} of {len(detections)} detections are of images that the ground truth "
            f"does not have ({_ids(set(stray))}; it has {_ids(all_images)}) and don't count"
        )
    reported = {
        metric.removeprefix("AP-")
        for metrics in results.values()
        for metric in metrics
        if metric.startswith("AP-")
    }
    unreported = Counter(
        names.get(o["category_id"], str(o["category_id"]))
        for o in ground_truth.get("annotations", [])
        if o["image_id"] in image_set and not o.get("iscrowd")
    )
    for name in reported:
        unreported.pop(name, None)
    if reported and unreported:
        lines.append(
            f"classes: the ground truth has {sum(unreported.values())} objects of classes that the model "
            f"does not have ({_shorten(list(unreported))}); they count as missed"
        )
    if "segm" in results:
        unmasked = sum(
            not o.get("segmentation")
            for o in ground_truth.get("annotations", [])
            if o["image_id"] in image_set
        )
        if unmasked:
            lines.append(f"masks: {unmasked} objects of the ground truth have none; mask AP ignores them")
    crowded = Counter(
        (o["image_id"], o["category_id"])
        for o in ground_truth.get("annotations", [])
        if o["image_id"] in image_set and not o.get("iscrowd")
    )
    most = max(crowded.values(), default=0)
    if most > COCO_MAX_DETS:
        images = len({image for (image, _), count in crowded.items() if count > COCO_MAX_DETS})
        lines.append(
            f"objects: {images} of {len(image_set)} images have more than {COCO_MAX_DETS} objects of a class (up to "
            f"{most}); COCO counts the {COCO_MAX_DETS} best detections of a class in an image, so their AP can't be 100"
        )
    if subset and len(image_set) < len(all_images):
        lines.append(f"images: evaluated on {len(image_set)} of {len(all_images)}")
    return lines


def _demanded(annotation: Mapping[str, Any], task: str) -> bool:
    """Whether COCO expects a detection of this object; the others are ignored."""
    if annotation.get("iscrowd"):
        return False
    if task == "segm":
        return bool(annotation.get("segmentation"))
    if task == "keypoints":
        visible = annotation.get("num_keypoints")
        if visible is None:
            visible = sum(v > 0 for v in (annotation.get("keypoints") or [])[2::3])
        return visible > 0
    return True


def _area(annotation: Mapping[str, Any]) -> float:
    area = annotation.get("area")
    return float(area) if area is not None else float(annotation["bbox"][2] * annotation["bbox"][3])


def _of_size(metric: str, objects: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    low, high = AREA_RANGES[SIZE_OF_METRIC[metric]]
    return [o for o in objects if low <= _area(o) <= high]


def _categories(name: str, names: Mapping[int, str]) -> set[int]:
    return {number for number, known in names.items() if name in (known, f"{known} (id {number})")}


def _has_no_object(name: str, objects: Sequence[Mapping[str, Any]], names: Mapping[int, str]) -> bool:
    """Whether a class is declared and has no object."""
    category_ids = _categories(name, names)
    return bool(category_ids) and not any(o["category_id"] in category_ids for o in objects)


def _why_metric(
    metric: str,
    objects: list[Mapping[str, Any]],
    detections: list[Mapping[str, Any]],
    names: Mapping[int, str],
    nothing_found: str,
    task: str,
) -> str:
    what = {"bbox": "object", "segm": "object with a mask", "keypoints": "object with a visible keypoint"}[
        task
    ]
    if not objects:
        return f"the ground truth has no {what}"
    if metric in SIZE_OF_METRIC:
        objects = _of_size(metric, objects)
        what = f"{SIZE_OF_METRIC[metric]} {what}"
    if nothing_found:
        return nothing_found
    valid = [d for d in detections if d["category_id"] in names]
    if not valid:
        return "no detection has a category id of the ground truth"
    with_objects = {o["image_id"] for o in objects}
    if not any(d["image_id"] in with_objects for d in valid):
        return f"the {len(valid)} detections are all of images without any {what}; do the image ids match?"
    threshold = {"AP75": "0.75"}.get(metric, "0.5")
    measure = "OKS" if task == "keypoints" else "IoU"
    return (
        f"none of the {len(valid)} detections (highest score {_highest(valid):.3g}) reaches {measure} "
        f"{threshold} with one of the {len(objects)} {what.replace('object', 'objects', 1)} of its class"
    )


def _why_class(
    name: str,
    detections: list[Mapping[str, Any]],
    names: Mapping[int, str],
    nothing_found: str,
) -> str:
    category_ids = _categories(name, names)
    if not category_ids:
        return f"the ground truth has no category of this name (it has {_shorten(list(names.values()))})"
    if nothing_found:
        return nothing_found
    own = [d for d in detections if d["category_id"] in category_ids]
    if not own:
        return "no detection of this class"
    return f"none of the class's detections matches an object (highest score {_highest(own):.1g})"


def _highest(detections: Sequence[Mapping[str, Any]]) -> float:
    return max((float(d["score"]) for d in detections), default=math.nan)


def _ids(ids: Collection[Any]) -> str:
    listed = [str(number) for number in sorted(ids)[:_IDS_SHOWN]]
    return ", ".join(listed) + (", …" if len(ids) > _IDS_SHOWN else "") or "none"


def _shorten(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_NAMES_SHOWN])
    return shown + (f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else "")
