"""Loader workers that can't hand over what they read, are killed, or hang: told in a line, and nothing is lost."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from torch.utils.data import DataLoader

from tests.reliability import runs
from zenith_det.training.processes import loader_wait
from zenith_det.training.processes.loader_wait import LoaderError, WatchedBatches

#: Runs what follows with so little shared memory, seen by nobody else.
LITTLE_SHARED_MEMORY = [
    "unshare", "--mount", "sh", "-c", 'mount -t tmpfs -o size=256k tmpfs /dev/shm && exec "$@"', "sh",
]  # fmt: skip


def error_lines(printed: str) -> list[str]:
    return [line for line in printed.splitlines() if line.startswith("error: ")]


@pytest.mark.parametrize("engine", runs.ENGINES)
def test_too_little_shared_memory_is_told_in_one_line(engine: str, data: Path, tmp_path: Path) -> None:
    runs.need(engine)
    tried = subprocess.run([*LITTLE_SHARED_MEMORY, "true"], capture_output=True, text=True)
    if tried.returncode != 0:
        pytest.skip(f"needs the right to mount a small /dev/shm: {tried.stderr.strip()}")
    words = runs.arguments(engine, data, tmp_path, INPUT__MIN_SIZE_TRAIN="(400,)")
    code, printed = runs.run(words, launcher=[*LITTLE_SHARED_MEMORY, sys.executable])
    assert code == 2, printed
    (line,) = error_lines(printed)
    assert "/dev/shm is full: it holds 0 MiB" in line
    assert "set DATALOADER.NUM_WORKERS 0" in line
    assert "docker run --shm-size" in line
    assert "Traceback" not in printed


def long_folder(tmp_path: Path) -> Path:
    folder = tmp_path / ("long" * 25)
    folder.mkdir()
    return folder


@pytest.mark.parametrize("engine", runs.ENGINES)
def test_a_temporary_folder_too_long_for_sockets_is_no_hindrance(
    engine: str, data: Path, tmp_path: Path
) -> None:
    runs.need(engine)
    folder = long_folder(tmp_path)
    words = runs.arguments(engine, data, tmp_path / "run")
    code, printed = runs.run(words, {"temporary": str(folder)}, launcher=[sys.executable])
    assert code == 0, printed
    assert not list(folder.iterdir())


def test_where_no_temporary_folder_is_short_enough_that_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(long_folder(tmp_path)))
    monkeypatch.setattr(loader_wait, "_SHORT", ())
    with pytest.raises(LoaderError, match=r"too long .*: set TMPDIR to one of at most 71 characters, or "):
        WatchedBatches(DataLoader([1, 2], num_workers=1))


@pytest.mark.parametrize("engine", runs.ENGINES)
def test_a_killed_worker_ends_the_run_saved_and_it_goes_on(
    engine: str, data: Path, tmp_path: Path, undisturbed: Callable[[str], Path]
) -> None:
    whole = undisturbed(engine)
    code, printed = runs.run(runs.arguments(engine, data, tmp_path), {"kill_worker": 5})
    assert code == 2, printed
    (line,) = error_lines(printed)
    assert "was ended by SIGKILL, as the system does where memory runs out: " in line
    assert "GiB is free now" in line
    assert line.endswith(f"everything is saved in {tmp_path}: go on with --resume")
    assert "Traceback" not in printed
    assert (tmp_path / "last_checkpoint").read_text() in ("model_0000005.pth", "model_0000006.pth")
    code, printed = runs.run(runs.arguments(engine, data, tmp_path, resume=True))
    assert code == 0, printed
    runs.assert_same_result(whole, tmp_path)


@pytest.mark.parametrize("engine", runs.ENGINES)
@pytest.mark.parametrize(("processes", "workers"), [(1, 2), (2, 2), (1, 0)])
def test_a_signal_ends_a_wait_for_a_batch_that_never_comes(
    engine: str, processes: int, workers: int, data: Path, tmp_path: Path
) -> None:
    runs.need(engine)
    # Batch 6 never comes. Two workers take turns; a batch is of two images, or of one for each of two processes.
    stalled = 1 + 6 // max(workers, 1) * (2 // processes)
    faults = {
        "rank": processes - 1, "stall": stalled, "signal_after": str(tmp_path / "model_0000004.pth"),
    }  # fmt: skip
    words = runs.arguments(
        engine, data, tmp_path, SOLVER__CHECKPOINT_PERIOD=1, CHECKPOINT__KEEP=0,
        DATALOADER__NUM_WORKERS=workers,
    )  # fmt: skip
    code, printed = runs.run(words, faults, processes=processes)
    assert code == 75, printed
    assert "stopped: after iteration 5: it received SIGTERM; everything is saved" in printed
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000005.pth"


@pytest.mark.parametrize("engine", runs.ENGINES)
def test_the_deadline_ends_a_wait_for_the_first_batch(engine: str, data: Path, tmp_path: Path) -> None:
    runs.need(engine)
    words = runs.arguments(engine, data, tmp_path, "--max-time", "5s")
    code, printed = runs.run(words, {"stall": 1})
    assert code == 75, printed
    assert "stopped: before iteration 0: its time (--max-time) is up while it waited for a batch" in printed
