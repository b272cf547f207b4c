"""Test-time augmentation (``TEST.AUG``): several sizes of an image and their mirror images, their detections merged."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.ops import boxes as box_ops

from zenith_det.config import CfgNode
from zenith_det.engines.torchvision_engine.input_pipeline import Geometry, image_tensor, shortest_edge_size
from zenith_det.engines.torchvision_engine.keypoints import heatmaps_to_keypoints
from zenith_det.engines.torchvision_engine.rcnn import GeneralizedRCNN, to_original_size
from zenith_det.errors import ConfigError

#: Views that go through the network together, as in Detectron2: padding to one size moves what is near an edge a bit.
VIEWS_AT_ONCE = 3


@dataclass(frozen=True)
class View:
    """An image as the network gets it.

    Attributes:
        image: ``(C, H, W)``.
        mirrored: left is right.
    """

    image: Tensor
    mirrored: bool

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)."""
        return self.image.shape[1], self.image.shape[2]

    def from_original(self, boxes: Tensor, size: tuple[int, int]) -> Tensor:
        """Boxes xyxy of an image of this (height, width) in the view."""
        return self._mirror(boxes * _scale(size, self.size, boxes))

    def to_original(self, boxes: Tensor, size: tuple[int, int]) -> Tensor:
        """The other way."""
        return self._mirror(boxes) * _scale(self.size, size, boxes)

    def _mirror(self, boxes: Tensor) -> Tensor:
        if not self.mirrored:
            return boxes
        x0, y0, x1, y1 = boxes.unbind(dim=1)
        return torch.stack((self.size[1] - x1, y0, self.size[1] - x0, y1), dim=1)


class RCNNWithTTA(nn.Module):
    """A detector that looks at each image several times, as Detectron2's ``GeneralizedRCNNWithTTA`` does.

    The boxes of all views go through one NMS. In those that are left, masks are the mean of the views' probabilities,
    and keypoints are found in the mean of the views' heatmaps: that is Detectron's ``HM_AVG``
    (``detectron/core/test.py``), Detectron2 has nothing for keypoints.

    Called as :class:`~.rcnn.GeneralizedRCNN` is in evaluation, it gives the same.

    Args:
        cfg: with ``TEST.AUG``.
        model: in evaluation mode.
        flip_indices: for each keypoint the one that a mirror image has in its place.

    Raises:
        ConfigError: mirror images are wanted, and ``flip_indices`` aren't those of the model's keypoints.
    """

    def __init__(self, cfg: CfgNode, model: GeneralizedRCNN, flip_indices: Sequence[int] = ()) -> None:
        super().__init__()
        self.model = model
        self.sizes = tuple(cfg.TEST.AUG.MIN_SIZES)
        self.longest = cfg.TEST.AUG.MAX_SIZE
        self.mirrored = (False, True) if cfg.TEST.AUG.FLIP else (False,)
        self.flip_indices = list(flip_indices)
        keypoints = cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS if cfg.MODEL.KEYPOINT_ON else 0
        if keypoints and cfg.TEST.AUG.FLIP and len(self.flip_indices) != keypoints:
            raise ConfigError(
                f"TEST.AUG.FLIP is True, but the test set doesn't tell which of the model's {keypoints} keypoints "
                "a mirror image exchanges: set it False"
            )

    @torch.no_grad()
    def forward(self, samples: list[dict[str, Any]]) -> list[dict[str, Tensor]]:
        return [self._detect(sample) for sample in samples]

    def _detect(self, sample: dict[str, Any]) -> dict[str, Tensor]:
        heads = self.model.roi_heads
        image = sample["image"]
        size = (sample.get("height", image.shape[1]), sample.get("width", image.shape[2]))
        found: list[dict[str, Tensor]] = []
        for views in self._views(image):
            batch, sizes, features = self.model.extract([view.image for view in views])
            proposals = self.model.rpn.propose(self.model.rpn.predict(batch, sizes, features), sizes)
            for view, one in zip(views, heads.detect_boxes(features, proposals, sizes)):
                found.append(one | {"boxes": view.to_original(one["boxes"], size)})
        merged = {name: torch.cat([one[name] for one in found]) for name in ("boxes", "scores", "classes")}
        merged["boxes"] = box_ops.clip_boxes_to_image(merged["boxes"], size)
        keep = heads.best(merged["boxes"], merged["scores"], merged["classes"])
        merged = {name: value[keep] for name, value in merged.items()}
        return to_original_size(merged | self._inside(image, merged, size), size, size)

    def _inside(self, image: Tensor, merged: dict[str, Tensor], size: tuple[int, int]) -> dict[str, Tensor]:
        """Masks and keypoints in merged boxes, from all views; those are made anew, as their features are large."""
        heads = self.model.roi_heads
        masks, heatmaps = [], []
        if heads.mask_head is None and heads.keypoint_head is None:
            return {}
        for views in self._views(image):
            _, _, features = self.model.extract([view.image for view in views])
            boxes = [view.from_original(merged["boxes"], size) for view in views]
            if heads.mask_head is not None:
                seen = heads.masks_of(features, boxes, merged["classes"].repeat(len(views)))
                masks += [
                    m.flip(-1) if v.mirrored else m
                    for v, m in zip(views, seen.split([len(merged["boxes"])] * len(views)))
                ]
            if heads.keypoint_head is not None:
                logits = heads.heatmaps_of(features, boxes)
                for view, one in zip(views, logits.split([len(merged["boxes"])] * len(views))):
                    heatmaps.append(one.flip(-1)[:, self.flip_indices] if view.mirrored else one)
        inside = {}
        if masks:
            inside["masks"] = torch.stack(masks).mean(dim=0)
        if heatmaps:
            inside["keypoints"] = heatmaps_to_keypoints(torch.stack(heatmaps).mean(dim=0), merged["boxes"])
        return inside

    def _views(self, image: Tensor) -> Iterator[list[View]]:
        """As many as go through the network together at a time."""
        every = self._every_view(image)
        while views := list(islice(every, VIEWS_AT_ONCE)):
            yield views

    def _every_view(self, image: Tensor) -> Iterator[View]:
        pixels = np.ascontiguousarray(image.cpu().permute(1, 2, 0).numpy())
        height, width = pixels.shape[:2]
        for short in self.sizes:
            new_height, new_width = shortest_edge_size(height, width, short, self.longest)
            for mirrored in self.mirrored:
                flip = "horizontal" if mirrored else "none"
                geometry = Geometry(new_width / width, new_height / height, new_height, new_width, flip)
                seen = geometry.image(pixels, Image.Resampling.BILINEAR)
                yield View(image_tensor(seen), mirrored)


def _scale(before: tuple[int, int], after: tuple[int, int], like: Tensor) -> Tensor:
    return like.new_tensor([after[1] / before[1], after[0] / before[0]] * 2)
