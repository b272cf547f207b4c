"""A ZENITH and its literal twin on the same parameters, driven by the same gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from zenith_det.optim import ZENITH

from .literal_zenith import LiteralZenith, Vector

# Two groups with their own options, one of them with a scalar and an empty parameter, and an empty group.
SHAPES = [[(3, 4), (5,), (2, 3, 1, 2)], [(), (0,), (7,)], []]
GROUP_OPTIONS: list[dict[str, Any]] = [{}, {"lr": 0.003, "weight_decay": 0.0}, {"lr": 1.0}]


class Twins:
    def __init__(
        self,
        seed: int = 0,
        lr: float = 0.02,
        dtype: torch.dtype = torch.float64,
        clip: Any = None,
        kind: Any = ZENITH,
        **options: Any,
    ) -> None:
        """
        Args:
            clip: a pair, of the callable for ZENITH and that for the twin.
            kind: a ZENITH's class, or what makes another optimizer with the ratio over it.
        """
        self.random = torch.Generator().manual_seed(seed)
        groups = []
        for shapes, own in zip(SHAPES, GROUP_OPTIONS):
            params = [nn.Parameter(self.randn(shape).to(dtype)) for shape in shapes]
            groups.append({"params": params, **own})
        if clip is not None:
            options = {**options, "clip": clip[0]}
        self.optimizer = kind(groups, lr, **options)
        self.buffer = "exp_avg" if "betas" in self.optimizer.defaults else "momentum_buffer"
        per_group = self.optimizer.defaults.keys() - {"fused"}
        literal_groups = [
            {**{k: g[k] for k in per_group}, "params": [vector(p) for p in g["params"]]}
            for g in self.optimizer.param_groups
        ]
        own_options = ("window", "min_ratio", "record_after", "half_life", "norm_source", "max_norm")
        self.literal = LiteralZenith(
            literal_groups, clip=clip and clip[1], **{k: v for k, v in options.items() if k in own_options}
        )

    @property
    def params(self) -> list[nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def randn(self, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=self.random, dtype=torch.float64)

    def draw(self, size: float = 1.0, missing: float = 0.0) -> None:
        """New random gradients; each is None with the probability ``missing``."""
        for p in self.params:
            none = float(torch.rand((), generator=self.random)) < missing
            p.grad = None if none else (size * self.randn(p.shape)).to(p.dtype)

    def grads(self) -> list[list[Vector | None]]:
        return [
            [None if p.grad is None else vector(p.grad) for p in group["params"]]
            for group in self.optimizer.param_groups
        ]

    def set_lr(self, index: int, lr: float) -> None:
        self.optimizer.param_groups[index]["lr"] = lr
        self.literal.groups[index]["lr"] = lr

    def step(self, **literal_options: Any) -> None:
        grads = self.grads()  # before: the fused kernel may divide them
        self.optimizer.step()
        self.literal.step(grads, **literal_options)

    def assert_agree(self, rel: float = 1e-6) -> None:
        optimizer, literal = self.optimizer, self.literal
        state = optimizer.zenith_state()
        assert state["ratio"] == pytest.approx(literal.ratio, rel=rel)
        assert state["zenith"] == pytest.approx(literal.zenith, rel=rel)
        assert state["recorded_steps"] == literal.recorded
        assert state["skipped_steps"] == literal.skipped
        assert state["consecutive_nonfinite"] == literal.streak
        if literal.effective_lrs:
            assert optimizer.effective_lrs() == pytest.approx(literal.effective_lrs, rel=rel)
        norms = optimizer.state_dict()["param_groups"][0]["zenith"]["norms"]
        assert norms[~norms.isnan()].tolist() == pytest.approx(literal.norms, rel=rel)
        for i, group in enumerate(optimizer.param_groups):
            for j, param in enumerate(group["params"]):
                assert vector(param) == pytest.approx(literal.groups[i]["params"][j], rel=rel, abs=rel)
                buf = optimizer.state[param].get(self.buffer) if param in optimizer.state else None
                expected = literal.bufs[i][j] or [0.0] * param.numel()
                if buf is not None:
                    assert vector(buf) == pytest.approx(expected, rel=rel, abs=rel)
                else:
                    assert not any(expected)


def vector(tensor: Tensor) -> Vector:
    return tensor.detach().double().flatten().tolist()  # type: ignore[no-any-return]
