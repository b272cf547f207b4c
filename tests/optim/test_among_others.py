"""ZENITH as an optimizer among others: wrappers, other classes' states, torch's hooks and modes, sharded parameters."""

from __future__ import annotations

import copy
import inspect
import itertools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from zenith_det.optim import ZENITH, ZENITHAdamW, accept_other_states

KINDS: list[Any] = [ZENITH, ZENITHAdamW]
MOMENTUM: dict[Any, str] = {
    ZENITH: "momentum_buffer",
    torch.optim.SGD: "momentum_buffer",
    ZENITHAdamW: "exp_avg",
    torch.optim.AdamW: "exp_avg",
}


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


def make(kind: Any, model: nn.Module, **options: Any) -> Any:
    if MOMENTUM[kind] == "momentum_buffer":
        options = {"momentum": 0.9, **options}
    return kind([{"params": layer.parameters()} for layer in model.children()], **{"lr": 0.1, **options})


def train(optimizer: Any, model: nn.Module, steps: int, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, 3, generator=generator)).square().mean().backward()
        optimizer.step()


class Imitation:
    """As Lightning's and Fabric's wrappers do it."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self.__class__ = type("Imitated", (Imitation, type(optimizer)), {})

    def step(self, closure: Any = None) -> Any:
        return self._optimizer.step(closure)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimizer, name)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_called_on_a_wrapper_reaches_the_optimizer(kind: Any) -> None:
    p = nn.Parameter(torch.ones(4))
    raw = kind([p], lr=0.1, window=2)
    wrapper: Any = Imitation(raw)
    for norm in (10.0, 10.0, 1.0, 1.0):
        p.grad = torch.full((4,), norm / 2)
        wrapper.record_norm()
        nn.utils.clip_grad_norm_([p], 0.01)
        wrapper.step()
    assert (raw.zenith_state()["grad_norm"], raw.zenith_state()["ratio"]) == pytest.approx((1.0, 0.1))
    assert wrapper.effective_lrs() == raw.effective_lrs()

    saved = copy.deepcopy(wrapper.state_dict())
    saved["param_groups"][0]["lr"] = 0.25
    wrapper.reset_history()
    assert raw.zenith_state()["recorded_steps"] == 0
    wrapper.load_state_dict(saved)
    assert raw.param_groups[0]["lr"] == 0.25
    assert raw.zenith_state()["ratio"] == pytest.approx(0.1)
    assert torch.equal(raw.state[p].get(MOMENTUM[kind], p), saved["state"].get(0, {}).get(MOMENTUM[kind], p))


def test_a_wrapper_does_not_measure_gradients_that_are_still_scaled() -> None:
    p = nn.Parameter(torch.ones(4))
    raw = ZENITH([p], lr=0.1)
    p.grad = torch.full((4,), 500.0)

    class Unscales(Imitation):
        def step(self, closure: Any = None) -> Any:
            p.grad.div_(1000)  # type: ignore[union-attr]
            return super().step(closure)

    wrapper: Any = Unscales(raw)
    wrapper.__class__ = type("Imitated", (Unscales, ZENITH), {})
    wrapper.step()
    assert float(raw.grad_norm) == pytest.approx(1.0)


@pytest.mark.parametrize("void", ["zero_grad", "backward", "the model's zero_grad"])
def test_a_recorded_norm_is_not_used_for_other_gradients(void: str) -> None:
    model = nn.Linear(2, 1, bias=False)
    optimizer = ZENITH(model.parameters(), lr=0.1)
    (1000 * model.weight.sum()).backward()
    optimizer.record_norm()  # and the step never comes
    if void == "zero_grad":
        optimizer.zero_grad()
        model.weight.grad = torch.ones(1, 2)
    else:
        if void != "backward":
            model.zero_grad()
        model.weight.grad = None
        model.weight.sum().backward()
    optimizer.step()
    assert float(optimizer.grad_norm) == pytest.approx(2**0.5)


@pytest.mark.parametrize(("saved", "loads"), list(itertools.product(MOMENTUM, repeat=2)))
def test_every_pair_loads(saved: Any, loads: Any, tmp_path: Path) -> None:
    model = net()
    first = make(saved, model, lr=0.07, weight_decay=0.02)
    train(first, model, 4)
    torch.save(first.state_dict(), tmp_path / "state.pth")
    other = net()
    second = make(loads, other, lr=0.5, weight_decay=0.3)
    accept_other_states(second)
    second.load_state_dict(torch.load(tmp_path / "state.pth", weights_only=True))
    same = MOMENTUM[saved] == MOMENTUM[loads]
    for group in second.param_groups:
        assert (group["lr"], group["weight_decay"]) == ((0.07, 0.02) if same else (0.5, 0.3))
        assert group.get("momentum", 0.9) in (0.9, 0.0)
    for p, q in zip(model.parameters(), other.parameters()):
        if same:
            assert torch.equal(second.state[q][MOMENTUM[loads]], first.state[p][MOMENTUM[saved]])
        else:
            assert not second.state[q]
    if saved in KINDS and loads in KINDS:
        assert second.zenith_state() == first.zenith_state()
    train(second, other, 3)
    assert all(p.isfinite().all() for p in other.parameters())
    # And back.
    accept_other_states(first)
    first.load_state_dict(second.state_dict())
    train(first, model, 1)
    if same:
        assert first.param_groups[0]["lr"] == 0.07


@pytest.mark.parametrize(("saved", "loads"), [(ZENITH, torch.optim.SGD), (ZENITHAdamW, torch.optim.AdamW)])
def test_torchs_own_class_goes_on_as_it_would_have(saved: Any, loads: Any) -> None:
    """Without help: at a ratio of 1 it trains the same."""
    model, other = net(), net()
    first = make(saved, model, min_ratio=1.0, fused=False)
    train(first, model, 4)
    other.load_state_dict(model.state_dict())
    second = make(loads, other)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    train(first, model, 4, seed=1)
    train(second, other, 4, seed=1)
    for p, q in zip(model.parameters(), other.parameters()):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_distributed_checkpoint_keeps_the_history_of_groups_in_another_order(kind: Any, flat: bool) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=flat)

    def optimizer_of(model: nn.Sequential, order: tuple[int, ...]) -> Any:
        groups = [{"params": model[i].parameters(), "lr": (0.1, 0.01)[i]} for i in order]
        # (Without any state torch leaves the groups in the order they were saved in.)
        return kind(groups, lr=0.1, window=2, **({"momentum": 0.9} if kind is ZENITH else {}))

    model = net()
    optimizer = optimizer_of(model, (0, 1))
    train(optimizer, model, 4)
    saved = get_optimizer_state_dict(model, optimizer, options=options)
    other = net()
    loaded = optimizer_of(other, (1, 0))
    set_optimizer_state_dict(other, loaded, saved, options=options)
    assert loaded.zenith_state() == optimizer.zenith_state()
    assert [group["lr"] for group in loaded.param_groups] == [0.01, 0.1]
    assert not any("zenith" in group for group in loaded.param_groups)


@pytest.mark.parametrize(
    ("kind", "group", "message"),
    [
        (ZENITH, {"window": 2}, "window is one for all groups"),
        (ZENITHAdamW, {"max_norm": 0.1}, "max_norm is one for all groups"),
        (ZENITH, {"clip": None}, "clip is one for all groups"),
        (ZENITH, {"dampening": 0.5}, "dampening must be 0.0 or left out: ZENITH has none, got 0.5"),
        (ZENITH, {"betas": (0.5, 0.9)}, "betas must be"),
        (ZENITHAdamW, {"amsgrad": True}, "amsgrad must be False or left out: ZENITHAdamW has none"),
        (ZENITHAdamW, {"momentum": 0.9}, "momentum must be 0.0 or left out"),
        (ZENITH, {"differentiable": True}, "differentiable must be"),
    ],
)
def test_options_that_a_group_cannot_have_are_refused(kind: Any, group: dict[str, Any], message: str) -> None:
    p = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match=message):
        kind([{"params": [p], **group}], lr=0.1)
    optimizer = kind([nn.Parameter(torch.ones(3))], lr=0.1)
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [p], **group})


def test_a_groups_own_entries_stay() -> None:
    groups = [{"params": [nn.Parameter(torch.ones(3))], "name": "backbone", "lr_scale": 0.1, "foreach": True}]
    optimizer = ZENITH(groups, lr=0.1)
    again = ZENITH([{"params": [nn.Parameter(torch.ones(3))]}], lr=0.1)
    again.load_state_dict(optimizer.state_dict())
    assert (again.param_groups[0]["name"], again.param_groups[0]["lr_scale"]) == ("backbone", 0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_torchs_hooks_see_the_whole_state(kind: Any) -> None:
    model = net()
    optimizer = make(kind, model, window=2)
    train(optimizer, model, 3)
    plain = copy.deepcopy(optimizer.state_dict())
    optimizer.register_state_dict_post_hook(lambda _, state: {"inside": state})
    wrapped = optimizer.state_dict()
    assert int(wrapped["inside"]["param_groups"][0]["zenith"]["counts"][0]) == 3

    other = make(kind, net(), window=2)
    seen: list[Any] = []
    other.register_load_state_dict_pre_hook(lambda _, state: state["inside"])
    other.register_load_state_dict_post_hook(lambda o: seen.append(o.zenith_state()["recorded_steps"]))
    other.load_state_dict(wrapped)
    assert seen == [3]
    assert other.state_dict()["param_groups"][1]["lr"] == plain["param_groups"][1]["lr"]


@pytest.mark.parametrize("kind", KINDS)
def test_state_that_belongs_to_no_parameter_is_kept(kind: Any) -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = kind([p], lr=0.1)
    optimizer.state["note"] = {"step": 7, "text": "of another library"}
    optimizer.state["number"] = 5
    p.grad = torch.ones(3)
    optimizer.step()
    other = kind([nn.Parameter(torch.ones(3))], lr=0.1)
    other.load_state_dict(optimizer.state_dict())
    assert other.state["note"] == {"step": 7, "text": "of another library"}
    assert other.state["number"] == 5


MODES: dict[str, Callable[[], Any]] = {
    "meta": lambda: torch.device("meta"),
    "inference": torch.inference_mode,
    "fake": FakeTensorMode,
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_built_and_loaded_in_a_mode_and_used_outside(kind: Any, mode: str) -> None:
    model, plain = net(), net()
    with MODES[mode]():
        optimizer = make(kind, model, window=2)
    expected = make(kind, plain, window=2)
    train(optimizer, model, 4)
    train(expected, plain, 4)
    assert optimizer.zenith_state() == expected.zenith_state()
    if mode == "inference":
        with torch.inference_mode():
            optimizer.reset_history()
        train(optimizer, model, 2)


@pytest.mark.parametrize("mode", ["meta", "fake"])
@pytest.mark.parametrize("lr", [0.1, "tensor"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_training_in_a_mode(kind: Any, lr: Any, mode: str) -> None:
    with MODES[mode]():
        model = net()
        optimizer = make(kind, model, lr=torch.tensor(0.1) if lr == "tensor" else lr, window=2)
        for _ in range(12):
            for p in model.parameters():
                p.grad = torch.ones_like(p)
            optimizer.step()
        optimizer.state_dict()


@pytest.mark.parametrize(("kind", "takes"), [(ZENITH, "momentum"), (ZENITHAdamW, "betas")])
def test_the_signature_is_torchs_and_shows_the_rest(kind: Any, takes: str) -> None:
    names = list(inspect.signature(kind).parameters)
    assert names[:3] == ["params", "lr", takes]
    assert {"window", "min_ratio", "record_after", "norm_source", "max_norm", "clip"} <= set(names)
    value = 0.9 if takes == "momentum" else (0.8, 0.9)
    assert kind([nn.Parameter(torch.ones(1))], 0.1, value).param_groups[0][takes] == value


@pytest.mark.parametrize(
    "betas", [[0.8, 0.9], np.array([0.8, 0.9]), torch.tensor([0.8, 0.9], dtype=torch.float64)]
)
def test_betas_of_any_sequence(betas: Any) -> None:
    optimizer = ZENITHAdamW([{"params": [nn.Parameter(torch.ones(1))], "betas": betas}], 0.1, betas)
    assert optimizer.param_groups[0]["betas"] == optimizer.defaults["betas"] == (0.8, 0.9)
    for wrong in (0.9, "ab", [0.9], [0.9, 1.0]):
        with pytest.raises(ValueError, match="betas must be two numbers"):
            ZENITHAdamW([nn.Parameter(torch.ones(1))], betas=wrong)  # type: ignore[arg-type]


def _rank(rank: int, file: str) -> None:
    torch.distributed.init_process_group("gloo", f"file://{file}", rank=rank, world_size=2)
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = net()
    with pytest.raises(ValueError, match="ZeroRedundancyOptimizer would take the norm of each rank's part"):
        ZeroRedundancyOptimizer(model.parameters(), ZENITH, lr=0.1)
    for original in (False, True):
        sharded = FullyShardedDataParallel(net(), use_orig_params=original, device_id=torch.device("cpu"))
        with pytest.raises(ValueError, match="belongs to FullyShardedDataParallel"):
            ZENITHAdamW(sharded.parameters(), lr=0.1)
    torch.distributed.destroy_process_group()


def test_parts_of_parameters_are_refused_by_name(tmp_path: Path) -> None:
    mp.spawn(_rank, args=(str(tmp_path / "store"),), nprocs=2)


def _torchs_inputs(table: str) -> list[Any]:
    tables = pytest.importorskip("torch.testing._internal.common_optimizers", exc_type=ImportError)
    inputs = getattr(tables, table)("cpu")
    without = {"dampening", "amsgrad", "capturable", "foreach", "differentiable"}
    return [one for one in inputs if not without & {k for k, v in one.kwargs.items() if v}]


@pytest.mark.parametrize(
    ("kind", "torchs", "table"),
    [
        (ZENITH, torch.optim.SGD, "optim_inputs_func_sgd"),
        (ZENITHAdamW, torch.optim.AdamW, "optim_inputs_func_adamw"),
    ],
)
def test_torchs_own_inputs(kind: Any, torchs: Any, table: str) -> None:
    """Each of torch's tables' inputs, at a ratio of 1, is torch's optimizer; then deepcopied, saved and loaded."""
    inputs = _torchs_inputs(table)
    assert len(inputs) >= 4
    for one in inputs:
        models = net(), net()
        kwargs = [copy.deepcopy(one.kwargs) for _ in models]
        ours = kind(models[0].parameters(), min_ratio=1.0, fused=False, **kwargs[0])
        theirs = torchs(models[1].parameters(), foreach=False, **kwargs[1])
        for optimizer, model in zip((ours, theirs), models):
            train(optimizer, model, 5)
        for p, q in zip(models[0].parameters(), models[1].parameters()):
            torch.testing.assert_close(p, q, msg=one.desc)
        again = copy.deepcopy(ours)
        again.load_state_dict(ours.state_dict())
        assert again.zenith_state() == ours.zenith_state()


def _rosenbrock(x: Tensor) -> Tensor:
    return (1 - x[0]) ** 2 + 0.5 * (x[1] - x[0] ** 2) ** 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_generic_optimizer_test(kind: Any, caplog: pytest.LogCaptureFixture) -> None:
    """As other libraries test theirs: the loss falls, a closure, no gradients, and what it prints."""
    x = nn.Parameter(torch.tensor([-1.0, 1.0]))
    optimizer = kind([x], lr=0.02, window=20)
    assert optimizer.step() is None

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = _rosenbrock(x)
        loss.backward()
        return loss

    first = float(_rosenbrock(x.detach()))
    for _ in range(300):
        loss = optimizer.step(closure)
    assert float(loss.detach()) < 0.2 * first
    assert "window: 20" in repr(optimizer)
    assert "norm_history" not in repr(optimizer)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
