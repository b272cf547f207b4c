"""Checkpoints that survive a crash, and that never run code when they are read."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from zenith_det.errors import CheckpointError
from zenith_det.training.checkpoints.bounded_pickle import RefusedNameError, TooLargeError
from zenith_det.training.checkpoints.checkpoint_scan import scan_legacy_file, scan_zip_pickle

logger = logging.getLogger(__name__)

SUFFIX = ".pth"
LAST_FILE = "last_checkpoint"
_PERIODIC = re.compile(r"model_(\d+)\.pth")
#: Of a run that has ended, without suffix.
FINAL_NAME = "model_final"
_FINAL = f"{FINAL_NAME}{SUFFIX}"
_ZIP_MAGIC = b"PK\x03\x04"
# What zipfile stumbles over in a damaged archive (RuntimeError: a flipped "encrypted" bit).
_ZIP_ERRORS = (zipfile.BadZipFile, EOFError, ValueError, NotImplementedError, struct.error, RuntimeError)


class CorruptCheckpointError(CheckpointError):
    """A checkpoint file that is torn or damaged, as a crash or a bad disk leaves it."""


class Checkpointer:
    """Saves and finds the checkpoints of one run.

    Args:
        output_dir: where they lie: ``model_0000099.pth``, ``model_final.pth``, … and ``last_checkpoint``,
            which holds the name of the newest (Detectron2's format).
        keep: how many ``model_<iteration>.pth`` to keep, the newest; others (final, best) are never removed,
            nor is the newest that a diverged run could go back to. ``None`` keeps all.

    A save writes beside, syncs and renames, so that a file under its final name is whole, whatever happens
    on the way. In a run of several processes the main one alone saves and asks for :meth:`last`.
    """

    def __init__(self, output_dir: str | os.PathLike[str], *, keep: int | None = None) -> None:
        if keep is not None and keep < 1:
            raise CheckpointError(f"the number of checkpoints to keep must be at least 1, not {keep}")
        self.output_dir = Path(output_dir)
        self._keep = keep

    def save(self, name: str, state: Mapping[str, Any], *, mark_last: bool = True) -> Path:
        """Save ``state`` as ``<name>.pth``.

        Args:
            name: without suffix: ``"model_0000099"``, ``"model_final"``, ``"model_best"``.
            state: tensors, numbers, strings and containers of them; numpy values become Python's or tensors,
                so that the file loads under ``torch.load(weights_only=True)``.
            mark_last: make it the one that a resumed run takes; ``False`` for a copy of the best.

        Returns:
            The file written.

        Raises:
            CheckpointError: it could not be written (a full disk); earlier checkpoints are untouched. Or
                ``state`` holds something that no safe loading could read back.
        """
        plain = to_plain(state)
        path = self.output_dir / f"{name}{SUFFIX}"
        try:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            _write_synced(path, lambda file: torch.save(plain, file))
            if mark_last:
                _write_synced(self.output_dir / LAST_FILE, lambda file: file.write(path.name.encode()))
        except OSError as error:
            good = self._named()
            rest = (
                f"{good.name} is whole: free some space and go on with --resume"
                if good is not None and good.exists()
                else "free some space, or choose another OUTPUT_DIR"
            )
            raise CheckpointError(f"{path}: cannot be written: {error.strerror or error}; {rest}") from error
        self._remove_old(path, plain)
        return path

    def load(self, path: str | os.PathLike[str]) -> dict[str, Any]:
        """:func:`load_checkpoint`."""
        return load_checkpoint(path)

    def last(self, run_id: str | None = None) -> Path | None:
        """The checkpoint that a resumed run takes, ``None`` in a directory without one.

        It is the one that ``last_checkpoint`` names. Where that one is missing or damaged, it is the newest
        whole one beside it, with a warning; damaged files are set aside as ``….corrupt``.

        Args:
            run_id: pass over checkpoints of other runs: those that don't hold this under ``"run_id"``.

        Raises:
            CheckpointError: there are checkpoints, but none is whole.
        """
        named = self._named()
        tried = 0
        for path in self._candidates():
            if not path.exists():
                logger.warning("%s names %s, which is not there", self.output_dir / LAST_FILE, path.name)
                continue
            tried += 1
            try:
                facts = read_facts(path)
            except CorruptCheckpointError as error:
                aside = path.with_name(path.name + ".corrupt")
                try:
                    os.replace(path, aside)
                    logger.warning("%s; set aside as %s", error, aside.name)
                except OSError:
                    logger.warning("%s; passed over", error)
                continue
            if run_id is not None and facts.get("run_id") != run_id:
                tried -= 1
                continue
            if path != named:
                logger.warning("going on from %s, the newest whole checkpoint", path)
            return path
        if tried:
            raise CheckpointError(
                f"{self.output_dir}: none of its {tried} checkpoints is whole (set aside as .corrupt); "
                "start anew without --resume, or choose another OUTPUT_DIR"
            )
        return None

    def newest_good(self, run_id: str) -> Path | None:
        """The newest checkpoint of a run that was saved while training went well (its ``"good"`` is true).

        Damaged ones are passed over; ``None``: there is none.
        """
        newest: tuple[int, Path] | None = None
        for path in self._candidates():
            try:
                facts = read_facts(path)
            except CheckpointError:
                continue
            mine = facts.get("run_id") == run_id and facts.get("good") and "iteration" in facts
            if mine and (newest is None or int(facts["iteration"]) > newest[0]):
                newest = (int(facts["iteration"]), path)
        return newest[1] if newest else None

    def mark_last(self, path: Path | None) -> None:
        """Make ``path`` the one that a resumed run takes; ``None``: none, until the next save.

        Raises:
            CheckpointError: it cannot be written.
        """
        marker = self.output_dir / LAST_FILE
        try:
            if path is None:
                marker.unlink(missing_ok=True)
            else:
                _write_synced(marker, lambda file: file.write(path.name.encode()))
        except OSError as error:
            raise CheckpointError(f"{marker}: cannot be written: {error.strerror or error}") from error

    def _candidates(self) -> list[Path]:
        """The checkpoint that ``last_checkpoint`` names, then the others, newest first."""
        named = self._named()
        others = [path for path in self._resumable() if path != named]
        return ([named] if named is not None else []) + others

    def _named(self) -> Path | None:
        try:
            name = (self.output_dir / LAST_FILE).read_text(encoding="utf-8", errors="replace").strip()
        except OSError:
            return None
        # A basename, whatever the file says: a run reads checkpoints from its own directory alone.
        name = Path(name.replace("\x00", "")).name
        return self.output_dir / name if name else None

    def _resumable(self) -> list[Path]:
        """Periodic and final checkpoints, newest first (by time: iterations of a restarted run overlap)."""
        found = []
        try:
            for path in self.output_dir.iterdir():
                match = _PERIODIC.fullmatch(path.name)
                if match or path.name == _FINAL:
                    iteration = int(match[1]) if match else 0
                    # At equal times the final one is the newer.
                    found.append((path.stat().st_mtime_ns, match is None, iteration, path))
        except OSError:
            pass
        return [entry[-1] for entry in sorted(found, reverse=True)]

    def _remove_old(self, saved: Path, state: Mapping[str, Any]) -> None:
        protected: set[Path | None] = set()
        if self._keep is not None and not state.get("good", True):
            # Saved while training went badly: what a roll-back would go to is among the older ones.
            protected.add(self.newest_good(state["run_id"]))
        self.remove_old(saved, protected)

    def remove_old(self, saved: Path, protected: Collection[Path | None] = ()) -> None:
        """Remove periodic checkpoints beyond those to keep, and what a crash has left of a save.

        Args:
            saved: just now, hence the newest.
            protected: not to be removed, nor the one that ``last_checkpoint`` names.
        """
        protected = {saved, self._named(), *protected}
        doomed = list(self.output_dir.glob(f"*{SUFFIX}.tmp"))  # left by a crash in the middle of a save
        if self._keep is not None:
            periodic = [path for path in self._resumable() if path.name != _FINAL]
            if saved in periodic:  # a coarse clock may not show that it is the newest
                periodic.remove(saved)
                periodic.insert(0, saved)
            doomed += [path for path in periodic[self._keep :] if path not in protected]
        for path in doomed:
            try:
                path.unlink()
            except OSError as error:
                logger.warning("%s: cannot be removed: %s", path, error.strerror or error)


def load_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint into host memory, without running any code in it, and in no more memory than its size.

    Its pickle is followed once without making anything of it: see
    :mod:`zenith_det.training.checkpoints.checkpoint_scan`.

    Raises:
        CorruptCheckpointError: torn or damaged (each part's checksum is compared).
        CheckpointError: missing, no checkpoint at all, one that needs code to be read, or one that asks for
            more memory than the file's size and 256 MiB.
    """
    path = Path(path)
    _check_file(path)
    return _torch_load(path, "cpu")


def read_facts(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Check that a checkpoint is whole and safe, and read all of it but the tensors' values.

    Tensors are on the device ``meta``. Raises as :func:`load_checkpoint`.
    """
    path = Path(path)
    _check_file(path)
    return _torch_load(path, "meta")


def to_plain(value: Any, _where: str = "state") -> Any:
    """A copy of ``value`` that loads under ``torch.load(weights_only=True)``.

    numpy scalars become Python's, numpy arrays tensors, mappings ``dict``, deques lists, named tuples tuples,
    paths strings; tensors stay themselves (detached).

    Raises:
        CheckpointError: an object of any other kind, named by its place: ``state['trainer']['cfg']``.
    """
    if value is None or type(value) in (bool, int, float, complex, str, bytes):
        return value
    if isinstance(value, torch.Tensor):
        return value.detach()
    if isinstance(value, torch.dtype | torch.device | torch.Size):
        return value
    if isinstance(value, np.generic):
        return to_plain(value.item(), _where)
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        return torch.from_numpy(np.array(value, dtype=value.dtype.newbyteorder("=")))
    # Subclasses of Python's own (an IntEnum, an enum of strings).
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {to_plain(key, f"{_where} key"): to_plain(v, f"{_where}[{key!r}]") for key, v in value.items()}
    if isinstance(value, tuple):
        return tuple(to_plain(v, f"{_where}[{i}]") for i, v in enumerate(value))
    if isinstance(value, set | frozenset):
        return {to_plain(v, f"{_where} member") for v in value}
    if isinstance(value, list) or type(value).__name__ == "deque":
        return [to_plain(v, f"{_where}[{i}]") for i, v in enumerate(value)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value)]
        return {name: to_plain(getattr(value, name), f"{_where}.{name}") for name in names}
    raise CheckpointError(
        f"{_where} is a {type(value).__module__}.{type(value).__qualname__}, which no safe loading could "
        "read back: put tensors, numbers, strings and containers of them into a checkpoint"
    )


class _KeepsFirstError:
    """A file to write to that remembers the first failure and then takes the rest in silence.

    torch writes from C++, which loses an exception raised below it (and the reason with it).
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        if self.error is None:
            try:
                self._file.write(data)
            except OSError as error:
                self.error = error
        return size

    def flush(self) -> None:
        pass


def _write_synced(path: Path, write: Any) -> None:
    """Write a file so that ``path`` is at every moment its old or its new content, also after a power cut."""
    beside = path.with_name(path.name + ".tmp")
    file = beside.open("wb")
    try:
        with file:
            guarded = _KeepsFirstError(file)
            write(guarded)
            if guarded.error is not None:
                raise guarded.error
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        # What is half written only takes the space that is short.
        with contextlib.suppress(OSError):
            beside.unlink()
        raise
    _sync_directory(path.parent)


def _sync_directory(directory: Path) -> None:
    if os.name == "nt":  # directories cannot be opened there
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        logger.debug("%s: cannot be synced: %s", directory, error)  # some network file systems
    finally:
        os.close(descriptor)


def _check_file(path: Path) -> None:
    """Is it there, readable, safe to read, and, if it is torch's zip format, whole?"""
    try:
        size = path.stat().st_size
        if not path.is_file():
            raise CheckpointError(f"{path}: is not a file; give a checkpoint file (…{SUFFIX})")
        with path.open("rb") as file:
            head = file.read(len(_ZIP_MAGIC))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{path}: cannot be read: {reason}") from error
    if size == 0:
        raise CorruptCheckpointError(f"{path}: is empty; a save that was cut short leaves this")
    if head != _ZIP_MAGIC:
        if not head.strip(b"\x00"):
            raise CorruptCheckpointError(f"{path}: is damaged: it begins with zeros")
        if not head.startswith(pickle.PROTO):  # what no reader of torch's would make sense of
            raise CheckpointError(f"{path}: is not a checkpoint that PyTorch can read")
        with _told(path, zipped=False), path.open("rb") as file:
            _require_dict(scan_legacy_file(file, size), path)
        return
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            # torch stores without compressing. A small archive of a great many zeros is no checkpoint.
            compressed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
            if compressed or sum(entry.file_size for entry in entries) > size:
                raise CheckpointError(f"{path}: is not a checkpoint: a compressed zip archive")
            sizes = {entry.filename: entry.file_size for entry in entries}
            if len(sizes) < len(entries) or archive.comment:  # another reader could take another part
                raise CheckpointError(
                    f"{path}: is not a checkpoint: a zip archive with a part twice, or a comment"
                )
            damaged = archive.testzip()
            if damaged is not None:
                raise CorruptCheckpointError(
                    f"{path}: is damaged: the checksum of its part {damaged!r} is wrong"
                )
            folder = entries[0].filename.split("/")[0] if entries else ""
            if f"{folder}/data.pkl" not in sizes:
                raise CheckpointError(f"{path}: is not a checkpoint: a zip archive without 'data.pkl'")
            if f"{folder}/constants.pkl" in sizes:
                raise CheckpointError(f"{path}: is a TorchScript archive, not a checkpoint: it holds code")
            start = f"{folder}/data/"
            records = {name[len(start) :]: n for name, n in sizes.items() if name.startswith(start)}
            with _told(path, zipped=True), archive.open(f"{folder}/data.pkl") as data:
                held = scan_zip_pickle(data, sizes[f"{folder}/data.pkl"], records, size)  # type: ignore[arg-type]
                _require_dict(held, path)
    except _ZIP_ERRORS as error:
        raise CorruptCheckpointError(f"{path}: is torn or damaged ({_first_line(error)})") from error
    except MemoryError as error:
        raise CheckpointError(f"{path}: does not fit into memory") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error


def _torch_load(path: Path, device: str) -> dict[str, Any]:
    with path.open("rb") as file:
        zipped = file.read(len(_ZIP_MAGIC)) == _ZIP_MAGIC
    with _told(path, zipped=zipped), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the file's age, of which nobody needs to know
        state = torch.load(path, map_location=device, weights_only=True)
    return _require_dict(state, path)


def _require_dict(state: Any, path: Path) -> dict[str, Any]:
    if not isinstance(state, dict):
        kind_of = type(state).__name__
        raise CheckpointError(f"{path}: is not a checkpoint: it holds a {kind_of}, not a dictionary")
    return state


@contextlib.contextmanager
def _told(path: Path, *, zipped: bool) -> Iterator[None]:
    """Tell in a user's words whatever a damaged, foreign or hostile pickle raises."""
    try:
        yield
    except CheckpointError:
        raise
    except RefusedNameError as error:
        raise _refused(path, error.name) from error
    except TooLargeError as error:
        raise CheckpointError(f"{path}: refused: it holds {error}") from error
    except pickle.UnpicklingError as error:
        forbidden = _forbidden_name(str(error))
        if forbidden is not None:
            raise _refused(path, forbidden) from error
        raise CheckpointError(
            f"{path}: is not a checkpoint that PyTorch can read ({_first_line(error)})"
        ) from error
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise CheckpointError(f"{path}: does not fit into memory") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    except Exception as error:
        # Whatever a damaged or foreign file makes the reader stumble over (KeyError, EOFError, …).
        kind = CorruptCheckpointError if zipped else CheckpointError
        reason = f"{type(error).__name__}: {_first_line(error)}"
        raise kind(f"{path}: is not a checkpoint, or damaged ({reason})") from error


def _refused(path: Path, name: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: refused, since reading it could run code or fill the memory: it holds {name!r}, not tensors "
        "alone; if you trust it, rewrite it: "
        "torch.save(torch.load(file, weights_only=False)['model'], 'weights.pth')"
    )


def _forbidden_name(message: str) -> str | None:
    """The object in the words of torch's refusal, e.g. ``posix.system``."""
    match = re.search(r"GLOBAL (\S+) (?:whose|was)", message)
    return match[1] if match else None


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200].rstrip(".") if lines else type(error).__name__
