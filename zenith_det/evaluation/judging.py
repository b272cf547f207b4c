"""What a detector's scores are worth: precision, recall and F1 at every score, confusions, calibration.

Detections are matched with objects as COCO does at an IoU of boxes of 0.5 (``pycocotools``): in order of falling
score, each object once, what lies in a crowd region neither right nor wrong, and of each image and class the 100
best alone.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from zenith_det.evaluation.coco import coco_evaluator, prepare_ground_truth, prepare_results

#: A box of this IoU with an object's is that object's.
MATCH_IOU = 0.5
#: The scores that thresholds are chosen from.
SCORES = np.arange(1001) / 1000
MAX_DETS = 100

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class ScoredClass:
    """The detections of one class over all images.

    Attributes:
        name: of the class.
        objects: how many there are to find; crowd regions don't count.
        scores: (D,) falling; of detections that lie in crowd regions there is none.
        right: (D,) bool: the detection found an object.
    """

    name: str
    objects: int
    scores: Floats
    right: npt.NDArray[np.bool_]

    @cached_property
    def recall(self) -> Floats:
        """(D,) after each detection; nan without objects."""
        return np.cumsum(self.right) / (self.objects or np.nan)

    @cached_property
    def precision(self) -> Floats:
        """(D,) after each detection."""
        return np.cumsum(self.right) / np.arange(1, len(self.right) + 1)

    def counts(self, scores: npt.ArrayLike) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """How many detections have each of these scores or a higher one, and how many of them are right."""
        kept = len(self.scores) - np.searchsorted(self.scores[::-1], scores, side="left")
        return kept, np.concatenate(([0], np.cumsum(self.right)))[kept]

    def f1(self, scores: npt.ArrayLike) -> Floats:
        """F1, in [0, 1], of the detections with each of these scores or a higher one; nan without objects."""
        kept, right = self.counts(scores)
        return 2 * right / (kept + self.objects) if self.objects else np.full(np.shape(scores), np.nan)

    @cached_property
    def best_score(self) -> float | None:
        """The lowest score to keep for the highest F1; ``None`` where nothing is found."""
        return _peak(self.f1(SCORES))


@dataclass(frozen=True)
class CalibrationBin:
    """Detections whose scores are alike.

    Attributes:
        low, high: the scores, ``high`` excluded (1 included).
        count: how many detections there are.
        score: their mean score.
        precision: the share of them that found an object.
    """

    low: float
    high: float
    count: int
    score: float
    precision: float


@dataclass(frozen=True)
class Judgement:
    """What :func:`judge` found.

    Attributes:
        classes: in the order of the file's category ids.
    """

    classes: list[ScoredClass]
    _ground_truth: dict[str, Any] = field(repr=False)
    _detections: dict[str, Any] = field(repr=False)
    _matches: dict[int, int] = field(repr=False)  # detection id -> annotation id, 0 where it found nothing

    @cached_property
    def mean_f1(self) -> Floats:
        """(1001,) at :data:`SCORES`, over the classes that have objects; nan where none has."""
        rows = [one.f1(SCORES) for one in self.classes if one.objects]
        return np.mean(rows, axis=0) if rows else np.full(len(SCORES), np.nan)

    @cached_property
    def recommended_score(self) -> float | None:
        """The score above which detections have the highest F1, in the mean of the classes.

        Where a range of scores is equally good, its middle. ``None`` where nothing is found at any.
        """
        return _peak(self.mean_f1)

    @property
    def names(self) -> dict[int, str]:
        """Of the classes, by the file's category ids."""
        ids = [category["id"] for category in self._ground_truth["categories"]]
        return {category: one.name for category, one in zip(ids, self.classes)}

    def objects(self) -> list[dict[str, Any]]:
        """Annotations of what there is to find, in COCO's format; crowd regions don't count."""
        return [one for one in self._ground_truth["annotations"] if not one["iscrowd"]]

    def detections(self, score: float) -> list[dict[str, Any]]:
        """Those with this score or a higher one that are right or wrong, in COCO's result format."""
        found = self._detections["annotations"]
        return [one for one in found if one["score"] >= score and one["id"] in self._matches]

    def errors(self, score: float) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """The detections with this score or a higher one that found no object, and the objects none of them found."""
        detections = self.detections(score)
        found = {self._matches[one["id"]] for one in detections}
        wrong = [one for one in detections if not self._matches[one["id"]]]
        return wrong, [one for one in self.objects() if one["id"] not in found]

    def confusion(self, score: float) -> npt.NDArray[np.int64]:
        """What was taken for what, by the detections with this score or a higher one.

        A detection that found no object of its class is put to an object of another class that was not found
        either, where their boxes have an IoU of 0.5.

        Returns:
            (C + 1, C + 1): rows what is there, columns what was detected; last the background, that is false
            positives (row) and misses (column).
        """
        index = {category: n for n, category in enumerate(self.names)}
        background = len(index)
        table = np.zeros((background + 1, background + 1), dtype=np.int64)
        for n, one in enumerate(self.classes):
            table[n, n] = one.counts(score)[1]
        wrong, missed = self.errors(score)
        taken = _match_any_class(self._ground_truth, missed, wrong)
        label = {annotation["id"]: index[annotation["category_id"]] for annotation in missed}
        for detection in wrong:
            match = taken.get(detection["id"], 0)
            table[label.pop(match) if match else background, index[detection["category_id"]]] += 1
        for n in label.values():
            table[n, background] += 1
        return table

    def calibration(self, bins: int = 10) -> list[CalibrationBin]:
        """Whether of detections with a score of 0.8, say, 80 % found an object; bins without any are left out."""
        scores = np.concatenate([np.zeros(0), *(one.scores for one in self.classes)])
        right = np.concatenate([np.zeros(0, bool), *(one.right for one in self.classes)])
        place = np.minimum((scores * bins).astype(int), bins - 1)
        return [
            CalibrationBin(
                n / bins, (n + 1) / bins, int(own.sum()), float(scores[own].mean()), float(right[own].mean())
            )
            for n in range(bins)
            if (own := place == n).any()
        ]

    def calibration_error(self, bins: int = 10) -> float:
        """The mean difference of score and precision over all detections, by bins (ECE); nan without any.

        Source: Guo et al., On Calibration of Modern Neural Networks (arXiv 1706.04599), equation 3.
        """
        found = self.calibration(bins)
        total = sum(one.count for one in found)
        return sum(one.count * abs(one.score - one.precision) for one in found) / total if total else np.nan


def judge(
    ground_truth: Mapping[str, Any],
    results: Sequence[Mapping[str, Any]],
    *,
    image_ids: Collection[int] | None = None,
) -> Judgement:
    """Match detections with objects and keep what their scores say.

    Args:
        ground_truth, results, image_ids: see :func:`~zenith_det.evaluation.evaluate_coco`.
    """
    truth = prepare_ground_truth(ground_truth, "bbox", image_ids, 0)
    truth["categories"].sort(key=lambda category: category["id"])
    known = {category["id"] for category in truth["categories"]}
    kept = [result for result in results if result["category_id"] in known]
    found = prepare_results(kept, "bbox", truth, image_ids)
    evaluator = _evaluated(truth, found, MAX_DETS, by_class=True)
    classes: list[ScoredClass] = []
    matches: dict[int, int] = {}
    images = len(evaluator.params.imgIds)
    for n, category in enumerate(truth["categories"]):
        objects, scores, right = 0, [np.zeros(0)], [np.zeros(0, bool)]
        for image in evaluator.evalImgs[n * images : (n + 1) * images]:
            if image is None:  # neither objects nor detections
                continue
            objects += int(np.sum(np.asarray(image["gtIgnore"]) == 0))
            counted = ~image["dtIgnore"][0].astype(bool)
            matched = image["dtMatches"][0][counted].astype(np.int64)
            scores.append(np.asarray(image["dtScores"], dtype=np.float64)[counted])
            right.append(matched > 0)
            matches.update(
                zip(np.asarray(image["dtIds"], dtype=np.int64)[counted].tolist(), matched.tolist())
            )
        all_scores, all_right = np.concatenate(scores), np.concatenate(right)
        order = np.argsort(-all_scores, kind="stable")
        name = str(category.get("name", category["id"]))
        classes.append(ScoredClass(name, objects, all_scores[order], all_right[order]))
    return Judgement(classes, truth, found, matches)


def _match_any_class(
    truth: Mapping[str, Any], objects: list[dict[str, Any]], detections: list[dict[str, Any]]
) -> dict[int, int]:
    """Annotation ids by the ids of the detections that lie on them, whatever their classes are."""
    if not objects or not detections:
        return {}
    parts = [{**truth, "annotations": annotations} for annotations in (objects, detections)]
    evaluator = _evaluated(parts[0], parts[1], len(detections), by_class=False)
    return {
        int(detection): int(match)
        for image in evaluator.evalImgs
        if image is not None
        for detection, match in zip(image["dtIds"], image["dtMatches"][0])
        if match
    }


def _evaluated(truth: dict[str, Any], found: dict[str, Any], max_dets: int, *, by_class: bool) -> Any:
    """pycocotools' evaluator after matching, at one IoU and for objects of any size."""
    ids = [category["id"] for category in truth["categories"]]
    evaluator = coco_evaluator(
        truth, found, "bbox", ids, max_dets, {"all": (0.0, 1e10)}, backend="pycocotools"
    )
    evaluator.params.useCats = int(by_class)
    evaluator.params.iouThrs = np.array([MATCH_IOU])
    with contextlib.redirect_stdout(io.StringIO()):
        evaluator.evaluate()
    return evaluator


def _peak(f1: Floats) -> float | None:
    """The score of the highest F1; of a range that is equally high, the middle."""
    best = float(np.max(f1)) if len(f1) and not np.isnan(f1).any() else 0.0
    if best <= 0:
        return None
    first = int(np.argmax(f1))
    last = first
    while last + 1 < len(f1) and f1[last + 1] == best:
        last += 1
    return float(SCORES[(first + last) // 2])
