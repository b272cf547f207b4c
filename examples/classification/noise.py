"""How much of a mini-batch gradient's norm is noise: what keeps ZENITH's ratio from falling."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate

from zenith_det.optim import global_norm


def noise_share(
    model: nn.Module,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    dataset: Dataset[Any],
    batch_size: int,
    generator: torch.Generator,
    pairs: int = 4,
) -> dict[str, float]:
    r"""Splits the mean squared norm of a mini-batch gradient into signal and noise.

    Two independent batches of :math:`B` examples give :math:`g_1, g_2` with the same expectation :math:`G`
    and covariance :math:`\Sigma_B`. Then, without bias,

    .. math::
        |G|^2 &\approx g_1 \cdot g_2 \\
        \operatorname{tr} \Sigma_B &\approx |g_1 - g_2|^2 / 2 \\
        E|g|^2 = |G|^2 + \operatorname{tr} \Sigma_B &\approx (|g_1|^2 + |g_2|^2) / 2

    It is the estimate of McCandlish et al., "An Empirical Model of Large-Batch Training" (arXiv 1812.06162),
    appendix A.1, equations for :math:`|G|^2` and :math:`S`, with :math:`B_{small} = B` and the two batches
    together as :math:`B_{big} = 2B`: :math:`2 |(g_1 + g_2)/2|^2 - (|g_1|^2 + |g_2|^2)/2 = g_1 \cdot g_2`. The
    batches are drawn with replacement, so :math:`G` is the training set's own gradient (of batch statistics
    where there is batch normalization). Batches of an epoch are drawn without: their noise is
    :math:`(N-B)/(N-1)` of it, N the size of the set.

    Weights, gradients, batch statistics and random state stay as they are: a copy of the model does the work,
    and ``generator`` is the only source of the draw.

    Args:
        model: in training mode; on any device.
        loss_fn: logits (B, classes) and labels (B,) to a scalar.
        dataset: what the batches are drawn from.
        batch_size: B.
        generator: on the CPU.
        pairs: how many pairs the three sums are averaged over, >= 1.

    Returns:
        ``signal`` :math:`|G|^2` (may be below 0 where it is small: it is not clipped, which would bias it),
        ``noise`` :math:`\operatorname{tr} \Sigma_B`, and ``share``, noise / (signal + noise); with
        ``share_epoch``, the same for batches drawn without replacement.
    """
    twin = copy.deepcopy(model)
    device = next(twin.parameters()).device
    total = len(dataset)  # type: ignore[arg-type]
    products, squares = 0.0, 0.0
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):  # dropout draws from it
        for _ in range(pairs):
            gradients = []
            for _ in range(2):
                rows = torch.randint(total, (batch_size,), generator=generator).tolist()
                images, labels = default_collate([dataset[row] for row in rows])
                loss = loss_fn(twin(images.to(device)), labels.to(device))
                gradients.append(torch.autograd.grad(loss, list(twin.parameters()), materialize_grads=True))
            one, two = gradients
            norms = [float(global_norm(part)) for part in (one, two)]
            difference = float(global_norm([a - b for a, b in zip(one, two)]))
            square = (norms[0] ** 2 + norms[1] ** 2) / 2
            squares += square / pairs
            products += (square - difference**2 / 2) / pairs  # g₁·g₂
    noise = squares - products
    epoch_noise = noise * max(total - batch_size, 0) / max(total - 1, 1)
    return {
        "signal": products,
        "noise": noise,
        "share": _share(noise, products),
        "share_epoch": _share(epoch_noise, products),
    }


def _share(noise: float, signal: float) -> float:
    return noise / (noise + signal) if noise + signal > 0 else float("nan")
