"""The LR at every iteration: golden values, closed forms, Detectron2's own, and across a resumed run."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from zenith_det.errors import ConfigError
from zenith_det.solver import build_lr_scheduler, build_optimizer

from .helpers import config

DETECTRON2_NAMES = ("WarmupMultiStepLR", "WarmupCosineLR", "WarmupStepWithFixedGammaLR")
OUR_NAMES = ("WarmupZenithLR", "WarmupConstantLR")


def start(cfg: Any, lrs: tuple[float, ...] = ()) -> tuple[torch.optim.Optimizer, LRScheduler]:
    lrs = lrs or (cfg.SOLVER.BASE_LR,)
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": lr} for lr in lrs]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    return optimizer, build_lr_scheduler(cfg, optimizer)


def lrs_of(cfg: Any, steps: int | None = None) -> list[float]:
    """The LR of each iteration and, last, the one that the schedule's last call leaves."""
    optimizer, scheduler = start(cfg)
    found = [optimizer.param_groups[0]["lr"]]
    for _ in range(steps or cfg.SOLVER.MAX_ITER):
        optimizer.step()
        scheduler.step()
        found.append(optimizer.param_groups[0]["lr"])
    return found


def schedule(name: str, **solver: Any) -> Any:
    settings = {"BASE_LR": 5.0, "MAX_ITER": 30, "WARMUP_ITERS": 5, "STEPS": (10, 15, 20), "NUM_DECAYS": 4}
    return config(LR_SCHEDULER_NAME=name, **{**settings, **solver})


WARMUP = [0.005, 1.004, 2.003, 3.002, 4.001]


@pytest.mark.parametrize("name", OUR_NAMES)
def test_warmup_then_constant(name: str) -> None:
    assert lrs_of(schedule(name)) == pytest.approx(WARMUP + [5.0] * 26)
    assert lrs_of(schedule(name, WARMUP_METHOD="constant")) == [0.005] * 5 + [5.0] * 26
    assert lrs_of(schedule(name, WARMUP_ITERS=0)) == [5.0] * 31
    assert lrs_of(schedule(name))[5:] == [5.0] * 26  # exactly the LR that was asked for


def test_warmup_then_steps() -> None:
    expected = WARMUP + [5.0] * 5 + [0.5] * 5 + [0.05] * 5 + [0.005] * 11
    assert lrs_of(schedule("WarmupMultiStepLR")) == pytest.approx(expected)


def test_warmup_then_cosine() -> None:
    found = lrs_of(schedule("WarmupCosineLR", BASE_LR_END=0.5))
    cosine = [0.5 + 0.5 * 4.5 * (1 + math.cos(math.pi * i / 30)) for i in range(31)]
    assert found[5:] == pytest.approx(cosine[5:])
    assert found[-1] == pytest.approx(0.5)
    assert found[:5] == pytest.approx([0.005 + (cosine[5] - 0.005) * i / 5 for i in range(5)])


def test_warmup_then_equal_steps() -> None:
    found = lrs_of(schedule("WarmupStepWithFixedGammaLR", RESCALE_INTERVAL=True))
    expected = WARMUP + [5.0] * 5 + [0.5] * 5 + [0.05] * 5 + [0.005] * 5 + [0.0005] * 6
    assert found == pytest.approx(expected)


@pytest.mark.parametrize("name", DETECTRON2_NAMES + OUR_NAMES)
@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("warmup", [0, 1, 29, 30, 100])
@pytest.mark.parametrize("method", ["linear", "constant"])
def test_the_last_call_and_beyond_never_raise(name: str, rescale: bool, warmup: int, method: str) -> None:
    cfg = schedule(name, RESCALE_INTERVAL=rescale, WARMUP_ITERS=warmup, WARMUP_METHOD=method)
    found = lrs_of(cfg, steps=33)
    assert all(0 <= lr <= 5.0 for lr in found)
    assert found[30] == found[31] == found[33] or name in OUR_NAMES


def test_a_run_of_one_iteration_and_one_of_millions() -> None:
    for name in DETECTRON2_NAMES:
        cfg = schedule(name, MAX_ITER=1, WARMUP_ITERS=0)
        assert lrs_of(cfg)[0] == 5.0
    cfg = schedule("WarmupStepWithFixedGammaLR", MAX_ITER=4_000_000)
    optimizer, scheduler = start(cfg)
    scheduler.load_state_dict({"last_epoch": 3_999_998})
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.0005)


def test_zeniths_schedule_does_not_know_how_long_the_run_is() -> None:
    short = lrs_of(schedule("WarmupZenithLR", MAX_ITER=10), steps=60)
    assert short == lrs_of(schedule("WarmupZenithLR", MAX_ITER=60), steps=60)


def test_steps_that_are_never_reached_are_told(caplog: pytest.LogCaptureFixture) -> None:
    found = lrs_of(schedule("WarmupMultiStepLR", STEPS=(10, 30, 40)))
    assert found[29] == pytest.approx(0.5) == found[30]
    assert "SOLVER.STEPS [30, 40] from SOLVER.MAX_ITER 30 on are not reached" in caplog.text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"STEPS": (5, 3)}, r"SOLVER.STEPS is \(5, 3\): iterations above 0 in rising order"),
        ({"STEPS": (3, 3)}, r"SOLVER.STEPS is \(3, 3\)"),
        ({"STEPS": (0, 3)}, r"SOLVER.STEPS is \(0, 3\)"),
        ({"STEPS": (0.5,)}, r"SOLVER.STEPS is \(0.5,\)"),
        ({"LR_SCHEDULER_NAME": "WarmupCosineLR", "BASE_LR_END": 6.0}, "SOLVER.BASE_LR_END is 6.0"),
    ],
)
def test_values_that_make_no_schedule(settings: dict[str, Any], message: str) -> None:
    cfg = schedule(settings.pop("LR_SCHEDULER_NAME", "WarmupMultiStepLR"), **settings)
    with pytest.raises(ConfigError, match=message):
        start(cfg)


def test_a_plateau_lowers_the_lr_as_torchs_own_rule_does() -> None:
    cfg = schedule("WarmupPlateauLR", GAMMA=0.1, PLATEAU_PATIENCE=1)
    cfg.TEST.EVAL_PERIOD = 4
    optimizer, scheduler = start(cfg)
    reference = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=5.0)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(
        reference, mode="max", factor=0.1, patience=1, eps=0.0
    )
    scores: dict[int, float] = {}
    lrs = []
    for iteration in range(40):
        optimizer.step()
        scheduler.step()
        if iteration % 4 == 3:
            scores[iteration] = [1.0, 3.0, 2.0, 2.0, 2.5, 9.0, 8.0, 8.0, 9.0, 9.0][iteration // 4]
            scheduler.follow(scores)  # type: ignore[attr-defined]
            theirs.step(scores[iteration])
        expected = WARMUP[iteration + 1] if iteration < 4 else reference.param_groups[0]["lr"]
        assert optimizer.param_groups[0]["lr"] == pytest.approx(expected)
        lrs.append(optimizer.param_groups[0]["lr"])
    assert min(lrs) == pytest.approx(0.005)  # lowered three times, so that the loop above says something

    # A later history is no part of an earlier state: a run that goes back has its LR back.
    scheduler.follow({})  # type: ignore[attr-defined]
    assert optimizer.param_groups[0]["lr"] == 5.0


@pytest.mark.parametrize(
    ("gamma", "period", "message"),
    [(1.0, 10, "SOLVER.GAMMA is 1.0: .* below 1"), (0.1, 0, "set TEST.EVAL_PERIOD")],
)
def test_a_plateau_that_could_lower_nothing(gamma: float, period: int, message: str) -> None:
    cfg = schedule("WarmupPlateauLR", GAMMA=gamma)
    cfg.TEST.EVAL_PERIOD = period
    with pytest.raises(ConfigError, match=message):
        start(cfg)


def test_groups_keep_their_proportions() -> None:
    optimizer, scheduler = start(schedule("WarmupCosineLR"), lrs=(5.0, 10.0, 1.0))
    for _ in range(30):
        optimizer.step()
        scheduler.step()
        first, second, third = (group["lr"] for group in optimizer.param_groups)
        assert (second, third) == pytest.approx((2 * first, first / 5))


def test_a_group_added_later_is_scheduled_with_its_own_lr() -> None:
    optimizer, scheduler = start(schedule("WarmupMultiStepLR"))
    for _ in range(9):
        optimizer.step()
        scheduler.step()
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))], "lr": 2.0})
    optimizer.step()
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.5, 0.2])
    assert scheduler.get_last_lr() == [group["lr"] for group in optimizer.param_groups]


def save(optimizer: torch.optim.Optimizer, scheduler: LRScheduler) -> dict[str, Any]:
    return {"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}


@pytest.mark.parametrize("order", [("optimizer", "scheduler"), ("scheduler", "optimizer")])
@pytest.mark.parametrize("name", DETECTRON2_NAMES + OUR_NAMES)
def test_a_resumed_run_has_the_same_lrs_in_whatever_order_it_is_loaded(
    name: str, order: tuple[str, str]
) -> None:
    whole = lrs_of(schedule(name))
    optimizer, scheduler = start(schedule(name))
    for _ in range(12):
        optimizer.step()
        scheduler.step()
    state = save(optimizer, scheduler)
    optimizer, scheduler = start(schedule(name))
    parts: dict[str, Callable[[Any], None]] = {
        "optimizer": optimizer.load_state_dict,
        "scheduler": scheduler.load_state_dict,
    }
    for part in order:
        parts[part](state[part])
    found = [optimizer.param_groups[0]["lr"]]
    for _ in range(18):
        optimizer.step()
        scheduler.step()
        found.append(optimizer.param_groups[0]["lr"])
    assert found == whole[12:]


@pytest.mark.parametrize("order", [("optimizer", "scheduler"), ("scheduler", "optimizer")])
def test_a_run_resumed_with_another_base_lr_follows_the_new_one(order: tuple[str, str]) -> None:
    optimizer, scheduler = start(schedule("WarmupZenithLR"))
    for _ in range(12):
        optimizer.step()
        scheduler.step()
    state = save(optimizer, scheduler)
    optimizer, scheduler = start(schedule("WarmupZenithLR", BASE_LR=0.25))
    parts: dict[str, Any] = {"optimizer": optimizer, "scheduler": scheduler}
    for part in order:
        parts[part].load_state_dict(state[part])
    assert optimizer.param_groups[0]["lr"] == 0.25
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.25 == scheduler.get_last_lr()[0]


def test_the_state_is_small_and_detectron2s_is_read_too() -> None:
    optimizer, scheduler = start(schedule("WarmupCosineLR"))
    assert isinstance(scheduler, LRScheduler)  # or Detectron2's hook saves nothing
    optimizer.step()
    scheduler.step()
    assert scheduler.state_dict() == {"last_epoch": 1}
    scheduler.load_state_dict({"base_lrs": [99.0], "last_epoch": 20})
    assert optimizer.param_groups[0]["lr"] == lrs_of(schedule("WarmupCosineLR"))[20]


@pytest.mark.parametrize("name", DETECTRON2_NAMES)
def test_zenith_under_a_decaying_schedule_is_told_once(name: str, caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Linear(2, 2)
    cfg = schedule(name)
    with caplog.at_level(logging.WARNING):
        build_lr_scheduler(cfg, build_optimizer(cfg, model))
    assert caplog.text.count("multiply") == 1
    caplog.clear()
    for quiet in (schedule(name, OPTIMIZER="SGD"), schedule("WarmupZenithLR")):
        build_lr_scheduler(quiet, build_optimizer(quiet, model))
    assert "multiply" not in caplog.text


@pytest.mark.detectron2
@pytest.mark.parametrize("name", DETECTRON2_NAMES)
@pytest.mark.parametrize("method", ["linear", "constant"])
@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize(
    "lengths", [(90, 10, (60, 80)), (333, 7, (100,)), (1000, 0, ()), (101, 90, (50, 100)), (37, 5, (10, 90))]
)
def test_lrs_equal_detectron2s_bit_for_bit(
    name: str, method: str, rescale: bool, lengths: tuple[int, int, tuple[int, ...]]
) -> None:
    solver = pytest.importorskip("detectron2.solver", reason="Detectron2 is not installed")
    max_iter, warmup, steps = lengths
    cfg = schedule(
        name,
        BASE_LR=0.0237,
        BASE_LR_END=0.00011,
        MAX_ITER=max_iter,
        WARMUP_ITERS=warmup,
        STEPS=steps,
        WARMUP_METHOD=method,
        RESCALE_INTERVAL=rescale,
        GAMMA=0.3,
        OPTIMIZER="SGD",
    )
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (0.0237, 0.0474)]
    theirs = torch.optim.SGD(groups, lr=1.0)
    their_scheduler = solver.build_lr_scheduler(cfg, theirs)
    ours, our_scheduler = start(cfg, lrs=(0.0237, 0.0474))
    last = max_iter - (name == "WarmupStepWithFixedGammaLR")  # where Detectron2's raises in its last call
    for _ in range(last):
        assert [g["lr"] for g in ours.param_groups] == [g["lr"] for g in theirs.param_groups]
        for step in (ours.step, our_scheduler.step, theirs.step, their_scheduler.step):
            step()
    assert [g["lr"] for g in ours.param_groups] == [g["lr"] for g in theirs.param_groups]
