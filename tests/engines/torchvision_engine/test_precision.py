"""``SOLVER.AMP`` in the built-in engine: what a user of bfloat16 on the CPU gets."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import SmallSet
from tests.engines.torchvision_engine.small_models import small_config
from zenith_det.config import load_config
from zenith_det.engines import device
from zenith_det.engines.device import resolve_device
from zenith_det.engines.engine import load_engine
from zenith_det.engines.probe import make_trainer
from zenith_det.engines.torchvision_engine.roi_heads import AlignedPooler, rois_of
from zenith_det.errors import ConfigError

torch.set_num_threads(1)

CONFIG = "configs/quickstart/mask_rcnn_zenith.yaml"


def trainer_for(data: SmallSet, output: Path, task: str = "mask", **keys: Any) -> Any:
    keys = {
        "DATASETS__TRAIN_JSON": data.train[0],
        "DATASETS__TRAIN_IMAGES": data.train[1],
        "MODEL__WEIGHTS": "",
        "INPUT__MIN_SIZE_TRAIN": (64,),
        "OUTPUT_DIR": str(output),
        "SOLVER__IMS_PER_BATCH": 2,
        "SOLVER__WARMUP_ITERS": 0,
        "SOLVER__BASE_LR": 0.001,
        "SEED": 3,
        "MODEL__ROI_HEADS__NUM_CLASSES": 1 if task == "keypoint" else 6,
        **keys,
    }
    loaded = small_config(task, **keys)
    resolve_device(loaded)
    return make_trainer(load_engine("torchvision"), loaded)


def losses_of(trainer: Any, iterations: int) -> list[dict[str, float]]:
    for _ in range(iterations):
        trainer.iterate()
    trainer.guard.inspect()
    assert trainer.guard.skipped == 0
    return [{name: float(value) for name, value in losses.items()} for _, losses in trainer._losses]


@pytest.mark.parametrize("task", ["mask", "keypoint"])
def test_bfloat16_on_the_cpu_trains_like_float32(
    task: str, shapes: SmallSet, figures: SmallSet, tmp_path: Path
) -> None:
    data = figures if task == "keypoint" else shapes
    exact = losses_of(trainer_for(data, tmp_path / "32", task), 4)
    trainer = trainer_for(
        data, tmp_path / "16", task, SOLVER__AMP__ENABLED=True, SOLVER__AMP__DTYPE="bfloat16"
    )
    seen: list[torch.dtype] = []
    trainer.model.backbone.fpn.register_forward_hook(
        lambda _m, _i, out: seen.append(next(iter(out.values())).dtype)
    )
    rounded = losses_of(trainer, 4)
    assert set(seen) == {torch.bfloat16}
    assert all(p.dtype is torch.float32 for p in trainer.model.parameters())
    assert not trainer.scaler.is_enabled()
    # The first iteration is the same model on the same images: the losses differ by rounding, and the boxes' by which
    # of the few proposals with an object are drawn.
    assert rounded[0] == pytest.approx(
        exact[0] | {"loss_box_reg": rounded[0]["loss_box_reg"]}, rel=0.05, abs=0.02
    )
    assert rounded[0]["loss_box_reg"] == pytest.approx(exact[0]["loss_box_reg"], rel=0.3)
    for mine, theirs in zip(rounded, exact):
        assert sum(mine.values()) == pytest.approx(sum(theirs.values()), rel=0.2)


def test_float16_and_bfloat16_on_the_cpu(caplog: pytest.LogCaptureFixture) -> None:
    loaded = load_config(CONFIG, ["MODEL.DEVICE", "cpu", "SOLVER.AMP.ENABLED", "True"])
    resolve_device(loaded)
    assert not loaded.cfg.SOLVER.AMP.ENABLED
    assert "SOLVER.AMP.DTYPE bfloat16" in caplog.text
    opts = ["MODEL.DEVICE", "cpu", "SOLVER.AMP.ENABLED", "True", "SOLVER.AMP.DTYPE", "bfloat16"]
    loaded = load_config(CONFIG, opts)
    resolve_device(loaded)
    assert loaded.cfg.SOLVER.AMP.ENABLED


def test_another_type_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"SOLVER.AMP.DTYPE is 'bf16': it must be one of 'float16', 'bfloat16'"
    ):
        load_config(CONFIG, ["SOLVER.AMP.DTYPE", "bf16"])


def far_boxes() -> tuple[torch.Tensor, torch.Tensor]:
    """Features ``(1, 1, 8, 280)`` that change from column to column, and small boxes between 900 and 1100 pixels."""
    x = torch.arange(280.0)
    features = (x % 7).expand(1, 1, 8, 280).contiguous()
    left = torch.linspace(901.3, 1081.7, 40)
    boxes = torch.stack([left, torch.full_like(left, 3.0), left + 12.6, torch.full_like(left, 15.0)], dim=1)
    return features, boxes


def test_bfloat16_does_not_move_boxes() -> None:
    features, boxes = far_boxes()
    pooler = AlignedPooler(7, [4, 8], sampling_ratio=2, aligned=True)
    rois = rois_of([boxes])
    exact = pooler([features, features], rois)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = pooler([features.bfloat16(), features.bfloat16()], rois)
    assert rounded.dtype is torch.bfloat16
    torch.testing.assert_close(rounded.float(), exact, atol=0.02, rtol=0.01)


@pytest.mark.detectron2
def test_bfloat16_does_not_move_boxes_in_detectron2() -> None:
    pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    from detectron2.modeling.poolers import ROIPooler
    from detectron2.structures import Boxes

    from zenith_det.engines.detectron2_engine.models import pool_at_exact_boxes

    features, boxes = far_boxes()
    pooler = ROIPooler(7, [1 / 4, 1 / 8], sampling_ratio=2, pooler_type="ROIAlignV2")
    exact = pooler([features, features], [Boxes(boxes)])
    pool_at_exact_boxes(pooler)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = pooler([features.bfloat16(), features.bfloat16()], [Boxes(boxes)])
    assert rounded.dtype is torch.bfloat16
    torch.testing.assert_close(rounded.float(), exact, atol=0.02, rtol=0.01)


@pytest.mark.parametrize(
    ("asked", "processes", "told"),
    [
        ("cuda:2", 1, "MODEL.DEVICE is 'cuda:2', but PyTorch sees 2 of them, from cuda:0 on"),
        ("cuda:0", 2, "each of 2 processes takes a GPU of its own: use cuda"),
        ("cuda:x", 1, "it must be auto, cpu, cuda or cuda:N"),
        ("cpu:0", 1, "it must be auto, cpu, cuda or cuda:N"),
    ],
)
def test_a_gpu_that_cannot_be_had_is_refused(
    asked: str, processes: int, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(device, "get_world_size", lambda: processes)
    with pytest.raises(ConfigError, match=re.escape(told)):
        resolve_device(load_config(CONFIG, ["MODEL.DEVICE", asked]))


def test_the_gpu_asked_for_becomes_torchs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    resolve_device(load_config(CONFIG, ["MODEL.DEVICE", "cuda:1"]))
    assert chosen == [1]
