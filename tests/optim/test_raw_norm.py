"""The raw norm under loops that clip between backward() and step() and know nothing of ZENITH."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from zenith_det.optim import ZENITH, ZENITHAdamW, ZenithRatio, measure_after_backward
from zenith_det.training.processes.launching import launch

STEPS = 20


def make() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


def train(
    *,
    clip: float,
    how: str,
    kind: Any = ZENITH,
    scaler: Any = None,
    parts: int = 1,
    wrap: Any = lambda net: net,
    rank: int = 0,
) -> tuple[list[float], dict[str, Any]]:
    """Train, clipping between backward() and step(). Each step's norm, and the state at the end.

    ``how``: "told" calls record_norm() itself, "measured" has it measured, "" neither.
    """
    net = make()
    optimizer = kind(net.parameters(), lr=0.01, window=5)
    if how == "measured":
        measure_after_backward(optimizer, scaler)
    wrapped = wrap(net)
    norms = []
    for number in range(STEPS):
        generator = torch.Generator().manual_seed(number + 1000 * rank)
        inputs = torch.randn(6, 4, generator=generator)
        optimizer.zero_grad()
        for part in inputs.split(6 // parts):
            loss = (wrapped(part) - 3).square().mean() * 0.9**number
            (loss if scaler is None else scaler.scale(loss)).backward()
        if scaler is not None:
            scaler.unscale_(optimizer)
        if how == "told":
            optimizer.record_norm()
        nn.utils.clip_grad_norm_(net.parameters(), clip)
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        norms.append(optimizer.zenith_state()["grad_norm"])
    return norms, optimizer.zenith_state()


def over_adam(params: Any, lr: float, window: int) -> torch.optim.Optimizer:
    optimizer = torch.optim.Adam(params, lr=lr)
    ZenithRatio(optimizer, window=window)
    return optimizer


@pytest.mark.parametrize("kind", [ZENITH, ZENITHAdamW, over_adam])
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("scaled", [False, True])
def test_norms_are_those_that_record_norm_would_have_given(kind: Any, parts: int, scaled: bool) -> None:
    def scaler() -> Any:
        return torch.amp.GradScaler("cpu", init_scale=1024.0) if scaled else None

    told = train(clip=0.1, how="told", kind=kind, parts=parts, scaler=scaler())
    measured = train(clip=0.1, how="measured", kind=kind, parts=parts, scaler=scaler())
    assert measured == told
    assert measured[1]["ratio"] < 0.9
    assert min(measured[0]) > 0.2


def test_checkpointed_activations_and_a_second_loss() -> None:
    """A backward() within a backward(), which ends earlier; and one that another follows."""
    measured: list[float] = []

    class Tells(ZENITH):
        def record_norm(self) -> torch.Tensor:
            norm = super().record_norm()
            measured.append(float(norm))
            return norm

    net = make()
    optimizer = Tells(net.parameters(), lr=0.01)
    handle = measure_after_backward(optimizer)

    def first(x: torch.Tensor) -> Any:
        return net[1](net[0](x))  # type: ignore[index]

    inputs = torch.randn(6, 4, requires_grad=True)
    hidden = torch.utils.checkpoint.checkpoint(first, inputs, use_reentrant=True)
    net[2](hidden).sum().backward()  # type: ignore[index]
    assert measured[-1] == pytest.approx(norm_of(net))
    (net[0].weight * 2).sum().backward()  # type: ignore[index, operator]
    assert measured[-1] == pytest.approx(norm_of(net))
    handle.remove()
    count = len(measured)
    net(inputs).sum().backward()
    assert len(measured) == count


def norm_of(net: nn.Module) -> float:
    return float(nn.utils.get_total_norm([p.grad for p in net.parameters() if p.grad is not None]))


def test_it_wants_an_optimizer_that_measures_and_keeps_none_alive() -> None:
    with pytest.raises(TypeError, match="SGD measures no gradient norm"):
        measure_after_backward(torch.optim.SGD(make().parameters(), lr=0.1))
    net = make()
    optimizer = ZENITH(net.parameters(), lr=0.1)
    measure_after_backward(optimizer)
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None
    net(torch.randn(2, 4)).sum().backward()


def in_two_processes(folder: str) -> None:
    rank = torch.distributed.get_rank()
    for how in ("told", "measured"):
        result = train(clip=0.1, how=how, wrap=nn.parallel.DistributedDataParallel, rank=rank)
        torch.save(result, Path(folder, f"{how}{rank}.pt"))


def test_two_processes_measure_the_gradient_of_both(tmp_path: Path) -> None:
    launch(in_two_processes, 2, args=(str(tmp_path),), device="cpu")
    results = [torch.load(tmp_path / f"{how}{rank}.pt") for how in ("told", "measured") for rank in range(2)]
    assert results[1:] == results[:1] * 3
