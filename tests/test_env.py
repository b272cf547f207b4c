"""``python -m zenith_det.env``: what goes into a bug report."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

import zenith_det
from zenith_det import env
from zenith_det.engines import selection
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


def missing(name: str) -> EngineStatus:
    return EngineStatus(name, False, f"{name} is not installed; to install it: pip")


def test_a_missing_detectron2_is_not_wrong_where_the_built_in_engine_can_be_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # As select_engine sees it, too.
    for module in (env, selection):
        monkeypatch.setattr(module, "probe_detectron2", lambda: missing("detectron2"))
    rows, problems = env.collect()
    assert dict(rows)["detectron2"] == "not installed"
    assert dict(rows)["engine auto takes"] == "torchvision: detectron2 is not installed"
    assert problems == []
    for module in (env, selection):
        monkeypatch.setattr(module, "probe_torchvision", lambda: missing("torchvision"))
    rows, problems = env.collect()
    assert dict(rows)["engine auto takes"] == "none: no engine can be used"
    assert problems == [missing("detectron2").problem, missing("torchvision").problem]


def test_the_cuda_that_detectron2_was_built_with_is_named_once(monkeypatch: pytest.MonkeyPatch) -> None:
    # Its compiled part says "CUDA" itself (get_cuda_version in vision.cpp).
    compiled = SimpleNamespace(
        get_compiler_version=lambda: "GCC 12.2", has_cuda=lambda: True, get_cuda_version=lambda: "CUDA 13.0"
    )
    package = ModuleType("detectron2")
    package._C = compiled  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "detectron2", package)
    monkeypatch.setitem(sys.modules, "detectron2._C", compiled)
    assert selection.detectron2_build() == ("GCC 12.2, CUDA 13.0", "")


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
    assert env.main([]) == 1
    monkeypatch.setattr(env, "collect", lambda: ([("engine auto takes", "torchvision: asked for")], []))
    assert env.main([]) == 0
