"""A file written whole or not at all: whoever looks, also after a crash, finds the old content or the new."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from zenith_det.errors import UserError

__all__ = ["LEFT_OVERS", "append_whole", "told", "whole_file", "write_whole"]

logger = logging.getLogger(__name__)

#: Names of what a crash leaves of a file that was being written, as a pattern; ``{}`` is the file's name or a pattern.
LEFT_OVERS = ".{}.*.tmp"


def write_whole(
    path: str | os.PathLike[str],
    content: str | bytes | Callable[[BinaryIO], object],
    *,
    synced: bool = False,
) -> Path:
    """Write a file, beside the target first, then renamed over it. Its folder is made.

    Args:
        path: the target.
        content: text is written in UTF-8; a function writes into the file that it is given.
        synced: also a power cut leaves the old content or the new; it waits for the disk.

    Returns:
        The target.

    Raises:
        UserError: it cannot be written.
    """
    with told(path), whole_file(path, synced=synced) as file:
        if callable(content):
            content(file)
        else:
            file.write(content.encode(errors="replace") if isinstance(content, str) else content)
    return Path(path)


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str], *, synced: bool = False) -> Iterator[BinaryIO]:
    """As :func:`write_whole`, for what is written bit by bit: the target is there once the ``with`` ends without error.

    Raises:
        OSError: it cannot be written.
    """
    target = Path(path)
    # Several processes may write the same file.
    beside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with beside.open("wb") as file:
            yield file
            if synced:
                file.flush()
                os.fsync(file.fileno())
        os.replace(beside, target)
    except BaseException:
        # What is half written only takes the space that is short.
        with contextlib.suppress(OSError):
            beside.unlink()
        raise
    if synced:
        _sync_folder(target.parent)


@contextlib.contextmanager
def told(path: str | os.PathLike[str]) -> Iterator[None]:
    """Whatever keeps a file from being written is a :class:`UserError` in one line."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error


def append_whole(path: str | os.PathLike[str], text: str) -> None:
    """Add text, in UTF-8, to the end of a file, all of it or nothing; the file is made if it isn't there.

    Raises:
        UserError: it cannot be written.
    """
    rest = memoryview(text.encode(errors="replace"))
    with told(path), open(path, "ab", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        try:
            while rest:
                rest = rest[file.write(rest) :]
        except OSError:
            with contextlib.suppress(OSError):
                file.truncate(size)
            raise


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # folders cannot be opened there
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        logger.debug("%s: cannot be synced: %s", folder, error)  # some network file systems
    finally:
        os.close(descriptor)
