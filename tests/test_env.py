"""``python -m zenith_det.env``: what goes into a bug report."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import zenith_det
from zenith_det import env
from zenith_det.engines.selection import EngineStatus


def test_the_command_prints_versions_engine_and_problems(tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "HOME": str(tmp_path),
        "PYTHONPATH": str(Path(zenith_det.__file__).parents[1]),
    }
    done = subprocess.run(
        [sys.executable, "-m", "zenith_det.env"], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    names = [line.split("  ")[0] for line in done.stdout.splitlines() if not line.startswith("  ")]
    for name in ("zenith_det", "python", "torch", "torchvision", "detectron2", "numpy", "engine auto takes"):
        assert name in names
    assert names[-1] == "what is wrong"


def test_a_library_that_cannot_be_imported_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = EngineStatus(
        "detectron2", False, "detectron2 0.6 in /x cannot be imported (OSError: no)", "0.6", "/x"
    )
    monkeypatch.setattr(env, "probe_detectron2", lambda: broken)
    rows, problems = env.collect()
    assert dict(rows)["detectron2"] == "0.6 in /x, cannot be imported"
    assert broken.problem in problems
    assert f"  1. {broken.problem}" in env.report(rows, problems).splitlines()


def test_a_build_without_cuda_beside_a_gpu_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    usable = EngineStatus("detectron2", True, "", "0.6", "/x")
    monkeypatch.setattr(env, "probe_detectron2", lambda: usable)
    monkeypatch.setattr(env, "detectron2_build", lambda: ("GCC 12.2, for the CPU only", "built without CUDA"))
    monkeypatch.setattr(
        env, "probe_model_zoo", lambda: EngineStatus("zoo", False, 'pip install "setuptools<81"')
    )
    rows, problems = env.collect()
    assert ("  compiled", "GCC 12.2, for the CPU only") in rows
    assert ("  model zoo", "cannot be imported") in rows
    assert problems == ["built without CUDA", 'pip install "setuptools<81"']


def test_the_home_directory_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    assert env.report([("python", "/home/someone/venv/bin/python")], []) == (
        "python  ~/venv/bin/python\nwhat is wrong  nothing"
    )


def test_the_exit_code_says_whether_any_engine_can_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        env, "collect", lambda: ([("engine auto takes", "none: no engine can be used")], ["x"])
    )
    assert env.main() == 1
    monkeypatch.setattr(env, "collect", lambda: ([("engine auto takes", "torchvision: asked for")], []))
    assert env.main() == 0
