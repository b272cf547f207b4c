"""One command at a time in an ``OUTPUT_DIR``."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import socket
import time
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import psutil

from zenith_det.errors import UserError, one_line
from zenith_det.training.processes.distributed import broadcast_object, is_main_process

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

__all__ = ["LOCK_FILE", "OutputLock"]

#: Says which process has the folder, and is locked for as long as that process lives.
LOCK_FILE = "run.lock"
_HELD = (errno.EACCES, errno.EAGAIN)


class OutputLock:
    """Holds an output directory for this run, around all that it writes; all processes of the run enter it together.

    The system's record lock (``fcntl``) tells: it ends with the process that has it, however that ends, its forked
    children don't inherit it, and it reaches other machines on NFS, Lustre and GPFS where they are mounted with
    locking. Where there are no such locks, the process that the file names is looked for on this machine.

    Args:
        output_dir: exists.

    Raises:
        UserError: when entered, on all processes: another run has it.
    """

    def __init__(self, output_dir: Path) -> None:
        self._folder = output_dir
        self._path = output_dir / LOCK_FILE
        self._file: IO[str] | None = None

    def __enter__(self) -> OutputLock:
        if why := broadcast_object(self._take() if is_main_process() else None):
            raise UserError(why)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._path.unlink()  # while it is locked: whoever waits for this file then sees that it is gone
            self._file.close()
            self._file = None

    def _take(self) -> str | None:
        """Why the folder can't be had; ``None``: it is."""
        while True:
            try:
                file = self._path.open("a+", encoding="utf-8")
                found = self._lock(file)
                if found is not None:
                    file.close()
                    return found
                with contextlib.suppress(FileNotFoundError):
                    if os.path.samestat(os.fstat(file.fileno()), os.stat(self._path)):
                        self._file = file
                        file.truncate(0)
                        file.write(json.dumps(_me()) + "\n")
                        file.flush()
                        return None
                file.close()  # its owner has just ended and removed it
            except OSError as error:
                return (
                    f"{self._path}: cannot be written: {error.strerror or error}; choose another OUTPUT_DIR"
                )

    def _lock(self, file: IO[str]) -> str | None:
        owner = _owner(file)
        if fcntl is not None:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return None
            except OSError as error:
                if error.errno in _HELD:
                    return self._taken_by(owner)
                logger.debug("%s: no locks on this file system: %s", self._path, error.strerror)
        if owner and owner.get("host") == socket.gethostname():
            return self._taken_by(owner) if _lives(owner) else None
        if owner:
            logger.warning(
                "%s names %s, and its file system has no locks: if that run is still going, end this one",
                self._path, _shown(owner),
            )  # fmt: skip
        return None

    def _taken_by(self, owner: dict[str, Any]) -> str:
        return (
            f"{self._folder} belongs to another run that is still going: {_shown(owner)}; choose another OUTPUT_DIR, "
            "or let that one end first"
        )


def _me() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": psutil.Process().create_time(),
    }


def _owner(file: IO[str]) -> dict[str, Any]:
    """What the file says; nothing where it says nothing of use."""
    try:
        file.seek(0)
        owner = json.loads(file.read(4096))
        return {
            "host": str(owner["host"]),
            "pid": int(owner["pid"]),
            "started": float(owner["started"]),
        }
    except (ValueError, TypeError, KeyError, OSError):
        return {}


def _lives(owner: dict[str, Any]) -> bool:
    try:
        # Process numbers are used again.
        return abs(psutil.Process(owner["pid"]).create_time() - owner["started"]) < 1
    except psutil.Error:
        return False


def _shown(owner: dict[str, Any]) -> str:
    if not owner:
        return "a process that has just begun"
    since = time.strftime("%Y-%m-%d %H:%M", time.localtime(owner["started"]))
    return f"process {owner['pid']} on {one_line(owner['host'], 80)}, begun {since}"
