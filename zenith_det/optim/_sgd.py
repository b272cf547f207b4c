"""The SGD update at a learning rate that only the device knows, skipped where only the device knows that it
must be."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._norm import by_device_and_dtype, is_dtensor

__all__ = ["Scalars", "fused_supports", "in_float32", "local", "sgd_"]

_FUSED_DTYPES = frozenset((torch.float16, torch.bfloat16, torch.float32, torch.float64))
# torch's fused CPU kernels update float16 and bfloat16 wrongly before 2.14, in silence (seen in 2.6 and 2.11 to 2.13):
# weights are off by more than a step after five.
_CPU_DTYPES = _FUSED_DTYPES if torch.__version__ >= (2, 14) else frozenset((torch.float32, torch.float64))


class Scalars(NamedTuple):
    """The 0-dim tensors of an update, on one device."""

    lr: Tensor
    """The learning rate, float64."""
    skip: Tensor
    """1.0 if parameters and momentum are to stay as they are, else 0.0; float32."""
    grad_scale: Tensor | None
    """What the gradients are divided by first, float32."""

    def to(self, device: torch.device) -> Scalars:
        if device == self.lr.device:
            return self
        # To the CPU it has to wait: its kernels would read before the value is there.
        ahead = device.type != "cpu"
        return Scalars(*(None if s is None else s.to(device, non_blocking=ahead) for s in self))


def fused_supports(param: Tensor, grad: Tensor, buf: Tensor | None) -> bool:
    """Whether torch's fused kernel computes the update of this parameter (and does not merely run)."""
    if (
        grad.layout is not torch.strided
        or grad.dtype is not param.dtype
        or not (param.is_cpu or param.is_cuda)
        or param.dtype not in (_CPU_DTYPES if param.is_cpu else _FUSED_DTYPES)
    ):
        return False
    # The CPU kernel walks all three in memory order without a look at their strides.
    if param.is_contiguous() and grad.is_contiguous() and (buf is None or buf.is_contiguous()):
        return True
    stride = param.stride()
    return (
        grad.stride() == stride
        and (buf is None or buf.stride() == stride)
        and bool(torch.ops.aten.is_non_overlapping_and_dense(param))
    )


def sgd_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    bufs: Sequence[Tensor | None],
    scalars: Scalars,
    *,
    momentum: float,
    nesterov: bool,
    weight_decay: float,
    maximize: bool,
    fused: bool,
) -> None:
    """One step of SGD on ``params`` in place: ``torch.optim.SGD`` with tensors for the learning rate and the
    rest.

    Args:
        params: parameters; devices and types may be mixed.
        grads: their gradients; sparse ones only without momentum and weight decay. The fused kernel leaves
            them divided by ``grad_scale``, as ``GradScaler.unscale_`` and ``clip_grad_norm_`` do.
        bufs: their momentum buffers, zeros before the first step; None without momentum.
        scalars: learning rate, whether to skip, gradient scale.
        momentum, nesterov, weight_decay, maximize: as in ``torch.optim.SGD``.
        fused: use torch's fused kernel wherever it can; else (and for the rest) tensor by tensor.
    """
    if any(type(grad) is not Tensor and is_dtensor(grad) for grad in grads):
        params, grads, bufs = zip(*map(local, params, grads, bufs))
    if fused:
        params, grads, bufs = _fused_(
            params, grads, bufs, scalars, momentum, nesterov, weight_decay, maximize
        )
    for param, grad, buf in zip(params, grads, bufs):
        here = scalars.to(param.device)
        if grad.layout is torch.strided:
            _dense_(param, grad, buf, here, momentum, nesterov, weight_decay, maximize)
        else:
            _sparse_(param, grad, here, maximize)


def _fused_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    bufs: Sequence[Tensor | None],
    scalars: Scalars,
    momentum: float,
    nesterov: bool,
    weight_decay: float,
    maximize: bool,
) -> tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor | None]]:
    """Updates what the fused kernel can; returns the rest."""
    able = list(map(fused_supports, params, grads, bufs))
    rest: tuple[list[Tensor], list[Tensor], list[Tensor | None]] = ([], [], [])
    if not all(able):
        unable = [not yes for yes in able]
        rest = (list(compress(params, unable)), list(compress(grads, unable)), list(compress(bufs, unable)))
        params, grads, bufs = (list(compress(one, able)) for one in (params, grads, bufs))
    lists = (params, grads, bufs) if momentum else (params, grads)
    for bucket in by_device_and_dtype(*lists):
        device = bucket[0][0].device
        lr, skip, grad_scale = scalars.to(device)
        torch._fused_sgd_(
            bucket[0],
            bucket[1],
            bucket[2] if momentum else [],
            weight_decay=weight_decay,
            momentum=momentum,
            # The CUDA kernel reads a float32; the CPU one any type, and float64 parameters want all of it.
            lr=lr if device.type == "cpu" else lr.float(),
            dampening=0.0,
            nesterov=nesterov,
            maximize=maximize,
            is_first_step=False,
            grad_scale=grad_scale,
            found_inf=skip,
        )
    return rest


def local(param: Any, grad: Any, *state: Any) -> tuple[Any, ...]:
    """This rank's parts of DTensors: the update is elementwise, so each rank does its own."""
    if grad.placements != param.placements:
        grad = grad.redistribute(placements=param.placements)
    return tuple(None if part is None else part.to_local() for part in (param, grad, *state))


def _dense_(
    param: Tensor,
    grad: Tensor,
    buf: Tensor | None,
    scalars: Scalars,
    momentum: float,
    nesterov: bool,
    weight_decay: float,
    maximize: bool,
) -> None:
    """The same for one parameter, in operations that every device and type has; computes in float32 or
    better."""
    skip = scalars.skip.bool()
    old, step = in_float32(param, grad, scalars, maximize)
    dtype = old.dtype
    if weight_decay:
        step = step + weight_decay * old
    if buf is not None:
        velocity = momentum * buf.to(dtype) + step
        step = step + momentum * velocity if nesterov else velocity
        # Selected and not multiplied by 0: 0 times inf is NaN.
        buf.copy_(torch.where(skip, buf, velocity))
    param.copy_(torch.where(skip, param, old - scalars.lr * step))


def in_float32(param: Tensor, grad: Tensor, scalars: Scalars, maximize: bool) -> tuple[Tensor, Tensor]:
    """A parameter, and its unscaled gradient in the direction of descent; in float32 or better."""
    dtype = torch.promote_types(param.dtype, torch.float32)
    old, step = param.to(dtype), grad.to(dtype)
    if scalars.grad_scale is not None:
        step = step / scalars.grad_scale
    return old, -step if maximize else step


def _sparse_(param: Tensor, grad: Tensor, scalars: Scalars, maximize: bool) -> None:
    """Plain SGD of the rows that ``grad`` (sparse, coalesced) touches."""
    values = grad.values() if scalars.grad_scale is None else grad.values() / scalars.grad_scale
    step = torch.where(scalars.skip.bool(), 0.0, scalars.lr * values)
    update = torch.sparse_coo_tensor(
        grad.indices(), step.to(param.dtype), grad.shape, is_coalesced=True, check_invariants=False
    )
    param.add_(update if maximize else -update)
