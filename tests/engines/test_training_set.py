"""What both engines say of a training set before they train on it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from tests.data.builders import content, write
from tests.engines.torchvision_engine.small_models import small_config
from zenith_det.data import DatasetMetadata, load_coco_dataset
from zenith_det.engines.data_description import DataDescription
from zenith_det.engines.torchvision_engine.datasets import load_training_set
from zenith_det.engines.training_set import (
    check_labels,
    refuse_unusable_keypoints,
    warn_of_sides_in_mirrored_images,
)
from zenith_det.errors import ConfigError, DatasetError


def test_a_label_in_any_set_is_enough_for_a_head(caplog: pytest.LogCaptureFixture) -> None:
    def record(**labels: Any) -> dict[str, Any]:
        return {"annotations": [{"bbox": [0, 0, 9, 9], "iscrowd": 0, **labels}]}

    mask, keypoint = small_config("mask").cfg, small_config("keypoint").cfg
    nothing: dict[str, Any] = {"annotations": []}
    outline = record(segmentation=[[0, 0, 9, 0, 9, 9]])
    with caplog.at_level(logging.INFO):
        check_labels(mask, {"a.json": [nothing, record()], "b.json": [outline]})
    assert "1 of 2 objects have no mask: they are learned by their boxes alone" in caplog.text
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
    warn_of_sides_in_mirrored_images(cfg, metadata(tmp_path, names, **category))
    lines = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(lines) == warned
    for line in lines:
        assert "\n" not in line
        assert "set: no left and right in the names of its 2 keypoints" in line
        assert "give the category flip_pairs" in line


@pytest.mark.parametrize(
    ("names", "classes", "told"),
    [
        (
            ["left elbow", "right_elbow", "left_knee"],
            ["person"],
            "keypoints of a side that have no partner on the other: left_knee;",
        ),
        (["left elbow", "right_elbow", "nose"], ["person"], None),
        (["a", "b"], ["person"], "no left and right in the names of its 2 keypoints"),
        (
            ["left_a", "right_a"],
            ["left hand", "RightHand", "bright"],
            "classes that say left or right: left hand, RightHand;",
        ),
    ],
)
def test_sides_that_a_mirror_would_swap_are_named(
    names: list[str], classes: list[str], told: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = content(1)
    data["categories"] = [{"id": n, "name": name, "keypoints": names} for n, name in enumerate(classes, 1)]
    found = load_coco_dataset(write(tmp_path, data)).metadata
    for flip, warned in (("horizontal", told), ("none", None)):
        caplog.clear()
        warn_of_sides_in_mirrored_images(small_config("keypoint", INPUT__RANDOM_FLIP=flip).cfg, found)
        lines = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        assert len(lines) == bool(warned)
        assert warned is None or warned in lines[0]


def test_unusable_keypoints_stop_a_keypoint_model_alone(tmp_path: Path) -> None:
    data = content(1)
    data["categories"] = [
        {"id": 1, "name": "person", "keypoints": ["head", "foot"]},
        {"id": 2, "name": "skis", "keypoints": ["tip"]},
    ]
    found = load_coco_dataset(write(tmp_path, data)).metadata
    refuse_unusable_keypoints(small_config("mask").cfg, found)
    with pytest.raises(
        ConfigError, match=r"set\.json can't be trained: category 'person' has 2 keypoints and"
    ):
        refuse_unusable_keypoints(small_config("keypoint").cfg, found)


FILTERS = [
    (True, 1, [1]),
    (True, 0, [1, 2]),
    (False, 1, [1]),
    (False, 0, [1, 2, 3]),
]


def three_images(folder: Path) -> tuple[str, str]:
    """One with two labelled keypoints, one whose object has none labelled, one without objects."""
    data = content()
    data["categories"] = [{"id": 1, "name": "person", "keypoints": ["l_eye", "r_eye"]}]
    data["annotations"][0]["keypoints"] = [6, 6, 2, 8, 8, 1]
    del data["annotations"][2]
    return write(folder, data)


def filtering_config(files: tuple[str, str], filter_empty: bool, minimum: int) -> Any:
    return small_config(
        "keypoint", DATASETS__TRAIN_JSON=files[0], DATASETS__TRAIN_IMAGES=files[1], DATASETS__TEST=(),
        MODEL__ROI_HEADS__NUM_CLASSES=1,
        DATALOADER__FILTER_EMPTY_ANNOTATIONS=filter_empty,
        MODEL__ROI_KEYPOINT_HEAD__MIN_KEYPOINTS_PER_IMAGE=minimum,
    )  # fmt: skip


@pytest.mark.parametrize(("filter_empty", "minimum", "kept"), FILTERS)
def test_images_are_left_out_by_either_key(
    filter_empty: bool, minimum: int, kept: list[int], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    cfg = filtering_config(three_images(tmp_path), filter_empty, minimum).cfg
    records = load_training_set(cfg, DataDescription(cfg)).records
    assert [record["image_id"] for record in records] == kept
    assert ("FILTER_EMPTY_ANNOTATIONS False keeps them" in caplog.text) == filter_empty
    assert ("MIN_KEYPOINTS_PER_IMAGE 0 keeps them" in caplog.text) == (minimum > 0)


def test_no_image_with_enough_keypoints(tmp_path: Path) -> None:
    loaded = filtering_config(three_images(tmp_path), False, 3)
    with pytest.raises(DatasetError, match="no image with 3 labelled keypoints or more is left to train on"):
        load_training_set(loaded.cfg)


@pytest.mark.detectron2
@pytest.mark.parametrize(("filter_empty", "minimum", "kept"), FILTERS)
def test_detectron2_leaves_out_the_same(
    filter_empty: bool, minimum: int, kept: list[int], tmp_path: Path
) -> None:
    data = pytest.importorskip("detectron2.data", reason="needs the real Detectron2: see docs/DETECTRON2.md")
    from zenith_det.engines.detectron2_engine.data import register_training_sets

    loaded = filtering_config(three_images(tmp_path), filter_empty, minimum)
    register_training_sets(loaded)
    records = data.get_detection_dataset_dicts(
        loaded.cfg.DATASETS.TRAIN, filter_empty=filter_empty, min_keypoints=minimum
    )
    assert [record["image_id"] for record in records] == kept
