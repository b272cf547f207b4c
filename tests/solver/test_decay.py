"""Schedules that lower the LR are found without being stepped, whatever they are."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fvcore.common.param_scheduler import CosineParamScheduler, LinearParamScheduler
from torch.optim import lr_scheduler as torchs

from zenith_det.optim import ZENITH, ZenithRatio
from zenith_det.solver import MultiplierLR, build_lr_scheduler, tell_of_decay
from zenith_det.solver.decay import lowers_lr

from .helpers import config, make_model

N = 3000


class Poly(torchs.LRScheduler):
    """As DeepLab's WarmupPolyLR: from the initial LRs and the iteration."""

    def get_lr(self) -> list[float]:  # type: ignore[override]
        return [
            lr * min(1.0, (self.last_epoch + 1) / 100) * (1 - self.last_epoch / N) ** 0.9
            for lr in self.base_lrs
        ]


class Halves(torchs.LRScheduler):
    """From the LR of the step before, without a closed form."""

    def get_lr(self) -> list[float]:  # type: ignore[override]
        half = 0.5 if self.last_epoch == 2000 else 1.0
        return [group["lr"] * half for group in self.optimizer.param_groups]


class Fails(torchs.LRScheduler):
    def get_lr(self) -> list[float]:  # type: ignore[override]
        if self.last_epoch > 5:
            raise RuntimeError("not now")
        return list(self.base_lrs)


def one_group_falls(optimizer: torch.optim.Optimizer) -> torchs.LambdaLR:
    return torchs.LambdaLR(optimizer, [lambda i: 1.0, lambda i: 0.5 ** (i // 1000)])


LOWERS: dict[str, Callable[[Any], Any]] = {
    "poly": Poly,
    "lambda": lambda o: torchs.LambdaLR(o, lambda i: 0.999**i),
    "one group": one_group_falls,
    "cosine": lambda o: torchs.CosineAnnealingLR(o, N),
    "one cycle": lambda o: torchs.OneCycleLR(o, 0.1, N),
    "steps": lambda o: torchs.MultiStepLR(o, [2900]),
    "exponential": lambda o: torchs.ExponentialLR(o, 0.9999),
    "multiplicative": lambda o: torchs.MultiplicativeLR(o, lambda i: 0.9 if i == 2500 else 1.0),
    "from step to step": Halves,
    "restarts": lambda o: torchs.CosineAnnealingWarmRestarts(o, 50),
    "cyclic": lambda o: torchs.CyclicLR(o, 0.01, 0.1, cycle_momentum=False),
    "warm-up, then cosine": lambda o: torchs.SequentialLR(
        o, [torchs.LinearLR(o, 0.1, total_iters=100), torchs.CosineAnnealingLR(o, N)], [100]
    ),
    "chained": lambda o: torchs.ChainedScheduler([torchs.ConstantLR(o, 1.0), torchs.ExponentialLR(o, 0.999)]),
    "plateau": torchs.ReduceLROnPlateau,
    "fvcore": lambda o: CosineParamScheduler(1, 0),
    "a multiplier": lambda o: MultiplierLR(o, lambda i: 1.0 if i < N - 1 else 0.1),
}
KEEPS: dict[str, Callable[[Any], Any]] = {
    "constant": lambda o: torchs.LambdaLR(o, lambda i: 1.0),
    "warm-up": lambda o: torchs.LinearLR(o, 0.001, total_iters=1000),
    "steps after the end": lambda o: torchs.MultiStepLR(o, [N + 1]),
    "warm-up, then constant": lambda o: torchs.SequentialLR(
        o, [torchs.LinearLR(o, 0.1, total_iters=100), torchs.ConstantLR(o, 1.0)], [100]
    ),
    "fvcore": lambda o: LinearParamScheduler(0.001, 1.0),
    "one that fails": Fails,
    "no schedule": lambda o: object(),
}


def optimizer_with(tensor: bool = False) -> torch.optim.Optimizer:
    params = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    lrs = [torch.tensor(0.1), torch.tensor(0.01)] if tensor else [0.1, 0.01]
    return torch.optim.SGD(
        [{"params": [p], "lr": lr} for p, lr in zip(params, lrs)], lr=0.1, momentum=0.9, foreach=False
    )


@pytest.mark.parametrize("tensor", [False, True], ids=["", "tensor lr"])
@pytest.mark.parametrize(("name", "expected"), [*((n, True) for n in LOWERS), *((n, False) for n in KEEPS)])
def test_found_without_a_trace(name: str, expected: bool, tensor: bool) -> None:
    if tensor and name in ("cyclic", "one cycle"):
        pytest.skip("torch's own wants other arguments there")
    optimizer = optimizer_with(tensor)
    schedule = (LOWERS if expected else KEEPS)[name](optimizer)
    before = copy.deepcopy(
        (optimizer.state_dict(), str(vars(schedule)) if hasattr(schedule, "__dict__") else "")
    )
    assert lowers_lr(schedule, N) == expected
    assert optimizer.state_dict() == before[0]
    assert (str(vars(schedule)) if hasattr(schedule, "__dict__") else "") == before[1]
    if isinstance(schedule, torchs.LRScheduler) and not isinstance(schedule, torchs.ReduceLROnPlateau):
        optimizer.step()
        schedule.step()  # it goes on as if nothing had been


def test_a_long_run_is_looked_at_in_no_time() -> None:
    """A step of these costs more than all the samples together: a run has a million of them."""
    asked = []

    def multiplier(iteration: int) -> float:
        asked.append(iteration)
        return 1.0

    schedule = torchs.LambdaLR(optimizer_with(), multiplier)
    assert not lowers_lr(schedule, 1_000_000)
    assert len(asked) < 1000


@pytest.mark.parametrize("over", ["ZENITH", "the ratio", "nothing"])
def test_told_once_and_only_where_there_is_a_ratio(over: str, caplog: pytest.LogCaptureFixture) -> None:
    params = [torch.nn.Parameter(torch.ones(2))]
    optimizer = ZENITH(params, 0.1) if over == "ZENITH" else torch.optim.SGD(params, lr=0.1)
    if over == "the ratio":
        ZenithRatio(optimizer)
    cfg = config(LR_SCHEDULER_NAME="Mine")
    schedule = torchs.CosineAnnealingLR(optimizer, 100)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            tell_of_decay(cfg, schedule, optimizer)
    assert len(caplog.records) == (over != "nothing")
    assert over == "nothing" or "SOLVER.LR_SCHEDULER_NAME Mine (CosineAnnealingLR) lowers" in caplog.text


@pytest.mark.parametrize(
    ("name", "steps", "told"),
    [
        ("WarmupCosineLR", (), 1),
        ("WarmupMultiStepLR", (60,), 1),
        ("WarmupMultiStepLR", (), 0),
        ("WarmupZenithLR", (), 0),
    ],
)
def test_our_builder_tells(name: str, steps: Any, told: int, caplog: pytest.LogCaptureFixture) -> None:
    cfg = config(LR_SCHEDULER_NAME=name, STEPS=steps, MAX_ITER=100, WARMUP_ITERS=10)
    optimizer = ZENITH(make_model().parameters(), 0.1)
    with caplog.at_level(logging.WARNING):
        build_lr_scheduler(cfg, optimizer)
    assert sum("lowers the LR over the run" in record.message for record in caplog.records) == told
