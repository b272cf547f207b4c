"""The terminal that progress bars and log lines share.

Bars stay at the bottom, everything else goes above them. There is no refresh thread: a data-loader worker
forked while such a thread held the terminal's lock would wait for it for ever.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import time
from collections.abc import Iterable, Sequence
from typing import TextIO

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TaskID, TextColumn
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


class _Bars(Progress):
    """Each bar, and below it its own lines."""

    def get_renderables(self) -> Iterable[RenderableType]:
        for task in self.tasks:
            yield self.make_tasks_table([task])
            yield from task.fields["below"]


class Display:
    """The bars at the bottom of a terminal; made on standard output when the first one comes."""

    def __init__(self) -> None:
        self._bars: _Bars | None = None
        self._streams: tuple[TextIO, TextIO] = (sys.stdout, sys.stderr)
        self._drawn = 0.0
        self._pid = os.getpid()

    @property
    def active(self) -> bool:
        """Whether bars are on the screen and owned by this very process (not by its parent)."""
        return self._bars is not None and self._pid == os.getpid()

    def add(self, label: str, total: int) -> TaskID:
        """Show a bar below those already there."""
        if self._bars is None:
            self._pid = os.getpid()
            self._streams = (sys.stdout, sys.stderr)
            self._bars = _Bars(
                TextColumn("{task.description} ", style="bold", markup=False),
                BarColumn(bar_width=None, complete_style="cyan", finished_style="green"),
                TextColumn(" {task.fields[facts]}", markup=False),
                console=Console(file=sys.stdout, highlight=False),
                auto_refresh=False,
                expand=True,
            )
            self._bars.start()
        return self._bars.add_task(label, total=max(total, 1), facts="", below=())

    def show(
        self,
        bar: TaskID,
        done: int,
        facts: Sequence[str],
        below: Sequence[RenderableType] = (),
        *,
        now: bool = False,
    ) -> None:
        """Set a bar, and draw if the last drawing is old enough or this is to be seen ``now``."""
        if self._bars is None or not self.active:
            return
        if self._bars.console.width < 60:  # no room for a bar beside them all
            facts = [facts[0], facts[-1]]
        self._bars.update(bar, completed=done, facts="  ".join(facts), below=below)
        clock = time.monotonic()
        if now or clock - self._drawn >= REFRESH_SECONDS:
            self._drawn = clock
            try:
                self._bars.refresh()
            except OSError:  # the terminal is gone
                self.close()

    def remove(self, bar: TaskID, *, keep: bool) -> None:
        """Take a bar off the display; with ``keep`` the last one's state stays above what comes."""
        if self._bars is None or bar not in self._bars.task_ids:
            return
        if len(self._bars.task_ids) == 1:
            self.close(keep=keep)
        else:
            self._bars.remove_task(bar)
            self._bars.refresh()

    def print_above(self, text: Text) -> None:
        """Print a line above the bars, if any, broken by the terminal alone so that it copies as one line."""
        console = self._bars.console if self._bars is not None else Console()
        console.print(text, soft_wrap=True, highlight=False)

    def close(self, *, keep: bool = True) -> None:
        """Leave the terminal as it should be: bars where they ended or gone, the cursor visible."""
        if self._bars is not None and self.active:
            bars, self._bars = self._bars, None
            bars.live.transient = not keep
            with contextlib.suppress(OSError):  # it may be gone
                bars.stop()

    def leave_to_parent(self) -> None:
        """In a forked child: the bars are the parent's; write to the plain streams."""
        if self._bars is not None:
            self._bars = None
            sys.stdout, sys.stderr = self._streams


DISPLAY = Display()
atexit.register(DISPLAY.close)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=DISPLAY.leave_to_parent)
