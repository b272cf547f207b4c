"""ZENITH against its literal twin, and against torch's SGD and AdamW where the adaptation is off."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from zenith_det.optim import ZENITH, ZENITHAdamW

from .literal_zenith import Vector
from .twins import Twins


def clip_values(params: list[torch.Tensor]) -> None:
    torch.nn.utils.clip_grad_value_(params, 0.5)


def clip_values_literally(grads: list[Vector]) -> list[Vector]:
    return [[min(max(x, -0.5), 0.5) for x in grad] for grad in grads]


OPTIONS: dict[str, dict[str, Any]] = {
    "the paper's form": {},
    "momentum": {"momentum": 0.9},
    "nesterov": {"momentum": 0.8, "nesterov": True},
    "weight decay": {"weight_decay": 0.01},
    "all of SGD": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01, "maximize": True},
    "maximize": {"maximize": True, "weight_decay": 0.01},
    "window 1": {"window": 1, "momentum": 0.9},
    "min_ratio": {"min_ratio": 0.4, "momentum": 0.9},
    "record_after": {"record_after": 40},
    "half_life": {"half_life": 300, "record_after": 10, "momentum": 0.9},
    "momentum norm": {"norm_source": "momentum", "momentum": 0.9, "weight_decay": 0.01},
    "momentum norm, late": {"norm_source": "momentum", "momentum": 0.9, "record_after": 5},
    "clip by global norm": {"max_norm": 3.0, "momentum": 0.9, "weight_decay": 0.01},
    "clip by value": {"clip": (clip_values, clip_values_literally), "momentum": 0.9},
    "AdamW": {"kind": ZENITHAdamW, "weight_decay": 0.05},
    "AdamW, all": {"kind": ZENITHAdamW, "betas": (0.8, 0.95), "eps": 1e-3, "maximize": True, "max_norm": 3.0},
    "AdamW, momentum norm": {"kind": ZENITHAdamW, "norm_source": "momentum", "min_ratio": 0.1},
    "AdamW, half_life": {"kind": ZENITHAdamW, "half_life": 300},
    "AdamW, clip by value": {"kind": ZENITHAdamW, "clip": (clip_values, clip_values_literally)},
}


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("name", OPTIONS)
def test_agrees_with_literal_over_thousands_of_steps(name: str, fused: bool | None) -> None:
    options = {"window": 20, **OPTIONS[name]}
    twins = Twins(fused=fused, **options)
    for step in range(2000 if fused is None else 1000):
        twins.draw(size=math.exp(-step / 400) * (1 + 0.3 * math.sin(step / 50)), missing=0.1)
        if step % 97 in (0, 50, 51):  # the very first step too
            twins.params[step % 2].grad = torch.full_like(
                twins.params[step % 2], (math.inf, math.nan)[step % 2]
            )
        if step % 400 == 13:
            twins.draw(missing=1.0)
        if step % 500 == 250:
            twins.set_lr(0, twins.literal.groups[0]["lr"] * 0.9)
        twins.step()
        if step % 100 == 0 or step < 30:
            twins.assert_agree()
    twins.assert_agree()
    # The run was worth comparing: the ratio did move.
    assert twins.literal.ratio < 0.9
    assert twins.literal.skipped > 25


def test_agrees_in_float32() -> None:
    twins = Twins(dtype=torch.float32, window=20, momentum=0.9, max_norm=5.0)
    for step in range(2000):
        twins.draw(size=math.exp(-step / 600))
        twins.step()
    state = twins.optimizer.zenith_state()
    assert state["ratio"] == pytest.approx(twins.literal.ratio, rel=1e-6)
    assert state["zenith"] == pytest.approx(twins.literal.zenith, rel=1e-6)
    twins.assert_agree(rel=1e-4)  # the parameters themselves are rounded in every step


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_agrees_with_literal_whatever_happens(data: st.DataObject) -> None:
    adamw = data.draw(st.booleans(), label="AdamW")
    momentum = data.draw(st.sampled_from([0.0, 0.5, 0.9]), label="momentum")
    # With β₂ at 0 and no ε, AdamW's step is a sign: a rounding error of the gradient would turn it round.
    own = (
        {"kind": ZENITHAdamW, "betas": (momentum, 0.95), "eps": 1e-3}
        if adamw
        else {"momentum": momentum, "nesterov": bool(momentum) and data.draw(st.booleans(), label="nesterov")}
    )
    twins = Twins(
        seed=data.draw(st.integers(0, 2**16), label="seed"),
        lr=data.draw(st.floats(0.0, 0.1), label="lr"),
        window=data.draw(st.integers(1, 6), label="window"),
        min_ratio=data.draw(st.sampled_from([0.0, 0.3, 1.0]), label="min_ratio"),
        record_after=data.draw(st.integers(0, 4), label="record_after"),
        max_norm=data.draw(st.sampled_from([None, 0.1, 5.0]), label="max_norm"),
        norm_source=data.draw(st.sampled_from(["gradient", "momentum"] if momentum else ["gradient"])),
        weight_decay=data.draw(st.sampled_from([0.0, 0.1]), label="weight_decay"),
        fused=data.draw(st.sampled_from([None, False]), label="fused"),
        max_nonfinite_steps=1000,
        **own,
    )
    events = st.sampled_from(
        ["plain", "small", "zero", "inf", "nan", "some", "none", "record", "amp", "overflow", "reset"]
    )
    for event in data.draw(st.lists(events, max_size=25), label="events"):
        size = {"small": 1e-6, "zero": 0.0}.get(event, 1.0)
        twins.draw(size=size, missing={"some": 0.5, "none": 1.0}.get(event, 0.0))
        if event in ("inf", "nan"):
            twins.params[0].grad = torch.full_like(twins.params[0], float(event))
        literal_options: dict[str, Any] = {}
        if event == "record":
            literal_options["measured"] = float(twins.optimizer.record_norm())
            for p in twins.params:
                assert p.grad is not None
                p.grad.mul_(0.01)
        if event in ("amp", "overflow"):  # as GradScaler.step does it
            found = event == "overflow"
            twins.optimizer.grad_scale = torch.tensor(8.0)
            twins.optimizer.found_inf = torch.tensor(float(found))
            literal_options = {"grad_scale": 8.0, "found_inf": found}
        if event == "reset":
            twins.optimizer.reset_history()
            twins.literal.reset_history()
        twins.step(**literal_options)
        if event in ("amp", "overflow"):
            del twins.optimizer.grad_scale, twins.optimizer.found_inf
        twins.assert_agree()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.9},
        {"momentum": 0.9, "weight_decay": 1e-2},
        {"momentum": 0.9, "weight_decay": 1e-2, "nesterov": True, "maximize": True},
    ],
    ids=["plain", "momentum", "decay", "all"],
)
def test_min_ratio_1_is_torch_sgd_bit_for_bit(options: dict[str, Any], dtype: torch.dtype) -> None:
    assert_bit_equal(ZENITH, torch.optim.SGD, dtype, {"lr": 0.1, **options})


def test_unfused_min_ratio_1_is_torch_sgd_to_rounding() -> None:
    torch.manual_seed(0)
    ours = nn.Linear(20, 10)
    theirs = copy.deepcopy(ours)
    options: dict[str, Any] = {"momentum": 0.9, "weight_decay": 1e-2, "nesterov": True}
    zenith = ZENITH(ours.parameters(), 0.1, min_ratio=1.0, fused=False, **options)
    sgd = torch.optim.SGD(theirs.parameters(), 0.1, foreach=False, **options)
    for _ in range(200):
        for p, q in zip(ours.parameters(), theirs.parameters()):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        zenith.step()
        sgd.step()
    for p, q in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "options", [{}, {"betas": (0.5, 0.9), "eps": 1e-4, "maximize": True, "weight_decay": 0.0}]
)
def test_min_ratio_1_is_torch_adamw_bit_for_bit(options: dict[str, Any], dtype: torch.dtype) -> None:
    assert_bit_equal(ZENITHAdamW, torch.optim.AdamW, dtype, {"lr": 0.01, **options})


def assert_bit_equal(kind: Any, torchs: Any, dtype: torch.dtype, options: dict[str, Any]) -> None:
    """100 steps of ours with its adaptation off, and of torch's."""
    if dtype.itemsize == 2 and torch.__version__ < (2, 14):
        pytest.skip("torch's fused CPU kernel is wrong for half precision before 2.14")
    torch.manual_seed(0)
    ours = nn.ParameterList(torch.randn(shape).to(dtype) for shape in [(33, 65), (129,), (4, 3, 3, 3), ()])
    theirs = copy.deepcopy(ours)
    zenith = kind(ours, min_ratio=1.0, window=5, **options)
    reference = torchs(theirs, fused=True, **options)
    for step in range(100):
        for p, q in zip(ours, theirs):
            p.grad = None if step % 7 == 3 and p.ndim == 1 else torch.randn_like(p)
            q.grad = None if p.grad is None else p.grad.clone()
        zenith.step()
        reference.step()
        for p, q in zip(ours, theirs):
            assert torch.equal(p, q)
            for name, value in reference.state.get(q, {}).items():
                assert torch.equal(zenith.state[p][name], value)
    assert zenith.effective_lrs() == [options["lr"]]
