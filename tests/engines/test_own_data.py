"""One's own files, as people give them: what a run says of them, and that it goes on and is reported from anywhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import ROOT, SmallSet
from tests.engines.test_train_net import SMALL
from tests.reliability import runs
from tests.tools.called import called
from zenith_det.commands import report as report_command
from zenith_det.config import load_config
from zenith_det.data.statistics import read_statistics
from zenith_det.evaluation.explained import EXPLAINED_FILE, MOST_WARNINGS

CONFIG = ["--config-file", str(ROOT / "configs" / "quickstart" / "faster_rcnn_zenith.yaml")]


@pytest.mark.parametrize("engine", runs.ENGINES)
def test_a_run_on_files_given_by_relative_paths(engine: str, shapes: SmallSet, tmp_path: Path) -> None:
    runs.need(engine)
    # Two files of one name, as exporters write them; in the second a class that nothing teaches, and not all others.
    flags = []
    for folder, part, (json_file, images) in (("train", "train", shapes.train), ("valid", "val", shapes.val)):
        content = json.loads(Path(json_file).read_text())
        if folder == "valid":
            content["categories"] = [{"id": 50, "name": "wbc"}, *content["categories"][1:]]
            content["annotations"] = [a for a in content["annotations"] if a["category_id"] != 1]
            content["annotations"][0]["category_id"] = 50
        (tmp_path / folder).mkdir()
        own = tmp_path / folder / "_annotations.coco.json"
        own.write_text(json.dumps(content))
        flags += [
            f"--{part}-json",
            os.path.relpath(own, ROOT),
            f"--{part}-images",
            os.path.relpath(images, ROOT),
        ]
    output = tmp_path / "run"
    done = runs.forked(
        [
            "--engine", engine, *CONFIG, *flags, *SMALL, "OUTPUT_DIR", os.path.relpath(output, ROOT),
            "SOLVER.MAX_ITER", "4", "TEST.EVAL_PERIOD", "1", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.9",
            "TEST.VALIDATION_LOSS", "True",
        ],
        one_stream=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (
        "AP of wbc can only be 0: validation: valid has 1 object of it, no training set has any"
        in done.stdout
    )
    assert "training: train " in done.stdout
    # Five evaluations or more, each with an AP of 0.
    assert done.stdout.count("zenith_det.evaluation.explained]: WARNING ") <= MOST_WARNINGS
    assert "zenith_det.evaluation.explained]: WARNING bbox AP" in done.stdout
    sets, lines = read_statistics(output)
    assert [one.title for one in sets] == ["training: train", "validation: valid"]
    assert any(line.startswith("AP of wbc can only be 0") for line in lines)
    cfg = load_config(str(output / "config.yaml")).cfg
    assert str(output) == cfg.OUTPUT_DIR
    assert (
        (cfg.DATASETS.TRAIN_JSON,) == cfg.DATASETS.TRAIN == (str(tmp_path / "train/_annotations.coco.json"),)
    )
    assert (cfg.DATASETS.VAL_JSON,) == cfg.DATASETS.TEST == (str(tmp_path / "valid/_annotations.coco.json"),)
    assert shapes.val[1] == cfg.DATASETS.VAL_IMAGES
    assert json.loads((output / "inference" / EXPLAINED_FILE).read_text())
    # From elsewhere.
    words = [
        "--config-file",
        str(output / "config.yaml"),
        "--engine",
        engine,
        "--resume",
        "SOLVER.MAX_ITER",
        "5",
    ]
    resumed = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "train_net.py"), *words],
        cwd=tmp_path, env=runs.environment(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming from " in resumed.stdout
    reported = called(report_command.main, str(output))
    assert (reported.returncode, reported.stderr) == (0, "")
    assert "missing" not in reported.stdout
    page = (output / "report.html").read_text()
    assert "Why an AP is 0 or n/a (trained" in page
    assert "AP of wbc can only be 0" in page
    assert str(tmp_path / "valid") in page


@pytest.mark.parametrize("engine", runs.ENGINES)
def test_12_bit_images_keep_their_scale(engine: str, shapes: SmallSet, tmp_path: Path) -> None:
    """From the training set to its config.yaml, and from there to an evaluation alone."""
    runs.need(engine)
    images = tmp_path / "images"
    images.mkdir()
    for path in Path(shapes.val[1]).glob("*.png"):
        with Image.open(path) as picture:
            grey = np.asarray(picture.convert("L")).astype(np.uint16) * 16
        Image.fromarray(grey).save(images / path.name)
    output = tmp_path / "run"
    files = ["--train-json", shapes.val[0], "--train-images", str(images)]
    files += ["--val-json", shapes.val[0], "--val-images", str(images)]
    words = ["--engine", engine, *CONFIG, *files, *SMALL, "OUTPUT_DIR", str(output), "SOLVER.MAX_ITER", "2"]
    done = runs.forked(words, one_stream=False)
    assert done.returncode == 0, done.stderr
    assert "0 is read as black, 4095 as white, in all alike" in done.stdout
    assert load_config(str(output / "config.yaml")).cfg.INPUT.VALUE_RANGE == (0, 4095)
    again = ["--engine", engine, "--config-file", str(output / "config.yaml"), "--eval-only"]
    done = runs.forked([*again, "MODEL.WEIGHTS", str(output / "model_final.pth")], one_stream=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("engine", runs.ENGINES)
def test_a_part_of_the_training_set_is_held_out(engine: str, shapes: SmallSet, tmp_path: Path) -> None:
    runs.need(engine)
    output = tmp_path / "run"
    words = [
        "--engine", engine, *CONFIG, *shapes.flags[:4], "--val-share", "0.25", *SMALL, "OUTPUT_DIR", str(output),
    ]  # fmt: skip
    done = runs.forked([*words, "SOLVER.MAX_ITER", "2"], one_stream=False)
    assert done.returncode == 0, done.stderr
    assert "is split by image: 18 to train on, 6 to evaluate on (25%)" in done.stdout
    sets, _ = read_statistics(output)
    assert [(one.role, one.images) for one in sets] == [("training", 18), ("validation", 6)]
    resumed = runs.forked([*words, "SOLVER.MAX_ITER", "3", "--resume"], one_stream=False)
    assert resumed.returncode == 0, resumed.stderr
    assert "is split by image" not in resumed.stdout
    assert read_statistics(output)[0] == sets


def test_images_that_are_missing_may_be_left_out(shapes: SmallSet, tmp_path: Path) -> None:
    content = json.loads(Path(shapes.train[0]).read_text())
    content["images"][4]["file_name"] = "nowhere.png"
    (tmp_path / "train.json").write_text(json.dumps(content))
    words = [
        "--engine", "torchvision", *CONFIG, "--train-json", str(tmp_path / "train.json"), "--train-images",
        shapes.train[1], *SMALL, "OUTPUT_DIR", str(tmp_path / "run"), "SOLVER.MAX_ITER", "1", "DATASETS.TEST", "()",
    ]  # fmt: skip
    refused = runs.forked(words, one_stream=False)
    assert refused.returncode == 2
    told = f"1 of 24 images is missing in {shapes.train[1]}: nowhere.png; DATASETS.MAX_BAD_IMAGES 1 ("
    assert told in refused.stderr
    assert runs.forked([*words, "--max-bad-images", "1"], one_stream=False).returncode == 0
