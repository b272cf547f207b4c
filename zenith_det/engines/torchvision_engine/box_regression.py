"""Box regression losses that the RPN and the box head share."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import complete_box_iou_loss, distance_box_iou_loss, generalized_box_iou_loss

IOU_LOSSES = {
    "giou": generalized_box_iou_loss,
    "diou": distance_box_iou_loss,
    "ciou": complete_box_iou_loss,
}
LOSS_TYPES = ("smooth_l1", *IOU_LOSSES)


def box_regression_loss(
    coder: BoxCoder, sources: Tensor, deltas: Tensor, targets: Tensor, kind: str, beta: float
) -> Tensor:
    """The summed regression loss of matched pairs.

    Args:
        coder: encodes boxes as deltas, with its weights.
        sources: anchors or proposals ``(M, 4)``, xyxy pixels.
        deltas: predicted for them, ``(M, 4)``.
        targets: ground truth, ``(M, 4)``, xyxy pixels.
        kind: one of :data:`LOSS_TYPES`.
        beta: where smooth-L1 turns from quadratic to linear; 0 is plain L1.

    Returns:
        A scalar; 0 (with a gradient path) for ``M = 0``.
    """
    if deltas.shape[0] == 0:
        return deltas.sum() * 0.0
    if kind == "smooth_l1":
        encoded = coder.encode_single(targets, sources)
        return F.smooth_l1_loss(deltas.float(), encoded, beta=beta, reduction="sum")
    decoded = coder.decode_single(deltas.float(), sources)
    loss: Tensor = IOU_LOSSES[kind](decoded, targets, reduction="sum")
    return loss
