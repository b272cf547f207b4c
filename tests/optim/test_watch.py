"""Clipped norms and skipped steps are told, in any loop; clipping in a subclass's step is not measured."""

from __future__ import annotations

import itertools
import logging
import math
from typing import Any

import pytest
import torch
from torch import nn

from zenith_det.optim import ZENITH, ZENITHAdamW

KINDS = [ZENITH, ZENITHAdamW]


def weights() -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(6)), nn.Parameter(torch.ones(4))]


def gradients(steps: int, seed: int = 0) -> list[list[torch.Tensor]]:
    """Falling, as in training."""
    generator = torch.Generator().manual_seed(seed)
    return [[10 * 0.97**t * torch.randn(size, generator=generator) for size in (6, 4)] for t in range(steps)]


def train(optimizer: torch.optim.Optimizer, grads: list[list[torch.Tensor]], before_step: Any = None) -> None:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for step in grads:
        for param, grad in zip(params, step):
            param.grad = grad.clone()
        if before_step is not None:
            before_step(params)
        optimizer.step()


def clip(params: Any) -> None:
    nn.utils.clip_grad_norm_(params, 0.3)


@pytest.mark.parametrize("kind", KINDS)
def test_norms_that_a_clipping_made_equal_are_told_once(kind: Any, caplog: pytest.LogCaptureFixture) -> None:
    optimizer = kind(weights(), lr=0.01, window=8)
    train(optimizer, gradients(60), clip)
    told = [record for record in caplog.records if "record_norm()" in record.message]
    assert [record.levelno for record in told] == [logging.WARNING]
    assert "0.3 in each of the last 8 steps" in told[0].message


def test_ordinary_norms_are_not_told(caplog: pytest.LogCaptureFixture) -> None:
    train(ZENITH(weights(), lr=0.01, window=8), gradients(60))
    train(ZENITH(weights(), lr=0.01, window=8, max_norm=0.3), gradients(60))
    recorded = ZENITH(weights(), lr=0.01, window=8)
    train(recorded, gradients(60), lambda params: (recorded.record_norm(), clip(params)))
    train(ZENITH(weights(), lr=0.01, window=100), gradients(60), clip)  # no full window yet
    assert caplog.records == []


def test_many_skipped_steps_are_told(caplog: pytest.LogCaptureFixture) -> None:
    """40 of 45, never 50 in a row."""
    optimizer = ZENITH(weights(), lr=0.01, window=8)
    grads = gradients(45)
    for number, step in enumerate(grads):
        if number % 9:
            step[0][0] = math.nan
    train(optimizer, grads)
    assert optimizer.zenith_state()["skipped_steps"] == 40
    told = [record.message for record in caplog.records]
    assert len(told) == 1
    assert "steps were skipped" in told[0]


def test_a_few_skipped_steps_are_not_told(caplog: pytest.LogCaptureFixture) -> None:
    grads = gradients(200)
    for step in grads[:9]:
        step[0][0] = math.inf
    train(ZENITH(weights(), lr=0.01, window=8), grads)
    assert caplog.records == []


def clips_in_step(kind: Any) -> Any:
    class Clips(kind):  # type: ignore[misc, valid-type]
        def step(self, closure: Any = None) -> Any:
            clip(itertools.chain(*[group["params"] for group in self.param_groups]))
            return super().step(closure)

    return Clips


def clips_in_a_mixin(kind: Any) -> Any:
    class Clip:
        def step(self, closure: Any = None) -> Any:
            clip(itertools.chain(*[group["params"] for group in self.param_groups]))  # type: ignore[attr-defined]
            return super().step(closure)  # type: ignore[misc]

    class Clips(Clip, kind):  # type: ignore[misc, valid-type]
        pass

    return Clips


def clips_twice(kind: Any) -> Any:
    return clips_in_step(clips_in_step(kind))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [clips_in_step, clips_in_a_mixin, clips_twice])
def test_a_subclass_that_clips_in_step_records_the_raw_norm(make: Any, kind: Any) -> None:
    free = kind(weights(), lr=0.01, window=8)
    clipped = make(kind)(weights(), lr=0.01, window=8, fused=True)
    assert not clipped._step_supports_amp_scaling
    assert kind(weights(), lr=0.01, fused=True)._step_supports_amp_scaling
    assert not free._step_supports_amp_scaling
    train(free, gradients(60))
    train(clipped, gradients(60))
    assert clipped.zenith_state() == free.zenith_state()
    assert clipped.zenith_state()["ratio"] < 0.5
    moved, unclipped = (optimizer.param_groups[0]["params"][0] for optimizer in (clipped, free))
    assert not torch.allclose(moved, unclipped)


def test_such_a_subclass_takes_a_closure() -> None:
    optimizer = clips_in_step(ZENITH)(weights(), lr=0.01, window=8)
    reference = ZENITH(weights(), lr=0.01, window=8)
    for step in gradients(20):

        def closure(params: Any, step: Any = step) -> float:
            for param, grad in zip(params, step):
                param.grad = grad.clone()
            return 1.5

        for one in (optimizer, reference):
            params = one.param_groups[0]["params"]
            assert one.step(lambda params=params: closure(params)) == 1.5
    assert optimizer.zenith_state() == reference.zenith_state()
