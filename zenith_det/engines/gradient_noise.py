"""How much of a mini-batch gradient's norm is noise: what ZENITH's ratio of norms can't fall below."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from zenith_det.config import LoadedConfig
from zenith_det.engines.engine import Engine
from zenith_det.engines.probe import make_trainer
from zenith_det.optim import global_norm
from zenith_det.training.course.seeding import seed_step

__all__ = ["GradientNoise", "measure"]

#: Parts that the batches are taken in, for the spread.
PARTS = 4


@dataclass(frozen=True)
class GradientNoise:
    r"""The mean squared norm of a mini-batch gradient, and what it is made of.

    With :math:`g = G + \epsilon`, :math:`E\,\epsilon = 0`: :math:`E|g|^2 = |G|^2 + E|\epsilon|^2`.

    Attributes:
        square: :math:`E|g|^2`.
        signal: :math:`|G|^2`; the estimate has no bias, and so may be below 0 where it is small.
        signals: the same from each of :data:`PARTS` parts of the batches.
    """

    square: float
    signal: float
    signals: tuple[float, ...]

    @property
    def share(self) -> float:
        """Of the noise in the squared norm."""
        return 1 - self.signal / self.square

    @property
    def spread(self) -> tuple[float, float]:
        """The least and the largest share of the parts."""
        shares = [1 - signal / self.square for signal in self.signals]
        return min(shares), max(shares)


def measure(engine: Engine, loaded: LoadedConfig, batches: int) -> GradientNoise:
    r"""Take the gradients of so many batches at ``MODEL.WEIGHTS``, in the run's own order, and compare them.

    From n independent gradients, without bias: :math:`|G|^2 \approx (|\sum g|^2 - \sum |g|^2) / (n (n - 1))`
    (McCandlish et al., arXiv 1812.06162, appendix A.1, for batches of B and of n B). The choice of regions is
    drawn anew for each batch, and so is part of the noise, as in training. Gradients are those before clipping.

    Args:
        loaded: with the device resolved and ``SEED`` set.
        batches: of ``SOLVER.IMS_PER_BATCH`` images; a multiple of :data:`PARTS`, 2 a part at least.
    """
    trainer = make_trainer(engine, loaded)
    parameters = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    total = [torch.zeros_like(parameter) for parameter in parameters]
    each = batches // PARTS
    squares, signals = 0.0, []
    for part in range(PARTS):
        sums = [torch.zeros_like(parameter) for parameter in parameters]
        own = 0.0
        for number in range(part * each, (part + 1) * each):
            seed_step(trainer.progress.seed, number)
            losses = trainer.model(next(trainer.batches))
            loss = sum(losses.values(), torch.zeros((), device=trainer.device))
            gradients = torch.autograd.grad(loss, parameters, materialize_grads=True)
            own += float(global_norm(gradients)) ** 2
            torch._foreach_add_(sums, list(gradients))
        torch._foreach_add_(total, sums)
        signals.append(_signal(sums, own, each))
        squares += own
    count = PARTS * each
    return GradientNoise(squares / count, _signal(total, squares, count), tuple(signals))


def _signal(sums: list[torch.Tensor], squares: float, count: int) -> float:
    return (float(global_norm(sums)) ** 2 - squares) / (count * (count - 1))
