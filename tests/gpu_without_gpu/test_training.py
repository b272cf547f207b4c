"""Both engines on a CUDA device that is pretended: the same numbers as on the CPU, and few waits for the device."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT, SmallSet
from tests.reliability.runs import ENGINES, need

HERE = Path(__file__).parent
#: Waits in an iteration of two images; they are Detectron2's own.
MOST_WAITS_OF_DETECTRON2 = 120


@pytest.fixture(scope="session")
def stubs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process that has a CUDA runtime and a driver to ask."""
    if torch.version.cuda is None:
        pytest.skip("needs a torch that is built for CUDA: this one is for the CPU alone")
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs gcc, to compile what stands for the CUDA driver")
    folder = tmp_path_factory.mktemp("stubs")
    for source, library in (("runtime.c", "runtime.so"), ("driver.c", "libcuda.so.1")):
        subprocess.run([compiler, "-shared", "-fPIC", "-o", folder / library, HERE / source], check=True)
    return {"LD_PRELOAD": str(folder / "runtime.so"), "LD_LIBRARY_PATH": str(folder)}


@pytest.mark.parametrize("task", ["mask", "keypoint"])
@pytest.mark.parametrize("engine", ENGINES)
def test_six_iterations_are_those_of_the_cpu(
    engine: str, task: str, stubs: dict[str, str], shapes: SmallSet, figures: SmallSet, tmp_path: Path
) -> None:
    need(engine)
    data = (shapes if task == "mask" else figures).train
    words = [engine, f"quickstart/{task}_rcnn_small.yaml", *data, str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu_without_gpu.train", *words],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **stubs},
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["off"] <= 1e-5
    assert found["mixed"] == "raises"  # as it would have in training
    assert 0 < found["loss"] < 100
    waits = {int(images): count for images, count in found["waits"].items()}
    for images, count in waits.items():
        most = images + 1 if engine == "torchvision" else MOST_WAITS_OF_DETECTRON2
        assert 0 < count <= most, (images, found["where"])
