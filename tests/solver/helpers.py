"""A small detector-like model and configurations for it, shared by the solver's tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from zenith_det.config import CfgNode, load_config


def config(**solver: Any) -> CfgNode:
    """The defaults with keys of SOLVER set: ``config(BASE_LR=0.1, ZENITH__WINDOW=5)``."""
    opts: list[Any] = []
    for key, value in solver.items():
        opts += [f"SOLVER.{key.replace('__', '.')}", value]
    return load_config(None, opts).cfg


class Model(nn.Module):
    """Convolutions, norms, a shared parameter, a frozen layer, one that never gets a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.frozen = nn.Conv2d(3, 4, 1).requires_grad_(False)
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, bias=False), nn.GroupNorm(2, 8))
        self.head = nn.Sequential(nn.Flatten(), nn.LayerNorm(8 * 16), nn.Linear(8 * 16, 5))
        self.tied = nn.Linear(8 * 16, 5)
        self.tied.weight = self.head[2].weight
        self.unused = nn.Linear(3, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(N, 3, 8, 8) to (N, 5)."""
        features = self.head[:2](self.body(self.stem(images)))
        return (self.head[2](features) + self.tied(features)) * self.scale


def make_model(seed: int = 0) -> Model:
    torch.manual_seed(seed)
    return Model()


def backward(model: nn.Module, seed: int, scale: float = 1.0) -> None:
    """Leave the gradients of one batch in the model."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(4, 3, 8, 8, generator=generator)
    targets = torch.randn(4, 5, generator=generator)
    model.zero_grad()
    ((model(images) - targets).square().mean() * scale).backward()


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: int,
    scheduler: Any = None,
    each: Callable[[], None] = lambda: None,
) -> None:
    """Take training steps on fixed random batches; ``each`` runs after every step, before the schedule's."""
    for step in range(steps):
        backward(model, seed=step)
        optimizer.step()
        each()
        if scheduler is not None:
            scheduler.step()


def same_weights(first: nn.Module, second: nn.Module) -> bool:
    pairs = zip(first.state_dict().items(), second.state_dict().items())
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)
