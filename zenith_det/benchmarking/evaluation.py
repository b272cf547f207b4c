"""Our COCO evaluation beside pycocotools and Detectron2's compiled one: times and agreement."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from zenith_det.benchmarking.detections import coco_like
from zenith_det.benchmarking.measuring import Case, Samples, interleave
from zenith_det.benchmarking.reporting import Comparison, Ratio
from zenith_det.config.metric_names import TASKS
from zenith_det.engines.selection import probe_detectron2
from zenith_det.evaluation import METRICS, evaluate_coco

__all__ = ["compare_evaluations"]

TOLERANCE = 1e-9
"""In percent AP."""
OURS, PYCOCOTOOLS, DETECTRON2 = "zenith_det", "pycocotools", "Detectron2, COCOeval_opt"
MAX_DETS = 100


def compare_evaluations(
    num_images: int, dets_per_image: int, tasks: Sequence[str] = tuple(TASKS), *, rounds: int, warmup: int
) -> list[Comparison]:
    """For each task, from annotations and detections in memory to AP; boxes and masks together first.

    "agrees" among the facts is whether every AP (and that of each size) is within 1e-9 of pycocotools'.
    """
    probe = probe_detectron2()
    names = [OURS, PYCOCOTOOLS, *([DETECTRON2] if probe.usable else [])]
    comparisons = {
        task: _compare(task, names, num_images, dets_per_image, rounds, warmup, probe.problem)
        for task in tasks
    }
    if {"bbox", "segm"} <= set(tasks):
        together = {}
        for name in names:
            boxes, masks = (comparisons[task].samples[name].seconds for task in ("bbox", "segm"))
            together[name] = Samples(tuple(map(sum, zip(boxes, masks))))
        title = f"evaluation of bbox + segm: {num_images} images x {dets_per_image} detections"
        comparisons = {"both": Comparison(title, together, _ratios(names, 0.20)), **comparisons}
    return list(comparisons.values())


def _ratios(names: Sequence[str], at_most: float | None) -> list[Ratio]:
    return [Ratio(OURS, name, at_most if name == PYCOCOTOOLS else None) for name in names if name != OURS]


def _compare(
    task: str,
    names: Sequence[str],
    num_images: int,
    dets_per_image: int,
    rounds: int,
    warmup: int,
    problem: str,
) -> Comparison:
    ground_truth, results = coco_like(task, num_images, dets_per_image)
    found: dict[str, dict[str, float]] = {}

    def case(name: str) -> Case:
        given: Any = None

        def before() -> None:
            # loadRes writes into the results it is given: every run gets them as they were.
            nonlocal given
            given = [dict(result) for result in results]

        def run() -> None:
            found[name] = _EVALUATIONS[name](task, ground_truth, given)

        return Case(name, run, before)

    samples = interleave([case(name) for name in names], rounds=rounds, warmup=warmup)
    difference = {name: _difference(found[name], found[PYCOCOTOOLS]) for name in names}
    return Comparison(
        f"evaluation of {task}: {num_images} images x {dets_per_image} detections",
        samples,
        _ratios(names, None),
        {name: {"AP": f"{found[name]['AP']:.9f}", "largest difference": difference[name]} for name in names},
        {
            "agrees": all(value <= TOLERANCE for value in difference.values()),
            **({"without Detectron2": problem.partition(";")[0]} if problem else {}),
        },
    )


def _difference(ours: Mapping[str, float], theirs: Mapping[str, float]) -> float:
    """The largest absolute difference; infinite if a metric is undefined in one alone."""
    worst = 0.0
    for key, value in theirs.items():
        if np.isnan(value) != np.isnan(ours[key]):
            return float("inf")
        worst = max(worst, 0.0 if np.isnan(value) else abs(value - ours[key]))
    return worst


def _ours(task: str, ground_truth: dict[str, Any], results: list[dict[str, Any]]) -> dict[str, float]:
    metrics = evaluate_coco(ground_truth, results, [task], max_dets_per_image=MAX_DETS)[task]
    return {name: metrics[name] for name in METRICS[task]}


def _pycocotools(task: str, ground_truth: dict[str, Any], results: list[dict[str, Any]]) -> dict[str, float]:
    from pycocotools.cocoeval import COCOeval

    return _by_the_book(COCOeval, task, ground_truth, results)


def _detectron2(task: str, ground_truth: dict[str, Any], results: list[dict[str, Any]]) -> dict[str, float]:
    from zenith_det.engines.detectron2_engine.evaluation import compiled_coco_eval

    return _by_the_book(compiled_coco_eval(), task, ground_truth, results)


def _by_the_book(
    evaluator_class: Any, task: str, ground_truth: dict[str, Any], results: list[dict[str, Any]]
) -> dict[str, float]:
    """loadRes, evaluate, accumulate, summarize, as everyone writes it."""
    from pycocotools.coco import COCO

    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = ground_truth
        coco.createIndex()
        evaluator = evaluator_class(coco, coco.loadRes(results), task)
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    stats = evaluator.stats[: len(METRICS[task])]
    return {
        name: float(value) * 100 if value > -1 else float("nan") for name, value in zip(METRICS[task], stats)
    }


_EVALUATIONS: dict[str, Callable[[str, dict[str, Any], list[dict[str, Any]]], dict[str, float]]] = {
    OURS: _ours,
    PYCOCOTOOLS: _pycocotools,
    DETECTRON2: _detectron2,
}
