"""Box regression losses that the RPN and the box head share."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.models import detection
from torchvision.ops import complete_box_iou_loss, distance_box_iou_loss, generalized_box_iou_loss

from zenith_det.engines.torchvision_engine.drawing import to_device

IOU_LOSSES = {
    "giou": generalized_box_iou_loss,
    "diou": distance_box_iou_loss,
    "ciou": complete_box_iou_loss,
}
LOSS_TYPES = ("smooth_l1", *IOU_LOSSES)


class BoxCoder(detection._utils.BoxCoder):
    """torchvision's, whose numbers don't come to the device one by one in each step: the host would wait each time."""

    def __init__(self, weights: tuple[float, float, float, float]) -> None:
        super().__init__(weights)
        self._weights_on: dict[torch.device, Tensor] = {}

    def encode_single(self, reference_boxes: Tensor, proposals: Tensor) -> Tensor:
        """The deltas ``(M, 4)`` from ``proposals`` to ``reference_boxes``, both xyxy ``(M, 4)``."""
        (centre, sides), (wanted, wanted_sides) = map(_centre_and_sides, (proposals, reference_boxes))
        device = proposals.device
        if device not in self._weights_on:
            self._weights_on[device] = to_device(torch.tensor(self.weights), device)
        weights = self._weights_on[device].to(proposals.dtype)
        shift = weights[:2] * (wanted - centre) / sides
        return torch.cat((shift, weights[2:] * (wanted_sides / sides).log()), dim=1)

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


def _centre_and_sides(boxes: Tensor) -> tuple[Tensor, Tensor]:
    sides = boxes[:, 2:] - boxes[:, :2]
    return boxes[:, :2] + 0.5 * sides, sides


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
