"""The literal ZENITH: plain Python floats, one line per formula, no speed: what tests compare against.

A parameter is a list of floats, a gradient too (None: no gradient), a group a dict with "params" (a list of
parameters) and "lr", "momentum", "nesterov", "weight_decay", "maximize"; or, for AdamW's update, "betas" and "eps" in
place of the momentum's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

Vector = list[float]


class LiteralZenith:
    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        window: int = 100,
        min_ratio: float = 0.0,
        record_after: int = 0,
        half_life: int = 0,
        norm_source: str = "gradient",
        max_norm: float | None = None,
        clip: Callable[[list[Vector]], list[Vector]] | None = None,
    ) -> None:
        self.groups = groups
        self.window = window
        self.min_ratio = min_ratio
        self.record_after = record_after
        self.half_life = half_life
        self.norm_source = norm_source
        self.max_norm = max_norm
        self.clip = clip
        self.bufs: list[list[Vector | None]] = [[None] * len(group["params"]) for group in groups]
        self.squares: list[list[Vector]] = [[[0.0] * len(p) for p in group["params"]] for group in groups]
        self.updates: list[list[int]] = [[0] * len(group["params"]) for group in groups]
        self.norms: list[float] = []
        self.zenith = 0.0
        self.ratio = 1.0
        self.finite_steps = self.recorded = self.skipped = self.streak = 0
        self.effective_lrs: list[float] = []

    def step(
        self,
        grads: list[list[Vector | None]],
        *,
        grad_scale: float = 1.0,
        found_inf: bool = False,
        measured: float | None = None,
    ) -> None:
        """``measured``: what ``record_norm()`` returned before the gradients were changed."""
        places = [(i, j) for i, group in enumerate(grads) for j, g in enumerate(group) if g is not None]
        if not places:
            return
        g = {place: [x / grad_scale for x in grads[place[0]][place[1]]] for place in places}
        norm = l2(g.values()) if measured is None else measured / grad_scale

        if found_inf or not math.isfinite(norm):
            self.skipped += 1
            self.streak += 1
            self.effective_lrs = [group["lr"] * self.ratio for group in self.groups]
            return
        self.streak = 0

        # n_t
        n = norm
        if self.norm_source == "momentum":
            n = l2(b for i, j in places if (b := self.bufs[i][j]) is not None)
        no_training = norm == 0 and all(group["lr"] == 0 for group in self.groups)
        no_momentum_yet = self.norm_source == "momentum" and n == 0
        joins = self.finite_steps >= self.record_after and not no_training and not no_momentum_yet
        self.finite_steps += 1
        if joins:
            self.norms = (self.norms + [n])[-self.window :]
            self.recorded += 1
        # m_t, M_t, r_t
        if len(self.norms) == self.window:
            mean = math.fsum(self.norms) / self.window
            if self.half_life and joins:
                self.zenith *= 2 ** (-1 / self.half_life)
            self.zenith = max(self.zenith, mean)
            self.ratio = max(mean / self.zenith, self.min_ratio) if self.zenith > 0 else 1.0
        self.effective_lrs = [group["lr"] * self.ratio for group in self.groups]

        if self.max_norm is not None:
            factor = min(1.0, self.max_norm / (norm + 1e-6))
            g = {place: [factor * x for x in values] for place, values in g.items()}
        if self.clip is not None:
            g = dict(zip(g, self.clip(list(g.values()))))

        for i, j in places:
            group, param = self.groups[i], self.groups[i]["params"][j]
            sign = -1.0 if group.get("maximize") else 1.0
            mu, decay, lr = group.get("momentum", 0.0), group.get("weight_decay", 0.0), self.effective_lrs[i]
            if "betas" in group:
                self.adamw(i, j, [sign * x for x in g[i, j]])
                continue
            d = [sign * x + decay * p for x, p in zip(g[i, j], param)]
            if mu:
                buf = self.bufs[i][j] or [0.0] * len(param)
                b = self.bufs[i][j] = [mu * old + x for old, x in zip(buf, d)]
                d = [x + mu * y for x, y in zip(d, b)] if group.get("nesterov") else b
            param[:] = [p - lr * x for p, x in zip(param, d)]

    def adamw(self, i: int, j: int, g: Vector) -> None:
        group, lr = self.groups[i], self.effective_lrs[i]
        param, (beta1, beta2) = group["params"][j], group["betas"]
        a = self.bufs[i][j] or [0.0] * len(param)
        t = self.updates[i][j] = self.updates[i][j] + 1
        a = self.bufs[i][j] = [beta1 * old + (1 - beta1) * x for old, x in zip(a, g)]
        v = self.squares[i][j] = [beta2 * old + (1 - beta2) * x * x for old, x in zip(self.squares[i][j], g)]
        step = [(x / (1 - beta1**t)) / (math.sqrt(y / (1 - beta2**t)) + group["eps"]) for x, y in zip(a, v)]
        param[:] = [(1 - lr * group["weight_decay"]) * p - lr * x for p, x in zip(param, step)]

    def reset_history(self) -> None:
        self.norms, self.zenith, self.ratio, self.recorded = [], 0.0, 1.0, 0


def l2(vectors: Any) -> float:
    return math.sqrt(math.fsum(x * x for vector in vectors for x in vector))
