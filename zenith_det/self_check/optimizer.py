"""ZENITH's step: against its formulas in float64, beside torch's SGD, and whether the host waits in it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zenith_det.benchmarking.measuring import Case, interleave
from zenith_det.optim import ZENITH, ZENITHAdamW
from zenith_det.self_check.finding import OK, SLOW, Finding, broken, not_checked

LR, MOMENTUM, DECAY, WINDOW, STEPS = 0.05, 0.9, 1e-2, 3, 12
BETAS, EPS = (0.9, 0.999), 1e-8
#: Relative to the largest weight: some hundred roundings of float32.
TOLERANCE = 1e-5
#: ZENITH's step over that of torch's fused SGD: what bytes alone allow is 1.2, and 1.6 was seen on CPUs.
MOST_OVER_SGD = 2.0
TIMED_TENSORS, TIMED_NUMBERS, TIMED_ROUNDS = 20, 1_000_000, 15


def check_step(device: torch.device) -> Finding:
    """Both optimizers' steps give the weights that the formulas give, and cost little more than SGD's."""
    worst = 0.0
    for kind in (ZENITH, ZENITHAdamW):
        torch.manual_seed(0)
        start = [torch.randn(shape) for shape in ((64, 33), (7,), (3, 3, 5, 5))]
        # Falling, so that the ratio leaves 1, and rising again.
        grads = [[torch.randn_like(p) * (1.2 + math.cos(t / 2)) for p in start] for t in range(STEPS)]
        taken = _stepped(kind, start, grads, device)
        for p, expected in zip(taken, reference(kind, start, grads)):
            off = float((p.double().cpu() - expected).abs().max() / expected.abs().max())
            worst = max(worst, off)
            if not off <= TOLERANCE:  # NaN, too
                return broken(
                    f"{kind.__name__} is {off:.2g} off its formulas after {STEPS} steps (at most {TOLERANCE:g})"
                )
    samples = interleave(
        [Case(name, _timed_step(name, device)) for name in ("ZENITH", "SGD")],
        rounds=TIMED_ROUNDS,
        warmup=3,
        device=device,
    )
    zenith, sgd = samples["ZENITH"].median, samples["SGD"].median
    found = f"{worst:.1g} off the formulas; a step takes {zenith / sgd:.2f} times that of fused SGD"
    figures = {"off": worst, "zenith_seconds": zenith, "sgd_seconds": sgd}
    if zenith / sgd > MOST_OVER_SGD:
        return Finding(
            SLOW, found, "end other programs and try again; then: zenith-det benchmark optimizer", figures
        )
    return Finding(OK, found, figures=figures)


def reference(kind: type, start: Sequence[Tensor], grads: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """The weights after a step on each of ``grads``, by the formulas, in float64."""
    params = [p.double() for p in start]
    first, second = ([torch.zeros_like(p) for p in params] for _ in range(2))
    norms: list[float] = []
    highest, ratio = 0.0, 1.0
    for t, step in enumerate(grads, start=1):
        gs = [g.double() for g in step]
        norms = [*norms, math.sqrt(sum(float(g.square().sum()) for g in gs))][-WINDOW:]
        if len(norms) == WINDOW:
            mean = sum(norms) / WINDOW
            highest = max(highest, mean)
            ratio = mean / highest
        for p, g, m, v in zip(params, gs, first, second):
            if kind is ZENITH:
                m.mul_(MOMENTUM).add_(g + DECAY * p)
                p.sub_(LR * ratio * m)
            else:
                m.mul_(BETAS[0]).add_((1 - BETAS[0]) * g)
                v.mul_(BETAS[1]).add_((1 - BETAS[1]) * g.square())
                p.mul_(1 - LR * ratio * DECAY)
                root = (v / (1 - BETAS[1] ** t)).sqrt() + EPS
                p.sub_(LR * ratio * (m / (1 - BETAS[0] ** t)) / root)
    return params


def _make(kind: type, params: Sequence[nn.Parameter], **more: Any) -> Any:
    own = {"momentum": MOMENTUM} if kind is ZENITH else {"betas": BETAS, "eps": EPS}
    return kind(params, lr=LR, weight_decay=DECAY, window=WINDOW, **own, **more)


def _stepped(
    kind: type, start: Sequence[Tensor], grads: Sequence[Sequence[Tensor]], device: torch.device
) -> list[Tensor]:
    params = [nn.Parameter(p.clone().to(device)) for p in start]
    optimizer = _make(kind, params)
    for step in grads:
        for p, g in zip(params, step):
            p.grad = g.to(device)
        optimizer.step()
    return [p.detach() for p in params]


def _timed_step(name: str, device: torch.device) -> Any:
    params = [nn.Parameter(torch.zeros(TIMED_NUMBERS, device=device)) for _ in range(TIMED_TENSORS)]
    for p in params:
        p.grad = torch.full_like(p, 1e-3)
    if name == "SGD":
        return torch.optim.SGD(params, lr=LR, momentum=MOMENTUM, weight_decay=DECAY, fused=True).step
    return _make(ZENITH, params).step


def check_no_wait(device: torch.device) -> Finding:
    """On a GPU no step waits for the device: torch raises where one would."""
    if device.type != "cuda":
        return not_checked("needs a GPU")
    for kind in (ZENITH, ZENITHAdamW):
        for options in ({}, {"max_norm": 1.0}, {"fused": True}):
            params = [nn.Parameter(torch.randn(64, 33, device=device)) for _ in range(3)]
            for p in params:
                p.grad = torch.randn_like(p)
            optimizer = _make(kind, params, **options)
            if options.get("fused"):  # as GradScaler hands them over
                optimizer.grad_scale = torch.tensor(2.0, device=device)
                optimizer.found_inf = torch.tensor(0.0, device=device)
            optimizer.step()  # the first one makes state, which may
            torch.cuda.set_sync_debug_mode("error")
            try:
                for _ in range(5):
                    optimizer.step()
            except RuntimeError as error:
                return broken(f"{kind.__name__} {options or ''} waits: {str(error).splitlines()[0]}")
            finally:
                torch.cuda.set_sync_debug_mode("default")
    return Finding(OK, "no step of ZENITH and ZENITHAdamW waits for the device")
