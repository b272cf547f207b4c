"""The AdamW update at a learning rate that only the device knows, skipped where only the device knows that it
must be."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress

import torch
from torch import Tensor

from ._norm import by_device_and_dtype, is_dtensor
from ._sgd import Scalars, fused_supports, in_float32, local

__all__ = ["adamw_"]

Lists = tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]]


def adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    scalars: Scalars,
    *,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    maximize: bool,
    fused: bool,
) -> None:
    """One step of AdamW on ``params`` in place: ``torch.optim.AdamW`` with tensors for the learning rate and the
    rest.

    Args:
        params: parameters; devices and types may be mixed.
        grads: their gradients, strided. The fused kernel leaves them divided by ``grad_scale``.
        exp_avgs, exp_avg_sqs: their running means and mean squares, zeros before the first step.
        steps: how many updates each has had, 0-dim float32 on the parameter's device.
        scalars: learning rate, whether to skip, gradient scale.
        betas, eps, weight_decay, maximize: as in ``torch.optim.AdamW``.
        fused: use torch's fused kernel wherever it can; else (and for the rest) tensor by tensor.
    """
    lists: Lists = (params, grads, exp_avgs, exp_avg_sqs, steps)
    if any(type(grad) is not Tensor and is_dtensor(grad) for grad in grads):
        lists = (*zip(*map(local, *lists[:4])), steps)  # type: ignore[assignment]
    if any(param.is_complex() for param in params):
        parts = [[torch.view_as_real(t) if t.is_complex() else t for t in one] for one in lists]
        lists = tuple(parts)  # type: ignore[assignment]
    able = [fused and _fused_supports(*one[:4]) for one in zip(*lists)]
    if any(able):
        _fused_(_only(able, lists), scalars, betas, eps, weight_decay, maximize)
    for one in zip(*_only([not yes for yes in able], lists)):
        _dense_(*one, scalars.to(one[0].device), betas, eps, weight_decay, maximize)


def _only(wanted: list[bool], lists: Lists) -> Lists:
    if all(wanted):
        return lists
    return tuple(list(compress(one, wanted)) for one in lists)  # type: ignore[return-value]


def _fused_supports(param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor) -> bool:
    return fused_supports(param, grad, exp_avg) and exp_avg_sq.stride() == exp_avg.stride()


def _fused_(
    lists: Lists,
    scalars: Scalars,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    maximize: bool,
) -> None:
    for params, grads, exp_avgs, exp_avg_sqs, steps in by_device_and_dtype(*lists):
        device = params[0].device
        lr, skip, grad_scale = scalars.to(device)
        torch._foreach_add_(steps, [1 - skip] * len(steps))  # a list: torch would read a lone tensor
        torch._fused_adamw_(
            params,
            grads,
            exp_avgs,
            exp_avg_sqs,
            [],
            steps,
            # The CUDA kernel reads a float32; the CPU one any type.
            lr=lr if device.type == "cpu" else lr.float(),
            beta1=betas[0],
            beta2=betas[1],
            weight_decay=weight_decay,
            eps=eps,
            amsgrad=False,
            maximize=maximize,
            grad_scale=grad_scale,
            found_inf=skip,
        )


def _dense_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    scalars: Scalars,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    maximize: bool,
) -> None:
    """The same for one parameter, in operations that every device and type has; computes in float32 or
    better."""
    skip = scalars.skip.bool()
    old, g = in_float32(param, grad, scalars, maximize)
    dtype = old.dtype
    mean = betas[0] * exp_avg.to(dtype) + (1 - betas[0]) * g
    square = betas[1] * exp_avg_sq.to(dtype) + (1 - betas[1]) * g * g
    step.add_(1 - scalars.skip)
    taken = step.to(scalars.lr.dtype)
    step_size = scalars.lr / (1 - betas[0] ** taken)
    root = (square / (1 - betas[1] ** taken)).sqrt() + eps
    new = old * (1 - scalars.lr * weight_decay) - step_size * mean / root
    # Selected and not multiplied by 0: 0 times inf is NaN.
    exp_avg.copy_(torch.where(skip, exp_avg, mean))
    exp_avg_sq.copy_(torch.where(skip, exp_avg_sq, square))
    param.copy_(torch.where(skip, param, new))
