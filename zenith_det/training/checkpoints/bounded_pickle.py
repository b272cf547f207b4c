"""Python's unpickler on a leash: no more opcodes than a limit, no more bytes than the file has.

What it makes of a file, and what it refuses, is up to its subclasses.
"""

from __future__ import annotations

import pickle
import struct
from typing import Any, BinaryIO

#: Opcodes of one file. Each makes an object of 80 bytes at most, beside what it holds of the file.
MAX_OPERATIONS = 2_000_000


class RefusedNameError(pickle.UnpicklingError):
    """A name that a checkpoint has no use for.

    Attributes:
        name: dotted.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


class TooLargeError(pickle.UnpicklingError):
    """More opcodes, or larger tensors, than the file's size allows."""


class BoundedFile:
    """A file to read from that never asks for more than there is.

    Python makes room for as many bytes as it is asked for, before it looks how many there are.
    """

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file = file
        self._left = size

    def read(self, size: int) -> bytes:
        if not 0 <= size <= self._left:
            raise EOFError("the pickle ends too early")
        data = self._file.read(size)
        self._left -= len(data)
        if len(data) < size:
            raise EOFError("the pickle ends too early")
        return data

    def readline(self) -> bytes:
        line = self._file.readline()
        self._left -= len(line)
        return line


# The one written in Python: in it, each opcode is a function that can be replaced.
_PythonUnpickler: Any = pickle._Unpickler  # type: ignore[attr-defined]


class BoundedUnpickler(_PythonUnpickler):
    """As ``pickle.Unpickler``, which follows whatever a file says; a subclass replaces its opcodes.

    Args:
        file: from where it stands; several pickles after one another share one limit.
        encoding: for the byte strings of Python 2.
    """

    dispatch: dict[int, Any]

    def __init__(self, file: BoundedFile, encoding: str) -> None:
        super().__init__(file, encoding=encoding)
        self._bounded = file
        self._operations_left = MAX_OPERATIONS

    def load(self) -> Any:
        """Return the object that the next pickle of the file describes.

        Raises:
            TooLargeError: more than :data:`MAX_OPERATIONS`.
            Exception: anything, for a damaged pickle.
        """
        self.read, self.readline = self._bounded.read, self._bounded.readline
        self.memo: dict[int, Any] = {}
        self.metastack: list[Any] = []
        self.stack: list[Any] = []
        self.append = self.stack.append
        self.proto = 0
        while True:
            opcode = self.read(1)[0]
            self._operations_left -= 1
            if self._operations_left < 0:
                raise TooLargeError(f"too many objects: {MAX_OPERATIONS} opcodes at most")
            if opcode == pickle.STOP[0]:
                return self.stack.pop()
            if opcode not in self.dispatch:
                raise pickle.UnpicklingError(f"opcode {opcode}, which has no place here")
            self.dispatch[opcode](self)

    def _frame(self) -> None:
        self.read(8)  # a hint of how much to read at once

    def _bytearray(self) -> None:
        (size,) = struct.unpack("<Q", self.read(8))
        self.append(bytearray(self.read(size)))  # Python's own makes room first, and then looks for bytes


BoundedUnpickler.dispatch = {
    **_PythonUnpickler.dispatch,
    pickle.FRAME[0]: BoundedUnpickler._frame,
    pickle.BYTEARRAY8[0]: BoundedUnpickler._bytearray,
}
