"""Waiting for a data loader: a wait ends when the run has to end, and when a worker can't go on."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import threading
import weakref
from collections.abc import Iterable, Iterator
from multiprocessing.queues import Queue
from multiprocessing.util import Finalize, get_temp_dir
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import torch
from torch._utils import ExceptionWrapper
from torch.utils.data import DataLoader, get_worker_info

from zenith_det.errors import UserError, one_line
from zenith_det.training.logs.memory import memory_left
from zenith_det.training.processes.stopping import WaitStopped, interruptible, stop_code
from zenith_det.training.processes.worker_signals import ignore_stop_signals, starting_workers

__all__ = ["LoaderError", "WatchedBatches", "begin_worker", "until_stopped"]

#: How long a stop request, or a worker's death, may go unseen.
POLL_SECONDS = 1
_SHARED = Path("/dev/shm")
_FIRST = "set DATALOADER.NUM_WORKERS 0 (the run's own process loads, without shared memory)"

#: A socket's path may have 103 characters where it may have fewest (macOS); "/pymp-12345678/listener-12345678" follows.
_LONGEST = 103 - 32
_SHORT = ("/tmp", "/var/tmp")

#: Seconds of a wait after which it is told.
_TOLD_AFTER = (60, 600)

logger = logging.getLogger(__name__)

_started: weakref.WeakSet[Any] = weakref.WeakSet()
_killing = 0  # the process that kills its workers when it ends
_waiting: WatchedBatches | None = None
_before: Any = None  # what handled SIGCHLD before a loader of ours was started


class LoaderError(UserError):
    """Loader workers that were ended, or can't hand over what they have read."""


class WatchedBatches(Iterator[list[Any]]):
    """A loader's batches; its workers leave signals to this process.

    torch waits for a batch that was lost on its way for ever, and tells of a worker's death wherever the process
    is just then, maybe half-way through a step. Here both are told by the call that waits for a batch, and a stop
    request ends the wait.

    Args:
        loader: its ``timeout`` is set. Its ``worker_init_fn`` calls :func:`begin_worker`, or its dataset does.

    Raises:
        LoaderError: when iterated over; a worker was ended, or can't hand a batch over.
        WaitStopped: when iterated over; no batch has come, and the run has to end.
    """

    def __init__(self, loader: DataLoader[Any]) -> None:
        if loader.num_workers:
            loader.timeout = POLL_SECONDS
            if "cv2" in sys.modules:
                # A worker forked from a process whose OpenCV has threads would wait for them, and there are none.
                sys.modules["cv2"].setNumThreads(0)
            _make_sockets_folder()
        others = set(multiprocessing.active_children())
        before = signal.getsignal(signal.SIGCHLD) if hasattr(signal, "SIGCHLD") else None
        with starting_workers():
            self._iterator = iter(loader)
        self._workers = [one for one in multiprocessing.active_children() if one not in others]
        if self._workers:
            _be_told_of_deaths(before)
            _end_with_this_process(self._workers)

    def __next__(self) -> list[Any]:
        global _waiting
        waited = 0
        while True:
            try:
                with interruptible():
                    _waiting = self
                    self.check()
                    batch: list[Any] = next(self._iterator)
                    return batch
            except RuntimeError as error:
                _waiting = None
                self.check()
                reason = str(error)
                if reason.startswith("DataLoader timed out"):
                    if stop_code(waiting=True):
                        raise WaitStopped from None
                    waited += POLL_SECONDS
                    if waited in _TOLD_AFTER or waited % 3600 == 0:
                        logger.warning("no batch for %d s: %s", waited, self._what_they_do())
                elif "Too many open files" in reason or "ancdata" in reason:
                    raise LoaderError(
                        "too many open files: the loader's workers hand over each tensor as one: raise the limit "
                        f"(ulimit -n 65536), or {_FIRST}"
                    ) from error
                elif "exited unexpectedly" in reason:
                    raise LoaderError(
                        f"a loader worker ended by itself ({one_line(reason, 200)}); DATALOADER.NUM_WORKERS 0 shows why"
                    ) from error
                else:
                    raise
            finally:
                _waiting = None

    def _what_they_do(self) -> str:
        told = []
        for worker in self._workers:
            with contextlib.suppress(psutil.Error):
                process = psutil.Process(worker.pid)
                told.append(
                    f"{worker.pid} {process.status()}, {sum(process.cpu_times()[:2]):.1f} s of CPU time"
                )
        return f"a file system that hangs, or very slow images? the loader's workers: {'; '.join(told)}"

    def check(self) -> None:
        """See that all workers are alive, or have ended as they should.

        Raises:
            LoaderError: one was ended.
        """
        for worker in self._workers:
            if worker.exitcode:
                raise LoaderError(_how_it_ended(worker.pid or 0, worker.exitcode, len(self._workers)))


def begin_worker(worker: int = 0) -> None:
    """Let this process, a loader's worker, leave stop signals to the main one, and tell it what it can't hand over.

    As often as one likes; never in the main process.
    """
    ignore_stop_signals()
    torch.set_num_threads(1)
    # A queue sends from a thread. It prints what goes wrong there and drops the batch, for which the main process
    # would wait.
    Queue._on_queue_feeder_error = _send_the_error  # type: ignore[attr-defined]


def until_stopped(batches: Iterable[Any]) -> Iterator[Any]:
    """``batches``, up to where the run has to end; whoever iterates asks why it came to an end."""
    try:
        yield from batches
    except WaitStopped:
        return


def _make_sockets_folder() -> None:
    """Make the folder of the workers' sockets, this process's; they would make others, and leave them when killed.

    Raises:
        LoaderError: no temporary folder has a path that is short enough for a socket.
    """
    chosen = tempfile.gettempdir()
    fitting = [folder for folder in (chosen, *_SHORT) if len(os.fsencode(folder)) <= _LONGEST]
    usable = [folder for folder in fitting if os.access(folder, os.W_OK | os.X_OK)]
    if not usable:
        raise LoaderError(
            f"the path of the temporary folder {chosen} is too long for the loader workers' sockets: set TMPDIR to one "
            f"of at most {_LONGEST} characters, or {_FIRST}"
        )
    tempfile.tempdir = usable[0]
    try:
        get_temp_dir()
    finally:
        tempfile.tempdir = chosen


def _be_told_of_deaths(before: Any) -> None:
    """Have a worker's death interrupt a wait, and nothing else.

    Args:
        before: the handler of SIGCHLD before torch put in its own, which raises wherever the process is.
    """
    global _before
    if threading.current_thread() is not threading.main_thread():
        return  # there torch has none either
    if (
        before is not _on_death
        and getattr(before, "__module__", "") != torch.utils.data._utils.signal_handling.__name__
    ):
        _before = before
    signal.signal(signal.SIGCHLD, _on_death)


def _end_with_this_process(workers: list[Any]) -> None:
    """Python ends by waiting for its children, for ever if one doesn't heed being asked to end."""
    global _killing
    _started.update(workers)
    if _killing != os.getpid():
        _killing = os.getpid()
        Finalize(None, _kill_workers, exitpriority=100)


def _kill_workers() -> None:
    for worker in list(_started):
        with contextlib.suppress(OSError, ValueError, AssertionError):  # ended, or another process's
            worker.kill()


def _on_death(number: int, frame: FrameType | None) -> None:
    if _waiting is not None:
        _waiting.check()
    if callable(_before):
        _before(number, frame)


def _send_the_error(queue: Any, error: Exception, lost: Any) -> None:
    worker = get_worker_info()
    if worker is None or not isinstance(lost, tuple):
        return
    try:
        raise LoaderError(_not_handed_over(error)) from error
    except LoaderError:
        queue.put((lost[0], ExceptionWrapper(where=f"in DataLoader worker process {worker.id}")))


def _not_handed_over(error: Exception) -> str:
    reason = one_line(str(error) or type(error).__name__, 300)
    if "Too many open files" in reason:
        return f"a loader worker can't hand over a batch: {reason}: raise the limit (ulimit -n 65536), or {_FIRST}"
    if "shared memory" in reason or "shm" in reason or "No space left" in reason:
        return f"a loader worker can't hand over a batch: {_shared_memory()}"
    return f"a loader worker can't hand over a batch: {reason}"


def _shared_memory() -> str:
    try:
        size = shutil.disk_usage(_SHARED)
        found = f"{_SHARED} is full: it holds {_mib(size.total)}, of which {_mib(size.free)} is free"
    except OSError:
        found = "shared memory is full"
    return f"{found}; {_FIRST}, or make it larger (docker run --shm-size 8g)"


def _mib(size: int) -> str:
    return f"{size / 2**20:.0f} MiB" if size < 2**33 else f"{size / 2**30:.0f} GiB"


def _how_it_ended(pid: int, exitcode: int, workers: int) -> str:
    who = f"a loader worker (process {pid} of this run's {workers})"
    if exitcode > 0:
        return f"{who} ended with exit code {exitcode}; DATALOADER.NUM_WORKERS 0 shows why"
    name = signal.Signals(-exitcode).name if -exitcode in set(signal.Signals) else f"signal {-exitcode}"
    if name == "SIGBUS" and os.path.isdir(_SHARED):
        return f"{who} was ended by SIGBUS: {_shared_memory()}"
    if name == "SIGKILL":
        return (
            f"{who} was ended by SIGKILL, as the system does where memory runs out: {memory_left()}; "
            "lower DATALOADER.NUM_WORKERS, or give the run more memory"
        )
    return f"{who} was ended by {name}; DATALOADER.NUM_WORKERS 0 shows where, if it was a library's crash"
