"""Clipped gradients reach the update; ZENITH's LR doesn't notice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from zenith_det.config import get_cfg
from zenith_det.errors import ConfigError
from zenith_det.optim import ZENITH
from zenith_det.solver import add_gradient_clipping, build_optimizer
from zenith_det.solver.clipping import make_clipper
from zenith_det.solver.param_groups import get_param_groups, parameters_of

from .helpers import backward, config, make_model, same_weights, train

KINDS = ("value", "norm", "full_model")


def clip_config(kind: str, value: float = 0.01, norm_type: float = 2.0, **solver: Any) -> Any:
    return config(
        CLIP_GRADIENTS__ENABLED=True,
        CLIP_GRADIENTS__CLIP_TYPE=kind,
        CLIP_GRADIENTS__CLIP_VALUE=value,
        CLIP_GRADIENTS__NORM_TYPE=norm_type,
        **solver,
    )


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def reference(kind: str, raw: dict[str, torch.Tensor], limit: float, p: float) -> dict[str, torch.Tensor]:
    """What each kind of clipping leaves, by its definition."""
    if kind == "value":
        return {name: grad.clamp(-limit, limit) for name, grad in raw.items()}
    norms = {name: torch.linalg.vector_norm(grad, p) for name, grad in raw.items()}
    if kind == "full_model":
        total = torch.linalg.vector_norm(torch.stack(list(norms.values())), p)
        norms = dict.fromkeys(norms, total)
    return {name: grad * (limit / norms[name]).clamp(max=1) for name, grad in raw.items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm_type", [1.0, 2.0, float("inf")])
@pytest.mark.parametrize("limit", [0.001, 1e6])
def test_gradients_are_clipped_by_the_definition(kind: str, norm_type: float, limit: float) -> None:
    model = make_model()
    backward(model, seed=1)
    raw = gradients(model)
    clipper = make_clipper(clip_config(kind, limit, norm_type))
    assert clipper is not None
    clipper(model.parameters())
    for name, expected in reference(kind, raw, limit, norm_type).items():
        torch.testing.assert_close(gradients(model)[name], expected, rtol=2e-3, atol=1e-9)


def test_clipping_is_off_by_default_and_unknown_kinds_are_told() -> None:
    assert make_clipper(config()) is None
    cfg = get_cfg()
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = "full"
    with pytest.raises(ConfigError, match="CLIP_TYPE 'full' is not one of value, norm, full_model"):
        make_clipper(cfg)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["ZENITH", "ZENITHAdamW", "SGD"])
def test_a_step_without_any_gradient_changes_nothing(kind: str, name: str) -> None:
    model = make_model()
    optimizer = build_optimizer(clip_config(kind, OPTIMIZER=name), model)
    optimizer.step()
    assert same_weights(model, make_model())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["ZENITH", "SGD", "AdamW"])
def test_the_update_is_the_one_of_clipped_gradients(kind: str, name: str) -> None:
    cfg = clip_config(kind, OPTIMIZER=name, BASE_LR=0.1, ZENITH__MIN_RATIO=1.0)
    clipped, plain = make_model(), make_model()
    optimizer = build_optimizer(cfg, clipped)
    other = build_optimizer(config(OPTIMIZER=name, BASE_LR=0.1, ZENITH__MIN_RATIO=1.0), plain)
    clipper = make_clipper(cfg)
    assert clipper is not None
    for seed in range(5):
        backward(clipped, seed)
        optimizer.step()
        backward(plain, seed)
        clipper(parameters_of(other))
        other.step()
    for (key, value), expected in zip(clipped.state_dict().items(), plain.state_dict().values()):
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-6, msg=key)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm_type", [2.0, 1.0])
def test_zenith_records_the_norm_before_it_is_clipped(kind: str, norm_type: float) -> None:
    model = make_model()
    optimizer: Any = build_optimizer(clip_config(kind, 0.001, norm_type, ZENITH__WINDOW=3), model)
    for seed in range(4):
        backward(model, seed)
        raw = torch.linalg.vector_norm(torch.cat([grad.flatten() for grad in gradients(model).values()]))
        optimizer.step()
        assert optimizer.zenith_state()["grad_norm"] == pytest.approx(raw.item(), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_lr_trace_is_the_same_with_and_without_clipping(kind: str) -> None:
    # One gradient stream, whatever the weights do: a model that is linear in them.
    traces = []
    for cfg in (config(ZENITH__WINDOW=3), clip_config(kind, ZENITH__WINDOW=3)):
        model = nn.Linear(4, 1)
        optimizer: Any = build_optimizer(cfg, model)
        trace = []
        for step in range(12):
            model.zero_grad()
            (model(torch.full((1, 4), 10.0 / (step + 1)))).sum().backward()
            optimizer.step()
            trace.append(optimizer.effective_lrs()[0])
        traces.append(trace)
    assert traces[0] == traces[1]
    assert traces[0][-1] < 0.5 * traces[0][0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["ZENITH", "ZENITHAdamW", "SGD", "AdamW"])
def test_a_grad_scaler_changes_nothing(kind: str, name: str) -> None:
    cfg = clip_config(kind, OPTIMIZER=name, ZENITH__WINDOW=2)
    plain, scaled = make_model(), make_model()
    optimizer, other = build_optimizer(cfg, plain), build_optimizer(cfg, scaled)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaler.scale(torch.ones(()))  # makes its tensors
    for seed in range(4):
        backward(plain, seed)
        optimizer.step()
        backward(scaled, seed, scale=scaler.get_scale())
        scaler.step(other)
        scaler.update()
    for (key, value), expected in zip(scaled.state_dict().items(), plain.state_dict().values()):
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-7, msg=key)


class Doubled(torch.optim.SGD):
    """A subclass with its own step, which must stay in charge."""

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.mul_(2)
        return loss


def test_the_optimizer_keeps_its_class_its_state_and_what_step_returns() -> None:
    model = make_model()
    plain = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    wrapped = add_gradient_clipping(clip_config("value"), plain)
    assert wrapped is plain
    assert type(wrapped) is torch.optim.SGD

    def closure() -> torch.Tensor:
        backward(model, seed=3)
        return torch.tensor(7.0)

    for value in (wrapped.step(closure), wrapped.step(closure=closure)):
        assert value == 7.0
    assert max(grad.abs().max().item() for grad in gradients(model).values()) <= 0.01
    assert "momentum_buffer" in next(iter(wrapped.state.values()))


def test_a_subclassed_optimizer_clips_and_steps_once() -> None:
    parameter = nn.Parameter(torch.tensor([1.0]))
    optimizer = add_gradient_clipping(clip_config("value", 0.5), Doubled([parameter], lr=1.0))
    parameter.grad = torch.tensor([100.0])
    optimizer.step()
    assert parameter.item() == 2 * (1.0 - 0.5)


@pytest.mark.detectron2
@pytest.mark.parametrize("kind", [None, "value", "norm"])
def test_sgd_equals_detectron2s_bit_for_bit(kind: str | None) -> None:
    solver = pytest.importorskip("detectron2.solver", reason="Detectron2 is not installed")
    cfg = clip_config(kind, OPTIMIZER="SGD") if kind else config(OPTIMIZER="SGD")
    ours, theirs = make_model(), make_model()
    for model in (ours, theirs):
        model.unused.requires_grad_(False)  # Detectron2's clipping by value raises where there is no gradient
    our_optimizer, their_optimizer = build_optimizer(cfg, ours), solver.build_optimizer(cfg, theirs)
    train(ours, our_optimizer, 20)
    train(theirs, their_optimizer, 20)
    assert same_weights(ours, theirs)
    our_state, their_state = our_optimizer.state_dict(), their_optimizer.state_dict()
    for key, value in their_state["state"].items():
        assert torch.equal(our_state["state"][key]["momentum_buffer"], value["momentum_buffer"])
    our_optimizer.load_state_dict(their_state)
    their_optimizer.load_state_dict(our_state)


@pytest.mark.parametrize("kind", KINDS)
def test_a_projects_own_entry_may_clip_zenith_as_the_documentation_shows(kind: str) -> None:
    cfg = clip_config(kind, value=0.01, OPTIMIZER="ZENITH", ZENITH__WINDOW=3)
    ours, theirs = make_model(), make_model()
    built = build_optimizer(cfg, ours)
    solver = cfg.SOLVER
    own = ZENITH(
        get_param_groups(cfg, theirs),
        lr=solver.BASE_LR,
        momentum=solver.MOMENTUM,
        weight_decay=solver.WEIGHT_DECAY,
        window=3,
    )
    own = add_gradient_clipping(cfg, own)
    train(ours, built, 8)
    train(theirs, own, 8)
    assert own.zenith_state() == pytest.approx(built.zenith_state(), rel=1e-5)
    assert own.zenith_state()["ratio"] < 1
