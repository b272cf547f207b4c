"""A file written whole or not at all: whoever looks, also after a crash, finds the old content or the new."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from zenith_det.errors import UserError

__all__ = ["write_whole"]


def write_whole(path: str | os.PathLike[str], content: str | bytes) -> Path:
    """Write a file, beside the target first, then renamed over it. Its folder is made.

    Args:
        path: the target.
        content: text is written in UTF-8.

    Returns:
        The target.

    Raises:
        UserError: it cannot be written.
    """
    target = Path(path)
    # Several processes may write the same file.
    beside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        beside.write_bytes(content.encode(errors="replace") if isinstance(content, str) else content)
        os.replace(beside, target)
    except OSError as error:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise UserError(f"{target}: cannot be written: {error.strerror or error}") from error
    return target
