"""``tools/demo.py`` on images, folders and a video, with a checkpoint of a run."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from tests.conftest import SmallSet, load_tool
from tests.engines.torchvision_engine.small_models import small_config
from zenith_det.config import load_config
from zenith_det.data import load_coco_dataset
from zenith_det.engines.torchvision_engine.rcnn import build_model
from zenith_det.errors import CheckpointError, UserError


@pytest.fixture(scope="module")
def trained(shapes: SmallSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's config.yaml, with model_final.pth beside it (random weights)."""
    folder = tmp_path_factory.mktemp("run")
    metadata = load_coco_dataset(shapes.train).metadata
    loaded = small_config("mask", MODEL__ROI_HEADS__SCORE_THRESH_TEST=0.0)
    torch.manual_seed(0)
    state = {"model": build_model(loaded.cfg).state_dict(), "dataset": metadata.to_dict()}
    torch.save(state, folder / "model_final.pth")
    (folder / "config.yaml").write_text(loaded.cfg.dump())
    return folder / "config.yaml"


def demo(config: Path, output: Path, *inputs: Path, threshold: float = 0.0) -> None:
    load_tool("demo").main(
        [
            "--config-file", str(config), "--output", str(output), "--confidence-threshold", str(threshold),
            "--input", *map(str, inputs),
        ]
    )  # fmt: skip


def test_a_folder_of_images(trained: Path, shapes: SmallSet, tmp_path: Path) -> None:
    folder = Path(shapes.val[1])
    demo(trained, tmp_path, folder)
    pictures = sorted(p.stem for p in tmp_path.glob("*.png"))
    assert pictures == sorted(p.stem for p in folder.glob("*.png"))


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
