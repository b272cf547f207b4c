"""Runs that are asked to end: by a signal, twice, by the clock, in several processes, in an evaluation."""

from __future__ import annotations

import os
import pty
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.reliability import runs
from zenith_det.errors import ConfigError
from zenith_det.training.processes.stopping import StopRequest, parse_duration


@pytest.mark.parametrize("engine", runs.ENGINES)
def test_a_signal_saves_ends_with_75_and_the_resumed_run_is_the_whole_one(
    engine: str, data: Path, tmp_path: Path, undisturbed: Callable[[str], Path]
) -> None:
    whole = undisturbed(engine)
    code, printed = runs.run(runs.arguments(engine, data, tmp_path), {"kill": {5: int(signal.SIGTERM)}})
    assert code == 75, printed
    assert [line for line in printed.splitlines() if line.startswith("stopped: ")] == [
        f"stopped: after iteration 5: it received SIGTERM; everything is saved in {tmp_path}: go on with --resume"
    ]
    assert "Traceback" not in printed
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000005.pth"
    code, printed = runs.run(runs.arguments(engine, data, tmp_path, resume=True))
    assert code == 0, printed
    runs.assert_same_result(whole, tmp_path)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"])
def test_every_signal_that_stops_a_run_is_remembered(name: str) -> None:
    need_signal(name)
    number = getattr(signal, name)
    with StopRequest() as stop:
        os.kill(os.getpid(), number)
        assert stop.code() == number


def need_signal(name: str) -> None:
    """Skip where it is ignored: so it is in the processes that are started here."""
    if signal.getsignal(getattr(signal, name)) is signal.SIG_IGN:
        pytest.skip(f"{name} is ignored here, as under nohup")


def test_a_second_signal_ends_at_once(data: Path, tmp_path: Path) -> None:
    # Two before the iteration ends: nothing is saved.
    faults = {"kill": {3: int(signal.SIGTERM)}, "kill_twice": True}
    code, printed = runs.run(runs.arguments("torchvision", data, tmp_path), faults)
    assert code == -signal.SIGTERM, printed
    assert not list(tmp_path.glob("*.pth"))


@pytest.mark.parametrize("engine", runs.ENGINES)
def test_a_run_whose_time_is_up_saves_and_goes_on_later(
    engine: str, data: Path, tmp_path: Path, undisturbed: Callable[[str], Path]
) -> None:
    whole = undisturbed(engine)
    # Already too late for one more iteration and a save: it takes one, saves and ends.
    code, printed = runs.run(runs.arguments(engine, data, tmp_path, "--max-time", "1s"))
    assert code == 75, printed
    assert "after iteration 0: its time (--max-time) is up" in printed
    code, printed = runs.run(runs.arguments(engine, data, tmp_path, "--max-time", "3h30m", resume=True))
    assert code == 0, printed
    runs.assert_same_result(whole, tmp_path)


def test_under_nohup_a_terminal_that_closes_ends_nothing() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.code() == 0
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("engine", runs.ENGINES)
def test_a_terminal_that_is_gone_ends_the_run_saved(engine: str, data: Path, tmp_path: Path) -> None:
    runs.need(engine)
    need_signal("SIGHUP")
    terminal, shown = pty.openpty()
    words = runs.arguments(engine, data, tmp_path, SOLVER__MAX_ITER=3000)
    process = runs.start(words, stdout=shown, stderr=shown)
    os.close(shown)
    read = b""
    while b"saved " not in read:
        read += os.read(terminal, 4096)
    os.close(terminal)
    process.send_signal(signal.SIGHUP)
    assert process.wait(runs.LIMIT) == 75
    log = (tmp_path / "log.txt").read_text()
    saved = (tmp_path / "last_checkpoint").read_text()
    assert f"saved {tmp_path / saved}" in log
    assert "Traceback" not in log


@pytest.mark.parametrize("engine", runs.ENGINES)
def test_the_clock_counts_in_a_range_test_which_leaves_nothing(
    engine: str, data: Path, tmp_path: Path
) -> None:
    runs.need(engine)
    words = runs.arguments(engine, data, tmp_path / "run", "--auto-lr", "--max-time", "1s")
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    code, printed = runs.run(words, {"temporary": str(temporary)})
    assert code == 75, printed
    assert "stopped: in the LR range test: its time (--max-time) is up; nothing has begun" in printed
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["log.txt"]
    # Python's exit takes its own folder away, but a forked process ends without.
    assert not [path for path in temporary.iterdir() if not path.name.startswith("pymp-")]


def test_durations() -> None:
    assert parse_duration("3h30m") == 12600
    assert parse_duration("90m") == 5400
    assert parse_duration("1d12h") == 129600
    assert parse_duration("3:30:00") == 12600
    assert parse_duration("45:30") == 2730
    assert parse_duration("5400") == 5400
    for wrong in ("", "soon", "3h30", "-5", "0", "1h 30", "h"):
        with pytest.raises(ConfigError, match="is no duration: give 3h30m"):
            parse_duration(wrong)


@pytest.mark.parametrize("engine", runs.ENGINES)
def test_a_signal_in_an_evaluation_breaks_it_off_and_it_is_made_up_for(
    engine: str, data: Path, tmp_path: Path, undisturbed: Callable[[str], Path]
) -> None:
    whole = undisturbed(engine)
    # Evaluated after iteration 11, which is no multiple of the checkpoint's period: saved because of the signal.
    words = runs.arguments(engine, data, tmp_path, TEST__EVAL_PERIOD=6)
    code, printed = runs.run(words, {"stop_in_evaluation": 2})
    assert code == 75, printed
    assert "after iteration 5: it received SIGTERM" in printed
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000005.pth"
    assert "copypaste" not in printed
    words = runs.arguments(engine, data, tmp_path, resume=True, TEST__EVAL_PERIOD=6)
    code, printed = runs.run(words)
    assert code == 0, printed
    # After iterations 5 (made up for), 11, 17 and 23; each of the trained and of the averaged weights.
    assert printed.count("copypaste: Task: bbox") == 8
    assert all(
        (a == b).all()
        for a, b in zip(runs.final_weights(whole).values(), runs.final_weights(tmp_path).values())
    )


@pytest.mark.parametrize("engine", runs.ENGINES)
def test_a_signal_to_the_launcher_of_two_processes_ends_both_and_saves(
    engine: str, data: Path, tmp_path: Path
) -> None:
    runs.need(engine)
    words = runs.arguments(engine, data, tmp_path, "--num-gpus", "2", SOLVER__MAX_ITER=3000)
    words[words.index("--num-gpus") + 1] = "2"
    process = runs.start(words)
    read = runs.wait_for(process, "saved ")
    process.send_signal(signal.SIGTERM)
    code, printed = runs.finish(process)
    assert code == 75, read + printed
    assert len(re.findall(r"^stopped: after iteration \d+: it received SIGTERM", printed, re.MULTILINE)) == 1
    assert "Traceback" not in printed


def test_torchrun_passes_a_signal_on_and_restarts_nothing(data: Path, tmp_path: Path) -> None:
    launcher = [*runs.TORCHRUN, "--max-restarts", "2"]
    process = runs.start(
        runs.arguments("torchvision", data, tmp_path, SOLVER__MAX_ITER=3000), launcher=launcher
    )
    runs.wait_for(process, "saved ")
    process.send_signal(signal.SIGTERM)
    _, printed = runs.finish(process)
    assert printed.count("stopped: after iteration") == 1
    assert "from iteration" not in printed
    newest = (tmp_path / "last_checkpoint").read_text()
    assert (tmp_path / newest).exists()
