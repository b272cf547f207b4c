"""The checkpoints of a run: saved so that they survive a crash, found again, the old ones removed."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import logging
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from zenith_det.errors import CheckpointError, UserError
from zenith_det.files import LEFT_OVERS, write_whole
from zenith_det.training.checkpoints.reading import CorruptCheckpointError, read_facts

logger = logging.getLogger(__name__)

SUFFIX = ".pth"
LAST_FILE = "last_checkpoint"
_PERIODIC = re.compile(r"model_(\d+)\.pth")
#: Of a run that has ended, without suffix.
FINAL_NAME = "model_final"
_FINAL = f"{FINAL_NAME}{SUFFIX}"


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
            write_whole(path, lambda file: _save(plain, file), synced=True)
            if mark_last:
                self.mark_last(path)
        except UserError as error:
            good = self._named()
            full = getattr(error.__cause__, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
            mend = "free some space" if full else "see to it"
            rest = (
                f"{good.name} is whole: {mend} and go on with --resume"
                if good is not None and good.exists()
                else f"{mend}, or choose another OUTPUT_DIR"
            )
            raise CheckpointError(f"{error}; {rest}") from error
        self._make_newest(path)
        self._remove_old(path, plain)
        return path

    def _make_newest(self, saved: Path) -> None:
        """Let it be the newest by time, too, where the clock has been set back."""
        with contextlib.suppress(OSError):
            newest = max((path.stat().st_mtime_ns for path in self._resumable() if path != saved), default=0)
            if saved.stat().st_mtime_ns <= newest:
                os.utime(saved, ns=(newest + 1, newest + 1))

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
            if not path.is_file():
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
                "start again without --resume, or choose another OUTPUT_DIR"
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
            UserError: it cannot be written.
        """
        marker = self.output_dir / LAST_FILE
        if path is not None:
            write_whole(marker, path.name, synced=True)
            return
        try:
            marker.unlink(missing_ok=True)
        except OSError as error:
            raise CheckpointError(f"{marker}: cannot be removed: {error.strerror or error}") from error

    def _candidates(self) -> list[Path]:
        """The checkpoint that ``last_checkpoint`` names, then the others, newest first."""
        named = self._named()
        others = [path for path in self._resumable() if path != named]
        return ([named] if named is not None else []) + others

    def _named(self) -> Path | None:
        marker = self.output_dir / LAST_FILE
        try:
            # A pipe would be waited for.
            name = marker.read_text(encoding="utf-8", errors="replace").strip() if marker.is_file() else ""
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
                if (match or path.name == _FINAL) and path.is_file():
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
        doomed = list(self.output_dir.glob(LEFT_OVERS.format(f"*{SUFFIX}")))
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


def _save(state: Mapping[str, Any], file: BinaryIO) -> None:
    kept = _KeepsFirstError(file)
    torch.save(state, kept)
    if kept.error is not None:
        raise kept.error
