"""ZENITH and ZENITHAdamW on fake CUDA tensors: whatever a GPU's kernels demand of what they are given holds.

Nothing is computed: ``FakeTensorMode`` follows devices, dtypes, shapes and strides, and raises where a value is read.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from zenith_det.optim import ZENITH, ZENITHAdamW
from zenith_det.optim._watch import StreakReader

pytestmark = pytest.mark.skipif(
    torch.version.cuda is None, reason="needs a torch that is built for CUDA: this one is for the CPU alone"
)

CLIPPING: dict[str, dict[str, Any]] = {
    "": {},
    "max_norm": {"max_norm": 1.0},
    "clip": {"clip": lambda params: nn.utils.clip_grad_norm_(params, 1.0, foreach=True)},
}
CASES = [
    (kind, clipping, fused, dtypes, "gradient")
    for kind, clipping, fused, dtypes in itertools.product(
        (ZENITH, ZENITHAdamW), CLIPPING, (None, False, True), ("float32", "mixed")
    )
] + [
    (kind, "", fused, "bfloat16", source)
    for kind, fused, source in itertools.product(
        (ZENITH, ZENITHAdamW), (None, False), ("gradient", "momentum")
    )
]


@pytest.fixture(autouse=True)
def _kernels_that_check(monkeypatch: pytest.MonkeyPatch) -> None:
    def scalars(params: list[Tensor], lr: Any, grad_scale: Any, found_inf: Any) -> None:
        for one in (lr, grad_scale, found_inf):
            if one is not None:
                assert (one.device, one.dtype, one.numel()) == (params[0].device, torch.float32, 1)

    def lists(params: list[Tensor], *others: list[Tensor]) -> None:
        for other in others:
            for p, o in zip(params, other, strict=True):
                assert (p.dtype, p.device, p.shape) == (o.dtype, o.device, o.shape)
                assert all(n == 1 or a == b for n, a, b in zip(p.shape, p.stride(), o.stride()))

    def sgd(
        params: Any, grads: Any, buffers: Any, *, lr: Any, grad_scale: Any, found_inf: Any, **rest: Any
    ) -> None:
        scalars(params, lr, grad_scale, found_inf)
        lists(params, grads, *([buffers] if buffers else []))

    def adamw(
        params: Any, grads: Any, first: Any, second: Any, largest: Any, steps: Any, *,
        lr: Any, grad_scale: Any, found_inf: Any, **rest: Any,
    ) -> None:  # fmt: skip
        scalars(params, lr, grad_scale, found_inf)
        lists(params, grads, first, second)
        assert all(s.device == params[0].device and s.dtype == torch.float32 for s in steps)

    monkeypatch.setattr(torch, "_fused_sgd_", sgd)
    monkeypatch.setattr(torch, "_fused_adamw_", adamw)
    monkeypatch.setattr(StreakReader, "read", lambda self, streak: 0)  # by a CUDA event


def make_model(dtypes: str) -> nn.Sequential:
    """Two dtypes, or one, and a weight whose channels are innermost."""
    rest = torch.float32 if dtypes == "mixed" else getattr(torch, dtypes)
    first = torch.bfloat16 if dtypes == "mixed" else rest
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, device="cuda", dtype=first), nn.Linear(8, 4, device="cuda", dtype=rest)
    )
    model[0].weight = nn.Parameter(model[0].weight.detach().to(memory_format=torch.channels_last))
    return model


@pytest.mark.parametrize("lr", ["number", "cuda"])
@pytest.mark.parametrize(("kind", "clipping", "fused", "dtypes", "source"), CASES)
def test_a_step_stays_on_the_device(
    kind: Any, clipping: str, fused: bool | None, dtypes: str, source: str, lr: str
) -> None:
    with FakeTensorMode():
        model = make_model(dtypes)
        options = CLIPPING[clipping] | ({"momentum": 0.9} if kind is ZENITH else {})
        optimizer = kind(model.parameters(), 0.1, window=3, fused=fused, norm_source=source, **options)
        if lr == "cuda":
            optimizer.param_groups[0]["lr"] = torch.tensor(0.1, device="cuda")
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        if fused:  # as GradScaler hands gradients over
            optimizer.grad_scale = torch.tensor(2.0, device="cuda")
            optimizer.found_inf = torch.tensor(0.0, device="cuda")
        for _ in range(4):
            optimizer.step()
            optimizer.record_norm()
        kept = [t for s in optimizer.state.values() for t in s.values() if isinstance(t, Tensor)]
        kept += [t for t in vars(optimizer._history).values() if isinstance(t, Tensor)]
        assert kept
        assert {t.device.type for t in kept} == {"cuda"}
