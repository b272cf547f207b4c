"""What the updates of ZENITH and ZENITHAdamW share: their scalars, and what torch's fused kernels can do."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Scalars", "fused_supports", "in_float32", "local"]

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


def local(param: Any, grad: Any, *state: Any) -> tuple[Any, ...]:
    """This rank's parts of DTensors: the update is elementwise, so each rank does its own."""
    if grad.placements != param.placements:
        grad = grad.redistribute(placements=param.placements)
    return tuple(None if part is None else part.to_local() for part in (param, grad, *state))


def in_float32(param: Tensor, grad: Tensor, scalars: Scalars, maximize: bool) -> tuple[Tensor, Tensor]:
    """A parameter, and its unscaled gradient in the direction of descent; in float32 or better."""
    dtype = torch.promote_types(param.dtype, torch.float32)
    old, step = param.to(dtype), grad.to(dtype)
    if scalars.grad_scale is not None:
        step = step / scalars.grad_scale
    return old, -step if maximize else step
