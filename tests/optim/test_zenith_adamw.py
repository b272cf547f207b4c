"""ZENITH under AdamW's update: what is not the same code as under SGD's."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from zenith_det.optim import ZENITHAdamW

from .tensors import LAYOUTS, memory_of

OFF: dict[str, Any] = {"lr": 0.01, "min_ratio": 1.0}


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Linear(8, 4))


def draw(*models: nn.Module, size: float = 1.0) -> None:
    for params in zip(*(model.parameters() for model in models)):
        grad = size * torch.randn(params[0].shape)
        for param in params:
            param.grad = grad.clone()


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def equal(one: Any, other: Any) -> bool:
    return all(map(torch.equal, one, other))


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("first", [True, False], ids=["in the first step", "later"])
def test_a_step_that_is_not_finite_counts_for_nothing(first: bool, fused: bool | None) -> None:
    """Not for the bias correction either: the next step is as if there had been none."""
    model, clean = net(), net()
    zenith, other = (ZENITHAdamW(m.parameters(), 0.01, window=3, fused=fused) for m in (model, clean))
    for t in range(6):
        if t == (0 if first else 4):
            before = weights(model)
            draw(model)
            model[1].bias.grad[1] = math.nan
            zenith.step()
            assert equal(weights(model), before)
        draw(model, clean)
        zenith.step()
        other.step()
    assert equal(weights(model), weights(clean))
    assert [int(s["step"]) for s in zenith.state.values()] == [6] * 4


@pytest.mark.parametrize("direction", ["to ZENITH", "from ZENITH"])
def test_either_goes_on_with_the_others_state(direction: str) -> None:
    made = {
        "to ZENITH": (lambda p: torch.optim.AdamW(p, 0.01, fused=True), lambda p: ZENITHAdamW(p, **OFF)),
        "from ZENITH": (lambda p: ZENITHAdamW(p, **OFF), lambda p: torch.optim.AdamW(p, 0.01, fused=True)),
    }
    begin, go_on = made[direction]
    model, whole = net(), net()
    first, reference = begin(model.parameters()), begin(whole.parameters())
    for _ in range(5):
        draw(model, whole)
        first.step()
        reference.step()
    second = go_on(model.parameters())
    second.load_state_dict(torch.load(_saved(first.state_dict()), weights_only=True))
    for _ in range(5):
        draw(model, whole)
        second.step()
        reference.step()
    torch.testing.assert_close(weights(model), weights(whole))  # loaded groups may be unfused


def test_numpy_options_load_under_weights_only() -> None:
    zenith = ZENITHAdamW(net().parameters(), np.float32(0.5), betas=[np.float64(0.9), np.float32(0.5)])  # type: ignore[arg-type]
    group = torch.load(_saved(zenith.state_dict()), weights_only=True)["param_groups"][0]
    assert (group["lr"], group["betas"]) == (0.5, (0.9, 0.5))


def test_a_state_of_another_kind_is_refused_with_a_name() -> None:
    model = net()
    amsgrad = torch.optim.AdamW(model.parameters(), amsgrad=True)
    with pytest.raises(
        ValueError, match=r"amsgrad must be False or left out: ZENITHAdamW has none, got True"
    ):
        ZENITHAdamW(model.parameters()).load_state_dict(amsgrad.state_dict())
    wide, narrow = nn.Linear(6, 9), nn.Linear(6, 4)
    saved = ZENITHAdamW(wide.named_parameters())
    draw(wide)
    saved.step()
    with pytest.raises(
        ValueError, match=r"loaded exp_avg of weight has shape \(9, 6\), the parameter \(4, 6\)"
    ):
        ZENITHAdamW(narrow.named_parameters()).load_state_dict(saved.state_dict())


@pytest.mark.parametrize("gradient", LAYOUTS)
@pytest.mark.parametrize("parameter", LAYOUTS)
def test_any_order_in_memory(parameter: str, gradient: str) -> None:
    torch.manual_seed(0)
    weight = torch.randn(8, 6, 3, 3)
    p, q = nn.Parameter(LAYOUTS[parameter](weight)), nn.Parameter(weight.clone())
    zenith, adamw = ZENITHAdamW([p], **OFF), torch.optim.AdamW([q], 0.01)
    for _ in range(3):
        q.grad = torch.randn(8, 6, 3, 3)
        p.grad = LAYOUTS[gradient](q.grad)
        zenith.step()
        adamw.step()
    torch.testing.assert_close(p, q)


def test_a_model_made_channels_last_mid_run() -> None:
    model, other = net(), net()
    zenith, adamw = ZENITHAdamW(model.parameters(), **OFF), torch.optim.AdamW(other.parameters(), 0.01)
    for t in range(4):
        if t == 2:
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        draw(model, other)
        zenith.step()
        adamw.step()
    torch.testing.assert_close(model[0].weight.contiguous(), other[0].weight)


def test_sparse_and_complex_gradients() -> None:
    torch.manual_seed(0)
    sparse, dense = nn.Embedding(9, 4, sparse=True), nn.Embedding(9, 4)
    dense.load_state_dict(sparse.state_dict())
    optimizers = [ZENITHAdamW(e.parameters(), 0.1, window=3) for e in (sparse, dense)]
    for _ in range(6):
        rows = torch.randint(0, 9, (5,))
        for embedding, optimizer in zip((sparse, dense), optimizers):
            optimizer.zero_grad()
            embedding(torch.cat((rows, rows))).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(sparse.weight, dense.weight)

    phase = nn.Parameter(torch.randn(5, dtype=torch.complex64))
    twin = nn.Parameter(phase.detach().clone())
    zenith, adamw = ZENITHAdamW([phase], **OFF), torch.optim.AdamW([twin], 0.01)
    for _ in range(4):
        phase.grad = torch.randn(5, dtype=torch.complex64)
        twin.grad = phase.grad.clone()
        zenith.step()
        adamw.step()
    torch.testing.assert_close(phase, twin)


@pytest.mark.parametrize("fused", [None, False])
def test_a_gradient_scaler_changes_nothing(fused: bool | None) -> None:
    """Powers of two: the unscaled gradients are the same to the bit."""
    model, other = net(), net()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    zenith, plain = (
        ZENITHAdamW(m.parameters(), 0.01, window=3, max_norm=1.0, fused=fused) for m in (model, other)
    )
    images = torch.randn(8, 3, 3, 3)
    for t in range(8):
        for m, optimizer, scale in ((model, zenith, scaler.scale), (other, plain, lambda loss: loss)):
            optimizer.zero_grad()
            loss = m[1](m[0](images).flatten(1)).square().mean()
            scale(loss / (t + 1)).backward()
        scaler.step(zenith)
        scaler.update()
        plain.step()
    torch.testing.assert_close(weights(model), weights(other))
    assert zenith.effective_lrs() == pytest.approx(plain.effective_lrs())
    assert zenith.zenith_state()["ratio"] < 0.9


def test_a_frozen_parameter_that_joins_has_its_own_bias_correction() -> None:
    model, other = net(), net()
    zenith, adamw = ZENITHAdamW(model.parameters(), **OFF), torch.optim.AdamW(other.parameters(), 0.01)
    for t in range(6):
        draw(model, other)
        if t < 3:
            model[1].weight.grad = other[1].weight.grad = None
        zenith.step()
        adamw.step()
    torch.testing.assert_close(weights(model), weights(other))


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda o: torch.load(_saved(o), weights_only=False)])
def test_copies_continue_alike(copier: Callable[[Any], Any]) -> None:
    model = net()
    zenith = ZENITHAdamW(model.named_parameters(), 0.01, window=3, max_norm=1.0)
    draw(model)
    zenith.step()
    model_copy, zenith_copy = copier((model, zenith))
    for _ in range(4):
        draw(model, model_copy)
        zenith.step()
        zenith_copy.step()
    assert equal(weights(model), weights(model_copy))
    assert repr(zenith) == repr(zenith_copy)


def _saved(value: Any) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return file


def test_state_is_that_of_adamw_plus_8_bytes_per_norm() -> None:
    model, other = net(), net()
    zenith, adamw = ZENITHAdamW(model.parameters()), torch.optim.AdamW(other.parameters())
    draw(model, other)
    zenith.step()
    adamw.step()
    assert memory_of(zenith.state_dict()) - memory_of(adamw.state_dict()) <= 8 * 100 + 64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1}, r"lr must be in \[0, inf\), got -1"),
        ({"betas": (0.9, 1.0)}, r"betas must be two numbers in \[0, 1\), got \(0\.9, 1\.0\)"),
        ({"betas": 0.9}, r"betas must be two numbers in \[0, 1\), got 0\.9"),
        ({"eps": -1e-8}, r"eps must be in \[0, inf\), got -1e-08"),
        ({"weight_decay": math.inf}, r"weight_decay must be in \[0, inf\), got inf"),
        ({"window": 0}, r"window must be an integer >= 1, got 0"),
    ],
)
def test_bad_arguments_are_named_with_value_and_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ZENITHAdamW(net().parameters(), **options)
