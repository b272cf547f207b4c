"""Reading files of weights, so that none of them runs code and each damage is told in one line."""

from __future__ import annotations

import contextlib
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from zenith_det.errors import CheckpointError
from zenith_det.training.checkpoints.pickles import RefusedNameError, check_pickle, read_arrays

_ZIP_MAGIC = b"PK\x03\x04"


class CorruptCheckpointError(CheckpointError):
    """A checkpoint file that is torn or damaged, as a crash or a bad disk leaves it."""


def load_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint into host memory, without running any code in it.

    Raises:
        CorruptCheckpointError: torn or damaged (each part's checksum is compared).
        CheckpointError: missing, no checkpoint at all, one that needs code to be read, or larger than memory.
    """
    return _read(Path(path), "cpu")


def read_facts(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Check that a checkpoint is whole and safe, and read all of it but the tensors' values.

    Tensors are on the device ``meta``. Raises as :func:`load_checkpoint`.
    """
    return _read(Path(path), "meta")


def read_pickle(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a model-zoo pickle: numeric numpy arrays, numbers, strings and containers of them.

    Raises:
        CheckpointError: missing, damaged, not a dictionary, or holding anything else than the above.
    """
    path = Path(path)
    with _told(path), path.open("rb") as file:
        return _require_dict(read_arrays(file), path)


def _read(path: Path, device: str) -> dict[str, Any]:
    with _told(path):
        with path.open("rb") as file:
            head = file.read(len(_ZIP_MAGIC))
        if not head:
            raise CorruptCheckpointError(f"{path}: is empty; a save that was cut short leaves this")
        if not head.strip(b"\x00"):
            raise CorruptCheckpointError(f"{path}: is damaged: it begins with zeros")
        # What no reader of torch's would make sense of.
        if head != _ZIP_MAGIC and not head.startswith(pickle.PROTO):
            raise CheckpointError(f"{path}: is not a checkpoint that PyTorch can read")
    with _told(path, zipped=head == _ZIP_MAGIC), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the file's age, of which nobody needs to know
        if head == _ZIP_MAGIC:
            _check_archive(path)
        else:
            with path.open("rb") as file:
                # Magic number, version, system, the state, the keys of the storages that follow.
                for _ in range(5):
                    check_pickle(file)
        return _require_dict(torch.load(path, map_location=device, weights_only=True), path)


def _check_archive(path: Path) -> None:
    """Is all of it there, and is it one that PyTorch has made of weights?"""
    with zipfile.ZipFile(path) as archive:
        sizes = {entry.filename: entry.file_size for entry in archive.infolist()}
        if len(sizes) < len(archive.infolist()) or archive.comment:  # another reader could take another part
            raise CheckpointError(
                f"{path}: is not a checkpoint: a zip archive with a part twice, or a comment"
            )
        damaged = archive.testzip()
        if damaged is not None:
            raise CorruptCheckpointError(f"{path}: is damaged: the checksum of its part {damaged!r} is wrong")
        folder = next(iter(sizes), "").split("/")[0]
        if f"{folder}/data.pkl" not in sizes:
            raise CheckpointError(f"{path}: is not a checkpoint: a zip archive without 'data.pkl'")
        if f"{folder}/constants.pkl" in sizes:
            raise CheckpointError(f"{path}: is a TorchScript archive, not a checkpoint: it holds code")
        start = f"{folder}/data/"
        records = {name[len(start) :]: size for name, size in sizes.items() if name.startswith(start)}
        with archive.open(f"{folder}/data.pkl") as data:
            check_pickle(data, records)  # type: ignore[arg-type]


def _require_dict(state: Any, path: Path) -> dict[str, Any]:
    if not isinstance(state, dict):
        kind_of = type(state).__name__
        raise CheckpointError(f"{path}: is not a checkpoint: it holds a {kind_of}, not a dictionary")
    return state


@contextlib.contextmanager
def _told(path: Path, *, zipped: bool = False) -> Iterator[None]:
    """Tell in a user's words whatever a damaged, foreign or hostile file raises."""
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise CheckpointError(f"{path}: is not a file; give a checkpoint")
        yield
    except CheckpointError:
        raise
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise CheckpointError(f"{path}: does not fit into memory") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    except Exception as error:
        # torch's own words are at the end, after its advice.
        message = str(error).rpartition("WeightsUnpickler error: ")[2].strip()
        # What it holds that isn't allowed, e.g. posix.system.
        named = re.search(r"GLOBAL (\S+) (?:whose|was)", message)
        refused = str(error) if isinstance(error, RefusedNameError) else named[1] if named else None
        if refused is not None:
            raise CheckpointError(
                f"{path}: refused, since reading it could run code: it holds {refused!r}, not tensors alone; if you "
                "trust it, rewrite its weights by torch.save, read by torch.load(…, weights_only=False) or pickle"
            ) from error
        # Whatever a damaged or foreign file makes the reader stumble over (KeyError, EOFError, …).
        kind = (
            CorruptCheckpointError
            if zipped and not isinstance(error, pickle.UnpicklingError)
            else CheckpointError
        )
        reason = (
            f"{type(error).__name__}: {message.splitlines()[0][:200]}" if message else type(error).__name__
        )
        raise kind(f"{path}: is not a checkpoint, or damaged ({reason})") from error
