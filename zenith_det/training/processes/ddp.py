"""DistributedDataParallel whose sums don't depend on when a process started, and the model inside."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def data_parallel(model: nn.Module, device_index: int | None) -> DistributedDataParallel:
    """Wrap a model whose buffers (frozen batch norms) are the same everywhere and stay so.

    Args:
        model: on its device.
        device_index: of its CUDA device; ``None`` on the CPU.
    """
    # torch 2.14 has a new name for it, and warns of the old one.
    names = inspect.signature(DistributedDataParallel.__init__).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
    device_ids = None if device_index is None else [device_index]
    return DistributedDataParallel(model, device_ids=device_ids, **{name: False})


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel."""
    inner: nn.Module = model.module if isinstance(model, DistributedDataParallel) else model
    return inner


def settle_buckets(model: nn.Module) -> None:
    """Let DDP sum gradients in the first iteration of a process as in all later ones.

    DDP puts gradients into buckets by the order of the parameters, and after its first iteration anew, by the
    order in which gradients were ready. Where in a bucket a gradient lies decides in which order three or more
    processes add it up, and so its last bits: a resumed run would differ from the whole one by its first
    iteration. Here one backward pass of a loss that touches nothing but the parameters comes before, in an
    order that is always the same. (https://docs.pytorch.org/docs/stable/notes/ddp.html#internal-design)

    To be called by all processes, before training and with no gradients pending; nothing but the buckets
    changes. Of no effect on a model that is not wrapped, and for two processes, whose sums have one order.
    """
    if not isinstance(model, DistributedDataParallel) or torch.distributed.get_world_size() < 3:
        return
    inner = model.module

    def nothing(start: Tensor) -> Tensor:
        # Created first, ready last: gradients are then ready from the heads to the stem, as in training.
        return sum((p.sum() * 0 for p in inner.parameters() if p.requires_grad), start)

    forward = inner.forward
    inner.forward = nothing
    try:
        model(torch.zeros(())).backward()
    finally:
        inner.forward = forward
    model.zero_grad(set_to_none=True)
