"""Both engines on a CUDA device that is pretended: the same numbers as on the CPU, and few waits for the device."""

from __future__ import annotations

import json
import os
import re
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
#: Files with tests marked ``gpu``.
MARKED = {
    "torchvision": [
        "tests/optim/test_no_sync.py", "tests/optim/test_zenith_ratio.py",
        "tests/engines/torchvision_engine/test_prefetch.py",
    ],
    "detectron2": [
        "tests/engines/detectron2_engine/test_run.py", "tests/engines/detectron2_engine/test_trainer.py",
    ],
}  # fmt: skip


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


def run(stubs: dict[str, str], *words: str | Path) -> str:
    """What ``python -m`` prints in a process that has them."""
    done = subprocess.run(
        [sys.executable, "-m", *words],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **stubs},
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("task", ["mask", "keypoint"])
@pytest.mark.parametrize("engine", ENGINES)
def test_six_iterations_are_those_of_the_cpu(
    engine: str, task: str, stubs: dict[str, str], shapes: SmallSet, figures: SmallSet, tmp_path: Path
) -> None:
    need(engine)
    data = (shapes if task == "mask" else figures).train
    config = f"quickstart/{task}_rcnn_small.yaml"
    printed = run(stubs, "tests.gpu_without_gpu.train", "compare", engine, config, *data, tmp_path)
    found = json.loads(printed.splitlines()[-1])
    assert found["off"] <= 1e-5
    assert found["mixed"] == "raises"  # as it would have in training
    assert 0 < found["loss"] < 100
    waits = {int(images): count for images, count in found["waits"].items()}
    for images, count in waits.items():
        most = images + 1 if engine == "torchvision" else MOST_WAITS_OF_DETECTRON2
        assert 0 < count <= most, (images, found["where"])


def test_in_float16_a_step_that_is_left_out_leaves_nothing(
    stubs: dict[str, str], shapes: SmallSet, tmp_path: Path
) -> None:
    """The loss scaler's step, BatchNorm's statistics chosen on the device, and all of it through a checkpoint."""
    config = "quickstart/mask_rcnn_small.yaml"
    printed = run(stubs, "tests.gpu_without_gpu.train", "amp", "torchvision", config, *shapes.train, tmp_path)
    found = json.loads(printed.splitlines()[-1])
    assert found["types"] == ["float16", "float32"]
    assert found["changed"] == [True, False, True]  # the second step's loss is NaN
    assert found["scale"][1] == found["scale"][0] / 2
    assert found["waits"] <= 4  # two images, the regions, and the scaler's own
    assert found["skipped"] == 1
    assert found["off_after_resuming"] == 0


@pytest.mark.parametrize("engine", ENGINES)
def test_what_is_marked_gpu_passes(engine: str, stubs: dict[str, str], tmp_path: Path) -> None:
    need(engine)
    printed = run(
        stubs, "pytest", "-q", "-p", "no:cacheprovider", "-p", "tests.gpu_without_gpu.plugin", "-m", "gpu",
        f"--basetemp={tmp_path}", *MARKED[engine],
    )  # fmt: skip
    ended = re.search(r"^(\d+) passed(?:, (\d+) skipped)?, \d+ deselected", printed, re.MULTILINE)
    assert ended, printed
    passed, skipped = int(ended[1]), int(ended[2] or 0)
    assert passed >= 4
    assert skipped <= 1, printed  # the one that the plug-in names
