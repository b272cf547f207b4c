from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from zenith_det.optim import ZENITH
from zenith_det.training.logs.zenith_metrics import effective_lr, optimizer_scalars, representative_group


def step(optimizer: torch.optim.Optimizer, model: nn.Module, scale: float = 1.0) -> None:
    optimizer.zero_grad()
    (scale * model(torch.ones(1, 4)).square().sum()).backward()
    optimizer.step()


def test_the_logged_lr_is_the_one_that_the_step_used() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    optimizer = ZENITH(model.parameters(), lr=0.1, window=2)
    for scale in (1.0, 1.0, 0.5, 0.1):
        before = copy.deepcopy(model)
        step(optimizer, model, scale)
        scalars = optimizer_scalars(optimizer)
        assert model.weight.grad is not None
        moved = before.weight - scalars["lr"] * model.weight.grad
        torch.testing.assert_close(model.weight, moved)
        for group in optimizer.param_groups:
            group["lr"] *= 0.5  # the scheduler moves on before anything is logged
    assert scalars["lr"] < 0.1 * 0.5**3
    assert scalars["zenith/ratio"] == pytest.approx(scalars["lr"] / (0.1 * 0.5**3))
    assert set(scalars) == {
        "lr",
        *("zenith/ratio", "zenith/grad_norm", "zenith/window_mean", "zenith/zenith", "zenith/skipped_steps"),
    }
    assert all(type(value) is float for value in scalars.values())


def test_a_skipped_step_is_counted() -> None:
    model = nn.Linear(4, 1)
    optimizer = ZENITH(model.parameters(), lr=0.1)
    step(optimizer, model, float("nan"))
    assert optimizer_scalars(optimizer)["zenith/skipped_steps"] == 1


def test_other_optimizers_have_their_lr_alone() -> None:
    model = nn.Linear(4, 1)
    assert optimizer_scalars(torch.optim.SGD(model.parameters(), lr=0.3)) == {"lr": 0.3}
    assert optimizer_scalars(torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.5))) == {"lr": 0.5}


def test_the_group_that_stands_for_all_is_the_largest_or_the_commonest() -> None:
    def groups(*sizes_and_rates: tuple[int, float]) -> torch.optim.Optimizer:
        return torch.optim.SGD(
            {"params": [nn.Parameter(torch.ones(1)) for _ in range(size)], "lr": lr}
            for size, lr in sizes_and_rates
        )

    assert representative_group(groups((1, 0.1), (5, 0.2), (5, 0.3))) == 1
    assert representative_group(groups((1, 0.1), (1, 0.2), (1, 0.2))) == 1


def test_prodigy_logs_its_own_estimate_times_the_lr() -> None:
    prodigyopt = pytest.importorskip("prodigyopt", reason="prodigyopt is not installed")
    model = nn.Linear(4, 1)
    for correction in (False, True):
        optimizer = prodigyopt.Prodigy(model.parameters(), lr=0.5, use_bias_correction=correction)
        assert effective_lr(optimizer) > 0
        for _ in range(3):
            step(optimizer, model)
        group = optimizer.param_groups[0]
        factor = (1 - 0.999**3) ** 0.5 / (1 - 0.9**3) if correction else 1.0
        assert effective_lr(optimizer) == pytest.approx(0.5 * group["d"] * factor)


def test_d_adapted_sgd_logs_the_lr_of_its_update() -> None:
    library = pytest.importorskip("pytorch_optimizer", reason="pytorch_optimizer is not installed")
    model = nn.Linear(4, 1)
    optimizer = library.DAdaptSGD(model.parameters(), lr=1.0, momentum=0.0)
    for _ in range(3):
        step(optimizer, model)
    group = optimizer.param_groups[0]
    assert effective_lr(optimizer) == pytest.approx(group["d"] / group["g0_norm"])


def test_schedule_free_logs_its_lr_with_warm_up() -> None:
    schedulefree = pytest.importorskip("schedulefree", reason="schedulefree is not installed")
    model = nn.Linear(4, 1)
    optimizer = schedulefree.SGDScheduleFree(model.parameters(), lr=1.0, warmup_steps=10)
    optimizer.train()
    step(optimizer, model)
    assert effective_lr(optimizer) == pytest.approx(0.1)
    step(optimizer, model)
    assert effective_lr(optimizer) == pytest.approx(0.2)
