"""The global norm: right for every kind of tensor that a gradient can be."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from zenith_det.optim import global_norm


def reference(tensors: list[Tensor]) -> float:
    dense = [t.to_dense() if t.is_sparse else t for t in tensors]
    flat = [torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in dense]
    return math.sqrt(sum(float(t.double().square().sum()) for t in flat))


def embedding_gradient() -> Tensor:
    embedding = torch.nn.Embedding(20, 3, sparse=True)
    embedding(torch.tensor([1, 7, 7, 7])).square().sum().backward()
    grad = embedding.weight.grad
    assert grad is not None
    assert not grad.is_coalesced()
    return grad


torch.manual_seed(0)
KINDS = {
    "one": [torch.randn(7)],
    "scalar, empty and matrix": [torch.randn(()), torch.randn(0, 3), torch.randn(40, 30)],
    "only empty": [torch.randn(0)],
    # around the sizes where rows begin
    "large": [torch.randn(n) for n in (4096, 32767, 32768, 32769, 3 * 4096 * 8 + 17, 250_000)],
    "channels last": [torch.randn(8, 16, 3, 3).to(memory_format=torch.channels_last), torch.randn(64, 64, 9)],
    "large channels last": [torch.randn(128, 64, 3, 3).to(memory_format=torch.channels_last)],
    "strided view": [torch.randn(90, 90)[::2, 1::3], torch.randn(300, 300).t()],
    "complex": [torch.randn(5, 5, dtype=torch.complex64), torch.randn(3)],
    "half and bfloat16": [torch.randn(99_999).half(), torch.randn(50).bfloat16(), torch.randn(9)],
    "double": [torch.randn(50_000, dtype=torch.float64), torch.randn(3)],
    "sparse, the same row three times": [embedding_gradient(), torch.randn(3)],
}


@pytest.mark.parametrize("kind", KINDS)
def test_equals_double_precision(kind: str) -> None:
    norm = global_norm(KINDS[kind])
    assert norm.shape == ()
    assert norm.dtype is torch.float64
    assert float(norm) == pytest.approx(reference(KINDS[kind]), rel=1e-6)


def test_half_does_not_overflow_or_vanish() -> None:
    big, small = torch.full((1000,), 6e4, dtype=torch.half), torch.full((1000,), 6e-6, dtype=torch.half)
    assert float(global_norm([big])) == pytest.approx(reference([big]), rel=1e-6)
    assert float(global_norm([small])) == pytest.approx(reference([small]), rel=1e-6)


def test_millions_of_equal_values_do_not_drift() -> None:
    # A float32 sum that runs through the whole tensor loses 1e-4 here.
    value = float(torch.tensor(0.1))
    one = [torch.full((20_000_000,), 0.1)]
    assert float(global_norm(one)) == pytest.approx(math.sqrt(2e7) * value, rel=1e-6)
    many = [torch.full((20_000,), 0.1)] * 500
    assert float(global_norm(many)) == pytest.approx(math.sqrt(1e7) * value, rel=1e-6)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("size", [3, 40_000])
def test_non_finite_shows(bad: float, size: int) -> None:
    values = torch.randn(size)
    values[size // 2] = bad
    assert not global_norm([torch.randn(5), values]).isfinite()


def test_nothing_has_norm_zero() -> None:
    assert float(global_norm([])) == 0.0


def test_accelerator_branch_gives_the_same_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    """The multi-tensor branch, which a GPU takes, run on the CPU."""
    from zenith_det.optim import _norm

    tensors = [torch.randn(30, 7), torch.randn(11)]
    rows = global_norm(tensors)
    grouped: list[int] = []
    foreach_norm = torch._foreach_norm
    monkeypatch.setattr(torch, "_foreach_norm", lambda *a, **k: grouped.append(1) or foreach_norm(*a, **k))
    monkeypatch.setattr(_norm, "_in_rows", lambda device: False)
    assert float(global_norm(tensors)) == pytest.approx(float(rows), rel=1e-6)
    assert grouped
