"""``predictions.png`` under both engines: of the evaluation just made, whatever it found."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import pytest

from tests.reliability import runs
from tests.report.test_run_report import page_of
from zenith_det.data.synthetic import generate


@pytest.mark.parametrize("engine", runs.ENGINES)
def test_predictions_are_drawn_anew_with_and_without_detections(engine: str, tmp_path: Path) -> None:
    runs.need(engine)
    generate(tmp_path / "data", train=4, val=2, size=64, seed=5, task="instances")
    output = tmp_path / "run"
    output.mkdir()
    picture = output / "predictions.png"
    picture.write_text("of an earlier run in this folder")
    keys = {"SOLVER__AVERAGE__KIND": "ema", "MODEL__ROI_HEADS__SCORE_THRESH_TEST": 0.999}
    words = runs.arguments(engine, tmp_path / "data", output, SOLVER__MAX_ITER=2, **keys)
    code, printed = runs.run(words)
    assert code == 0, printed
    for folder in (output, output / "averaged"):
        assert (folder / "inference" / "coco_instances_results.json").read_text() == "[]"
    without = cv2.imread(str(picture))
    assert without is not None

    keys |= {"MODEL__WEIGHTS": str(output / "model_final.pth"), "MODEL__ROI_HEADS__SCORE_THRESH_TEST": 0.0}
    code, printed = runs.run(runs.arguments(engine, tmp_path / "data", output, "--eval-only", **keys))
    assert code == 0, printed
    assert (output / "inference" / "coco_instances_results.json").read_text() != "[]"
    noted = json.loads((output / "inference" / "evaluated.json").read_text())
    assert (noted["file"], noted["averaged"]) == (str(output / "model_final.pth"), False)
    # The trained weights' own, although the run averages.
    assert (cv2.imread(str(picture)) != without).any()
    text, _ = page_of(output)
    assert "Largest objects missed (averaged weights, iteration 1)" in text
