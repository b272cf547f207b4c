"""Models of the built-in engine that are small enough for a unit test, and samples to feed them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from zenith_det.config import LoadedConfig, load_config
from zenith_det.data import CocoDataset, SerializedList
from zenith_det.engines.engine import TrainingSet
from zenith_det.engines.torchvision_engine.roi_heads import Targets

SMALL = {
    "MODEL.DEVICE": "cpu",
    "MODEL.ROI_HEADS.NUM_CLASSES": 6,
    "MODEL.FPN.OUT_CHANNELS": 32,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 32,
    "MODEL.ROI_MASK_HEAD.CONV_DIM": 32,
    "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS": (32, 32),
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 16,
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN": 50,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 30,
    "MODEL.RPN.PRE_NMS_TOPK_TEST": 50,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 30,
    "DATALOADER.NUM_WORKERS": 0,
}

# The quickstart models leave the last stage out; with these overrides it is there.
WHOLE_RESNET = {
    "MODEL__RESNETS__OUT_FEATURES": ["res2", "res3", "res4", "res5"],
    "MODEL__FPN__IN_FEATURES": ["res2", "res3", "res4", "res5"],
    "MODEL__RPN__IN_FEATURES": ["p2", "p3", "p4", "p5", "p6"],
    "MODEL__ROI_HEADS__IN_FEATURES": ["p2", "p3", "p4", "p5"],
    "MODEL__ANCHOR_GENERATOR__SIZES": [[8], [16], [32], [64], [128]],
}


def small_config(task: str, **overrides: object) -> LoadedConfig:
    """The quickstart config of ``task`` ("faster", "mask", "keypoint"), shrunk; ``A__B`` means ``A.B``."""
    values = SMALL | {key.replace("__", "."): value for key, value in overrides.items()}
    opts = [item for pair in values.items() for item in pair]
    return load_config(f"configs/quickstart/{task}_rcnn_zenith.yaml", opts)


def square_targets(keypoints: int = 0, masks: bool = True) -> Targets:
    """Two objects of 20 and 30 pixels in a 64-pixel image."""
    boxes = torch.tensor([[4.0, 4.0, 24.0, 24.0], [30.0, 20.0, 60.0, 50.0]])
    polygons = [[_square(box)] for box in boxes.tolist()]
    points = torch.zeros(2, keypoints, 3)
    if keypoints:
        points[:, :, :2] = (boxes[:, None, :2] + boxes[:, None, 2:]) / 2
        points[:, :, 2] = 2
    return Targets(
        boxes, torch.tensor([0, 0]), list(polygons) if masks else None, points if keypoints else None
    )


def no_targets(keypoints: int = 0) -> Targets:
    """An image without objects."""
    return Targets(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), [], torch.zeros(0, keypoints, 3))


def samples(*targets: Targets) -> list[dict[str, object]]:
    """A training sample of 64 × 64 noise for each."""
    generator = torch.Generator().manual_seed(0)
    return [
        {"image": torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8, generator=generator), "targets": t}
        for t in targets
    ]


def _square(box: list[float]) -> np.ndarray:
    x0, y0, x1, y1 = box
    return np.array([x0, y0, x1, y0, x1, y1, x0, y1], dtype=np.float64)


def training_set(dataset: CocoDataset, records: Sequence[dict[str, Any]] | None = None) -> TrainingSet:
    """What a run trains on; ``records``: in place of the set's own."""
    kept = SerializedList(dataset.records if records is None else records)
    return TrainingSet((dataset.metadata.name,), kept, dataset.metadata)
