"""Names of keys: all of them, and the one that a misspelt key was meant to be."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

_KEY = re.compile(r"([A-Z][A-Z0-9_]*)((?:\.[A-Z0-9_]+)*)")
_CLOSE = 0.6  # difflib's own idea of a close match
_SAME_NAME = 0.3  # what a right name in the wrong section counts for
_LONGEST = 200  # characters of what could be a misspelt name; comparing takes quadratic time


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each value of a nested mapping with its dotted key, such as ``("SOLVER.BASE_LR", 0.02)``."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def plain(value: Any) -> Any:
    """Lists for tuples at any depth: YAML knows lists alone, and a checkpoint gives back what it got."""
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def sections(tree: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield the dotted name of each nested mapping, such as ``"SOLVER.ZENITH"``."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield f"{prefix}{name}"
            yield from sections(value, f"{prefix}{name}.")


def is_key(word: str, cfg: Mapping[str, Any]) -> bool:
    """Whether a word of a command line is a KEY.

    Files of a camera look like one, too (``DSC_0001.JPG``): the first part must be one of the configuration's.
    """
    match = _KEY.fullmatch(word)
    return bool(match and match[1] in cfg and bool(match[2]) == isinstance(cfg[match[1]], Mapping))


def nearest(wanted: str, known: Iterable[str]) -> str | None:
    """Return the known key that ``wanted`` most likely means, or ``None`` where nothing comes near.

    A right name in the wrong section is near: ``BASE_LR`` means ``SOLVER.BASE_LR``.
    """
    if len(wanted) > _LONGEST:
        return None
    best, best_score = None, _CLOSE
    folded = wanted.casefold()
    matcher = difflib.SequenceMatcher(b=folded)
    for key in known:
        candidate = key.casefold()
        matcher.set_seq1(candidate)
        same_name = candidate.rpartition(".")[2] == folded.rpartition(".")[2]
        score = matcher.ratio() + (_SAME_NAME if same_name else 0.0)
        if score > best_score:
            best, best_score = key, score
    return best


def did_you_mean(wanted: str, known: Iterable[str]) -> str:
    """Return ``": did you mean X?"`` for the end of an error message, or ``""`` where nothing comes near."""
    found = nearest(wanted, known)
    return f": did you mean {found}?" if found else ""
