"""The global L2 norm of many tensors, without leaving their device.

ZENITH reads every gradient once more than SGD does; this module makes that read as fast as the memory allows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

__all__ = ["global_norm"]

# A CPU tensor is read in rows of this many elements: the rows run on every core (a whole-tensor norm runs on
# one), and each is short enough for float32 to add up (whole tensors lose up to 1e-4 of the norm of a big
# layer).
_ROW = 4096
# Below this size a call costs more than the read: smaller tensors are put together first.
_SMALL = 8 * _ROW


def global_norm(tensors: Iterable[Tensor]) -> Tensor:
    """The L2 norm of all ``tensors`` as if they were one vector.

    Squares are added in float32 or better whatever the tensors' type, and nothing waits for the device.
    Devices and types may be mixed; complex, sparse (COO; coalescing one on CUDA synchronises inside torch)
    and channels-last tensors count by their values. For a ``DTensor`` (FSDP2, tensor parallelism) it is the
    norm of the whole tensor: all ranks must call together, and one scalar per kind of sharding is
    communicated.

    Args:
        tensors: any number of tensors of any shapes; not modified.

    Returns:
        A 0-dim float64 tensor (float32 on a device without float64) on the first accelerator among the
        tensors' devices, else on the CPU; 0 for no tensors; inf or NaN if an element is, or if a square
        overflows float32.
    """
    buckets: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    sharded: list[Tensor] = []
    for tensor in tensors:
        if type(tensor) is not Tensor and is_dtensor(tensor):
            sharded.append(tensor)
            continue
        values = _real_values(tensor)
        buckets.setdefault((values.device, values.dtype), []).append(values)

    norms = [_bucket_norms(bucket) for bucket in buckets.values()] + _sharded_norms(sharded)
    if not norms:
        return torch.zeros((), dtype=torch.float64)
    home = next((n.device for n in norms if n.device.type != "cpu"), norms[0].device)
    together = torch.cat([n.to(home, accumulate_dtype(home), non_blocking=True) for n in norms])
    return torch.linalg.vector_norm(together)


def accumulate_dtype(device: torch.device) -> torch.dtype:
    """The type of scalars kept on ``device``: float64, or float32 where there is no float64 (Apple's MPS)."""
    return torch.float32 if device.type == "mps" else torch.float64


def is_dtensor(tensor: Tensor) -> bool:
    """Whether ``tensor`` is sharded over a device mesh; imports ``torch.distributed`` only for tensor
    subclasses."""
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def _real_values(tensor: Tensor) -> Tensor:
    if tensor.layout is torch.sparse_coo:
        tensor = tensor.coalesce().values()
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _bucket_norms(tensors: Sequence[Tensor]) -> Tensor:
    """Norms of parts of ``tensors`` (one device, one real type), a 1-d tensor: their squares add up to the
    whole."""
    first = tensors[0]
    dtype = torch.promote_types(first.dtype, torch.float32)
    if first.device.type != "cpu":
        return torch.stack(torch._foreach_norm(tensors, 2, dtype=dtype))

    norms, small = [], []
    for tensor in tensors:
        flat = _flat(tensor)
        size = flat.numel()
        in_rows = size - size % _ROW if size >= _SMALL else 0
        if in_rows:
            norms.append(torch.linalg.vector_norm(flat[:in_rows].view(-1, _ROW), dim=1, dtype=dtype))
        if in_rows < size:
            small.append(flat[in_rows:])
    if small:
        norms.append(torch.linalg.vector_norm(torch.cat(small), dtype=dtype).view(1))
    return torch.cat(norms) if norms else first.new_zeros(1, dtype=dtype)


def _flat(tensor: Tensor) -> Tensor:
    """All elements in one dimension, in memory order where that spares a copy: a norm does not mind the
    order."""
    if tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
        tensor = tensor.permute(0, 2, 3, 1)
    return tensor.reshape(-1)


def _sharded_norms(tensors: Sequence[Tensor]) -> list[Tensor]:
    """For DTensors, one norm per kind of sharding, the same on every rank (1-element tensors)."""
    if not tensors:
        return []
    from torch.distributed.tensor import DTensor, Partial, Replicate

    shards: dict[tuple[object, object], list[Tensor]] = {}
    for tensor in tensors:
        assert isinstance(tensor, DTensor)
        if any(placement.is_partial() for placement in tensor.placements):
            # The square of a sum is not the sum of the squares: the sum has to be taken first.
            whole = [Replicate() if p.is_partial() else p for p in tensor.placements]
            tensor = tensor.redistribute(placements=whole)
        shards.setdefault((tensor.device_mesh, tensor.placements), []).append(tensor)

    norms = []
    for same in shards.values():
        mesh, placements = same[0].device_mesh, same[0].placements  # type: ignore[attr-defined]
        local = global_norm(tensor.to_local() for tensor in same)  # type: ignore[attr-defined]
        # Along a mesh dimension the ranks hold either the same values or different ones, which add up.
        adding = [Replicate() if p.is_replicate() else Partial() for p in placements]
        square = DTensor.from_local(local.square(), mesh, adding, run_check=False).full_tensor()
        norms.append(square.sqrt().view(1))
    return norms
