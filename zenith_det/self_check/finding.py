"""What a check found."""

from __future__ import annotations

from dataclasses import dataclass, field

OK, SLOW, BROKEN, NOT_CHECKED = "ok", "slower than expected", "broken", "not checked"

SEND = "send the file that --json writes with a bug report"


@dataclass(frozen=True)
class Finding:
    """The result of a check.

    Attributes:
        verdict: ``"ok"``, ``"slower than expected"``, ``"broken"``, or ``"not checked"`` with the reason in ``found``.
        found: what was seen, in a few words.
        to_do: what the user can do; "" where nothing is to be done.
        figures: for a bug report: times in seconds, memory in bytes.
        details: a traceback or the end of a process's output; "" where there is none.
    """

    verdict: str
    found: str
    to_do: str = ""
    figures: dict[str, float] = field(default_factory=dict)
    details: str = ""


def broken(found: str, details: str = "") -> Finding:
    """Something doesn't do what it should."""
    return Finding(BROKEN, found, SEND, details=details)


def not_checked(why: str) -> Finding:
    """Something that this machine doesn't have."""
    return Finding(NOT_CHECKED, why)
