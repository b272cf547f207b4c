"""A detector of this engine as one graph of tensors: no Python lists, no shapes that a value decides but the last.

The same arithmetic as :class:`~.rcnn.GeneralizedRCNN` in evaluation, on the same weights. Where that goes through the
images and levels one by one and drops boxes on the way, this one keeps a fixed number of boxes per image, level and
class, with a score of :data:`NO_BOX` where there is none. Exporters (``torch.export``, ONNX) can follow that for any
image size and batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import box_area, nms, roi_align

from zenith_det.engines.torchvision_engine.rcnn import GeneralizedRCNN
from zenith_det.engines.torchvision_engine.roi_heads import CANONICAL_LEVEL, CANONICAL_SIZE, AlignedPooler

#: The score of what isn't there.
NO_BOX = -1e30


@torch.library.custom_op("zenith_det::grouped_nms", mutates_args=())
def grouped_nms(boxes: Tensor, scores: Tensor, iou_threshold: float, score_threshold: float) -> Tensor:
    """Non-maximum suppression within each group.

    Args:
        boxes: ``(G, R, 4)``, xyxy.
        scores: ``(G, R)``.
        iou_threshold: of two boxes that overlap by more, the one with the lower score goes.
        score_threshold: boxes with this score or less don't take part.

    Returns:
        bool ``(G, R)``: which boxes are kept.
    """
    keep = torch.zeros_like(scores, dtype=torch.bool)
    for group in range(len(boxes)):
        candidates = (scores[group] > score_threshold).nonzero().squeeze(1)
        best = nms(boxes[group, candidates], scores[group, candidates], iou_threshold)
        keep[group, candidates[best]] = True
    return keep


@grouped_nms.register_fake
def _(boxes: Tensor, scores: Tensor, iou_threshold: float, score_threshold: float) -> Tensor:
    return torch.empty_like(scores, dtype=torch.bool)


class ExportableRCNN(nn.Module):
    """See the module.

    Args:
        model: in evaluation mode; its modules are used, not copied.
    """

    def __init__(self, model: GeneralizedRCNN) -> None:
        super().__init__()
        self.backbone = model.backbone
        self.rpn = model.rpn
        self.heads = model.roi_heads

    def forward(self, images: Tensor, input_size: Tensor, original_size: Tensor) -> tuple[Tensor, ...]:
        """Detections of all images in one row, image after image, best first.

        Args:
            images: ``(N, C, H, W)`` float, normalized, padded to multiples of the backbone's divisibility.
            input_size: ``(2,)`` float: height and width before that padding, the same for all images.
            original_size: ``(2,)`` float: height and width that detections are scaled to.

        Returns:
            ``boxes (M, 4)``, ``scores (M,)``, ``classes (M,)``, ``image_index (M,)``; with a mask head ``masks
            (M, S, S)``, probabilities within the box; with a keypoint head ``heatmaps (M, K, S, S)``, logits, the boxes
            in pixels of the input, ``(M, 4)``, which they lie in, and what brings these to the original size, ``(2,)``.
        """
        features = self.backbone(images)
        proposals, exists = self._proposals(features, input_size)
        maps = [features[name] for name in self.heads.in_features]
        boxes, scores, classes = self._detections(maps, proposals, exists, input_size)

        scale = (original_size / input_size).flip(0).repeat(2)
        scaled = _clipped(boxes * scale, original_size)
        sides = scaled[..., 2:] - scaled[..., :2]
        index = ((scores > NO_BOX) & (sides > 0).all(-1)).flatten().nonzero().squeeze(1)
        image = index // scores.shape[1]
        kept, kept_classes = boxes.flatten(0, 1)[index], classes.flatten()[index]
        outputs = [scaled.flatten(0, 1)[index], scores.flatten()[index], kept_classes, image]
        rois = torch.cat((image.to(kept.dtype)[:, None], kept), dim=1)
        if self.heads.mask_head is not None:
            pooled = _pool(self.heads.mask_pooler, maps, rois)
            logits = self.heads.mask_predictor(self.heads.mask_head(pooled))
            channel = torch.zeros_like(kept_classes) if logits.shape[1] == 1 else kept_classes
            side = logits.shape[-1]
            of_class = logits.gather(1, channel[:, None, None, None].expand(-1, 1, side, side))
            outputs.append(of_class[:, 0].sigmoid())
        if self.heads.keypoint_head is not None:
            pooled = _pool(self.heads.keypoint_pooler, maps, rois)
            outputs += [self.heads.keypoint_predictor(self.heads.keypoint_head(pooled)), kept, scale[:2]]
        return tuple(outputs)

    def _proposals(self, features: dict[str, Tensor], size: Tensor) -> tuple[Tensor, Tensor]:
        """Proposals ``(N, P, 4)``, best first, and whether each is there ``(N, P)``; see :meth:`.rpn.RPN.select`."""
        rpn = self.rpn
        maps = [features[name] for name in rpn.in_features]
        most = rpn.pre_nms_top_n()
        generator = rpn.anchor_generator
        generator.set_cell_anchors(torch.float32, maps[0].device)
        boxes_per_level, scores_per_level = [], []
        for logits, deltas, cell, stride in zip(
            *rpn.head(maps), generator.cell_anchors, generator.level_strides
        ):
            # Levels with fewer anchors are filled up: the number of candidates doesn't depend on the image's size.
            batch, kinds = logits.shape[0], len(cell)
            scores = F.pad(logits.permute(0, 2, 3, 1).flatten(1).float(), (0, most), value=NO_BOX)
            scores, order = scores.topk(most, dim=1)
            anchors = F.pad(_anchors(cell, stride, generator.offset, logits), (0, 0, 0, most))[order]
            rows = deltas.unflatten(1, (kinds, 4)).permute(0, 3, 4, 1, 2).flatten(1, 3).float()
            rows = F.pad(rows, (0, 0, 0, most)).gather(1, order[..., None].expand(-1, -1, 4))
            decoded = rpn.box_coder.decode_single(rows.flatten(0, 1), anchors.flatten(0, 1))
            boxes_per_level.append(decoded.view(batch, most, 4))
            scores_per_level.append(scores)
        boxes, scores = torch.stack(boxes_per_level, 1), torch.stack(scores_per_level, 1)
        finite = torch.isfinite(boxes).all(-1) & torch.isfinite(scores) & (scores > NO_BOX)
        boxes = _clipped(torch.where(finite[..., None], boxes, 0.0), size)
        sides = boxes[..., 2:] - boxes[..., :2]
        scores = torch.where(finite & (sides > rpn.min_size).all(-1), scores, NO_BOX)
        keep = grouped_nms(boxes.flatten(0, 1), scores.flatten(0, 1), rpn.nms_thresh, NO_BOX)
        scores = torch.where(keep.view(scores.shape), scores, NO_BOX).flatten(1)
        scores, order = scores.topk(min(rpn.post_nms_top_n(), most * len(maps)), dim=1)
        chosen = boxes.flatten(1, 2).gather(1, order[..., None].expand(-1, -1, 4))
        return chosen, scores > NO_BOX

    def _detections(
        self, maps: list[Tensor], proposals: Tensor, exists: Tensor, size: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes ``(N, D, 4)`` of the input, scores and classes ``(N, D)``; see :meth:`.roi_heads.ROIHeads.detect`."""
        heads = self.heads
        batch, count = proposals.shape[:2]
        image = torch.arange(batch, device=proposals.device, dtype=proposals.dtype)
        rois = torch.cat((image[:, None, None].expand(-1, count, 1), proposals), dim=2).flatten(0, 1)
        logits, deltas = heads.box_predictor(heads.box_head(_pool(heads.box_pooler, maps, rois)))
        scores = logits.float().softmax(-1)
        kinds = deltas.shape[1] // 4
        boxes = heads.box_coder.decode_single(deltas.float(), rois[:, 1:]).view(-1, kinds, 4)
        finite = torch.isfinite(boxes).all(-1).all(-1) & torch.isfinite(scores).all(-1) & exists.flatten()
        boxes = _clipped(torch.where(finite[:, None, None], boxes, 0.0), size)
        scores = torch.where(finite[:, None], scores, NO_BOX)[:, :-1]
        classes = scores.shape[1]
        # (N, C, P): a group for each image and class.
        scores = scores.view(batch, count, classes).transpose(1, 2)
        boxes = boxes.view(batch, count, kinds, 4).transpose(1, 2).expand(-1, classes, -1, -1)
        keep = grouped_nms(
            boxes.flatten(0, 1), scores.flatten(0, 1), heads.nms_thresh, max(heads.score_thresh, NO_BOX)
        )
        scores = torch.where(keep.view(batch, classes, count), scores, NO_BOX).flatten(1)
        scores, order = scores.topk(min(heads.detections_per_image, classes * count), dim=1)
        chosen = boxes.flatten(1, 2).gather(1, order[..., None].expand(-1, -1, 4))
        return chosen, scores, order // count


def export_arguments(core: ExportableRCNN) -> dict[str, Any]:
    """What ``torch.export.export`` takes beside the module: example inputs, and which of their sizes may vary."""
    dim, side = torch.export.Dim, core.backbone.size_divisibility
    images = torch.zeros(2, core.backbone.body.conv1.in_channels, 4 * side, 5 * side)
    sizes = torch.tensor([4 * side - 3.0, 5 * side - 1.0]), torch.tensor([200.0, 300.0])
    height, width = dim("height_blocks", min=1, max=4096), dim("width_blocks", min=1, max=4096)
    return {
        "args": (images, *sizes),
        "dynamic_shapes": ({0: dim("batch", min=1, max=4096), 2: side * height, 3: side * width}, {}, {}),
    }


def _anchors(cell: Tensor, stride: int, offset: float, level: Tensor) -> Tensor:
    """``(H · W · A, 4)``, as :class:`~.rpn.UnroundedAnchors` makes them."""
    height, width = level.shape[-2:]
    ys = (torch.arange(height, device=level.device) + offset) * float(stride)
    xs = (torch.arange(width, device=level.device) + offset) * float(stride)
    y, x = torch.meshgrid(ys, xs, indexing="ij")
    return (torch.stack((x, y, x, y), dim=-1)[:, :, None] + cell).flatten(0, 2)


def _clipped(boxes: Tensor, size: Tensor) -> Tensor:
    """Boxes ``(…, 4)`` within an image of ``size`` (height, width)."""
    return torch.minimum(boxes.clamp(min=0), size.flip(0).repeat(2))


def _pool(pooler: AlignedPooler, maps: list[Tensor], rois: Tensor) -> Tensor:
    """Regions ``(R, 5)`` pooled, each on its level; see :meth:`.roi_heads.AlignedPooler.forward`."""
    size = (pooler.output_size, pooler.output_size)
    level = torch.floor(CANONICAL_LEVEL + torch.log2(box_area(rois[:, 1:]).sqrt() / CANONICAL_SIZE + 1e-8))
    level = level.clamp(pooler.min_level, pooler.min_level + len(maps) - 1) - pooler.min_level
    pooled = None
    for number, (feature, stride) in enumerate(zip(maps, pooler.strides)):
        mine = level == number
        # All regions on all levels, those of other levels as a point: it takes a single sample.
        there = torch.cat((rois[:, :1], torch.where(mine[:, None], rois[:, 1:], 0.0)), dim=1)
        crops = roi_align(feature, there, size, 1.0 / stride, pooler.sampling_ratio, pooler.aligned)
        crops = torch.where(mine[:, None, None, None], crops, 0.0)
        pooled = crops if pooled is None else pooled + crops
    assert pooled is not None
    return pooled
