"""Loader workers outlive the signals that stop a run, but not the run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/stat").exists(), reason="reads the state of processes in /proc"
)

PROGRAM = """
import sys, time, torch
from torch.utils.data import DataLoader
from zenith_det.training.processes.worker_signals import ignore_stop_signals, starting_workers

class Images(torch.utils.data.Dataset):
    def __len__(self): return 10**6
    def __getitem__(self, index): return "x" * 2**20  # more than a pipe holds

def start(worker):
    time.sleep(2)  # as spawned workers do that import for seconds
    ignore_stop_signals()
    ignore_stop_signals()

loader = DataLoader(Images(), num_workers=2, worker_init_fn=start)
with starting_workers():
    stream = iter(loader)
if sys.argv[1] == "started":
    next(stream), next(stream)  # one of each worker
print(*[worker.pid for worker in stream._workers], flush=True)
for line in sys.stdin:
    if line == "fail\\n":
        raise RuntimeError("with the loader open")
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


def all_end(pids: list[int]) -> bool:
    deadline = time.monotonic() + 60  # torch's watchdog looks every five seconds
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.2)
    return not any(map(alive, pids))


@pytest.fixture(params=["starting", "started"])
def main(request: pytest.FixtureRequest) -> Iterator[subprocess.Popen[str]]:
    started = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, request.param],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=ROOT,
    )
    yield started
    started.kill()
    started.communicate()


def workers_of(main: subprocess.Popen[str]) -> list[int]:
    assert main.stdout is not None
    workers = [int(word) for word in main.stdout.readline().split()]
    assert len(workers) == 2
    return workers


def tell(main: subprocess.Popen[str], line: str) -> None:
    assert main.stdin is not None
    main.stdin.write(line + "\n")
    main.stdin.flush()


def test_workers_outlive_stop_signals_and_end_with_a_killed_main_process(main: subprocess.Popen[str]) -> None:
    workers = workers_of(main)
    for pid in workers:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            os.kill(pid, number)
    tell(main, "go on")
    assert main.stdout is not None
    assert main.stdout.readline() == "read\n"
    assert all(map(alive, workers))
    main.kill()
    assert all_end(workers)


def test_a_main_process_that_fails_ends_with_its_workers(main: subprocess.Popen[str]) -> None:
    """The interpreter terminates daemonic children at exit, and waits for them."""
    workers = workers_of(main)
    tell(main, "fail")
    assert main.wait(timeout=60) == 1
    assert all_end(workers)
