"""Data-loader workers leave it to the main process when a run ends."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator

import torch.multiprocessing as mp

from zenith_det.training.processes.stopping import STOP_SIGNALS

_listening: int | None = None  # the process that has made its arrangements


@contextlib.contextmanager
def starting_workers() -> Iterator[None]:
    """Within it, stop signals wait: a worker forked here is not hit before it can see to itself.

    To be put around ``iter(loader)`` in the main process, which gets its signals afterwards.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore_stop_signals() -> None:
    """Let this process, a data-loader worker, outlive the signals that stop a run.

    The main process still needs batches to finish its iteration; a worker that died would end it with an
    error. Workers end when the main process closes or terminates them, and with it when it is killed: on Linux at
    once, elsewhere by torch's watchdog, unless they have more to hand over than fits into the pipe, which nobody reads.
    To be called in the worker's main thread, as often as one likes, and never in the main process.
    """
    global _listening
    if _listening == os.getpid():
        return
    _listening = os.getpid()
    if sys.platform.startswith("linux"):
        parent = os.getppid()
        mp._prctl_pr_set_pdeathsig(signal.SIGKILL)  # type: ignore[attr-defined]
        if os.getppid() != parent:  # it has ended in between
            os._exit(0)
    for name in ("SIGINT", "SIGUSR1", "SIGHUP"):  # Windows lacks some
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        # multiprocessing terminates workers by SIGTERM and then waits for them: the parent's has to be obeyed.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_obey_the_parent, daemon=True).start()


def _obey_the_parent() -> None:
    while True:
        received = signal.sigwaitinfo({signal.SIGTERM})
        if received.si_pid == os.getppid():
            os._exit(0)
