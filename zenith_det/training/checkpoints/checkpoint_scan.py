"""A dry run of a checkpoint's pickle before PyTorch reads it: what would it make, and how large is it?

``torch.load(weights_only=True)`` runs no code, but it calls what its list allows with whatever numbers the file
holds: ``bytearray(10**12)``, a tensor of no storage, a codec that takes quadratic time. Here the same opcodes are
followed with stand-ins for tensors, and everything is refused that a checkpoint doesn't need, or that is larger
than the file it comes from.
"""

from __future__ import annotations

import dataclasses
import math
import pickle
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

import torch

from zenith_det.training.checkpoints.bounded_pickle import (
    BoundedFile,
    BoundedUnpickler,
    RefusedNameError,
    TooLargeError,
)

#: Keys of dictionaries whose hashes anyone can choose, so that they collide: large numbers, tuples.
MAX_CHOSEN_KEYS = 10_000
_HASH_MODULUS = 2**61 - 1  # whole numbers below are their own hash
_MAX_DIMENSIONS = 64  # torch's own limit
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C

_STORAGES = {
    **dict.fromkeys(("DoubleStorage", "LongStorage", "ComplexFloatStorage"), 8),
    **dict.fromkeys(("FloatStorage", "IntStorage"), 4),
    **dict.fromkeys(("HalfStorage", "BFloat16Storage", "ShortStorage"), 2),
    **dict.fromkeys(("CharStorage", "ByteStorage", "BoolStorage"), 1),
    "ComplexDoubleStorage": 16,
}


class KeyCheck:
    """Which keys a dictionary may have: those that can't be made to collide, and a few of those that can."""

    def __init__(self) -> None:
        self._chosen = 0

    def __call__(self, key: Any) -> Any:
        """Return ``key``.

        Raises:
            pickle.UnpicklingError: not a key for a checkpoint's dictionaries.
        """
        # Python draws the hashes of texts anew in each process.
        if key is None or isinstance(key, str | bytes | float):
            return key
        if isinstance(key, int) and abs(key) < _HASH_MODULUS:
            return key
        # Of tuples of tuples of tuples that share their parts, the hash alone takes time without bound.
        flat = isinstance(key, tuple) and all(
            isinstance(part, str | bytes | int | float | None) for part in key
        )
        if not (flat or isinstance(key, int | _Named | _Other)):
            raise pickle.UnpicklingError(f"a {type(key).__name__} as the key of a dictionary")
        self._chosen += 1
        if self._chosen > MAX_CHOSEN_KEYS:
            raise TooLargeError(f"more than {MAX_CHOSEN_KEYS} keys that are tuples or large numbers")
        return key


@dataclasses.dataclass(frozen=True)
class _Named:
    """Something known by its name: a function, a dtype, a kind of storage."""

    name: str


@dataclasses.dataclass(frozen=True)
class _Storage:
    key: str
    size: int  # bytes
    item: int  # bytes per element


class _Tensor:
    """Stands for a tensor; there is nothing in it."""


class _Other:
    """Stands for bytes, a complex number, a device, a set: nothing that more could be made of."""


def scan_zip_pickle(file: BinaryIO, size: int, records: Mapping[str, int], file_size: int) -> Any:
    """Follow ``data.pkl`` of torch's zip format.

    Args:
        file: ``data.pkl``, open.
        size: its size in bytes.
        records: the sizes of the archive's ``data/<key>`` entries, by key.
        file_size: of the whole archive: no tensor may be larger.

    Returns:
        What it holds, with stand-ins for tensors.

    Raises:
        RefusedNameError, TooLargeError: what reading it would not be safe for.
        Exception: anything, for a damaged pickle.
    """
    return _Scanner(BoundedFile(file, size), records, file_size).load()


def scan_legacy_file(file: BinaryIO, file_size: int) -> Any:
    """Follow a file of torch's format before 1.6: five pickles, then the storages. As the function above."""
    scanner = _Scanner(BoundedFile(file, file_size), None, file_size)
    if scanner.load() != _LEGACY_MAGIC:
        raise pickle.UnpicklingError("it doesn't begin as a checkpoint does")
    for _ in ("protocol version", "system"):
        scanner.load()
    value = scanner.load()
    scanner.load()  # the keys of the storages that follow
    return value


class _Scanner(BoundedUnpickler):
    """An unpickler with torch's opcodes alone, and stand-ins for what they would make."""

    def __init__(self, file: BoundedFile, records: Mapping[str, int] | None, file_size: int) -> None:
        super().__init__(file, encoding="bytes")
        self._records, self._limit = records, file_size
        self._check_key = KeyCheck()
        self._legacy: dict[str, int] = {}  # bytes of each storage seen, and of all
        self._legacy_size = 0

    # ------------------------------------------------------------------------------------------ names

    def find_class(self, module: str, name: str) -> _Named:
        path = f"{module.replace('__builtin__', 'builtins')}.{name}"
        if path in _CALLS or path == "torch.storage.UntypedStorage":
            return _Named(path)
        if module == "torch" and (name in _STORAGES or isinstance(getattr(torch, name, None), torch.dtype)):
            return _Named(path)
        raise RefusedNameError(path)

    def _global(self) -> None:
        module, name = self.readline()[:-1].decode("utf-8"), self.readline()[:-1].decode("utf-8")
        self.append(self.find_class(module, name))

    def _reduce(self) -> None:
        args, function = self.stack.pop(), self.stack[-1]
        if not isinstance(function, _Named) or not isinstance(args, tuple):
            raise pickle.UnpicklingError("a call of what is no function")
        if function.name not in _CALLS:
            raise RefusedNameError(function.name)
        try:
            self.stack[-1] = _CALLS[function.name](self, *args)
        except TypeError:  # another number of arguments
            raise RefusedNameError(f"{function.name} with {len(args)} arguments") from None

    def _new_object(self) -> None:
        self.stack.pop()
        made = self.stack[-1]
        raise RefusedNameError(made.name if isinstance(made, _Named) else type(made).__name__)

    def _build(self) -> None:
        state, made = self.stack.pop(), self.stack[-1]
        # A state dict's version numbers. Another attribute could hide a method.
        if type(made) is not OrderedDict or not isinstance(state, dict) or set(state) != {"_metadata"}:
            raise pickle.UnpicklingError("an object with attributes")

    # ------------------------------------------------------------------------------------------ containers

    def _set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._dictionary()[self._check_key(key)] = value

    def _set_items(self) -> None:
        items = self.pop_mark()
        dictionary = self._dictionary()
        for index in range(0, len(items), 2):
            dictionary[self._check_key(items[index])] = items[index + 1]

    def _append_item(self) -> None:
        item = self.stack.pop()
        self._list().append(item)

    def _append_items(self) -> None:
        items = self.pop_mark()
        self._list().extend(items)

    def _dictionary(self) -> dict[Any, Any]:
        if not isinstance(self.stack[-1], dict):
            raise pickle.UnpicklingError(f"a {type(self.stack[-1]).__name__} where a dictionary belongs")
        return self.stack[-1]

    def _list(self) -> list[Any]:
        if type(self.stack[-1]) is not list:
            raise pickle.UnpicklingError(f"a {type(self.stack[-1]).__name__} where a list belongs")
        return self.stack[-1]

    def ordered_dict(self, pairs: Any = ()) -> OrderedDict[Any, Any]:
        _expect(isinstance(pairs, list | tuple), "an OrderedDict of something else than pairs")
        return OrderedDict((self._check_key(key), value) for key, value in pairs)

    def counter(self, counts: Any = None) -> dict[Any, Any]:
        _expect(counts is None or type(counts) is dict, "a Counter of something else than counts")
        return dict(counts or {})

    def set(self, items: Any = ()) -> _Other:
        _expect(isinstance(items, list | tuple), "a set of something else than a list")
        for item in items:
            self._check_key(item)
        return _Other()

    # ------------------------------------------------------------------------------------------ values

    def complex(self, real: Any, imaginary: Any = 0.0) -> _Other:
        _expect(isinstance(real, int | float) and isinstance(imaginary, int | float), "a complex number")
        return _Other()

    def encoded(self, text: Any, encoding: Any) -> bytes:
        # How Python 3 writes bytes in protocol 2. Other codecs take quadratic time.
        _expect(
            isinstance(text, str) and _text(encoding) in ("latin1", "latin-1"), "bytes in another encoding"
        )
        return b""

    def bytearray(self, *args: Any) -> _Other:
        # Of a number it would be so many zeros.
        numberless = not args or isinstance(args[0], bytes) or (len(args) == 2 and isinstance(args[0], str))
        _expect(numberless and (len(args) < 2 or _text(args[1]) in ("latin1", "latin-1")), "a bytearray")
        return _Other()

    def size(self, dimensions: Any = ()) -> tuple[int, ...]:
        return _dimensions(dimensions)

    def device(self, kind: Any, index: Any = 0) -> _Other:
        _expect(isinstance(kind, str) and isinstance(index, int), "a device")
        return _Other()

    # ------------------------------------------------------------------------------------------ tensors

    def persistent_load(self, pid: Any) -> _Storage:
        expected = 5 if self._records is not None else 6
        if not isinstance(pid, tuple) or len(pid) != expected or _text(pid[0]) != "storage":
            raise pickle.UnpicklingError("outside data that is no storage")
        kind, key, _, count = pid[1:5]
        key = _text(key)
        if not isinstance(kind, _Named) or type(count) is not int or count < 0:
            raise pickle.UnpicklingError("a storage without kind or size")
        item = 1 if kind.name == "torch.storage.UntypedStorage" else _STORAGES.get(kind.name[len("torch.") :])
        if item is None:
            raise RefusedNameError(kind.name)
        size = count * item
        if self._records is not None:
            if size > self._records.get(key, -1):
                raise TooLargeError(
                    f"a tensor's data {key[:80]!r} of {size} bytes, which the file doesn't hold"
                )
        else:
            self._legacy_size += max(0, size - self._legacy.get(key, 0))
            self._legacy[key] = max(size, self._legacy.get(key, 0))
            if self._legacy_size > self._limit:
                raise TooLargeError(f"data of {size} bytes, which the file doesn't hold")
        return _Storage(key, size, item)

    def tensor(self, storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> _Tensor:
        _expect(
            isinstance(storage, _Storage) and type(offset) is int and offset >= 0, "a tensor without data"
        )
        shape, strides = _dimensions(size), _dimensions(stride)
        _expect(len(shape) == len(strides), "a tensor with another number of strides than of sizes")
        item = storage.item
        if len(rest) > 2 and isinstance(rest[2], _Named):  # _rebuild_tensor_v3: bytes, and a dtype
            dtype = getattr(torch, rest[2].name[len("torch.") :], None)
            if not isinstance(dtype, torch.dtype):
                raise pickle.UnpicklingError("a tensor without dtype")
            item = dtype.itemsize
        elements = math.prod(shape)
        # A stride of 0 repeats what is there: 4 bytes can stand for as many terabytes.
        if elements * item > max(storage.size, self._limit):
            raise TooLargeError(f"a tensor of {elements} elements, in a file of {self._limit} bytes")
        last = offset + sum((n - 1) * step for n, step in zip(shape, strides)) if elements else 0
        if elements and (last + 1) * item > storage.size:
            raise TooLargeError("a tensor that reaches beyond its data")
        if rest:
            _expect(isinstance(rest[0], bool) and not (len(rest) > 1 and rest[1]), "a tensor with hooks")
        return _Tensor()

    def parameter(self, data: Any, requires_grad: Any, hooks: Any) -> _Tensor:
        _expect(isinstance(data, _Tensor) and not hooks, "a parameter without data, or with hooks")
        return _Tensor()


def _expect(condition: bool, otherwise: str) -> None:
    if not condition:
        raise pickle.UnpicklingError(f"{otherwise}, which no checkpoint needs")


def _text(value: Any) -> str:
    if isinstance(value, bytes):
        return value.decode("latin1")
    if not isinstance(value, str):
        raise pickle.UnpicklingError(f"a {type(value).__name__} where a text belongs")
    return value


def _dimensions(value: Any) -> tuple[int, ...]:
    _expect(
        isinstance(value, list | tuple)
        and len(value) <= _MAX_DIMENSIONS
        and all(type(n) is int and 0 <= n < 2**63 for n in value),
        "an impossible shape",
    )
    return tuple(value)


# What a checkpoint may call, all of it followed here.
_CALLS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _Scanner.ordered_dict,
    "collections.Counter": _Scanner.counter,  # the milestones of torch's MultiStepLR
    "builtins.set": _Scanner.set,
    "builtins.complex": _Scanner.complex,
    "builtins.bytearray": _Scanner.bytearray,
    "_codecs.encode": _Scanner.encoded,
    "torch.Size": _Scanner.size,
    "torch.device": _Scanner.device,
    "torch._utils._rebuild_tensor": _Scanner.tensor,
    "torch._utils._rebuild_tensor_v2": _Scanner.tensor,
    "torch._utils._rebuild_tensor_v3": _Scanner.tensor,
    "torch._utils._rebuild_parameter": _Scanner.parameter,
}

# The opcodes that torch's reader knows (torch/_weights_only_unpickler.py), but for objects of classes.
_Scanner.dispatch = {
    **{
        getattr(pickle, name)[0]: BoundedUnpickler.dispatch[getattr(pickle, name)[0]]
        for name in (
            *(
                "PROTO",
                "MARK",
                "TUPLE",
                "TUPLE1",
                "TUPLE2",
                "TUPLE3",
                "EMPTY_TUPLE",
                "EMPTY_LIST",
                "EMPTY_DICT",
            ),
            *(
                "NONE",
                "NEWTRUE",
                "NEWFALSE",
                "BININT",
                "BININT1",
                "BININT2",
                "LONG1",
                "BINFLOAT",
                "BINUNICODE",
            ),
            *("SHORT_BINSTRING", "BINGET", "LONG_BINGET", "BINPUT", "LONG_BINPUT", "BINPERSID"),
        )
    },
    pickle.GLOBAL[0]: _Scanner._global,
    pickle.REDUCE[0]: _Scanner._reduce,
    pickle.NEWOBJ[0]: _Scanner._new_object,
    pickle.BUILD[0]: _Scanner._build,
    pickle.SETITEM[0]: _Scanner._set_item,
    pickle.SETITEMS[0]: _Scanner._set_items,
    pickle.APPEND[0]: _Scanner._append_item,
    pickle.APPENDS[0]: _Scanner._append_items,
}
