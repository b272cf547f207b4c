"""``MODEL.WEIGHTS``: reading weights from wherever they are, and putting them into a model.

A ``.pth`` file is read with ``weights_only``; a Detectron2 model-zoo ``.pkl`` by an unpickler that knows
numeric numpy arrays and containers and nothing else. Neither runs code, whoever made the file.
"""

from __future__ import annotations

import codecs
import dataclasses
import io
import logging
import math
import os
import pickle
import pickletools
import re
import socket
import urllib.error
import urllib.request
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
import torch
from torch import nn

from zenith_det.errors import CheckpointError
from zenith_det.training.checkpoint import load_checkpoint

logger = logging.getLogger(__name__)

# What a `detectron2://` name stands for (detectron2/utils/file_io.py).
DETECTRON2_URL = "https://dl.fbaipublicfiles.com/detectron2/"
FETCH_TIMEOUT_SECONDS = 15.0
# Wrappers put their name before a tensor's: DataParallel/DDP, torch.compile (also inside a model).
_COMPILED = re.compile(r"(^|\.)_orig_mod\.")
_WRAPPED = "module."


def read_weights(name: str, *, timeout: float = FETCH_TIMEOUT_SECONDS) -> dict[str, torch.Tensor]:
    """The tensors that ``MODEL.WEIGHTS`` names.

    Args:
        name: a ``.pth`` file (a checkpoint with a ``"model"`` entry, or a plain state dict), a model-zoo
            ``.pkl``, or a ``detectron2://…`` or ``https://…`` name of either, which is fetched once into
            torch's hub cache.
        timeout: seconds to wait for a server.

    Returns:
        Tensors on the CPU by name, without the prefixes of DDP and ``torch.compile``.

    Raises:
        CheckpointError: missing, damaged, refused (it would run code), not fetchable, or without tensors.
    """
    path = locate_weights(name, timeout=timeout)
    data: Any = read_pickle(path) if path.suffix == ".pkl" else load_checkpoint(path)
    for key in ("model", "state_dict", "blobs"):
        if isinstance(data.get(key), Mapping):
            data = data[key]
            break
    tensors = {
        str(key): torch.from_numpy(value) if isinstance(value, np.ndarray) else value
        for key, value in data.items()
        # Detectron1's files hold the optimizer's buffers beside the weights.
        if isinstance(value, torch.Tensor | np.ndarray) and not str(key).endswith("_momentum")
    }
    if not tensors:
        raise CheckpointError(f"{path}: holds no weights; give a checkpoint with a 'model' entry or a state dict")
    return strip_prefixes(tensors, str(path))


def locate_weights(name: str, *, timeout: float = FETCH_TIMEOUT_SECONDS) -> Path:
    """The local file that ``name`` stands for, fetched if it is a URL not fetched before; see :func:`read_weights`."""
    scheme = urlsplit(name).scheme if "://" in name else ""
    if scheme in ("", "file"):
        path = Path(unquote(urlsplit(name).path) if scheme else name).expanduser()
        if not path.exists():
            raise CheckpointError(f"MODEL.WEIGHTS: {name!r} does not exist (looked for {path.absolute()})")
        return path
    if scheme == "detectron2":
        relative = name.removeprefix("detectron2://").split("?")[0]
        url = DETECTRON2_URL + relative
        # Where Detectron2 itself keeps what it has fetched (iopath), for people who use both.
        iopath = Path(os.environ.get("FVCORE_CACHE", "~/.torch/iopath_cache")).expanduser()
        known = [iopath / "detectron2" / _safe_relative(relative, name)]
    elif scheme in ("https", "http"):
        url = name.split("?")[0]
        known = []
    else:
        raise CheckpointError(
            f"MODEL.WEIGHTS: {name!r}: cannot read {scheme}:// names; give a file, detectron2://… or https://…"
        )
    parts = urlsplit(url)
    cached = Path(torch.hub.get_dir()) / "checkpoints" / (parts.hostname or "") / _safe_relative(parts.path, name)
    for path in [cached, *known]:
        if path.is_file():
            return path
    _fetch(name, url, cached, timeout)
    return cached


def strip_prefixes(tensors: Mapping[str, torch.Tensor], source: str = "weights") -> dict[str, torch.Tensor]:
    """Names as the plain model has them: without DDP's ``module.`` and ``torch.compile``'s ``_orig_mod.``.

    Raises:
        CheckpointError: two tensors would get the same name.
    """
    names = _plain_names(tensors)
    if len(set(names.values())) < len(names):
        raise CheckpointError(f"{source}: two tensors have the same name without 'module.' and '_orig_mod.'")
    return {names[name]: tensor for name, tensor in tensors.items()}


def _plain_names(names: Mapping[str, Any]) -> dict[str, str]:
    plain = {name: name for name in names}
    while True:
        stripped = {name: _COMPILED.sub(r"\1", short) for name, short in plain.items()}
        if stripped and all(short.startswith(_WRAPPED) for short in stripped.values()):
            stripped = {name: short.removeprefix(_WRAPPED) for name, short in stripped.items()}
        if stripped == plain:
            return plain
        plain = stripped


@dataclasses.dataclass(frozen=True)
class LoadReport:
    """What happened to each tensor when weights were put into a model.

    Attributes:
        source: where the weights came from.
        matched: names of tensors that were loaded.
        missing: in the model, not in the file: they keep their initial values.
        unexpected: in the file, not in the model.
        mismatched: in both with another shape: name -> (shape in the file, shape in the model); not loaded.
    """

    source: str
    matched: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]

    @property
    def total(self) -> int:
        """Tensors of the model."""
        return len(self.matched) + len(self.missing) + len(self.mismatched)

    def summary(self) -> str:
        """One line: ``weights: loaded 295/295 tensors from …``."""
        text = f"weights: loaded {len(self.matched)}/{self.total} tensors from {self.source}"
        if self.mismatched:
            text += f"; {len(self.mismatched)} of another shape ({_names(self.mismatched)})"
        if self.missing:
            text += f"; {len(self.missing)} not in the file ({_names(self.missing)})"
        if self.unexpected:
            text += f"; {len(self.unexpected)} of the file not used ({_names(self.unexpected)})"
        return text


def load_model_weights(
    model: nn.Module,
    tensors: Mapping[str, torch.Tensor],
    *,
    source: str = "the given weights",
    require_all: bool = False,
    allow_mismatch: bool = False,
) -> LoadReport:
    """Put weights into ``model``, by name.

    Args:
        model: plain, or wrapped by DDP or ``torch.compile``.
        tensors: by name; wrapper prefixes don't matter.
        source: the file, for messages.
        require_all: every tensor of the model must be there (evaluation, resuming). Otherwise the missing
            ones keep their initial values, as new heads do on a pre-trained backbone.
        allow_mismatch: leave out tensors of another shape (heads of another number of classes) and load the
            rest. It is what the key ``MODEL.WEIGHTS_ALLOW_MISMATCH`` sets.

    Returns:
        What was loaded and what was not.

    Raises:
        CheckpointError: another model's weights (hardly anything matches); tensors of another shape without
            ``allow_mismatch``; missing ones under ``require_all``. The model is untouched then.
    """
    own = model.state_dict()
    own_names = _plain_names(own)
    given = strip_prefixes(tensors, source)
    matched, missing, mismatched = [], [], {}
    for name, plain in own_names.items():
        shape = tuple(own[name].shape)
        if plain not in given:
            missing.append(plain)
        elif tuple(given[plain].shape) != shape:
            mismatched[plain] = (tuple(given[plain].shape), shape)
        else:
            matched.append(name)
    known = set(own_names.values())
    report = LoadReport(
        source=source,
        matched=tuple(own_names[name] for name in matched),
        missing=tuple(missing),
        unexpected=tuple(name for name in given if name not in known),
        mismatched=mismatched,
    )
    _judge(report, len(given), require_all, allow_mismatch)
    model.load_state_dict({name: given[own_names[name]] for name in matched}, strict=False)
    return report


def _judge(report: LoadReport, given: int, require_all: bool, allow_mismatch: bool) -> None:
    """Refuse weights that are not meant for the model."""
    found = len(report.matched) + len(report.mismatched)
    # A backbone fills little of a detector, but all of it is used; a detector with other heads fills most.
    # When little of either is used, it is another model.
    another = found == 0 or (found * 2 < report.total and found * 2 < given)
    if another and not (allow_mismatch and report.matched):
        raise CheckpointError(
            f"{report.source}: weights of another model: {found} of its {given} tensors are in this model of "
            f"{report.total}; it has {_names(report.unexpected)}, the model wants {_names(report.missing)}"
        )
    if report.mismatched and not allow_mismatch:
        shapes = [f"{name} {list(had)} in the file, {list(want)} in the model"
                  for name, (had, want) in report.mismatched.items()]  # fmt: skip
        more = f"; and {len(shapes) - 8} more" if len(shapes) > 8 else ""
        raise CheckpointError(
            f"{report.source}: {len(shapes)} tensors have another shape than the model's (another number of "
            f"classes, another architecture?): {'; '.join(shapes[:8])}{more}. To load the other "
            f"{len(report.matched)}: MODEL.WEIGHTS_ALLOW_MISMATCH True"
        )
    # A count that only BatchNorm in training mode reads; older files lack it.
    needed = [name for name in report.missing if not name.endswith("num_batches_tracked")]
    if require_all and (needed or report.mismatched):
        lacking = [*needed, *report.mismatched]
        raise CheckpointError(
            f"{report.source}: {len(lacking)} of the model's {report.total} tensors are not in it: "
            f"{_names(lacking, 8)}; give a checkpoint of this model, or change the config to the checkpoint's"
        )


def _names(names: Any, most: int = 3) -> str:
    listed = list(names)
    return ", ".join(listed[:most]) + (", …" if len(listed) > most else "")


def _safe_relative(path: str, name: str) -> Path:
    parts = [part for part in unquote(path).split("/") if part]
    if not parts or any(part in (".", "..") or "\\" in part or ":" in part or "\x00" in part for part in parts):
        raise CheckpointError(f"MODEL.WEIGHTS: {name!r} is not the address of a file")
    return Path(*parts)


def _fetch(name: str, url: str, path: Path, timeout: float) -> None:
    """Download ``url`` to ``path``, whole or not at all."""
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # several processes may fetch at once
    logger.info("fetching %s into %s", url, path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        request = urllib.request.Request(url, headers={"User-Agent": "zenith_det"})
        with urllib.request.urlopen(request, timeout=timeout) as response, beside.open("wb") as file:
            expected = response.headers.get("Content-Length")
            written = 0
            while chunk := response.read(1 << 20):
                written += file.write(chunk)
        if expected is not None and written != int(expected):
            raise OSError(f"the connection broke after {written} of {expected} bytes")
        os.replace(beside, path)
    except (OSError, ValueError, urllib.error.URLError) as error:
        raise CheckpointError(
            f"MODEL.WEIGHTS: {name!r} could not be fetched from {url} ({_network_reason(error)}); download it "
            f"where there is a network and put it at {path}, or give its path, or train from scratch with "
            "MODEL.WEIGHTS ''"
        ) from error
    finally:
        beside.unlink(missing_ok=True)


def _network_reason(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"the server answers {error.code} {error.reason}"
    reason = getattr(error, "reason", error)
    if isinstance(reason, socket.gaierror):
        return "no network, or the name does not resolve"
    if isinstance(reason, TimeoutError):
        return "no answer in time"
    if isinstance(reason, OSError) and reason.strerror:
        return reason.strerror
    return str(reason).splitlines()[0] if str(reason) else type(error).__name__


# --- pickles ------------------------------------------------------------------------------------------


def read_pickle(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a model-zoo pickle: numeric numpy arrays, numbers, strings and containers of them.

    Nothing in the file is called: the few names that such files need stand for parsers of our own, and an
    array is rebuilt from its checked description. Anything else is refused by name.

    Raises:
        CheckpointError: missing, damaged, not a dictionary, or holding anything else than the above.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    try:
        _scan(data)
        # Files of Python 2 hold byte strings; latin1 keeps each byte.
        value = _to_values(_ArrayUnpickler(io.BytesIO(data), encoding="latin1").load())
    except _RefusedGlobal as error:
        raise CheckpointError(
            f"{path}: refused, since reading it could run code: it holds {error.name!r}, not arrays alone; if "
            "you trust it, load it with pickle yourself and save its arrays with torch.save"
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


class _RefusedGlobal(pickle.UnpicklingError):
    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


class _Parser:
    """A function under a name that pickles call; unlike a function, a pickle cannot set attributes on it."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("state for a function")


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
    return value.decode("latin1") if isinstance(value, bytes) else str(value)


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
        raise pickle.UnpicklingError(f"an array of shape {shape!r}")
    data = _raw(raw)
    if math.prod(shape) * dtype.value.itemsize != len(data):
        raise pickle.UnpicklingError(f"an array of shape {shape!r} with {len(data)} bytes")
    array = np.frombuffer(data, dtype=dtype.value).reshape(shape, order=order)
    # torch wants the machine's byte order, rows first, and memory that may be written.
    return np.array(array, dtype=dtype.value.newbyteorder("="), order="C")


def _scalar(dtype: Any, raw: Any) -> Any:
    return _array(raw, dtype, (), "C").item()


def _reconstruct(kind: Any, shape: Any, code: Any) -> _Array:
    # numpy makes an empty array first; its shape and bytes follow as state.
    return _Array()


def _encode(text: Any, encoding: Any) -> bytes:
    # How Python 3 writes bytes in protocol 2.
    if not isinstance(text, str) or codecs.lookup(_text(encoding)).name not in ("iso8859-1", "utf-8"):
        raise pickle.UnpicklingError("bytes in an unknown encoding")
    return text.encode(_text(encoding))


def _empty_bytes(*args: Any) -> bytes:
    if args and args != (b"",):
        raise pickle.UnpicklingError("bytes from arguments")
    return b""


_PARSERS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("_codecs", "encode"): _Parser(_encode),
    ("builtins", "bytes"): _Parser(_empty_bytes),
    ("__builtin__", "bytes"): _Parser(_empty_bytes),
    ("numpy", "ndarray"): "numpy.ndarray",  # only ever an argument of _reconstruct
    ("numpy", "dtype"): _Parser(_DType),
}
for _package in ("numpy.core", "numpy._core"):
    _PARSERS[f"{_package}.multiarray", "_reconstruct"] = _Parser(_reconstruct)
    _PARSERS[f"{_package}.multiarray", "scalar"] = _Parser(_scalar)
    _PARSERS[f"{_package}.numeric", "_frombuffer"] = _Parser(_array)


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _PARSERS[module, name]
        except KeyError:
            raise _RefusedGlobal(f"{module}.{name}") from None


def _scan(data: bytes) -> None:
    """Refuse pickles that would make the unpickler itself reserve memory without bound."""
    for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
        # The memo is an array in C, grown to the highest index that a file names.
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and argument > 2 * count + 256:
            raise pickle.UnpicklingError("a memo index out of all proportion")


def _to_values(value: Any) -> Any:
    if isinstance(value, _Array):
        if value.value is None:
            raise pickle.UnpicklingError("an array without data")
        return value.value
    if isinstance(value, _DType):
        return str(value.value)
    if isinstance(value, dict):
        return {_to_values(key): _to_values(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return type(value)(_to_values(item) for item in value)
    if isinstance(value, np.ndarray) or value is None or isinstance(value, bool | int | float | complex | str | bytes):
        return value
    raise pickle.UnpicklingError(f"a {type(value).__name__}")
