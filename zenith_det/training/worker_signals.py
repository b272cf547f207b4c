"""Data-loader workers leave it to the main process when a run ends."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

_listening = False


@contextlib.contextmanager
def stop_signals_held_back() -> Iterator[None]:
    """Start data-loader workers within it: no stop signal ends one before it is ready.

    A worker that is spawned imports for seconds before :func:`ignore_stop_signals` can run in it; it starts
    with its parent's signal mask. Here, in the parent, the signals arrive on leaving. (Workers of a fork server
    have that one's mask: a moment remains in which a signal ends them.)
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore_stop_signals() -> None:
    """Let this process, a data-loader worker, outlive the signals that a terminal or a scheduler sends to all.

    SIGINT, SIGTERM and SIGUSR1: the main process still needs batches to finish its iteration, and a worker that
    died would end it with an error. Workers end when the main process closes or terminates them, and by torch's
    watchdog when it is gone. To be called in the worker's main thread, and never in the main process; harmless
    to call again.
    """
    global _listening
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGUSR1"):
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    # Not SIG_IGN for SIGTERM: an interpreter that exits with loaders open sends it to their workers, and then
    # waits for them without end. Where its sender can't be told (macOS) it ends the worker, as ever.
    if _listening or not hasattr(signal, "sigwaitinfo"):
        return
    _listening = True
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_at_the_main_process_word, args=(os.getppid(),), daemon=True).start()


def _end_at_the_main_process_word(main_process: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != main_process:
        pass
    os._exit(0)
