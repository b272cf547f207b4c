"""The generator: the same bytes for a seed, and annotations that say what is in the picture."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from pycocotools.coco import COCO

from zenith_det.data import load_coco_dataset
from zenith_det.data.synthetic import SHAPE_NAMES, draw_image, generate
from zenith_det.errors import DatasetError

ROOT = Path(__file__).resolve().parents[2]


def digest(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module", params=["instances", "keypoints"])
def drawn(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any, Any]:
    """(task, split, COCO) of a set of 150 images."""
    folder = tmp_path_factory.mktemp(request.param)
    split = generate(folder, train=150, val=0, size=160, seed=3, task=request.param)["train"]
    return request.param, split, COCO(str(split.json_file))


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("figures")
    return COCO(str(generate(folder, train=150, val=0, seed=4, task="keypoints")["train"].json_file))


@pytest.mark.parametrize("task", ["instances", "keypoints"])
def test_same_seed_same_bytes_in_another_process(task: str, tmp_path: Path) -> None:
    generate(tmp_path / "a", train=6, val=3, size=128, seed=7, task=task)
    command = [
        sys.executable,
        str(ROOT / "datasets/make_shapes.py"),
        "--output",
        str(tmp_path / "b"),
        "--task",
        task,
    ]
    command += ["--train", "6", "--val", "3", "--size", "128", "--seed", "7"]
    subprocess.run(command, check=True, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True)
    first = digest(tmp_path / "a")
    assert first == digest(tmp_path / "b")
    assert len(first) == 6 + 3 + 2 + 1  # images, two annotation files, the generator's record


def test_longer_set_begins_with_the_shorter_and_seeds_differ(tmp_path: Path) -> None:
    generate(tmp_path / "short", train=3, val=0, seed=1)
    generate(tmp_path / "long", train=5, val=0, seed=1)
    generate(tmp_path / "other", train=3, val=0, seed=2)
    for name in ("000001.png", "000003.png"):
        pixels = (tmp_path / "short/train" / name).read_bytes()
        assert pixels == (tmp_path / "long/train" / name).read_bytes()
        assert pixels != (tmp_path / "other/train" / name).read_bytes()


def test_train_and_val_are_different_images(tmp_path: Path) -> None:
    generate(tmp_path, train=4, val=4)
    train, val = (digest(tmp_path / split) for split in ("train", "val"))
    assert not set(train.values()) & set(val.values())


def test_finished_set_is_left_alone_and_changed_settings_replace_it(tmp_path: Path) -> None:
    first = generate(tmp_path, train=4, val=1)
    stamp = (tmp_path / "train/000001.png").stat().st_mtime_ns
    assert generate(tmp_path, train=4, val=1) == first
    assert (tmp_path / "train/000001.png").stat().st_mtime_ns == stamp
    generate(tmp_path, train=2, val=1)
    assert sorted(p.name for p in (tmp_path / "train").iterdir()) == ["000001.png", "000002.png"]


def test_unfinished_set_is_made_again(tmp_path: Path) -> None:
    generate(tmp_path, train=2, val=0)
    (tmp_path / "generator.json").write_text('{"settings": null}')
    (tmp_path / "train/000001.png").write_bytes(b"")
    split = generate(tmp_path, train=2, val=0)["train"]
    assert load_coco_dataset((split.json_file, split.image_root)).report.num_images == 2


def test_does_not_write_into_somebodys_folder(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(DatasetError, match="not empty"):
        generate(tmp_path, train=1, val=0)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 16}, "size 16"),
        ({"task": "cats"}, "task 'cats'"),
        ({"train": 0, "val": 0}, "nor both 0"),
        ({"train": -1}, "-1"),
        ({"seed": -1}, "seed"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=message):
        generate(tmp_path / "x", **settings)


def test_our_own_reader_finds_nothing_wrong(drawn: tuple[str, Any, Any]) -> None:
    _, split, _ = drawn
    dataset = load_coco_dataset((split.json_file, split.image_root), check_images="full", strict=True)
    assert not dataset.report.counts
    assert dataset.report.num_annotations == split.num_annotations


def test_area_and_box_are_those_of_the_mask(drawn: tuple[str, Any, Any]) -> None:
    _, _, coco = drawn
    for annotation in coco.anns.values():
        mask = coco.annToMask(annotation)
        rows, columns = np.nonzero(mask)
        x, y = columns.min(), rows.min()
        assert annotation["area"] == mask.sum()
        assert annotation["bbox"] == [x, y, columns.max() + 1 - x, rows.max() + 1 - y]


def test_masks_of_objects_do_not_overlap(drawn: tuple[str, Any, Any]) -> None:
    """They are of the visible part: beyond the pixels along common edges, no two share any."""
    _, _, coco = drawn
    for image_id in coco.imgs:
        masks = [coco.annToMask(a) for a in coco.imgToAnns[image_id] if not a["iscrowd"]]
        if masks:
            inner = [cv2.erode(mask, np.ones((3, 3), np.uint8)) for mask in masks]
            assert np.sum(inner, axis=0).max() <= 1


def test_holds_everything_that_a_reader_must_know(drawn: tuple[str, Any, Any]) -> None:
    task, _, coco = drawn
    annotations = list(coco.anns.values())
    kinds = {type(a["segmentation"]) if not a["iscrowd"] else "crowd" for a in annotations}
    assert kinds == {list, dict, "crowd"}
    crowds = [a for a in annotations if a["iscrowd"]]
    assert all(isinstance(a["segmentation"]["counts"], list) for a in crowds)
    assert any(not coco.imgToAnns[image_id] for image_id in coco.imgs), "no image without objects"
    assert len({(i["height"], i["width"]) for i in coco.imgs.values()}) == 3
    sides = [max(a["bbox"][2:]) for a in annotations if not a["iscrowd"]]
    if task == "instances":
        assert {coco.cats[a["category_id"]]["name"] for a in annotations} == set(SHAPE_NAMES)
        assert min(sides) < 16
    assert max(sides) > 80


def test_keypoints_in_view_lie_on_their_figure(figures: Any) -> None:
    found = np.zeros(3, int)
    for annotation in figures.anns.values():
        keypoints = np.array(annotation["keypoints"]).reshape(17, 3)
        assert annotation["num_keypoints"] == (keypoints[:, 2] > 0).sum()
        if annotation["iscrowd"]:
            assert not keypoints.any()
            continue
        mask = cv2.dilate(figures.annToMask(annotation), np.ones((3, 3), np.uint8))
        for x, y, v in keypoints:
            found[v] += 1
            assert (x, y) == (0, 0) if v == 0 else 0 <= x < mask.shape[1] and 0 <= y < mask.shape[0]
            assert v < 2 or mask[y, x], "marked as visible, and not on the figure"
    assert (found > 50).all(), "each visibility must occur"


def test_left_and_right_can_be_told_apart_by_the_view(figures: Any) -> None:
    """Face in view: the left shoulder is on the right of the picture; face hidden: on the left."""
    front, back = [], []
    for annotation in figures.anns.values():
        keypoints = np.array(annotation["keypoints"]).reshape(17, 3)
        if (keypoints[:7, 2] > 0).all() and (keypoints[3:7, 2] == 2).all():
            side = keypoints[5, 0] - keypoints[6, 0]
            if (keypoints[:3, 2] == 2).all():
                front.append(side)
            elif (keypoints[:3, 2] == 1).all():
                back.append(side)
    assert len(front) > 20
    assert len(back) > 20
    assert min(front) > 0
    # A back view's face counts as hidden; so does a front view's behind something, now and then.
    assert np.mean(np.array(back) < 0) > 0.9


def test_images_are_not_flat() -> None:
    picture, annotations = draw_image("instances", 160, 0, 0, 3)
    assert picture.dtype == np.uint8
    assert picture.std() > 10
    assert json.loads(json.dumps(annotations)) == annotations
