"""Ending a run before its time, with everything saved: on a signal, or when its time is up.

Schedulers send SIGTERM or SIGUSR1 before they take a machine away, a person sends SIGINT (Ctrl-C), and a terminal
that is closed (a dropped ssh) SIGHUP.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Any

from typing_extensions import Self

from zenith_det.errors import ConfigError
from zenith_det.training.logs import terminal

#: Signals that end a run after its iteration; each a second time, at once.
STOP_SIGNALS: tuple[signal.Signals, ...] = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP") if hasattr(signal, name)
)
#: What :meth:`StopRequest.code` gives when the time is up; other codes are signal numbers.
TIME_IS_UP = 1000
# A save takes as long as the last one, or longer on a busy file system; the first one is a guess.
SAVE_SECONDS = 10.0
SAVE_MARGIN = 2.0

_UNITS = {"d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0}
_interruptible = False
_open: StopRequest | None = None  # the one that is open in this process
_launcher: Any = None  # shared memory in which a launcher tells its processes of the signals that it got


def stop_code(*, waiting: bool = False) -> int:
    """What the open :class:`StopRequest` says; 0 where none is open."""
    return _open.code(waiting=waiting) if _open is not None else 0


class EvaluationStopped(Exception):
    """An evaluation that was broken off, on all ranks together, because the run has to end."""


class WaitStopped(Exception):
    """The run was asked to end while it waited for a batch."""


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Around a wait that changes nothing: a stop signal to this process ends it at once.

    Raises:
        WaitStopped: from the signal's handler.
    """
    global _interruptible
    _interruptible = True
    try:
        yield
    finally:
        _interruptible = False


def parse_duration(text: str) -> float:
    """Seconds in ``"3h30m"``, ``"90m"``, ``"1d12h"``, ``"3:30:00"`` (hours, minutes, seconds) or ``"5400"``.

    Raises:
        ConfigError: it is none of these, or not above 0.
    """
    text = text.strip().lower()
    parts = re.findall(r"(\d+(?:\.\d+)?)([dhms])", text)
    seconds = 0.0
    if parts and "".join(number + unit for number, unit in parts) == text:
        seconds = sum(float(number) * _UNITS[unit] for number, unit in parts)
    elif re.fullmatch(r"(\d+:)?\d+:\d\d(\.\d+)?", text):
        for number in text.split(":"):
            seconds = seconds * 60 + float(number)
    elif re.fullmatch(r"\d+(\.\d+)?", text):
        seconds = float(text)
    if not 0 < seconds < 1e10:
        raise ConfigError(f"{text!r} is no duration: give 3h30m, 90m, 1d12h, 3:30:00 or seconds")
    return seconds


def describe_stop(code: int) -> str:
    """Why a run stops, from the code that :meth:`StopRequest.code` gave on any rank."""
    if code == TIME_IS_UP:
        return "its time (--max-time) is up"
    return f"it received {signal.Signals(code).name}"


@contextlib.contextmanager
def _catching(receive: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Let ``receive`` get :data:`STOP_SIGNALS`, where Python allows it: in the main thread."""
    before: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number in STOP_SIGNALS:
            if number.name == "SIGHUP" and signal.getsignal(number) is signal.SIG_IGN:
                continue  # by nohup: the run is to outlive its terminal
            before[number] = signal.signal(number, receive)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


class StopRequest:
    """Whether the run has to end; a context manager that catches :data:`STOP_SIGNALS` while it is open.

    The first signal is only remembered: the training loop asks :meth:`code` after each iteration. A second
    signal to this process ends it at once, as if nobody had caught it.

    Args:
        deadline: ``time.time()`` at which everything must have been saved; ``None``: no limit.
        main: whether this is the process whose clock counts (rank 0).

    Outside the main thread, where Python lets nobody catch signals, the deadline alone counts.
    """

    def __init__(self, deadline: float | None = None, *, main: bool = True) -> None:
        self._deadline = deadline
        self._main = main
        self._time_is_up = False
        self._received = 0
        self._slowest = 0.0
        self._save_seconds = SAVE_SECONDS
        self._catching = contextlib.ExitStack()

    def __enter__(self) -> Self:
        global _open
        _open = self
        self._catching.enter_context(_catching(self._receive))
        return self

    def __exit__(self, *error: object) -> None:
        global _open
        _open = None
        self._catching.close()

    def code(self, *, waiting: bool = False) -> int:
        """0: go on; else why to stop: a signal's number, or :data:`TIME_IS_UP`.

        Args:
            waiting: for what may never come: then this process's clock counts, whichever it is.
        """
        if self._received:
            return self._received
        if _launcher is not None and _launcher.value:
            return int(_launcher.value)
        if self._deadline is not None and (self._main or waiting):
            needed = self._slowest + SAVE_MARGIN * self._save_seconds
            self._time_is_up |= time.time() + needed >= self._deadline
        return TIME_IS_UP if self._time_is_up else 0

    def note_iteration(self, seconds: float) -> None:
        """How long an iteration took: the deadline leaves room for one more like the slowest."""
        self._slowest = max(self._slowest, seconds)

    def note_save(self, seconds: float) -> None:
        """How long saving took; see :meth:`note_iteration`."""
        self._save_seconds = seconds

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._received:
            terminal.DISPLAY.close()  # the cursor is the shell's again
            end_by(number)
        self._received = number
        if _interruptible:
            raise WaitStopped


def end_by(number: int) -> None:
    """End this process by a signal, as if nobody had caught it."""
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def listen_to_launcher(flag: Any) -> None:
    """In a process that :func:`zenith_det.training.processes.launching.launch` started: heed the signals it got.

    Args:
        flag: a shared integer, 0 until the launcher gets a signal, then the signal's number.
    """
    global _launcher
    _launcher = flag


@contextlib.contextmanager
def relaying_signals(flag: Any, processes: Iterable[Any]) -> Iterator[None]:
    """In a launcher: pass signals on to the processes started, once; end them at a second signal.

    Args:
        flag: see :func:`listen_to_launcher`.
        processes: those started.
    """

    def receive(number: int, frame: FrameType | None) -> None:
        # Not a signal to the processes: a terminal or a scheduler may have sent them one as well, and two
        # would mean "at once".
        if flag.value:
            for process in processes:
                process.kill()
            end_by(number)
        flag.value = number

    with _catching(receive):
        yield
