"""The global L2 norm of many tensors, without leaving their device.

ZENITH reads every gradient once more than SGD does; this module makes that read as fast as the memory allows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors
from torch.nn import Parameter
from torch.utils._foreach_utils import _group_tensors_by_device_and_dtype

__all__ = ["global_norm"]

# A CPU tensor is read in rows of this many elements: the rows run on every core (a whole-tensor norm runs on
# one), and each is short enough for float32 to add up (whole tensors lose up to 1e-4 of the norm of a big
# layer).
_ROW = 1024
# Below this size a call costs more than the read: smaller tensors are put together first.
_SMALL = 32 * _ROW


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
    tensors = list(tensors)
    sharded: list[Tensor] = []
    if not all(type(t) is Tensor and t.layout is torch.strided for t in tensors):
        sharded = [t for t in tensors if is_dtensor(t)]
        tensors = [
            t.coalesce().values() if t.layout is torch.sparse_coo else t for t in tensors if not is_dtensor(t)
        ]
    norms = [_bucket_norms(bucket) for bucket in by_device_and_dtype(tensors)] + _sharded_norms(sharded)
    if not norms:
        return torch.zeros((), dtype=torch.float64, device="cpu")
    home = [*(n.device for n in norms if n.device.type != "cpu"), norms[0].device][0]
    dtype = accumulate_dtype(home)
    if len(norms) > 1:
        norms = [torch.cat([n.to(home, dtype, non_blocking=True) for n in norms])]
    return torch.linalg.vector_norm(norms[0], dtype=dtype)


def accumulate_dtype(device: torch.device) -> torch.dtype:
    """The type of scalars kept on ``device``: float64, or float32 where there is no float64 (Apple's MPS)."""
    return torch.float32 if device.type == "mps" else torch.float64


def by_device_and_dtype(*lists: Sequence[Tensor]) -> Iterator[Any]:
    """Splits lists of equal length by the first one's devices and types.

    Yields:
        The part of the list (of each list, if there are several) that is on one device and of one type.
    """
    if not lists[0]:
        return
    if torch.compiler.is_compiling():  # older versions can't trace torch's own
        groups: dict[Any, list[list[Tensor]]] = {}
        for row in zip(*lists):
            parts = groups.setdefault((row[0].device, row[0].dtype), [[] for _ in lists])
            for part, tensor in zip(parts, row):
                part.append(tensor)
        for parts in groups.values():
            yield parts if len(lists) > 1 else parts[0]
        return
    # torch's own, in C++: hashing hundreds of devices in Python takes longer than a GPU takes for the step.
    for parts, _ in _group_tensors_by_device_and_dtype([list(one) for one in lists]).values():
        yield parts if len(lists) > 1 else parts[0]


def is_dtensor(tensor: Tensor) -> bool:
    """Whether ``tensor`` is sharded over a device mesh."""
    if type(tensor) in (Tensor, Parameter) or not torch.distributed.is_available():
        return False  # without the slow import
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def _bucket_norms(tensors: Sequence[Tensor]) -> Tensor:
    """Norms of parts of ``tensors`` (one device, one type), a 1-d tensor: their squares add up to the
    whole."""
    if tensors[0].is_complex():
        tensors = [torch.view_as_real(tensor) for tensor in tensors]
    first = tensors[0]
    dtype = torch.promote_types(first.dtype, torch.float32)
    if not _in_rows(first.device):
        return torch.stack(torch._foreach_norm(tensors, 2, dtype=dtype))

    norms, small = [], []
    for tensor in tensors:
        size = tensor.numel()
        if size < _SMALL:
            small.append(tensor)
        elif size % _ROW == 0 and tensor.is_contiguous():  # nearly every large layer: one view
            norms.append(torch.linalg.vector_norm(tensor.view(-1, _ROW), 2, 1, dtype=dtype))
        else:
            rows, rest = _rows(_flat(tensor))
            norms.append(torch.linalg.vector_norm(rows, 2, 1, dtype=dtype))
            if rest is not None:
                small.append(rest)
    if small:
        rows, rest = _rows(_flatten_dense_tensors(small))
        norms.append(torch.linalg.vector_norm(rows, dim=1, dtype=dtype))
        if rest is not None:
            norms.append(torch.linalg.vector_norm(rest, dtype=dtype).view(1))
    return torch.cat(norms)


def _rows(flat: Tensor) -> tuple[Tensor, Tensor | None]:
    """``flat`` (n,) as rows (n // _ROW, _ROW), and what is left if anything is."""
    rest = flat.numel() % _ROW
    if not rest:
        return flat.view(-1, _ROW), None
    return flat[:-rest].view(-1, _ROW), flat[-rest:]


def _in_rows(device: torch.device) -> bool:
    return device.type == "cpu"  # elsewhere the multi-tensor kernel does it all, and better


def _flat(tensor: Tensor) -> Tensor:
    """All elements in one dimension, in memory order where that spares a copy: a norm does not mind the
    order."""
    if tensor.is_contiguous():
        return tensor.view(-1)
    if tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
        return tensor.permute(0, 2, 3, 1).view(-1)
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
