"""The second stage: boxes, masks and keypoints of proposals, to Detectron2's recipe."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNHeads, KeypointRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import Conv2dNormActivation, roi_align
from torchvision.ops import boxes as box_ops

from zenith_det.config import CfgNode
from zenith_det.engines.torchvision_engine.backbone import norm_layer
from zenith_det.engines.torchvision_engine.box_regression import BoxCoder, box_regression_loss
from zenith_det.engines.torchvision_engine.drawing import Candidates, to_device
from zenith_det.engines.torchvision_engine.keypoints import heatmaps_to_keypoints, keypoints_to_heatmap
from zenith_det.engines.torchvision_engine.masks import Mask, crop_and_resize
from zenith_det.engines.torchvision_engine.training_pictures import TrainingPictures

CANONICAL_SIZE, CANONICAL_LEVEL = 224, 4
_IGNORED = -100


class Targets:
    """The ground truth of one image; in training boxes and classes are on the model's device.

    Attributes:
        boxes: ``(G, 4)``, xyxy pixels of the network's input.
        classes: int64 ``(G,)``, 0-based.
        masks: ``G`` masks (see :data:`~.masks.Mask`), or ``None`` for a set without masks.
        keypoints: ``(G, K, 3)``, or ``None``.
    """

    def __init__(
        self, boxes: Tensor, classes: Tensor, masks: list[Mask] | None = None, keypoints: Tensor | None = None
    ) -> None:
        self.boxes = boxes
        self.classes = classes
        self.masks = masks
        self.keypoints = keypoints

    def to(self, device: torch.device) -> Targets:
        """A copy with boxes and classes on ``device``; masks and keypoints stay where they are used, on the host."""
        return Targets(
            self.boxes.to(device, non_blocking=True),
            self.classes.to(device, non_blocking=True),
            self.masks,
            self.keypoints,
        )

    def __getstate__(self) -> dict[str, Any]:
        """All bitmaps as one tensor: from a loader's process each would come with a file descriptor of its own."""
        state = dict(vars(self))
        where = [i for i, mask in enumerate(self.masks or ()) if isinstance(mask, Tensor)]
        if where:
            masks: list[Any] = list(self.masks or ())
            stacked = torch.stack([masks[i] for i in where])
            state["masks"] = [None if isinstance(mask, Tensor) else mask for mask in masks]
            state["bitmaps"] = (where, stacked)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        where, stacked = state.pop("bitmaps", ((), ()))
        vars(self).update(state)
        for i, bitmap in zip(where, stacked):
            assert self.masks is not None
            self.masks[i] = bitmap

    def tensors(self) -> list[Tensor]:
        """Those that :meth:`to` moves."""
        return [self.boxes, self.classes]

    def pin_memory(self) -> Targets:
        """A copy whose tensors are in pinned memory; the loader calls it, for copies that nobody waits for."""
        # Bitmaps are copied, too: batches in waiting would hold shared memory, and descriptors of it, open.
        masks = self.masks and [mask.clone() if isinstance(mask, Tensor) else mask for mask in self.masks]
        keypoints = None if self.keypoints is None else self.keypoints.clone()
        return Targets(self.boxes.pin_memory(), self.classes.pin_memory(), masks, keypoints)


@dataclass(frozen=True)
class Regions:
    """Regions of interest, sorted by the level of the pyramid that they are pooled from.

    Attributes:
        rois: ``(M, 5)``, the number of the image and xyxy pixels.
        on_host: the same on the host.
        level: int64 ``(M,)``, ascending, on the host.
    """

    rois: Tensor
    on_host: Tensor
    level: Tensor

    def at(self, index: Tensor) -> Regions:
        """Those at an ascending ``index``, on the host."""
        if len(index) == len(self.level):
            return self
        rois = self.rois[to_device(index, self.rois.device)]
        return Regions(rois, self.on_host[index], self.level[index])


@dataclass(frozen=True)
class Sampled:
    """The proposals of a batch drawn for training.

    Attributes:
        regions: all ``M`` of them.
        classes: int64 ``(M,)``; the background's is the number of classes.
        foreground: which of them are matched to an object, ascending, on the host ``(F,)``; and on the device.
        objects: of the foreground, counted through all images, on the host ``(F,)``; and on the device.
    """

    regions: Regions
    classes: Tensor
    foreground: tuple[Tensor, Tensor]
    objects: tuple[Tensor, Tensor]


def rois_of(boxes: Sequence[Tensor]) -> Tensor:
    """``(sum of M_i, 5)``, the number of the image first, of ``(M_i, 4)`` boxes per image."""
    image = torch.cat([b.new_full((len(b), 1), i) for i, b in enumerate(boxes)])
    return torch.cat((image, torch.cat(list(boxes))), dim=1)


class AlignedPooler(nn.Module):
    """RoIAlign with half-pixel alignment over a pyramid, levels assigned by box size.

    torchvision's ``MultiScaleRoIAlign`` has no alignment and guesses scales from padded sizes.

    Args:
        output_size: side of the pooled square.
        strides: of the levels, in pixels, finest first.
        sampling_ratio: points per bin and axis; 0 adapts to the box.
        aligned: False for ``ROIAlign`` (Detectron2's first version), True for ``ROIAlignV2``.
    """

    def __init__(self, output_size: int, strides: list[int], sampling_ratio: int, aligned: bool) -> None:
        super().__init__()
        self.output_size = output_size
        self.strides = strides
        self.sampling_ratio = sampling_ratio
        self.aligned = aligned
        self.min_level = int(math.log2(strides[0]))

    def forward(self, features: list[Tensor], rois: Tensor, level: Tensor | None = None) -> Tensor:
        """``(M, C, S, S)`` for ``rois`` as :func:`rois_of` gives them.

        Args:
            level: of each on the host, where the caller knows and has sorted them by it; else the device is waited for.
        """
        if len(features) == 1:
            return self._pool(features[0], rois, self.strides[0])
        back = None
        if level is None:
            level, order = self.levels(rois[:, 1:]).sort(stable=True)
            rois, back = rois[order], order.argsort()
        counts = level.bincount(minlength=len(features)).tolist()
        pooled = torch.cat(
            [self._pool(*one) for one in zip(features, rois.split(counts), self.strides)],
        )
        return pooled if back is None else pooled[back]

    def levels(self, boxes: Tensor) -> Tensor:
        """The level of each of ``(M, 4)`` boxes, int64 from 0 for the finest."""
        level = torch.floor(
            CANONICAL_LEVEL + torch.log2(box_ops.box_area(boxes).sqrt() / CANONICAL_SIZE + 1e-8)
        )
        return level.clamp(self.min_level, self.min_level + len(self.strides) - 1).long() - self.min_level

    def _pool(self, feature: Tensor, rois: Tensor, stride: int) -> Tensor:
        # Autocast takes both as float32. Boxes in bfloat16 would lie on a grid of 8 pixels at 1024.
        if not torch.is_autocast_enabled(feature.device.type):
            rois = rois.to(feature.dtype)
        out: Tensor = roi_align(
            feature,
            rois,
            (self.output_size, self.output_size),
            1.0 / stride,
            self.sampling_ratio,
            self.aligned,
        )
        return out


class BoxHead(nn.Sequential):
    """``NUM_CONV`` 3×3 convolutions, then ``NUM_FC`` fully connected layers, each with ReLU."""

    def __init__(self, cfg: CfgNode, in_channels: int) -> None:
        head = cfg.MODEL.ROI_BOX_HEAD
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        channels = in_channels
        for i in range(1, head.NUM_CONV + 1):
            conv = Conv2dNormActivation(channels, head.CONV_DIM, 3, norm_layer=norm_layer(head.NORM))
            nn.init.kaiming_normal_(conv[0].weight, mode="fan_out", nonlinearity="relu")
            if conv[0].bias is not None:
                nn.init.zeros_(conv[0].bias)
            layers[f"conv{i}"] = conv
            channels = head.CONV_DIM
        layers["flatten"] = nn.Flatten()
        features = channels * head.POOLER_RESOLUTION**2
        for i in range(1, head.NUM_FC + 1):
            linear = nn.Linear(features, head.FC_DIM)
            nn.init.kaiming_uniform_(linear.weight, a=1)
            nn.init.zeros_(linear.bias)
            layers[f"fc{i}"], layers[f"fc_relu{i}"] = linear, nn.ReLU()
            features = head.FC_DIM
        super().__init__(layers)
        self.out_features = features


class BoxPredictor(nn.Module):
    """Class scores and box deltas. Unlike torchvision's, the background is the *last* class and has no box."""

    def __init__(self, in_features: int, num_classes: int, class_agnostic: bool) -> None:
        super().__init__()
        self.cls_score = nn.Linear(in_features, num_classes + 1)
        self.bbox_pred = nn.Linear(in_features, 4 * (1 if class_agnostic else num_classes))
        nn.init.normal_(self.cls_score.weight, std=0.01)
        nn.init.normal_(self.bbox_pred.weight, std=0.001)
        nn.init.zeros_(self.cls_score.bias)
        nn.init.zeros_(self.bbox_pred.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``(R, F)`` to scores ``(R, K + 1)`` and deltas ``(R, 4 · K)`` (``(R, 4)`` if class-agnostic)."""
        return self.cls_score(x), self.bbox_pred(x)


class ROIHeads(nn.Module):
    """Detectron2's ``StandardROIHeads``.

    Args:
        cfg: reads ``MODEL.ROI_HEADS``, ``ROI_BOX_HEAD``, ``ROI_MASK_HEAD``, ``ROI_KEYPOINT_HEAD`` and ``TEST``.
        in_channels: of every feature map.
        strides: pixel stride of the feature maps by name.
    """

    def __init__(self, cfg: CfgNode, in_channels: int, strides: dict[str, int]) -> None:
        super().__init__()
        heads, box = cfg.MODEL.ROI_HEADS, cfg.MODEL.ROI_BOX_HEAD
        self.num_classes: int = heads.NUM_CLASSES
        self.in_features = list(heads.IN_FEATURES)
        level_strides = [strides[name] for name in self.in_features]

        def pooler(head: CfgNode) -> AlignedPooler:
            aligned = head.POOLER_TYPE == "ROIAlignV2"
            return AlignedPooler(head.POOLER_RESOLUTION, level_strides, head.POOLER_SAMPLING_RATIO, aligned)

        self.iou_threshold: float = heads.IOU_THRESHOLDS[0]
        self.batch_size_per_image: int = heads.BATCH_SIZE_PER_IMAGE
        self.positive_share: float = heads.POSITIVE_FRACTION
        self.append_gt: bool = heads.PROPOSAL_APPEND_GT
        self.score_thresh: float = heads.SCORE_THRESH_TEST
        self.nms_thresh: float = heads.NMS_THRESH_TEST
        self.detections_per_image: int = cfg.TEST.DETECTIONS_PER_IMAGE

        self.box_pooler = pooler(box)
        self.box_head = BoxHead(cfg, in_channels)
        self.box_predictor = BoxPredictor(
            self.box_head.out_features, self.num_classes, box.CLS_AGNOSTIC_BBOX_REG
        )
        self.box_coder = BoxCoder(weights=tuple(box.BBOX_REG_WEIGHTS))
        self.class_agnostic: bool = box.CLS_AGNOSTIC_BBOX_REG
        self.loss_type: str = box.BBOX_REG_LOSS_TYPE
        self.smooth_l1_beta: float = box.SMOOTH_L1_BETA
        self.box_weight: float = box.BBOX_REG_LOSS_WEIGHT

        self.pictures = TrainingPictures(cfg)
        self.mask_head: nn.Module | None = None
        if cfg.MODEL.MASK_ON:
            mask = cfg.MODEL.ROI_MASK_HEAD
            self.mask_pooler = pooler(mask)
            norm: Callable[[int], nn.Module] | None = norm_layer(mask.NORM)
            self.mask_head = MaskRCNNHeads(in_channels, [mask.CONV_DIM] * mask.NUM_CONV, 1, norm)
            channels = mask.CONV_DIM if mask.NUM_CONV else in_channels
            outputs = 1 if mask.CLS_AGNOSTIC_MASK else self.num_classes
            self.mask_predictor = MaskRCNNPredictor(channels, mask.CONV_DIM, outputs)
            nn.init.normal_(self.mask_predictor.mask_fcn_logits.weight, std=0.001)
            nn.init.zeros_(self.mask_predictor.mask_fcn_logits.bias)
            nn.init.zeros_(self.mask_predictor.conv5_mask.bias)

        self.keypoint_head: nn.Module | None = None
        if cfg.MODEL.KEYPOINT_ON:
            keypoint = cfg.MODEL.ROI_KEYPOINT_HEAD
            self.keypoint_pooler = pooler(keypoint)
            self.keypoint_head = KeypointRCNNHeads(in_channels, tuple(keypoint.CONV_DIMS))
            self.keypoint_predictor = KeypointRCNNPredictor(keypoint.CONV_DIMS[-1], keypoint.NUM_KEYPOINTS)
            self.keypoint_weight: float = keypoint.LOSS_WEIGHT
            self.keypoint_normalizer: float | None = None
            if not keypoint.NORMALIZE_LOSS_BY_VISIBLE_KEYPOINTS:
                self.keypoint_normalizer = (
                    keypoint.NUM_KEYPOINTS * heads.BATCH_SIZE_PER_IMAGE * heads.POSITIVE_FRACTION
                )

    # ---- training

    @torch.no_grad()
    def sample(self, proposals: list[Tensor], targets: list[Targets]) -> Sampled:
        """Match proposals to ground truth and draw ``BATCH_SIZE_PER_IMAGE`` of them per image."""
        boxes_of, classes, objects, before = [], [], [], 0
        for boxes, target in zip(proposals, targets):
            if self.append_gt:
                boxes = torch.cat((boxes, target.boxes))
            if len(target.boxes) and len(boxes):
                overlap, index = box_ops.box_iou(target.boxes, boxes).max(dim=0)
                kind = torch.where(overlap < self.iou_threshold, self.num_classes, target.classes[index])
            else:
                index = torch.zeros(len(boxes), dtype=torch.int64, device=boxes.device)
                kind = torch.full_like(index, self.num_classes)
            boxes_of.append(boxes)
            classes.append(kind)
            objects.append(index + before)
            before += len(target.boxes)
        # All that is known of the candidates in one copy: the host then draws, finds levels and masks without another.
        numbers = torch.stack((torch.cat(classes), torch.cat(objects)), dim=1)
        on_host = torch.cat((torch.cat(boxes_of), numbers.float()), dim=1).cpu()
        sizes = [len(boxes) for boxes in boxes_of]
        labels = (on_host[:, 4] < self.num_classes).byte()
        chosen = torch.cat(Candidates(labels, sizes).draw(self.batch_size_per_image, self.positive_share))
        level, order = self.box_pooler.levels(on_host[chosen, :4]).sort(stable=True)
        chosen = chosen[order]
        image = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))[chosen]
        rows = torch.cat((image[:, None].float(), on_host[chosen]), dim=1)
        foreground = labels[chosen].nonzero().squeeze(1)
        matched = rows[foreground, 6].long()
        device = targets[0].boxes.device
        moved = to_device(rows, device)
        return Sampled(
            Regions(moved[:, :5], rows[:, :5], level),
            moved[:, 5].long(),
            (foreground, to_device(foreground, device)),
            (matched, to_device(matched, device)),
        )

    def losses(
        self, features: dict[str, Tensor], proposals: list[Tensor], targets: list[Targets]
    ) -> dict[str, Tensor]:
        """All losses of the second stage, scalars, under Detectron2's names."""
        maps = [features[name] for name in self.in_features]
        sampled = self.sample(proposals, targets)
        losses = self._box_losses(maps, sampled, targets)
        if self.mask_head is not None:
            losses["loss_mask"] = self._mask_loss(maps, sampled, targets)
        if self.keypoint_head is not None:
            losses["loss_keypoint"] = self._keypoint_loss(maps, sampled, targets)
        return losses

    def _box_losses(self, maps: list[Tensor], sampled: Sampled, targets: list[Targets]) -> dict[str, Tensor]:
        pooled = self.box_pooler(maps, sampled.regions.rois, sampled.regions.level)
        scores, deltas = self.box_predictor(self.box_head(pooled))
        classes, foreground = sampled.classes, sampled.foreground[1]
        if classes.numel() == 0:
            return {"loss_cls": scores.sum() * 0.0, "loss_box_reg": deltas.sum() * 0.0}
        if self.class_agnostic:
            fg_deltas = deltas[foreground]
        else:
            fg_deltas = deltas.unflatten(1, (-1, 4))[foreground, classes[foreground]]
        box_loss = box_regression_loss(
            self.box_coder,
            sampled.regions.rois[foreground, 1:],
            fg_deltas,
            torch.cat([t.boxes for t in targets])[sampled.objects[1]],
            self.loss_type,
            self.smooth_l1_beta,
        )
        return {
            "loss_cls": F.cross_entropy(scores.float(), classes),
            "loss_box_reg": box_loss * (self.box_weight / classes.numel()),
        }

    def _mask_loss(self, maps: list[Tensor], sampled: Sampled, targets: list[Targets]) -> Tensor:
        assert self.mask_head is not None
        every: list[Mask] = [
            mask for t in targets for mask in (t.masks if t.masks is not None else [None] * len(t.boxes))
        ]
        known = [every[i] for i in sampled.objects[0].tolist()]
        there = sampled.foreground[0]
        masks = [mask for mask in known if mask is not None]
        if len(masks) < len(known):
            there = there[torch.tensor([mask is not None for mask in known])]
        regions = sampled.regions.at(there)
        pooled = self.mask_pooler(maps, regions.rois, regions.level)
        logits = self.mask_predictor(self.mask_head(pooled))
        if len(logits) == 0:
            return logits.sum() * 0.0
        boxes = regions.on_host[:, 1:]
        target = to_device(crop_and_resize(masks, boxes, logits.shape[-1]), logits.device)
        chosen = logits[:, 0]
        if logits.shape[1] > 1:
            classes = sampled.classes[to_device(there, logits.device)]
            chosen = logits[torch.arange(len(logits), device=logits.device), classes]
        self.pictures.masks(chosen, target)
        return F.binary_cross_entropy_with_logits(chosen.float(), target.float())

    def _keypoint_loss(self, maps: list[Tensor], sampled: Sampled, targets: list[Targets]) -> Tensor:
        assert self.keypoint_head is not None
        truth = [t.keypoints for t in targets if t.keypoints is not None]
        assert len(truth) == len(targets), "MODEL.KEYPOINT_ON needs keypoints in every target"
        points, boxes = (
            torch.cat(truth)[sampled.objects[0]],
            sampled.regions.on_host[sampled.foreground[0], 1:],
        )
        x, y, flag = points.unbind(dim=-1)
        inside = (x >= boxes[:, None, 0]) & (x <= boxes[:, None, 2])
        inside &= (y >= boxes[:, None, 1]) & (y <= boxes[:, None, 3])
        keep = (inside & (flag >= 1)).any(dim=1)
        regions = sampled.regions.at(sampled.foreground[0][keep])
        pooled = self.keypoint_pooler(maps, regions.rois, regions.level)
        logits = self.keypoint_predictor(self.keypoint_head(pooled))
        if len(logits) == 0:
            return logits.sum() * 0.0
        cells, valid = keypoints_to_heatmap(points[keep], boxes[keep], logits.shape[-1])
        # The points that don't count are left out by their target.
        wanted = to_device(torch.where(valid, cells, _IGNORED).flatten(), logits.device)
        loss = F.cross_entropy(
            logits.flatten(2).flatten(0, 1).float(), wanted, reduction="sum", ignore_index=_IGNORED
        )
        if self.keypoint_normalizer is not None:
            return loss * (self.keypoint_weight / (self.keypoint_normalizer * len(targets)))
        return loss * (self.keypoint_weight / max(int(valid.sum()), 1))

    # ---- inference

    def detect(
        self, features: dict[str, Tensor], proposals: list[Tensor], image_sizes: list[tuple[int, int]]
    ) -> list[dict[str, Tensor]]:
        """Detections per image, in pixels of the network's input, best first.

        Returns:
            ``boxes (D, 4)``, ``scores (D,)``, ``classes (D,)``, and where the model has them
            ``masks (D, M, M)`` (probabilities within the box) and ``keypoints (D, K, 3)`` (x, y, score).
        """
        detections = self.detect_boxes(features, proposals, image_sizes)
        boxes = [d["boxes"] for d in detections]
        counts = [len(b) for b in boxes]
        if self.mask_head is not None:
            masks = self.masks_of(features, boxes, torch.cat([d["classes"] for d in detections]))
            for detection, mask in zip(detections, masks.split(counts)):
                detection["masks"] = mask
        if self.keypoint_head is not None:
            points = heatmaps_to_keypoints(self.heatmaps_of(features, boxes), torch.cat(boxes))
            for detection, keypoints in zip(detections, points.split(counts)):
                detection["keypoints"] = keypoints
        return detections

    def detect_boxes(
        self, features: dict[str, Tensor], proposals: list[Tensor], image_sizes: list[tuple[int, int]]
    ) -> list[dict[str, Tensor]]:
        """:meth:`detect` without masks and keypoints."""
        maps = [features[name] for name in self.in_features]
        pooled = self.box_pooler(maps, rois_of(proposals))
        scores, deltas = self.box_predictor(self.box_head(pooled))
        probabilities = scores.float().softmax(dim=-1)
        kinds = deltas.shape[1] // 4
        decoded = self.box_coder.decode_single(deltas.float(), torch.cat(proposals)).view(-1, kinds, 4)
        counts = [len(p) for p in proposals]
        return [
            self._select(b, p, size)
            for b, p, size in zip(decoded.split(counts), probabilities.split(counts), image_sizes)
        ]

    def masks_of(self, features: dict[str, Tensor], boxes: Sequence[Tensor], classes: Tensor) -> Tensor:
        """Probabilities ``(D, M, M)`` within ``D`` boxes, ``(D_i, 4)`` per image, of ``classes (D,)``."""
        assert self.mask_head is not None
        maps = [features[name] for name in self.in_features]
        logits = self.mask_predictor(self.mask_head(self.mask_pooler(maps, rois_of(boxes)))).float()
        channel = torch.zeros_like(classes) if logits.shape[1] == 1 else classes
        return logits[torch.arange(len(logits), device=logits.device), channel].sigmoid()

    def heatmaps_of(self, features: dict[str, Tensor], boxes: Sequence[Tensor]) -> Tensor:
        """Logits ``(D, K, S, S)`` of each keypoint within ``D`` boxes, ``(D_i, 4)`` per image."""
        assert self.keypoint_head is not None
        maps = [features[name] for name in self.in_features]
        pooled = self.keypoint_pooler(maps, rois_of(boxes))
        heatmaps: Tensor = self.keypoint_predictor(self.keypoint_head(pooled)).float()
        return heatmaps

    def best(self, boxes: Tensor, scores: Tensor, classes: Tensor) -> Tensor:
        """Which of ``D`` detections are left by NMS within each class, best first, up to the limit."""
        keep = box_ops.batched_nms(boxes, scores, classes, self.nms_thresh)
        return keep[: self.detections_per_image] if self.detections_per_image >= 0 else keep

    def _select(self, boxes: Tensor, scores: Tensor, size: tuple[int, int]) -> dict[str, Tensor]:
        finite = torch.isfinite(boxes).all(dim=(1, 2)) & torch.isfinite(scores).all(dim=1)
        boxes, scores = boxes[finite], scores[finite, :-1]
        boxes = box_ops.clip_boxes_to_image(boxes, size)
        index, classes = (scores > self.score_thresh).nonzero(as_tuple=True)
        chosen = boxes[index, 0] if self.class_agnostic else boxes[index, classes]
        chosen_scores = scores[index, classes]
        keep = self.best(chosen, chosen_scores, classes)
        return {"boxes": chosen[keep], "scores": chosen_scores[keep], "classes": classes[keep]}
