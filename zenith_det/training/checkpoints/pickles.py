"""Pickles, followed without making anything that they name: whoever made the file, nothing in it runs.

:func:`check_pickle` looks at a checkpoint's before PyTorch reads it, :func:`read_arrays` reads Detectron2's model zoo.
"""

from __future__ import annotations

import math
import pickle
import re
import struct
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

import numpy as np
import torch

# The one written in Python keeps its memo in a dictionary; C's makes room up to the largest index in the file.
_PythonUnpickler: Any = pickle._Unpickler  # type: ignore[attr-defined]


class _Unpickler(_PythonUnpickler):
    def load_bytearray8(self) -> None:
        # Python's own makes room for as many bytes as the file says before it looks for them.
        (size,) = struct.unpack("<Q", self.read(8))
        data = self.read(size)
        if len(data) != size:
            raise EOFError(f"{size} bytes, of which the file has {len(data)}")
        self.append(bytearray(data))

    dispatch = {**_PythonUnpickler.dispatch, pickle.BYTEARRAY8[0]: load_bytearray8}


class RefusedNameError(pickle.UnpicklingError):
    """A name that weights have no use for, dotted: the error's text."""


# --- checkpoints -------------------------------------------------------------------------------------------


def check_pickle(file: BinaryIO, records: Mapping[str, int] | None = None) -> Any:
    """Follow a pickle of torch's, to refuse what ``weights_only`` lets corrupt memory before PyTorch 2.10
    (CVE-2026-24747): items set on what is no dictionary or list, data that is shorter than its storage.

    Args:
        file: from where it stands.
        records: the sizes in bytes of the archive's ``data/<key>`` entries, by key; ``None``: no archive, in which
            PyTorch compares the sizes itself.

    Returns:
        What it holds, with nothing in it that the file names.

    Raises:
        Exception: any, for what is refused or damaged.
    """
    return _Checker(file, records).load()


class _Inert:
    """Stands for what a checkpoint names and makes: it takes any call and any state, and has no items."""

    def __init__(self, name: str = "") -> None:
        self.name = name

    def __call__(self, *args: Any) -> _Inert:
        return _Inert()

    def __setstate__(self, state: Any) -> None:
        pass


class _Checker(_Unpickler):
    def __init__(self, file: BinaryIO, records: Mapping[str, int] | None) -> None:
        super().__init__(file, encoding="latin1")
        self._records = records

    def find_class(self, module: str, name: str) -> Any:
        return OrderedDict if (module, name) == ("collections", "OrderedDict") else _Inert(name)

    def persistent_load(self, pid: Any) -> _Inert:
        _, kind, key, _, count = pid[:5]
        size = count * getattr(getattr(torch, kind.name, None), "dtype", torch.uint8).itemsize
        if self._records is not None and size > self._records.get(key, -1):
            raise pickle.UnpicklingError(
                f"a tensor's data {key!r} of {size} bytes, which the file doesn't hold"
            )
        return _Inert()


# --- model zoo ---------------------------------------------------------------------------------------------


def read_arrays(file: BinaryIO) -> Any:
    """Read a pickle of numeric numpy arrays, numbers, strings and containers of them, as of any numpy and Python.

    The few names that such a file needs stand for parsers of our own, and an array is rebuilt from its checked
    description.

    Raises:
        RefusedNameError: it holds anything else.
        Exception: any, for a damaged pickle.
    """
    return _to_values(_ArrayUnpickler(file, encoding="latin1").load(), {})  # it keeps each byte of Python 2's


class _ArrayUnpickler(_Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        known = f"{module.replace('numpy._core', 'numpy.core').replace('__builtin__', 'builtins')}.{name}"
        if known not in _PARSERS:
            raise RefusedNameError(f"{module}.{name}")
        return _Parser(_PARSERS[known])


class _Parser:
    """What a pickle may call; nothing that it could change."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("attributes for a function")


class _DType:
    """A numeric dtype as a pickle describes it: its code, then its byte order."""

    __slots__ = ("value",)

    def __init__(self, code: Any, align: Any = False, copy: Any = True) -> None:
        code = _raw(code).decode("latin1")
        if not re.fullmatch(r"[<>=|]?(b1|[iu][1248]|f[248]|c8|c16|\?)", code):
            raise pickle.UnpicklingError(f"an array of {code!r}, not of numbers")
        self.value = np.dtype(code)

    def __setstate__(self, state: Any) -> None:
        # (version, byte order, then what only records and sub-arrays have)
        self.value = self.value.newbyteorder(_raw(state[1]).decode("latin1"))


class _Array:
    """An array as a pickle describes it: made empty, then given its shape, dtype and bytes."""

    __slots__ = ("value",)

    def __init__(self, *empty: Any) -> None:
        self.value: np.ndarray[Any, Any] | None = None

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, raw = state
        self.value = _array(raw, dtype, shape, "F" if fortran else "C")


def _array(raw: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray[Any, Any]:
    data, kind = _raw(raw), dtype.value
    if math.prod(shape) * kind.itemsize != len(data):
        raise pickle.UnpicklingError(f"an array with {len(data)} bytes, which is not what its shape needs")
    # torch wants the machine's byte order, rows first, and memory that may be written.
    array = np.frombuffer(data, dtype=kind).reshape(shape, order=order)
    return np.array(array, dtype=kind.newbyteorder("="), order="C")


def _from_buffer(raw: Any, dtype: Any, shape: Any, order: Any) -> _Array:
    made = _Array()
    made.value = _array(raw, dtype, shape, order)
    return made


def _raw(value: Any) -> bytes:
    return value.encode("latin1") if isinstance(value, str) else bytes(memoryview(value))


_PARSERS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": dict,
    "_codecs.encode": lambda text, encoding: _raw(text),  # how Python 3 writes bytes in protocol 2: as latin1
    "builtins.bytes": lambda empty=b"": _raw(empty),
    "numpy.ndarray": lambda: None,  # only ever an argument of _reconstruct
    "numpy.dtype": _DType,
    "numpy.core.multiarray._reconstruct": _Array,
    "numpy.core.multiarray.scalar": lambda dtype, raw: _array(raw, dtype, (), "C").item(),
    "numpy.core.numeric._frombuffer": _from_buffer,
}


def _to_values(value: Any, done: dict[int, Any]) -> Any:
    """Plain arrays and containers in place of what stood for them; shared parts stay shared."""
    if isinstance(value, _Array | _DType):
        return value.value
    if isinstance(value, dict | list | tuple):
        if id(value) not in done:
            if isinstance(value, dict):
                done[id(value)] = {key: _to_values(item, done) for key, item in value.items()}
            else:
                done[id(value)] = type(value)(_to_values(item, done) for item in value)
        return done[id(value)]
    if isinstance(value, _Parser):
        raise RefusedNameError("a function")
    return value
