"""Two processes: one dies and torchrun restarts both, one disagrees, one drifts apart."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import pytest

from tests.reliability import runs


@pytest.mark.parametrize("engine", runs.ENGINES)
def test_torchrun_restarts_a_killed_process_and_the_result_is_right(
    engine: str, data: Path, tmp_path: Path
) -> None:
    runs.need(engine)
    keys = {"SOLVER__MAX_ITER": 12, "TEST__EVAL_PERIOD": 0}
    code, printed = runs.run(runs.arguments(engine, data, tmp_path / "whole", **keys), processes=2)
    assert code == 0, printed
    # An older run's checkpoint lies there: the restarted processes must not take it for theirs.
    output = tmp_path / "killed"
    code, printed = runs.run(runs.arguments(engine, data, output, **{**keys, "SOLVER__MAX_ITER": 2}))
    assert code == 0, printed
    launcher = [*runs.TORCHRUN, "--max-restarts", "2"]
    faults = {"rank": 1, "kill": {9: int(signal.SIGKILL)}}
    code, printed = runs.run(runs.arguments(engine, data, output, **keys), faults, launcher)
    assert code == 0, printed
    assert "model_0000007.pth" in (output / "log.txt").read_text()  # what the second attempt went on from
    runs.assert_same_result(tmp_path / "whole", output)


def test_a_restart_before_the_first_save_begins_anew_and_takes_no_other_runs_checkpoint(
    data: Path, tmp_path: Path
) -> None:
    keys = {"SOLVER__MAX_ITER": 6, "TEST__EVAL_PERIOD": 0}
    code, printed = runs.run(runs.arguments("torchvision", data, tmp_path / "whole", **keys), processes=2)
    assert code == 0, printed
    output = tmp_path / "killed"
    code, printed = runs.run(runs.arguments("torchvision", data, output, **{**keys, "SOLVER__MAX_ITER": 3}))
    assert code == 0, printed
    launcher = [*runs.TORCHRUN, "--max-restarts", "1"]
    faults = {"rank": 1, "kill": {2: int(signal.SIGKILL)}}
    code, printed = runs.run(runs.arguments("torchvision", data, output, **keys), faults, launcher)
    assert code == 0, printed
    assert "starting at iteration 0" in printed
    runs.assert_same_result(tmp_path / "whole", output)


@pytest.mark.parametrize("engine", runs.ENGINES)
def test_processes_with_different_settings_are_named(engine: str, data: Path, tmp_path: Path) -> None:
    runs.need(engine)
    faults = {"rank": 1, "config": ["SOLVER.BASE_LR", "0.01"]}
    code, printed = runs.run(runs.arguments(engine, data, tmp_path), faults, processes=2)
    assert code != 0
    told = re.findall(
        r"^error: the processes of this run would not train the same: .*", printed, re.MULTILINE
    )
    assert len(told) == 1, printed
    assert "rank 1: SOLVER.BASE_LR is 0.01, on rank 0 0.02" in told[0]


@pytest.mark.parametrize("engine", runs.ENGINES)
def test_processes_that_drift_apart_are_named(engine: str, data: Path, tmp_path: Path) -> None:
    runs.need(engine)
    words = runs.arguments(engine, data, tmp_path, SOLVER__MAX_ITER=40, TEST__EVAL_PERIOD=0)
    code, printed = runs.run(words, {"rank": 1, "drift": 10}, processes=2)
    assert code != 0
    told = re.findall(r"^error: iteration 19: the processes have drifted apart: .*", printed, re.MULTILINE)
    assert len(told) == 1, printed
    assert "rank 1" in told[0]
    assert "go on from the last checkpoint with --resume" in told[0]
