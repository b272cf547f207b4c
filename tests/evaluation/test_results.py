"""Result files are written whole, and what cannot be evaluated is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from zenith_det.errors import DatasetError, UserError
from zenith_det.evaluation import (
    check_results,
    decode_masks,
    detections_to_results,
    encode_masks,
    evaluate_coco,
    write_results,
)

from .coco_cases import perturb, random_ground_truth
from .test_coco import hit, one_object


def test_written_results_read_back_equal(tmp_path: Path) -> None:
    ground_truth = random_ground_truth(0)
    results = perturb(ground_truth, 1)
    path = write_results(results, tmp_path / "inference" / "coco_instances_results.json")
    assert json.loads(path.read_text()) == results
    check_results(results, ground_truth, ("bbox", "segm", "keypoints"))
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = write_results([hit()], tmp_path / "results.json")
    with pytest.raises(DatasetError, match="not finite"):
        write_results([hit(score=float("nan"))], path)
    assert json.loads(path.read_text()) == [hit()]
    assert len(list(tmp_path.iterdir())) == 1


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"results\.json: cannot be written"):
        write_results([], tmp_path / "file" / "results.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_id": 6}, r"is of image 6, which the ground truth \(1 images\) does not have"),
        ({"score": float("nan")}, r"\(image 5\) has score nan"),
        ({"score": None}, "has score None"),
        ({"bbox": [1, 2, 3]}, r"has bbox \[1, 2, 3\]"),
        ({"bbox": [1, 2, -3, 4]}, "sides >= 0"),
        ({"bbox": [1, 2, float("inf"), 4]}, "finite"),
        ({"segmentation": [[1, 2, 3, 4, 5, 6]]}, "not compressed RLE"),
        ({"segmentation": {"size": [9, 9], "counts": "Q1"}}, r"size \[9, 9\], but the image is \[200, 200\]"),
        ({"keypoints": [1, 2]}, "triples"),
    ],
)
def test_a_bad_result_is_named_with_its_image(change: dict[str, Any], message: str) -> None:
    with pytest.raises(DatasetError, match=message) as caught:
        check_results([hit(), hit(**change)], one_object())
    assert str(caught.value).startswith("results: detection 1 ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["image_id", "category_id", "score", "bbox"])
def test_a_missing_field_is_named(key: str) -> None:
    with pytest.raises(DatasetError, match=f"has no '{key}'"):
        check_results([{k: v for k, v in hit().items() if k != key}], one_object())
    with pytest.raises(DatasetError, match="detection 0 is int"):
        check_results([3], one_object())


def test_missing_masks_are_told_before_evaluation() -> None:
    with pytest.raises(DatasetError, match="has no 'segmentation', but is to be evaluated for bbox, segm"):
        evaluate_coco(one_object(), [hit()], ("bbox", "segm"))


def test_arrays_become_results_with_original_ids_and_whole_pixel_keypoints() -> None:
    masks = np.zeros((2, 200, 200), bool)
    masks[0, 20:70, 10:60] = True
    results = detections_to_results(
        5,
        boxes=np.array([[10, 20, 60, 70], [0, 0, 5, 9]], np.float32),
        scores=np.array([0.5, 0.25], np.float32),
        classes=np.array([1, 0]),
        category_ids=[7, 9],
        masks=masks,
        keypoints=np.full((2, 3, 3), 4.5, np.float32),
    )
    assert [r["category_id"] for r in results] == [9, 7]
    assert results[0]["bbox"] == [10.0, 20.0, 50.0, 50.0]
    assert results[1]["bbox"] == [0.0, 0.0, 5.0, 9.0]
    assert results[0]["keypoints"] == [4.0, 4.0, 4.5] * 3
    json.dumps(results, allow_nan=False)
    assert (decode_masks([r["segmentation"] for r in results]) == masks).all()
    evaluate_coco(one_object(), results, ("bbox", "segm"))


def test_no_detections_in_an_image() -> None:
    empty = np.zeros((0, 4))
    assert (
        detections_to_results(5, empty, [], [], [7], masks=np.zeros((0, 8, 8)), keypoints=np.zeros((0, 3, 3)))
        == []
    )


def test_a_class_the_dataset_lacks() -> None:
    with pytest.raises(DatasetError, match="class index 2 was predicted, but the dataset has 2 classes"):
        detections_to_results(5, [[0, 0, 1, 1]], [0.5], [2], [7, 9])


def test_masks_round_trip_at_any_shape() -> None:
    rng = np.random.default_rng(0)
    for shape in ((3, 1, 1), (2, 5, 7), (1, 64, 3), (0, 4, 6)):
        masks = rng.random(shape) < 0.4
        rles = encode_masks(masks)
        assert all(isinstance(rle["counts"], str) for rle in rles)
        assert json.loads(json.dumps(rles)) == rles
        back = decode_masks(rles, shape[1:])
        assert back.dtype == bool
        assert back.shape == shape
        assert (back == masks).all()


def test_masks_of_different_sizes_are_refused() -> None:
    rles = encode_masks(np.ones((1, 3, 4))) + encode_masks(np.ones((1, 4, 3)))
    with pytest.raises(ValueError, match="one size"):
        decode_masks(rles)
    with pytest.raises(ValueError, match="must have shape"):
        encode_masks(np.ones((3, 4)))
