"""What both engines say of a training set before they train on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.data.builders import content, write
from tests.engines.torchvision_engine.small_models import small_config
from zenith_det.data import DatasetMetadata, load_coco_dataset
from zenith_det.engines.training_set import check_labels, warn_of_missing_flip_pairs
from zenith_det.errors import ConfigError


def test_a_label_in_any_set_is_enough_for_a_head() -> None:
    def record(**labels: Any) -> dict[str, Any]:
        return {"annotations": [{"bbox": [0, 0, 9, 9], "iscrowd": 0, **labels}]}

    mask, keypoint = small_config("mask").cfg, small_config("keypoint").cfg
    nothing: dict[str, Any] = {"annotations": []}
    outline = record(segmentation=[[0, 0, 9, 0, 9, 9]])
    check_labels(mask, {"a.json": [nothing, record()], "b.json": [outline]})
    check_labels(mask, {"a.json": [nothing]})
    check_labels(keypoint, {"a.json": [record()], "b.json": [record(keypoints=[0.5, 0.5, 0, 1, 1, 1])]})
    crowd = record(segmentation=[[0, 0, 9, 0, 9, 9]], iscrowd=1)
    with pytest.raises(ConfigError, match=r"no object of a\.json, b\.json has a mask"):
        check_labels(mask, {"a.json": [record()], "b.json": [crowd]})
    with pytest.raises(ConfigError, match=r"no object of a\.json has a labelled keypoint"):
        check_labels(keypoint, {"a.json": [record(keypoints=[0.5, 0.5, 0])]})


def metadata(folder: Path, names: list[str], **category: Any) -> DatasetMetadata:
    data = content(1)
    data["categories"] = [{"id": 1, "name": "person", "keypoints": names, **category}]
    return load_coco_dataset(write(folder, data)).metadata


@pytest.mark.parametrize(
    ("names", "category", "task", "flip", "warned"),
    [
        (["1", "2"], {}, "keypoint", "horizontal", True),
        (["1", "2"], {"flip_pairs": []}, "keypoint", "horizontal", False),
        (["1", "2"], {"flip_pairs": [["1", "2"]]}, "keypoint", "horizontal", False),
        (["1", "2"], {}, "keypoint", "vertical", False),
        (["1", "2"], {}, "mask", "horizontal", False),
        (["1"], {}, "keypoint", "horizontal", False),
        (["l_hip", "r_hip"], {}, "keypoint", "horizontal", False),
    ],
)
def test_keypoints_without_sides_are_warned_of_where_images_are_mirrored(
    names: list[str], category: dict[str, Any], task: str, flip: str, warned: bool, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    cfg = small_config(task, INPUT__RANDOM_FLIP=flip).cfg
    warn_of_missing_flip_pairs(cfg, metadata(tmp_path, names, **category))
    lines = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(lines) == warned
    for line in lines:
        assert "\n" not in line
        assert "set: no left and right in the names of its 2 keypoints" in line
        assert "give the category flip_pairs" in line
