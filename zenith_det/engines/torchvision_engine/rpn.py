"""The region proposal network: torchvision's, with Detectron2's anchors, selection and losses."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

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
from zenith_det.engines.torchvision_engine.drawing import Candidates, Late, to_device

#: Sizes of feature maps whose anchors are kept; a size of 800 x 1333 pixels takes 4 MB.
MOST_KEPT = 8
#: Coordinates beyond which torchvision's ``batched_nms`` goes level by level on a CPU; the rounding is another.
MOST_AT_ONCE = 4000


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
        self._kept: dict[Any, Tensor] = {}

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
        sizes = tuple(tuple(feature.shape[-2:]) for feature in feature_maps)
        return [self._of_sizes(sizes, feature_maps[0].device)] * len(image_list.image_sizes)

    def _of_sizes(self, sizes: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
        key = (sizes, device)
        if key not in self._kept:
            if len(self._kept) >= MOST_KEPT:
                del self._kept[next(iter(self._kept))]
            # Kept for training, too, where an evaluation asked for them first.
            with torch.inference_mode(False):
                self._kept[key] = self._made(sizes, device)
        return self._kept[key]

    def _made(self, sizes: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
        self.set_cell_anchors(torch.float32, device)
        levels = []
        for cell, (height, width), stride in zip(self.cell_anchors, sizes, self.level_strides):
            start = self.offset * stride
            ys = torch.arange(start, height * stride, stride, dtype=torch.float32, device=device)
            xs = torch.arange(start, width * stride, stride, dtype=torch.float32, device=device)
            y, x = torch.meshgrid(ys, xs, indexing="ij")
            shifts = torch.stack((x, y, x, y), dim=-1).reshape(-1, 1, 4)
            levels.append((shifts + cell).reshape(-1, 4))
        return torch.cat(levels)


@dataclass(frozen=True)
class Predictions:
    """What the network says of a batch's anchors, those of all levels one after another.

    Attributes:
        logits: of objectness, ``(N, A)``.
        deltas: ``(N, A, 4)``.
        anchors: the same in all images, ``(A, 4)``.
        counts: of anchors on each level.
    """

    logits: Tensor
    deltas: Tensor
    anchors: Tensor
    counts: list[int]


@dataclass(frozen=True)
class Labelled:
    """Anchors matched to objects.

    Attributes:
        matched: for each anchor of each image the object with the best IoU, counted through all images, ``(N · A,)``.
        candidates: of which the losses look at some.
    """

    matched: Tensor
    candidates: Candidates


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

    def predict(
        self, images: Tensor, image_sizes: list[tuple[int, int]], features: dict[str, Tensor]
    ) -> Predictions:
        """What the network says of a batch ``(N, 3, H, W)``, whose images have these heights and widths."""
        maps = [features[name] for name in self.in_features]
        logits_per_level, deltas_per_level = self.head(maps)
        return Predictions(
            torch.cat([x.permute(0, 2, 3, 1).flatten(1) for x in logits_per_level], dim=1),
            torch.cat([_boxes_last(x) for x in deltas_per_level], dim=1),
            self.anchor_generator(ImageList(images, image_sizes), maps)[0],
            [level[0].numel() for level in logits_per_level],
        )

    @torch.no_grad()
    def propose(self, predicted: Predictions, image_sizes: list[tuple[int, int]]) -> list[Tensor]:
        """Top-k per level, decode, clip, drop empty boxes, NMS per level, top-k over all levels.

        On a GPU the host waits once for each image: NMS alone knows how many boxes it has left.

        Returns:
            Per image ``(P_i, 4)``, best first.
        """
        device = predicted.logits.device
        best_of_levels, offset = [], 0
        for level in predicted.logits.split(predicted.counts, dim=1):
            values, index = level.topk(min(self.pre_nms_top_n(), level.shape[1]), dim=1)
            best_of_levels.append((values, index + offset))
            offset += level.shape[1]
        scores, chosen = (torch.cat(parts, dim=1) for parts in zip(*best_of_levels))
        deltas = predicted.deltas.gather(1, chosen[..., None].expand(-1, -1, 4))
        boxes = self.box_coder.decode_single(
            deltas.float().flatten(0, 1), predicted.anchors[chosen].flatten(0, 1)
        ).view(deltas.shape)
        scores = scores.float()

        finite = torch.isfinite(boxes).all(dim=-1) & torch.isfinite(scores)
        limits = torch.tensor([[[width, height] * 2] for height, width in image_sizes], dtype=boxes.dtype)
        boxes = boxes.clamp(min=0).minimum(to_device(limits, device))
        valid = finite & (boxes[..., 2:] - boxes[..., :2] > self.min_size).all(dim=-1)
        # To leave out what isn't valid here, the host would have to know how many there are.
        boxes = torch.where(valid[..., None], boxes, 0.0)
        scores = torch.where(valid, scores, -math.inf)
        levels = torch.cat([boxes.new_full((v.shape[1],), i) for i, (v, _) in enumerate(best_of_levels)])
        best = best_after_nms(boxes, scores, levels, self.nms_thresh, self.post_nms_top_n())
        return [own[index] for own, index in zip(boxes, best)]

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

    @torch.no_grad()
    def label(self, anchors: Tensor, gt_boxes: list[Tensor]) -> Labelled:
        """Match the anchors ``(A, 4)`` of each image to its objects ``(G_i, 4)``."""
        matched, labels, before = [], [], 0
        for boxes in gt_boxes:
            index, label = self.match(anchors, boxes)
            matched.append(index + before)
            labels.append(label)
            before += len(boxes)
        return Labelled(torch.cat(matched), Candidates(torch.cat(labels), [len(anchors)] * len(gt_boxes)))

    def losses(self, predicted: Predictions, labelled: Labelled, gt_boxes: list[Tensor]) -> dict[str, Tensor]:
        """``loss_rpn_cls`` and ``loss_rpn_loc``, scalars; see Detectron2's ``RPN.losses``."""
        positive, negative = labelled.candidates.draw(self.batch_size_per_image, self.positive_share)
        normalizer = self.batch_size_per_image * len(gt_boxes)
        chosen = predicted.logits.flatten()[torch.cat((positive, negative))].float()
        is_positive = torch.zeros_like(chosen)
        is_positive[: len(positive)] = 1.0
        cls_loss = F.binary_cross_entropy_with_logits(chosen, is_positive, reduction="sum")
        box_loss = box_regression_loss(
            self.box_coder,
            predicted.anchors[positive % len(predicted.anchors)],
            predicted.deltas.flatten(0, 1)[positive],
            torch.cat(gt_boxes)[labelled.matched[positive]],
            self.loss_type,
            self.smooth_l1_beta,
        )
        return {
            "loss_rpn_cls": cls_loss * (self.cls_weight / normalizer),
            "loss_rpn_loc": box_loss * (self.box_weight / normalizer),
        }


def best_after_nms(
    boxes: Tensor, scores: Tensor, levels: Tensor, threshold: float, most: int
) -> list[Tensor]:
    """The first that ``torchvision.ops.batched_nms`` keeps of each image.

    Args:
        boxes: ``(N, K, 4)``, xyxy pixels within the image.
        scores: ``(N, K)``; -inf for boxes that don't count, which must be points.
        levels: ``(K,)``, from 0 on; boxes of other levels don't suppress each other.
        threshold: of two that overlap by more, the one with the lower score goes.
        most: how many of an image are wanted.

    Returns:
        Per image their indices, best first.
    """
    if boxes.device.type == "cpu":
        return [_best_after_nms(*own, levels, threshold, most) for own in zip(boxes, scores)]
    counted = Late((scores > -math.inf).sum(dim=1))
    # batched_nms takes a constant from the host on the way, for which a GPU is waited for.
    apart = boxes + (levels * (boxes.amax(dim=(1, 2)) + 1)[:, None])[..., None]
    kept = [box_ops.nms(*own, threshold) for own in zip(apart, scores)]
    # Points overlap nothing: they are all there, at the end.
    points = [scores.shape[1] - count for count in counted.tolist()]
    return [own[: len(own) - number][:most] for own, number in zip(kept, points)]


def _best_after_nms(boxes: Tensor, scores: Tensor, levels: Tensor, threshold: float, most: int) -> Tensor:
    order = scores.sort(descending=True, stable=True).indices[: int((scores > -math.inf).sum())]
    if 4 * len(order) <= MOST_AT_ONCE:
        return order[box_ops.batched_nms(boxes[order], scores[order], levels[order], threshold)[:most]]
    # The time goes with the square of their number. Those with lower scores have no say in what is kept before them.
    first = 2 * most
    while True:
        part = order[:first]
        of_levels = [part[levels[part] == level] for level in range(int(levels[-1]) + 1)]
        kept = torch.cat([index[box_ops.nms(boxes[index], scores[index], threshold)] for index in of_levels])
        if len(kept) >= most or first >= len(order):
            return kept[scores[kept].sort(descending=True, stable=True).indices[:most]]
        first *= 2


def _per_level(values: list[list[float]], levels: int) -> tuple[tuple[float, ...], ...]:
    per_level = [tuple(float(v) for v in level) for level in values]
    return tuple(per_level * levels if len(per_level) == 1 else per_level)


def _boxes_last(deltas: Tensor) -> Tensor:
    """``(N, 4 · A, H, W)`` to ``(N, H · W · A, 4)``."""
    n, _, height, width = deltas.shape
    return deltas.view(n, -1, 4, height, width).permute(0, 3, 4, 1, 2).flatten(1, 3)
