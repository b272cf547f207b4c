"""Small things to train with Detectron2: a model whose gradients are known, a real R-CNN, and their data."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import DefaultTrainer, HookBase
from detectron2.modeling import META_ARCH_REGISTRY
from torch import Tensor, nn

from zenith_det.config import add_zenith_config, settle_files
from zenith_det.data import load_coco_dataset
from zenith_det.data.synthetic import generate
from zenith_det.engines.detectron2_engine import ZenithTrainerMixin, register_checked_dataset
from zenith_det.engines.detectron2_engine.engine import ENGINE

WEIGHTS = 12

# Convolutions of 64 pixels are not worth sharing, and threads that wait for each other take ten times as long.
torch.set_num_threads(1)


class KnownGradient(nn.Module):
    """Its loss is weights @ batch, so that the gradient is the batch, whatever the weights have become."""

    def __init__(self, cfg: Any) -> None:
        super().__init__()
        self.first = nn.Linear(WEIGHTS // 2, 1, bias=False)
        self.second = nn.Linear(WEIGHTS // 2, 1, bias=False)
        nn.init.constant_(self.first.weight, 1.0)
        nn.init.constant_(self.second.weight, -1.0)

    def forward(self, batch: list[Tensor]) -> dict[str, Tensor]:
        weights = torch.cat([self.first.weight.flatten(), self.second.weight.flatten()])
        return {"loss": torch.stack([weights @ sample for sample in batch]).mean()}


if "KnownGradient" not in META_ARCH_REGISTRY:
    META_ARCH_REGISTRY.register(KnownGradient)


def known_batches(images: int = 2, seed: int = 0) -> Iterator[list[Tensor]]:
    """Batches whose size falls, as gradients do; the same ones each time."""
    generator = torch.Generator().manual_seed(seed)
    number = 0
    while True:
        scale = 10.0 / (1 + number / 5)
        yield [scale * torch.randn(WEIGHTS, generator=generator) for _ in range(images)]
        number += 1


def known_norms(count: int, images: int = 2) -> list[float]:
    """The gradient norms that training on :func:`known_batches` meets."""
    batches = known_batches(images)
    return [float(torch.stack(next(batches)).mean(0).double().norm()) for _ in range(count)]


def zenith_ratios(norms: list[float], window: int) -> list[float]:
    """ZENITH.md's definition, line by line."""
    ratios, zenith = [], 0.0
    for t in range(len(norms)):
        if t + 1 < window:
            ratios.append(1.0)
            continue
        mean = sum(norms[t + 1 - window : t + 1]) / window
        zenith = max(zenith, mean)
        ratios.append(mean / zenith)
    return ratios


def known_cfg(output: Path, **solver: Any) -> Any:
    """A configuration for :class:`KnownGradient` under ZENITH."""
    cfg = get_cfg()
    add_zenith_config(cfg)
    cfg.MODEL.META_ARCHITECTURE = "KnownGradient"
    cfg.MODEL.DEVICE = "cpu"
    cfg.OUTPUT_DIR = str(output)
    cfg.SEED = 7
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ()
    cfg.SOLVER.LR_SCHEDULER_NAME = "WarmupZenithLR"
    cfg.SOLVER.BASE_LR = 0.01
    cfg.SOLVER.MOMENTUM = 0.0
    cfg.SOLVER.WEIGHT_DECAY = 0.0
    cfg.SOLVER.WARMUP_ITERS = 4
    cfg.SOLVER.WARMUP_FACTOR = 0.1
    cfg.SOLVER.IMS_PER_BATCH = 2
    cfg.SOLVER.MAX_ITER = 40
    cfg.SOLVER.ZENITH.WINDOW = 5
    for key, value in solver.items():
        cfg.SOLVER[key] = value
    return cfg


class KnownTrainer(ZenithTrainerMixin, DefaultTrainer):
    """A project's own trainer, with ZENITH put under it."""

    @classmethod
    def build_train_loader(cls, cfg: Any) -> Any:
        return known_batches(cfg.SOLVER.IMS_PER_BATCH)

    @classmethod
    def test(cls, cfg: Any, model: nn.Module, evaluators: Any = None) -> dict[str, Any]:
        return {}


class Trace(HookBase):
    """What each step did: the LRs it used (the first group's, and all), and the weights it left."""

    def __init__(self) -> None:
        self.lrs: list[float] = []
        self.all_lrs: list[list[float]] = []
        self.weights: list[Tensor] = []

    def after_step(self) -> None:
        model = self.trainer.model
        self.all_lrs.append(self.trainer.optimizer.effective_lrs())
        self.lrs.append(self.all_lrs[-1][0])
        self.weights.append(torch.cat([p.detach().flatten().clone() for p in model.parameters()]))


def trace_of(trainer: Any) -> Trace:
    """Train to the end and return what each step did."""
    trace = Trace()
    trainer.register_hooks([trace])
    trainer.train()
    return trace


@contextlib.contextmanager
def log_lines(*names: str) -> Iterator[list[str]]:
    """What is logged under these names, however the loggers are set up."""
    lines: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    collect = Collect(logging.INFO)
    before = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).addHandler(collect)
        logging.getLogger(name).setLevel(logging.INFO)
    try:
        yield lines
    finally:
        for name in names:
            logging.getLogger(name).removeHandler(collect)
            logging.getLogger(name).setLevel(before[name])


def metrics(output: Path) -> list[dict[str, Any]]:
    """The lines of ``metrics.json``, refusing what is not JSON (NaN)."""

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} in metrics.json")

    lines = (output / "metrics.json").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def record_images(trainer: Any) -> list[list[int]]:
    """The image ids of each batch that the trainer's model gets in this process, as they come."""
    seen: list[list[int]] = []
    model = getattr(trainer.model, "module", trainer.model)
    forward = model.forward

    def recording(batch: Any) -> Any:
        if model.training:
            seen.append([sample["image_id"] for sample in batch])
        return forward(batch)

    model.forward = recording
    return seen


def same(one: Any, other: Any) -> bool:
    """Whether two checkpoints, or parts of them, are equal bit for bit."""
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


# ---- a real R-CNN


def synthetic_set(folder: Path, task: str = "instances", train: int = 12, val: int = 4) -> dict[str, Any]:
    """A generated set; its files by split."""
    return generate(folder, train=train, val=val, size=64, task=task)


def register_synthetic(name: str, files: Any) -> None:
    """Make a split of :func:`synthetic_set` Detectron2's dataset of that name, as checked by us."""
    register_checked_dataset(name, load_coco_dataset((str(files.json_file), str(files.image_root))))


def read_sets(loaded: Any) -> None:
    """Check and register the sets of a configuration, as a run does."""
    settle_files(loaded)
    first = ENGINE.training_set(loaded).metadata
    ENGINE.test_sets(loaded, first and first.thing_classes)


def forget(name: str) -> None:
    """Take a dataset out of Detectron2's catalogs."""
    if name in DatasetCatalog.list():
        DatasetCatalog.remove(name)
    if name in MetadataCatalog.list():
        MetadataCatalog.remove(name)


def rcnn_keys() -> dict[str, Any]:
    """The keys of a very small R-CNN: ResNet-18-FPN with GroupNorm, 32 channels, 64-pixel images."""
    return {
        "MODEL.DEVICE": "cpu",
        "MODEL.BACKBONE.NAME": "build_resnet_fpn_backbone",
        "MODEL.BACKBONE.FREEZE_AT": 0,
        "MODEL.RESNETS.DEPTH": 18,
        "MODEL.RESNETS.RES2_OUT_CHANNELS": 64,
        "MODEL.RESNETS.NORM": "GN",
        "MODEL.RESNETS.OUT_FEATURES": ["res2", "res3", "res4", "res5"],
        "MODEL.FPN.IN_FEATURES": ["res2", "res3", "res4", "res5"],
        "MODEL.FPN.OUT_CHANNELS": 32,
        "MODEL.FPN.NORM": "GN",
        "MODEL.ANCHOR_GENERATOR.SIZES": [[8], [16], [32], [48], [64]],
        "MODEL.RPN.IN_FEATURES": ["p2", "p3", "p4", "p5", "p6"],
        "MODEL.RPN.PRE_NMS_TOPK_TRAIN": 60,
        "MODEL.RPN.PRE_NMS_TOPK_TEST": 60,
        "MODEL.RPN.POST_NMS_TOPK_TRAIN": 30,
        "MODEL.RPN.POST_NMS_TOPK_TEST": 30,
        "MODEL.ROI_HEADS.NAME": "StandardROIHeads",
        "MODEL.ROI_HEADS.IN_FEATURES": ["p2", "p3", "p4", "p5"],
        "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 16,
        "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0,
        "MODEL.ROI_BOX_HEAD.NAME": "FastRCNNConvFCHead",
        "MODEL.ROI_BOX_HEAD.NUM_FC": 1,
        "MODEL.ROI_BOX_HEAD.FC_DIM": 32,
        "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": 7,
        "MODEL.ROI_MASK_HEAD.NAME": "MaskRCNNConvUpsampleHead",
        "MODEL.ROI_MASK_HEAD.NUM_CONV": 1,
        "MODEL.ROI_MASK_HEAD.CONV_DIM": 32,
        "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION": 7,
        "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS": (32, 32),
        "MODEL.ROI_KEYPOINT_HEAD.POOLER_RESOLUTION": 7,
        "MODEL.PIXEL_STD": [57.375, 57.12, 58.395],
        "INPUT.MIN_SIZE_TRAIN": (64,),
        "INPUT.MAX_SIZE_TRAIN": 96,
        "INPUT.MIN_SIZE_TEST": 64,
        "INPUT.MAX_SIZE_TEST": 96,
        "INPUT.MASK_FORMAT": "bitmask",
        "DATALOADER.NUM_WORKERS": 0,
        "SOLVER.IMS_PER_BATCH": 2,
        "SOLVER.BASE_LR": 0.01,
        "SOLVER.MAX_ITER": 8,
        "SOLVER.WARMUP_ITERS": 2,
        "SOLVER.LR_SCHEDULER_NAME": "WarmupZenithLR",
        "SOLVER.ZENITH.WINDOW": 3,
        "SEED": 3,
    }


def rcnn_opts(**more: Any) -> list[str]:
    """:func:`rcnn_keys` as a command line gives them; ``more`` with ``__`` for the dots."""
    keys = {**rcnn_keys(), **{key.replace("__", "."): value for key, value in more.items()}}
    return [str(word) for pair in keys.items() for word in pair]


def rcnn_cfg(output: Path, train: str, test: str = "", **more: Any) -> Any:
    """The small R-CNN's configuration, as a Detectron2 project makes one."""
    cfg = get_cfg()
    add_zenith_config(cfg)
    cfg.merge_from_list(rcnn_opts(**more))
    cfg.DATASETS.TRAIN = (train,)
    cfg.DATASETS.TEST = (test,) if test else ()
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = len(MetadataCatalog.get(train).thing_classes)
    cfg.OUTPUT_DIR = str(output)
    return cfg
