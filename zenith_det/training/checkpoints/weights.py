"""``MODEL.WEIGHTS``: reading weights from wherever they are, and putting them into a model.

A ``.pth`` file is read with ``weights_only``; a Detectron2 model-zoo ``.pkl`` by an unpickler that knows
numeric numpy arrays and containers and nothing else. Neither runs code, whoever made the file.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import re
import shutil
import socket
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote, urlsplit

import numpy as np
import torch
from torch import nn

from zenith_det.errors import CheckpointError, UserError, is_printable, quote
from zenith_det.files import write_whole
from zenith_det.training.checkpoints.reading import load_checkpoint, read_pickle

logger = logging.getLogger(__name__)

# What a `detectron2://` name stands for (detectron2/utils/file_io.py).
DETECTRON2_URL = "https://dl.fbaipublicfiles.com/detectron2/"
FETCH_TIMEOUT_SECONDS = 15.0
#: Characters of a tensor's name; torch's own are below 200 in the deepest models.
MAX_NAME = 1000
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
        key: torch.from_numpy(value) if isinstance(value, np.ndarray) else value
        for key, value in data.items()
        # Detectron1's files hold the optimizer's buffers beside the weights.
        if isinstance(value, torch.Tensor | np.ndarray)
        and isinstance(key, str)
        and not key.endswith("_momentum")
    }
    if not tensors:
        raise CheckpointError(
            f"{path}: holds no weights; give a checkpoint with a 'model' entry, or a state dict"
        )
    for key, tensor in tensors.items():
        if not _is_dense(tensor):
            raise CheckpointError(
                f"{path}: its tensor {quote(key)} is sparse, quantized or without data: no weights"
            )
        if len(key) > MAX_NAME or not is_printable(key):
            raise CheckpointError(
                f"{path}: holds a tensor of the name {quote(key)}: this is no weights' name"
            )
    return strip_prefixes(tensors, str(path))


def _is_dense(tensor: torch.Tensor) -> bool:
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
        return False
    return (
        tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()
    )  # else it repeats itself


def locate_weights(name: str, *, timeout: float = FETCH_TIMEOUT_SECONDS) -> Path:
    """The local file that ``name`` stands for, fetched if it is a URL not fetched before.

    See :func:`read_weights` for ``name`` and the errors.
    """
    scheme = urlsplit(name).scheme if "://" in name else ""
    if scheme in ("", "file"):
        path = Path(os.path.expanduser(unquote(urlsplit(name).path) if scheme else name))
        if not path.exists():
            raise CheckpointError(f"MODEL.WEIGHTS: {name!r} does not exist (looked for {path.absolute()})")
        return path
    if scheme == "detectron2":
        relative = name.removeprefix("detectron2://").split("?")[0]
        url = DETECTRON2_URL + relative
        # Where Detectron2 itself keeps what it has fetched (iopath), for people who use both.
        iopath = Path(os.path.expanduser(os.environ.get("FVCORE_CACHE", "~/.torch/iopath_cache")))
        known = [iopath / "detectron2" / _safe_relative(relative, name)]
    elif scheme in ("https", "http"):
        url = name.split("?")[0]
        known = []
    else:
        raise CheckpointError(
            f"MODEL.WEIGHTS: {name!r}: cannot read {scheme}:// names; give a file, detectron2://… or https://…"
        )
    parts = urlsplit(url)
    cache = Path(torch.hub.get_dir()) / "checkpoints" / (parts.hostname or "")
    cached = cache / _safe_relative(parts.path, name)
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

    def check(self, *, require_all: bool, allow_mismatch: bool) -> None:
        """Refuse weights that are not meant for the model; see :func:`load_model_weights`."""
        given = len(self.matched) + len(self.mismatched) + len(self.unexpected)
        found = len(self.matched) + len(self.mismatched)
        # A backbone fills little of a detector, but all of it is used; a detector with other heads fills most.
        # When little of either is used, it is another model.
        another = found == 0 or (found * 2 < self.total and found * 2 < given)
        if another and not (allow_mismatch and self.matched):
            raise CheckpointError(
                f"{self.source}: weights of another model: {found} of its {given} tensors are in this model of "
                f"{self.total}; it has {_names(self.unexpected)}, the model wants {_names(self.missing)}"
            )
        if self.mismatched and not allow_mismatch:
            shapes = [f"{name} {list(had)} in the file, {list(want)} in the model"
                      for name, (had, want) in self.mismatched.items()]  # fmt: skip
            more = f"; and {len(shapes) - 8} more" if len(shapes) > 8 else ""
            raise CheckpointError(
                f"{self.source}: {len(shapes)} tensors have another shape than the model's (another number of "
                f"classes, another architecture?): {'; '.join(shapes[:8])}{more}. To load the other "
                f"{len(self.matched)}: MODEL.WEIGHTS_ALLOW_MISMATCH True"
            )
        # A count that only BatchNorm in training mode reads; older files lack it.
        needed = [name for name in self.missing if not name.endswith("num_batches_tracked")]
        if require_all and (needed or self.mismatched):
            lacking = [*needed, *self.mismatched]
            raise CheckpointError(
                f"{self.source}: {len(lacking)} of the model's {self.total} tensors are not in it: "
                f"{_names(lacking, 8)}; give a checkpoint of this model, or change the config to the checkpoint's"
            )


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
    report.check(require_all=require_all, allow_mismatch=allow_mismatch)
    model.load_state_dict({name: given[own_names[name]] for name in matched}, strict=False)
    return report


def _names(names: Any, most: int = 3) -> str:
    listed = list(names)
    return ", ".join(listed[:most]) + (", …" if len(listed) > most else "")


def _safe_relative(path: str, name: str) -> Path:
    parts = [part for part in unquote(path).split("/") if part]
    if not parts or any(part in (".", "..") or re.search(r"[\\:\x00]", part) for part in parts):
        raise CheckpointError(f"MODEL.WEIGHTS: {name!r} is not the address of a file")
    return Path(*parts)


def _fetch(name: str, url: str, path: Path, timeout: float) -> None:
    """Download ``url`` to ``path``, whole or not at all."""
    logger.info("fetching %s into %s", url, path)
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "zenith_det"})
        with urllib.request.urlopen(request, timeout=timeout) as response:
            write_whole(path, lambda file: _receive(response, file))
    except (OSError, ValueError, UserError) as error:
        raise CheckpointError(
            f"MODEL.WEIGHTS: {name!r} could not be fetched from {url} ({_network_reason(error)}); download "
            f"it where there is a network and put it at {path}, or give its path, or train from scratch with "
            "MODEL.WEIGHTS ''"
        ) from error


def _receive(response: Any, file: BinaryIO) -> None:
    shutil.copyfileobj(response, file)
    expected = response.headers.get("Content-Length")
    if expected is not None and file.tell() != int(expected):
        raise OSError(f"the connection broke after {file.tell()} of {expected} bytes")


def _network_reason(error: BaseException) -> str:
    if isinstance(error, UserError) and error.__cause__ is not None:  # while it was written
        error = error.__cause__
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
