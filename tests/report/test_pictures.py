"""What is drawn is where it belongs, in the colour it should have, and legible on small images."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as coco_mask
import pytest
from PIL import Image

from zenith_det.data.metadata import DatasetMetadata
from zenith_det.errors import UserError
from zenith_det.report import pictures
from zenith_det.report.pictures import (
    Instances,
    SheetRow,
    _nth_color,
    _place,
    draw_instances,
    prediction_sheet,
)

GREY = 128
LEFT, RIGHT, MIDDLE = (230, 159, 0), (86, 180, 233), (240, 240, 240)


def metadata(*classes: str) -> DatasetMetadata:
    return DatasetMetadata(
        name="test",
        json_file="",
        image_root="",
        thing_classes=classes,
        thing_dataset_id_to_contiguous_id={10 * (n + 1): n for n in range(len(classes))},
        keypoint_names=("nose", "left_hand", "right_hand", "left_foot"),
        keypoint_connections=((0, 1), (0, 2), (1, 3)),
    )


TWO = metadata("cat", "dog")
ONE = metadata("person")


def plain(height: int = 640, width: int = 640) -> np.ndarray:
    return np.full((height, width, 3), GREY, np.uint8)


def near(pixel: np.ndarray, color: tuple[int, int, int], tolerance: int = 12) -> bool:
    """Whether a BGR pixel has an RGB colour."""
    return bool(np.abs(pixel[::-1].astype(int) - color).max() <= tolerance)


def has(picture: np.ndarray, color: tuple[int, int, int], tolerance: int = 6) -> np.ndarray:
    return np.abs(picture[:, :, ::-1].astype(int) - color).max(axis=2) <= tolerance


def test_a_box_is_drawn_on_its_edges_and_nowhere_else() -> None:
    image = plain()
    before = image.copy()
    out = draw_instances(image, [[100, 200, 300, 400]], [0], metadata=TWO)
    assert (image == before).all()
    assert out.shape == image.shape
    assert out.dtype == np.uint8
    color = _nth_color(0)
    for x, y in ((100, 300), (299, 300), (200, 200), (200, 399), (299, 399)):
        assert near(out[y, x], color), (x, y)
    for x, y in ((90, 300), (200, 300), (310, 300), (200, 410)):
        assert (out[y, x] == GREY).all(), (x, y)
    # What is left is the label, above the box.
    changed = np.argwhere((out != GREY).any(axis=2))
    assert changed.min(axis=0).tolist()[0] > 170
    assert changed.max(axis=0).tolist() <= [402, 302]


def test_classes_have_different_colors() -> None:
    out = draw_instances(plain(), [[50, 50, 200, 200], [300, 300, 500, 500]], [0, 1], metadata=TWO)
    assert near(out[120, 50], _nth_color(0))
    assert near(out[400, 300], _nth_color(1))
    assert len({_nth_color(n) for n in range(80)}) == 80


def test_instances_of_a_single_class_have_different_colors() -> None:
    out = draw_instances(plain(), [[50, 50, 200, 200], [300, 300, 500, 500]], [0, 0], metadata=ONE)
    assert near(out[400, 300], _nth_color(0))  # the larger is first
    assert near(out[120, 50], _nth_color(1))


def test_a_mask_tints_its_pixels_and_no_others() -> None:
    mask = np.zeros((1, 640, 640), bool)
    mask[0, 250:350, 150:250] = True
    out = draw_instances(plain(), [[100, 200, 300, 400]], [1], [0.9], mask, metadata=TWO)
    tint = tuple(round(0.6 * GREY + 0.4 * channel) for channel in _nth_color(1))
    assert near(out[300, 200], tint, 2)  # type: ignore[arg-type]
    assert near(out[250, 200], _nth_color(1))  # its outline
    inside = out[256:344, 156:244]
    assert has(inside, tint, 2).all()  # type: ignore[arg-type]
    for x, y in ((140, 300), (260, 300), (200, 240), (200, 360)):
        assert (out[y, x] == GREY).all(), (x, y)


def test_small_images_are_enlarged_with_everything_in_place() -> None:
    mask = np.zeros((1, 64, 64), bool)
    mask[0, 20:40, 10:30] = True
    out = draw_instances(plain(64, 64), [[10, 20, 30, 40]], [0], masks=mask, metadata=TWO)
    assert out.shape == (640, 640, 3)
    assert near(out[300, 100], _nth_color(0), 40)
    assert near(out[300, 200], tuple(round(0.6 * GREY + 0.4 * c) for c in _nth_color(0)), 2)  # type: ignore[arg-type]
    assert (out[300, 320] == GREY).all()
    # The label is as high as letters have to be.
    label = has(out[:195], _nth_color(0), 30)
    assert label.any(axis=1).sum() >= 14


def test_the_result_has_the_scale_asked_for() -> None:
    assert draw_instances(plain(100, 50), [], [], scale=2.5).shape == (250, 125, 3)
    assert draw_instances(plain(1200, 900), [], []).shape == (1200, 900, 3)


def test_labels_stay_inside_and_clear_of_one_another() -> None:
    taken: list[tuple[float, float, float, float]] = []
    for x0, y0 in [
        (0, 0),
        (630, 0),
        (0, 630),
        (630, 630),
        (-50, -50),
        (900, 300),
        (300, 300),
        (300, 300),
        (300, 302),
    ]:
        left, top = _place(np.array([x0, y0, x0 + 10.0, y0 + 10.0]), 80, 20, (640, 640), taken, [])
        assert 0 <= left <= 560
        assert 0 <= top <= 620
        for other in taken:
            assert left >= other[2] or left + 80 <= other[0] or top >= other[3] or top + 20 <= other[1]
        taken.append((left, top, left + 80.0, top + 20.0))


def test_a_label_does_not_hide_a_tiny_object() -> None:
    box = np.array([0.0, 0.0, 12.0, 12.0])  # in the corner: no room above
    left, top = _place(box, 80, 20, (640, 640), [], [(0, 0, 12, 12)])
    assert left >= 12 or top >= 12


def test_a_label_wider_than_the_image_begins_at_its_edge() -> None:
    assert _place(np.array([5.0, 5.0, 9.0, 9.0]), 800, 20, (640, 640), [], [])[0] == 0
    out = draw_instances(
        plain(40, 20), [[2, 2, 9, 9]], [0], metadata=metadata("a very long name of a class " * 5, "b")
    )
    assert out.shape == (640, 320, 3)


def test_class_and_score_are_in_the_label() -> None:
    without = draw_instances(plain(), [[100, 200, 300, 400]], [0], metadata=TWO)
    other_name = draw_instances(plain(), [[100, 200, 300, 400]], [0], metadata=metadata("cow", "dog"))
    with_score = draw_instances(plain(), [[100, 200, 300, 400]], [0], [0.93], metadata=TWO)
    assert (without != other_name).any()
    assert has(with_score, _nth_color(0), 30)[180:199].sum() > has(without, _nth_color(0), 30)[180:199].sum()
    draw_instances(plain(), [[100, 200, 300, 400]], [7])  # without names, or beyond them, the number serves


def test_the_name_of_the_only_class_is_left_out() -> None:
    boxes = [[100, 200, 300, 400]]
    assert not (draw_instances(plain(), boxes, [0], metadata=ONE)[:195] != GREY).any()
    score = draw_instances(plain(), boxes, [0], [0.93], metadata=ONE)
    assert has(score, _nth_color(0), 30)[180:199].any()
    with_name = draw_instances(plain(), boxes, [0], [0.93], metadata=TWO)
    assert has(score, _nth_color(0), 30)[180:199].sum() < has(with_name, _nth_color(0), 30)[180:199].sum()


def test_labels_without_room_are_left_out() -> None:
    """Objects that lie on one another have places for ten labels around them, not for forty."""
    boxes = np.array([[300, 300, 340, 340]] * 40)
    classes = np.arange(40)
    out = draw_instances(plain(), boxes, classes)
    chips = [
        n
        for n in range(40)
        if has(out, _nth_color(n), 25)[:299].any() or has(out, _nth_color(n), 25)[341:].any()
    ]
    assert 4 <= len(chips) <= 14


def keypoints(*visibility: float) -> np.ndarray:
    points = [(320, 150), (200, 300), (440, 300), (200, 500)]
    return np.array([[(x, y, v) for (x, y), v in zip(points, visibility, strict=True)]])


def test_keypoints_and_skeleton_are_where_they_belong() -> None:
    out = draw_instances(plain(), [[100, 100, 500, 600]], [0], None, None, keypoints(2, 2, 1, 2), ONE)
    assert near(out[150, 320], MIDDLE)
    assert near(out[300, 200], LEFT)
    assert near(out[500, 200], LEFT)
    assert near(out[300, 440], (30, 30, 30))  # hidden: hollow
    assert has(out[292:309, 432:449], RIGHT, 30).any()
    assert near(out[400, 200], LEFT)  # the bone between two left joints
    assert near(out[225, 260], MIDDLE, 60)  # and from the middle to the left
    assert (out[400, 300] == GREY).all()


def test_keypoints_that_are_not_there_are_not_drawn() -> None:
    out = draw_instances(plain(), [[100, 100, 500, 600]], [0], None, None, keypoints(2, 2, 0, 0), ONE)
    assert (out[300, 440] == GREY).all()
    assert (out[500, 200] == GREY).all()
    assert (out[400, 200] == GREY).all()


def test_predicted_keypoints_are_drawn_above_the_threshold() -> None:
    points = keypoints(0.9, 0.04, 0.01, 0.5)
    out = draw_instances(plain(), [[100, 100, 500, 600]], [0], [0.9], None, points, ONE)
    assert near(out[150, 320], MIDDLE)
    assert near(out[500, 200], LEFT)
    assert (out[300, 200] == GREY).all()
    assert (out[300, 440] == GREY).all()


def test_crowds_are_grey() -> None:
    out = draw_instances(plain(), [[100, 200, 300, 400]], [0], metadata=TWO, crowd=[True])
    assert near(out[300, 100], (150, 150, 150))
    assert not has(out, _nth_color(0), 20).any()


def test_wild_numbers_of_a_diverged_model_are_drawn_somewhere() -> None:
    boxes = [[-1e9, 5, 1e9, float("inf")], [float("nan")] * 4]
    points = np.full((2, 4, 3), 1e12)
    masks = np.zeros((2, 640, 640), bool)
    assert draw_instances(plain(), boxes, [0, 1], [0.5, 0.1], masks, points, TWO).shape == (640, 640, 3)


def test_lengths_and_sizes_must_agree() -> None:
    with pytest.raises(ValueError, match="1 boxes but 2 classes"):
        draw_instances(plain(), [[0, 0, 1, 1]], [0, 1])
    with pytest.raises(ValueError, match=r"masks have size \(5, 5\), but the image \(640, 640\)"):
        draw_instances(plain(), [[0, 0, 1, 1]], [0], masks=np.zeros((1, 5, 5), bool))
    with pytest.raises(ValueError, match=r"must be \(H, W, 3\)"):
        draw_instances(np.zeros((5, 5), np.uint8), [], [])


def test_ground_truth_of_a_record_with_every_kind_of_mask() -> None:
    full = np.zeros((20, 30), np.uint8)
    full[5:15, 10:20] = 1
    compressed = coco_mask.encode(np.asfortranarray(full))
    text = {"size": [20, 30], "counts": compressed["counts"].decode()}
    runs = {"size": [20, 30], "counts": [10 * 20 + 5, 10, *([10, 10] * 9), 5 + 10 * 20]}
    annotations: list[dict[str, Any]] = [
        {"bbox": [10, 5, 10, 10], "category_id": 0, "segmentation": [[10, 5, 20, 5, 20, 15, 10, 15]]},
        {"bbox": [10, 5, 10, 10], "category_id": 1, "segmentation": compressed, "iscrowd": 1},
        {"bbox": [10, 5, 10, 10], "category_id": 1, "segmentation": text},
        {"bbox": [10, 5, 10, 10], "category_id": 1, "segmentation": runs, "keypoints": [1.5, 2.5, 2] * 4},
        {"bbox": [1, 2, 3, 4], "category_id": 0},
    ]
    found = Instances.from_record({"height": 20, "width": 30, "annotations": annotations})
    assert found.boxes[0].tolist() == [10, 5, 20, 15]
    assert found.masks is not None
    assert [(mask == full).all() for mask in found.masks] == [True] * 4 + [False]
    assert not found.masks[4].any()
    assert found.crowd is not None
    assert found.crowd.tolist() == [False, True, False, False, False]
    assert found.keypoints is not None
    assert found.keypoints.shape == (5, 4, 3)
    assert found.keypoints[3, 0].tolist() == [1.5, 2.5, 2]
    assert len(Instances.from_record({"height": 20, "width": 30, "annotations": []})) == 0


def test_results_get_class_indices_and_pixel_centres() -> None:
    result = {"bbox": [1, 2, 3, 4], "category_id": 20, "score": 0.5, "keypoints": [4, 4, 0.5] * 4}
    found = Instances.from_results([result], TWO)
    assert found.classes.tolist() == [1]
    assert found.boxes.tolist() == [[1, 2, 4, 6]]
    assert found.keypoints is not None
    assert found.keypoints[0, 0].tolist() == [4.5, 4.5, 0.5]
    assert len(Instances.from_results([], TWO)) == 0


def nothing() -> Instances:
    return Instances(np.zeros((0, 4)), np.zeros(0, int), np.zeros(0))


def test_sheet_has_ground_truth_left_and_predictions_right(tmp_path: Path) -> None:
    truth = Instances(np.array([[20, 20, 60, 60]]), np.array([0]))
    found = Instances(np.array([[20, 20, 60, 60], [5, 5, 70, 70]]), np.array([1, 0]), np.array([0.8, 0.1]))
    path = prediction_sheet(
        [SheetRow(plain(80, 80), truth, found)], TWO, tmp_path / "out" / "predictions.png"
    )
    assert path == tmp_path / "out" / "predictions.png"
    assert [p.name for p in path.parent.iterdir()] == ["predictions.png"]
    with Image.open(path) as image:
        sheet = np.asarray(image.convert("RGB"))[:, :, ::-1]
    left, right = sheet[:, : sheet.shape[1] // 2], sheet[:, sheet.shape[1] // 2 :]
    assert has(left, _nth_color(0)).sum() > 200
    assert not has(left, _nth_color(1)).any()
    assert has(right, _nth_color(1)).sum() > 200
    assert not has(right, _nth_color(0)).any()  # below the threshold


def test_sheet_names_the_only_class_in_its_titles(tmp_path: Path) -> None:
    def titles(of: DatasetMetadata) -> np.ndarray:
        rows = [SheetRow(plain(400, 400), nothing(), nothing())]
        return np.asarray(Image.open(prediction_sheet(rows, of, tmp_path / "sheet.png")))[:56]

    assert (titles(ONE) < 128).sum() > (titles(TWO) < 128).sum()


def test_sheet_says_when_nothing_was_found(tmp_path: Path) -> None:
    truth = Instances(np.array([[20, 20, 60, 60]]), np.array([0]))
    weak = Instances(np.array([[20, 20, 60, 60]]), np.array([0]), np.array([0.2]))
    pictures = []
    for number, found in enumerate((nothing(), weak)):
        path = prediction_sheet([SheetRow(plain(80, 80), truth, found)], TWO, tmp_path / f"{number}.png")
        with Image.open(path) as image:
            pictures.append(np.asarray(image.convert("RGB"))[:, :, ::-1])
        assert has(pictures[-1][:, pictures[-1].shape[1] // 2 :], (60, 60, 60), 30).sum() > 300
    assert (pictures[0] != pictures[1]).any()


def test_sheet_takes_images_of_any_shape_together(tmp_path: Path) -> None:
    rows = [
        SheetRow(plain(*size), nothing(), nothing()) for size in ((40, 400), (400, 40), (1, 1), (900, 900))
    ]
    assert prediction_sheet(rows, None, tmp_path / "sheet.png").is_file()


def test_sheet_has_the_masks_of_one_image_in_memory_and_twice_at_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pictures, "SHEET_WIDTH", 100)
    count, side = 60, 600
    rle = coco_mask.encode(np.asfortranarray(np.eye(side, dtype=np.uint8)))
    ids = TWO.thing_dataset_id_to_contiguous_id
    result = {"bbox": [0, 0, side, side], "category_id": next(iter(ids)), "score": 0.9, "segmentation": rle}
    rows = (
        SheetRow(plain(side, side), nothing(), Instances.from_results([result] * count, TWO))
        for _ in range(3)
    )
    tracemalloc.start()
    try:
        prediction_sheet(rows, TWO, tmp_path / "sheet.png")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count * side**2 < peak < 2.5 * count * side**2


def test_sheet_errors_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no image to draw"):
        prediction_sheet([], TWO, tmp_path / "sheet.png")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        prediction_sheet([SheetRow(plain(), nothing(), nothing())], TWO, tmp_path / "file" / "sheet.png")


@pytest.mark.parametrize("task", ["instances", "keypoints"])
def test_a_generated_set_from_records_and_results(tmp_path: Path, task: str) -> None:
    from zenith_det.data import load_coco_dataset, read_image
    from zenith_det.data.synthetic import generate

    files = generate(tmp_path, train=1, val=4, size=96, task=task)["val"]
    dataset = load_coco_dataset((str(files.json_file), str(files.image_root)))
    rows = []
    for record in dataset.records:
        truth = Instances.from_record(record)
        assert truth.masks is not None or not len(truth)
        rows.append(SheetRow(read_image(record["file_name"], "BGR"), truth, nothing()))
    assert prediction_sheet(rows, dataset.metadata, tmp_path / "predictions.png").stat().st_size > 20_000
