"""The shipped configs at work on real COCO images: full-size models, every baseline."""

from __future__ import annotations

import re
from itertools import islice
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT
from tests.engines.test_train_net import SMALL, train_net
from tests.engines.torchvision_engine.small_models import training_set
from zenith_det.config import follow_dataset, load_config
from zenith_det.engines.batches import build_train_loader
from zenith_det.engines.torchvision_engine.datasets import load_training_set
from zenith_det.engines.torchvision_engine.input_pipeline import TrainingMapper
from zenith_det.engines.torchvision_engine.rcnn import build_model
from zenith_det.solver import build_lr_scheduler, build_optimizer, train_mode

FULL_SIZE = sorted(p.name for p in (ROOT / "configs").glob("*_rcnn_zenith.yaml"))
BASELINES = sorted(p.name for p in (ROOT / "configs" / "baselines").glob("*_rcnn_*.yaml"))


def steps(config: Path, count: int, *opts: str) -> list[float]:
    """Total losses of ``count`` training steps from scratch, a real image each."""
    loaded = load_config(
        str(config),
        [
            "MODEL.DEVICE",
            "cpu",
            "MODEL.WEIGHTS",
            "",
            "SOLVER.IMS_PER_BATCH",
            "1",
            "DATALOADER.NUM_WORKERS",
            "0",
            *opts,
        ],
    )
    cfg = loaded.cfg
    dataset = load_training_set(cfg)
    metadata = dataset.metadata
    follow_dataset(
        loaded, metadata.name, metadata.num_classes, metadata.num_keypoints, metadata.keypoint_oks_sigmas
    )
    torch.manual_seed(0)
    model = build_model(cfg)
    optimizer = build_optimizer(cfg, model)
    train_mode(optimizer)
    scheduler = build_lr_scheduler(cfg, optimizer)
    before = [p.detach().clone() for p in model.parameters() if p.requires_grad]
    losses = []
    loader = build_train_loader(cfg, training_set(dataset), TrainingMapper(cfg, metadata), seed=0, start=0)
    for batch in islice(loader, count):
        optimizer.zero_grad()
        total = sum(model(batch).values())
        total.backward()
        optimizer.step()
        scheduler.step()
        losses.append(total.item())
    after = [p for p in model.parameters() if p.requires_grad]
    assert any(not torch.equal(a, b) for a, b in zip(after, before)), "no parameter moved"
    assert all(p.isfinite().all() for p in after)
    return losses


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL_SIZE)
def test_full_size_config_takes_a_step(real_coco: Path, name: str) -> None:
    # Random weights under frozen norms overflow; GroupNorm in their place is the same size.
    (loss,) = steps(ROOT / "configs" / name, 1, "MODEL.RESNETS.NORM", "GN")
    assert 0 < loss < 100


@pytest.mark.parametrize("name", BASELINES)
def test_baseline_takes_steps(real_coco: Path, name: str) -> None:
    small = ["MODEL.RESNETS.NORM", "GN", "INPUT.MIN_SIZE_TRAIN", "(128,)", "INPUT.MAX_SIZE_TRAIN", "192"]
    small += ["MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", "(64, 64)", "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "32"]
    losses = steps(ROOT / "configs" / "baselines" / name, 2, *small)
    assert all(0 < loss < 100 for loss in losses)


@pytest.mark.parametrize(
    ("task", "names", "aps"),
    [("mask", "coco_2017", ["bbox", "segm"]), ("keypoint", "keypoints_coco_2017", ["bbox", "keypoints"])],
)
def test_quickstart_on_coco_by_name(
    real_coco: Path, tmp_path: Path, task: str, names: str, aps: list[str]
) -> None:
    """80 classes (or one), crowds, Detectron2's dataset names: trains, evaluates, prints every AP."""
    done = train_net(
        "--config-file", str(ROOT / "configs" / "quickstart" / f"{task}_rcnn_zenith_adamw.yaml"),
        "DATASETS.TRAIN", f"('{names}_train',)", "DATASETS.TEST", f"('{names}_val',)",
        *SMALL, "SOLVER.MAX_ITER", "2", "TEST.MAX_IMAGES", "6", "OUTPUT_DIR", str(tmp_path),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for task_name in aps:
        assert f"copypaste: Task: {task_name}" in done.stdout
    assert re.search(rf"{names}_train: 80 images", done.stdout)
