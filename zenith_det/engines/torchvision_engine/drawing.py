"""Random examples of a stage's candidates, and what else can be had without waiting for the device at each of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import boxes as box_ops


@torch.no_grad()
def draw_examples(labels: Sequence[Tensor], count: int, positive_share: float) -> list[tuple[Tensor, Tensor]]:
    """As many examples of each image as a loss looks at: Detectron2's ``subsample_labels``.

    The host waits for the device once, to hear how many there are of each kind in all images.

    Args:
        labels: per image ``(A,)``, 1 for positive and 0 for negative candidates; others are never drawn.
        count: of examples an image.
        positive_share: of them that are positive at most; negative ones take the place of missing positive ones.

    Returns:
        Per image the indices of positive and of negative examples, in random order.
    """
    ranks = [[(label == kind).cumsum(0) for kind in (1, 0)] for label in labels]
    # An image may have no candidate at all.
    totals = torch.stack(
        [rank[-1] if len(rank) else rank.sum() for image in ranks for rank in image]
    ).tolist()
    drawn = []
    for image, positive, negative in zip(ranks, totals[::2], totals[1::2]):
        positives = min(positive, int(count * positive_share))
        negatives = min(negative, count - positives)
        device = image[0].device
        first, second = (
            # The n-th of a kind is where its count reaches n.
            torch.searchsorted(rank, torch.randperm(total, device=device)[:wanted] + 1)
            for rank, total, wanted in zip(image, (positive, negative), (positives, negatives))
        )
        drawn.append((first, second))
    return drawn


def first_true(masks: Sequence[Tensor]) -> list[Tensor]:
    """The indices where each mask ``(A,)`` holds, ascending, for one wait in all."""
    totals = torch.stack([mask.sum() for mask in masks]).tolist()
    return [
        torch.searchsorted(mask.cumsum(0), torch.arange(1, total + 1, device=mask.device))
        for mask, total in zip(masks, totals)
    ]


def nms_by_kind(boxes: Tensor, scores: Tensor, kinds: Tensor, threshold: float) -> Tensor:
    """torchvision's ``batched_nms``, which takes a constant from the host on the way, for which a GPU is waited for.

    Args:
        boxes: xyxy ``(N, 4)``; scores, kinds: ``(N,)``. Boxes of different kinds don't suppress each other.
    """
    if boxes.device.type == "cpu" or len(boxes) == 0:
        return box_ops.batched_nms(boxes, scores, kinds, threshold)
    return box_ops.nms(boxes + (kinds.to(boxes) * (boxes.max() + 1))[:, None], scores, threshold)


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """``values`` on ``device``; the host doesn't wait for the copy."""
    return values if values.device.type == device.type else values.pin_memory().to(device, non_blocking=True)
