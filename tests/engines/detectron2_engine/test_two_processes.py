"""Two processes on the CPU train as one does with the same batch, and go on where they stopped."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("detectron2.engine", reason="needs the real Detectron2: see docs/DETECTRON2.md")

import torch

from tests.conftest import ROOT
from tests.engines.detectron2_engine.d2_helpers import same, synthetic_set

pytestmark = pytest.mark.detectron2

WORKER = str(Path(__file__).with_name("d2_worker.py"))


RESUME_WORKER = str(Path(__file__).with_name("d2_resume_worker.py"))


def start(command: list[str]) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def losses(command: list[str], output: Path) -> Any:
    """What each iteration of a run of ``d2_worker.py`` logged."""
    output.mkdir()
    start(command)
    return json.loads((output / "record.json").read_text())


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("set")
    synthetic_set(folder, train=30)
    return str(folder)


@pytest.fixture(scope="module")
def alone(data: str, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    output = tmp_path_factory.mktemp("runs") / "alone"
    return losses([sys.executable, WORKER, data, str(output), "1"], output)


@pytest.mark.parametrize("launcher", ["detectron2", "torchrun"])
def test_two_processes_are_one(data: str, alone: Any, tmp_path: Path, launcher: str) -> None:
    output = tmp_path / launcher
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = {
        "detectron2": [sys.executable, WORKER, data, str(output), "2"],
        "torchrun": [*torchrun, WORKER, data, str(output), "torchrun"],
    }[launcher]
    together = losses(command, output)
    assert len(together) == len(alone) == 5
    for one, two in zip(alone, together):
        assert len(two["ratios"]) == 2
        assert two["ratios"][0] == two["ratios"][1]
        # Looser than the losses: with a window of 1 a proposal more or less shows in the norm at once.
        assert two["ratios"][0] == pytest.approx(one["ratios"][0], rel=1e-2)
        for name in one:
            if name != "ratios":
                assert two[name] == pytest.approx(one[name], abs=1e-3), name
    assert min(line["ratios"][0] for line in together) < 1


# ---- resuming


def wanted(output: Path, iterations: int, *keys: Any, processes: int = 2, copy: Path | None = None) -> Any:
    """A run for ``d2_resume_worker.py``: from the checkpoint in ``output`` or its copy, if any."""
    return {
        "output": str(output), "copy": copy and str(copy), "processes": processes, "iterations": iterations,
        "keys": list(map(str, keys)),
    }  # fmt: skip


def images_seen(output: Path) -> Any:
    """Ids by process and batch."""
    return json.loads((output / "seen.json").read_text())


def last_checkpoint(output: Path) -> dict[str, Any]:
    state = torch.load(output / "model_final.pth", weights_only=True)
    del state["trainer"]["hooks"]["ResumeExactly"]["config"]
    return state


@pytest.mark.slow
@pytest.mark.parametrize(
    ("grouped", "before", "after"), [(True, 2, 0), (False, 0, 0)], ids=["grouped", "ungrouped"]
)
def test_a_resumed_run_of_two_processes_is_bit_equal(
    data: str, tmp_path: Path, grouped: bool, before: int, after: int
) -> None:
    keys = ("SOLVER.IMS_PER_BATCH", 4, "DATALOADER.ASPECT_RATIO_GROUPING", grouped, "DATALOADER.NUM_WORKERS")
    whole, first, resumed, alone = (tmp_path / name for name in ("whole", "first", "resumed", "alone"))
    runs = [
        wanted(whole, 6, *keys, before),
        wanted(first, 3, *keys, before),
        wanted(resumed, 6, *keys, after, copy=first),
    ]
    if not grouped:
        runs.append(wanted(alone, 6, *keys, before, processes=1, copy=first))
    start([sys.executable, RESUME_WORKER, data, json.dumps(runs)])
    seen = images_seen(whole)
    assert all(len(batch) == 2 for rank in seen for batch in rank)
    assert [one + two for one, two in zip(images_seen(first), images_seen(resumed))] == seen
    assert same(last_checkpoint(resumed), last_checkpoint(whole))
    if grouped:
        return
    # One process goes on with the images of two.
    together = [sorted(a + b) for a, b in zip(*seen)]
    assert [sorted(batch) for batch in images_seen(alone)[0]] == together[3:]
    assert re.search(
        r"number of processes +2 +1 +applied; the batch stays 4 images", (alone / "log.txt").read_text()
    )
