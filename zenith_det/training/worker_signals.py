"""Data-loader workers leave it to the main process when a run ends."""

from __future__ import annotations

import signal

# What a terminal or a scheduler sends to all processes of a job when the run should stop. (Windows lacks one.)
STOP_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)
)


def ignore_stop_signals() -> None:
    """Let this process, a data-loader worker, outlive the signals that stop a run.

    The main process still needs batches to finish its iteration; a worker that died would end it with an
    error. Workers end when the main process closes them, and by torch's watchdog when it is gone. To be called
    in the worker's main thread, and never in the main process.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
