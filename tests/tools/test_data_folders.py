"""``--train-json FOLDER``: exports of other tools train as they are, on both engines."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import pytest

from tests.conftest import ROOT, SmallSet
from tests.data.test_converting import SPLITS, WRITERS, sets_of, write_yolo
from tests.engines.test_train_net import SMALL
from tests.reliability import runs
from zenith_det import cli
from zenith_det.commands.data_folders import data_overrides
from zenith_det.errors import DatasetError


def overrides(output: Path, *words: str) -> dict[str, str]:
    parser = argparse.ArgumentParser()
    cli.add_data_flags(parser)
    return {
        key.removeprefix("DATASETS."): value
        for key, value, _ in data_overrides(parser.parse_args(words), output)
    }


@pytest.mark.parametrize("form", WRITERS)
def test_a_folder_stands_for_training_and_validation(form: str, shapes: SmallSet, tmp_path: Path) -> None:
    data = tmp_path / "data"
    WRITERS[form](shapes, data)
    written = tmp_path / "out" / "dataset"
    assert overrides(tmp_path / "out", "--train-json", str(data)) == {
        "TRAIN_JSON": str(written / "train.json"), "TRAIN_IMAGES": str(data),
        "VAL_JSON": str(written / "val.json"), "VAL_IMAGES": str(data),
    }  # fmt: skip


def test_what_is_given_besides_wins(shapes: SmallSet, tmp_path: Path) -> None:
    data = tmp_path / "data"
    write_yolo(shapes, data)
    found = overrides(
        tmp_path,
        "--train-json",
        str(data / "data.yaml"),
        "--val-json",
        shapes.val[0],
        "--val-images",
        shapes.val[1],
    )
    assert found["TRAIN_JSON"] == str(tmp_path / "dataset" / "train.json")
    assert (found["VAL_JSON"], found["VAL_IMAGES"]) == (shapes.val[0], shapes.val[1])


def test_a_folder_without_a_validation_set_gives_none(shapes: SmallSet, tmp_path: Path) -> None:
    write_yolo(shapes, tmp_path / "data")
    shutil.rmtree(tmp_path / "data" / "valid")
    description = (tmp_path / "data" / "data.yaml").read_text().replace("val: ../valid/images\n", "")
    (tmp_path / "data" / "data.yaml").write_text(description)
    assert set(overrides(tmp_path, "--train-json", str(tmp_path / "data"))) == {"TRAIN_JSON", "TRAIN_IMAGES"}


def test_a_folder_of_something_else_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello")
    with pytest.raises(DatasetError, match="a folder without a COCO annotation file"):
        overrides(tmp_path, "--train-json", str(tmp_path))


@pytest.mark.parametrize("engine", runs.ENGINES)
def test_a_roboflow_export_trains(engine: str, shapes: SmallSet, tmp_path: Path) -> None:
    """COCO on one engine, YOLO on the other: both ways end in the same four keys."""
    runs.need(engine)
    data = tmp_path / "export"
    if engine == "torchvision":
        write_yolo(shapes, data)
    else:
        for split, folder in SPLITS:
            content, images = sets_of(shapes)[split]
            shutil.copytree(images, data / folder)
            (data / folder / "_annotations.coco.json").write_text(json.dumps(content))
    done = runs.forked(
        [
            "--engine", engine, "--config-file", str(ROOT / "configs/quickstart/mask_rcnn_zenith.yaml"),
            "--train-json", str(data), *SMALL, "OUTPUT_DIR", str(tmp_path / "out"), "SOLVER.MAX_ITER", "2",
        ],
        one_stream=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    last = [json.loads(line) for line in (tmp_path / "out" / "metrics.json").read_text().splitlines()][-1]
    assert "bbox/AP" in last
    assert "segm/AP" in last
