"""ZENITH's ratio over other people's optimizers: the LR of the definition, and everything else left as it is."""

from __future__ import annotations

import copy
import functools
import io
import itertools
import logging
import math
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from zenith_det.optim import ZENITH, ZENITHAdamW, ZenithRatio, zenith_of
from zenith_det.optim.zenith_ratio import _RatioOfTheStepBefore

from .test_no_sync import NEEDS_CUDA, Reads
from .twins import Twins, vector

RATIO = ("window", "min_ratio", "record_after", "half_life", "max_nonfinite_steps", "wait")


def over(kind: type[Optimizer]) -> Callable[..., Optimizer]:
    """``kind`` with the ratio over it, made from both's arguments."""

    def make(params: Any, lr: Any, **options: Any) -> Optimizer:
        ratio = {name: options.pop(name) for name in RATIO if name in options}
        optimizer = kind(params, lr=lr, **options)
        ZenithRatio(optimizer, **ratio)
        return optimizer

    return make


def weights() -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(6)), nn.Parameter(torch.ones(4))]


def gradients(steps: int, seed: int = 0) -> list[list[Tensor]]:
    """Falling, as in training."""
    generator = torch.Generator().manual_seed(seed)
    return [[10 * 0.97**t * torch.randn(size, generator=generator) for size in (6, 4)] for t in range(steps)]


def params_of(optimizer: Optimizer) -> list[nn.Parameter]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def give(optimizer: Optimizer, grads: list[Tensor], scale: float = 1.0) -> None:
    for param, grad in zip(params_of(optimizer), grads):
        param.grad = scale * grad


def train(optimizer: Optimizer, steps: Any, step: Callable[[], Any] | None = None) -> list[float]:
    """Returns the first group's LR of each step."""
    lrs = []
    for grads in steps:
        give(optimizer, grads)
        (step or optimizer.step)()
        lrs.append(zenith_of(optimizer).effective_lrs()[0])  # type: ignore[union-attr]
    return lrs


def assert_equal_weights(one: Optimizer, other: Optimizer, rel: float = 1e-6) -> None:
    for first, second in zip(params_of(one), params_of(other)):
        torch.testing.assert_close(first, second, rtol=rel, atol=rel)


# ---- the LR


@pytest.mark.parametrize(
    "options",
    [
        {"window": 7},
        {"window": 7, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
        {
            "window": 3,
            "min_ratio": 0.6,
            "record_after": 5,
            "half_life": 2000,
            "momentum": 0.5,
            "foreach": True,
        },
        {"window": 5, "momentum": 0.9, "fused": True, "weight_decay": 0.01},
        {"window": 5, "maximize": True},
    ],
)
def test_over_sgd_it_is_the_definition(options: dict[str, Any]) -> None:
    twins = Twins(kind=over(SGD), **options)
    drive(twins)


@pytest.mark.parametrize(
    "options",
    [{"window": 7, "weight_decay": 0.1}, {"window": 3, "fused": True}, {"window": 4, "foreach": True}],
)
def test_over_adamw_it_is_zenith_under_adamw(options: dict[str, Any]) -> None:
    drive(Twins(kind=over(AdamW), lr=0.001, **options))


def drive(twins: Twins) -> None:
    """A schedule, gradients that come and go, and steps that must be skipped."""
    missing = (
        0.0 if twins.optimizer.defaults["fused"] else 0.1
    )  # torch's fused SGD wants all momentum or none
    for t in range(150):
        twins.draw(size=10 * 0.98**t, missing=missing)
        twins.set_lr(1, 0.003 if t % 40 < 20 else 0.001)
        if t in (0, 30, 31):
            for param in twins.params:
                if param.grad is not None and param.grad.numel():
                    param.grad.view(-1)[0] = math.nan
        twins.step()
        twins.assert_agree()
    assert twins.literal.ratio < 0.7


@pytest.mark.parametrize(("zenith", "kind"), [(ZENITH, SGD), (ZENITHAdamW, AdamW)])
def test_it_equals_zenith_itself(zenith: Any, kind: Any) -> None:
    ours, theirs = zenith(weights(), lr=0.01, window=8), over(kind)(weights(), lr=0.01, window=8)
    steps = gradients(60)
    assert train(theirs, steps) == pytest.approx(train(ours, steps), rel=1e-6)
    assert theirs.zenith_state() == pytest.approx(ours.zenith_state())
    assert_equal_weights(theirs, ours)


def test_without_adaptation_it_leaves_the_optimizer_bit_for_bit() -> None:
    alone, under = (
        SGD(weights(), lr=0.01, momentum=0.9),
        over(SGD)(weights(), 0.01, momentum=0.9, min_ratio=1.0),
    )
    for grads in gradients(30):
        for optimizer in (alone, under):
            give(optimizer, grads)
            optimizer.step()
    assert all(map(torch.equal, params_of(alone), params_of(under)))


@pytest.mark.parametrize("tensor", [False, True])
def test_the_lr_stays_its_owners(tensor: bool) -> None:
    lr = torch.tensor(0.01) if tensor else 0.01
    optimizer = over(SGD)(weights(), lr, window=4, foreach=False)
    owners = optimizer.param_groups[0]["lr"]
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 20, gamma=0.5)
    seen = []
    for grads in gradients(40):
        give(optimizer, grads)
        optimizer.step()
        assert tensor is False or optimizer.param_groups[0]["lr"] is owners
        seen.append((float(optimizer.param_groups[0]["lr"]), optimizer.effective_lrs()[0]))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            schedule.step()
    reference = ZENITH(weights(), 0.01, window=4)
    torch.optim.lr_scheduler.StepLR(reference, 20, gamma=0.5)
    assert [lr for lr, _ in seen] == pytest.approx([0.01] * 20 + [0.005] * 20)
    ratios = [used / lr for lr, used in seen]
    assert ratios == pytest.approx([lr / 0.01 for lr in train(reference, gradients(40))], rel=1e-5)


def test_groups_of_any_kind_keep_their_lrs_and_one_may_come_later() -> None:
    first, second, third = (nn.Parameter(torch.ones(3)) for _ in range(3))
    optimizer = SGD([{"params": [first], "lr": 0.1}, {"params": [second], "lr": 0.01}], lr=1.0)
    ZenithRatio(optimizer, window=2)
    for norm in (4.0, 4.0, 2.0):
        first.grad, second.grad = torch.full((3,), norm), torch.full((3,), norm)
        optimizer.step()
    assert optimizer.effective_lrs() == pytest.approx([0.075, 0.0075])
    optimizer.add_param_group({"params": [third], "lr": 0.5})
    assert optimizer.effective_lrs() == pytest.approx([0.075, 0.0075, 0.375])
    third.grad = torch.full((3,), 100.0)
    optimizer.step()
    assert optimizer.effective_lrs() == pytest.approx([0.1, 0.01, 0.5])
    assert optimizer.zenith_state()["grad_norm"] > 100


# ---- clipping, in whatever place


def clips(kind: type[Optimizer]) -> type[Optimizer]:
    class FullModelGradientClippingOptimizer(kind):  # type: ignore[misc, valid-type]
        def step(self, closure: Any = None) -> Any:
            nn.utils.clip_grad_norm_(itertools.chain(*[group["params"] for group in self.param_groups]), 0.1)
            super().step(closure=closure)

    return FullModelGradientClippingOptimizer


def swapped(optimizer: Optimizer) -> None:
    """As Detectron2's maybe_add_gradient_clipping does it to an object: its torch hooks run inside alone."""
    kind = type(optimizer)

    def step(self: Any, closure: Any = None) -> None:
        nn.utils.clip_grad_norm_(params_of(self), 0.1)
        super(type(self), self).step(closure)

    optimizer.__class__ = type(kind.__name__ + "WithGradientClip", (kind,), {"step": step})


@pytest.mark.parametrize("kind", [SGD, AdamW])
@pytest.mark.parametrize("how", ["subclass", "subclass twice", "swapped before", "swapped after", "hook"])
def test_clipping_in_step_leaves_the_lr_alone(kind: Any, how: str) -> None:
    kind([nn.Parameter(torch.zeros(1))], lr=0.1)  # torch puts its hooks around the step of both classes
    clipping = {"subclass": clips(kind), "subclass twice": clips(clips(kind))}.get(how, kind)
    optimizer = clipping(weights(), lr=0.01)
    if how == "swapped before":
        swapped(optimizer)
    ZenithRatio(optimizer, window=8)
    if how == "swapped after":
        swapped(optimizer)
    if how == "hook":

        def clip(*_: Any) -> None:
            optimizer.record_norm()  # as add_gradient_clipping does
            nn.utils.clip_grad_norm_(params_of(optimizer), 0.1)

        optimizer.register_step_pre_hook(clip)
    free = over(kind)(weights(), 0.01, window=8)
    steps = gradients(60)
    assert train(optimizer, steps) == pytest.approx(train(free, steps), rel=1e-6)
    assert optimizer.zenith_state() == free.zenith_state()
    assert optimizer.zenith_state()["ratio"] < 0.5
    assert all(float(param.grad.norm()) < 0.1 for param in params_of(optimizer))


def test_record_norm_is_for_clipping_between_backward_and_step(caplog: pytest.LogCaptureFixture) -> None:
    free, told, silent = (over(SGD)(weights(), 0.01, window=8) for _ in range(3))
    for grads in gradients(60):
        for optimizer in (free, told, silent):
            give(optimizer, grads)
        told.record_norm()
        for optimizer in (told, silent):
            nn.utils.clip_grad_norm_(params_of(optimizer), 0.1)
        for optimizer in (free, told, silent):
            optimizer.step()
    assert told.zenith_state() == free.zenith_state()
    assert silent.zenith_state()["ratio"] == pytest.approx(1.0)
    assert sum("record_norm()" in record.message for record in caplog.records) == 1


@pytest.mark.parametrize("kind", [SGD, clips(SGD)])
def test_a_closure_is_measured_when_it_has_run(kind: Any) -> None:
    optimizer, free = over(kind)(weights(), 0.01, window=8), over(SGD)(weights(), 0.01, window=8)
    calls = []

    def closure(grads: Any) -> float:
        calls.append(torch.is_grad_enabled())
        give(optimizer, grads)
        return 1.5

    steps = gradients(30)
    for number, grads in enumerate(steps):
        given: Any = functools.partial(closure, grads)
        assert (optimizer.step(given) if number % 2 else optimizer.step(closure=given)) == 1.5
    train(free, steps)
    assert optimizer.zenith_state() == free.zenith_state()
    assert calls == [True] * 30


def test_an_optimizer_that_calls_its_closure_several_times() -> None:
    """L-BFGS: the LR is the ratio's, and the calls after the first one compute anew."""
    param = nn.Parameter(torch.tensor([3.0, -2.0]))
    optimizer = torch.optim.LBFGS([param], lr=0.1, max_iter=4)
    ZenithRatio(optimizer, window=2)
    calls = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (param**2).sum()
        loss.backward()
        calls.append(loss.item())
        return loss

    for _ in range(4):
        optimizer.step(closure)
    assert len(calls) > 8
    assert len(set(calls)) == len(calls)
    assert optimizer.zenith_state()["recorded_steps"] == 4
    assert 0 < optimizer.zenith_state()["ratio"] < 1


# ---- steps that are left out


@pytest.mark.parametrize("kind", [SGD, AdamW, clips(SGD)])
def test_a_nonfinite_step_is_left_out_whole(kind: Any) -> None:
    optimizer = over(kind)(weights(), 0.01, window=3)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    for number, grads in enumerate(gradients(12)):
        before = copy.deepcopy((optimizer.state_dict()["state"], params_of(optimizer)))
        history = optimizer.zenith_state()
        give(optimizer, grads)
        if number % 3 == 0:
            params_of(optimizer)[1].grad[0] = math.inf
        optimizer.step()
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # the scheduler's, if it missed a step
            schedule.step()
        if number % 3 == 0:
            assert all(map(torch.equal, params_of(optimizer), before[1]))
            assert str(optimizer.state_dict()["state"]) == str(before[0])
            assert optimizer.zenith_state()["recorded_steps"] == history["recorded_steps"]
    state = optimizer.zenith_state()
    assert (state["skipped_steps"], state["recorded_steps"], state["consecutive_nonfinite"]) == (4, 8, 0)


def test_too_many_in_a_row_raise_with_names() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    optimizer = SGD(model.named_parameters(), lr=0.1)
    ZenithRatio(optimizer, max_nonfinite_steps=3)
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    model[1].bias.grad.fill_(math.nan)
    optimizer.step()
    optimizer.step()
    with pytest.raises(FloatingPointError, match=r"3 steps in a row.*: 1\.bias$"):
        optimizer.step()
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_no_gradients_no_step() -> None:
    optimizer = over(SGD)(weights(), 0.1)
    optimizer.step()
    assert optimizer.zenith_state()["recorded_steps"] == 0


def test_an_exception_in_the_step_leaves_the_lr_alone() -> None:
    class Fails(SGD):
        def step(self, closure: Any = None) -> Any:
            assert self.param_groups[0]["lr"] != 0.1 or zenith_of(self).zenith_state()["ratio"] == 1  # type: ignore[union-attr]
            raise OSError("no space")

    optimizer = over(Fails)(weights(), 0.1, window=1)
    for size in (2.0, 1.0):
        give(optimizer, [torch.full((6,), size), torch.full((4,), size)])
        with pytest.raises(OSError, match="no space"):
            optimizer.step()
        assert optimizer.param_groups[0]["lr"] == 0.1


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", [SGD, AdamW])
def test_grad_scaler_is_seen_through(kind: Any, fused: bool) -> None:
    free, scaled = over(kind)(weights(), 0.01, window=5), over(kind)(weights(), 0.01, window=5, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=7)
    for number, grads in enumerate(gradients(40)):
        scaler.scale(torch.ones(()))
        give(scaled, grads, scaler.get_scale())
        if number in (3, 11):
            params_of(scaled)[0].grad[0] = math.inf
        else:
            give(free, grads)
            free.step()
        scaler.step(scaled)
        scaler.update()
    assert scaled.effective_lrs() == pytest.approx(free.effective_lrs(), rel=1e-5)
    assert scaled.zenith_state()["recorded_steps"] == 38
    assert_equal_weights(scaled, free, rel=1e-5)


# ---- saving, loading, copying


def saved_and_read(optimizer: Optimizer) -> Any:
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


MAKERS: dict[str, Callable[[Any], Optimizer]] = {
    "SGD under the ratio": lambda params: over(SGD)(params, 0.01, momentum=0.9, window=8),
    "clipping SGD under the ratio": lambda params: over(clips(SGD))(params, 0.01, momentum=0.9, window=8),
    "ZENITH": lambda params: ZENITH(params, 0.01, momentum=0.9, window=8),
}


@pytest.mark.parametrize("to", MAKERS)
@pytest.mark.parametrize("source", MAKERS)
def test_the_history_is_in_the_optimizers_state(source: str, to: str) -> None:
    first = MAKERS[source](weights())
    steps = gradients(40)
    train(first, steps[:20])
    second = MAKERS[to](copy.deepcopy(params_of(first)))
    second.load_state_dict(saved_and_read(first))
    assert second.zenith_state() == first.zenith_state()
    assert train(second, steps[20:]) == pytest.approx(train(first, steps[20:]), rel=1e-6)
    assert "zenith" not in second.param_groups[0]
    if "clipping" not in source + to:
        assert_equal_weights(first, second)


def test_a_state_with_history_loads_without_the_ratio_and_it_may_come_after(
    caplog: pytest.LogCaptureFixture,
) -> None:
    first = over(AdamW)(weights(), 0.01, window=8)
    train(first, gradients(20))
    second = AdamW(weights(), lr=0.01)
    second.load_state_dict(saved_and_read(first))
    give(second, gradients(1)[0])
    second.step()
    ZenithRatio(second, window=8)
    assert second.zenith_state() == first.zenith_state()
    assert caplog.records == []


def test_a_state_without_history_starts_anew_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    plain = SGD(weights(), lr=0.01)
    optimizer = over(SGD)(weights(), 0.01, window=3)
    train(optimizer, gradients(5))
    optimizer.load_state_dict(plain.state_dict())
    assert optimizer.zenith_state()["recorded_steps"] == 0
    assert [record.message for record in caplog.records if record.levelno == logging.WARNING] == [
        "the loaded optimizer state has no ZENITH history: is it another optimizer's?"
    ]


def test_a_projects_own_state_hooks_go_together_with_ours() -> None:
    optimizer = over(SGD)(weights(), 0.01, window=3)
    optimizer.register_state_dict_post_hook(lambda _, state: {"optimizer": state})
    optimizer.register_load_state_dict_pre_hook(lambda _, state: state["optimizer"])
    seen = []
    optimizer.register_load_state_dict_post_hook(
        lambda opt: seen.append(opt.zenith_state()["recorded_steps"])
    )
    train(optimizer, gradients(5))
    state = saved_and_read(optimizer)
    assert list(state) == ["optimizer"]
    zenith_of(optimizer).reset_history()  # type: ignore[union-attr]
    optimizer.load_state_dict(state)
    assert seen == [5]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
@pytest.mark.parametrize("kind", [SGD, AdamW])
def test_copies_have_their_own_ratio(copied: Any, kind: Any) -> None:
    first = over(kind)(weights(), 0.01, window=4)
    torch.optim.lr_scheduler.ConstantLR(first, 1.0)
    steps = gradients(30)
    train(first, steps[:15])
    second = copied(first)
    assert zenith_of(second) is not zenith_of(first)
    assert train(second, steps[15:]) == train(first, steps[15:])
    assert_equal_weights(first, second)
    assert first.zenith_state()["ratio"] < 0.8
    assert zenith_of(copy.copy(first)) is None, "a shallow copy steps without"


# ---- wrappers


class Delegates:
    """As Lightning's LightningOptimizer and Fabric's _FabricOptimizer."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self.__class__ = type("Wrapped" + type(optimizer).__name__, (Delegates, type(optimizer)), {})

    def step(self, closure: Any = None) -> Any:
        return self._optimizer.step(closure)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimizer, name)


class Accelerated(Optimizer):
    """As accelerate's AcceleratedOptimizer: no attributes shine through, and a step kept from the beginning."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.kept = optimizer.step

    def step(self, closure: Any = None) -> Any:
        return self.kept(closure) if closure is not None else self.kept()

    @property
    def param_groups(self) -> Any:  # type: ignore[override]
        return self.optimizer.param_groups


@pytest.mark.parametrize("wrapper", [Delegates, Accelerated])
@pytest.mark.parametrize("first", ["ratio", "wrapper"])
@pytest.mark.parametrize("kind", [SGD, AdamW])
def test_through_wrappers(wrapper: Any, first: str, kind: Any) -> None:
    free, inside = over(kind)(weights(), 0.01, window=8), kind(weights(), lr=0.01)
    if first == "ratio":
        ZenithRatio(inside, window=8)
    wrapped = wrapper(inside)
    if first == "wrapper":
        ZenithRatio(wrapped, window=8)
    assert isinstance(zenith_of(wrapped), ZenithRatio)
    assert zenith_of(wrapped) is zenith_of(inside)
    steps = gradients(40)
    steps[20][0][0] = math.nan
    assert train(wrapped, steps) == pytest.approx(train(free, steps), rel=1e-6)
    assert zenith_of(wrapped).zenith_state() == free.zenith_state()  # type: ignore[union-attr]
    assert_equal_weights(inside, free)


@pytest.mark.parametrize("inherits", [True, False])  # or goes past a base whose step torch has hooked as well
def test_a_kept_step_that_failed_once_goes_on(inherits: bool) -> None:
    class Hooked(SGD):
        def step(self, closure: Any = None) -> Any:
            raise AssertionError("is passed over")

    Hooked(weights(), lr=0.01)

    class Fails(SGD if inherits else Hooked):  # type: ignore[misc]
        fails = False

        def step(self, closure: Any = None) -> Any:
            if self.fails:
                raise OSError("no space")
            return SGD.step(self, closure)

    inside = Fails(weights(), lr=0.01)
    kept = inside.step
    ZenithRatio(inside, window=4)
    free = over(SGD)(weights(), 0.01, window=4)
    steps = gradients(40)
    train(free, steps)
    for number, grads in enumerate(steps):
        give(inside, grads)
        if number == 20:
            Fails.fails = True
            with pytest.raises(OSError, match="no space"):
                kept()
            Fails.fails = False
            continue
        kept()
        assert inside.param_groups[0]["lr"] == 0.01
    assert inside.zenith_state()["recorded_steps"] == 40
    assert inside.effective_lrs() == pytest.approx(free.effective_lrs())


# ---- refusals


class SetsItsLR(SGD):
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["lr"] = 0.3
        return super().step(closure)


def test_what_cannot_have_it_is_refused() -> None:
    optimizer = over(SGD)(weights(), 0.1)
    with pytest.raises(ValueError, match="SGD has ZENITH's ratio already"):
        ZenithRatio(optimizer)
    with pytest.raises(ValueError, match="ZENITH has ZENITH's ratio already"):
        ZenithRatio(ZENITH(weights(), 0.1))
    with pytest.raises(TypeError, match=r"a torch\.optim\.Optimizer, got int"):
        ZenithRatio(3)  # type: ignore[arg-type]
    no_lr = SGD(weights(), lr=0.1)
    no_lr.param_groups[0]["lr"] = None
    with pytest.raises(TypeError, match="SGD has no LR in group 0"):
        ZenithRatio(no_lr)
    for name, value in (
        ("window", 0),
        ("min_ratio", 2),
        ("record_after", -1),
        ("half_life", 0.5),
        ("max_nonfinite_steps", 1.5),
    ):
        with pytest.raises(ValueError, match=name):
            ZenithRatio(SGD(weights(), lr=0.1), **{name: value})  # type: ignore[arg-type]
    sets = over(SetsItsLR)(weights(), 0.1)
    give(sets, gradients(1)[0])
    with pytest.raises(TypeError, match="SetsItsLR sets the LR of group 0 itself in step"):
        sets.step()


def test_zenith_of() -> None:
    zenith = ZENITH(weights(), 0.1)
    assert zenith_of(zenith) is zenith
    assert zenith_of(Delegates(zenith)) is zenith
    assert zenith_of(SGD(weights(), lr=0.1)) is None
    assert zenith_of(None) is None


# ---- other clients


def test_torch_distributed_checkpoint_keeps_the_history() -> None:
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    def made() -> tuple[nn.Module, Optimizer]:
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        return model, over(AdamW)(model.parameters(), 0.1, window=3)

    (model, first), (other, second) = made(), made()
    for _ in range(6):
        first.zero_grad()
        model(torch.randn(4, 3)).pow(2).mean().backward()
        first.step()
    set_optimizer_state_dict(other, second, get_optimizer_state_dict(model, first))
    assert second.zenith_state() == first.zenith_state()
    assert second.zenith_state()["recorded_steps"] == 6


def test_a_compiled_step_is_right() -> None:
    compiled, plain = over(SGD)(weights(), 0.01, window=3), over(SGD)(weights(), 0.01, window=3)
    step = torch.compile(compiled.step, backend="eager")
    steps = gradients(10)
    assert train(compiled, steps, step) == train(plain, steps)


# ---- a device that is not waited for


@pytest.fixture
def _as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """The way that CUDA takes, on the CPU: nothing is read back but what was sent on its way a step ago."""
    from zenith_det.optim import zenith_ratio

    class Sent(_RatioOfTheStepBefore):
        def put(self, ratio: Tensor) -> None:
            with torch._C._DisableTorchDispatch():  # so that Reads doesn't count the copy that CUDA makes
                self._sent = [*self._sent[-1:], float(ratio)]  # type: ignore[list-item]

        def get(self) -> float:
            return self._sent[0]  # type: ignore[return-value]

    monkeypatch.setattr(zenith_ratio, "_RatioOfTheStepBefore", Sent)
    monkeypatch.setattr(zenith_ratio, "_read_late", lambda device: True)
    monkeypatch.setattr(zenith_ratio.StreakReader, "read", lambda self, streak: 0)
    monkeypatch.setattr(zenith_ratio.HistoryWatch, "look", lambda self, history: None)


@pytest.mark.usefixtures("_as_on_cuda")
@pytest.mark.parametrize(
    ("kind", "options", "delay"),
    [
        (SGD, {"momentum": 0.9}, 1),
        (SGD, {"momentum": 0.9, "fused": True}, 0),
        (AdamW, {}, 1),
        (AdamW, {"fused": True}, 0),
        (torch.optim.Adam, {"fused": True}, 0),
        (torch.optim.RMSprop, {}, 1),
    ],
)
def test_the_lr_of_a_device_comes_a_step_late_or_stays_there(kind: Any, options: Any, delay: int) -> None:
    exact = train(ZENITH(weights(), 0.01, window=5), gradients(30))
    optimizer = over(kind)(weights(), 0.01, window=5, **options)
    alone = kind(weights(), lr=0.01, **options)
    used = []
    for number, grads in enumerate(gradients(30)):
        reads = {}
        for one in (optimizer, alone):
            give(one, grads)
            with Reads() as reads[one]:
                one.step()
        # AdamW reads its count of steps, which is on the host. The first step makes state.
        assert reads[optimizer].seen == reads[alone].seen or number == 0
        used.append(optimizer.effective_lrs()[0])
        assert optimizer.param_groups[0]["lr"] == 0.01
        assert not hasattr(optimizer, "found_inf")
    assert used == pytest.approx([0.01] * delay + exact[: 30 - delay], rel=1e-6)


@pytest.mark.usefixtures("_as_on_cuda")
@pytest.mark.parametrize("kind", [SGD, AdamW])
def test_fused_kernels_skip_on_the_device(kind: Any) -> None:
    optimizer = over(kind)(
        weights(), 0.01, window=5, fused=True, **({"momentum": 0.9} if kind is SGD else {})
    )
    assert zenith_of(optimizer).skips_nonfinite_steps  # type: ignore[union-attr]
    steps = gradients(12)
    for number, grads in enumerate(steps):
        before = copy.deepcopy((params_of(optimizer), optimizer.state_dict()["state"]))
        give(optimizer, grads)
        if number in (0, 7):
            params_of(optimizer)[0].grad[0] = math.nan
        optimizer.step()
        if number in (0, 7):
            assert all(map(torch.equal, params_of(optimizer), before[0]))
            assert number == 0 or str(optimizer.state_dict()["state"]) == str(before[1])
    assert all(param.isfinite().all() for param in params_of(optimizer))
    assert optimizer.zenith_state()["skipped_steps"] == 2


@pytest.mark.usefixtures("_as_on_cuda")
def test_waiting_is_exact() -> None:
    exact = train(ZENITH(weights(), 0.01, window=5), gradients(30))
    assert train(over(SGD)(weights(), 0.01, window=5, wait=True), gradients(30)) == pytest.approx(exact)


CUDA_CASES: list[tuple[Any, dict[str, Any], int]] = [
    (SGD, {"momentum": 0.9}, 1),
    (SGD, {"momentum": 0.9, "fused": True}, 0),
    (AdamW, {}, 1),
    (AdamW, {"fused": True}, 0),
    (AdamW, {"capturable": True}, 0),
    (torch.optim.RMSprop, {}, 1),
]


@NEEDS_CUDA
@pytest.mark.gpu
@pytest.mark.parametrize(("kind", "options", "delay"), CUDA_CASES)
def test_cuda_step_does_not_synchronise(kind: Any, options: Any, delay: int) -> None:
    exact = train(ZENITH(weights(), 0.01, window=5), gradients(30))
    optimizer = over(kind)([p.detach().cuda() for p in weights()], 0.01, window=5, **options)
    used = []
    for number, grads in enumerate(gradients(30)):
        give(optimizer, [grad.cuda() for grad in grads])
        torch.cuda.set_sync_debug_mode("error" if number else "default")  # the first one makes state
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        used.append(optimizer.effective_lrs()[0])
    assert used == pytest.approx([0.01] * delay + exact[: 30 - delay], rel=1e-5)


@NEEDS_CUDA
@pytest.mark.gpu
@pytest.mark.parametrize(("zenith", "kind"), [(ZENITH, SGD), (ZENITHAdamW, AdamW)])
@pytest.mark.parametrize("options", [{"wait": True}, {"fused": True}])
def test_cuda_agrees_with_the_cpu(zenith: Any, kind: Any, options: Any) -> None:
    ours = zenith(weights(), 0.01, window=5)
    theirs = over(kind)([p.detach().cuda() for p in weights()], 0.01, window=5, **options)
    for number, grads in enumerate(gradients(40)):
        for optimizer in (ours, theirs):
            give(optimizer, [grad.to(params_of(optimizer)[0].device) for grad in grads])
            if number in (0, 9):
                params_of(optimizer)[0].grad[0] = math.inf
            optimizer.step()
    assert theirs.zenith_state() == pytest.approx(ours.zenith_state(), rel=1e-5)
    for one, other in zip(params_of(theirs), params_of(ours)):
        assert vector(one.cpu()) == pytest.approx(vector(other), rel=1e-4, abs=1e-5)
