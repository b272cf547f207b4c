"""zenith_det: train Faster, Mask and Keypoint R-CNN without guessing a learning-rate schedule.

What this package offers to programs are the names in ``__all__`` here and in the packages below it; docs/API.md
describes them. Importing it is light: each name is imported when it is first asked for, and with it torch,
torchvision or Detectron2 if it needs one.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zenith_det.config import CfgNode, LoadedConfig, add_zenith_config, get_cfg, load_config
    from zenith_det.data import (
        CocoDataset,
        DatasetMetadata,
        examine_coco_dataset,
        load_coco_dataset,
        register_coco_dataset,
    )
    from zenith_det.engines.detectron2_engine import ZenithMetrics, ZenithTrainer, ZenithTrainerMixin
    from zenith_det.errors import CheckpointError, ConfigError, DatasetError, RunStopped, UserError
    from zenith_det.evaluation import evaluate_coco
    from zenith_det.optim import ZENITH, ZENITHAdamW, ZenithRatio, zenith_of
    from zenith_det.predicting.prediction import Prediction
    from zenith_det.predicting.predictor import Predictor
    from zenith_det.solver import (
        LR_SCHEDULER_REGISTRY,
        OPTIMIZER_REGISTRY,
        build_lr_scheduler,
        build_optimizer,
        effective_lrs,
    )

__version__ = "0.1.0"

__all__ = [
    "LR_SCHEDULER_REGISTRY",
    "OPTIMIZER_REGISTRY",
    "ZENITH",
    "CfgNode",
    "CheckpointError",
    "CocoDataset",
    "ConfigError",
    "DatasetError",
    "DatasetMetadata",
    "LoadedConfig",
    "Prediction",
    "Predictor",
    "RunStopped",
    "UserError",
    "ZENITHAdamW",
    "ZenithMetrics",
    "ZenithRatio",
    "ZenithTrainer",
    "ZenithTrainerMixin",
    "add_zenith_config",
    "build_lr_scheduler",
    "build_optimizer",
    "effective_lrs",
    "evaluate_coco",
    "examine_coco_dataset",
    "get_cfg",
    "load_coco_dataset",
    "load_config",
    "register_coco_dataset",
    "zenith_of",
]

# What is imported when it is asked for: the imports above, for programs that run.
_MODULES = {
    "config": (
        "CfgNode",
        "LoadedConfig",
        "add_zenith_config",
        "get_cfg",
        "load_config",
    ),
    "data": (
        "CocoDataset",
        "DatasetMetadata",
        "examine_coco_dataset",
        "load_coco_dataset",
        "register_coco_dataset",
    ),
    "engines.detectron2_engine": (
        "ZenithMetrics",
        "ZenithTrainer",
        "ZenithTrainerMixin",
    ),
    "errors": (
        "CheckpointError",
        "ConfigError",
        "DatasetError",
        "RunStopped",
        "UserError",
    ),
    "evaluation": ("evaluate_coco",),
    "optim": (
        "ZENITH",
        "ZENITHAdamW",
        "ZenithRatio",
        "zenith_of",
    ),
    "predicting.prediction": ("Prediction",),
    "predicting.predictor": ("Predictor",),
    "solver": (
        "LR_SCHEDULER_REGISTRY",
        "OPTIMIZER_REGISTRY",
        "build_lr_scheduler",
        "build_optimizer",
        "effective_lrs",
    ),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
