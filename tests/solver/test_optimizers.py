"""Every optimizer takes real steps, saves and loads, and is told apart from a mistake in its settings."""

from __future__ import annotations

import importlib
import io
from typing import Any

import pytest
import torch
from torch import nn

from zenith_det.errors import ConfigError
from zenith_det.optim import ZENITH
from zenith_det.solver import (
    OPTIMIZER_REGISTRY,
    build_lr_scheduler,
    build_optimizer,
    effective_lrs,
    eval_mode,
    train_mode,
)

from .helpers import backward, config, make_model, same_weights, train

LIBRARIES = {"ScheduleFreeSGD": "schedulefree", "Prodigy": "prodigyopt", "DAdaptSGD": "pytorch_optimizer"}
LRS = {"AdamW": 0.003, "ZENITHAdamW": 0.003, "ScheduleFreeSGD": 0.02, "Prodigy": 1.0, "DAdaptSGD": 1.0}
NAMES = sorted(name for name, _ in OPTIMIZER_REGISTRY)


def optimizer_config(name: str, **solver: Any) -> Any:
    if name in LIBRARIES:
        pytest.importorskip(LIBRARIES[name], reason=f"{LIBRARIES[name]} is not installed")
    settings = {"BASE_LR": LRS.get(name, 0.005), "LR_SCHEDULER_NAME": "WarmupConstantLR", "WARMUP_ITERS": 5}
    return config(OPTIMIZER=name, **{**settings, **solver})


def loss_of(model: nn.Module) -> float:
    generator = torch.Generator().manual_seed(0)
    images, targets = torch.randn(4, 3, 8, 8, generator=generator), torch.randn(4, 5, generator=generator)
    with torch.no_grad():
        return (model(images) - targets).square().mean().item()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("clip", [None, "value", "norm", "full_model"])
def test_it_learns(name: str, clip: str | None) -> None:
    cfg = optimizer_config(name, WEIGHT_DECAY=0.001)
    if clip:
        cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
        cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = clip
    model = make_model()
    optimizer = build_optimizer(cfg, model)
    scheduler = build_lr_scheduler(cfg, optimizer)
    assert isinstance(optimizer, torch.optim.Optimizer)
    before = loss_of(model)
    unused = model.unused.weight.clone()
    for _ in range(60):
        backward(model, seed=0)
        optimizer.step()
        scheduler.step()
    eval_mode(optimizer)
    assert loss_of(model) < 0.7 * before
    assert torch.equal(model.unused.weight, unused)  # no gradient, no update, no decay


@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_run_is_the_uninterrupted_one(name: str) -> None:
    cfg = optimizer_config(name)

    def begin() -> tuple[nn.Module, torch.optim.Optimizer, Any]:
        model = make_model()
        optimizer = build_optimizer(cfg, model)
        return model, optimizer, build_lr_scheduler(cfg, optimizer)

    def checkpoint(model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any) -> io.BytesIO:
        file = io.BytesIO()
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save({**state, "scheduler": scheduler.state_dict()}, file)
        file.seek(0)
        return file

    whole, first = begin(), begin()
    for run in (whole, first):
        train(run[0], run[1], 12, run[2])
        eval_mode(run[1])
    state = torch.load(checkpoint(*first), weights_only=True)
    second = begin()
    for part, key in zip(second, ("model", "optimizer", "scheduler")):
        part.load_state_dict(state[key])
    assert same_weights(second[0], whole[0])
    for run in (whole, second):
        train_mode(run[1])
        train(run[0], run[1], 12, run[2])
    assert same_weights(second[0], whole[0])
    assert effective_lrs(second[1]) == effective_lrs(whole[1])


@pytest.mark.parametrize("name", [name for name in NAMES if name != "ScheduleFreeSGD"])
def test_modes_change_nothing_where_there_are_none(name: str) -> None:
    model = make_model()
    optimizer = build_optimizer(optimizer_config(name), model)
    train(model, optimizer, 3)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    eval_mode(optimizer)
    train_mode(optimizer)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_schedule_free_evaluates_its_average_and_goes_on_where_it_was() -> None:
    model = make_model()
    optimizer = build_optimizer(optimizer_config("ScheduleFreeSGD"), model)
    train(model, optimizer, 20)
    training = model.head[2].weight.clone()
    eval_mode(optimizer)
    average = model.head[2].weight.clone()
    assert not torch.allclose(training, average, atol=1e-4)
    eval_mode(optimizer)
    assert torch.equal(model.head[2].weight, average)
    train_mode(optimizer)
    torch.testing.assert_close(model.head[2].weight, training)


def test_zenith_gets_the_configs_settings() -> None:
    cfg = config(
        BASE_LR=0.5,
        MOMENTUM=0.8,
        NESTEROV=True,
        WEIGHT_DECAY=0.1,
        ZENITH__WINDOW=7,
        ZENITH__MIN_RATIO=0.25,
        ZENITH__NORM_SOURCE="momentum",
        ZENITH__RECORD_AFTER=3,
        MAX_NONFINITE_STEPS=4,
        CLIP_GRADIENTS__ENABLED=True,
        CLIP_GRADIENTS__CLIP_TYPE="full_model",
        CLIP_GRADIENTS__CLIP_VALUE=3.0,
    )
    optimizer = build_optimizer(cfg, make_model())
    assert type(optimizer) is ZENITH
    group = optimizer.param_groups[0]
    assert (group["lr"], group["momentum"], group["nesterov"], group["weight_decay"]) == (0.5, 0.8, True, 0.1)
    assert (optimizer.norm_source, optimizer.max_norm, optimizer.clip) == ("momentum", 3.0, None)
    assert optimizer.max_nonfinite_steps == 4
    assert len(optimizer.state_dict()["param_groups"][0]["zenith"]["norms"]) == 7


def test_zeniths_ratio_follows_the_configs_window() -> None:
    model = nn.Linear(4, 1)
    optimizer = build_optimizer(config(BASE_LR=0.5, ZENITH__WINDOW=2, ZENITH__RECORD_AFTER=1), model)
    found = []
    for size in (100.0, 4.0, 2.0, 1.0):
        model.weight.grad, model.bias.grad = torch.full((1, 4), size / 2), torch.zeros(1)
        optimizer.step()
        found.append(effective_lrs(optimizer)[0])
    assert found == pytest.approx([0.5, 0.5, 0.5, 0.5 * 1.5 / 3.0])


@pytest.mark.parametrize("name", ["Prodigy", "DAdaptSGD"])
def test_the_effective_lr_is_the_estimated_one(name: str) -> None:
    model = make_model()
    optimizer = build_optimizer(optimizer_config(name), model)
    start = effective_lrs(optimizer)[0]
    train(model, optimizer, 60)
    assert effective_lrs(optimizer)[0] > 2 * start


def test_the_effective_lr_of_the_others_is_the_groups_own() -> None:
    optimizer = build_optimizer(config(OPTIMIZER="SGD", BASE_LR=0.5, BIAS_LR_FACTOR=2.0), make_model())
    assert set(effective_lrs(optimizer)) == {0.5, 1.0}


@pytest.mark.parametrize("name", ["Prodigy", "DAdaptSGD"])
def test_one_lr_for_all_is_demanded_where_the_library_needs_it(name: str) -> None:
    with pytest.raises(ConfigError, match=f"SOLVER.BIAS_LR_FACTOR is 2.0: {name} takes one LR only"):
        build_optimizer(optimizer_config(name, BIAS_LR_FACTOR=2.0), make_model())


@pytest.mark.parametrize(("name", "library"), LIBRARIES.items())
def test_a_missing_library_is_told_with_its_pip_line(
    name: str, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.import_module

    def missing(wanted: str, *args: Any) -> Any:
        if wanted == library:
            raise ModuleNotFoundError(f"No module named {library!r}")
        return real(wanted, *args)

    monkeypatch.setattr(importlib, "import_module", missing)
    cfg = config(OPTIMIZER=name, BASE_LR=1.0)
    with pytest.raises(
        ConfigError, match=rf"^SOLVER.OPTIMIZER {name} needs {library} .*: pip install {library}$"
    ):
        build_optimizer(cfg, make_model())


@pytest.mark.parametrize("name", ["ZENITH", "SGD"])
def test_settings_that_the_optimizer_refuses_are_a_config_error(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"^SOLVER.OPTIMIZER {name} can't take its settings: .*omentum"):
        build_optimizer(config(OPTIMIZER=name, NESTEROV=True, MOMENTUM=0.0), make_model())


def test_importing_the_solver_brings_in_no_optional_library() -> None:
    import subprocess
    import sys

    code = (
        "import sys, zenith_det.solver, zenith_det.config\n"
        "heavy = {'schedulefree', 'prodigyopt', 'pytorch_optimizer', 'torchvision', 'detectron2'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
