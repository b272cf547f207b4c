"""Test-time augmentation: several views of an image, one set of detections."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.engines.torchvision_engine.small_models import small_config
from zenith_det.config import validate_config
from zenith_det.engines.torchvision_engine.input_pipeline import TestMapper
from zenith_det.engines.torchvision_engine.rcnn import build_model
from zenith_det.engines.torchvision_engine.tta import RCNNWithTTA
from zenith_det.errors import ConfigError

#: Each keypoint's place in a mirror image.
SWAPPED = (0, 2, 1, 4, 3)


def detector(task: str, **overrides: object) -> tuple[Any, RCNNWithTTA, TestMapper]:
    """A random model, plain and with test-time augmentation, and its mapper."""
    loaded = small_config(
        task,
        MODEL__ROI_KEYPOINT_HEAD__NUM_KEYPOINTS=len(SWAPPED),
        INPUT__MIN_SIZE_TEST=64,
        TEST__DETECTIONS_PER_IMAGE=20,
        **overrides,
    )
    torch.manual_seed(3)
    model = build_model(loaded.cfg).eval()
    return model, RCNNWithTTA(loaded.cfg, model, SWAPPED), TestMapper(loaded.cfg)


def picture(height: int = 64, width: int = 96) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("task", ["faster", "mask", "keypoint"])
def test_one_view_as_the_image_is_tested_changes_nothing(task: str) -> None:
    model, augmented, mapper = detector(task, TEST__AUG__MIN_SIZES=(64,), TEST__AUG__FLIP=False)
    sample = mapper.from_image(picture())
    with torch.no_grad():
        (plain,) = model([sample])
    (found,) = augmented([sample])
    assert len(plain["scores"]) > 5
    assert found.keys() == plain.keys()
    for name, value in plain.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("task", ["mask", "keypoint"])
def test_a_mirror_image_has_the_mirrored_detections(task: str) -> None:
    """Mirror images among the views make a detector that knows no left and right."""
    model, augmented, mapper = detector(task, TEST__AUG__MIN_SIZES=(64,))
    image = picture()
    sample, mirrored = mapper.from_image(image), mapper.from_image(np.ascontiguousarray(image[:, ::-1]))
    (found,), (in_mirror,) = augmented([sample]), augmented([mirrored])
    assert len(found["scores"]) > 5
    torch.testing.assert_close(in_mirror["scores"], found["scores"])
    x0, y0, x1, y1 = found["boxes"].unbind(dim=1)
    torch.testing.assert_close(in_mirror["boxes"], torch.stack((96 - x1, y0, 96 - x0, y1), dim=1))
    if task == "mask":
        assert found["masks"].any()
        assert (in_mirror["masks"] != found["masks"].flip(-1)).float().mean() < 1e-3
    else:
        points = found["keypoints"][:, list(SWAPPED)]
        points[..., 0] = 96 - points[..., 0]
        torch.testing.assert_close(in_mirror["keypoints"], points, rtol=1e-4, atol=1e-3)
    with torch.no_grad():
        (plain,), (plain_in_mirror,) = model([sample]), model([mirrored])
    assert abs(plain["scores"][0] - plain_in_mirror["scores"][0]) > 1e-4, (
        "the plain detector doesn't know it either"
    )


def test_views_in_which_nothing_is_found() -> None:
    _, augmented, mapper = detector(
        "mask", MODEL__ROI_HEADS__SCORE_THRESH_TEST=0.9, TEST__AUG__MIN_SIZES=(48, 64)
    )
    (found,) = augmented([mapper.from_image(picture(50, 70))])
    assert found["boxes"].shape == (0, 4)
    assert found["masks"].shape == (0, 50, 70)


def test_what_cannot_be_augmented_is_told() -> None:
    loaded = small_config("keypoint")
    with pytest.raises(ConfigError, match=r"^TEST\.AUG\.FLIP is True, but .* 17 keypoints a mirror image"):
        RCNNWithTTA(loaded.cfg, build_model(loaded.cfg))
    for key, value in (("MIN_SIZES", ()), ("MIN_SIZES", (400, -1)), ("MAX_SIZE", 0)):
        cfg = small_config("mask").cfg
        cfg.TEST.AUG.ENABLED = True
        validate_config(cfg)
        cfg.TEST.AUG[key] = value
        with pytest.raises(ConfigError, match=rf"TEST\.AUG\.{key} is .*: it must be"):
            validate_config(cfg)
