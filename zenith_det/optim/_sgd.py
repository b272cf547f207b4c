"""The SGD update at a learning rate that only the device knows, skipped where only the device knows that it
must be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._norm import is_dtensor

__all__ = ["Scalars", "fused_supports", "sgd_"]

_FUSED_DTYPES = frozenset((torch.float16, torch.bfloat16, torch.float32, torch.float64))
_FUSED_DEVICES = frozenset(("cpu", "cuda"))


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
        return Scalars(*(None if s is None else s.to(device, non_blocking=True) for s in self))


def fused_supports(param: Tensor, grad: Tensor, buf: Tensor | None) -> bool:
    """Whether torch's fused kernel computes the update of this parameter (and does not merely run)."""
    # The CPU kernel walks all three tensors in memory order without a look at their strides.
    stride = param.stride()
    return (
        param.dtype in _FUSED_DTYPES
        and param.device.type in _FUSED_DEVICES
        and grad.layout is torch.strided
        and grad.dtype is param.dtype
        and grad.stride() == stride
        and (buf is None or (buf.dtype is param.dtype and buf.stride() == stride))
        and (param.is_contiguous() or torch.ops.aten.is_non_overlapping_and_dense(param))
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
    buckets: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor], list[Tensor]]] = {}
    for param, grad, buf in zip(params, grads, bufs):
        if type(grad) is not Tensor and is_dtensor(grad):
            param, grad, buf = _local(param, grad, buf)
        if fused and fused_supports(param, grad, buf):
            bucket = buckets.setdefault((param.device, param.dtype), ([], [], []))
            bucket[0].append(param)
            bucket[1].append(grad)
            if buf is not None:
                bucket[2].append(buf)
        elif grad.layout is torch.strided:
            _dense_(param, grad, buf, scalars.to(param.device), momentum, nesterov, weight_decay, maximize)
        else:
            _sparse_(param, grad, scalars.to(param.device), maximize)

    for (device, _), (bucket_params, bucket_grads, bucket_bufs) in buckets.items():
        lr, skip, grad_scale = scalars.to(device)
        torch._fused_sgd_(
            bucket_params,
            bucket_grads,
            bucket_bufs,
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


def _local(param: Any, grad: Any, buf: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    """This rank's parts of DTensors: the update is elementwise, so each rank does its own."""
    if grad.placements != param.placements:
        grad = grad.redistribute(placements=param.placements)
    return param.to_local(), grad.to_local(), None if buf is None else buf.to_local()


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
    dtype = torch.promote_types(param.dtype, torch.float32)
    old, step = param.to(dtype), grad.to(dtype)
    if scalars.grad_scale is not None:
        step = step / scalars.grad_scale
    if maximize:
        step = -step
    if weight_decay:
        step = step + weight_decay * old
    if buf is not None:
        velocity = momentum * buf.to(dtype) + step
        step = step + momentum * velocity if nesterov else velocity
        # Selected and not multiplied by 0: 0 times inf is NaN.
        buf.copy_(torch.where(skip, buf, velocity))
    param.copy_(torch.where(skip, param, old - scalars.lr * step))


def _sparse_(param: Tensor, grad: Tensor, scalars: Scalars, maximize: bool) -> None:
    """Plain SGD of the rows that ``grad`` (sparse, coalesced) touches."""
    values = grad.values() if scalars.grad_scale is None else grad.values() / scalars.grad_scale
    step = torch.where(scalars.skip.bool(), 0.0, scalars.lr * values)
    update = torch.sparse_coo_tensor(
        grad.indices(), step.to(param.dtype), grad.shape, is_coalesced=True, check_invariants=False
    )
    param.add_(update if maximize else -update)
