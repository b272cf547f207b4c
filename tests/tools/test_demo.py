"""``tools/demo.py`` on images, folders and a video, with a checkpoint of a run."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from tests.conftest import SmallSet
from tests.predicting.trained_run import write_run
from zenith_det.commands import demo as demo_command
from zenith_det.config import load_config
from zenith_det.data import load_coco_dataset
from zenith_det.errors import CheckpointError, ConfigError, UserError
from zenith_det.evaluation import RECOMMENDED_FILE, RESULTS_FILE, evaluate_coco


@pytest.fixture(scope="module")
def trained(shapes: SmallSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's config.yaml, with model_final.pth beside it (random weights)."""
    folder = tmp_path_factory.mktemp("run")
    # A few: drawing takes longer than finding.
    write_run(folder, "mask", load_coco_dataset(shapes.train), TEST__DETECTIONS_PER_IMAGE=5)
    return folder / "config.yaml"


def demo(config: Path, output: Path, *inputs: Path, threshold: float = 0.0, end: Sequence[str] = ()) -> None:
    demo_command.main(
        [
            "--config-file", str(config), "--output", str(output), "--confidence-threshold", str(threshold),
            "--input", *map(str, inputs), *end,
        ]
    )  # fmt: skip


def copy(image: np.ndarray, *paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), image)


def pictures_below(folder: Path) -> list[str]:
    found = (path for path in folder.rglob("*.*") if path.name != "predictions.json")
    return sorted(str(path.relative_to(folder)) for path in found)


def test_a_folder_of_images(trained: Path, shapes: SmallSet, tmp_path: Path) -> None:
    folder = Path(shapes.val[1])
    demo(trained, tmp_path, folder)
    pictures = sorted(p.stem for p in tmp_path.glob("*.png"))
    assert pictures == sorted(p.stem for p in folder.glob("*.png"))


def test_subfolders_are_searched_and_kept(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = np.zeros((32, 32, 3), dtype=np.uint8)
    given = tmp_path / "given"
    copy(image, given / "c1" / "000001.png", given / "c2" / "000001.png", given / "c2" / "night" / "a.b.jpg")
    (given / "again").symlink_to(given)  # would never end
    output = given / "found"
    for _ in range(2):  # and what the first command drew isn't drawn again by the second
        demo(trained, output, given)
        assert pictures_below(output) == ["c1/000001.png", "c2/000001.png", "c2/night/a.b.png"]
    assert str(output / "c2" / "night" / "a.b.png") in capsys.readouterr().out


def test_nothing_is_overwritten(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = np.zeros((32, 32, 3), dtype=np.uint8)
    one, two, output = tmp_path / "c1", tmp_path / "c2", tmp_path / "found"
    copy(image, one / "1.png", two / "1.png", two / "1.jpg", two / "1-2.png")
    demo(trained, output, one, two)
    assert pictures_below(output) == ["1-2.png", "1-3.png", "1-4.png", "1.png"]
    lines = capsys.readouterr().out.splitlines()
    told = {Path(line.rpartition(", ")[2]).name for line in lines if " objects" in line}
    assert told == {"1-2.png", "1-3.png", "1-4.png", "1.png"}
    with pytest.raises(UserError, match=r"2\.png is an input and would be lost"):
        demo(trained, two, two)


@pytest.mark.parametrize("before", [(), ("--opts",), ("MODEL.DEVICE", "cpu")])
def test_keys_at_the_end(trained: Path, shapes: SmallSet, tmp_path: Path, before: tuple[str, ...]) -> None:
    image = tmp_path / "DSC.JPG"  # which looks like a key
    copy(cv2.imread(str(next(Path(shapes.val[1]).glob("*.png")))), image)
    config = tmp_path / "config.yaml"
    config.write_text(trained.read_text())
    with pytest.raises(ConfigError, match=r"add MODEL\.WEIGHTS OUTPUT_DIR/model_final\.pth at the end"):
        demo(config, tmp_path / "found", image, end=["SOLVER.AVERAGE.KIND", ""])
    with pytest.raises(ConfigError, match=r"OUTPUT_DIR/model_final_averaged\.pth at the end"):
        demo(config, tmp_path / "found", image, end=["SOLVER.AVERAGE.KIND", "ema"])
    weights = str(trained.parent / "model_final.pth")
    demo(config, tmp_path / "found", image, end=[*before, "MODEL.WEIGHTS", weights])
    assert (tmp_path / "found" / "DSC.png").exists()


def test_no_objects_says_how_far_below_the_threshold(
    trained: Path, shapes: SmallSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = next(Path(shapes.val[1]).glob("*.png"))
    demo(trained, tmp_path, image, threshold=0.99)
    told = capsys.readouterr().out
    match = re.search(r"0 objects \(highest score (0\.\d\d); lower --confidence-threshold\), ", told)
    assert match is not None
    demo(trained, tmp_path, image, threshold=float(match[1]) - 0.01)
    assert "highest score" not in capsys.readouterr().out
    demo(trained, tmp_path, image, end=["MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.99"])
    assert "0 objects (no detection at all), " in capsys.readouterr().out


def test_a_runs_result_is_taken_and_not_what_it_started_from(
    trained: Path, shapes: SmallSet, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    cfg = load_config(str(trained)).cfg
    cfg.MODEL.WEIGHTS = "imagenet_that_is_not_there.pth"
    (folder / "config.yaml").write_text(cfg.dump())
    state = torch.load(trained.parent / "model_final.pth", weights_only=True)
    torch.save(state, folder / "model_final_averaged.pth")
    (folder / "model_final.pth").write_bytes(b"the trained weights, which averaged ones go before")
    image = next(Path(shapes.val[1]).glob("*.png"))
    demo(folder / "config.yaml", tmp_path / "found", image)
    demo(trained, tmp_path / "expected", image)
    found, expected = (cv2.imread(str(tmp_path / name / image.name)) for name in ("found", "expected"))
    assert (found == expected).all()


def test_the_threshold_decides_what_is_drawn(trained: Path, shapes: SmallSet, tmp_path: Path) -> None:
    image = next(Path(shapes.val[1]).glob("*.png"))
    demo(trained, tmp_path / "all", image)
    demo(trained, tmp_path / "none", image, threshold=0.99)
    drawn, plain = (
        cv2.imread(str(tmp_path / "all" / image.name)),
        cv2.imread(str(tmp_path / "none" / image.name)),
    )
    assert drawn.shape == plain.shape
    assert (drawn != plain).any()
    original = cv2.resize(cv2.imread(str(image)), plain.shape[1::-1], interpolation=cv2.INTER_CUBIC)
    assert np.abs(original.astype(int) - plain).mean() < 8


def test_a_video(trained: Path, shapes: SmallSet, tmp_path: Path) -> None:
    frame = cv2.imread(str(next(Path(shapes.val[1]).glob("*.png"))))
    source = tmp_path / "clip.avi"
    writer = cv2.VideoWriter(str(source), cv2.VideoWriter.fourcc(*"MJPG"), 10.0, frame.shape[1::-1])
    for _ in range(3):
        writer.write(frame)
    writer.release()
    demo(trained, tmp_path / "out", source)
    reader = cv2.VideoCapture(str(tmp_path / "out" / "clip.mp4"))
    assert int(reader.get(cv2.CAP_PROP_FRAME_COUNT)) == 3


def test_an_unreadable_image_is_passed_over_and_the_rest_drawn(
    trained: Path, shapes: SmallSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"not an image")
    good = next(Path(shapes.val[1]).glob("*.png"))
    demo(trained, tmp_path / "out", bad, good)
    assert "passed over" in capsys.readouterr().out
    assert (tmp_path / "out" / good.name).exists()


def test_mistakes(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        demo(trained, tmp_path, tmp_path / "nowhere.jpg")
    with pytest.raises(UserError, match="no images or videos"):
        demo(trained, tmp_path, tmp_path)
    nameless = tmp_path / "nameless"
    nameless.mkdir()
    (nameless / "config.yaml").write_text(trained.read_text())
    state = torch.load(trained.parent / "model_final.pth", weights_only=True)
    torch.save({"model": state["model"]}, nameless / "model_final.pth")
    image = tmp_path / "x.png"
    cv2.imwrite(str(image), np.zeros((32, 32, 3), dtype=np.uint8))
    with pytest.raises(CheckpointError, match="which classes"):
        demo(nameless / "config.yaml", tmp_path / "out", image)


def test_the_results_are_written_with_the_files_names(
    trained: Path, shapes: SmallSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run's folder in place of --config-file; an evaluation of predictions.json takes them as they are."""
    folder, output = Path(shapes.val[1]), tmp_path / "found"
    demo_command.main([str(trained.parent), "--input", str(folder), "--output", str(output),
                       "--confidence-threshold", "0"])  # fmt: skip
    results = json.loads((output / "predictions.json").read_text())
    truth = json.loads(Path(shapes.val[0]).read_text())
    assert {r["file_name"] for r in results} == {image["file_name"] for image in truth["images"]}
    names = {category["id"]: category["name"] for category in truth["categories"]}
    assert min(names) > 0  # which a count from 0 would get wrong
    assert all(names[r["category_id"]] == r["category_name"] for r in results)
    ids = {image["file_name"]: image["id"] for image in truth["images"]}
    found = [r | {"image_id": ids[r["file_name"]]} for r in results]
    assert evaluate_coco(truth, found, ("bbox", "segm"))["bbox"]["AP"] >= 0
    told = capsys.readouterr().out
    assert f"{output / 'predictions.json'}: COCO results of {len(ids)} images" in told


def test_crops(trained: Path, shapes: SmallSet, tmp_path: Path) -> None:
    image = next(Path(shapes.val[1]).glob("*.png"))
    demo_command.main([str(trained.parent / "model_final.pth"), "--input", str(image), "--crop",
                       "--output", str(tmp_path), "--confidence-threshold", "0"])  # fmt: skip
    results = json.loads((tmp_path / "predictions.json").read_text())
    crops = sorted((tmp_path / "crops").iterdir())
    assert len(crops) == len(results) > 0
    first = results[0]
    (crop,) = (tmp_path / "crops").glob(f"{image.stem}-1-{first['category_name']}.png")
    x, y, w, h = first["bbox"]
    pixels = cv2.imread(str(image))[int(y) : int(np.ceil(y + h)), int(x) : int(np.ceil(x + w))]
    np.testing.assert_array_equal(cv2.imread(str(crop)), pixels)


@pytest.mark.parametrize("words", [(), ("RUN", "--config-file", "x.yaml")])
def test_one_model_must_be_given(words: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"give (the model|one of them)"):
        demo_command.main([*words, "--input", "x.png", "--output", str(tmp_path)])


def test_what_the_run_recommends_is_drawn_unless_a_score_is_given(
    trained: Path, shapes: SmallSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    (run / "inference").mkdir(parents=True)
    for name in ("config.yaml", "model_final.pth"):
        (run / name).symlink_to(trained.parent / name)
    detections = run / "inference" / RESULTS_FILE
    detections.write_text("[]")
    note = {"score": 0.31, "f1": 0.8, "detections": 2}
    (detections.parent / RECOMMENDED_FILE).write_text(json.dumps(note))
    image = str(next(Path(shapes.val[1]).glob("*.png")))

    def told(*more: str) -> str:
        demo_command.main([str(run), "--input", image, "--output", str(tmp_path / "found"), *more])
        return capsys.readouterr().out

    assert "drawn from a score of 0.31 on" in told()
    assert "drawn from" not in told("--confidence-threshold", "0.4")
    assert "drawn from" not in told("MODEL.WEIGHTS", str(run / "model_final.pth"))
    detections.write_text("[{}]")  # of another evaluation than the note
    assert "drawn from" not in told()
