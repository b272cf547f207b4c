"""A diverged run goes back to its last good checkpoint with a smaller LR, or stops with a diagnosis."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch

from tests.reliability import runs
from zenith_det.config import get_cfg
from zenith_det.training.failures.divergence import LossWatch
from zenith_det.training.failures.recovery import Recovery

COMMON = {
    "SOLVER__MAX_ITER": 60,
    "SOLVER__CHECKPOINT_PERIOD": 10,
    "TEST__EVAL_PERIOD": 0,
    "CHECKPOINT__KEEP": 1,
}


@pytest.mark.parametrize("engine", runs.ENGINES)
def test_a_loss_that_explodes_rolls_back_with_half_the_lr_and_trains_to_the_end(
    engine: str, data: Path, tmp_path: Path
) -> None:
    runs.need(engine)
    # From iteration 35 on the loss explodes until the LR is below 0.02.
    words = runs.arguments(engine, data, tmp_path, **COMMON)
    code, printed = runs.run(words, {"explode": 35, "above": 0.015})
    assert code == 0, printed
    (event,) = [event for event in runs.events(tmp_path) if event["event"] == "rolled back"]
    assert "the loss has diverged" in event["reason"]
    # Saved while all was well, and not the one saved after the explosion had begun.
    assert Path(event["to"]).name == "model_0000029.pth"
    assert (
        "rolled back to model_0000029.pth with the LR at 0.5 x SOLVER.BASE_LR (roll-back 1 of 3)" in printed
    )
    state = torch.load(tmp_path / "model_final.pth", weights_only=True)
    assert state["recovery"] == {"rollbacks": 1, "lr_scale": 0.5, "base_lr": 0.02}
    optimizer = state["optimizer"]
    assert optimizer["param_groups"][0]["lr"] == pytest.approx(0.01)
    # The halved LR is not forgotten by a later run, unless somebody chooses another one.
    longer = {**COMMON, "SOLVER__MAX_ITER": 62}
    code, printed = runs.run(runs.arguments(engine, data, tmp_path, resume=True, **longer))
    assert code == 0, printed
    state = torch.load(tmp_path / "model_final.pth", weights_only=True)
    assert state["recovery"]["lr_scale"] == 0.5


@pytest.mark.parametrize("engine", runs.ENGINES)
def test_nonfinite_steps_in_a_row_roll_back_three_times_then_stop_with_a_diagnosis(
    engine: str, data: Path, tmp_path: Path
) -> None:
    runs.need(engine)
    poison = dict.fromkeys(range(4, 60), "gradient")
    words = runs.arguments(engine, data, tmp_path, SOLVER__MAX_NONFINITE_STEPS=3, **COMMON)
    code, printed = runs.run(words, {"poison": poison})
    assert code == 3, printed
    assert "Traceback" not in printed
    (line,) = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert re.search(
        r"training diverged at iteration \d \(LR 0.002[45]\d*\): the loss or the gradient was not", line
    )
    assert "first parameters with non-finite gradients: " in line
    assert "after 3 roll-backs with the LR down to 0.125 x SOLVER.BASE_LR" in line
    assert "lower SOLVER.BASE_LR" in line
    assert [e["to"] for e in runs.events(tmp_path) if e["event"] == "rolled back"] == [None] * 3


def test_rolling_back_can_be_turned_off(data: Path, tmp_path: Path) -> None:
    words = runs.arguments("torchvision", data, tmp_path, RECOVERY__MAX_ROLLBACKS=0, **COMMON)
    code, printed = runs.run(words, {"explode": 25, "above": 0.0})
    assert code == 3, printed
    assert "and RECOVERY.MAX_ROLLBACKS is 0" in printed
    assert not [e for e in runs.events(tmp_path) if e["event"] == "rolled back"]


def watch(*losses: float) -> LossWatch:
    made = LossWatch(10.0, window=4)
    for loss in losses:
        made.add(loss)
    return made


def test_noise_and_a_high_start_are_no_divergence() -> None:
    assert watch(*[5.0] * 4, *[0.3] * 8, *[9.0, 0.3, 0.3, 9.0, 0.3]).verdict() is None
    # Ten times its best, but no worse than at the start.
    assert watch(*[5.0] * 4, *[0.3] * 8, *[4.0] * 8).verdict() is None
    assert watch(100.0, 100.0).verdict() is None  # too few to tell
    assert LossWatch(0.0, window=1).verdict() is None


def test_a_loss_far_above_best_and_start_is_divergence() -> None:
    lost = watch(*[5.0] * 4, *[0.5] * 8, *[50.0] * 4)
    assert lost.verdict() == (
        "the loss has diverged: its median over 4 iterations is 50, after 0.5 at best and 5 at the start"
    )
    assert not lost.looks_good()
    assert not watch(*[5.0] * 4, *[0.5] * 8, *[8.0] * 4).looks_good()  # suspicious before it is lost
    assert watch(*[5.0] * 4, *[0.5] * 8, *[1.0] * 4).looks_good()
    assert watch(*[5.0] * 4, *[math.nan] * 9).verdict() is None  # skipped steps are counted elsewhere
    again = LossWatch(10.0, window=4)
    again.load_state_dict(lost.state_dict())
    assert again.verdict() == lost.verdict()


def test_another_base_lr_in_a_resumed_run_counts_as_it_is() -> None:
    cfg = get_cfg()
    cfg.SOLVER.BASE_LR = 0.02
    saved = {"rollbacks": 2, "lr_scale": 0.25, "base_lr": 0.02}
    assert Recovery.of(cfg, saved).scaled(cfg).SOLVER.BASE_LR == 0.005
    cfg.SOLVER.BASE_LR = 0.01
    assert Recovery.of(cfg, saved).scaled(cfg).SOLVER.BASE_LR == 0.01
