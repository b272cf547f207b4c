"""A run that is stopped and resumed holds no more of the machine in the end, and leaves nothing behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.reliability import runs


@pytest.mark.parametrize("engine", runs.ENGINES)
def test_a_run_that_is_stopped_and_resumed_leaves_nothing_and_grows_by_nothing(
    engine: str, data: Path, tmp_path: Path
) -> None:
    """For seconds, or as many minutes as the environment variable ``SOAK_MINUTES`` says."""
    runs.need(engine)
    minutes = float(os.environ.get("SOAK_MINUTES", "0"))
    often = (
        [] if minutes else ["TEST.EVAL_PERIOD", "8", "TEST.MAX_IMAGES", "2", "SOLVER.CHECKPOINT_PERIOD", "4"]
    )
    done = subprocess.run(
        [
            sys.executable, str(runs.HERE / "soak.py"), "--engine", engine, "--data", str(data),
            "--output", str(tmp_path / "soak"), "--minutes", str(minutes), "--leg", "270" if minutes else "2", *often,
        ],
        cwd=runs.ROOT, env=runs.environment(), capture_output=True, text=True,
        timeout=600 + 180 * minutes,
    )  # fmt: skip
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
