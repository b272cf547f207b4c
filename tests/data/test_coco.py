"""COCO files become Detectron2's records; what a file lacks is filled in, what it says is kept."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO

from zenith_det.data import (
    coco_ground_truth,
    examine_coco_dataset,
    filter_empty,
    filter_few_keypoints,
    known_classes,
    load_coco_dataset,
)
from zenith_det.data.annotation_file import read_bytes
from zenith_det.data.segmentations import _compressed_counts
from zenith_det.errors import DatasetError

from .builders import HEIGHT, SQUARE, WIDTH, content, write


def person(names: list[str] | None = None, **more: Any) -> dict[str, Any]:
    names = names or ["nose", "left_hand", "right_hand"]
    return {"id": 1, "name": "person", "keypoints": names, "skeleton": [[1, 2], [1, 3]], **more}


def test_record(tmp_path: Path) -> None:
    json_file, image_root = write(tmp_path, content(2))
    dataset = load_coco_dataset((json_file, image_root), strict=True)
    assert dataset.records[1] == {
        "file_name": f"{image_root}/2.png",
        "height": HEIGHT,
        "width": WIDTH,
        "image_id": 2,
        "annotations": [
            {
                "id": 2,
                "bbox": [5.0, 5.0, 10.0, 10.0],
                "bbox_mode": 1,
                "category_id": 0,
                "iscrowd": 0,
                "area": 100.0,
                "segmentation": [SQUARE],
            }
        ],
    }
    assert dataset.metadata.name == "set"
    assert dataset.metadata.thing_classes == ("square",)
    assert not dataset.report.counts


def test_images_are_sorted_by_id(tmp_path: Path) -> None:
    data = content()
    data["images"].reverse()
    dataset = load_coco_dataset(write(tmp_path, data))
    assert [record["image_id"] for record in dataset.records] == [1, 2, 3]


@pytest.mark.parametrize("ids", [[0, 1, 2], [90, 3, 17], [-5, 2**40, 0]])
def test_any_category_ids(ids: list[int], tmp_path: Path) -> None:
    data = content()
    data["categories"] = [{"id": i, "name": f"class {i}"} for i in ids]
    for annotation, i in zip(data["annotations"], ids, strict=True):
        annotation["category_id"] = i
    dataset = load_coco_dataset(write(tmp_path, data))
    assert dataset.metadata.thing_classes == tuple(f"class {i}" for i in sorted(ids))
    back = coco_ground_truth(dataset)
    assert [a["category_id"] for a in back["annotations"]] == ids
    assert {c["id"]: c["name"] for c in back["categories"]} == {i: f"class {i}" for i in ids}


def test_categories_are_matched_by_name(tmp_path: Path) -> None:
    train = content()
    train["categories"] = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    val = copy.deepcopy(train)
    val["categories"] = [{"id": 7, "name": "dog"}, {"id": 9, "name": "cat"}]
    for annotation in val["annotations"]:
        annotation["category_id"] = 9
    classes = load_coco_dataset(write(tmp_path, train)).metadata.thing_classes
    dataset = load_coco_dataset(write(tmp_path, val, "val.json"), classes=classes)
    assert dataset.metadata.thing_classes == ("cat", "dog")
    assert dataset.metadata.thing_dataset_id_to_contiguous_id == {9: 0, 7: 1}
    assert {a["category_id"] for r in dataset.records for a in r["annotations"]} == {0}
    assert {a["category_id"] for a in coco_ground_truth(dataset)["annotations"]} == {9}
    assert (
        load_coco_dataset(write(tmp_path, val, "val.json"), classes=("cat", "cow")).metadata.num_classes == 2
    )


def test_classes_that_the_training_set_does_not_have(tmp_path: Path) -> None:
    data = content()
    data["categories"] = [{"id": 1, "name": "rbc"}, {"id": 2, "name": "wbc"}, {"id": 3, "name": "dust"}]
    data["annotations"][0]["category_id"] = 2
    source = write(tmp_path, data)
    for other_classes, classes in (("refuse", ("rbc", "WBC")), ("keep", ("WBC", "dust2"))):
        with pytest.raises(
            DatasetError, match=r"it has \d annotations of .*wbc.*: write wbc as WBC, as there \("
        ):
            load_coco_dataset(source, classes=classes, other_classes=other_classes)  # type: ignore[arg-type]
    kept = load_coco_dataset(source, classes=("plt", "rbc"), other_classes="keep")
    assert kept.metadata.thing_classes == ("plt", "rbc", "wbc")  # dust has no object
    assert [a["category_id"] for r in kept.records for a in r["annotations"]] == [2, 1, 1]
    assert [a["category_id"] for a in coco_ground_truth(kept)["annotations"]] == [2, 1, 1]
    assert [len(r["annotations"]) for r in known_classes(kept.records, 2)] == [0, 1, 1]


def test_kinds_of_masks_mixed_in_one_file(tmp_path: Path) -> None:
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[5:15, 5:15] = 1
    packed = mask_utils.encode(np.asfortranarray(mask))
    counts = [5 * HEIGHT + 5, *[10, HEIGHT - 10] * 9, 10]
    counts.append(HEIGHT * WIDTH - sum(counts))
    kinds = [
        [SQUARE],
        {"size": [HEIGHT, WIDTH], "counts": packed["counts"].decode()},
        {"size": [HEIGHT, WIDTH], "counts": counts},
        None,
        [],
        list(SQUARE),
    ]
    data = content(1)
    template = data["annotations"][0]
    data["annotations"] = [
        {**template, "id": number, "segmentation": kind} for number, kind in enumerate(kinds, 1)
    ]
    del data["annotations"][3]["segmentation"]
    dataset = load_coco_dataset(write(tmp_path, data), strict=True)
    objects = dataset.records[0]["annotations"]
    assert ["segmentation" in item for item in objects] == [True, True, True, False, False, True]
    assert objects[0]["segmentation"] == objects[5]["segmentation"] == [SQUARE]
    for item in (objects[1], objects[2]):
        assert np.array_equal(mask_utils.decode(item["segmentation"]), mask)
    assert isinstance(objects[2]["segmentation"]["counts"], bytes)
    json.dumps(coco_ground_truth(dataset))


def test_run_lengths_are_read_as_pycocotools_writes_them() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        height, width = rng.integers(1, 90, 2)
        mask = (rng.random((height, width)) < rng.choice([0.0, 0.02, 0.5, 0.98, 1.0])).astype(np.uint8)
        if rng.random() < 0.5:
            mask = np.maximum.accumulate(mask, axis=0)
        runs = _compressed_counts(mask_utils.encode(np.asfortranarray(mask))["counts"])
        values = np.arange(runs.size) % 2
        assert np.array_equal(np.repeat(values, runs), mask.T.ravel())


def test_keypoints_get_half_a_pixel_and_lose_it_again(tmp_path: Path) -> None:
    data = content(2)
    data["categories"] = [person()]
    data["annotations"][0]["keypoints"] = [7, 8, 2, 9, 10, 1, 0, 0, 0]
    dataset = load_coco_dataset(write(tmp_path, data))
    first, second = (record["annotations"][0]["keypoints"] for record in dataset.records)
    assert first == [7.5, 8.5, 2, 9.5, 10.5, 1, 0.5, 0.5, 0]
    assert second == [0.5, 0.5, 0] * 3  # none given: none labelled
    truth = coco_ground_truth(dataset)
    assert [a["keypoints"] for a in truth["annotations"]] == [[7, 8, 2, 9, 10, 1, 0, 0, 0], [0] * 9]
    assert [a["num_keypoints"] for a in truth["annotations"]] == [2, 0]


def test_no_keypoints_where_the_file_declares_none(tmp_path: Path) -> None:
    data = content(1)
    data["annotations"][0]["keypoints"] = [7, 8, 2]
    dataset = load_coco_dataset(write(tmp_path, data))
    assert "keypoints" not in dataset.records[0]["annotations"][0]
    assert dataset.metadata.num_keypoints == 0


@pytest.mark.parametrize(
    ("names", "pairs", "expected"),
    [
        (["nose", "left_eye", "right_eye"], None, [0, 2, 1]),
        (["eye_right", "tail", "eye_left"], None, [2, 1, 0]),
        (["Left Hand", "Right Hand", "tail"], None, [1, 0, 2]),
        (["l_hip", "r_hip", "tail"], None, [1, 0, 2]),
        (["hip_r", "tail", "hip_l"], None, [2, 1, 0]),
        (["L-Eye", "R-Eye", "front l paw", "front r paw"], None, [1, 0, 3, 2]),
        (["LShoulder", "RShoulder", "kneeL", "kneeR", "lEar", "rEar"], None, [1, 0, 3, 2, 5, 4]),
        (["HandLeft", "HandRight", "leftFoot", "rightFoot"], None, [1, 0, 3, 2]),
        # A mirror swaps each side that a name tells, and nothing that only looks like one.
        (["left_eye_l", "left_eye_r", "right_eye_l", "right_eye_r"], None, [3, 2, 1, 0]),
        (["left_upright", "right_upright", "upright_left", "upright_right"], None, [1, 0, 3, 2]),
        (["lip", "rip", "L1", "R1", "LED", "RED", "Lamp", "Ramp"], None, [0, 1, 2, 3, 4, 5, 6, 7]),
        # Other spellings of the same name, unless another name has that spelling, too.
        (["l_hip", "R_hip", "left_eye"], None, [1, 0, 2]),
        (
            ["left elbow", "right_elbow", "Left-Knee", "kneeRight", "L wrist", "right wrist"],
            None,
            [1, 0, 3, 2, 5, 4],
        ),
        (["left elbow", "left_elbow", "Right elbow"], None, [0, 1, 2]),
        (["左手", "右手", "bright spot", "left spot"], None, [1, 0, 2, 3]),
        (["a", "b", "c"], None, [0, 1, 2]),
        (["a", "b", "c"], [["a", "c"]], [2, 1, 0]),
        (["left_a", "right_a", "c"], [], [0, 1, 2]),
    ],
)
def test_flip_pairs(names: list[str], pairs: Any, expected: list[int], tmp_path: Path) -> None:
    data = content(1)
    more = {} if pairs is None else {"flip_pairs": pairs}
    data["categories"] = [person(names, **more)]
    metadata = load_coco_dataset(write(tmp_path, data)).metadata
    assert metadata.keypoint_flip_indices == expected
    assert metadata.keypoint_names == tuple(names)
    assert metadata.keypoint_connections == ((0, 1), (0, 2))


@pytest.mark.parametrize(
    ("category", "message"),
    [
        (person(flip_pairs=[["nose", "ear"]]), "flip_pairs must be"),
        (person(flip_pairs=[["nose", "left_hand"], ["nose", "right_hand"]]), "names a keypoint twice"),
        (person(["a", "a", "b"]), "same name"),
        (person([1, 2, 3]), "list of names"),  # type: ignore[list-item]
        (person(sigmas=[0.1]), "sigmas must be 3"),
    ],
)
def test_a_broken_keypoint_declaration_leaves_the_boxes(
    category: dict[str, Any], message: str, tmp_path: Path
) -> None:
    data = content(1)
    data["categories"] = [category]
    dataset = load_coco_dataset(write(tmp_path, data))
    assert message in dataset.metadata.keypoint_fault
    assert dataset.metadata.num_keypoints == 0
    assert len(dataset.records[0]["annotations"]) == 1
    assert "keypoints that can't be trained" in dataset.report.summary()


@pytest.mark.parametrize(
    ("skeleton", "bones", "told"),
    [
        ([[1, 4], [1, 2]], ((0, 1),), "bone left out"),
        ([[1], [3, 2], "x"], ((2, 1),), "bone left out"),
        ([["1", "2"]], ((0, 1),), None),
        ([[0, 1], [1, 2]], ((0, 1), (1, 2)), "skeleton from 0"),
        (None, (), None),
    ],
)
def test_bones_are_for_pictures_and_stop_nothing(
    skeleton: Any, bones: Any, told: str | None, tmp_path: Path
) -> None:
    data = content(1)
    data["categories"] = [person(skeleton=skeleton)]
    dataset = load_coco_dataset(write(tmp_path, data), strict=True)
    assert dataset.metadata.keypoint_connections == bones
    assert dataset.metadata.num_keypoints == 3
    assert {kind for kind, _ in dataset.report.counts} == ({told} if told else set())


def test_minimal_file_evaluates(tmp_path: Path) -> None:
    """Only images, annotations and categories, and of annotations only what can't be guessed."""
    data = content()
    del data["info"], data["licenses"]
    for annotation in data["annotations"]:
        del annotation["area"], annotation["iscrowd"], annotation["id"]
    del data["annotations"][1]["segmentation"]
    del data["annotations"][2]["bbox"]
    for image in data["images"]:
        del image["height"], image["width"]
    dataset = load_coco_dataset(write(tmp_path, data), strict=True)  # filling in is not dropping
    truth = coco_ground_truth(dataset)
    assert [(a["id"], a["area"], a["iscrowd"]) for a in truth["annotations"]] == [
        (1, 100, 0),
        (2, 100, 0),
        (3, 100, 0),
    ]
    assert truth["annotations"][2]["bbox"] == [5, 5, 10, 10]
    assert (truth["images"][0]["height"], truth["images"][0]["width"]) == (HEIGHT, WIDTH)
    assert {"info", "licenses"} <= truth.keys()
    kinds = {kind for kind, action in dataset.report.counts if action == "filled"}
    assert kinds >= {
        "no area",
        "no iscrowd",
        "no annotation id",
        "no box",
        "no image size",
    }
    coco = COCO()
    coco.dataset = truth
    coco.createIndex()
    results = coco.loadRes([{"image_id": 1, "category_id": 1, "bbox": [5, 5, 10, 10], "score": 0.5}])
    assert len(results.anns) == 1


def test_annotation_id_0_is_not_handed_to_cocoeval(tmp_path: Path) -> None:
    data = content()
    for number, annotation in enumerate(data["annotations"]):
        annotation["id"] = number
    truth = coco_ground_truth(load_coco_dataset(write(tmp_path, data)))
    assert [a["id"] for a in truth["annotations"]] == [1, 2, 3]


def test_ground_truth_can_be_changed_without_changing_the_records(tmp_path: Path) -> None:
    dataset = load_coco_dataset(write(tmp_path, content()))
    before = copy.deepcopy(dataset.records)
    for annotation in coco_ground_truth(dataset)["annotations"]:
        annotation["ignore"] = annotation["segmentation"] = 1  # as COCOeval does
    assert dataset.records == before


def test_filters_follow_detectron2(tmp_path: Path) -> None:
    data = content()
    data["categories"] = [person()]
    data["annotations"][0]["iscrowd"] = 1
    del data["annotations"][1]
    data["annotations"][1]["keypoints"] = [7, 8, 2, 9, 10, 1, 0, 0, 0]
    dataset = load_coco_dataset(write(tmp_path, data))
    assert dataset.report.num_without_objects == 2
    assert [r["image_id"] for r in filter_empty(dataset.records)] == [3]
    assert [r["image_id"] for r in filter_few_keypoints(dataset.records, 2)] == [3]
    assert filter_few_keypoints(dataset.records, 3) == []
    assert len(filter_few_keypoints(dataset.records, 0)) == 3


def test_file_without_annotations_is_a_test_set(tmp_path: Path) -> None:
    data = content()
    del data["annotations"]
    assert len(load_coco_dataset(write(tmp_path, data)).records) == 3


def test_images_outside_the_json_folder_and_absolute_names(tmp_path: Path) -> None:
    data = content(1)
    data["images"][0]["file_name"] = str(tmp_path / "images/1.png")
    dataset = load_coco_dataset(write(tmp_path, data))
    assert dataset.records[0]["file_name"] == str(tmp_path / "images/1.png")
    assert coco_ground_truth(dataset)["images"][0]["file_name"] == "1.png"


def test_relative_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, content())
    monkeypatch.chdir(tmp_path)
    dataset = load_coco_dataset(("set.json", "images"))
    assert dataset.records[0]["file_name"] == str(tmp_path / "images/1.png")


def test_examine_returns_what_load_refuses(tmp_path: Path) -> None:
    data = content()
    data["images"][0]["file_name"] = "gone.png"
    source = write(tmp_path, data)
    report = examine_coco_dataset(source).report
    assert report.counts[("missing file", "stops")] == 1
    with pytest.raises(
        DatasetError, match=r"1 of 3 images is missing in .*images: gone\.png; DATASETS\.MAX_BAD_I"
    ):
        load_coco_dataset(source)
    dataset = load_coco_dataset(source, max_bad_images=1)
    assert [record["image_id"] for record in dataset.records] == [2, 3]
    assert dataset.report.counts[("missing file", "dropped")] == 1
    with pytest.raises(DatasetError, match="strict"):
        load_coco_dataset(source, max_bad_images=1, strict=True)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_an_annotation_file_without_an_end_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    for name in ("/dev/zero", str(tmp_path / "pipe.json")):
        for read in (lambda file: load_coco_dataset((file, str(tmp_path))), read_bytes):
            with pytest.raises(DatasetError, match="is a device or a pipe, not a file"):
                read(name)
