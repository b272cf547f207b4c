"""NUM_CLASSES and NUM_KEYPOINTS follow the training set; a number that contradicts it is an error."""

from __future__ import annotations

import pytest

from zenith_det.config import follow_dataset, load_config
from zenith_det.errors import ConfigError


def test_numbers_follow_the_set() -> None:
    loaded = load_config("configs/keypoint_rcnn_zenith.yaml")
    follow_dataset(loaded, "animals", 3, 5, (0.1,) * 5)
    assert loaded.cfg.MODEL.ROI_HEADS.NUM_CLASSES == 3
    assert loaded.cfg.MODEL.RETINANET.NUM_CLASSES == 3
    assert loaded.cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS == 5
    assert loaded.cfg.TEST.KEYPOINT_OKS_SIGMAS == [0.1] * 5


def test_the_right_number_given_explicitly_is_fine() -> None:
    loaded = load_config("configs/mask_rcnn_zenith.yaml", ["MODEL.ROI_HEADS.NUM_CLASSES", "3"])
    follow_dataset(loaded, "animals", 3, 0)


@pytest.mark.parametrize(
    ("key", "fragments"),
    [
        ("MODEL.ROI_HEADS.NUM_CLASSES", ["is 80", "command line", "animals has 3 classes"]),
        ("MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", ["is 80", "command line", "animals has 5 keypoints"]),
    ],
)
def test_a_contradiction_names_both_numbers(key: str, fragments: list[str]) -> None:
    loaded = load_config("configs/keypoint_rcnn_zenith.yaml", [key, "80"])
    with pytest.raises(ConfigError) as caught:
        follow_dataset(loaded, "animals", 3, 5)
    assert all(fragment in str(caught.value) for fragment in [key, *fragments])


def test_a_head_that_the_model_lacks_contradicts_nothing() -> None:
    """A run's own config.yaml holds every key."""
    loaded = load_config("configs/mask_rcnn_zenith.yaml", ["MODEL.RETINANET.NUM_CLASSES", "80"])
    follow_dataset(loaded, "animals", 3, 0)


def test_keypoints_asked_of_a_set_without() -> None:
    with pytest.raises(ConfigError, match=r"KEYPOINT_ON is True .*animals has no keypoints"):
        follow_dataset(load_config("configs/keypoint_rcnn_zenith.yaml"), "animals", 3, 0)
