"""Whether an exported file finds what the model finds, on real images."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pycocotools.mask as coco_mask
import torch

from zenith_det.data import read_image
from zenith_det.engines.torchvision_engine.input_pipeline import shortest_edge_size
from zenith_det.engines.torchvision_engine.masks import paste_masks
from zenith_det.errors import UserError
from zenith_det.exporting.onnx_export import need
from zenith_det.predicting.prediction import Prediction
from zenith_det.predicting.predictor import Predictor

#: What counts as the same: boxes of this score and more, by IoU and by score.
LEAST_SCORE, LEAST_IOU, SCORE_TOLERANCE = 0.05, 0.99, 1e-3
#: Keypoints, in pixels of the network's input; a tie of two peaks may go either way.
KEYPOINT_TOLERANCE = 1.0
#: Pixels at the edge of a small mask that may fall either way.
MASK_PIXELS = 2


@dataclass
class Agreement:
    """What the comparison saw.

    Attributes:
        images: compared.
        boxes: compared, each both ways.
        iou: the lowest, of boxes.
        score: the largest difference.
        mask_iou: the lowest; 1 without masks.
        keypoint: the largest distance in pixels of the image, of keypoints that aren't a tie; 0 without keypoints.
    """

    images: int = 0
    boxes: int = 0
    iou: float = 1.0
    score: float = 0.0
    mask_iou: float = 1.0
    keypoint: float = 0.0

    def __str__(self) -> str:
        return (
            f"{self.boxes} boxes in {self.images} images: IoU {self.iou:.4f} or more, scores within {self.score:.1e}, "
            f"masks' IoU {self.mask_iou:.4f} or more, keypoints within {self.keypoint:.2f} pixels"
        )


def check_agreement(content: bytes, predictor: Predictor, images: Iterable[Path]) -> Agreement:
    """Compare an exported file with its model, image by image, each in a batch with its mirror image.

    Args:
        content: of the file.
        predictor: of the model, with ``threshold=None``.
        images: to compare on.

    Raises:
        UserError: they differ by more than the constants above allow, or found nothing to compare.
        MissingLibraryError: onnxruntime isn't installed.
    """
    runtime = need("onnxruntime")
    session = runtime.InferenceSession(content, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    seen = Agreement()
    for path in images:
        bgr = read_image(path, value_range=predictor.cfg.INPUT.VALUE_RANGE)
        pair = [bgr, np.ascontiguousarray(bgr[:, ::-1])]
        given = np.stack(pair)
        if predictor.cfg.INPUT.FORMAT == "RGB":
            given = np.ascontiguousarray(given[..., ::-1])
        found = dict(zip(names, session.run(None, {"images": given})))
        for number, pixels in enumerate(pair):
            mine = found["image_index"] == number
            part = {name: values[mine] for name, values in found.items()}
            where = f"{path}{' (mirrored)' if number else ''}"
            _compare(where, predictor(pixels), part, predictor, seen)
        seen.images += 1
    if not seen.boxes:
        raise UserError(
            f"the model finds nothing with a score of {LEAST_SCORE} or more in {seen.images} images: give images of "
            "what it was trained on (--images)"
        )
    return seen


def _compare(
    where: str, torchs: Prediction, onnxs: Mapping[str, np.ndarray], predictor: Predictor, seen: Agreement
) -> None:
    boxes, scores, classes = onnxs["boxes"], onnxs["scores"], onnxs["classes"]
    iou = _box_iou(torchs.boxes, boxes)
    apart = np.abs(torchs.scores[:, None] - scores)
    fits = (torchs.classes[:, None] == classes) & (apart <= SCORE_TOLERANCE)
    overlap = np.where(fits, iou, 0.0)
    for side, own, other, best in (
        ("PyTorch", torchs.scores, scores, overlap.max(1, initial=0)),
        ("ONNX", scores, torchs.scores, overlap.max(0, initial=0)),
    ):
        compared = own >= _least(predictor, other)
        if bad := np.flatnonzero(compared & (best < LEAST_IOU)).tolist():
            raise UserError(
                f"the exported file isn't kept: in {where}, {side}'s object {bad[0]} (score {own[bad[0]]:.4f}) has no "
                f"counterpart of its class with IoU {LEAST_IOU} and a score within {SCORE_TOLERANCE} "
                f"(best IoU {best[bad[0]]:.4f})"
            )
        if compared.any():
            seen.iou = min(seen.iou, float(best[compared].min()))
    for index in np.flatnonzero(torchs.scores >= _least(predictor, scores)).tolist():
        partner = int(overlap[index].argmax())
        seen.boxes += 1
        seen.score = max(seen.score, float(apart[index, partner]))
        one = {name: values[partner : partner + 1] for name, values in onnxs.items()}
        if torchs.masks is not None:
            _compare_masks(where, index, torchs.masks[index], one, seen)
        if torchs.keypoints is not None:
            _compare_keypoints(where, index, torchs, one["keypoints"][0], predictor, seen)


def _box_iou(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Of all pairs of boxes, xyxy."""
    sides = [
        np.hstack((boxes[:, :2], boxes[:, 2:] - boxes[:, :2])).astype(np.float64) for boxes in (first, second)
    ]
    iou = coco_mask.iou(*sides, [0] * len(second))
    return np.asarray(iou, dtype=np.float64).reshape(len(first), len(second))


def _least(predictor: Predictor, others: np.ndarray) -> float:
    """The lowest score for which a counterpart must be there: not just below a threshold, not cut off by number."""
    cfg = predictor.cfg
    least = max(LEAST_SCORE, cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST + SCORE_TOLERANCE)
    if len(others) >= cfg.TEST.DETECTIONS_PER_IMAGE:
        least = max(least, float(others.min()) + SCORE_TOLERANCE)
    return least


def _compare_masks(
    where: str, index: int, expected: np.ndarray, one: Mapping[str, np.ndarray], seen: Agreement
) -> None:
    height, width = expected.shape
    pasted = paste_masks(torch.from_numpy(one["masks"]), torch.from_numpy(one["boxes"]), height, width)[
        0
    ].numpy()
    different, union = int((expected != pasted).sum()), int((expected | pasted).sum())
    iou = 1 - different / max(union, 1)
    if iou < LEAST_IOU and different > MASK_PIXELS:
        raise UserError(
            f"the exported file isn't kept: in {where}, the mask of object {index} has IoU {iou:.4f} with PyTorch's"
        )
    seen.mask_iou = min(seen.mask_iou, iou)


def _compare_keypoints(
    where: str, index: int, torchs: Prediction, found: np.ndarray, predictor: Predictor, seen: Agreement
) -> None:
    assert torchs.keypoints is not None
    expected = torchs.keypoints[index]
    cfg = predictor.cfg
    height, _ = shortest_edge_size(*torchs.size, cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST)
    zoom = torchs.size[0] / height
    distance = np.linalg.norm(expected[:, :2] - found[:, :2], axis=1)
    same = distance <= KEYPOINT_TOLERANCE * max(zoom, 1)
    # The score falls with the height of the peak: of two that are equally high either may be taken.
    tie = np.abs(expected[:, 2] - found[:, 2]) <= SCORE_TOLERANCE * np.maximum(expected[:, 2], found[:, 2])
    if bad := np.flatnonzero(~(same | tie)).tolist():
        raise UserError(
            f"the exported file isn't kept: in {where}, keypoint {bad[0]} of object {index} is "
            f"{distance[bad[0]]:.1f} pixels from PyTorch's"
        )
    if same.any():
        seen.keypoint = max(seen.keypoint, float(distance[same].max()))
