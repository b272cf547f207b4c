"""The checks of ``python -m zenith_det.env --check``: right on this machine, and they find what is wrong."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import ROOT
from zenith_det.engines import trainer
from zenith_det.errors import UserError
from zenith_det.optim import ZENITH
from zenith_det.self_check import evaluation, optimizer, runner, training
from zenith_det.self_check.finding import BROKEN, NOT_CHECKED, OK, SLOW
from zenith_det.self_check.images import make_set

CPU = torch.device("cpu")


@pytest.fixture
def data(tmp_path: Path) -> tuple[Path, Path]:
    return make_set(tmp_path / "set")


def test_a_machine_that_works_is_told_so(tmp_path: Path) -> None:
    """The command as users type it, on each engine that is there."""
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "TMPDIR": str(temporary),
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run(
        [sys.executable, "-m", "zenith_det.env", "--check", "--json", "report.json"],
        capture_output=True, text=True, check=False, env=environment, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["environment"]["torch"].startswith(torch.__version__)
    verdicts = {check["name"]: check["verdict"] for check in report["checks"]}
    for name in ("ZENITH's step", "built-in engine, fp32", "built-in engine, memory"):
        assert verdicts[name] in (OK, SLOW)  # on a machine that tests keep busy
    for name in ("evaluation", "built-in engine, exact resume"):
        assert verdicts[name] == OK
    assert verdicts["built-in engine, fp16"] == verdicts["ZENITH doesn't wait"] == NOT_CHECKED
    lines = done.stdout.splitlines()
    assert all(
        any(line.startswith(name) and verdict in line for line in lines) for name, verdict in verdicts.items()
    )
    assert [path for path in temporary.iterdir() if path.name.startswith("zenith_det")] == []


def test_a_step_that_is_off_the_formulas_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    step = ZENITH.step

    def off(self: ZENITH, *args: Any, **kwargs: Any) -> Any:
        result = step(self, *args, **kwargs)
        with torch.no_grad():
            self.param_groups[0]["params"][1].mul_(1 + 1e-4)
        return result

    monkeypatch.setattr(ZENITH, "step", off)
    found = optimizer.check_step(CPU)
    assert found.verdict == BROKEN
    assert found.found.startswith("ZENITH is ")


def test_an_evaluation_that_misses_is_broken(
    data: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate = evaluation.evaluate_coco
    monkeypatch.setattr(
        evaluation, "evaluate_coco", lambda truth, results, tasks: evaluate(truth, results[:-1], tasks)
    )
    assert evaluation.check_evaluation(data[0]).verdict == BROKEN


def test_a_run_that_is_not_finite_is_broken(
    data: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer.Trainer, "take_loss", lambda self: math.nan)
    found = training.EngineChecks("torchvision", data, tmp_path, CPU).check_precision("fp32")
    assert found.verdict == BROKEN
    assert "finite" in found.found


def test_a_resume_that_goes_another_way_is_broken(
    data: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = trainer.Trainer.load

    def forgetting(self: trainer.Trainer, *args: Any, **kwargs: Any) -> None:
        load(self, *args, **kwargs)
        self.progress.seed += 1

    monkeypatch.setattr(trainer.Trainer, "load", forgetting)
    monkeypatch.setattr("zenith_det.engines.run.draw", lambda *args: None)
    try:
        found = training.EngineChecks("torchvision", data, tmp_path, CPU).check_resume()
    finally:
        torch.use_deterministic_algorithms(False)
    assert found.verdict == BROKEN
    assert "differ after a resume" in found.found


PROCESS = """
import json, os, signal, sys, time
for name in sys.argv[5:]:
    print(json.dumps({"begins": name}), flush=True)
    if name == "bf16":
        os.kill(os.getpid(), signal.SIGSEGV)
    if name == "waits":
        time.sleep(600)
    if name == "memory":
        sys.exit("no kernel image is available")
    print(json.dumps({"name": name, "seconds": 0.1, "verdict": "ok", "found": "well", "to_do": "", "figures": {},
                      "details": ""}), flush=True)
"""


def test_a_check_that_crashes_or_hangs_ends_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "PROCESS", [sys.executable, "-c", PROCESS])
    monkeypatch.setattr(runner, "LIMIT", 3.0)
    told: list[str] = []
    findings = runner.run_checks(["torchvision"], told.append)
    found = {f["name"].partition(", ")[2]: (f["verdict"], f["found"]) for f in findings}
    assert found == {
        "fp32": (OK, "well"),
        "bf16": (BROKEN, "the process was killed by signal 11, SIGSEGV"),
        "fp16": (OK, "well"),
        "waits": (BROKEN, "did not end within 3 s"),
        "memory": (BROKEN, "the process ended with exit code 1: no kernel image is available"),
        "exact resume": (OK, "well"),
    }
    assert runner.any_broken(findings)
    assert sum(line.strip().startswith("->") for line in told) == 3


def test_processes_that_cannot_start_are_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "PROCESS", [sys.executable, "-c", "raise SystemExit('no libcudart')"])
    findings = runner.run_checks(["basics"], lambda line: None)
    assert [f["found"] for f in findings] == ["the process ended with exit code 1: no libcudart"]


def test_a_report_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    from zenith_det import env

    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        env.main(["--json", str(tmp_path / "file" / "report.json")])
