"""A list kept as bytes, so that loader workers share it instead of copying it."""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Sequence
from typing import Any, overload

import numpy as np


class SerializedList(Sequence[Any]):
    """A read-only sequence whose items live pickled in one uint8 array.

    Forked workers that read a list of Python objects touch each object's reference count, and so get a copy
    of every memory page over an epoch; one array has one count. (Detectron2's remedy for the same leak:
    ``detectron2/data/common.py``; https://github.com/pytorch/pytorch/issues/13246.)

    Each access makes new objects: changing them changes nothing here.
    """

    def __init__(self, items: Iterable[Any]) -> None:
        pickled = [pickle.dumps(item, protocol=pickle.HIGHEST_PROTOCOL) for item in items]
        self._ends = np.cumsum([len(data) for data in pickled], dtype=np.int64)
        self._bytes = np.frombuffer(b"".join(pickled), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self._ends)

    @property
    def nbytes(self) -> int:
        """Memory of the whole list in bytes."""
        return int(self._bytes.nbytes + self._ends.nbytes)

    @overload
    def __getitem__(self, index: int) -> Any: ...

    @overload
    def __getitem__(self, index: slice) -> list[Any]: ...

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        position = index + len(self) if index < 0 else index
        if not 0 <= position < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} items")
        start = int(self._ends[position - 1]) if position else 0
        # The bytes were pickled by this very object, in this process or the one it was forked from.
        return pickle.loads(self._bytes[start : int(self._ends[position])].data)
