"""Box, mask and keypoint AP by the COCO metrics.

The metrics are those of https://cocodataset.org/#detection-eval and #keypoints-eval. The matching and the
precision curves come from ``faster_coco_eval`` (compiled) or from ``pycocotools`` (the reference); the two
give the same numbers, and the tests hold them to 1e-9. What is ours is everything around them that users
trip over: files without "info", empty result lists, annotation id 0, keypoint counts other than 17, limits
of detections other than 100, ground truth without masks.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import multiprocessing
import os
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any

import numpy as np
import pycocotools.mask as coco_mask

from zenith_det.data.garbage_collection import garbage_collection_off
from zenith_det.errors import ConfigError, DatasetError
from zenith_det.evaluation.results import check_results
from zenith_det.training.processes.worker_signals import ignore_stop_signals, starting_workers

logger = logging.getLogger(__name__)

#: Metrics of each task, in the order Detectron2 prints them. COCO defines no small size for keypoints: its
#: small people carry none.
METRICS: dict[str, tuple[str, ...]] = {
    "bbox": ("AP", "AP50", "AP75", "APs", "APm", "APl"),
    "keypoints": ("AP", "AP50", "AP75", "APm", "APl"),
    "segm": ("AP", "AP50", "AP75", "APs", "APm", "APl"),
}

#: Areas in pixels², both ends included (COCO's definition: 1024 is small *and* medium).
AREA_RANGES: dict[str, tuple[float, float]] = {
    "all": (0.0, 1e5**2),
    "small": (0.0, 32.0**2),
    "medium": (32.0**2, 96.0**2),
    "large": (96.0**2, 1e5**2),
}
SIZE_OF_METRIC = {"APs": "small", "APm": "medium", "APl": "large"}

#: How far annotators disagree on each of COCO's 17 person keypoints, as a fraction of the object's scale
#: (https://cocodataset.org/#keypoints-eval).
COCO_OKS_SIGMAS: tuple[float, ...] = (
    0.026, 0.025, 0.025, 0.035, 0.035,  # nose, eyes, ears
    0.079, 0.079, 0.072, 0.072, 0.062, 0.062,  # shoulders, elbows, wrists
    0.107, 0.107, 0.087, 0.087, 0.089, 0.089,  # hips, knees, ankles
)  # fmt: skip
#: COCO evaluates at most this many people an image by their keypoints, whatever the limit for boxes is.
MAX_DETS_KEYPOINTS = 20

Results = OrderedDict[str, dict[str, float]]


def evaluate_coco(
    ground_truth: Mapping[str, Any],
    results: Sequence[Mapping[str, Any]],
    tasks: Sequence[str] | None = None,
    *,
    class_names: Sequence[str] | None = None,
    oks_sigmas: Sequence[float] | None = None,
    max_dets_per_image: int = 100,
    image_ids: Collection[int] | None = None,
    backend: str = "auto",
    processes: int | None = None,
) -> Results:
    """Compute AP, in percent, for boxes, masks and keypoints.

    Args:
        ground_truth: a COCO annotation file as a dict. "info" and "licenses" are not needed; missing
            "iscrowd", "area" and "num_keypoints" are filled in. It is not changed.
        results: detections in COCO's result format, in the file's own category ids:
            ``{"image_id", "category_id", "score", "bbox": [x, y, w, h], "segmentation": RLE, "keypoints":
            [x, y, s]*K}``. It is not changed. Detections of categories that ``ground_truth`` lacks don't
            count, as in COCO.
        tasks: of "bbox", "segm", "keypoints". ``None``: boxes, and whatever else the results carry (for an
            empty list, what the ground truth carries).
        class_names: classes to report, matched to the file's categories by name; default: the file's
            categories, by id.
        oks_sigmas: one per keypoint; default: COCO's for 17 keypoints, otherwise their mean for each, with a
            warning.
        max_dets_per_image: the highest-scored detections that count, per image *and class*, for boxes and
            masks.
        image_ids: evaluate on these images alone (default: all).
        backend: "faster" (``faster_coco_eval``), "pycocotools", or "auto": the first if it is there.
        processes: that share the work, the same numbers in any case; default: one for each core (at most
            eight) where there is enough of it.

    Returns:
        task -> metric -> percent, tasks in Detectron2's order and metrics by its names: AP, AP50, AP75, APs,
        APm, APl (keypoints: no APs), "AP-<class>". Plain floats. ``nan`` means one thing only: there is no
        ground truth to find (of that size or class). No detections where there is ground truth is 0.
        :func:`zenith_det.evaluation.explain_results` puts both into words, and
        :func:`zenith_det.evaluation.finite_scalars` is what to log and to compare.

    Raises:
        DatasetError: a result of an image that ``ground_truth`` lacks, with a field missing, or with a number
            that is not finite; keypoint counts that differ.
        ConfigError: the number of ``oks_sigmas`` is not that of the keypoints.
        ValueError: an unknown task or backend, or ``max_dets_per_image`` < 1.
    """
    work, precisions = _all_precisions(
        ground_truth, results, tasks, oks_sigmas, max_dets_per_image, image_ids, backend, processes, None
    )
    out: Results = OrderedDict()
    for one, precision in zip(work, precisions):
        out[one.task] = _metrics(
            precision, one.task, _class_columns(ground_truth, one.category_ids, class_names)
        )
    return out


@dataclass(frozen=True)
class SizeBin:
    """Objects of a range of sizes.

    Attributes:
        low, high: the side of a square of the same area, in pixels; both ends belong to it. ``high`` may be infinite.
        objects: how many there are; crowd regions don't count.
        ap: task -> AP in percent; ``nan`` without objects that the task asks for.
    """

    low: float
    high: float
    objects: int
    ap: dict[str, float]


#: Where the bins of :func:`evaluate_by_size` begin and end, in pixels.
SIDES = (0.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, math.inf)


def evaluate_by_size(
    ground_truth: Mapping[str, Any],
    results: Sequence[Mapping[str, Any]],
    tasks: Sequence[str] | None = None,
    *,
    oks_sigmas: Sequence[float] | None = None,
    image_ids: Collection[int] | None = None,
    sides: Sequence[float] = SIDES,
) -> list[SizeBin]:
    """AP as COCO defines it for small, medium and large objects, for finer ranges of sizes.

    Args:
        sides: where they begin and end: the square roots of areas in pixels².
        ground_truth, results, tasks, oks_sigmas, image_ids: see :func:`evaluate_coco`, also for what is raised.

    Returns:
        The ranges that have objects.
    """
    ranges = {str(n): (low**2, min(high, 1e5) ** 2) for n, (low, high) in enumerate(pairwise(sides))}
    work, precisions = _all_precisions(
        ground_truth, results, tasks, oks_sigmas, 100, image_ids, "auto", None, ranges
    )
    objects = prepare_ground_truth(ground_truth, "bbox", image_ids, 0)["annotations"]
    bins = []
    for n, (low, high) in enumerate(ranges.values()):
        count = sum(not one["iscrowd"] and low <= one["area"] <= high for one in objects)
        if count:
            ap = {one.task: _mean_percent(found[..., n]) for one, found in zip(work, precisions)}
            bins.append(SizeBin(sides[n], sides[n + 1], count, ap))
    return bins


def _all_precisions(
    ground_truth: Mapping[str, Any],
    results: Sequence[Mapping[str, Any]],
    tasks: Sequence[str] | None,
    oks_sigmas: Sequence[float] | None,
    max_dets_per_image: int,
    image_ids: Collection[int] | None,
    backend: str,
    processes: int | None,
    areas: Mapping[str, tuple[float, float]] | None,
) -> tuple[list[_Work], list[np.ndarray]]:
    """Each task's part and its precision; ``areas``: in place of COCO's."""
    if max_dets_per_image < 1:
        raise ValueError(f"max_dets_per_image must be at least 1, got {max_dets_per_image}")
    chosen = infer_tasks(ground_truth, results) if tasks is None else tuple(tasks)
    if unknown := set(chosen) - set(METRICS):
        raise ValueError(f"unknown task {sorted(unknown)[0]!r}; the tasks are {', '.join(METRICS)}")
    resolved = _resolve_backend(backend)
    with garbage_collection_off():
        check_results(results, ground_truth, chosen)
        work = []
        for task in sorted(set(chosen)):
            sigmas = _oks_sigmas(ground_truth, results, oks_sigmas) if task == "keypoints" else None
            max_dets = MAX_DETS_KEYPOINTS if task == "keypoints" else max_dets_per_image
            ranges = areas or _areas(task)
            work.append(_Work(ground_truth, results, task, image_ids, max_dets, sigmas, resolved, ranges))
        return work, _precisions(work, processes)


def infer_tasks(ground_truth: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """The tasks that ``results`` can be evaluated for; for an empty list, those the ground truth allows."""
    source: Sequence[Mapping[str, Any]] = results if results else ground_truth.get("annotations", [])
    tasks = ["bbox"]
    if any(item.get("keypoints") for item in source):
        tasks.append("keypoints")
    if any(item.get("segmentation") for item in source):
        tasks.append("segm")
    return tuple(tasks)


def finite_scalars(results: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Flatten to ``{"bbox/AP": 41.2, …}`` without the ``nan`` ones.

    This is what goes into ``metrics.json`` (JSON has no NaN) and what a "best so far" may compare (nothing is
    ever better or worse than NaN).
    """
    return {
        f"{task}/{metric}": value
        for task, metrics in results.items()
        for metric, value in metrics.items()
        if math.isfinite(value)
    }


def _resolve_backend(backend: str) -> str:
    if backend not in ("auto", "faster", "pycocotools"):
        raise ValueError(f"unknown backend {backend!r}; choose 'auto', 'faster' or 'pycocotools'")
    if backend == "auto":
        try:
            import faster_coco_eval  # noqa: F401
        except ImportError:
            return "pycocotools"
        return "faster"
    return backend


def _keypoint_count(ground_truth: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> int:
    """K, which annotations and results must agree on; 17 when neither has keypoints."""
    counts: dict[int, str] = {}
    for annotation in ground_truth.get("annotations", []):
        if annotation.get("keypoints"):
            counts.setdefault(len(annotation["keypoints"]) // 3, f"annotation {annotation.get('id')}")
    for index, result in enumerate(results):
        if result.get("keypoints"):
            counts.setdefault(
                len(result["keypoints"]) // 3, f"detection {index} of image {result['image_id']}"
            )
    if len(counts) > 1:
        told = ", ".join(f"{count} in {where}" for count, where in counts.items())
        raise DatasetError(f"keypoint counts differ: {told}; they must be one number for all")
    return next(iter(counts), len(COCO_OKS_SIGMAS))


def _oks_sigmas(
    ground_truth: Mapping[str, Any], results: Sequence[Mapping[str, Any]], given: Sequence[float] | None
) -> tuple[float, ...]:
    count = _keypoint_count(ground_truth, results)
    if given:
        if len(given) != count:
            raise ConfigError(
                f"TEST.KEYPOINT_OKS_SIGMAS has {len(given)} numbers, but the data has {count} keypoints; "
                "give one for each"
            )
        return tuple(float(sigma) for sigma in given)
    if count == len(COCO_OKS_SIGMAS):
        return COCO_OKS_SIGMAS
    mean = round(sum(COCO_OKS_SIGMAS) / len(COCO_OKS_SIGMAS), 3)
    logger.warning(
        "no OKS sigmas for these %d keypoints: %g (the mean of COCO's) is used for each, so keypoint AP "
        "compares only with runs that use the same; set TEST.KEYPOINT_OKS_SIGMAS to choose",
        count,
        mean,
    )
    return (mean,) * count


def prepare_ground_truth(
    ground_truth: Mapping[str, Any], task: str, image_ids: Collection[int] | None, num_keypoints: int
) -> dict[str, Any]:
    """A copy that either backend accepts: every field there, annotation ids from 1.

    Both backends mark a match by the annotation's id, so that one with id 0 could never be found.
    """
    wanted = None if image_ids is None else set(image_ids)
    images = [
        dict(image) for image in ground_truth.get("images", []) if wanted is None or image["id"] in wanted
    ]
    kept_ids = {image["id"] for image in images}
    annotations: list[dict[str, Any]] = []
    for source in ground_truth.get("annotations", []):
        if source["image_id"] not in kept_ids:
            continue
        annotation = dict(source, id=len(annotations) + 1)
        annotation["iscrowd"] = int(annotation.get("iscrowd") or 0)
        if annotation.get("area") is None:
            annotation["area"] = _area_of(annotation)
        if task == "segm" and not annotation.get("segmentation"):
            # An object nobody drew can be neither demanded nor held against a detection: a region to ignore.
            x, y, width, height = annotation["bbox"]
            annotation["segmentation"] = [[x, y, x, y + height, x + width, y + height, x + width, y]]
            annotation["iscrowd"] = 1
        if task == "keypoints":
            keypoints = annotation.get("keypoints") or [0] * (3 * num_keypoints)
            annotation["keypoints"] = keypoints
            annotation.setdefault("num_keypoints", sum(v > 0 for v in keypoints[2::3]))
        annotations.append(annotation)
    categories = [dict(category) for category in ground_truth.get("categories", [])]
    return {
        "info": {},
        "licenses": [],
        "images": images,
        "annotations": annotations,
        "categories": categories,
    }


def _area_of(annotation: Mapping[str, Any]) -> float:
    """Mask area where polygons or compressed RLE give one, else box area."""
    segmentation = annotation.get("segmentation")
    if isinstance(segmentation, Mapping) and isinstance(segmentation["counts"], (str, bytes)):
        return float(coco_mask.area(dict(segmentation)))
    if isinstance(segmentation, list) and segmentation:
        total = 0.0
        for polygon in segmentation:
            x, y = np.asarray(polygon[0::2], dtype=float), np.asarray(polygon[1::2], dtype=float)
            total += 0.5 * abs(float(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))))
        return total
    return float(annotation["bbox"][2] * annotation["bbox"][3])


def _that_count(results: Sequence[Mapping[str, Any]], most: int) -> Sequence[Mapping[str, Any]]:
    """The ``most`` highest-scored of each image and class, in the given order.

    Either backend leaves the others out as well, but only after the work of taking them in; by keypoints
    that is four in five.
    """
    places = defaultdict(list)
    for index, result in enumerate(results):
        places[result["image_id"], result["category_id"]].append(index)
    if all(len(indices) <= most for indices in places.values()):
        return results
    # Stable sorts, as the backends': of equal scores the first ones count.
    kept = (sorted(indices, key=lambda index: -results[index]["score"])[:most] for indices in places.values())
    return [results[index] for index in sorted(chain.from_iterable(kept))]


def prepare_results(
    results: Sequence[Mapping[str, Any]], task: str, gt: Mapping[str, Any], image_ids: Collection[int] | None
) -> dict[str, Any]:
    """Detections as an annotation set, each with the area that decides its size.

    For masks this is the area of the mask, whatever box comes with it; for keypoints the box, where there is
    one (both as in Detectron2).
    """
    if image_ids is not None:
        wanted = set(image_ids)
        results = [result for result in results if result["image_id"] in wanted]
    detections: list[dict[str, Any]] = [
        {
            "id": number,
            "image_id": source["image_id"],
            "category_id": source["category_id"],
            "score": float(source["score"]),
            "iscrowd": 0,
        }
        for number, source in enumerate(results, start=1)
    ]
    if task == "segm":
        rles = [dict(source["segmentation"]) for source in results]
        boxes, areas = _boxes_and_areas(rles)
        for detection, rle, box, area in zip(detections, rles, boxes, areas):
            detection.update(segmentation=rle, bbox=box, area=area)
    else:
        for detection, source in zip(detections, results):
            box = list(map(float, _box_of(source, task)))
            detection.update(bbox=box, area=box[2] * box[3])
            if task == "keypoints":
                detection["keypoints"] = source["keypoints"]
    return {
        "info": {},
        "images": [dict(image) for image in gt["images"]],
        "annotations": detections,
        "categories": [dict(category) for category in gt["categories"]],
    }


def _boxes_and_areas(rles: Sequence[dict[str, Any]]) -> tuple[list[list[float]], list[float]]:
    """[x, y, width, height] and area of masks, many a call: a call costs more than a mask."""
    boxes: list[list[float]] = []
    areas: list[float] = []
    # pycocotools' area counts the masks of a call in 8 bits.
    for start in range(0, len(rles), 255):
        some = rles[start : start + 255]
        boxes += coco_mask.toBbox(some).tolist()
        areas += map(float, coco_mask.area(some))
    return boxes, areas


def _box_of(result: Mapping[str, Any], task: str) -> Sequence[float]:
    """x, y, width, height: as given, else around the mask ("bbox") or the keypoints ("keypoints")."""
    box = result.get("bbox")
    if box:
        return box  # type: ignore[no-any-return]
    if task == "bbox":
        return coco_mask.toBbox(dict(result["segmentation"])).tolist()  # type: ignore[no-any-return]
    xs, ys = result["keypoints"][0::3], result["keypoints"][1::3]
    return [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]


@dataclass(frozen=True)
class _Work:
    """One task's evaluation, which falls apart by category."""

    ground_truth: Mapping[str, Any]
    results: Sequence[Mapping[str, Any]]
    task: str
    image_ids: Collection[int] | None
    max_dets: int
    sigmas: Sequence[float] | None
    backend: str
    areas: Mapping[str, tuple[float, float]]

    @property
    def category_ids(self) -> list[int]:
        return sorted(category["id"] for category in self.ground_truth.get("categories", []))

    def precision(self, category_ids: list[int]) -> np.ndarray:
        """See :func:`_precision`, for these of the categories."""
        ground_truth, results = self.ground_truth, self.results
        if len(category_ids) < len(self.category_ids):
            wanted = set(category_ids)
            annotations = [a for a in ground_truth.get("annotations", []) if a["category_id"] in wanted]
            ground_truth = {**ground_truth, "annotations": annotations}
            results = [result for result in results if result["category_id"] in wanted]
        results = _that_count(results, self.max_dets)
        gt = prepare_ground_truth(
            ground_truth, self.task, self.image_ids, len(self.sigmas) if self.sigmas else 0
        )
        dt = prepare_results(results, self.task, gt, self.image_ids)
        return _precision(
            gt, dt, self.task, category_ids, self.max_dets, self.areas, self.sigmas, self.backend
        )


CAN_FORK = "fork" in multiprocessing.get_all_start_methods() and hasattr(os, "sched_getaffinity")
#: Fewer detections than this are evaluated sooner than processes are started.
_WORTH_PROCESSES = 50_000
_MOST_PROCESSES = 8
# Inherited by forked processes: detections of a whole set take long to send.
_shared: list[_Work] = []


def _precisions(work: list[_Work], processes: int | None) -> list[np.ndarray]:
    """The precision of each, by several processes where that is worth it."""
    parts: list[tuple[int, list[int]]] = []
    if processes is None:
        enough = work and len(work[0].results) >= _WORTH_PROCESSES
        processes = min(len(os.sched_getaffinity(0)), _MOST_PROCESSES) if enough and CAN_FORK else 1
    if processes > 1:
        # Masks take the longest: first, so that no process is left with one of theirs at the end.
        for number in sorted(range(len(work)), key=lambda n: work[n].task != "segm"):
            parts += [(number, ids) for ids in _split(work[number], 2 * processes)]
    if len(parts) > 1:
        try:
            return _join(work, parts, _in_processes(work, parts, processes))
        except BrokenProcessPool:
            logger.warning("a process that evaluated was killed (out of memory?): evaluating in one")
    return [one.precision(one.category_ids) for one in work]


def _split(work: _Work, count: int) -> list[list[int]]:
    """The categories in so many groups, or fewer, with about as many detections each."""
    sizes = Counter(result["category_id"] for result in work.results)
    groups: list[list[int]] = [[] for _ in range(min(count, max(1, len(work.category_ids))))]
    totals = [0] * len(groups)
    for category in sorted(work.category_ids, key=lambda c: -sizes[c]):
        smallest = totals.index(min(totals))
        groups[smallest].append(category)
        totals[smallest] += sizes[category] + 1
    return [sorted(group) for group in groups]


def _in_processes(work: list[_Work], parts: list[tuple[int, list[int]]], processes: int) -> list[np.ndarray]:
    """Each part's precision, computed in forked processes.

    Raises:
        BrokenProcessPool: one of them was killed.
    """
    _shared[:] = work
    try:
        with (
            starting_workers(),
            ProcessPoolExecutor(
                min(processes, len(parts)),
                multiprocessing.get_context("fork"),
                initializer=ignore_stop_signals,
            ) as pool,
        ):
            return list(pool.map(_precision_of, parts))
    finally:
        _shared.clear()


def _precision_of(part: tuple[int, list[int]]) -> np.ndarray:
    number, category_ids = part
    return _shared[number].precision(category_ids)


def _join(
    work: list[_Work], parts: list[tuple[int, list[int]]], precisions: list[np.ndarray]
) -> list[np.ndarray]:
    """Put the parts' categories back in order."""
    joined = []
    for number in range(len(work)):
        mine = [(ids, found) for (n, ids), found in zip(parts, precisions) if n == number]
        order = np.argsort([category for ids, _ in mine for category in ids], kind="stable")
        joined.append(np.concatenate([found for _, found in mine], axis=2)[:, :, order])
    return joined


def _precision(
    gt: dict[str, Any],
    dt: dict[str, Any],
    task: str,
    category_ids: list[int],
    max_dets: int,
    areas: Mapping[str, tuple[float, float]],
    sigmas: Sequence[float] | None,
    backend: str,
) -> np.ndarray:
    """Precision (T, R, K, A): 10 IoU thresholds, 101 recalls, categories, area ranges; -1 without ground
    truth."""
    if not gt["images"] or not category_ids:
        return -np.ones((10, 101, len(category_ids), len(areas)))
    evaluator = coco_evaluator(gt, dt, task, category_ids, max_dets, areas, sigmas, backend=backend)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluator.evaluate()
        evaluator.accumulate()
    return np.asarray(evaluator.eval["precision"])[..., -1]


def coco_evaluator(
    gt: dict[str, Any],
    dt: dict[str, Any],
    task: str,
    category_ids: list[int],
    max_dets: int,
    areas: Mapping[str, tuple[float, float]],
    sigmas: Sequence[float] | None = None,
    *,
    backend: str,
) -> Any:
    """The backend's ``COCOeval`` with its parameters set, before it evaluates.

    Args:
        gt: from :func:`prepare_ground_truth`.
        dt: from :func:`prepare_results`.
        areas: label -> lowest and highest area in pixels², both included.
        backend: "faster" or "pycocotools", which prints its progress to standard output.
    """
    if backend == "faster":
        from faster_coco_eval import COCO, COCOeval_faster

        # It, too, prints while it indexes.
        with contextlib.redirect_stdout(io.StringIO()):
            evaluator = COCOeval_faster(COCO(gt), COCO(dt), iouType=task, print_function=_say_nothing)
    else:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval

        indexed = []
        with contextlib.redirect_stdout(io.StringIO()):
            for dataset in (gt, dt):
                coco = COCO()
                coco.dataset = dataset
                coco.createIndex()
                indexed.append(coco)
            evaluator = COCOeval(*indexed, iouType=task)
    params = evaluator.params
    params.catIds = category_ids
    params.maxDets = [max_dets]
    params.areaRngLbl = list(areas)
    params.areaRng = [list(area) for area in areas.values()]
    if sigmas is not None:
        params.kpt_oks_sigmas = np.array(sigmas)
    return evaluator


def _say_nothing(*_: object) -> None:
    """Takes the backend's progress lines, which would fill every log with five lines a task."""


def _areas(task: str) -> dict[str, tuple[float, float]]:
    return {
        label: area for label, area in AREA_RANGES.items() if not (task == "keypoints" and label == "small")
    }


def _class_columns(
    gt: Mapping[str, Any], category_ids: list[int], class_names: Sequence[str] | None
) -> list[tuple[str, int | None]]:
    """(class name, its index among the sorted category ids or None where the file lacks it)."""
    index_of: dict[str, int] = {}
    for category in sorted(gt.get("categories", []), key=lambda category: category["id"]):
        name = str(category.get("name", category["id"]))
        if name in index_of:
            name = f"{name} (id {category['id']})"
        index_of[name] = category_ids.index(category["id"])
    return [(name, index_of.get(name)) for name in (index_of if class_names is None else class_names)]


def _metrics(precision: np.ndarray, task: str, columns: list[tuple[str, int | None]]) -> dict[str, float]:
    labels = list(_areas(task))
    out: dict[str, float] = {}
    for metric in METRICS[task]:
        picked = precision[..., labels.index(SIZE_OF_METRIC.get(metric, "all"))]
        if metric in ("AP50", "AP75"):
            picked = picked[(int(metric[2:]) - 50) // 5]
        out[metric] = _mean_percent(picked)
    for name, index in columns:
        out[f"AP-{name}"] = math.nan if index is None else _mean_percent(precision[:, :, index, 0])
    return out


def _mean_percent(precision: np.ndarray) -> float:
    defined = precision[precision > -1]
    return float(defined.mean() * 100) if defined.size else math.nan
