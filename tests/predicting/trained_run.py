"""A run's folder with a small model of random weights, for whatever uses trained models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.engines.torchvision_engine.small_models import small_config
from zenith_det.config import LoadedConfig
from zenith_det.data import CocoDataset
from zenith_det.engines.torchvision_engine.rcnn import build_model
from zenith_det.training.course.resume_report import config_facts


def write_run(folder: Path, task: str, dataset: CocoDataset, **overrides: Any) -> LoadedConfig:
    """Write ``config.yaml`` and ``model_final.pth`` as a run leaves them.

    Args:
        folder: is made.
        task: "faster", "mask" or "keypoint".
        dataset: gives the classes.
        overrides: see :func:`small_config`; every score is kept unless they say otherwise.
    """
    folder.mkdir(parents=True, exist_ok=True)
    metadata = dataset.metadata
    values = {
        "MODEL__ROI_HEADS__SCORE_THRESH_TEST": 0.0,
        "MODEL__ROI_HEADS__NUM_CLASSES": metadata.num_classes,
        "MODEL__ROI_KEYPOINT_HEAD__NUM_KEYPOINTS": metadata.num_keypoints or 17,
    }
    loaded = small_config(task, **(values | overrides))
    torch.manual_seed(0)
    state = {
        "model": build_model(loaded.cfg).state_dict(),
        "dataset": metadata.to_dict(),
        "engine": "torchvision",
        "config": config_facts(loaded.cfg),
    }
    torch.save(state, folder / "model_final.pth")
    (folder / "config.yaml").write_text(loaded.cfg.dump())
    return loaded
