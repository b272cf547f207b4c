"""Reading pickles that hold arrays, and nothing but arrays.

Detectron2's model zoo is made of pickles, and an ordinary unpickler runs whatever code a file names. This
one follows none of it; it is for files from anywhere.
"""

from __future__ import annotations

import dataclasses
import math
import os
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from zenith_det.errors import CheckpointError
from zenith_det.training.checkpoints.bounded_pickle import (
    BoundedFile,
    BoundedUnpickler,
    RefusedNameError,
    TooLargeError,
)


def read_pickle(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a model-zoo pickle: numeric numpy arrays, numbers, strings and containers of them.

    Nothing in the file is called: the few names that such files need stand for parsers of our own, and an
    array is rebuilt from its checked description. Anything else is refused by name.

    Raises:
        CheckpointError: missing, damaged, not a dictionary, or holding anything else than the above.
    """
    path = Path(path)
    try:
        if not path.is_file():
            raise CheckpointError(f"{path}: is not a file; give a model-zoo file")
        with path.open("rb") as file:
            value = _to_values(_ArrayUnpickler(BoundedFile(file, path.stat().st_size)).load(), {})
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    except TooLargeError as error:
        raise CheckpointError(f"{path}: refused: it holds {error}") from error
    except RefusedNameError as error:
        raise CheckpointError(
            f"{path}: refused, since reading it could run code: it holds {error.name!r}, not arrays alone; "
            "if you trust it, load it with pickle yourself and save its arrays with torch.save"
        ) from error
    except MemoryError as error:
        raise CheckpointError(f"{path}: does not fit into memory") from error
    except RecursionError as error:
        raise CheckpointError(f"{path}: is nested too deeply to be weights") from error
    except Exception as error:  # a damaged pickle makes the unpickler raise nearly anything
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise CheckpointError(f"{path}: is damaged, or not a model-zoo pickle ({reason})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds a {type(value).__name__}, not a dictionary of weights")
    return value


@dataclasses.dataclass(frozen=True)
class _Parser:
    """What a pickle may call."""

    function: Callable[..., Any]

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)


class _DType:
    """A numeric dtype as a pickle describes it: its code, then its byte order."""

    __slots__ = ("value",)

    def __init__(self, code: Any, align: Any = False, copy: Any = True) -> None:
        code = _text(code)
        if not re.fullmatch(r"[<>=|]?(b1|[iu][1248]|f[248]|c8|c16|\?)", code):
            raise pickle.UnpicklingError(f"an array of {code!r}, not of numbers")
        self.value = np.dtype(code)

    def __setstate__(self, state: Any) -> None:
        # (version, byte order, then what only records and sub-arrays have)
        order = _text(state[1])
        if order not in ("<", ">", "|", "="):
            raise pickle.UnpicklingError(f"byte order {order!r}")
        self.value = self.value.newbyteorder(order)


class _Array:
    """An array as a pickle describes it: made empty, then given its shape, dtype and bytes."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value: np.ndarray[Any, Any] | None = None

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, raw = state
        self.value = _array(raw, dtype, shape, "F" if fortran else "C")


def _text(value: Any) -> str:
    if isinstance(value, bytes):
        return value.decode("latin1")
    if isinstance(value, str):
        return value
    raise pickle.UnpicklingError(f"a {type(value).__name__} where a string belongs")


def _raw(value: Any) -> bytes:
    if isinstance(value, str):  # Python 2
        return value.encode("latin1")
    if isinstance(value, bytes | bytearray):
        return bytes(value)
    raise pickle.UnpicklingError(f"array data of type {type(value).__name__}")


def _array(raw: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray[Any, Any]:
    if not isinstance(dtype, _DType) or not isinstance(shape, tuple):
        raise pickle.UnpicklingError("an array without dtype or shape")
    if not all(type(size) is int and size >= 0 for size in shape) or order not in ("C", "F"):
        raise pickle.UnpicklingError("an array of an impossible shape")
    data = _raw(raw)
    if math.prod(shape) * dtype.value.itemsize != len(data):
        raise pickle.UnpicklingError(f"an array with {len(data)} bytes, which is not what its shape needs")
    flat = np.frombuffer(data, dtype=dtype.value) if data else np.zeros(0, dtype.value)
    array = flat.reshape(shape, order=order)
    # torch wants the machine's byte order, rows first, and memory that may be written.
    return np.array(array, dtype=dtype.value.newbyteorder("="), order="C")


def _scalar(dtype: Any, raw: Any) -> Any:
    return _array(raw, dtype, (), "C").item()


def _reconstruct(kind: Any, shape: Any, code: Any) -> _Array:
    # numpy makes an empty array first; its shape and bytes follow as state.
    return _Array()


def _encode(text: Any, encoding: Any) -> bytes:
    # How Python 3 writes bytes in protocol 2.
    if not isinstance(text, str) or _text(encoding) != "latin1":
        raise pickle.UnpicklingError("bytes in an unknown encoding")
    return text.encode("latin1")


def _empty_bytes(*args: Any) -> bytes:
    if args and args != (b"",):
        raise pickle.UnpicklingError("bytes from arguments")
    return b""


def _ordered(*args: Any) -> OrderedDict[Any, Any]:
    pairs = args[0] if args else []
    if not isinstance(pairs, list):
        raise pickle.UnpicklingError("an OrderedDict from something else than pairs")
    return OrderedDict((_key(pair[0]), pair[1]) for pair in pairs)


_PARSERS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _Parser(_ordered),
    ("_codecs", "encode"): _Parser(_encode),
    ("builtins", "bytes"): _Parser(_empty_bytes),
    ("__builtin__", "bytes"): _Parser(_empty_bytes),
    ("numpy", "ndarray"): None,  # only ever an argument of _reconstruct
    ("numpy", "dtype"): _Parser(_DType),
}
for _package in ("numpy.core", "numpy._core"):
    _PARSERS[f"{_package}.multiarray", "_reconstruct"] = _Parser(_reconstruct)
    _PARSERS[f"{_package}.multiarray", "scalar"] = _Parser(_scalar)
    _PARSERS[f"{_package}.numeric", "_frombuffer"] = _Parser(_array)

# Opcodes of no use to arrays in containers: classes, instances, sets, extension codes, outside data.
_REFUSED_OPCODES = (
    *("INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4", "PERSID", "BINPERSID"),
    *("NEXT_BUFFER", "READONLY_BUFFER", "EMPTY_SET", "ADDITEMS", "FROZENSET"),
)


def _key(key: Any) -> Any:
    # Hashing a tuple of tuples of tuples … that share their members takes time without bound.
    if not isinstance(key, str | bytes | int | float | None):
        raise pickle.UnpicklingError(f"a {type(key).__name__} as the key of a dictionary")
    # Larger numbers can be chosen so that their hashes are the same; no weights are called by such.
    if isinstance(key, int) and abs(key) >= 2**61 - 1:
        raise pickle.UnpicklingError("a number of more than 60 bits as the key of a dictionary")
    return key


class _ArrayUnpickler(BoundedUnpickler):
    """Python's own unpickler with most of it taken out."""

    def __init__(self, file: BoundedFile) -> None:
        super().__init__(file, encoding="latin1")  # files of Python 2 hold byte strings; it keeps each byte

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _PARSERS[module, name]
        except KeyError:
            raise RefusedNameError(f"{module}.{name}") from None

    def _refuse(self) -> None:
        raise pickle.UnpicklingError("something else than arrays in containers")

    def _reduce(self) -> None:
        args = self.stack.pop()
        function = self.stack[-1]
        if not isinstance(function, _Parser) or not isinstance(args, tuple):
            self._refuse()
        self.stack[-1] = function(*args)

    def _build(self) -> None:
        state = self.stack.pop()
        if not isinstance(self.stack[-1], _Array | _DType) or not isinstance(state, tuple):
            self._refuse()
        self.stack[-1].__setstate__(state)

    def _dict(self) -> None:
        items = self.pop_mark()
        self.append({_key(items[i]): items[i + 1] for i in range(0, len(items), 2)})

    def _set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._into_dict()[_key(key)] = value

    def _set_items(self) -> None:
        items = self.pop_mark()
        self._into_dict().update((_key(items[i]), items[i + 1]) for i in range(0, len(items), 2))

    def _into_dict(self) -> dict[Any, Any]:
        if not isinstance(self.stack[-1], dict):
            self._refuse()
        return self.stack[-1]

    def _append_item(self) -> None:
        item = self.stack.pop()
        self._into_list().append(item)

    def _append_items(self) -> None:
        items = self.pop_mark()
        self._into_list().extend(items)

    def _into_list(self) -> list[Any]:
        if not isinstance(self.stack[-1], list):
            self._refuse()
        return self.stack[-1]


_ArrayUnpickler.dispatch = {
    **BoundedUnpickler.dispatch,
    **{getattr(pickle, name)[0]: _ArrayUnpickler._refuse for name in _REFUSED_OPCODES},
    pickle.REDUCE[0]: _ArrayUnpickler._reduce,
    pickle.BUILD[0]: _ArrayUnpickler._build,
    pickle.DICT[0]: _ArrayUnpickler._dict,
    pickle.SETITEM[0]: _ArrayUnpickler._set_item,
    pickle.SETITEMS[0]: _ArrayUnpickler._set_items,
    pickle.APPEND[0]: _ArrayUnpickler._append_item,
    pickle.APPENDS[0]: _ArrayUnpickler._append_items,
}


def _to_values(value: Any, done: dict[int, Any]) -> Any:
    """Plain arrays and containers in place of what stood for them; shared parts stay shared."""
    if isinstance(value, _Array):
        if value.value is None:
            raise pickle.UnpicklingError("an array without data")
        return value.value
    if isinstance(value, _DType):
        return str(value.value)
    if isinstance(value, dict | list | tuple):
        if id(value) not in done:
            if isinstance(value, dict):
                done[id(value)] = {key: _to_values(item, done) for key, item in value.items()}
            else:
                done[id(value)] = type(value)(_to_values(item, done) for item in value)
        return done[id(value)]
    if value is None or isinstance(value, _SIMPLE):
        return value
    raise pickle.UnpicklingError(f"a {type(value).__name__}")


_SIMPLE = (np.ndarray, bool, int, float, complex, str, bytes, bytearray)
