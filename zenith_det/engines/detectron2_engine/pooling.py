"""Detectron2's RoIAlign under bfloat16."""

from __future__ import annotations

from detectron2.layers import ROIAlign
from torch import Tensor, nn

__all__ = ["pool_at_exact_boxes"]


class _ExactROIAlign(ROIAlign):  # type: ignore[misc]
    def forward(self, input: Tensor, rois: Tensor) -> Tensor:
        pooled: Tensor = super().forward(input.float(), rois)
        return pooled.to(input.dtype)


def pool_at_exact_boxes(model: nn.Module) -> None:
    """Let the RoIAligns of ``model`` take boxes as they are, not in the features' type.

    bfloat16 has 8 significant bits: at 1024 pixels boxes would lie on a grid of 8, beside masks and keypoints
    cut out at the exact ones. Under autocast the features are pooled in float32 anyway.
    """
    for module in model.modules():
        if type(module) is ROIAlign:
            module.__class__ = _ExactROIAlign
