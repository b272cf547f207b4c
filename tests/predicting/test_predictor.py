"""``zenith_det.Predictor``: from whatever names a model and images to arrays in documented units."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import SmallSet
from tests.predicting.trained_run import write_run
from zenith_det import Prediction, Predictor, UserError
from zenith_det.data import ImageError, load_coco_dataset, read_image
from zenith_det.errors import CheckpointError, ConfigError, MissingLibraryError


@pytest.fixture(scope="module")
def run(shapes: SmallSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mask")
    write_run(folder, "mask", load_coco_dataset(shapes.train))
    return folder


@pytest.fixture(scope="module")
def keypoint_run(figures: SmallSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keypoint")
    write_run(folder, "keypoint", load_coco_dataset(figures.train))
    return folder


@pytest.fixture(scope="module")
def predictor(run: Path) -> Predictor:
    return Predictor(run, threshold=None)


@pytest.fixture(scope="module")
def photos(shapes: SmallSet) -> list[Path]:
    return sorted(Path(shapes.val[1]).glob("*.png"))


def same(first: Prediction, second: Prediction) -> None:
    np.testing.assert_allclose(first.boxes, second.boxes, atol=1e-3)
    np.testing.assert_allclose(first.scores, second.scores, atol=1e-5)
    assert first.class_names == second.class_names
    assert first.masks is not None
    assert second.masks is not None
    assert (first.masks != second.masks).mean() < 1e-4


def test_shapes_and_units(predictor: Predictor, photos: list[Path], shapes: SmallSet) -> None:
    found = predictor(photos[0])
    height, width = read_image(photos[0]).shape[:2]
    count = len(found)
    assert count > 1
    assert found.boxes.shape == (count, 4)
    assert found.boxes.dtype == found.scores.dtype == np.float32
    assert (found.boxes >= 0).all()
    assert (found.boxes <= [width, height, width, height]).all()
    assert (found.boxes[:, 2:] > found.boxes[:, :2]).all()
    assert (np.diff(found.scores) <= 0).all()
    assert found.masks is not None
    assert found.masks.shape == (count, height, width)
    assert found.masks.dtype == bool
    assert found.keypoints is None
    names = {c["name"] for c in json.loads(Path(shapes.train[0]).read_text())["categories"]}
    assert set(found.class_names) <= names
    assert found.path == photos[0]
    assert found.frame is None
    assert found.size == (height, width)


def test_keypoints(keypoint_run: Path, figures: SmallSet) -> None:
    found = Predictor(keypoint_run, threshold=None)(next(Path(figures.val[1]).glob("*.png")))
    assert found.keypoints is not None
    assert found.keypoints.shape == (len(found), len(found.metadata.keypoint_names), 3)
    result = found.to_coco()[0]
    np.testing.assert_allclose(
        np.reshape(result["keypoints"], (-1, 3))[:, :2] + 0.5, found.keypoints[0, :, :2]
    )
    assert found.masks is None
    assert found[:0].keypoints.shape == (0, len(found.metadata.keypoint_names), 3)


@pytest.mark.parametrize("kind", ["text", "array", "picture"])
def test_an_image_given_in_any_way_is_the_same_image(
    predictor: Predictor, photos: list[Path], kind: str
) -> None:
    path = photos[0]
    given = {"text": str(path), "array": read_image(path), "picture": Image.open(path)}[kind]
    same(predictor(given), predictor(path))


def test_a_list_gives_a_list_and_any_batch_the_same(
    run: Path, predictor: Predictor, photos: list[Path], tmp_path: Path
) -> None:
    """Images of two sizes, which a batch would have padded to one another's."""
    tall = tmp_path / "tall.png"
    Image.open(photos[1]).resize((60, 96)).save(tall)
    paths = [photos[0], tall, *photos[1:4]]
    singles = [predictor(path) for path in paths]
    batched = Predictor(run, threshold=None, batch_size=3)
    batches = []
    model = batched.model

    def spy(samples: list[dict[str, torch.Tensor]]) -> object:
        batches.append(len(samples))
        return model(samples)

    batched.model = spy  # type: ignore[assignment]
    found = batched(paths)
    assert isinstance(found, list)
    assert [one.path for one in found] == paths
    for one, alone in zip(found, singles):
        same(one, alone)
    assert batches == [1, 1, 3]
    assert batched([]) == []


def test_a_folder_and_a_generator_are_read_as_they_are_asked_for(
    run: Path, photos: list[Path], tmp_path: Path
) -> None:
    predictor = Predictor(run, batch_size=2, threshold=0)
    inner = tmp_path / "inner"
    inner.mkdir()
    shutil.copy(photos[0], tmp_path / "b.png")
    shutil.copy(photos[1], inner / "a.png")
    (tmp_path / "notes.txt").write_text("not an image, and not named like one")
    found = predictor(tmp_path)
    assert iter(found) is found
    assert [one.path for one in found] == [tmp_path / "b.png", inner / "a.png"]

    asked: list[int] = []

    def endless() -> Iterator[np.ndarray]:
        image = read_image(photos[0])
        while True:
            asked.append(1)
            yield image

    stream = predictor(endless())
    assert len(next(stream)) > 0
    assert len(asked) <= 3


def test_a_video(run: Path, photos: list[Path], tmp_path: Path) -> None:
    clip = tmp_path / "clip.avi"
    frames = [cv2.resize(read_image(path), (96, 64)) for path in photos[:3]]
    writer = cv2.VideoWriter(str(clip), cv2.VideoWriter.fourcc(*"MJPG"), 10.0, frames[0].shape[1::-1])
    for frame in frames:
        writer.write(frame)
    writer.release()
    found = list(Predictor(run)(clip))
    assert [(one.path, one.frame) for one in found] == [(clip, 0), (clip, 1), (clip, 2)]
    # Its pixels are those of the frame, which no file holds.
    assert np.abs(found[2].image.astype(int) - frames[2]).mean() < 12


def test_picking(predictor: Predictor, photos: list[Path]) -> None:
    found = predictor(photos[0])
    assert found.masks is not None
    middle = float(found.scores[len(found) // 2])
    above = found.above(middle)
    assert len(above) == int((found.scores >= middle).sum())
    assert len(found[found.scores >= middle]) == len(above)
    last = found[-1]
    assert len(last) == 1
    np.testing.assert_array_equal(last.boxes[0], found.boxes[-1])
    assert last.masks is not None
    np.testing.assert_array_equal(last.masks[0], found.masks[-1])
    assert [one.class_names[0] for one in found] == found.class_names
    name = found.class_names[0]
    assert set(found.of_class(name).class_names) == {name}
    assert len(found.of_class(*found.metadata.thing_classes)) == len(found)
    assert len(found[[]]) == len(found[5:5]) == 0
    assert found[[2, 0]].scores.tolist() == [found.scores[2], found.scores[0]]
    with pytest.raises(IndexError):
        found[len(found)]
    with pytest.raises(UserError, match="knows no class unicorn: it knows rectangle"):
        found.of_class("unicorn")
    compact = found.compact()
    np.testing.assert_array_equal(compact[1:3].masks, found.masks[1:3])
    np.testing.assert_array_equal(compact.image, found.image)
    assert f"{found.class_names.count(name)} {name}" in str(found)


def test_drawing_and_crops(predictor: Predictor, photos: list[Path], tmp_path: Path) -> None:
    found = predictor(photos[0])[:2]
    picture = found.draw(tmp_path / "new" / "drawn.png", scale=1)
    assert (picture.height, picture.width) == found.size
    drawn = np.asarray(Image.open(tmp_path / "new" / "drawn.png"))
    np.testing.assert_array_equal(drawn, np.asarray(picture))
    assert (drawn != found.image[:, :, ::-1]).any()
    with pytest.raises(UserError, match="must end in"):
        found.draw(tmp_path / "drawn.xyz")
    for crop, (x0, y0, x1, y1) in zip(found.crops(), found.boxes):
        expected = found.image[int(y0) : int(np.ceil(y1)), int(x0) : int(np.ceil(x1))]
        np.testing.assert_array_equal(crop, expected)


def test_coco_results(predictor: Predictor, photos: list[Path], shapes: SmallSet) -> None:
    found = predictor(photos[0])
    results = json.loads(json.dumps(found.to_coco(image_id=7)))
    ids = {c["name"]: c["id"] for c in json.loads(Path(shapes.train[0]).read_text())["categories"]}
    assert [r["category_id"] for r in results] == [ids[name] for name in found.class_names]
    x, y, w, h = results[0]["bbox"]
    np.testing.assert_allclose([x, y, x + w, y + h], found.boxes[0], atol=1e-4)
    assert {r["image_id"] for r in results} == {7}
    assert results[0]["segmentation"]["size"] == list(found.size)


def test_supervision(predictor: Predictor, photos: list[Path]) -> None:
    supervision = pytest.importorskip("supervision", reason="needs supervision: pip install supervision")
    found = predictor(photos[0])
    given = found.to_supervision()
    assert isinstance(given, supervision.Detections)
    np.testing.assert_array_equal(given.xyxy, found.boxes)
    np.testing.assert_array_equal(given.confidence, found.scores)
    assert given.data["class_name"].tolist() == found.class_names
    kept = given[given.confidence > float(found.scores[2])]
    assert kept.mask.shape == (2, *found.size)
    assert len(found[:0].to_supervision()) == 0
    with pytest.raises(UserError, match="the model finds no keypoints"):
        found.to_supervision_keypoints()
    points = np.random.default_rng(0).random((len(found), 5, 3), dtype=np.float32)
    with_keypoints = dataclasses.replace(found, keypoints=points)
    given = with_keypoints.to_supervision_keypoints()
    assert isinstance(given, supervision.KeyPoints)
    assert len(given) == len(found)
    np.testing.assert_array_equal(given.xy, points[..., :2])
    name = "keypoint_confidence" if hasattr(given, "keypoint_confidence") else "confidence"
    np.testing.assert_array_equal(getattr(given, name), points[..., 2])
    assert given.class_id.tolist() == found.classes.tolist()
    assert given.data["class_name"].tolist() == found.class_names
    if hasattr(given, "detection_confidence"):
        np.testing.assert_array_equal(given.detection_confidence, found.scores)
    assert len(with_keypoints[:0].to_supervision_keypoints()) == 0


def test_without_supervision(
    predictor: Predictor, photos: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "supervision", None)
    with pytest.raises(MissingLibraryError, match="pip install supervision"):
        predictor(photos[0]).to_supervision()


def test_a_checkpoint_is_enough(run: Path, predictor: Predictor, photos: list[Path], tmp_path: Path) -> None:
    alone = tmp_path / "mine.pth"
    shutil.copy(run / "model_final.pth", alone)
    same(Predictor(alone, threshold=None)(photos[0]), predictor(photos[0]))
    shutil.move(alone, tmp_path / "model_final.pth")
    same(Predictor(tmp_path, threshold=None)(photos[0]), predictor(photos[0]))  # a folder without config.yaml


def test_averaged_weights_go_before_trained_ones(
    run: Path, predictor: Predictor, photos: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(run, tmp_path, dirs_exist_ok=True)
    good = (tmp_path / "model_final.pth").read_bytes()
    (tmp_path / "model_final_averaged.pth").write_bytes(good)
    (tmp_path / "model_final.pth").write_bytes(b"the trained ones")
    same(Predictor(tmp_path, threshold=None)(photos[0]), predictor(photos[0]))
    # A run that goes on: its newest checkpoint, which is said.
    (tmp_path / "model_final_averaged.pth").rename(tmp_path / "model_0000009.pth")
    (tmp_path / "model_final.pth").unlink()
    (tmp_path / "last_checkpoint").write_text("model_0000009.pth")
    same(Predictor(tmp_path, threshold=None)(photos[0]), predictor(photos[0]))
    assert "the run hasn't ended: taking model_0000009.pth" in caplog.text


def test_weights_without_classes_take_names(run: Path, photos: list[Path], tmp_path: Path) -> None:
    state = torch.load(run / "model_final.pth", weights_only=True)
    torch.save(state["model"], tmp_path / "plain.pth")
    names = [f"kind {n}" for n in range(6)]
    config = run / "config.yaml"
    with pytest.raises(CheckpointError, match=r"which classes.*class_names"):
        Predictor(config, tmp_path / "plain.pth")
    found = Predictor(config, tmp_path / "plain.pth", class_names=names, threshold=None)(photos[0])
    assert set(found.class_names) <= set(names)
    with pytest.raises(ConfigError, match=r"NUM_CLASSES is 6 .*has 2 classes"):
        Predictor(config, tmp_path / "plain.pth", class_names=["a", "b"])
    with pytest.raises(ConfigError, match="class_names differ"):
        Predictor(run, class_names=names)


def test_what_several_gpus_trained_runs_on_a_cpu(
    shapes: SmallSet, photos: list[Path], tmp_path: Path
) -> None:
    loaded = write_run(
        tmp_path / "bn",
        "mask",
        load_coco_dataset(shapes.train),
        MODEL__RESNETS__NORM="BN",
        SOLVER__AMP__ENABLED=True,
    )
    expected = Predictor(tmp_path / "bn", threshold=None)(photos[0])
    cfg = loaded.cfg
    cfg.MODEL.DEVICE, cfg.MODEL.RESNETS.NORM = "cuda", "SyncBN"
    (tmp_path / "config.yaml").write_text(cfg.dump())
    found = Predictor(tmp_path, tmp_path / "bn" / "model_final.pth", device="cpu", threshold=None)(photos[0])
    same(found, expected)


def test_the_threshold(run: Path, photos: list[Path]) -> None:
    """Below what the model keeps it lowers that; above, it decides."""
    opts = ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.99]
    assert len(Predictor(run, threshold=None, opts=opts)(photos[0])) == 0
    low = Predictor(run, threshold=0.01, opts=opts)(photos[0])
    assert len(low) > 0
    limit = float(low.scores[1])
    assert len(Predictor(run, threshold=limit)(photos[0])) == int((low.scores >= limit).sum())


def test_thermal_images_are_read_as_in_training(run: Path, tmp_path: Path) -> None:
    """By the range of the training set, which its config.yaml keeps; from the file again as well."""
    values = np.linspace(7000, 8000, 64).astype(np.uint16)[None].repeat(48, 0)
    Image.fromarray(values).save(tmp_path / "a.png")
    predictor = Predictor(run, threshold=None, opts=["INPUT.VALUE_RANGE", "(7000, 8000)"])
    for found in (predictor(tmp_path / "a.png"), *predictor([tmp_path / "a.png"]), *predictor(tmp_path)):
        assert (found.image.min(), found.image.max()) == (0, 255)


def test_mistakes(run: Path, predictor: Predictor, photos: list[Path], tmp_path: Path) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"\xff\xd8 not much of an image")
    (tmp_path / "notes.txt").write_text("text")
    (tmp_path / "empty").mkdir()
    clip = tmp_path / "clip.mp4"
    clip.write_bytes(b"no video")
    float_image = np.zeros((8, 8, 3))
    for given, told in [
        (tmp_path / "nowhere.jpg", "no such file"),
        (tmp_path / "notes.txt", "neither an image nor a video"),
        (tmp_path / "empty", "no images or videos there"),
        (broken, "broken.jpg: .*can't be decoded|broken.jpg: is not an image"),
        (float_image, r"must be uint8 \(height, width, 3\), BGR; this array is float64 \(8, 8, 3\)"),
        (float_image[..., 0].astype(np.uint8), r"this array is uint8 \(8, 8\)"),
        (torch.zeros(3, 8, 8), "can't detect in"),
        (Image.new("I;16", (8, 8)), "mode I;16"),
        (None, "can't detect in None"),
        ([photos[0], tmp_path], "a folder within a list: give it alone"),
        ([clip], "a video within a list"),
        (clip, "no frame can be read"),
    ]:
        with pytest.raises(UserError, match=told):
            list(predictor(given))
    passed: list[ImageError] = []
    (tmp_path / "notes.txt").unlink()
    shutil.copy(photos[0], tmp_path / "zz.png")
    found = list(predictor.stream(tmp_path, passed.append))
    assert [Path(error.path).name for error in passed] == ["broken.jpg", "clip.mp4"]
    assert [one.path for one in found] == [tmp_path / "zz.png"]
    for source, told in [
        (tmp_path / "nowhere", "no such config file"),
        (tmp_path / "nowhere.pth", "no such file"),
        (tmp_path / "empty", "no model_final.pth there"),
    ]:
        with pytest.raises(UserError, match=told):
            Predictor(source)
    with pytest.raises(ConfigError, match="threshold is 50"):
        Predictor(run, threshold=50)
    with pytest.raises(ConfigError, match="batch_size is 0"):
        Predictor(run, batch_size=0)
    with pytest.raises(ConfigError, match=r"unknown key.*MIN_SIZE_TST"):
        Predictor(run, opts=["INPUT.MIN_SIZE_TST", 100])
