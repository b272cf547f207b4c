"""One run at a time in a folder: the second is told, and a dead owner holds nothing."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from tests.reliability import runs
from tests.reliability.kill_runs import exit_code, fork, kill_me
from zenith_det.errors import UserError
from zenith_det.training.course import output_lock
from zenith_det.training.course.output_lock import LOCK_FILE, OutputLock


@pytest.mark.parametrize("engine", runs.ENGINES)
def test_a_second_run_is_told_and_changes_nothing(engine: str, data: Path, tmp_path: Path) -> None:
    runs.need(engine)
    with OutputLock(tmp_path):
        before = sorted(tmp_path.iterdir())
        for flag in ("--resume", "--eval-only"):
            code, printed = runs.run(runs.arguments(engine, data, tmp_path, flag))
            assert code == 2, printed
            (line,) = [line for line in printed.splitlines() if line.startswith("error: ")]
            assert f"{tmp_path} belongs to another run that is still going: process {os.getpid()} on" in line
            assert "choose another OUTPUT_DIR" in line
            assert "Traceback" not in printed
        assert sorted(tmp_path.iterdir()) == before == [tmp_path / LOCK_FILE]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("engine", runs.ENGINES)
def test_of_two_started_together_one_trains_and_the_other_is_told(
    engine: str, data: Path, tmp_path: Path
) -> None:
    runs.need(engine)
    words = runs.arguments(engine, data, tmp_path, SOLVER__MAX_ITER=2000, TEST__EVAL_PERIOD=0)
    both = [runs.start(words) for _ in range(2)]
    while all(one.poll() is None for one in both):
        time.sleep(0.1)
    first, second = sorted(both, key=lambda one: one.poll() is not None)
    code, printed = runs.finish(second)
    assert code == 2, printed
    assert "belongs to another run that is still going" in printed
    runs.wait_for(first, "iter: 19")
    first.send_signal(signal.SIGTERM)
    code, printed = runs.finish(first)
    assert code == 75, printed
    assert "Traceback" not in printed


def test_an_owner_that_was_killed_holds_nothing(tmp_path: Path) -> None:
    def take_and_die() -> None:
        OutputLock(tmp_path).__enter__()
        kill_me()

    assert exit_code(fork(take_and_die)) == -signal.SIGKILL
    assert (tmp_path / LOCK_FILE).exists()
    with OutputLock(tmp_path):
        assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()


def test_children_that_outlive_the_owner_do_not_hold_it(tmp_path: Path) -> None:
    reader, writer = os.pipe()

    def take_fork_and_die() -> None:
        OutputLock(tmp_path).__enter__()
        if os.fork() == 0:
            os.close(writer)
            os.read(reader, 1)
            os._exit(0)
        kill_me()

    assert exit_code(fork(take_fork_and_die)) == -signal.SIGKILL
    with OutputLock(tmp_path):
        pass
    os.close(writer)
    os.close(reader)


def test_without_locks_the_owner_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_lock, "fcntl", None)
    with OutputLock(tmp_path):
        assert exit_code(fork(lambda: _told(tmp_path))) == 0
    dead = {"host": output_lock.socket.gethostname(), "pid": os.getpid(), "started": 1.0}
    (tmp_path / LOCK_FILE).write_text(json.dumps(dead))  # its number has been given to another process since
    with OutputLock(tmp_path):
        pass
    (tmp_path / LOCK_FILE).write_text("half a li")
    with OutputLock(tmp_path):
        pass


def _told(folder: Path) -> int:
    try:
        OutputLock(folder).__enter__()
    except UserError as error:
        return int("still going: process" not in str(error))
    return 1
