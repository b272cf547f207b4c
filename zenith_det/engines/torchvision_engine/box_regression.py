"""Box regression losses that the RPN and the box head share."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.models import detection
from torchvision.models.detection._utils import encode_boxes
from torchvision.ops import complete_box_iou_loss, distance_box_iou_loss, generalized_box_iou_loss

IOU_LOSSES = {
    "giou": generalized_box_iou_loss,
    "diou": distance_box_iou_loss,
    "ciou": complete_box_iou_loss,
}
LOSS_TYPES = ("smooth_l1", *IOU_LOSSES)


class BoxCoder(detection._utils.BoxCoder):
    """torchvision's, whose numbers don't come to the device one by one in each step: the host would wait each time."""

    def encode_single(self, reference_boxes: Tensor, proposals: Tensor) -> Tensor:
        """The deltas ``(M, 4)`` from ``proposals`` to ``reference_boxes``, both xyxy ``(M, 4)``."""
        return encode_boxes(reference_boxes, proposals, self.weights)  # type: ignore[no-any-return,arg-type]

    def decode_single(self, rel_codes: Tensor, boxes: Tensor) -> Tensor:
        """The boxes ``(M, 4 · K)`` that deltas ``(M, 4 · K)`` make of xyxy ``boxes`` ``(M, 4)``."""
        corner = boxes[:, :2].to(rel_codes.dtype)[:, None]
        sides = boxes[:, 2:].to(rel_codes.dtype)[:, None] - corner
        centre = corner + 0.5 * sides
        wx, wy, ww, wh = self.weights
        dx, dy, dw, dh = rel_codes.unflatten(1, (-1, 4)).unbind(dim=-1)
        centres = torch.stack((dx / wx, dy / wy), dim=-1) * sides + centre
        scale = torch.stack((dw / ww, dh / wh), dim=-1).clamp(max=self.bbox_xform_clip).exp()
        half = 0.5 * (scale * sides)
        return torch.cat((centres - half, centres + half), dim=-1).flatten(1)


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
