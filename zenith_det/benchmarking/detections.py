"""COCO-like ground truth and detections of any number of images, for timing evaluations."""

from __future__ import annotations

from typing import Any

import numpy as np
import pycocotools.mask as coco_mask

__all__ = ["coco_like"]

WIDTH, HEIGHT = 640, 480
NUM_CLASSES = 80
OBJECTS = 7  # COCO's mean an image is 7.3
NUM_KEYPOINTS = 17
CORNERS = 24

Dicts = list[dict[str, Any]]


def coco_like(task: str, num_images: int, dets_per_image: int) -> tuple[dict[str, Any], Dicts]:
    """A ground truth and results for it: images of 640 × 480 with 7 objects each, of COCO's range of sizes.

    A third of the detections are objects, moved a little; half of the rest share the class of an object in
    the image, as a detector's do. The others lie anywhere. One object in 50 is a crowd.

    Args:
        task: "bbox" and "segm" have 80 classes, "keypoints" has persons alone.
        num_images: how many, >= 1.
        dets_per_image: detections in each, all with different scores.

    Returns:
        a COCO annotation file as a dict, and detections in COCO's result format with what ``task`` needs.
    """
    rng = np.random.default_rng((0, num_images, dets_per_image))
    classes = 1 if task == "keypoints" else NUM_CLASSES
    annotations: Dicts = []
    results: Dicts = []
    for image_id in range(1, num_images + 1):
        boxes = _boxes(rng, OBJECTS)
        categories = rng.integers(1, classes + 1, OBJECTS)
        crowds = rng.random(OBJECTS) < 0.02
        for box, category, crowd in zip(boxes, categories.tolist(), crowds.tolist()):
            annotation = {
                "id": len(annotations) + 1,
                "image_id": image_id,
                "category_id": category,
                "bbox": box.tolist(),
                "area": float(box[2] * box[3] * 0.7),
                "iscrowd": int(crowd),
                "segmentation": _rle(box) if crowd else [_outline(box)],
            }
            if task == "keypoints":
                annotation |= {"keypoints": _points(rng, box, visible=True), "num_keypoints": NUM_KEYPOINTS}
            annotations.append(annotation)
        found = _boxes(rng, dets_per_image)
        labels = rng.integers(1, classes + 1, dets_per_image)
        near = dets_per_image // 3
        which = rng.integers(0, OBJECTS, dets_per_image)
        moved = boxes[which[:near]]
        found[:near] = moved + rng.normal(0, 0.06, (near, 4)) * moved[:, [2, 3, 2, 3]]
        scores = rng.random(dets_per_image)
        scores[near:] *= 0.5
        same = rng.random(dets_per_image) < 0.5
        same[:near] = True
        labels[same] = categories[which[same]]
        for box, label, score in zip(found, labels.tolist(), scores.tolist()):
            result: dict[str, Any] = {"image_id": image_id, "category_id": label, "score": score}
            if task == "bbox":
                result["bbox"] = box.tolist()
            elif task == "segm":
                result["segmentation"] = _rle(box)
            else:
                result["keypoints"] = _points(rng, box, visible=False)
            results.append(result)
    ground_truth = {
        "info": {},
        "images": [
            {"id": image_id, "width": WIDTH, "height": HEIGHT, "file_name": f"{image_id:012d}.jpg"}
            for image_id in range(1, num_images + 1)
        ],
        "annotations": annotations,
        "categories": [{"id": number, "name": f"class {number}"} for number in range(1, classes + 1)],
    }
    return ground_truth, results


def _boxes(rng: np.random.Generator, count: int) -> np.ndarray:
    """(count, 4) x, y, width, height, inside the image; sides from 8 to 320 pixels, uniform in their logarithm."""
    sides = np.exp(rng.uniform(np.log(8), np.log(320), (count, 2)))
    corner = rng.random((count, 2)) * ([WIDTH, HEIGHT] - sides)
    return np.concatenate([corner, sides], axis=1)


_ANGLES = np.linspace(0, 2 * np.pi, CORNERS, endpoint=False)
_CIRCLE = np.stack([np.cos(_ANGLES), np.sin(_ANGLES)], axis=1) / 2 + 0.5


def _outline(box: np.ndarray) -> list[float]:
    """An ellipse in ``box`` as a polygon."""
    return (box[:2] + _CIRCLE * box[2:]).round(2).reshape(-1).tolist()  # type: ignore[no-any-return]


def _rle(box: np.ndarray) -> dict[str, Any]:
    (rle,) = coco_mask.frPyObjects([_outline(box)], HEIGHT, WIDTH)
    return {"size": rle["size"], "counts": rle["counts"].decode()}


def _points(rng: np.random.Generator, box: np.ndarray, visible: bool) -> list[float]:
    """Keypoints on a grid in ``box``, shaken: with visibility 2, or with scores."""
    place = np.arange(NUM_KEYPOINTS)
    grid = np.stack([place % 4, place // 4], axis=1) / 4
    points = box[:2] + grid * box[2:] + rng.normal(0, 0.03, grid.shape) * box[2:]
    last = np.full(NUM_KEYPOINTS, 2.0) if visible else rng.random(NUM_KEYPOINTS)
    return np.concatenate([points.round(1), last[:, None]], axis=1).reshape(-1).tolist()  # type: ignore[no-any-return]
