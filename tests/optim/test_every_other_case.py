"""One section per row of "Every other case": what the optimizer does off the straight path."""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from zenith_det.optim import ZENITH

from .tensors import LAYOUTS, memory_of
from .twins import Twins


def linear(seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(6, 4)


def random_grads(model: nn.Module, size: float = 1.0) -> None:
    for p in model.parameters():
        p.grad = size * torch.randn_like(p)


def snapshot(optimizer: ZENITH) -> Any:
    params = [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]
    return copy.deepcopy((params, optimizer.state_dict()))


def assert_same(a: Any, b: Any, path: str = "") -> None:
    """Equal to the bit, tensors (NaN included) and their types too."""
    if isinstance(a, Tensor):
        assert a.dtype == b.dtype, path
        assert torch.equal(a.nan_to_num(nan=-7.5), b.nan_to_num(nan=-7.5)), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_same(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b)):
            assert_same(x, y, f"{path}/{i}")
    else:
        assert a == b, path


def trace(optimizer: ZENITH, step: Callable[[int], object], steps: int) -> list[float]:
    """The LR ratio of every step."""
    ratios = []
    for t in range(steps):
        step(t)
        ratios.append(float(optimizer.zenith_state()["ratio"]))
    return ratios


# norm is inf or NaN


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("first", [True, False], ids=["in the first step", "later"])
def test_nonfinite_step_is_skipped_whole_and_counted(bad: float, first: bool, fused: bool | None) -> None:
    model = linear()
    optimizer = ZENITH(
        model.parameters(), 0.1, momentum=0.9, weight_decay=0.1, window=3, max_norm=1.0, fused=fused
    )
    if not first:
        for _ in range(5):
            random_grads(model)
            optimizer.step()
    params, state = snapshot(optimizer)
    random_grads(model)
    assert model.bias.grad is not None
    model.bias.grad[2] = bad
    optimizer.step()
    assert_same(params, [p.detach() for p in model.parameters()])
    history, before = (s["param_groups"][0]["zenith"] for s in (optimizer.state_dict(), state))
    for name in ("norms", "zenith", "ratio"):
        assert_same(history[name], before[name], name)
    for i, p in enumerate(model.parameters()):
        expected = torch.zeros_like(p) if first else state["state"][i]["momentum_buffer"]
        assert torch.equal(optimizer.state[p]["momentum_buffer"], expected)
    assert optimizer.zenith_state()["skipped_steps"] == 1
    assert not math.isfinite(optimizer.zenith_state()["grad_norm"])


def test_nonfinite_first_step_leaves_the_run_as_without_it() -> None:
    model, other = linear(), linear()
    optimizer = ZENITH(model.parameters(), 0.1, momentum=0.9, window=3)
    sgd = torch.optim.SGD(other.parameters(), 0.1, momentum=0.9, fused=True)
    random_grads(model, math.nan)
    optimizer.step()
    random_grads(model)
    for p, q in zip(model.parameters(), other.parameters()):
        assert p.grad is not None
        q.grad = p.grad.clone()
    optimizer.step()
    sgd.step()
    for p, q in zip(model.parameters(), other.parameters()):
        assert torch.equal(p, q)


def test_nonfinite_steps_in_a_row_raise_and_name_parameters() -> None:
    model = linear()
    optimizer = ZENITH(model.named_parameters(), 0.1, max_nonfinite_steps=3)
    for good_before in (2, 0):
        for _ in range(good_before):
            random_grads(model, math.nan)
            optimizer.step()  # 2 in a row: not enough
        random_grads(model)
        optimizer.step()  # ends the row
    for _ in range(2):
        random_grads(model)
        model.bias.grad = torch.full_like(model.bias, math.inf)
        optimizer.step()
    assert optimizer.zenith_state()["consecutive_nonfinite"] == 2
    with pytest.raises(FloatingPointError, match=r"3 steps in a row.*: bias$"):
        optimizer.step()


@pytest.mark.parametrize("params", [nn.Parameter(torch.ones(2)), [nn.Parameter(torch.ones(2))]])
def test_a_group_without_names_joins_named_ones(params: Any) -> None:
    """A project's ``build_optimizer`` adds a group to what Detectron2's or ours has made."""
    optimizer = ZENITH(nn.Linear(2, 2).named_parameters(), 0.1, max_nonfinite_steps=1)
    optimizer.add_param_group({"params": params, "lr": 1.0})
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 1.0]
    optimizer.param_groups[1]["params"][0].grad = torch.full((2,), math.nan)
    with pytest.raises(FloatingPointError, match="group 1, parameter 0"):
        optimizer.step()


def test_nonfinite_error_names_unnamed_parameters_by_group_and_place() -> None:
    first, second = linear(), nn.Conv2d(2, 3, 1)
    groups = [{"params": first.parameters()}, {"params": second.parameters()}]
    optimizer = ZENITH(groups, 0.1, max_nonfinite_steps=1)
    random_grads(first)
    random_grads(second, math.nan)
    second.bias.grad = torch.zeros_like(second.bias)
    with pytest.raises(FloatingPointError, match=r": parameter 0 of group 1, shape \(3, 2, 1, 1\)$"):
        optimizer.step()


# norm is 0, zenith is 0


@pytest.mark.parametrize("fused", [None, False])
def test_zero_norm_has_ratio_1(fused: bool | None) -> None:
    model = linear()
    optimizer = ZENITH(model.parameters(), 0.1, window=3, max_norm=1.0, fused=fused)
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(5):
        random_grads(model, 0.0)
        optimizer.step()
    assert optimizer.zenith_state()["ratio"] == 1.0
    assert optimizer.zenith_state()["recorded_steps"] == 5
    assert_same(before, [p.detach() for p in model.parameters()])


def test_zero_norm_after_others_has_ratio_0_and_comes_back() -> None:
    model = linear()
    optimizer = ZENITH(model.parameters(), 0.1, window=2)
    sizes = [1.0, 1.0, 0.0, 0.0, 1.0, 1.0]
    for p in model.parameters():
        p.grad = torch.ones_like(p)

    def step(t: int) -> None:
        for p in model.parameters():
            p.grad = torch.full_like(p, sizes[t])
        optimizer.step()

    assert trace(optimizer, step, 6) == pytest.approx([1, 1, 0.5, 0, 0.5, 1])


# no parameter has a gradient


def test_no_gradient_is_a_no_op() -> None:
    model = linear()
    optimizer = ZENITH(model.parameters(), 0.1, momentum=0.9, weight_decay=0.1, window=2)
    for size in (3.0, 2.0, 1.0):
        random_grads(model, size)
        optimizer.step()
    before = snapshot(optimizer)
    optimizer.zero_grad()
    optimizer.step()
    assert_same(before, snapshot(optimizer))
    assert optimizer.step(lambda: 5.0) == 5.0


def test_no_gradient_at_all_from_the_start() -> None:
    optimizer = ZENITH(linear().parameters(), 0.1)
    optimizer.step()
    assert optimizer.zenith_state()["recorded_steps"] == 0
    assert optimizer.effective_lrs() == [0.1]


# several groups with their own LR


def test_several_groups_share_one_norm_and_keep_their_lr() -> None:
    a, b = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    optimizer = ZENITH([{"params": [a]}, {"params": [b], "lr": 0.5}], lr=0.1, window=1)
    a.grad, b.grad = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])
    optimizer.step()
    assert optimizer.zenith_state()["grad_norm"] == pytest.approx(5.0)
    a.grad, b.grad = torch.tensor([1.5, 0.0]), torch.tensor([0.0, 2.0])
    optimizer.step()
    assert optimizer.effective_lrs() == pytest.approx([0.05, 0.25])
    assert a.tolist() == pytest.approx([-0.1 * 3 - 0.05 * 1.5, 0])
    assert b.tolist() == pytest.approx([0, -0.5 * 4 - 0.25 * 2])


# a group added later


def test_group_added_later_joins_the_norm() -> None:
    a, b = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    optimizer = ZENITH([a], lr=0.1, window=1, momentum=0.9)
    a.grad = torch.tensor([3.0, 0.0])
    optimizer.step()
    optimizer.add_param_group({"params": [b], "lr": 0.01})
    assert optimizer.effective_lrs() == pytest.approx([0.1, 0.01])
    b.grad = torch.tensor([0.0, 4.0])
    optimizer.step()
    assert optimizer.zenith_state()["grad_norm"] == pytest.approx(5.0)
    assert b.tolist() == pytest.approx([0, -0.04])


# a scheduler attached

SCHEDULERS: dict[str, Callable[[ZENITH], torch.optim.lr_scheduler.LRScheduler]] = {
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 50),
    "warm-up": lambda o: torch.optim.lr_scheduler.LinearLR(o, 0.01, total_iters=20),
    "exponential, which multiplies what it finds": lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.97),
    "one cycle, momentum too": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=60),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_scheduler_composes(name: str) -> None:
    model, other = linear(), linear()
    optimizer = ZENITH(model.parameters(), 0.1, momentum=0.9, window=4)
    alone = torch.optim.SGD(other.parameters(), 0.1, momentum=0.9)
    scheduler, expected = SCHEDULERS[name](optimizer), SCHEDULERS[name](alone)  # type: ignore[arg-type]
    for t in range(50):
        random_grads(model, 1 / (t + 1))
        lr = optimizer.param_groups[0]["lr"]
        assert lr == alone.param_groups[0]["lr"]
        optimizer.step()
        assert optimizer.param_groups[0]["lr"] == lr, "the optimizer wrote the scheduler's lr"
        alone.step()
        assert optimizer.effective_lrs() == pytest.approx([lr * optimizer.zenith_state()["ratio"]])
        scheduler.step()
        expected.step()
        # still that of the step that was taken, for a log that is written after the scheduler
        assert optimizer.effective_lrs() == pytest.approx([lr * optimizer.zenith_state()["ratio"]])
    assert optimizer.zenith_state()["ratio"] < 0.2


def test_effective_lr_is_that_of_the_update() -> None:
    p = nn.Parameter(torch.zeros(1))
    optimizer = ZENITH([p], 0.1, window=2)
    for t in range(10):
        before, size = p.item(), 1 / (t + 1)
        p.grad = torch.tensor([size])
        optimizer.step()
        assert before - p.item() == pytest.approx(optimizer.effective_lrs()[0] * size, rel=1e-4)


def test_lr_as_a_tensor() -> None:
    twins = Twins(window=5)
    lr = torch.tensor([0.02], dtype=torch.float64)
    twins.optimizer.param_groups[0]["lr"] = lr
    for t in range(20):
        lr.fill_(0.02 / (t + 1))
        twins.literal.groups[0]["lr"] = 0.02 / (t + 1)
        twins.draw()
        twins.step()
    twins.assert_agree()


# AMP with GradScaler, bf16, gradient accumulation, closure


def amp_run(
    scaler: torch.amp.GradScaler,
    fused: bool | None,
    unscale: bool = False,
    overflow: int | None = None,
    kind: type[ZENITH] = ZENITH,
    **options: Any,
) -> tuple[list[float], nn.Module, ZENITH]:
    model = linear()
    optimizer = kind(model.parameters(), 0.05, momentum=0.9, window=4, fused=fused, **options)
    generator = torch.Generator().manual_seed(1)

    def step(t: int) -> None:
        x = torch.randn(8, 6, generator=generator)
        loss = model(x).square().mean()
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        if t == overflow:
            assert model.weight.grad is not None
            model.weight.grad[0, 0] = math.inf
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()

    return trace(optimizer, step, 30), model, optimizer


@pytest.mark.parametrize("options", [{}, {"max_norm": 0.05}, {"clip": "value"}], ids=["", "max_norm", "clip"])
@pytest.mark.parametrize("unscale", [False, True], ids=["scaled", "unscaled by the trainer"])
@pytest.mark.parametrize("fused", [None, False, True])
def test_amp_scaled_gradients_give_the_same_run(
    fused: bool | None, unscale: bool, options: dict[str, Any]
) -> None:
    if options.get("clip"):
        options = {"clip": lambda params: nn.utils.clip_grad_value_(params, 0.01)}
    plain = amp_run(torch.amp.GradScaler("cpu", enabled=False), fused, **options)
    scaled = amp_run(
        torch.amp.GradScaler("cpu", init_scale=1000.0, growth_interval=7), fused, unscale, **options
    )
    assert scaled[0] == pytest.approx(plain[0], rel=1e-5)
    assert plain[0][-1] < 0.9
    for p, q in zip(plain[1].parameters(), scaled[1].parameters()):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("unscale", [False, True], ids=["scaled", "unscaled by the trainer"])
@pytest.mark.parametrize("fused", [None, False, True])
def test_amp_overflow_changes_neither_history_nor_parameters(fused: bool | None, unscale: bool) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    ratios, _, optimizer = amp_run(scaler, fused, unscale, overflow=12)
    assert ratios[12] == ratios[11]
    state = optimizer.zenith_state()
    # Left out by the scaler, unless the kernel takes what it says.
    assert (state["skipped_steps"], state["recorded_steps"]) == (int(fused is True), 29)
    assert scaler.get_scale() == 2.0**15  # the scaler saw it too
    assert state["zenith"] < 100  # of the unscaled gradient


class ClipsInItsStep(ZENITH):
    """As many projects, and Detectron2, clip."""

    def step(self, closure: Any = None) -> Any:
        self.record_norm()
        nn.utils.clip_grad_norm_([p for group in self.param_groups for p in group["params"]], 0.05)
        return super().step(closure)


@pytest.mark.parametrize("unscale", [False, True], ids=["scaled", "unscaled by the trainer"])
def test_amp_a_subclass_clips_unscaled_gradients(unscale: bool) -> None:
    plain = amp_run(torch.amp.GradScaler("cpu", enabled=False), None, kind=ClipsInItsStep)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    scaled = amp_run(scaler, None, unscale, kind=ClipsInItsStep)
    assert scaled[0] == pytest.approx(plain[0], rel=1e-5)
    for p, q in zip(plain[1].parameters(), scaled[1].parameters()):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_amp_the_scale_of_a_step_that_raised_is_not_the_next_ones() -> None:
    model = linear()
    optimizer = ZENITH(model.parameters(), 0.1, max_nonfinite_steps=1, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for size in (math.inf, 1.0):
        before = [p.detach().clone() for p in model.parameters()]
        scaler.scale(size * sum(p.sum() for p in model.parameters())).backward()
        with contextlib.ExitStack() as stack:
            if size == math.inf:
                stack.enter_context(pytest.raises(FloatingPointError))
            scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    for p, q in zip(model.parameters(), before):
        torch.testing.assert_close(p, q - 0.1)


def test_amp_found_inf_of_two_devices_is_2_and_skips() -> None:
    model = linear()
    optimizer = ZENITH(model.parameters(), 0.1, momentum=0.9)
    random_grads(model)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(2.0)
    optimizer.step()
    assert_same(before, [p.detach() for p in model.parameters()])


def test_bf16_parameters_keep_a_float64_history() -> None:
    model = linear().bfloat16()
    optimizer = ZENITH(model.parameters(), 0.1, momentum=0.9, window=3)
    for _ in range(5):
        random_grads(model)
        optimizer.step()
    again = ZENITH(model.parameters(), 0.1, momentum=0.9, window=3)
    again.load_state_dict(optimizer.state_dict())
    history = again.state_dict()["param_groups"][0]["zenith"]
    assert history["norms"].dtype is torch.float64
    assert_same(history, optimizer.state_dict()["param_groups"][0]["zenith"])
    assert again.state[model.weight]["momentum_buffer"].dtype is torch.bfloat16


def test_accumulation_of_micro_batches_gives_the_trace_of_the_batch() -> None:
    def run(micro: int) -> list[float]:
        model = linear().double()
        optimizer = ZENITH(model.parameters(), 0.05, momentum=0.9, window=4)
        generator = torch.Generator().manual_seed(1)

        def step(t: int) -> None:
            x = torch.randn(12, 6, generator=generator, dtype=torch.float64)
            optimizer.zero_grad()
            for part in x.chunk(micro):
                (model(part).square().mean() / micro).backward()
            optimizer.step()

        return trace(optimizer, step, 40)

    assert run(4) == pytest.approx(run(1), rel=1e-9)


def test_closure_is_called_once_with_gradients_and_its_value_returned() -> None:
    model = linear()
    optimizer = ZENITH(model.parameters(), 0.1, window=1)
    calls = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(torch.ones(6)).square().sum()
        loss.backward()
        calls.append(loss)
        return loss

    assert optimizer.step(closure) is calls[0]
    assert len(calls) == 1
    assert optimizer.zenith_state()["recorded_steps"] == 1


# gradient clipping: ours or the trainer's

CLIPS: dict[str, Callable[[list[Tensor]], object]] = {
    "value": lambda params: nn.utils.clip_grad_value_(params, 0.02),
    "norm of each": lambda params: [nn.utils.clip_grad_norm_(p, 0.02) for p in params],
    "full model": lambda params: nn.utils.clip_grad_norm_(params, 0.02),
}


def clipped_run(
    ours: str | None, trainers: str | None, max_norm: float | None
) -> tuple[list[float], nn.Linear]:
    """The gradients do not depend on the parameters, so clipping must not show in the trace."""
    model = linear()
    clip = CLIPS[ours] if ours else None
    optimizer = ZENITH(model.parameters(), 0.1, momentum=0.9, window=5, max_norm=max_norm, clip=clip)
    generator = torch.Generator().manual_seed(1)

    def step(t: int) -> None:
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator) * math.exp(-t / 20)
        if trainers:
            optimizer.record_norm()
            CLIPS[trainers](list(model.parameters()))
        optimizer.step()

    return trace(optimizer, step, 60), model


@pytest.mark.parametrize("kind", CLIPS)
def test_clipping_leaves_the_lr_trace(kind: str) -> None:
    unclipped, free = clipped_run(None, None, None)
    assert unclipped[-1] < 0.2
    by_us, model = clipped_run(kind, None, None)
    by_trainer, same_model = clipped_run(None, kind, None)
    assert by_us == unclipped
    assert by_trainer == unclipped
    assert torch.equal(model.weight, same_model.weight)
    assert not torch.allclose(model.weight, free.weight, atol=1e-3), "nothing was clipped"


def test_clipping_by_max_norm_leaves_the_lr_trace_and_is_clip_grad_norm() -> None:
    unclipped, _ = clipped_run(None, None, None)
    folded, model = clipped_run(None, None, 0.02)
    _, reference = clipped_run("full model", None, None)
    assert folded == unclipped
    torch.testing.assert_close(model.weight, reference.weight, rtol=1e-5, atol=1e-7)


def test_clipping_by_the_trainer_without_record_norm_would_pin_the_ratio() -> None:
    # Why record_norm() exists.
    model = linear()
    optimizer = ZENITH(model.parameters(), 0.1, window=3)
    for t in range(20):
        random_grads(model, math.exp(-t / 20))
        nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        optimizer.step()
    assert optimizer.zenith_state()["ratio"] == pytest.approx(1.0)


def test_recorded_norm_counts_for_one_step_only() -> None:
    model = linear()
    optimizer = ZENITH(model.parameters(), 0.1, window=1)
    for p in model.parameters():
        p.grad = torch.full_like(p, 3.0)
    norm = optimizer.record_norm()
    assert float(norm) == pytest.approx(3 * math.sqrt(28))
    for expected in (3.0, 1.0):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        assert optimizer.zenith_state()["grad_norm"] == pytest.approx(expected * math.sqrt(28))


# mixed devices, fp16/bf16 parameters, channels_last, sparse gradients


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_mixed_dtypes_update_once_each(momentum: float) -> None:
    torch.manual_seed(0)
    dtypes = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64]
    params = [nn.Parameter(torch.randn(50).to(dtype)) for dtype in dtypes]
    optimizer = ZENITH(params, 0.1, momentum=momentum, weight_decay=0.1, min_ratio=1.0)
    reference = [
        nn.Parameter(p.detach().to(torch.complex128 if p.is_complex() else torch.float64)) for p in params
    ]
    sgd = torch.optim.SGD(reference, 0.1, momentum=momentum, weight_decay=0.1)
    for _ in range(5):
        for p, q in zip(params, reference):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.to(q.dtype)
        optimizer.step()
        sgd.step()
    for p, q in zip(params, reference):
        rel = {torch.bfloat16: 3e-2, torch.float16: 4e-3}.get(p.dtype, 1e-5)
        torch.testing.assert_close(p.to(q.dtype), q, rtol=rel, atol=rel)


WRONG_HALF_KERNEL = "torch's fused CPU kernel is wrong for half precision before 2.14"


@pytest.mark.skipif(torch.__version__ >= (2, 14), reason="torch's fused CPU kernel is right from 2.14 on")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_wrong_kernel_is_not_taken_and_refused_by_name(dtype: torch.dtype) -> None:
    params = [nn.Parameter(torch.linspace(-2, 2, 500).to(dtype)) for _ in range(3)]
    optimizers = [ZENITH([p], 0.1, window=2, fused=f) for p, f in zip(params, (None, False, True))]
    for p in params:
        p.grad = torch.ones(500, dtype=dtype)
    optimizers[0].step()
    optimizers[1].step()
    assert torch.equal(params[0], params[1])
    with pytest.raises(ValueError, match="fused must be None or False"):
        optimizers[2].step()


@pytest.mark.skipif(torch.__version__ < (2, 14), reason=WRONG_HALF_KERNEL)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_parameters_are_updated_in_float32_by_both_paths(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    fused, unfused = (nn.Parameter(torch.linspace(-2, 2, 500).to(dtype)) for _ in range(2))
    optimizers = [
        ZENITH([p], 0.1, momentum=0.9, nesterov=True, weight_decay=0.01, window=2, fused=choice)
        for p, choice in ((fused, True), (unfused, False))
    ]
    for _ in range(5):
        fused.grad = torch.randn(500).to(dtype)
        unfused.grad = fused.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    differing = (fused != unfused).float().mean()
    assert differing < 0.02, "not rounded once"


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("gradient", LAYOUTS)
@pytest.mark.parametrize("parameter", LAYOUTS)
def test_channels_last_and_strided_parameters(parameter: str, gradient: str, momentum: float) -> None:
    torch.manual_seed(0)
    weight = torch.randn(8, 6, 3, 3)
    p, q = nn.Parameter(LAYOUTS[parameter](weight)), nn.Parameter(weight.clone())
    optimizer = ZENITH([p], 0.1, momentum=momentum, weight_decay=0.1, min_ratio=1.0)
    sgd = torch.optim.SGD([q], 0.1, momentum=momentum, weight_decay=0.1)
    for _ in range(3):
        q.grad = torch.randn(8, 6, 3, 3)
        p.grad = LAYOUTS[gradient](q.grad)
        optimizer.step()
        sgd.step()
        assert optimizer.zenith_state()["grad_norm"] == pytest.approx(float(q.grad.norm()), rel=1e-6)
    torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_model_changed_to_channels_last_after_its_momentum_was_made() -> None:
    torch.manual_seed(0)
    model = nn.Conv2d(4, 6, 3)
    other = copy.deepcopy(model)
    options: dict[str, Any] = {"lr": 0.1, "momentum": 0.9}
    optimizer = ZENITH(model.parameters(), min_ratio=1.0, **options)
    sgd = torch.optim.SGD(other.parameters(), **options)
    for t in range(4):
        if t == 2:
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        random_grads(model)
        for p, q in zip(model.parameters(), other.parameters()):
            assert p.grad is not None
            q.grad = p.grad.clone(memory_format=torch.contiguous_format)
        optimizer.step()
        sgd.step()
    torch.testing.assert_close(model.weight.contiguous(), other.weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "options", [{}, {"momentum": 0.9}, {"weight_decay": 0.1}, {"max_norm": 0.1}, {"maximize": True}], ids=str
)
def test_sparse_gradients_equal_dense_ones(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    sparse, dense = nn.Embedding(30, 4, sparse=True), nn.Embedding(30, 4)
    dense.load_state_dict(sparse.state_dict())
    optimizers = [ZENITH(e.parameters(), 0.5, window=3, **options) for e in (sparse, dense)]
    for _ in range(8):
        rows = torch.randint(0, 30, (10,))
        target = torch.randn(10, 4)
        for embedding, optimizer in zip((sparse, dense), optimizers):
            optimizer.zero_grad()
            (embedding(torch.cat((rows, rows))) * torch.cat((target, target))).sum().backward()
            optimizer.step()
    assert sparse.weight.grad is not None
    assert sparse.weight.grad.is_sparse
    torch.testing.assert_close(sparse.weight, dense.weight)
    a, b = (o.zenith_state() for o in optimizers)
    assert a == pytest.approx(b, rel=1e-6)


def test_sparse_non_finite_step_is_skipped() -> None:
    embedding = nn.Embedding(5, 2, sparse=True)
    optimizer = ZENITH(embedding.named_parameters(), 0.5, max_nonfinite_steps=2)
    before = embedding.weight.detach().clone()
    (embedding(torch.tensor([1, 1])) * math.inf).sum().backward()
    optimizer.step()
    assert torch.equal(embedding.weight, before)
    with pytest.raises(FloatingPointError, match="weight"):
        optimizer.step()


def test_unsupported_gradient_is_an_error_that_names_the_parameter() -> None:
    p = nn.Parameter(torch.eye(3).to_sparse_csr())
    optimizer = ZENITH([("head.weight", p)], 0.1)
    p.grad = torch.eye(3).to_sparse_csr()
    with pytest.raises(TypeError, match=r"head\.weight is torch\.sparse_csr"):
        optimizer.step()


def test_fused_true_where_it_cannot_be_is_an_error_that_names_the_parameter() -> None:
    p = nn.Parameter(torch.zeros(3, dtype=torch.complex64))
    optimizer = ZENITH([("phase", p)], 0.1, fused=True)
    p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match=r"fused must be None or False for phase"):
        optimizer.step()


# resumed with another global batch size: the trainer calls reset_history()


def test_reset_history_starts_anew_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    model = linear()
    optimizer = ZENITH(model.parameters(), 0.1, window=3, momentum=0.9, record_after=2)
    for t in range(9):
        random_grads(model, 1 / (t + 1))
        optimizer.step()
    assert optimizer.zenith_state()["ratio"] < 0.7
    with caplog.at_level(logging.INFO, logger="zenith_det.optim"):
        optimizer.reset_history("the global batch size is 32, it was 16")
    assert "history starts again (the global batch size is 32, it was 16)" in caplog.text
    state = optimizer.zenith_state()
    assert (state["ratio"], state["zenith"], state["recorded_steps"]) == (1.0, 0.0, 0)
    random_grads(model)
    optimizer.step()
    assert optimizer.zenith_state()["recorded_steps"] == 1, "record_after applied a second time"
    assert optimizer.state[model.weight]["momentum_buffer"].any(), "momentum is no history"


# frozen or unused parameters, a group whose gradients come and go


@pytest.mark.parametrize("fused", [None, False])
def test_frozen_unused_and_empty_groups_and_one_unfrozen_mid_run(fused: bool | None) -> None:
    torch.manual_seed(0)
    body, masks, frozen = linear(1), linear(2), linear(3)
    frozen.requires_grad_(False)
    groups = [{"params": [*m.parameters()]} for m in (body, frozen, masks)] + [{"params": []}]
    optimizer = ZENITH(groups, 0.1, momentum=0.9, weight_decay=0.1, window=2, fused=fused)
    x = torch.randn(3, 6)
    frozen_before = frozen.weight.clone()

    for t in range(6):
        optimizer.zero_grad()
        loss = body(x).square().sum() + frozen(x).square().sum()
        if t % 2:  # an image with masks
            loss = loss + masks(x).square().sum()
        if t == 4:
            frozen.requires_grad_(True)
            loss = loss + frozen(x).square().sum()
        before = masks.weight.detach().clone()
        loss.backward()
        optimizer.step()
        assert torch.equal(masks.weight, before) == (t % 2 == 0), "no gradient: no update, no decay"
        assert torch.equal(frozen.weight, frozen_before) == (t < 4)
        grads = [p.grad for m in (body, masks, frozen) for p in m.parameters() if p.grad is not None]
        expected = float(nn.utils.get_total_norm(grads))
        assert optimizer.zenith_state()["grad_norm"] == pytest.approx(expected, rel=1e-5)
    assert torch.isfinite(frozen.weight).all()


# saving and loading


def drive(optimizer: ZENITH, model: nn.Module, start: int, stop: int) -> None:
    for t in range(start, stop):
        generator = torch.Generator().manual_seed(t)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype) / (1 + t)
        if t == 7:
            next(model.parameters()).grad.fill_(math.nan)  # type: ignore[union-attr]
        optimizer.step()


@pytest.mark.parametrize(
    "stop", [0, 2, 8, 15], ids=["fresh", "window not full", "after a skipped step", "later"]
)
def test_saving_and_loading_continues_bit_for_bit(tmp_path: Path, stop: int) -> None:
    options: dict[str, Any] = {"momentum": 0.9, "window": 5, "record_after": 1, "max_norm": 0.5}
    model = linear()
    optimizer = ZENITH(model.named_parameters(), 0.1, **options)
    drive(optimizer, model, 0, stop)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "c.pth")
    drive(optimizer, model, stop, 30)

    loaded = torch.load(tmp_path / "c.pth", weights_only=True)
    resumed = linear(seed=5)
    resumed.load_state_dict(loaded["model"])
    again = ZENITH(resumed.named_parameters(), 0.7, **options)
    again.load_state_dict(loaded["optimizer"])
    drive(again, resumed, stop, 30)
    assert_same(snapshot(optimizer), snapshot(again))
    assert "zenith" not in again.param_groups[0]
    assert optimizer.effective_lrs() == again.effective_lrs()
    assert optimizer.zenith_state() == again.zenith_state()


def test_saving_is_a_snapshot_once_loaded() -> None:
    model = linear()
    optimizer = ZENITH(model.parameters(), 0.1, window=3)
    other = ZENITH(linear(1).parameters(), 0.1, window=3)
    drive(optimizer, model, 0, 5)
    other.load_state_dict(optimizer.state_dict())
    before = copy.deepcopy(other.state_dict())
    drive(optimizer, model, 5, 8)
    assert_same(before, other.state_dict())  # shares no tensor with the one it was loaded from


def test_saving_numpy_options_loads_under_weights_only(tmp_path: Path) -> None:
    optimizer = ZENITH(
        [{"params": linear().parameters(), "weight_decay": np.float64(0.1)}],
        lr=np.float64(0.1),
        momentum=np.float32(0.5),
        window=np.int64(3),  # type: ignore[arg-type]
    )
    torch.save(optimizer.state_dict(), tmp_path / "o.pth")
    assert torch.load(tmp_path / "o.pth", weights_only=True)["param_groups"][0]["lr"] == 0.1


def test_loading_with_a_shorter_window_keeps_the_newest_norms() -> None:
    model = linear()
    long = ZENITH(model.parameters(), 0.1, window=6)
    drive(long, model, 0, 12)
    short = ZENITH(model.parameters(), 0.1, window=2)
    short.load_state_dict(long.state_dict())
    norms = long.state_dict()["param_groups"][0]["zenith"]["norms"]
    assert_same(short.state_dict()["param_groups"][0]["zenith"]["norms"], norms[-2:])
    random_grads(model, 0.0)
    short.step()
    assert short.zenith_state()["window_mean"] == pytest.approx(float(norms[-1]) / 2)


def test_loading_with_a_longer_window_holds_the_ratio_until_it_is_full() -> None:
    model = linear()
    short = ZENITH(model.parameters(), 0.1, window=2)
    drive(short, model, 0, 12)
    ratio, zenith = (short.zenith_state()[k] for k in ("ratio", "zenith"))
    assert ratio < 0.5
    long = ZENITH(model.parameters(), 0.1, window=4)
    long.load_state_dict(short.state_dict())
    drive(long, model, 12, 13)
    assert long.zenith_state()["ratio"] == ratio  # 3 of 4 norms
    drive(long, model, 13, 14)
    state = long.zenith_state()
    assert state["ratio"] == pytest.approx(state["window_mean"] / zenith)
    assert state["ratio"] != ratio


def test_loading_replaces_a_history_that_is_there() -> None:
    model = linear()
    short, used = (ZENITH(model.parameters(), 0.1, window=w) for w in (2, 4))
    drive(short, model, 0, 5)
    drive(used, model, 5, 12)
    used.load_state_dict(short.state_dict())
    norms = used.state_dict()["param_groups"][0]["zenith"]["norms"]
    assert norms.isnan().tolist() == [True, True, False, False]


def test_loading_its_own_state_changes_nothing() -> None:
    model = linear()
    optimizer = ZENITH(model.parameters(), 0.1, window=3)
    drive(optimizer, model, 0, 5)
    before, own = optimizer.zenith_state(), optimizer.state_dict()
    optimizer.load_state_dict(own)
    assert optimizer.zenith_state() == before
    assert own["param_groups"][0]["zenith"]["counts"].tolist() == [5, 5, 0, 0]


def test_loading_a_state_of_torch_sgd_warns_and_keeps_its_momentum(caplog: pytest.LogCaptureFixture) -> None:
    model, other = linear(), linear()
    sgd = torch.optim.SGD(other.parameters(), 0.03, momentum=0.8)
    random_grads(other)
    sgd.step()
    optimizer = ZENITH(model.parameters(), 0.1, momentum=0.9, window=2)
    drive(optimizer, model, 0, 5)
    with caplog.at_level(logging.INFO, logger="zenith_det.optim"):
        optimizer.load_state_dict(sgd.state_dict())
    assert [r.levelname for r in caplog.records] == ["WARNING", "INFO"]
    assert "no ZENITH history" in caplog.text
    assert optimizer.zenith_state()["ratio"] == 1.0
    assert torch.equal(
        optimizer.state[model.weight]["momentum_buffer"], sgd.state[other.weight]["momentum_buffer"]
    )
    drive(optimizer, model, 5, 9)


def test_loading_sgd_dampening_is_refused() -> None:
    model = linear()
    sgd = torch.optim.SGD(model.parameters(), 0.03, momentum=0.8, dampening=0.1)
    with pytest.raises(ValueError, match=r"dampening must be 0.*got 0\.1"):
        ZENITH(model.parameters(), 0.1).load_state_dict(sgd.state_dict())


def test_loading_the_state_of_another_model_names_the_parameter() -> None:
    old, new = nn.Linear(6, 4), nn.Linear(6, 9)
    optimizer = ZENITH(old.named_parameters(), 0.1, momentum=0.9)
    drive(optimizer, old, 0, 2)
    with pytest.raises(
        ValueError, match=r"momentum_buffer of weight has shape \(4, 6\), the parameter \(9, 6\)"
    ):
        ZENITH(new.named_parameters(), 0.1, momentum=0.9).load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize(
    "copier", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"]
)
def test_copies_continue_alike_and_apart(copier: Callable[[Any], Any]) -> None:
    model = linear()
    optimizer = ZENITH(
        model.named_parameters(), 0.1, momentum=0.9, window=3, max_norm=0.5, max_nonfinite_steps=7
    )
    drive(optimizer, model, 0, 6)
    model_copy, optimizer_copy = copier((model, optimizer))
    assert optimizer_copy.param_groups[0]["params"][0] is model_copy.weight
    drive(optimizer, model, 6, 12)
    drive(optimizer_copy, model_copy, 6, 12)
    assert_same(snapshot(optimizer), snapshot(optimizer_copy))
    assert repr(optimizer) == repr(optimizer_copy)


def test_state_is_that_of_sgd_plus_8_bytes_per_norm() -> None:
    model, other = nn.Linear(100, 100), nn.Linear(100, 100)
    zenith, sgd = (
        ZENITH(model.parameters(), 0.1, momentum=0.9, window=100),
        torch.optim.SGD(other.parameters(), 0.1, momentum=0.9),
    )
    random_grads(model)
    random_grads(other)
    zenith.step()
    sgd.step()

    assert memory_of(zenith.state_dict()) - memory_of(sgd.state_dict()) <= 8 * 100 + 64


def test_evaluation_and_saving_in_between_change_nothing() -> None:
    model, other = linear(), linear()
    optimizer, untouched = (ZENITH(m.parameters(), 0.1, window=3, momentum=0.9) for m in (model, other))
    for t in range(10):
        drive(optimizer, model, t, t + 1)
        drive(untouched, other, t, t + 1)
        model.eval()
        model(torch.ones(6))
        copy.deepcopy(optimizer.state_dict())
        optimizer.zenith_state(), optimizer.effective_lrs()
        model.train()
    assert_same(snapshot(optimizer), snapshot(untouched))


@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)], ids=["float", "tensor"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_saving_by_torch_distributed_checkpoint_leaves_the_history(
    momentum: float, lr: float | Tensor
) -> None:
    state_dict = pytest.importorskip("torch.distributed.checkpoint.state_dict")
    model = linear()
    optimizer = ZENITH(model.parameters(), lr, momentum=momentum, window=3)
    state_dict.get_optimizer_state_dict(model, optimizer)
    assert optimizer.zenith_state()["recorded_steps"] == 0
    drive(optimizer, model, 0, 5)
    optimizer.zero_grad()
    norms = optimizer.state_dict()["param_groups"][0]["zenith"]["norms"].clone()
    saved = state_dict.get_optimizer_state_dict(model, optimizer)
    assert_same(saved["param_groups"][0]["zenith"]["norms"], norms)


# bad arguments


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1}, r"lr must be in \[0, inf\), got -1"),
        ({"lr": math.nan}, r"lr must be in \[0, inf\), got nan"),
        ({"lr": math.inf}, r"lr must be .*got inf"),
        ({"lr": "0.1"}, r"lr must be .*got '0\.1'"),
        ({"lr": torch.tensor([0.1, 0.2])}, r"lr must be a float or a 1-element tensor"),
        ({"lr": torch.tensor(-1.0)}, r"lr must be in"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\), got 1\.0"),
        ({"momentum": -0.1}, r"momentum must be in \[0, 1\), got -0\.1"),
        ({"nesterov": True}, r"momentum must be in \(0, 1\) with nesterov=True, got 0\.0"),
        ({"weight_decay": -1e-4}, r"weight_decay must be in \[0, inf\), got -0\.0001"),
        ({"window": 0}, r"window must be an integer >= 1, got 0"),
        ({"window": 2.5}, r"window must be an integer >= 1, got 2\.5"),
        ({"window": True}, r"window must be an integer >= 1, got True"),
        ({"min_ratio": 1.5}, r"min_ratio must be in \[0, 1\], got 1\.5"),
        ({"min_ratio": -0.5}, r"min_ratio must be in \[0, 1\], got -0\.5"),
        ({"record_after": -1}, r"record_after must be an integer >= 0, got -1"),
        ({"norm_source": "grad"}, r"norm_source must be one of \('gradient', 'momentum'\), got 'grad'"),
        ({"norm_source": "momentum"}, r"momentum must be in \(0, 1\) with norm_source='momentum', got 0\.0"),
        ({"max_norm": 0.0}, r"max_norm must be None or in \(0, inf\), got 0\.0"),
        ({"max_norm": 1.0, "clip": print}, r"clip must be None where max_norm is given"),
        ({"clip": 3}, r"clip must be None or a callable, got 3"),
        ({"max_nonfinite_steps": 0}, r"max_nonfinite_steps must be an integer >= 1, got 0"),
        ({"fused": "yes"}, r"fused must be None, False or True, got 'yes'"),
    ],
)
def test_bad_arguments_are_named_with_value_and_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ZENITH(linear().parameters(), **{"lr": 0.1, **options})


def test_bad_arguments_of_a_group() -> None:
    with pytest.raises(ValueError, match=r"momentum must be in \[0, 1\), got 2"):
        ZENITH([{"params": linear().parameters(), "momentum": 2}], 0.1)
    optimizer = ZENITH(linear().parameters(), 0.1)
    with pytest.raises(ValueError, match=r"lr must be in"):
        optimizer.add_param_group({"params": linear().parameters(), "lr": -1})
    assert len(optimizer.param_groups) == 1


def test_good_arguments_at_their_limits() -> None:
    ZENITH(
        linear().parameters(),
        0.0,
        momentum=0.0,
        window=1,
        min_ratio=0.0,
        record_after=0,
        max_nonfinite_steps=1,
    )
    ZENITH(linear().parameters(), 10, momentum=0.999, min_ratio=1, nesterov=True, norm_source="momentum")
    ZENITH(linear().parameters(), torch.tensor(0.1), max_norm=1e-9)


def test_repr_shows_the_options_of_all_groups() -> None:
    text = repr(ZENITH(linear().parameters(), 0.1, window=77, max_norm=2.5))
    assert "window: 77" in text
    assert "max_norm: 2.5" in text
