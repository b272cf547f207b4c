"""Where a run goes on: checkpoints in the layout of Detectron2's trainer, too."""

from __future__ import annotations

from pathlib import Path

import torch

from zenith_det.training.course.starting import Start


def test_a_checkpoint_of_detectron2s_trainer_is_a_start(tmp_path: Path) -> None:
    optimizer = {"state": {}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    hooks = {"LRScheduler": {"last_epoch": 6}, "DataOrder": {"seed": 7, "images_seen": 12}}
    trainer = {"iteration": 5, "hooks": hooks, "_trainer": {"iteration": 5, "optimizer": optimizer}}
    path = tmp_path / "model_0000005.pth"
    torch.save({"model": {"w": torch.ones(1)}, "trainer": trainer, "iteration": 5, "seed": 7}, path)
    start = Start.load(path)
    assert start.iteration == 6
    assert start.state["optimizer"] == optimizer
    assert start.state["scheduler"] == {"last_epoch": 6}
    assert (start.state["images_seen"], start.state["seed"]) == (12, 7)
