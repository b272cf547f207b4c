"""What is in view in a picture, as COCO's annotations."""

from __future__ import annotations

from typing import Any

import numpy as np
from pycocotools import mask as mask_utils

from zenith_det import opencv as cv2
from zenith_det.data.metadata import COCO_KEYPOINT_NAMES
from zenith_det.data.synthetic.scene import MIN_VISIBLE_PIXELS, magnified, overlap, stack
from zenith_det.data.synthetic.sprites import SUPERSAMPLE, ByteArray, Sprite


def _to_image(fine: ByteArray, rows: slice, columns: slice, height: int, width: int) -> ByteArray:
    """The whole image's 0/1 mask from a supersampled crop's: a pixel counts when half of it is covered."""
    mask = np.zeros((height, width), np.uint8)
    size = (columns.stop - columns.start, rows.stop - rows.start)
    mask[rows, columns] = cv2.resize(fine.astype(np.float32), size, interpolation=cv2.INTER_AREA) >= 0.5
    return mask


def _polygons(fine: ByteArray, left: int, top: int) -> list[list[float]] | None:
    """Outlines of a supersampled crop in image coordinates; None when they don't say it (holes, crumbs)."""
    contours, hierarchy = cv2.findContours(np.ascontiguousarray(fine), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    polygons = []
    for contour, links in zip(contours, hierarchy[0] if len(contours) else [], strict=True):
        area = cv2.contourArea(contour) / SUPERSAMPLE**2
        if links[3] >= 0:
            if area > 3:
                return None
            continue
        simple = cv2.approxPolyDP(contour, 0.3 * SUPERSAMPLE, True)[:, 0]
        if area < 3 or len(simple) < 3:
            continue
        points = (simple + 0.5) / SUPERSAMPLE + np.array([left, top])
        polygons.append([round(float(v), 2) for v in points.ravel()])
    return polygons or None


def _uncompressed(mask: ByteArray) -> dict[str, Any]:
    """COCO's uncompressed run-length form: run lengths down the columns, the first of zeros."""
    flat = np.concatenate([[0], mask.T.ravel(), [0]]).astype(np.int8)
    edges = np.flatnonzero(np.diff(flat))
    counts = np.diff(np.concatenate([[0], edges, [mask.size]])).tolist()
    if counts[-1] == 0:
        counts.pop()
    return {"size": [mask.shape[0], mask.shape[1]], "counts": counts}


def annotate(
    rng: np.random.Generator, sprites: list[Sprite], task: str, height: int, width: int
) -> list[dict[str, Any]]:
    labels = stack(sprites, height, width)
    annotations: list[dict[str, Any]] = []

    def add(sprite: Sprite, segmentation: Any, rle: Any) -> dict[str, Any]:
        annotation = {
            "category_id": sprite.category + 1,
            "iscrowd": int(sprite.crowd >= 0),
            "bbox": [float(v) for v in mask_utils.toBbox(rle)],
            "area": float(mask_utils.area(rle)),
            "segmentation": segmentation,
        }
        if task == "keypoints":
            annotation["keypoints"] = [0] * (3 * len(COCO_KEYPOINT_NAMES))
            annotation["num_keypoints"] = 0
        annotations.append(annotation)
        return annotation

    for index, sprite in enumerate(sprites):
        if sprite.category < 0 or sprite.crowd >= 0:
            continue
        rows, columns, _, _ = overlap(sprite, height, width)
        fine = (labels[magnified(rows), magnified(columns)] == index + 1).astype(np.uint8)
        polygons = _polygons(fine, columns.start, rows.start)
        if rng.random() < 0.15:
            polygons = None
        if polygons is None:
            rle = mask_utils.encode(np.asfortranarray(_to_image(fine, rows, columns, height, width)))
            annotation = add(sprite, {"size": rle["size"], "counts": rle["counts"].decode("ascii")}, rle)
        else:
            # Area and box are those of the polygons as COCO draws them, so that they agree to the pixel.
            rle = mask_utils.merge(mask_utils.frPyObjects(polygons, height, width))
            annotation = add(sprite, polygons, rle)
        if sprite.joints is not None:
            keypoints: list[int] = []
            for (x, y), seen in zip(sprite.joints, sprite.seen, strict=True):
                if not (0 <= x < width and 0 <= y < height):
                    keypoints += [0, 0, 0]
                    continue
                in_view = labels[int(y * SUPERSAMPLE), int(x * SUPERSAMPLE)] == index + 1
                keypoints += [int(x), int(y), 2 if seen and in_view else 1]
            annotation["keypoints"] = keypoints
            annotation["num_keypoints"] = sum(v > 0 for v in keypoints[2::3])

    members = [index for index, sprite in enumerate(sprites) if sprite.crowd >= 0]
    if members:
        whole = slice(0, height), slice(0, width)
        mask = _to_image(np.isin(labels, np.array(members) + 1).astype(np.uint8), *whole, height, width)
        if mask.sum() >= MIN_VISIBLE_PIXELS:
            add(sprites[members[0]], _uncompressed(mask), mask_utils.encode(np.asfortranarray(mask)))
    return annotations
