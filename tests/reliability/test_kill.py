"""Training processes killed at random moments and resumed end bit-identical to the undisturbed one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.reliability import runs
from tests.reliability.kill_runs import PHASES


@pytest.mark.parametrize("engine", runs.ENGINES)
def test_killed_runs_end_as_if_nothing_had_happened(
    engine: str, data: Path, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    """30 kills, or as many as ``--kills`` says, within each of the phases of a run."""
    runs.need(engine)
    wanted = int(pytestconfig.getoption("kills"))
    done = subprocess.run(
        [
            sys.executable, str(runs.HERE / "kill_runs.py"), "--engine", engine, "--data", str(data),
            "--output", str(tmp_path / "runs"), "--kills", str(wanted), "--seed", "1",
        ],
        cwd=runs.ROOT, env=runs.environment(), capture_output=True, text=True,
        timeout=300 + 20 * wanted,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    print(f"{engine}: {found}")
    assert found["differing"] == []
    assert sum(found["kills"].values()) == wanted
    assert min(found["kills"].get(phase, 0) for phase in PHASES) >= wanted // 10
