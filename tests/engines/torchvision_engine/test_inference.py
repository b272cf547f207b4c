"""Evaluation on the built-in engine: what counts for AP."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from tests.data import builders
from tests.engines.torchvision_engine.small_models import small_config
from zenith_det.data import load_coco_dataset
from zenith_det.engines.engine import TestSet, load_engine
from zenith_det.engines.evaluating import evaluate


class Says(nn.Module):
    """A model that finds the same in each image."""

    def __init__(self, boxes: torch.Tensor, scores: torch.Tensor) -> None:
        super().__init__()
        self._found = {
            "boxes": boxes,
            "scores": scores,
            "classes": torch.zeros(len(scores), dtype=torch.int64),
        }

    def forward(self, batch: list[object]) -> list[dict[str, torch.Tensor]]:
        return [self._found for _ in batch]


def test_more_detections_of_a_class_than_coco_counts_change_nothing(tmp_path: Path) -> None:
    """COCO takes the 100 best of a class in an image, and so does Detectron2, however many a model keeps."""
    data = builders.content(1)
    second = {**data["annotations"][0], "id": 2, "bbox": [20, 10, 10, 10]}
    second.pop("segmentation")
    data["annotations"].append(second)
    dataset = load_coco_dataset(builders.write(tmp_path, data))
    # The first object's box comes first, then 149 on nothing, and last the second object's.
    nothing = torch.tensor([[35.0, 25.0, 39.0, 29.0]]).repeat(149, 1)
    boxes = torch.cat(
        [torch.tensor([[5.0, 5.0, 15.0, 15.0]]), nothing, torch.tensor([[20.0, 10.0, 30.0, 20.0]])]
    )
    cfg = small_config("faster", TEST__DETECTIONS_PER_IMAGE=300, MODEL__ROI_HEADS__NUM_CLASSES=1).cfg
    model = Says(boxes, torch.linspace(1.0, 0.5, len(boxes)))
    scalars, results = evaluate(
        load_engine("torchvision"), cfg, model, TestSet("set", dataset), tmp_path / "run"
    )
    assert len(results) == 151
    # Half of the objects at precision 1: COCO looks at 101 recalls, of which 51 are at most 0.5.
    assert scalars["bbox/AP"] == pytest.approx(100 * 51 / 101)
