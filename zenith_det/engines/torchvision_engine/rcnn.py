"""Faster, Mask and Keypoint R-CNN as Detectron2 defines them, built on torchvision."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import boxes as box_ops

from zenith_det.config import CfgNode
from zenith_det.engines.model_format import use_channels_last
from zenith_det.engines.torchvision_engine.backbone import ResNetFPN, normalize_and_pad
from zenith_det.engines.torchvision_engine.masks import paste_masks
from zenith_det.engines.torchvision_engine.roi_heads import ROIHeads
from zenith_det.engines.torchvision_engine.rpn import RPN
from zenith_det.engines.torchvision_engine.training_pictures import TrainingPictures


class GeneralizedRCNN(nn.Module):
    """A two-stage detector.

    Called with a list of samples, each a dict: ``image`` ``(C, H, W)`` in ``INPUT.FORMAT``;
    in training also ``targets`` (:class:`~.roi_heads.Targets`, pixels of that image); in evaluation
    ``height`` and ``width`` of the original image, which results are scaled to.

    In training it returns a dict of scalar losses under Detectron2's names, else one dict per image:
    ``boxes (D, 4)`` xyxy, ``scores (D,)``, ``classes (D,)`` and, by task, ``masks`` bool ``(D, height, width)``
    and ``keypoints (D, K, 3)``, best detection first.

    Args:
        cfg: a checked configuration; see :func:`~.support.check_supported`.
    """

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__()
        self.backbone = ResNetFPN(cfg)
        self.rpn = RPN(cfg, self.backbone.out_channels, self.backbone.strides)
        self.roi_heads = ROIHeads(cfg, self.backbone.out_channels, self.backbone.strides)
        self.pictures = TrainingPictures(cfg)
        self.pixel_mean: Tensor
        self.pixel_std: Tensor
        mean = torch.tensor(cfg.MODEL.PIXEL_MEAN, dtype=torch.float32).view(-1, 1, 1)
        std = torch.tensor(cfg.MODEL.PIXEL_STD, dtype=torch.float32).view(-1, 1, 1)
        self.register_buffer("pixel_mean", mean, persistent=False)
        self.register_buffer("pixel_std", std, persistent=False)

    def forward(self, samples: list[dict[str, Any]]) -> Any:
        images, sizes, features = self.extract([s["image"] for s in samples])
        predicted = self.rpn.predict(images, sizes, features)
        if self.training:
            targets = [s["targets"].to(images.device) for s in samples]
            boxes = [t.boxes for t in targets]
            # Counted before the host waits for the proposals, it is known after that without another wait.
            labelled = self.rpn.label(predicted.anchors, boxes)
            proposals = self.rpn.propose(predicted, sizes)
            self.pictures.proposals([s["image"] for s in samples], boxes, proposals)
            losses = self.roi_heads.losses(features, proposals, targets)
            return losses | self.rpn.losses(predicted, labelled, boxes)
        detections = self.roi_heads.detect(features, self.rpn.propose(predicted, sizes), sizes)
        return [
            to_original_size(d, size, (s.get("height", size[0]), s.get("width", size[1])))
            for d, size, s in zip(detections, sizes, samples)
        ]

    def extract(self, images: list[Tensor]) -> tuple[Tensor, list[tuple[int, int]], dict[str, Tensor]]:
        """The batch that images make, their sizes before padding, and feature maps by name.

        Args:
            images: ``(C, H, W)`` in ``INPUT.FORMAT``, one channel for each of ``MODEL.PIXEL_MEAN``.
        """
        batch, sizes = normalize_and_pad(
            images, self.pixel_mean, self.pixel_std, self.backbone.size_divisibility
        )
        return batch, sizes, self.backbone(batch)


def to_original_size(
    detection: dict[str, Tensor], input_size: tuple[int, int], output_size: tuple[int, int]
) -> dict[str, Tensor]:
    """Scale detections from the network's input to the original image and paste their masks.

    Args:
        detection: of one image, as :meth:`~.roi_heads.ROIHeads.detect` gives it.
        input_size, output_size: (height, width) in pixels.
    """
    height, width = output_size
    scale = torch.tensor([width / input_size[1], height / input_size[0]], device=detection["boxes"].device)
    boxes = box_ops.clip_boxes_to_image(detection["boxes"] * scale.repeat(2), output_size)
    keep = ((boxes[:, 2:] - boxes[:, :2]) > 0).all(dim=1)
    result = {k: v[keep] for k, v in detection.items()}
    result["boxes"] = boxes[keep]
    if "masks" in result:
        result["masks"] = paste_masks(result["masks"], result["boxes"], height, width)
    if "keypoints" in result:
        result["keypoints"] = torch.cat(
            (result["keypoints"][..., :2] * scale, result["keypoints"][..., 2:]), dim=-1
        )
    return result


def build_model(cfg: CfgNode) -> GeneralizedRCNN:
    """The detector that ``cfg`` describes, on ``MODEL.DEVICE`` (``auto`` resolved before), randomly initialized."""
    model = GeneralizedRCNN(cfg).to(torch.device(cfg.MODEL.DEVICE))
    use_channels_last(cfg, model)
    return model
