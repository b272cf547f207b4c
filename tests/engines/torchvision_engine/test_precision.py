"""``SOLVER.AMP`` in the built-in engine: what a user of bfloat16 on the CPU gets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import SmallSet
from tests.engines.torchvision_engine.small_models import small_config
from zenith_det.config import load_config
from zenith_det.engines.device import resolve_device
from zenith_det.engines.torchvision_engine.stepping import make_trainer
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
    return make_trainer(loaded)


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
    # The first iteration is the same model on the same images: the losses differ by rounding alone.
    assert rounded[0] == pytest.approx(exact[0], rel=0.05, abs=0.02)
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
