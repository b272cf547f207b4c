"""Images and their annotations move together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as mask_api

from tests.engines.torchvision_engine.small_models import small_config
from zenith_det.data import DatasetMetadata
from zenith_det.engines.batches import TrainingDataset
from zenith_det.engines.torchvision_engine.datasets import repeats
from zenith_det.engines.torchvision_engine.input_pipeline import (
    Geometry,
    TrainingMapper,
    crop_size,
    shortest_edge_size,
)
from zenith_det.engines.torchvision_engine.masks import bounds, clip_polygon, polygons_to_bitmap
from zenith_det.errors import DatasetError

NAMES = ("nose", "left_eye", "right_eye")
METADATA = DatasetMetadata("painted", "", "", ("thing",), {1: 0}, NAMES, (("left_eye", "right_eye"),))
WIDTH, HEIGHT = 60, 40


@pytest.fixture
def record(tmp_path: Path) -> dict:
    """A red rectangle at x 10..30, y 5..25 on black, with a polygon, an RLE and a crowd over it."""
    pixels = np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)
    pixels[5:25, 10:30] = (255, 0, 0)
    path = tmp_path / "painted.png"
    Image.fromarray(pixels).save(path)
    bitmap = np.zeros((HEIGHT, WIDTH), dtype=np.uint8, order="F")
    bitmap[5:25, 10:30] = 1
    common = {"bbox": [10.0, 5.0, 20.0, 20.0], "bbox_mode": 1, "category_id": 0, "area": 400.0}
    keypoints = [20.5, 6.5, 2.0, 28.5, 10.5, 2.0, 12.5, 10.5, 1.0]
    return {
        "file_name": str(path), "height": HEIGHT, "width": WIDTH, "image_id": 7,
        "annotations": [
            common | {"id": 1, "iscrowd": 0, "segmentation": [[10, 5, 30, 5, 30, 25, 10, 25]], "keypoints": keypoints},
            common | {"id": 2, "iscrowd": 0, "segmentation": mask_api.encode(bitmap)},
            common | {"id": 3, "iscrowd": 1, "segmentation": mask_api.encode(bitmap)},
            common | {"id": 4, "iscrowd": 0, "bbox": [70.0, 5.0, 5.0, 5.0]},
        ],
    }  # fmt: skip


def mapper(task: str, flip: str, size: int = 80, **overrides: object) -> TrainingMapper:
    keypoints = {"MODEL__ROI_KEYPOINT_HEAD__NUM_KEYPOINTS": 3}
    loaded = small_config(
        task, INPUT__RANDOM_FLIP=flip, INPUT__MIN_SIZE_TRAIN=(size,), INPUT__MAX_SIZE_TRAIN=1000,
        **keypoints, **overrides,
    )  # fmt: skip
    return TrainingMapper(loaded.cfg, METADATA)


def flipped(make: TrainingMapper, record: dict, want: bool) -> dict:
    for seed in range(50):
        sample = make(record, np.random.default_rng(seed))
        if (sample["targets"].boxes[0, 0] > 50) == want:
            return sample
    raise AssertionError("50 coin flips fell on the same side")


@pytest.mark.parametrize("flip", ["none", "horizontal", "vertical"])
@pytest.mark.parametrize("mask_format", ["polygon", "bitmask"])
def test_box_and_masks_stay_on_the_painted_object(record: dict, flip: str, mask_format: str) -> None:
    make = mapper("mask", flip, INPUT__MASK_FORMAT=mask_format)
    for seed in range(6):
        sample = make(record, np.random.default_rng(seed))
        image, targets = sample["image"].float(), sample["targets"]
        painted = image[2] > 127  # BGR: red is last
        assert image.shape == (3, 80, 120)
        assert len(targets.boxes) == 2, "the crowd and the box outside the image don't train"
        rows, columns = painted.any(1).nonzero(), painted.any(0).nonzero()
        box = [float(columns.min()), float(rows.min()), float(columns.max()) + 1, float(rows.max()) + 1]
        assert targets.boxes[0].tolist() == pytest.approx(box, abs=1.0)
        for mask in targets.masks:
            bitmap = (
                mask
                if isinstance(mask, torch.Tensor)
                else torch.from_numpy(polygons_to_bitmap(mask, 80, 120))
            )
            assert (bitmap & painted).sum() / (bitmap | painted).sum() > 0.95


def test_left_and_right_change_places_in_a_mirrored_image(record: dict) -> None:
    record["annotations"] = record["annotations"][:1]
    make = mapper("keypoint", "horizontal")
    plain = flipped(make, record, want=False)["targets"].keypoints[0]
    mirrored = flipped(make, record, want=True)["targets"].keypoints[0]
    assert plain.tolist() == pytest.approx(np.array([[41, 13, 2], [57, 21, 2], [25, 21, 1]]), abs=1e-4)
    # What was the left eye at x = 57 is at 120 - 57 now, and is a right eye.
    assert mirrored.tolist() == pytest.approx(np.array([[79, 13, 2], [95, 21, 1], [63, 21, 2]]), abs=1e-4)


def test_an_object_without_keypoints_among_others_with(record: dict) -> None:
    record["annotations"] = record["annotations"][:2]
    keypoints = mapper("keypoint", "none")(record, np.random.default_rng(0))["targets"].keypoints
    assert keypoints.shape == (2, 3, 3)
    assert keypoints[1].abs().sum() == 0


@pytest.mark.parametrize(
    ("size", "short", "longest", "expected"),
    [
        ((480, 640), 800, 1333, (800, 1067)),
        ((640, 480), 800, 1333, (1067, 800)),
        ((300, 1000), 800, 1333, (400, 1333)),
        ((427, 640), 640, 1333, (640, 959)),
        ((100, 100), 0, 1333, (100, 100)),
        ((2, 1000), 96, 160, (1, 160)),
        ((1000, 1), 96, 160, (160, 1)),
    ],
)
def test_resize_keeps_the_aspect_ratio_within_both_limits(
    size: tuple[int, int], short: int, longest: int, expected: tuple[int, int]
) -> None:
    assert shortest_edge_size(*size, short, longest) == expected


def test_an_image_lost_after_the_start_is_replaced_and_said_so(
    record: dict, caplog: pytest.LogCaptureFixture
) -> None:
    """https://github.com/facebookresearch/detectron2/issues/143: a long run lost to one file."""
    lost = record | {"file_name": record["file_name"] + ".gone", "image_id": 8}
    dataset = TrainingDataset([lost, record], mapper("mask", "none"))
    assert dataset[0, 1]["image_id"] == 7
    assert "painted.png.gone" in caplog.text
    with pytest.raises(DatasetError, match="10 images in a row"):
        _ = TrainingDataset([lost], mapper("mask", "none"))[0, 1]


def test_a_crop_takes_boxes_masks_and_keypoints_along() -> None:
    """A crop of the right lower quarter, then twice the size, then a mirror image."""
    geometry = Geometry(2.0, 2.0, 40, 60, "horizontal", (30, 20, 60, 40))
    pixels = np.arange(40 * 60, dtype=np.uint8).reshape(40, 60)
    assert (geometry.image(pixels, Image.Resampling.NEAREST)[::2, ::-2] == pixels[20:40, 30:60]).all()
    assert geometry.points(np.array([[30.0, 20.0], [40.0, 25.0]])).tolist() == [[60, 0], [40, 10]]


@pytest.mark.parametrize(
    ("kind", "size", "heights", "widths"),
    [
        ("relative", [0.5, 0.25], {50}, {50}),
        ("relative_range", [0.5, 0.9], range(50, 101), range(180, 201)),
        ("absolute", [30, 500], {30}, {200}),
        ("absolute_range", [60, 120], range(60, 101), range(60, 121)),
    ],
)
def test_crops_have_the_sizes_of_detectron2s(kind: str, size: list[float], heights: Any, widths: Any) -> None:
    rng = np.random.default_rng(0)
    seen = {crop_size(kind, size, 100, 200, rng) for _ in range(300)}
    assert {height for height, _ in seen} <= set(heights)
    assert {width for _, width in seen} <= set(widths)
    if kind.endswith("range"):
        assert len({height for height, _ in seen}) > 15


def test_a_polygon_is_cut_at_the_images_edges() -> None:
    """A U whose two arms reach over the right edge, then one of which only the arms are left: two parts."""
    u = np.array([10, 10, 50, 10, 50, 20, 20, 20, 20, 40, 50, 40, 50, 50, 10, 50], dtype=np.float64)
    cut = clip_polygon(u, 60, 30)
    assert bounds(cut).tolist() == [10, 10, 30, 50]
    whole = polygons_to_bitmap([u], 60, 60)
    assert (polygons_to_bitmap(cut, 60, 30) == whole[:, :30]).all()
    left = np.tile([25.0, 0.0], 8)
    arms = clip_polygon(u - left, 60, 35)
    assert sorted(bounds([arm]).tolist() for arm in arms) == [[0, 10, 25, 20], [0, 40, 25, 50]]
    assert (polygons_to_bitmap(arms, 60, 35) == whole[:, 25:]).all()
    assert clip_polygon(u + 60.0, 60, 30) == clip_polygon(u - 60.0, 60, 30) == []
    assert [part.tolist() for part in clip_polygon(u, 60, 60)] == [u.tolist()]


def test_a_cut_polygon_leaves_nothing_without_area_along_the_edges() -> None:
    """One that goes around two sides of the image, then with a tip that reaches into it."""
    around = [(-5, -5), (50, -5), (50, 50), (45, 50), (45, -2), (-5, -2)]
    tip = [(20, -2), (20, 9), (10, 9), (10, -2)]
    for corners, expected in ((around, []), ([*around[:5], *tip, around[5]], [[10, 0, 20, 9]])):
        for polygon in (corners, corners[::-1], [*corners, corners[0]]):
            cut = clip_polygon(np.array(polygon, dtype=np.float64).reshape(-1), 40, 40)
            assert [bounds([part]).tolist() for part in cut] == expected


@pytest.mark.detectron2
def test_polygons_are_cut_as_detectron2_cuts_them() -> None:
    transforms = pytest.importorskip("fvcore.transforms.transform")
    shapely = pytest.importorskip("shapely", reason="what Detectron2 cuts polygons with: pip install shapely")
    rng = np.random.default_rng(0)
    several = 0
    for n in range(200):
        corners = int(rng.integers(5, 25))
        angles = 2 * np.pi * (np.arange(corners) + rng.uniform(0, 0.9, corners)) / corners
        radius = rng.uniform(5, 40, corners)
        polygon = np.stack([50 + radius * np.cos(angles), 50 + radius * np.sin(angles)], axis=1)
        if n % 2:
            polygon = np.round(polygon)  # corners on the crop's edges
        if not shapely.Polygon(polygon).is_valid:
            continue
        x0, y0, w, h = (int(v) for v in rng.integers([20, 20, 10, 10], [60, 60, 50, 50]))
        theirs = transforms.CropTransform(x0, y0, w, h).apply_polygons([polygon.copy()])
        ours = clip_polygon((polygon - (x0, y0)).reshape(-1), h, w)
        assert bool(ours) == bool(theirs)
        several += len(theirs) > 1
        if theirs:
            around = np.concatenate(theirs)
            expected = [*around.min(axis=0), *around.max(axis=0)]
            assert bounds(ours) == pytest.approx(np.array(expected), abs=1e-6)
            areas = [
                sum(shapely.Polygon(part.reshape(-1, 2)).area for part in parts) for parts in (ours, theirs)
            ]
            assert areas[0] == pytest.approx(areas[1], abs=1e-6)
            bitmaps = [polygons_to_bitmap([p.reshape(-1) for p in parts], h, w) for parts in (ours, theirs)]
            assert (bitmaps[0] != bitmaps[1]).sum() <= 3, "a rounding of the corner that a part begins at"
    assert several > 5


def test_images_of_rare_classes_come_more_often() -> None:
    cfg = small_config(
        "mask", DATALOADER__SAMPLER_TRAIN="RepeatFactorTrainingSampler", DATALOADER__REPEAT_THRESHOLD=0.5
    ).cfg
    # Class 0 in four of four images, class 1 in one of them; the last has none.
    records = [
        {"annotations": [{"category_id": c} for c in there]} for there in ([0], [0, 0], [0, 1], [0], [])
    ]
    factors = repeats(cfg, records)
    assert factors is not None
    assert factors.tolist() == pytest.approx([1, 1, np.sqrt(0.5 / 0.2), 1, 1])
    cfg.DATALOADER.REPEAT_SQRT = False
    assert repeats(cfg, records) == pytest.approx(np.array([1, 1, 2.5, 1, 1]))
    cfg.DATALOADER.SAMPLER_TRAIN = "TrainingSampler"
    assert repeats(cfg, records) is None
