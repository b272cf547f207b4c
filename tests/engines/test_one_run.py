"""The same keys leave the same behind on either engine: what two sequences and two loops once told apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engines.torchvision_engine.small_models import small_config
from tests.reliability import runs
from tests.report.test_run_report import page_of
from zenith_det.data.synthetic import generate, split_files
from zenith_det.engines import lr_range_test
from zenith_det.engines.options import RunOptions
from zenith_det.engines.run import run
from zenith_det.errors import UserError

KEYS = {
    "SOLVER__MAX_ITER": 12, "SOLVER__CHECKPOINT_PERIOD": 4, "TEST__EVAL_PERIOD": 6, "CHECKPOINT__KEEP": 2,
    "CHECKPOINT__BEST": "''",
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of which three training images have no objects."""
    root = tmp_path_factory.mktemp("data")
    generate(root, train=12, val=4, size=64, seed=5, task="instances")
    json_file, _ = split_files(root, "train", "instances")
    content = json.loads(json_file.read_text())
    kept = sorted({a["image_id"] for a in content["annotations"] if not a["iscrowd"]})[:9]
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in kept]
    json_file.write_text(json.dumps(content))
    return root


_runs: dict[str, tuple[int, str, Path]] = {}


@pytest.fixture(params=runs.ENGINES)
def finished(
    request: pytest.FixtureRequest, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, int, str, Path]:
    """A run whose results are not those expected: engine, exit code, what was printed, folder."""
    engine: str = request.param
    runs.need(engine)
    if engine not in _runs:
        output = tmp_path_factory.mktemp(engine)
        words = runs.arguments(
            engine, data, output, TEST__EXPECTED_RESULTS=[["bbox", "AP", 99.0, 0.1]], **KEYS
        )
        _runs[engine] = (*runs.run(words), output)
    return engine, *_runs[engine]


def logged(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]


def test_results_that_are_off_leave_pictures_all_the_same(finished: tuple[str, int, str, Path]) -> None:
    _, code, printed, output = finished
    assert code == 1, printed
    assert (output / "curves.png").exists()
    assert (output / "predictions.png").exists()


def test_an_evaluation_is_logged_at_the_last_iteration_before_it(
    finished: tuple[str, int, str, Path],
) -> None:
    *_, output = finished
    assert [line["iteration"] for line in logged(output) if "bbox/AP" in line] == [5, 11]
    assert [line["iteration"] for line in logged(output) if "averaged/bbox/AP" in line] == [5, 11]


def test_so_many_checkpoints_are_kept(finished: tuple[str, int, str, Path]) -> None:
    *_, output = finished
    assert sorted(path.name for path in output.glob("*.pth")) == [
        "model_0000003.pth", "model_0000007.pth", "model_final.pth", "model_final_averaged.pth",
    ]  # fmt: skip


def test_evaluations_between_two_writings_reach_tensorboard(finished: tuple[str, int, str, Path]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    *_, output = finished
    events = EventAccumulator(str(output))
    events.Reload()
    assert [event.step for event in events.Scalars("bbox/AP")] == [5, 11]
    assert events.Scalars("total_loss")


def test_the_report_names_images_without_objects(finished: tuple[str, int, str, Path]) -> None:
    *_, output = finished
    text, _ = page_of(output)
    assert "3 images without objects left out of training" in text


def test_a_finished_run_resumed_evaluates_and_writes_nothing(
    finished: tuple[str, int, str, Path], data: Path
) -> None:
    engine, _, _, output = finished
    kept = {path: path.stat().st_mtime_ns for path in output.glob("*.pth")}
    before = (output / "metrics.json").read_text()
    code, printed = runs.run(runs.arguments(engine, data, output, resume=True, **KEYS))
    assert code == 0, printed
    assert "the run has reached its end" in printed
    assert "copypaste" not in printed
    assert {path: path.stat().st_mtime_ns for path in output.glob("*.pth")} == kept
    assert (output / "metrics.json").read_text() == before


@pytest.mark.parametrize("engine", runs.ENGINES)
def test_what_a_model_logs_by_itself_is_logged(engine: str, data: Path, tmp_path: Path) -> None:
    """Pictures under VIS_PERIOD, of the images trained on alone, and figures that Detectron2's heads put."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    runs.need(engine)
    keys = KEYS | {"SOLVER__MAX_ITER": 4, "TEST__EVAL_PERIOD": 2, "TEST__VALIDATION_LOSS": True}
    code, printed = runs.run(runs.arguments(engine, data, tmp_path, VIS_PERIOD=1, **keys))
    assert code == 0, printed
    if engine == "detectron2":
        assert any("fast_rcnn/cls_accuracy" in line for line in logged(tmp_path))
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    names = events.Tags()["images"]
    assert [name for name in names if name.startswith("Left: GT bounding boxes;  Right: Predicted proposals")]
    masks = [name for name in names if name.startswith("Left: mask prediction;   Right: mask GT")]
    for name in {names[0], masks[0]}:
        assert [event.step for event in events.Images(name)] == [0, 1, 2, 3]


class TestStarts(UserError):
    """Instead of a range test."""

    __test__ = False


@pytest.mark.parametrize("engine", runs.ENGINES)
def test_the_range_test_is_deterministic_where_the_run_is(
    engine: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs.need(engine)
    seen: list[bool] = []

    def measure(*args: Any, **kwargs: Any) -> Any:
        seen.append(torch.are_deterministic_algorithms_enabled())
        raise TestStarts

    monkeypatch.setattr(lr_range_test, "measure", measure)
    (train_json, train_images), (val_json, val_images) = (
        split_files(data, split, "instances") for split in ("train", "val")
    )
    loaded = small_config(
        "mask", DATASETS__TRAIN_JSON=str(train_json), DATASETS__TRAIN_IMAGES=str(train_images),
        DATASETS__VAL_JSON=str(val_json), DATASETS__VAL_IMAGES=str(val_images), OUTPUT_DIR=str(tmp_path),
        DETERMINISTIC=True, SOLVER__AUTO_LR=True,
    )  # fmt: skip
    try:
        with pytest.raises(TestStarts):
            run(engine, loaded, RunOptions())
    finally:
        torch.use_deterministic_algorithms(False)
    assert seen == [True]
