"""The errors that a user can cause, each told in one line."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

#: The longest message, in characters: names and values in it come from files of any size.
MAX_MESSAGE = 2000
# Control characters, halves of surrogate pairs, line and paragraph separators.
_UNPRINTABLE = frozenset(("Cc", "Cs", "Zl", "Zp"))
# Characters that turn the order of those around them: a line would read otherwise than it is. (Marks don't.)
_TURNING = frozenset(("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"))
# What torch makes a loader worker's error anew from, calling its class with this one text: a heading and the
# traceback, which ends with the error's class and its message.
_FROM_WORKER = re.compile(
    r"Caught \w+ in DataLoader worker process \d+\.\nOriginal .*\n[\w.]+: (.*)", re.DOTALL
)


def is_printable(text: str) -> bool:
    """Whether text can be printed and logged as part of a line: no terminal codes, no line breaks, no turned order."""
    return text.isprintable() or not any(map(_is_unprintable, text))


def _is_unprintable(character: str) -> bool:
    return unicodedata.category(character) in _UNPRINTABLE or unicodedata.bidirectional(character) in _TURNING


def one_line(value: object, limit: int = 160) -> str:
    """Text from a file, safe to print: no line breaks, no terminal codes, not endless."""
    text = value[: limit * 4] if isinstance(value, str) else _repr(value)[: limit * 4]
    if not text.isprintable():
        text = "".join(" " if _is_unprintable(c) else c for c in text)
    text = text.strip()
    return text if len(text) <= limit else text[: limit - 1] + "…"


def quote(value: object, limit: int = 80) -> str:
    """A value from a file as it would stand in code: text in quotes, so that ``"1"`` isn't taken for 1."""
    return one_line(_repr(value[: limit * 4] if isinstance(value, str) else value), limit)


def listed(names: Sequence[str], most: int = 10) -> str:
    """Names for a line, of many the first: ``"a, b and 3 more"``."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return one_line(", ".join(one_line(name, 80) for name in names[:most]), 40 * most) + more


def _repr(value: object) -> str:
    try:
        return repr(value)
    except (RecursionError, ValueError):  # nested too deep, or a number of thousands of digits
        return f"a {type(value).__name__} too large to show"


class UserError(Exception):
    """A mistake in something the user gave: a config, a file, an argument.

    The message says what is wrong, where (file, key, id) and what to do. It is always one line of printable
    characters, :data:`MAX_MESSAGE` at most, whatever a file puts into it. Command-line tools print it as ``error: …``
    and exit with :attr:`exit_code`; see :func:`zenith_det.cli.run`. From a worker of torch's ``DataLoader`` it arrives
    with the same message. (A subclass whose constructor needs more than a text arrives as a ``RuntimeError``.)
    """

    #: What a command ends with; 2 is :mod:`argparse`'s.
    exit_code = 2
    #: What its line begins with.
    label = "error"

    def __init__(self, message: object = "") -> None:
        text = message if isinstance(message, str) else str(message)
        if raised_in_worker := _FROM_WORKER.fullmatch(text):
            text = raised_in_worker[1]
        super().__init__(one_line(text, MAX_MESSAGE))


class MissingLibraryError(UserError, ImportError):
    """A library that this package works without, but not this part of it, isn't installed."""


class ConfigError(UserError):
    """A configuration file, key or value that cannot be used."""


class DatasetError(UserError):
    """A dataset, annotation file or image that cannot be used."""


class MissingDatasetError(DatasetError):
    """A dataset whose annotation file or image folder does not exist."""


class CheckpointError(UserError):
    """A checkpoint that cannot be read, trusted or matched to the model."""


class TrainingDivergedError(UserError):
    """Losses or gradients stayed non-finite; the message says where and what usually helps.

    Its exit code tells such a run from one that a mistake has ended.
    """

    exit_code = 3


class RanksDisagreeError(UserError):
    """Processes of one run that don't train the same thing; the message names them and what differs."""


class UnexpectedResultsError(UserError):
    """An evaluation that is not what ``TEST.EXPECTED_RESULTS`` says.

    Its exit code is that of Detectron2's ``verify_results``.
    """

    exit_code = 1


class RunStopped(UserError):
    """A run that was asked to stop: it is saved, and ``--resume`` continues it.

    Its exit code is sysexits' ``EX_TEMPFAIL``, "try again later": job scripts tell it from a failure.
    """

    exit_code = 75
    label = "stopped"
