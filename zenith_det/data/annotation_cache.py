"""What reading and checking an annotation file came to, kept by the file's content.

Reading a file of hundreds of megabytes takes most of a start. Its outcome depends on nothing but the file's
bytes, where its images are, and this package's checks: those are the key, and a changed file is another one.

An entry is JSON behind a checksum. It can hold no code, and whatever is wrong with it makes it count as absent; so does
an entry, or a folder, that somebody else could have written. A user without a folder of their own goes without.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import orjson

logger = logging.getLogger(__name__)

#: The folder to use in place of ``~/.cache/zenith_det``.
FOLDER_VARIABLE = "ZENITH_DET_CACHE"
#: Files below this size, in bytes, are read as quickly as their entry would be.
SMALLEST = 2**20
#: What the folder may hold; the entries that were used last stay.
MOST_BYTES = 8 * 2**30
MOST_ENTRIES = 64

_STALE = 24 * 3600.0  # seconds, of a file that was being written
_DIGEST = hashlib.blake2b().digest_size


def cache_folder() -> Path | None:
    """``$ZENITH_DET_CACHE``, or else ``zenith_det`` in the user's folder of caches; ``None`` where there is no such."""
    chosen = os.environ.get(FOLDER_VARIABLE)
    try:
        if chosen:
            return Path(chosen).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "zenith_det"
    except RuntimeError:  # neither HOME nor an entry in the list of users, as in many containers
        return None


def _ours(status: os.stat_result) -> bool:
    """Whether nobody else can have written what this is of."""
    return os.name == "nt" or (status.st_uid == os.geteuid() and not status.st_mode & 0o022)


@functools.cache
def _warn_of(folder: Path) -> None:
    logger.warning("cache of annotation files: others can write to %s: it is not used", folder)


@functools.cache
def _code() -> bytes:
    """Of the modules that read and check: another version of them finds other things."""
    digest = hashlib.blake2b()
    for module in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(module.read_bytes())
    return digest.digest()


def digest_of(content: bytes) -> bytes:
    """What tells one file's content from another's."""
    return hashlib.blake2b(content).digest()


def digest_of_file(path: str) -> bytes | None:
    """As :func:`digest_of`, without having the whole file in memory.

    ``None`` for a file below :data:`SMALLEST`, and for one that can't be read.
    """
    digest = hashlib.blake2b()
    try:
        if os.path.getsize(path) < SMALLEST:
            return None
        with open(path, "rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    except OSError:
        return None
    return digest.digest()


class Entry:
    """The place of one annotation file's outcome.

    Args:
        digest: of the annotation file's bytes, from :func:`digest_of` or :func:`digest_of_file`.
        circumstances: whatever else the outcome depends on.
    """

    def __init__(self, digest: bytes, *circumstances: object) -> None:
        key = hashlib.blake2b(digest)
        key.update(_code())
        key.update(repr(circumstances).encode("utf-8", "backslashreplace"))
        folder = cache_folder()
        self.path = None if folder is None else folder / "annotations" / f"{key.hexdigest()[:40]}.json"

    def read(self) -> Any:
        """What :meth:`write` was given; ``None`` where there is nothing, or nothing whole."""
        if self.path is None:
            return None
        try:
            with self.path.open("rb") as file:
                if not _ours(os.fstat(file.fileno())) or not _ours(self.path.parent.stat()):
                    _warn_of(self.path.parent)
                    return None
                content = file.read()
        except FileNotFoundError:
            return None
        except OSError as error:
            logger.debug("cache of annotation files: %s: %s", self.path, error.strerror or error)
            return None
        body = memoryview(content)[_DIGEST:]
        if hashlib.blake2b(body).digest() != content[:_DIGEST]:
            self.distrust()
            return None
        with contextlib.suppress(OSError):
            os.utime(self.path)  # it was used: see _make_room
        try:
            return orjson.loads(body)
        except orjson.JSONDecodeError:
            self.distrust()
            return None

    def distrust(self) -> None:
        """Say that the entry is of no use."""
        logger.warning("%s is damaged: the annotation file itself is read again", self.path)

    def write(self, outcome: Any) -> None:
        """Keep ``outcome``, of what JSON holds, and bytes in ASCII; see :func:`restored_bytes`.

        Several processes may do so at once. Where it can't be kept the run goes on without.
        """
        if self.path is None:
            return
        try:
            body = orjson.dumps(outcome, default=_bytes_as_list)
        except (orjson.JSONEncodeError, MemoryError) as error:
            logger.debug("cache of annotation files: not kept: %s", error)
            return
        folder, temporary = self.path.parent, None
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            with tempfile.NamedTemporaryFile(dir=folder, suffix=".part", delete=False) as file:
                temporary = file.name
                file.write(hashlib.blake2b(body).digest())
                file.write(body)
            os.replace(temporary, self.path)
            temporary = None
            _make_room(folder)
        except OSError as error:
            logger.debug("cache of annotation files: not kept in %s: %s", folder, error.strerror or error)
        finally:
            if temporary is not None:
                with contextlib.suppress(OSError):
                    os.unlink(temporary)


def _bytes_as_list(value: object) -> list[str]:
    if isinstance(value, bytes):
        return [value.decode("ascii")]
    raise TypeError(f"{type(value).__name__} is not JSON")


def restored_bytes(value: Any) -> Any:
    """The inverse of what :meth:`Entry.write` makes of bytes; anything else as it is."""
    return value[0].encode("ascii") if isinstance(value, list) else value


def _make_room(folder: Path) -> None:
    """Delete the entries used longest ago, and what a killed process left."""
    entries = []
    for found in folder.iterdir():
        with contextlib.suppress(OSError):  # another process deletes as well
            status = found.stat()
            if found.suffix == ".part" and time.time() - status.st_mtime > _STALE:
                found.unlink()
            elif found.suffix == ".json":
                entries.append((status.st_mtime, status.st_size, found))
    size = 0
    for number, (_, bytes_, found) in enumerate(sorted(entries, reverse=True)):
        size += bytes_
        if number and (number >= MOST_ENTRIES or size > MOST_BYTES):
            with contextlib.suppress(OSError):
                found.unlink()
