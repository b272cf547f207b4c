"""Keypoints between image coordinates and the heatmaps that a keypoint head predicts."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def keypoints_to_heatmap(keypoints: Tensor, boxes: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """The heatmap cell of each keypoint within its box.

    A cell ``d`` covers the continuous coordinates ``[d, d + 1)``; a point on the right or bottom edge
    of the box belongs to the last cell (Detectron2, ``structures/keypoints.py``).

    Args:
        keypoints: ``(M, K, 3)``: x, y, visibility.
        boxes: ``(M, 4)``, xyxy pixels.
        side: cells along one side of the heatmap.

    Returns:
        Flat cell indices ``(M, K)`` (0 where not valid) and whether the point is labelled and inside.
    """
    origin, far = boxes[:, None, :2], boxes[:, None, 2:]
    points = keypoints[..., :2]
    cells = ((points - origin) * (side / (far - origin))).floor().long()
    cells = torch.where(points == far, side - 1, cells)
    inside = ((cells >= 0) & (cells < side)).all(dim=-1)
    valid = inside & (keypoints[..., 2] > 0)
    return (cells[..., 1] * side + cells[..., 0]) * valid, valid


def heatmaps_to_keypoints(heatmaps: Tensor, boxes: Tensor) -> Tensor:
    """The best location of each keypoint, searched at the resolution of the image.

    Args:
        heatmaps: logits ``(N, K, S, S)``.
        boxes: ``(N, 4)``, xyxy pixels.

    Returns:
        ``(N, K, 3)``: x, y and a score. As in Detectron2, the score is the softmax peak of the upscaled map,
        normalized over the heatmap's own cells, so that it compares between boxes of any size.
    """
    result = heatmaps.new_zeros((len(heatmaps), heatmaps.shape[1], 3))
    sides = (boxes[:, 2:] - boxes[:, :2]).clamp(min=1)
    whole = sides.ceil()
    correction = sides / whole
    for i, (width, height) in enumerate(whole.int().tolist()):
        resized = F.interpolate(heatmaps[i : i + 1], (height, width), mode="bicubic", align_corners=False)[0]
        peak, position = resized.flatten(1).max(dim=1)
        partition = (heatmaps[i] - peak[:, None, None]).exp().sum(dim=(1, 2))
        cell = torch.stack((position % width, position // width), dim=1)
        result[i, :, :2] = (cell + 0.5) * correction[i] + boxes[i, :2]
        result[i, :, 2] = 1.0 / partition
    return result
