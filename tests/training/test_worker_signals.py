"""Loader workers outlive the signals that stop a run, but not the run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT

PROGRAM = """
import sys, time, torch
from torch.utils.data import DataLoader
from zenith_det.training.worker_signals import ignore_stop_signals, starting_workers

class Images(torch.utils.data.Dataset):
    def __len__(self): return 10**6
    def __getitem__(self, index): return index

if __name__ == "__main__":
    loader = DataLoader(Images(), num_workers=2, worker_init_fn=lambda worker: ignore_stop_signals())
    with starting_workers():
        stream = iter(loader)
    next(stream)
    print(*[worker.pid for worker in stream._workers], flush=True)
    for line in sys.stdin:
        for _ in range(20):
            next(stream)
        print("read", flush=True)
"""


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads the state of processes in /proc")
def test_workers_outlive_stop_signals_and_end_with_the_main_process() -> None:
    main = subprocess.Popen(
        [sys.executable, "-c", PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    try:
        assert main.stdin is not None
        assert main.stdout is not None
        workers = [int(word) for word in main.stdout.readline().split()]
        assert len(workers) == 2
        for pid in workers:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
                os.kill(pid, number)
        main.stdin.write("go on\n")
        main.stdin.flush()
        assert main.stdout.readline() == "read\n"
        assert all(alive(pid) for pid in workers)
    finally:
        main.kill()
        main.communicate()
    deadline = time.monotonic() + 60  # torch's watchdog looks every five seconds
    while any(alive(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not any(alive(pid) for pid in workers)


def test_a_main_process_that_ends_with_its_loader_open_does_not_wait_for_ever() -> None:
    """multiprocessing terminates the workers it finds at exit, and waits for them."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], input="go on\n", capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "read" in done.stdout
