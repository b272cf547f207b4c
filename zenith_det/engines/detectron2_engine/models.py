"""What Detectron2's models need for configurations and data that the built-in engine trains, too."""

from __future__ import annotations

from typing import Any

import torch
from detectron2.layers import ROIAlign
from detectron2.modeling.backbone.fpn import FPN, LastLevelMaxPool
from detectron2.modeling.proposal_generator.rpn import RPN
from detectron2.structures import Boxes, pairwise_iou
from torch import Tensor, nn

from zenith_det.engines.matching import MOST_PAIRS, match_in_parts
from zenith_det.engines.model_format import use_channels_last

#: Field of training instances, bool ``(N,)``: whether the mask is the object's own, and not its box in place of one.
HAS_MASK = "gt_has_mask"


def as_the_built_in_engine(model: nn.Module) -> None:
    """Let a model of Detectron2's train all that the built-in engine's trains, within its memory."""
    connect_top_level(model)
    match_in_bounded_memory(model)
    skip_missing_masks(model)


def compute_as_configured(cfg: Any, model: nn.Module) -> None:
    """What ``MODEL.CHANNELS_LAST`` and ``SOLVER.AMP.DTYPE`` ask of a model of any project's.

    Raises:
        ConfigError: see :func:`~zenith_det.engines.model_format.use_channels_last`.
    """
    use_channels_last(cfg, model)
    if cfg.SOLVER.AMP.ENABLED and cfg.SOLVER.AMP.DTYPE == "bfloat16":
        pool_at_exact_boxes(model)


def connect_top_level(model: nn.Module) -> None:
    """Let an FPN's extra level follow its coarsest one, whatever that is called.

    Detectron2 pools it from a level named "p5", and so fails on a backbone without its last stage
    (``MODEL.RESNETS.OUT_FEATURES`` up to "res4"), which the built-in engine trains. Of no effect on others.
    """
    for module in model.modules():
        if isinstance(module, FPN) and isinstance(module.top_block, LastLevelMaxPool):
            module.top_block.in_feature = module._out_features[-1 - module.top_block.num_levels]


def skip_missing_masks(model: nn.Module) -> None:
    """Let mask heads learn from the objects that have a mask alone; boxes are learned from all.

    Detectron2 wants a mask of each object. ``CocoMapper`` gives those without one a stand-in and marks them; here
    they are taken out of what a mask head is given. Again is of no effect.
    """
    for module in model.modules():
        head = getattr(module, "mask_head", None)
        if isinstance(head, nn.Module) and _with_masks not in head._forward_pre_hooks.values():
            head.register_forward_pre_hook(_with_masks)


def _with_masks(head: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
    features, instances = inputs
    if not head.training or not any(each.has(HAS_MASK) for each in instances):
        return None
    keep = [
        each.get(HAS_MASK) if each.has(HAS_MASK) else each.gt_classes.new_ones(len(each), dtype=torch.bool)
        for each in instances
    ]
    if isinstance(features, torch.Tensor):  # of all objects, one after the other; others are of whole images
        features = features[torch.cat(keep)]
    return features, [each[kept] for each, kept in zip(instances, keep, strict=True)]


def match_in_bounded_memory(model: nn.Module) -> None:
    """Let an RPN compare anchors in parts with the objects of an image that has too many of them.

    Detectron2 makes do on the host where a GPU has no room; 2,000 objects want 14 GB there.
    """
    for module in model.modules():
        if type(module) is RPN:
            module.__class__ = _BoundedRPN


class _BoundedRPN(RPN):  # type: ignore[misc]
    @torch.no_grad()
    def label_and_sample_anchors(
        self, anchors: list[Boxes], gt_instances: list[Any]
    ) -> tuple[list[Tensor], list[Tensor]]:
        count = sum(len(level) for level in anchors)
        labels: list[Tensor] = []
        matched: list[Tensor] = []
        for image in gt_instances:
            if len(image) * count <= MOST_PAIRS or list(self.anchor_matcher.labels) != [0, -1, 1]:
                label, match = super().label_and_sample_anchors(anchors, [image])
                labels += label
                matched += match
                continue
            everywhere = Boxes.cat(anchors)
            boxes = image.gt_boxes.tensor
            _, low, high, _ = self.anchor_matcher.thresholds
            index, kind = match_in_parts(
                boxes, everywhere.tensor, _iou, low, high,
                keep_best=self.anchor_matcher.allow_low_quality_matches, most_pairs=MOST_PAIRS,
            )  # fmt: skip
            if self.anchor_boundary_thresh >= 0:
                kind[~everywhere.inside_box(image.image_size, self.anchor_boundary_thresh)] = -1
            labels.append(self._subsample_labels(kind))
            matched.append(boxes[index])
        return labels, matched


def _iou(boxes: Tensor, anchors: Tensor) -> Tensor:
    iou: Tensor = pairwise_iou(Boxes(boxes), Boxes(anchors))
    return iou


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
