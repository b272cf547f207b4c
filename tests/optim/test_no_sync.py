"""step() never waits for the device, and never reads anything back from it."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from zenith_det.optim import ZENITH, ZENITHAdamW
from zenith_det.optim._watch import StreakReader

NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "momentum and decay": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    "max_norm": {"momentum": 0.9, "max_norm": 1.0},
    "clip": {"clip": lambda params: nn.utils.clip_grad_value_(params, 0.1)},
    "momentum norm": {
        "momentum": 0.9,
        "norm_source": "momentum",
        "record_after": 2,
        "half_life": 50,
        "min_ratio": 0.1,
    },
    "unfused": {"momentum": 0.9, "fused": False},
    "AdamW": {"kind": ZENITHAdamW, "max_norm": 1.0},
    "AdamW, unfused": {"kind": ZENITHAdamW, "fused": False},
}


def optimizer_of(model: nn.Module, name: str, lr: Any) -> Any:
    options = dict(OPTIONS[name])
    kind: Any = options.pop("kind", ZENITH)
    return kind(model.parameters(), lr, window=3, **options)


@pytest.fixture
def _reader_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU's counter of skipped steps is read at once, with nothing to wait for; a device's isn't."""
    monkeypatch.setattr(StreakReader, "read", lambda self, streak: 0)


class Reads(TorchDispatchMode):
    """Counts the operations that hand a tensor's value (or a shape that depends on it) to Python."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name in (
            "aten::_local_scalar_dense",
            "aten::item",
            "aten::equal",
            "aten::is_nonzero",
            "aten::nonzero",
        ):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


def model_with_grads(device: str = "cpu") -> nn.Sequential:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Linear(8, 4)).to(device)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    return model


@pytest.mark.usefixtures("_reader_of_a_device")
@pytest.mark.parametrize("amp", [False, True], ids=["", "amp"])
@pytest.mark.parametrize("name", OPTIONS)
def test_step_reads_no_value(name: str, amp: bool) -> None:
    model = model_with_grads()
    optimizer = optimizer_of(model, name, torch.tensor(0.1))
    if amp:
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(0.0)
    with Reads() as reads:
        for _ in range(6):
            optimizer.step()
            optimizer.record_norm()
    assert reads.seen == []
    with Reads() as reads:
        float(optimizer.record_norm())
    assert reads.seen, "the counter counts nothing"


@pytest.mark.usefixtures("_reader_of_a_device")
@pytest.mark.parametrize("fused", [None, False, True])
@pytest.mark.parametrize("kind", [ZENITH, ZENITHAdamW, torch.optim.SGD])
def test_grad_scaler_reads_no_value_before_a_fused_step(kind: Any, fused: bool | None) -> None:
    """It waits to hear whether ``step()`` is to be called, unless the optimizer decides that on the device."""
    model = model_with_grads()
    optimizer, scaler = kind(model.parameters(), lr=0.1, fused=fused), torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    with Reads() as reads:
        scaler.step(optimizer)
    assert bool(reads.seen) == (not fused)


@pytest.mark.usefixtures("_reader_of_a_device")
@pytest.mark.parametrize("name", OPTIONS)
def test_step_runs_where_tensors_have_no_values(name: str) -> None:
    """On the meta device every read raises, and the code takes the way of an accelerator."""
    model = model_with_grads("meta")
    optimizer = optimizer_of(model, name, torch.tensor(0.1))
    for _ in range(6):
        optimizer.step()
        optimizer.record_norm()
    assert optimizer.state_dict()["param_groups"][0]["zenith"]["norms"].is_meta
    with pytest.raises((RuntimeError, NotImplementedError)):
        optimizer.zenith_state()


def test_python_state_does_not_change_from_step_to_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Python number that counts steps would make torch.compile compile each of them."""

    def numbers(value: Any) -> Any:
        if isinstance(value, Tensor):
            return None
        if isinstance(value, dict):
            return {k: numbers(v) for k, v in value.items() if not isinstance(k, Tensor)}
        if isinstance(value, (list, tuple)):
            return [numbers(v) for v in value]
        return numbers(vars(value)) if type(value).__module__.startswith("zenith_det") else repr(value)

    model = model_with_grads()
    optimizer = ZENITH(model.parameters(), 0.1, momentum=0.9, window=3, record_after=2)
    optimizer.step()
    del optimizer._memo.watch  # which counts, and which compiled steps leave alone
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    before = copy.deepcopy(numbers(vars(optimizer)))
    for _ in range(5):
        optimizer.step()
    assert numbers(vars(optimizer)) == before


@NEEDS_CUDA
@pytest.mark.gpu
@pytest.mark.parametrize("amp", [False, True], ids=["", "amp"])
@pytest.mark.parametrize("name", OPTIONS)
def test_cuda_step_does_not_synchronise(name: str, amp: bool) -> None:
    model = model_with_grads("cuda")
    optimizer = optimizer_of(model, name, 0.1)
    if amp:
        optimizer.grad_scale = torch.tensor(2.0, device="cuda")
        optimizer.found_inf = torch.tensor(0.0, device="cuda")
    optimizer.step()  # the first one makes state, which may
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(6):
            optimizer.step()
            optimizer.record_norm()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert optimizer.zenith_state()["recorded_steps"] > 0


@NEEDS_CUDA
@pytest.mark.gpu
def test_cuda_agrees_with_cpu_and_with_sgd() -> None:
    torch.manual_seed(0)
    model = model_with_grads()
    on_gpu = copy.deepcopy(model).cuda()
    sgd_model = copy.deepcopy(model).cuda()
    options: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
    cpu, gpu = (ZENITH(m.parameters(), window=5, **options) for m in (model, on_gpu))
    off = ZENITH(copy.deepcopy(sgd_model).parameters(), min_ratio=1.0, **options)
    sgd = torch.optim.SGD(sgd_model.parameters(), fused=True, **options)
    for t in range(30):
        groups = [optimizer.param_groups[0]["params"] for optimizer in (cpu, gpu, off, sgd)]
        for params in zip(*groups):
            grad = torch.randn(params[0].shape) * math.exp(-t / 10)
            for p in params:
                p.grad = grad.to(p.device)
        for optimizer in (cpu, gpu, off, sgd):
            optimizer.step()
    assert gpu.zenith_state() == pytest.approx(cpu.zenith_state(), rel=1e-5)
    for p, q in zip(model.parameters(), on_gpu.parameters()):
        torch.testing.assert_close(p, q.cpu(), rtol=1e-4, atol=1e-5)
    for p, q in zip(off.param_groups[0]["params"], sgd_model.parameters()):
        assert torch.equal(p, q)


@NEEDS_CUDA
@pytest.mark.gpu
def test_cuda_nonfinite_steps_raise_a_few_steps_late() -> None:
    model = model_with_grads("cuda")
    optimizer = ZENITH(model.named_parameters(), 0.1, max_nonfinite_steps=5)
    model[1].bias.grad.fill_(math.nan)
    with pytest.raises(FloatingPointError, match=r"1\.bias"):  # noqa: PT012
        for _ in range(50):
            optimizer.step()
            torch.cuda.synchronize()
    assert optimizer.zenith_state()["skipped_steps"] >= 5
