"""Detectron2 as an engine: any of its models, datasets, mappers, samplers and evaluators."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.data import get_detection_dataset_dicts
from detectron2.data import transforms as T
from detectron2.data.detection_utils import convert_image_to_rgb
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN, GeneralizedRCNNWithTTA
from detectron2.modeling import build_model as build_detectron2_model
from detectron2.structures import BitMasks, PolygonMasks, RotatedBoxes
from detectron2.utils import comm
from detectron2.utils.events import EventStorage as Detectron2EventStorage
from fvcore.nn.precise_bn import get_bn_modules, update_bn_stats
from torch import nn

from zenith_det.config import CfgNode, LoadedConfig
from zenith_det.config.keys import leaves
from zenith_det.data import DatasetMetadata
from zenith_det.data.pixel_formats import CHANNELS, to_rgb
from zenith_det.engines.data_description import DataDescription
from zenith_det.engines.detectron2_engine.checkpoint import SafeCheckpointer
from zenith_det.engines.detectron2_engine.config import auto_scale_workers, to_detectron2
from zenith_det.engines.detectron2_engine.data import (
    AtLeastAPixel,
    SeededMapper,
    as_tensor,
    build_test_loader,
    checked_dataset,
    mapper_for,
    register_sets,
    register_training_sets,
    training_set_of,
)
from zenith_det.engines.detectron2_engine.evaluation import build_evaluator, detections, unless_stopped
from zenith_det.engines.detectron2_engine.foreign_data import reading_foreign_datasets
from zenith_det.engines.detectron2_engine.models import (
    HAS_MASK,
    as_the_built_in_engine,
    compute_as_configured,
)
from zenith_det.engines.engine import Batch, Detections, Engine, Record, Sample, TestSet, TrainingSet
from zenith_det.engines.input_format import check_channels
from zenith_det.errors import ConfigError
from zenith_det.training.logs.events import EventStorage
from zenith_det.training.processes.stopping import WaitStopped

logger = logging.getLogger(__name__)

__all__ = ["ENGINE", "Detectron2Engine", "join_machine"]


class Detectron2Engine:
    """See :class:`~zenith_det.engines.engine.Engine`."""

    name = "detectron2"
    loggers: tuple[str, ...] = ("detectron2", "fvcore")

    def prepare(self, loaded: LoadedConfig) -> None:
        join_machine()
        weights = loaded.cfg.MODEL.WEIGHTS
        if re.fullmatch(r"\w+_Weights\.\w+", weights):
            raise ConfigError(
                f"MODEL.WEIGHTS {weights} is torchvision's name, which the built-in engine takes "
                "(--engine torchvision); here take detectron2://ImageNetPretrained/torchvision/R-50.pkl or a file"
            )
        check_channels(loaded.cfg)
        check_tta(loaded.cfg)
        before = to_detectron2(loaded.cfg)
        scaled = auto_scale_workers(before, comm.get_world_size())
        if scaled is not before:
            unscaled = dict(leaves(loaded.cfg))
            for key, value in leaves(scaled):
                if unscaled[key] != value:
                    loaded.override(key, value, "SOLVER.REFERENCE_WORLD_SIZE")

    # ---- data

    def training_set(self, loaded: LoadedConfig, description: DataDescription | None = None) -> TrainingSet:
        metadata = register_training_sets(loaded, description)
        cfg = to_detectron2(loaded.cfg)
        with reading_foreign_datasets(loaded):
            return training_set_of(cfg, metadata)

    def test_sets(self, loaded: LoadedConfig, classes: Sequence[str] | None) -> list[TestSet]:
        register_sets(loaded, "TEST", classes)
        cfg = to_detectron2(loaded.cfg)
        return [test_set(name) for name in cfg.DATASETS.TEST]

    def training_mapper(
        self, cfg: CfgNode, names: Sequence[str], metadata: DatasetMetadata | None
    ) -> Callable[[Record, np.random.Generator], Sample]:
        if cfg.INPUT.CROP.ENABLED and cfg.MODEL.MASK_ON and importlib.util.find_spec("shapely") is None:
            raise ConfigError(
                "INPUT.CROP.ENABLED: Detectron2 cuts masks with the package shapely, which isn't installed: "
                "pip install shapely"
            )
        return SeededMapper(mapper_for(to_detectron2(cfg), names, is_train=True))

    def shown(self, cfg: CfgNode, sample: Sample) -> tuple[np.ndarray, Detections]:
        pixels, name = sample["image"].permute(1, 2, 0).numpy(), cfg.INPUT.FORMAT
        if name in CHANNELS:
            pixels = to_rgb(pixels, name)[..., ::-1]
        else:  # of another of Pillow's modes, for sets that Detectron2 itself reads
            rgb = convert_image_to_rgb(pixels, name)
            pixels = np.clip(rgb, 0, 255).astype(np.uint8)[..., ::-1]
        if "instances" not in sample:  # of a model of semantic segmentation
            return pixels, {"boxes": np.zeros((0, 4)), "classes": np.zeros(0, np.int64)}
        objects = sample["instances"]
        found = {"boxes": _upright(objects.gt_boxes), "classes": objects.gt_classes.numpy()}
        if objects.has("gt_masks"):
            masks = objects.gt_masks
            if isinstance(masks, PolygonMasks):
                masks = BitMasks.from_polygon_masks(masks, *pixels.shape[:2])
            found["masks"] = masks.tensor.numpy()
            if objects.has(HAS_MASK):
                found["masks"] = found["masks"] & objects.get(HAS_MASK).numpy()[:, None, None]
        if objects.has("gt_keypoints"):
            found["keypoints"] = objects.gt_keypoints.tensor.numpy()
        return pixels, found

    def test_mapper(self, cfg: CfgNode, names: Sequence[str]) -> Callable[[Record], Sample]:
        mapper: Callable[[Record], Sample] = mapper_for(to_detectron2(cfg), names, is_train=False)
        return mapper

    def image_mapper(self, cfg: CfgNode) -> Callable[[np.ndarray], Sample]:
        short = cfg.INPUT.MIN_SIZE_TEST
        resize = AtLeastAPixel(T.ResizeShortestEdge([short, short], cfg.INPUT.MAX_SIZE_TEST))

        def sample(pixels: np.ndarray) -> Sample:
            height, width = pixels.shape[:2]
            resized = resize.get_transform(pixels).apply_image(pixels)
            return {"image": as_tensor(resized), "height": height, "width": width}

        return sample

    # ---- the model

    def build_model(self, cfg: CfgNode) -> nn.Module:
        theirs = to_detectron2(cfg)
        model: nn.Module = build_detectron2_model(theirs)
        as_the_built_in_engine(model)
        compute_as_configured(theirs, model)
        return model

    def load_weights(
        self, cfg: CfgNode, model: nn.Module, *, require_all: bool = False
    ) -> tuple[int, int] | None:
        allow = cfg.MODEL.WEIGHTS_ALLOW_MISMATCH
        checkpointer = SafeCheckpointer(model, "", allow_mismatch=allow, require_all=require_all)
        checkpointer.load(cfg.MODEL.WEIGHTS)
        return checkpointer.loaded

    def recording(self, storage: EventStorage) -> contextlib.AbstractContextManager[Any]:
        return _Forwarding(storage)

    # ---- evaluation

    def detections(self, output: Any) -> Detections:
        return detections(output)

    def evaluate_other(
        self, cfg: CfgNode, model: nn.Module, test_set: TestSet, folder: Path
    ) -> dict[str, float]:
        return self._evaluate_by_library(cfg, model, test_set.name, folder)

    def _evaluate_by_library(
        self, cfg: CfgNode, model: nn.Module, name: str, folder: Path
    ) -> dict[str, float]:
        theirs = to_detectron2(cfg)
        evaluator = unless_stopped(build_evaluator(theirs, name, str(folder)))
        found = inference_on_dataset(model, build_test_loader(theirs, name), evaluator)
        if not comm.is_main_process():
            return {}
        print_csv_format(found)
        flat = {key: float(value) for key, value in flatten_results_dict(found).items()}
        return {key: value for key, value in flat.items() if math.isfinite(value)}

    def before_evaluation(
        self, cfg: CfgNode, model: nn.Module, batches: Callable[[], Iterator[Batch]]
    ) -> None:
        settings = cfg.TEST.PRECISE_BN
        if not settings.ENABLED or not get_bn_modules(model):
            return
        logger.info("exact BatchNorm statistics from %d batches (TEST.PRECISE_BN)", settings.NUM_ITER)
        modules = get_bn_modules(model)
        before = [
            (module.momentum, {k: v.clone() for k, v in module.state_dict().items()}) for module in modules
        ]
        try:
            with Detectron2EventStorage():  # what the model logs by itself is not training's
                # From the same images each time, so that a resumed run comes to the same statistics.
                update_bn_stats(model, batches(), settings.NUM_ITER)
        except WaitStopped:  # the run has to end: it saves itself as it was, and evaluates nothing
            for module, (momentum, state) in zip(modules, before):
                module.momentum = momentum
                module.load_state_dict(state)

    def augmented(self, cfg: CfgNode, model: nn.Module, metadata: DatasetMetadata | None) -> nn.Module:
        with_augmentation: nn.Module = GeneralizedRCNNWithTTA(to_detectron2(cfg), model)
        return with_augmentation


class _Forwarding(Detectron2EventStorage):
    """The storage that Detectron2's models find, which hands on to the run's own."""

    def __init__(self, storage: EventStorage) -> None:
        self._storage = storage
        super().__init__()

    @property
    def _iter(self) -> int:
        return self._storage.iter

    @_iter.setter
    def _iter(self, value: int) -> None:
        pass  # the loop sets the other's

    def put_scalar(
        self, name: str, value: Any, smoothing_hint: bool = True, cur_iter: int | None = None
    ) -> None:
        super().put_scalar(name, value, smoothing_hint, cur_iter)
        self._storage.put_scalar(self._current_prefix + name, value, smoothing_hint, iteration=cur_iter)

    def put_image(self, img_name: str, img_tensor: Any) -> None:
        if torch.is_grad_enabled():  # the images of validation losses are not trained on
            self._storage.images.append((img_name, img_tensor, self._iter))

    def put_histogram(self, hist_name: str, hist_tensor: torch.Tensor, bins: int = 1000) -> None:
        super().put_histogram(hist_name, hist_tensor, bins)
        self._storage.histograms.append(self._histograms.pop())


def check_tta(cfg: Any) -> None:
    """Refuse what Detectron2 can't augment at test time, which it would tell when the training is over.

    Raises:
        ConfigError: ``TEST.AUG`` is asked of keypoints, of precomputed proposals or of another kind of model.
    """
    if not cfg.TEST.AUG.ENABLED:
        return
    model = cfg.MODEL
    if model.KEYPOINT_ON:
        what = "keypoints (--engine torchvision can)"
    elif model.LOAD_PROPOSALS:
        what = "precomputed proposals"
    elif not _is_generalized_rcnn(model.META_ARCHITECTURE):
        what = f"MODEL.META_ARCHITECTURE {model.META_ARCHITECTURE}, which is no GeneralizedRCNN"
    else:
        return
    raise ConfigError(
        f"TEST.AUG.ENABLED is True, but Detectron2 has no test-time augmentation for {what}: set it False"
    )


def _is_generalized_rcnn(name: str) -> bool:
    # A name that isn't known is told of where the model is built.
    return name not in META_ARCH_REGISTRY or issubclass(META_ARCH_REGISTRY.get(name), GeneralizedRCNN)


def join_machine() -> None:
    """Tell Detectron2 which processes share a machine, where its own ``launch`` did not start them."""
    if comm.get_world_size() == 1:
        return
    try:
        comm.get_local_rank()
    except AssertionError:
        comm.create_local_process_group(int(os.environ.get("LOCAL_WORLD_SIZE", comm.get_world_size())))


def _upright(boxes: Any) -> np.ndarray:
    """xyxy ``(N, 4)``; of rotated boxes, what is around them."""
    if isinstance(boxes, RotatedBoxes):
        x, y, width, height, degrees = boxes.tensor.numpy().T
        sin, cos = np.abs(np.sin(np.radians(degrees))), np.abs(np.cos(np.radians(degrees)))
        half = np.stack((width * cos + height * sin, width * sin + height * cos), axis=1) / 2
        middle = np.stack((x, y), axis=1)
        return np.concatenate((middle - half, middle + half), axis=1)
    corners: np.ndarray = boxes.tensor.numpy()
    return corners


def test_set(name: str) -> TestSet:
    """One of Detectron2's sets to evaluate on."""

    def read() -> Sequence[Record]:
        records: Sequence[Record] = get_detection_dataset_dicts([name], filter_empty=False)
        return records

    return TestSet(name, checked_dataset(name), read)


ENGINE: Engine = Detectron2Engine()
