"""The built-in engine: R-CNN on torchvision's operators."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from zenith_det.config import CfgNode, LoadedConfig, follow_dataset
from zenith_det.data import DatasetMetadata, SerializedList
from zenith_det.data.pixel_formats import to_rgb
from zenith_det.engines.data_description import DataDescription
from zenith_det.engines.engine import Batch, Detections, Engine, Record, Sample, TestSet, TrainingSet
from zenith_det.engines.input_format import check_channels
from zenith_det.engines.torchvision_engine.datasets import load_training_set, repeats
from zenith_det.engines.torchvision_engine.input_pipeline import TestMapper, TrainingMapper
from zenith_det.engines.torchvision_engine.masks import as_bitmap
from zenith_det.engines.torchvision_engine.rcnn import GeneralizedRCNN, build_model
from zenith_det.engines.torchvision_engine.support import check_supported
from zenith_det.engines.torchvision_engine.training_pictures import recording
from zenith_det.engines.torchvision_engine.tta import RCNNWithTTA
from zenith_det.engines.torchvision_engine.weights import load_weights
from zenith_det.engines.training_set import dataset_sources, load_sets
from zenith_det.errors import ConfigError
from zenith_det.training.logs.events import EventStorage
from zenith_det.training.processes.distributed import get_world_size

__all__ = ["ENGINE", "TorchvisionEngine"]


class TorchvisionEngine:
    """See :class:`~zenith_det.engines.engine.Engine`."""

    name = "torchvision"
    loggers: tuple[str, ...] = ()

    def prepare(self, loaded: LoadedConfig) -> None:
        check_supported(loaded)
        check_channels(loaded.cfg)
        cfg = loaded.cfg
        if cfg.MODEL.RESNETS.NORM == "SyncBN" and (get_world_size() == 1 or cfg.MODEL.DEVICE == "cpu"):
            raise ConfigError(
                "MODEL.RESNETS.NORM is 'SyncBN', which needs several GPUs: use 'BN' on one device"
            )

    def training_set(self, loaded: LoadedConfig, description: DataDescription | None = None) -> TrainingSet:
        found = load_training_set(loaded.cfg, description)
        of = found.metadata
        follow_dataset(loaded, of.name, of.num_classes, of.num_keypoints, of.keypoint_oks_sigmas)
        return TrainingSet(
            tuple(loaded.cfg.DATASETS.TRAIN),
            SerializedList(found.records),
            of,
            repeats(loaded.cfg, found.records),
        )

    def test_sets(self, loaded: LoadedConfig, classes: Sequence[str] | None) -> list[TestSet]:
        cfg = loaded.cfg
        sets = load_sets(cfg, "TEST", dataset_sources(cfg, "TEST"), classes)
        return [TestSet(name, one) for name, one in zip(cfg.DATASETS.TEST, sets)]

    def build_model(self, cfg: CfgNode) -> nn.Module:
        return build_model(cfg)

    def load_weights(
        self, cfg: CfgNode, model: nn.Module, *, require_all: bool = False
    ) -> tuple[int, int] | None:
        report = load_weights(cfg, model, require_all=require_all)
        return None if report is None else (len(report.matched), report.total)

    def training_mapper(
        self, cfg: CfgNode, names: Sequence[str], metadata: DatasetMetadata | None
    ) -> Callable[[Record, np.random.Generator], Sample]:
        assert metadata is not None
        return TrainingMapper(cfg, metadata)

    def shown(self, cfg: CfgNode, sample: Sample) -> tuple[np.ndarray, Detections]:
        pixels = sample["image"].permute(1, 2, 0).numpy()
        targets = sample["targets"]
        found = {"boxes": targets.boxes.numpy(), "classes": targets.classes.numpy()}
        if targets.masks is not None:
            size = pixels.shape[:2]
            found["masks"] = np.array([as_bitmap(mask, *size) for mask in targets.masks]).reshape(-1, *size)
        if targets.keypoints is not None:
            found["keypoints"] = targets.keypoints.numpy()
        return to_rgb(pixels, cfg.INPUT.FORMAT)[..., ::-1], found

    def test_mapper(self, cfg: CfgNode, names: Sequence[str]) -> Callable[[Record], Sample]:
        return TestMapper(cfg)

    def image_mapper(self, cfg: CfgNode) -> Callable[[np.ndarray], Sample]:
        return TestMapper(cfg).from_image

    def detections(self, output: Any) -> Detections:
        return {name: value.cpu().numpy() for name, value in output.items()}

    def evaluate_other(
        self, cfg: CfgNode, model: nn.Module, test_set: TestSet, folder: Path
    ) -> dict[str, float]:
        raise NotImplementedError  # all of its sets are checked

    def recording(self, storage: EventStorage) -> AbstractContextManager[Any]:
        return recording(storage)

    def before_evaluation(
        self, cfg: CfgNode, model: nn.Module, batches: Callable[[], Iterator[Batch]]
    ) -> None:
        pass

    def augmented(self, cfg: CfgNode, model: nn.Module, metadata: DatasetMetadata | None) -> nn.Module:
        assert isinstance(model, GeneralizedRCNN)
        return RCNNWithTTA(cfg, model, metadata.keypoint_flip_indices if metadata else ())


ENGINE: Engine = TorchvisionEngine()
