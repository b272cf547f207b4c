"""The region proposal network: torchvision's, with Detectron2's anchors, selection and losses."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import boxes as box_ops

from zenith_det.config import CfgNode
from zenith_det.engines.matching import MOST_PAIRS, match_in_parts
from zenith_det.engines.torchvision_engine.box_regression import BoxCoder, box_regression_loss
from zenith_det.engines.torchvision_engine.drawing import draw_examples, first_true, nms_by_kind


class UnroundedAnchors(AnchorGenerator):
    """Anchors with Detectron2's exact sides and strides.

    torchvision rounds the sides to whole pixels and derives the stride from the padded size of the
    image, which is wrong for ``p6`` where that size is no multiple of 64.

    Args:
        sizes: per level, the square roots of the anchors' areas, in pixels.
        aspect_ratios: per level, heights over widths.
        strides: per level, in pixels.
        offset: of the first anchor's centre, as a share of the stride.
    """

    def __init__(
        self,
        sizes: tuple[tuple[float, ...], ...],
        aspect_ratios: tuple[tuple[float, ...], ...],
        strides: list[int],
        offset: float = 0.0,
    ) -> None:
        super().__init__(sizes=sizes, aspect_ratios=aspect_ratios)
        self.level_strides = strides
        self.offset = offset

    def generate_anchors(  # type: ignore[override]
        self,
        scales: tuple[float, ...],
        aspect_ratios: tuple[float, ...],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """The anchors of one cell, ``(A, 4)``, centred on the origin; sizes outermost, as in Detectron2."""
        anchors = []
        for size in scales:
            for ratio in aspect_ratios:
                width = math.sqrt(size**2.0 / ratio)
                height = ratio * width
                anchors.append([-width / 2.0, -height / 2.0, width / 2.0, height / 2.0])
        return torch.tensor(anchors, dtype=dtype, device=device)

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        """Anchors of all levels, ``(sum of H_l · W_l · A_l, 4)``, once per image."""
        reference = feature_maps[0]
        self.set_cell_anchors(torch.float32, reference.device)
        assert self.cell_anchors is not None
        levels = []
        for cell, feature, stride in zip(self.cell_anchors, feature_maps, self.level_strides):
            height, width = feature.shape[-2:]
            start = self.offset * stride
            ys = torch.arange(start, height * stride, stride, dtype=torch.float32, device=feature.device)
            xs = torch.arange(start, width * stride, stride, dtype=torch.float32, device=feature.device)
            y, x = torch.meshgrid(ys, xs, indexing="ij")
            shifts = torch.stack((x, y, x, y), dim=-1).reshape(-1, 1, 4)
            levels.append((shifts + cell).reshape(-1, 4))
        anchors = torch.cat(levels)
        return [anchors] * len(image_list.image_sizes)


class RPN(RegionProposalNetwork):
    """torchvision's RPN with Detectron2's rules where they differ.

    Proposals are ranked by logit (torchvision: by sigmoid, which ties once it saturates) and limited
    after NMS over all levels; both losses are sums divided by the number of anchors that *could* be
    sampled; the box loss is ``BBOX_REG_LOSS_TYPE`` with ``SMOOTH_L1_BETA``.

    Args:
        cfg: reads ``MODEL.RPN``, ``MODEL.ANCHOR_GENERATOR`` and ``MODEL.PROPOSAL_GENERATOR``.
        in_channels: of every feature map.
        strides: pixel stride of the feature maps by name.
    """

    def __init__(self, cfg: CfgNode, in_channels: int, strides: dict[str, int]) -> None:
        rpn = cfg.MODEL.RPN
        names = list(rpn.IN_FEATURES)
        sizes = _per_level(cfg.MODEL.ANCHOR_GENERATOR.SIZES, len(names))
        ratios = _per_level(cfg.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS, len(names))
        anchors = UnroundedAnchors(
            sizes, ratios, [strides[n] for n in names], cfg.MODEL.ANCHOR_GENERATOR.OFFSET
        )
        head = RPNHead(in_channels, anchors.num_anchors_per_location()[0], conv_depth=len(rpn.CONV_DIMS))
        super().__init__(
            anchors,
            head,
            fg_iou_thresh=rpn.IOU_THRESHOLDS[1],
            bg_iou_thresh=rpn.IOU_THRESHOLDS[0],
            batch_size_per_image=rpn.BATCH_SIZE_PER_IMAGE,
            positive_fraction=rpn.POSITIVE_FRACTION,
            pre_nms_top_n={"training": rpn.PRE_NMS_TOPK_TRAIN, "testing": rpn.PRE_NMS_TOPK_TEST},
            post_nms_top_n={"training": rpn.POST_NMS_TOPK_TRAIN, "testing": rpn.POST_NMS_TOPK_TEST},
            nms_thresh=rpn.NMS_THRESH,
        )
        self.in_features = names
        self.box_coder = BoxCoder(weights=tuple(rpn.BBOX_REG_WEIGHTS))
        self.batch_size_per_image = rpn.BATCH_SIZE_PER_IMAGE
        self.positive_share = rpn.POSITIVE_FRACTION
        self.min_size = float(cfg.MODEL.PROPOSAL_GENERATOR.MIN_SIZE)
        self.loss_type = rpn.BBOX_REG_LOSS_TYPE
        self.smooth_l1_beta = rpn.SMOOTH_L1_BETA
        self.cls_weight = rpn.LOSS_WEIGHT
        self.box_weight = rpn.LOSS_WEIGHT * rpn.BBOX_REG_LOSS_WEIGHT
        self._anchors: list[Tensor] = []

    def propose(
        self, images: Tensor, image_sizes: list[tuple[int, int]], features: dict[str, Tensor]
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Proposals and raw predictions for a batch.

        Returns:
            Per image ``(P_i, 4)`` proposals sorted by score; the objectness logits
            ``(N, anchors)`` and the box deltas ``(N, anchors, 4)`` of all levels as one-element-per-kind
            list ``[logits, deltas]`` for :meth:`losses`; the anchors, per image.
        """
        maps = [features[name] for name in self.in_features]
        logits_per_level, deltas_per_level = self.head(maps)
        anchors = self.anchor_generator(ImageList(images, image_sizes), maps)
        counts = [level[0].numel() for level in logits_per_level]
        logits = torch.cat([x.permute(0, 2, 3, 1).flatten(1) for x in logits_per_level], dim=1)
        deltas = torch.cat([_boxes_last(x) for x in deltas_per_level], dim=1)
        with torch.no_grad():
            decoded = self.box_coder.decode(deltas.float().reshape(-1, 4), anchors).view(
                len(image_sizes), -1, 4
            )
            proposals = self.select(decoded, logits.float(), image_sizes, counts)
        return proposals, [logits, deltas], anchors

    def select(
        self,
        boxes: Tensor,
        logits: Tensor,
        image_sizes: list[tuple[int, int]],
        counts: list[int],
    ) -> list[Tensor]:
        """Top-k per level, clip, drop empty boxes, NMS per level, top-k over all levels.

        Args:
            boxes: ``(N, anchors, 4)``; logits: ``(N, anchors)``; counts: anchors per level.

        Returns:
            Per image ``(P_i, 4)``, best first.
        """
        keep_per_level, offset = [], 0
        for level in logits.split(counts, dim=1):
            top = min(self.pre_nms_top_n(), level.shape[1])
            keep_per_level.append(level.topk(top, dim=1).indices + offset)
            offset += level.shape[1]
        keep = torch.cat(keep_per_level, dim=1)
        levels = torch.cat(
            [torch.full((k.shape[1],), i, device=boxes.device) for i, k in enumerate(keep_per_level)]
        )
        candidates, scores, valid = [], [], []
        for image_boxes, image_logits, image_keep, size in zip(boxes, logits, keep, image_sizes):
            own, score = image_boxes[image_keep], image_logits[image_keep]
            finite = torch.isfinite(own).all(dim=1) & torch.isfinite(score)
            own = box_ops.clip_boxes_to_image(own, size)
            sides = own[:, 2:] - own[:, :2]
            candidates.append(own)
            scores.append(score)
            valid.append(finite & (sides > self.min_size).all(dim=1))
        selected = []
        for own, score, index in zip(candidates, scores, first_true(valid)):
            if len(index) < len(own):
                own, score = own[index], score[index]
            best = nms_by_kind(own, score, levels[index], self.nms_thresh)
            selected.append(own[best[: self.post_nms_top_n()]])
        return selected

    def match(self, anchors: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """As torchvision's ``assign_targets_to_anchors``, for one image.

        Returns:
            The object with each anchor's best IoU, int64 ``(A,)``; and 1, 0 or -1 for object, background and neither.
        """
        if len(boxes) == 0:
            nothing = torch.zeros(len(anchors), dtype=torch.int64, device=anchors.device)
            return nothing, nothing
        matcher = self.proposal_matcher
        return match_in_parts(
            boxes, anchors, self.box_similarity, matcher.low_threshold, matcher.high_threshold,
            keep_best=matcher.allow_low_quality_matches, most_pairs=MOST_PAIRS,
        )  # fmt: skip

    def losses(self, raw: list[Tensor], anchors: list[Tensor], gt_boxes: list[Tensor]) -> dict[str, Tensor]:
        """``loss_rpn_cls`` and ``loss_rpn_loc``, scalars; see Detectron2's ``RPN.losses``."""
        logits, deltas = raw
        matched, labels = zip(*(self.match(own, boxes) for own, boxes in zip(anchors, gt_boxes)))
        drawn = draw_examples(labels, self.batch_size_per_image, self.positive_share)
        positive, negative = (
            torch.cat([pair[kind] + i * logits.shape[1] for i, pair in enumerate(drawn)]) for kind in (0, 1)
        )
        normalizer = self.batch_size_per_image * len(anchors)
        chosen = logits.flatten()[torch.cat((positive, negative))].float()
        is_positive = torch.zeros_like(chosen)
        is_positive[: len(positive)] = 1.0
        cls_loss = F.binary_cross_entropy_with_logits(chosen, is_positive, reduction="sum")
        box_loss = box_regression_loss(
            self.box_coder,
            torch.cat([own[pair[0]] for own, pair in zip(anchors, drawn)]),
            deltas.flatten(0, 1)[positive],
            torch.cat([boxes[index[pair[0]]] for boxes, index, pair in zip(gt_boxes, matched, drawn)]),
            self.loss_type,
            self.smooth_l1_beta,
        )
        return {
            "loss_rpn_cls": cls_loss * (self.cls_weight / normalizer),
            "loss_rpn_loc": box_loss * (self.box_weight / normalizer),
        }


def _per_level(values: list[list[float]], levels: int) -> tuple[tuple[float, ...], ...]:
    per_level = [tuple(float(v) for v in level) for level in values]
    return tuple(per_level * levels if len(per_level) == 1 else per_level)


def _boxes_last(deltas: Tensor) -> Tensor:
    """``(N, 4 · A, H, W)`` to ``(N, H · W · A, 4)``."""
    n, _, height, width = deltas.shape
    return deltas.view(n, -1, 4, height, width).permute(0, 3, 4, 1, 2).flatten(1, 3)
