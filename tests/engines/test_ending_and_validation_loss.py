"""Validation loss, early stopping and LRs that follow the evaluations, in real runs of both engines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.reliability import runs
from zenith_det.data.synthetic import generate


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    generate(root, train=12, val=4, size=64, seed=5, task="instances")
    return root


def lines_of(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]


@pytest.mark.parametrize("engine", runs.ENGINES)
def test_the_validation_loss_leaves_no_trace_in_the_run(engine: str, data: Path, tmp_path: Path) -> None:
    runs.need(engine)
    keys = {"SOLVER__MAX_ITER": 6, "TEST__EVAL_PERIOD": 2, "MODEL__RESNETS__NORM": "BN"}
    for name, on in (("without", False), ("with", True)):
        code, printed = runs.run(
            runs.arguments(engine, data, tmp_path / name, TEST__VALIDATION_LOSS=on, **keys)
        )
        assert code == 0, printed
    runs.assert_same_result(tmp_path / "without", tmp_path / "with")
    logged = [line for line in lines_of(tmp_path / "with") if "validation/total_loss" in line]
    assert len(logged) == 3
    parts = ("loss_cls", "loss_box_reg", "loss_mask", "loss_rpn_cls", "loss_rpn_loc")
    for line in logged:
        assert line["validation/total_loss"] == pytest.approx(sum(line[f"validation/{p}"] for p in parts))
        assert "averaged/validation/total_loss" in line
    assert not any("validation/total_loss" in line for line in lines_of(tmp_path / "without"))


@pytest.mark.parametrize("engine", runs.ENGINES)
def test_the_validation_loss_of_a_run_on_a_range_of_sizes(engine: str, data: Path, tmp_path: Path) -> None:
    runs.need(engine)
    keys = {
        "SOLVER__MAX_ITER": 1, "TEST__VALIDATION_LOSS": True,
        "INPUT__MIN_SIZE_TRAIN_SAMPLING": "range", "INPUT__MIN_SIZE_TRAIN": "(48, 64)",
    }  # fmt: skip
    code, printed = runs.run(runs.arguments(engine, data, tmp_path, **keys))
    assert code == 0, printed
    assert any("validation/total_loss" in line for line in lines_of(tmp_path))


@pytest.mark.parametrize("engine", runs.ENGINES)
def test_early_stopping_ends_a_run_and_more_patience_goes_on(engine: str, data: Path, tmp_path: Path) -> None:
    runs.need(engine)
    # Nothing is found with this threshold: the AP is 0 from the first evaluation on and stays there.
    keys = {
        "SOLVER__MAX_ITER": 12, "TEST__EVAL_PERIOD": 2, "MODEL__ROI_HEADS__SCORE_THRESH_TEST": 0.99,
        "TEST__EARLY_STOPPING": "box AP", "SOLVER__AVERAGE__KIND": "ema", "CHECKPOINT__BEST": "''",
    }  # fmt: skip
    output = tmp_path / "run"
    code, printed = runs.run(runs.arguments(engine, data, output, TEST__PATIENCE=2, **keys))
    assert code == 0, printed
    assert "the run ends after iteration 5: box AP has not been better than" in printed
    final = torch.load(output / "model_final.pth", weights_only=True)
    assert final["iteration"] == 5
    assert (output / "model_final_averaged.pth").exists()

    code, printed = runs.run(runs.arguments(engine, data, output, resume=True, TEST__PATIENCE=2, **keys))
    assert code == 0, printed
    assert torch.load(output / "model_final.pth", weights_only=True)["iteration"] == 5

    code, printed = runs.run(runs.arguments(engine, data, output, resume=True, TEST__PATIENCE=5, **keys))
    assert code == 0, printed
    whole = tmp_path / "whole"
    code, printed = runs.run(runs.arguments(engine, data, whole, TEST__PATIENCE=5, **keys))
    assert code == 0, printed
    assert torch.load(whole / "model_final.pth", weights_only=True)["iteration"] == 11
    runs.assert_same_result(output, whole)


@pytest.mark.parametrize("engine", runs.ENGINES)
def test_a_plateau_lowers_the_lr_and_a_resumed_run_remembers_it(
    engine: str, data: Path, tmp_path: Path
) -> None:
    runs.need(engine)
    # The AP is 0 from the first evaluation on, so that every second one after it lowers the LR.
    keys = {
        "SOLVER__LR_SCHEDULER_NAME": "WarmupPlateauLR", "SOLVER__PLATEAU_PATIENCE": 1, "SOLVER__GAMMA": 0.5,
        "SOLVER__OPTIMIZER": "SGD", "SOLVER__BASE_LR": 0.01, "SOLVER__WARMUP_ITERS": 0, "TEST__EVAL_PERIOD": 2,
        "MODEL__ROI_HEADS__SCORE_THRESH_TEST": 0.99, "CHECKPOINT__BEST": "''",
    }  # fmt: skip
    parted, whole = tmp_path / "parted", tmp_path / "whole"
    for output, resume, length in ((parted, False, 8), (parted, True, 12), (whole, False, 12)):
        code, printed = runs.run(
            runs.arguments(engine, data, output, resume=resume, SOLVER__MAX_ITER=length, **keys)
        )
        assert code == 0, printed
    assert "the LR is 0.25 times BASE_LR from here on" in printed
    lrs = [line["lr"] for line in lines_of(whole) if "lr" in line]
    assert lrs[-1] == pytest.approx(0.0025)
    runs.assert_same_result(parted, whole)
