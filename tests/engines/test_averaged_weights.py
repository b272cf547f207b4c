"""``SOLVER.AVERAGE`` and ``TEST.AUG`` under both engines: evaluated beside what is plain, averages kept in a file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.reliability import runs
from tests.report.test_run_report import page_of
from zenith_det.data.synthetic import generate


@pytest.mark.parametrize("engine", runs.ENGINES)
def test_averaged_weights_are_evaluated_and_kept(engine: str, tmp_path: Path) -> None:
    runs.need(engine)
    generate(tmp_path / "data", train=12, val=4, size=64, seed=5, task="instances")
    output = tmp_path / "run"
    words = runs.arguments(
        engine, tmp_path / "data", output,
        SOLVER__MAX_ITER=12, TEST__EVAL_PERIOD=6, TEST__AUG__ENABLED=True, TEST__AUG__MIN_SIZES=(48, 64),
    )  # fmt: skip
    code, printed = runs.run(words)
    assert code == 0, printed
    lines = [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]
    logged = [line for line in lines if "averaged/bbox/AP" in line]
    assert [line["iteration"] for line in logged] == [5, 11]
    assert all("bbox/AP" in line and "averaged/segm/AP" in line for line in logged)
    assert (output / "averaged" / "inference" / "coco_instances_results.json").exists()
    with_tta = {"bbox_TTA/AP", "segm_TTA/AP", "averaged/bbox_TTA/AP", "averaged/segm_TTA/AP"}
    assert [line["iteration"] for line in lines if with_tta & line.keys()] == [11]
    assert any(with_tta <= line.keys() for line in lines)

    assert f"saved {output / 'model_final_averaged.pth'}, with the averaged weights" in printed

    of_trained, of_averaged = (
        json.loads((folder / "inference" / "evaluated.json").read_text())
        for folder in (output, output / "averaged")
    )
    assert of_trained == {"dataset": of_trained["dataset"], "averaged": False, "iteration": 11, "file": ""}
    assert of_averaged == of_trained | {"averaged": True}
    text, missing = page_of(output)
    assert missing == []
    assert "Largest objects missed (averaged weights, iteration 11)" in text
    assert "the AP are of the run's last evaluation" not in text
    assert text.count("mask, test-time augmentation | ") == 2

    trained, averaged = (
        torch.load(output / name, weights_only=True)["model"]
        for name in ("model_final.pth", "model_final_averaged.pth")
    )
    assert trained.keys() == averaged.keys()
    assert any(not torch.equal(trained[name], averaged[name]) for name in trained)
    assert torch.load(output / "model_best.pth", weights_only=True)["best"]["metric"] == "averaged box AP"

    words = runs.arguments(
        engine, tmp_path / "data", tmp_path / "again", "--eval-only",
        MODEL__WEIGHTS=output / "model_final_averaged.pth",
        TEST__AUG__ENABLED=True, TEST__AUG__MIN_SIZES=(48, 64),
    )  # fmt: skip
    code, printed = runs.run(words)
    assert code == 0, printed
    for name in ("inference", "inference_TTA"):
        found, again = (
            json.loads((folder / name / "coco_instances_results.json").read_text())
            for folder in (output / "averaged", tmp_path / "again")
        )
        assert found == again
    noted = json.loads((tmp_path / "again" / "inference" / "evaluated.json").read_text())
    assert noted == of_trained | {
        "averaged": True, "iteration": None, "file": str(output / "model_final_averaged.pth"),
    }  # fmt: skip
