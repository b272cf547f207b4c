"""Detections in COCO's result format: made from arrays, checked and written."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from zenith_det.errors import DatasetError
from zenith_det.evaluation.masks import encode_masks
from zenith_det.files import told, whole_file, write_whole

RESULTS_FILE = "coco_instances_results.json"
#: Added to COCO's whole-pixel keypoints on reading, so that a keypoint lies in the middle of its pixel
#: (Detectron2's convention); taken off again in results.
KEYPOINT_OFFSET = 0.5

_FIELD_OF_TASK = {"segm": "segmentation", "keypoints": "keypoints"}


def detections_to_results(
    image_id: int,
    boxes: npt.ArrayLike,
    scores: npt.ArrayLike,
    classes: npt.ArrayLike,
    category_ids: Sequence[int],
    *,
    masks: npt.ArrayLike | None = None,
    keypoints: npt.ArrayLike | None = None,
) -> list[dict[str, Any]]:
    """One image's detections as COCO results, with plain Python numbers.

    Args:
        image_id: the image's id in the annotation file.
        boxes: (N, 4), x0 y0 x1 y1 in pixels of the original image.
        scores: (N,).
        classes: (N,), contiguous class indices from 0.
        category_ids: the file's category id of each class index.
        masks: (N, H, W) bool, at the original image's size.
        keypoints: (N, K, 3), x y score, with Detectron2's half-pixel offset, which is taken off here.

    Raises:
        ValueError: the numbers of boxes, scores, classes, masks or keypoints differ.
        DatasetError: a class index without a category id.
    """
    box_array = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
    count = len(box_array)
    score_list = np.asarray(scores, dtype=np.float64).reshape(-1).tolist()
    class_list = [int(index) for index in np.asarray(classes).reshape(-1)]
    if not len(score_list) == len(class_list) == count:
        raise ValueError(
            f"{count} boxes, {len(score_list)} scores and {len(class_list)} classes; they must be as many"
        )
    if out_of_range := [index for index in class_list if not 0 <= index < len(category_ids)]:
        raise DatasetError(
            f"image {image_id}: class index {out_of_range[0]} was predicted, but the dataset has "
            f"{len(category_ids)} classes; the model was trained for other ones (MODEL.ROI_HEADS.NUM_CLASSES)"
        )
    xywh = np.concatenate([box_array[:, :2], box_array[:, 2:] - box_array[:, :2]], axis=1).tolist()
    results: list[dict[str, Any]] = [
        {"image_id": int(image_id), "category_id": int(category_ids[index]), "bbox": box, "score": score}
        for box, score, index in zip(xywh, score_list, class_list, strict=True)
    ]
    if masks is not None:
        for result, rle in zip(results, encode_masks(masks), strict=True):
            result["segmentation"] = rle
    if keypoints is not None:
        points = np.array(keypoints, dtype=np.float64)
        points[..., :2] -= KEYPOINT_OFFSET
        for result, instance in zip(results, points, strict=True):
            result["keypoints"] = instance.reshape(-1).tolist()
    return results


def check_results(
    results: Iterable[Any], ground_truth: Mapping[str, Any], tasks: Sequence[str] = ("bbox",)
) -> None:
    """Raise a one-line :class:`DatasetError` for the first result that cannot be evaluated.

    Args:
        results: detections in COCO's result format.
        ground_truth: the annotation file as a dict.
        tasks: what they are to be evaluated for; decides which fields must be there.
    """
    sizes = {
        image["id"]: (image.get("height"), image.get("width")) for image in ground_truth.get("images", [])
    }
    needed = [_FIELD_OF_TASK[task] for task in tasks if task in _FIELD_OF_TASK]

    # Half a million detections are usual: what is only for messages is made where one is raised.
    for index, result in enumerate(results):
        if not isinstance(
            result, (dict, Mapping)
        ):  # dict first: it spares the slow look at an abstract class
            raise DatasetError(
                f"results: detection {index} is {type(result).__name__}, not an object with image_id, "
                "category_id and score"
            )
        for key in ("image_id", "category_id", "score"):
            if key not in result:
                raise DatasetError(f"results: detection {index} has no {key!r}")
        image_id = result["image_id"]
        if image_id not in sizes:
            raise DatasetError(
                f"results: detection {index} is of image {image_id!r}, which the ground truth ({len(sizes)} "
                "images) does not have; the results belong to another dataset or split"
            )
        problem = _problem(result, sizes[image_id], tasks, needed)
        if problem:
            raise DatasetError(f"results: detection {index} (image {image_id}) has {problem}")


def _problem(
    result: Mapping[str, Any], size: tuple[Any, Any], tasks: Sequence[str], needed: Sequence[str]
) -> str:
    """What is wrong with the values of a detection of a known image, "" if nothing is."""
    if not _all_finite((result["score"],)):
        return f"score {result['score']!r}, not a finite number; the model's outputs diverged"
    box = result.get("bbox")
    if box is not None:
        if (
            not isinstance(box, (list, Sequence))
            or len(box) != 4
            or not _all_finite(box)
            or box[2] < 0
            or box[3] < 0
        ):
            return f"bbox {box!r}, not [x, y, width, height] in finite numbers, sides >= 0"
    elif "bbox" in tasks and "segmentation" not in result:
        return "no 'bbox'"
    for field in needed:
        if not result.get(field):
            return f"no {field!r}, but is to be evaluated for {', '.join(sorted(tasks))}"
    points = result.get("keypoints")
    if points and (len(points) % 3 or not _all_finite(points)):
        return "keypoints that are not [x, y, score] triples of finite numbers"
    rle = result.get("segmentation")
    return _rle_problem(rle, size) if rle else ""


def _all_finite(values: Sequence[Any]) -> bool:
    try:
        # inf and NaN survive every sum; one that only overflows is looked at number by number.
        return math.isfinite(sum(values)) or all(math.isfinite(value) for value in values)
    except TypeError:
        return False


def _rle_problem(rle: Any, size: tuple[Any, Any]) -> str:
    if not isinstance(rle, (dict, Mapping)) or not isinstance(rle.get("counts"), (str, bytes)):
        return "a segmentation that is not compressed RLE {'size', 'counts'}"
    declared = tuple(rle.get("size", ()))
    if declared != size and None not in size:
        return f"a mask of size {list(declared)}, but the image is {list(size)} (height, width)"
    return ""


def write_results(results: Sequence[Mapping[str, Any]], path: str | os.PathLike[str]) -> Path:
    """Write results as JSON, see :func:`zenith_det.files.write_whole`.

    Args:
        results: detections in COCO's result format.
        path: the file, usually ``OUTPUT_DIR/inference/coco_instances_results.json``; its folder is made.

    Raises:
        DatasetError: a number is not finite (JSON has no NaN).
        UserError: the file cannot be written.
    """
    target = Path(path)
    try:
        text = json.dumps(list(results), allow_nan=False)
    except ValueError as error:
        raise DatasetError(
            f"{target}: a detection has a number that is not finite; the model's outputs diverged"
        ) from error
    return write_whole(target, text)


class ResultsWriter:
    """Writes results, one image after the other, to a JSON file that is there whole when the ``with`` ends, or not.

    Args:
        path: the file; its folder is made.

    Raises:
        DatasetError: a number is not finite (JSON has no NaN).
        UserError: the file cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._whole = contextlib.ExitStack()
        self._first = True

    def __enter__(self) -> ResultsWriter:
        with told(self.path):
            self._file = self._whole.enter_context(whole_file(self.path))
        return self

    def add(self, results: Iterable[Mapping[str, Any]]) -> None:
        """Write more of them, each in a line of its own."""
        for result in results:
            try:
                text = json.dumps(result, allow_nan=False)
            except ValueError as error:
                raise DatasetError(
                    f"{self.path}: a detection has a number that is not finite; the model's outputs diverged"
                ) from error
            with told(self.path):
                self._file.write(f"{'[' if self._first else ','}\n{text}".encode())
            self._first = False

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._whole.__exit__(kind, error, trace)
            return
        with told(self.path), self._whole:
            self._file.write(b"[]\n" if self._first else b"\n]\n")
