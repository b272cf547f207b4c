"""``train_batch.png`` and ``predictions.png`` under both engines, and that no picture costs a run anything."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from tests.conftest import SmallSet
from tests.engines.torchvision_engine.small_models import small_config
from tests.reliability import runs
from tests.report.test_run_report import page_of
from zenith_det.data import load_coco_dataset, read_image
from zenith_det.data.synthetic import generate
from zenith_det.engines.engine import load_engine
from zenith_det.engines.run_pictures import draw_run
from zenith_det.evaluation.recommended import DEFAULT_SCORE


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


def test_predictions_are_drawn_from_the_score_that_is_recommended(shapes: SmallSet, tmp_path: Path) -> None:
    """A short run's best detections often have scores below a half."""
    dataset = load_coco_dataset(shapes.val)
    annotations = json.loads(Path(shapes.val[0]).read_text())["annotations"]
    found = [
        {key: one[key] for key in ("image_id", "category_id", "bbox")} | {"score": 0.2} for one in annotations
    ]
    pictures = []
    for score in (DEFAULT_SCORE, 0.25, 0.15):
        draw_run(tmp_path, dataset, found, score=score)
        pictures.append(cv2.imread(str(tmp_path / "predictions.png"))[60:])
    assert (pictures[0] != pictures[1]).any()  # they name the score
    assert (pictures[0] != pictures[2]).sum() > 2 * (pictures[0] != pictures[1]).sum()


@pytest.mark.parametrize("engine", runs.ENGINES)
def test_the_first_batches_are_drawn_once_and_change_nothing(engine: str, tmp_path: Path) -> None:
    """A run with the picture, and one that can't write it and is resumed, end with the same weights."""
    runs.need(engine)
    generate(tmp_path / "data", train=4, val=2, size=64, seed=5, task="instances")
    keys = {"SOLVER__CHECKPOINT_PERIOD": 2, "TEST__EVAL_PERIOD": 0, "CHECKPOINT__BEST": "''"}
    drawn, failed = tmp_path / "drawn", tmp_path / "failed"
    code, printed = runs.run(runs.arguments(engine, tmp_path / "data", drawn, SOLVER__MAX_ITER=4, **keys))
    assert code == 0, printed
    assert f"the first training batches: {drawn / 'train_batch.png'}" in printed
    picture = cv2.imread(str(drawn / "train_batch.png"))
    assert picture is not None
    assert picture.shape[0] > 3 * 400  # four batches of two are in three rows

    (failed / "train_batch.png").mkdir(parents=True)  # as good as a full disk
    code, printed = runs.run(runs.arguments(engine, tmp_path / "data", failed, SOLVER__MAX_ITER=2, **keys))
    assert code == 0, printed
    assert "train_batch.png isn't drawn: " in printed
    (failed / "train_batch.png").rmdir()
    words = runs.arguments(engine, tmp_path / "data", failed, resume=True, SOLVER__MAX_ITER=4, **keys)
    code, printed = runs.run(words)
    assert code == 0, printed
    assert not (failed / "train_batch.png").exists()
    runs.assert_same_result(drawn, failed)


@pytest.mark.parametrize("image_format", ["BGR", "RGB"])
@pytest.mark.parametrize("name", runs.ENGINES)
def test_a_sample_shows_what_the_network_gets(name: str, image_format: str, tmp_path: Path) -> None:
    """Pixels in their colours, and boxes, masks and keypoints where they are after a flip."""
    runs.need(name)
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[10:30, 5:25] = (250, 20, 10)  # RGB
    (tmp_path / "images").mkdir()
    Image.fromarray(pixels).save(tmp_path / "images" / "a.png")
    square = [5, 10, 25, 10, 25, 30, 5, 30]
    thing = {
        "id": 1, "image_id": 1, "category_id": 1, "bbox": [5, 10, 20, 20], "area": 400, "iscrowd": 0,
        "segmentation": [square], "keypoints": [6, 11, 2, 24, 11, 1], "num_keypoints": 2,
    }  # fmt: skip
    category = {"id": 1, "name": "thing", "keypoints": ["left_eye", "right_eye"], "skeleton": []}
    content = {
        "images": [{"id": 1, "file_name": "a.png", "height": 40, "width": 60}],
        "annotations": [thing], "categories": [category],
    }  # fmt: skip
    (tmp_path / "set.json").write_text(json.dumps(content))
    loaded = small_config(
        "keypoint", DATASETS__TRAIN_JSON=str(tmp_path / "set.json"), DATASETS__TRAIN_IMAGES=str(tmp_path / "images"),
        DATASETS__TEST=(), MODEL__MASK_ON=True, INPUT__FORMAT=image_format, INPUT__MIN_SIZE_TRAIN=(40,),
        TEST__KEYPOINT_OKS_SIGMAS=[0.1, 0.1], MODEL__ROI_HEADS__NUM_CLASSES=1,
    )  # fmt: skip
    engine = load_engine(name)
    engine.prepare(loaded)
    data = engine.training_set(loaded)
    mapper = engine.training_mapper(loaded.cfg, data.names, data.metadata)
    flipped = set()
    for seed in range(8):
        image, shown = engine.shown(loaded.cfg, mapper(data.records[0], np.random.default_rng(seed)))
        original = read_image(tmp_path / "images" / "a.png")
        mirrored = not (image == original).all()
        flipped.add(mirrored)
        assert (image == (original[:, ::-1] if mirrored else original)).all()
        x0 = 35 if mirrored else 5
        assert shown["boxes"].tolist() == [[x0, 10, x0 + 20, 30]]
        assert shown["classes"].tolist() == [0]
        expected = np.zeros((40, 60), bool)
        expected[10:30, x0 : x0 + 20] = True
        assert (shown["masks"][0] == expected).all()
        left, right = shown["keypoints"][0].tolist()
        # The left eye of a mirrored face is the right one's picture.
        assert (left, right) == (
            ([35.5, 11.5, 1], [53.5, 11.5, 2]) if mirrored else ([6.5, 11.5, 2], [24.5, 11.5, 1])
        )
    assert flipped == {False, True}
