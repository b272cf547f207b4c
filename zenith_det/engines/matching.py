"""Matching anchors with objects where all pairs at once don't fit into memory."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["MOST_PAIRS", "match_in_parts"]

#: Of objects and anchors, that are compared at once: matching holds some seven numbers for each.
MOST_PAIRS = 2**25


@torch.no_grad()
def match_in_parts(
    boxes: Tensor,
    anchors: Tensor,
    iou: Callable[[Tensor, Tensor], Tensor],
    low: float,
    high: float,
    *,
    keep_best: bool,
    most_pairs: int,
) -> tuple[Tensor, Tensor]:
    """What torchvision's and Detectron2's matchers find, with a part of the anchors at a time.

    Args:
        boxes: of objects ``(G, 4)``, ``G`` at least 1.
        anchors: ``(A, 4)``.
        iou: of ``(G, 4)`` and ``(B, 4)`` boxes, ``(G, B)``; a pair's doesn't depend on the others.
        low, high: an anchor whose best IoU is below ``low`` is background, from ``high`` on an object, and between
            them neither.
        keep_best: an anchor that no other overlaps an object more than is that object's, too, however low its IoU.
        most_pairs: at once.

    Returns:
        The object with each anchor's best IoU, int64 ``(A,)``; and 1, 0 or -1 for object, background and neither,
        int8 ``(A,)``.
    """
    parts = anchors.split(max(1, most_pairs // len(boxes)))
    matched, labels = [], []
    best_of_each = boxes.new_full((len(boxes),), -1.0)
    for part in parts:
        quality = iou(boxes, part)
        best, index = quality.max(dim=0)
        matched.append(index)
        label = torch.full_like(index, -1, dtype=torch.int8)
        label[best < low] = 0
        label[best >= high] = 1
        labels.append(label)
        best_of_each = torch.maximum(best_of_each, quality.max(dim=1).values)
    if keep_best:
        for part, label in zip(parts, labels):
            quality = quality if len(parts) == 1 else iou(boxes, part)
            label[(quality == best_of_each[:, None]).any(dim=0)] = 1
    return torch.cat(matched), torch.cat(labels)
