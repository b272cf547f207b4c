"""LazyConfig, and the same run set up in three ways."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("detectron2.engine", reason="needs the real Detectron2: see docs/DETECTRON2.md")

from detectron2 import model_zoo
from detectron2.config import LazyConfig, get_cfg, instantiate
from detectron2.engine import SimpleTrainer, hooks
from omegaconf import DictConfig

import zenith_det.lazy
from tests.engines.detectron2_engine.d2_helpers import (
    KnownGradient,
    KnownTrainer,
    Trace,
    known_batches,
    known_cfg,
    trace_of,
)
from zenith_det.config import add_zenith_config
from zenith_det.engines.detectron2_engine import ZenithMetrics, load_config_file
from zenith_det.engines.detectron2_engine.config import to_detectron2
from zenith_det.lazy import WarmupThenConstant
from zenith_det.optim import ZENITH, ZENITHAdamW, zenith_of

pytestmark = pytest.mark.detectron2

YAML = """\
MODEL: {META_ARCHITECTURE: KnownGradient, DEVICE: cpu}
SEED: 7
SOLVER:
  LR_SCHEDULER_NAME: WarmupZenithLR
  BASE_LR: 0.01
  MOMENTUM: 0.9
  WEIGHT_DECAY: 0.0001
  WARMUP_ITERS: 4
  WARMUP_FACTOR: 0.1
  IMS_PER_BATCH: 2
  MAX_ITER: 40
  ZENITH: {WINDOW: 5}
"""

LAZY = """\
from omegaconf import OmegaConf
from zenith_det.lazy import lr_multiplier, optimizer

train = OmegaConf.create(dict(max_iter=40))
optimizer.lr = 0.01
optimizer.window = 5
lr_multiplier.warmup_iters = 4
lr_multiplier.warmup_factor = 0.1
"""


def lazy_trace(cfg: Any) -> Trace:
    """What Detectron2's tools/lazyconfig_train_net.py does with the two nodes."""
    model = KnownGradient(None)
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    trainer = SimpleTrainer(model, known_batches(), optimizer)
    trace = Trace()
    trainer.register_hooks(
        [hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier)), ZenithMetrics(), trace]
    )
    trainer.train(0, cfg.train.max_iter)
    return trace


def test_yaml_command_line_and_lazyconfig_give_the_same_run(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(YAML)
    (tmp_path / "run.py").write_text(LAZY)

    from_yaml = get_cfg()
    add_zenith_config(from_yaml)
    from_yaml.merge_from_file(str(file))
    from_yaml.OUTPUT_DIR = str(tmp_path / "yaml")
    yaml = trace_of(KnownTrainer(from_yaml))

    words = [
        word
        for key, value in {
            "MODEL.META_ARCHITECTURE": "KnownGradient",
            "MODEL.DEVICE": "cpu",
            "SEED": 7,
            "SOLVER.LR_SCHEDULER_NAME": "WarmupZenithLR",
            "SOLVER.BASE_LR": 0.01,
            "SOLVER.MOMENTUM": 0.9,
            "SOLVER.WARMUP_ITERS": 4,
            "SOLVER.WARMUP_FACTOR": 0.1,
            "SOLVER.IMS_PER_BATCH": 2,
            "SOLVER.MAX_ITER": 40,
            "SOLVER.ZENITH.WINDOW": 5,
            "OUTPUT_DIR": tmp_path / "cli",
        }.items()
        for word in (key, str(value))
    ]
    cli = trace_of(KnownTrainer(to_detectron2(load_config_file("", words))))
    lazy = lazy_trace(LazyConfig.load(str(tmp_path / "run.py")))

    assert yaml.lrs == cli.lrs == lazy.lrs
    assert torch.equal(yaml.weights[-1], cli.weights[-1])
    assert torch.equal(yaml.weights[-1], lazy.weights[-1])
    assert min(yaml.lrs[5:]) < 0.3 * max(yaml.lrs)


def test_each_config_file_has_nodes_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "one.py").write_text(LAZY)
    (tmp_path / "two.py").write_text("from zenith_det.lazy import lr_multiplier, optimizer\n")
    LazyConfig.load(str(tmp_path / "one.py"))
    untouched = LazyConfig.load(str(tmp_path / "two.py"))
    assert untouched.optimizer.window == 100
    assert untouched.optimizer._target_ is ZENITH or "ZENITH" in str(untouched.optimizer._target_)

    with pytest.raises(AttributeError, match="no attribute 'optimiser'"):
        zenith_det.lazy.optimiser  # noqa: B018


def test_nodes_take_overrides_and_are_saved_and_read(tmp_path: Path) -> None:
    (tmp_path / "run.py").write_text(LAZY)
    cfg = LazyConfig.load(str(tmp_path / "run.py"))
    cfg = LazyConfig.apply_overrides(
        cfg, ["optimizer.lr=0.5", "train.max_iter=20", "optimizer.min_ratio=0.1"]
    )
    LazyConfig.save(cfg, str(tmp_path / "saved.yaml"))
    cfg = LazyConfig.load(str(tmp_path / "saved.yaml"))
    cfg.optimizer.params.model = KnownGradient(None)
    optimizer = instantiate(cfg.optimizer)
    assert isinstance(optimizer, ZENITH)
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert instantiate(cfg.lr_multiplier)._max_iter == 20


@pytest.mark.parametrize("max_iter", [1, 7, 1000, 90000])
def test_multiplier_counts_iterations_not_progress(max_iter: int) -> None:
    multiplier = WarmupThenConstant(max_iter=max_iter, warmup_iters=5, warmup_factor=0.2)
    for iteration in [*range(min(max_iter, 10)), max_iter - 1, max_iter]:
        expected = 0.2 + 0.8 * iteration / 5 if iteration < 5 else 1.0
        assert multiplier(iteration / max_iter) == pytest.approx(expected)


def test_multiplier_refuses_bad_arguments() -> None:
    for kwargs in (
        {"max_iter": 0},
        {"max_iter": 5, "warmup_iters": -1},
        {"max_iter": 5, "warmup_method": "x"},
    ):
        with pytest.raises(ValueError, match=next(reversed(kwargs))):
            WarmupThenConstant(**kwargs)


def test_import_of_the_package_stays_light() -> None:
    code = (
        "import sys, zenith_det.engines.detectron2_engine as e; e.__all__; print('detectron2' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    assert known_cfg(Path()).SOLVER.OPTIMIZER == "ZENITH"


def one_layer() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))


def test_nodes_scale_each_groups_lr() -> None:
    """ViTDet's and detrex's lr_factor_func, bias_lr_factor: they start from base_lr."""
    for name in ("optimizer", "adamw"):
        node = getattr(zenith_det.lazy, name)
        node.lr = 0.01
        node.params.model = one_layer()
        node.params.lr_factor_func = lambda name: 0.5 if name == "0.weight" else 1.0
        made = instantiate(node)
        assert sorted(group["lr"] for group in made.param_groups) == [0.005, 0.01, 0.01]
        node = getattr(zenith_det.lazy, name)
        node.params.model, node.params.bias_lr_factor = one_layer(), 2.0
        lrs = {group["lr"] for group in instantiate(node).param_groups}
        assert lrs == {node.lr, 2 * node.lr}


def test_zenithadamw_takes_the_betas_of_a_config() -> None:
    node = model_zoo.get_config("common/optim.py").AdamW
    node._target_ = ZENITHAdamW
    node.params.model = one_layer()
    made = instantiate(node)
    assert all(group["betas"] == (0.9, 0.999) for group in made.param_groups)
    node = zenith_det.lazy.adamw
    node.params.model, node.betas = one_layer(), [0.8, 0.95]
    assert instantiate(node).param_groups[0]["betas"] == (0.8, 0.95)


def test_the_ratio_goes_over_any_node(tmp_path: Path) -> None:
    of_detectron2 = model_zoo.get_config("common/optim.py").AdamW
    node = zenith_det.lazy.zenith_over(of_detectron2, window=7)
    assert of_detectron2._target_ is torch.optim.AdamW
    LazyConfig.save(
        DictConfig({"optimizer": node}, flags={"allow_objects": True}), str(tmp_path / "saved.yaml")
    )
    for one in (node, LazyConfig.load(str(tmp_path / "saved.yaml")).optimizer):
        one.params.model, one.lr = one_layer(), 0.3
        made = instantiate(one)
        assert type(made) is torch.optim.AdamW
        assert made.param_groups[0]["lr"] == 0.3
        zenith = zenith_of(made)
        assert zenith is not None
        assert "window=7" in repr(zenith)
    for wrong in (node, zenith_det.lazy.optimizer, {"lr": 1.0}):
        with pytest.raises(ValueError, match="zenith_over"):
            zenith_det.lazy.zenith_over(wrong)
