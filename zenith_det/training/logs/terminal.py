"""The terminal that progress bars and log lines share.

Bars stay at the bottom, everything else goes above them. There is no refresh thread: a data-loader worker
forked while such a thread held the terminal's lock would wait for it for ever.
"""

from __future__ import annotations

import atexit
import os
import sys
import time
from typing import TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

REFRESH_SECONDS = 0.1


def is_interactive(stream: TextIO | None = None) -> bool:
    """Whether a person watches: ``stream`` (default: standard output) is a terminal that can move its cursor.

    ``FORCE_COLOR`` and the like don't count: they ask for colours in a file, not for a moving bar.
    """
    stream = sys.stdout if stream is None else stream
    try:
        return stream.isatty() and os.environ.get("TERM", "").lower() not in ("dumb", "unknown")
    except (AttributeError, ValueError):  # replaced or closed
        return False


class Section:
    """A part of the live display: a bar and what belongs to it."""

    def render(self, width: int) -> RenderableType:
        """What to show now, for a terminal ``width`` columns wide."""
        raise NotImplementedError


class Display:
    """The live sections at the bottom of a terminal.

    Args:
        console: where to draw; ``None`` makes one on standard output when the first section comes.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._given = console
        self._sections: list[Section] = []
        self._live: Live | None = None
        self._streams: tuple[TextIO, TextIO] = (sys.stdout, sys.stderr)
        self._drawn = 0.0
        self._pid = os.getpid()

    @property
    def active(self) -> bool:
        """Whether bars are on the screen and owned by this very process (not by its parent)."""
        return self._live is not None and self._pid == os.getpid()

    def add(self, section: Section) -> None:
        """Show ``section`` below those already there."""
        self._sections.append(section)
        if self._live is None:
            console = self._given or Console(file=sys.stdout, highlight=False)
            self._pid = os.getpid()
            self._streams = (sys.stdout, sys.stderr)
            self._live = Live(
                console=console, auto_refresh=False, get_renderable=self._render, vertical_overflow="visible"
            )
            self._live.start()
        self.refresh(force=True)

    def remove(self, section: Section, *, keep: bool) -> None:
        """Take ``section`` off the display; with ``keep`` its last state stays above."""
        if section not in self._sections:
            return
        self._sections.remove(section)
        if self._live is None:
            return
        console = self._live.console
        if not self._sections:
            # An empty last frame, so that what is kept is printed once, as ordinary text.
            self._stop()
        if keep:
            console.print(section.render(console.width))
        if self._live is not None:
            self.refresh(force=True)

    def refresh(self, *, force: bool = False) -> None:
        """Draw again, if the last drawing is old enough."""
        now = time.monotonic()
        if self._live is not None and self.active and (force or now - self._drawn >= REFRESH_SECONDS):
            self._drawn = now
            self._live.refresh()

    def print_above(self, text: Text) -> None:
        """Print a line above the bars, broken by the terminal alone so that it copies as one line."""
        assert self._live is not None
        self._live.console.print(text, soft_wrap=True, highlight=False)

    def close(self) -> None:
        """Leave the terminal as it should be: bars where they ended, the cursor visible."""
        if self._live is not None and self.active:
            self._sections.clear()
            self._stop(transient=False)

    def _stop(self, *, transient: bool = True) -> None:
        live, self._live = self._live, None
        if live is not None:
            live.transient = transient
            live.stop()

    def _render(self) -> RenderableType:
        width = self._live.console.width if self._live is not None else 80
        return Group(*(section.render(width) for section in self._sections))

    def leave_to_parent(self) -> None:
        """In a forked child: the bars are the parent's; write to the plain streams."""
        if self._live is not None:
            self._live = None
            self._sections = []
            sys.stdout, sys.stderr = self._streams


DISPLAY = Display()
atexit.register(DISPLAY.close)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=DISPLAY.leave_to_parent)
