"""The next batch on its way to the device while it works on this one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from zenith_det.engines.engine import Batch


@runtime_checkable
class Transferable(Protocol):
    """What a sample may hold beside tensors; anything else stays on the host."""

    def to(self, device: torch.device) -> Any:
        """A copy with its tensors on ``device``."""

    def tensors(self) -> list[Tensor]:
        """Those tensors."""


class Prefetcher(Iterator[Batch]):
    """Batches with their tensors on a CUDA device; on any other device, batches as they come.

    :meth:`prefetch`, called when the kernels of an iteration are queued, takes the next batch from the loader
    and copies it on a stream of its own: the host waits for the loader, and the copy runs, while the device is
    busy. The source's tensors should be in pinned memory, or the copies are not asynchronous. On any device it so
    shows at the end of an iteration, where the model can be saved, that there is no next batch.

    The source may so be one batch ahead of the training. A resumed run is not told by it: it counts the
    iterations done.

    Args:
        batches: lists of samples whose tensors are on the host; ended or failed, it does so here at the batch
            where it did.
        device: of the model.

    Attributes:
        waited: seconds that the last batch took to come from the source, all told.
        failure: why :meth:`prefetch` got no batch; the next one that is asked for raises it.
    """

    def __init__(self, batches: Iterator[Batch], device: torch.device) -> None:
        self.waited = 0.0
        self._batches = batches
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._ahead: Batch | None = None
        self.failure: Exception | None = None
        self._waited_ahead = 0.0

    def __next__(self) -> Batch:
        start = time.perf_counter()
        if self.failure is not None:
            failure, self.failure = self.failure, None
            raise failure
        batch, self._ahead = self._ahead, None
        if batch is None:
            batch = self._on_device(next(self._batches))
        if self._stream is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_stream(self._stream)
            # The allocator would otherwise give the memory, which belongs to the other stream, to the next copy
            # as soon as Python lets go of the batch, with kernels of this one still to come.
            _each_tensor(batch, lambda tensor: tensor.record_stream(stream) if tensor.is_cuda else None)
        self.waited = self._waited_ahead + time.perf_counter() - start
        self._waited_ahead = 0.0
        return batch

    def prefetch(self) -> None:
        """Take the next batch and start copying it, unless that has been done."""
        if self._ahead is not None or self.failure is not None:
            return
        start = time.perf_counter()
        try:
            self._ahead = self._on_device(next(self._batches))
        except Exception as error:  # it belongs to the next iteration
            self.failure = error
        self._waited_ahead = time.perf_counter() - start

    def _on_device(self, batch: Batch) -> Batch:
        if self._stream is None:
            return batch
        with torch.cuda.stream(self._stream):
            return [{key: self._moved(value) for key, value in sample.items()} for sample in batch]

    def _moved(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(self._device, non_blocking=True)
        return value.to(self._device) if isinstance(value, Transferable) else value


def _each_tensor(batch: Batch, act: Callable[[Tensor], object]) -> None:
    for sample in batch:
        for value in sample.values():
            if isinstance(value, Tensor):
                act(value)
            elif isinstance(value, Transferable):
                for tensor in value.tensors():
                    act(tensor)
