"""YOLO, Pascal VOC and labelme become COCO files with the same objects; whatever can't is told."""

from __future__ import annotations

import base64
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from tests.conftest import SmallSet
from tests.tools.called import called
from zenith_det.commands import convert_dataset
from zenith_det.data import load_coco_dataset
from zenith_det.data.converting import convert_folder, find_format
from zenith_det.data.converting.folders import find_sets
from zenith_det.errors import DatasetError

SPLITS = (("train", "train"), ("val", "valid"))


def picture(path: Path, width: int = 100, height: int = 80) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), (90, 120, 60)).save(path)


def sets_of(small: SmallSet) -> dict[str, tuple[dict[str, Any], Path]]:
    return {
        "train": (json.loads(Path(small.train[0]).read_text()), Path(small.train[1])),
        "val": (json.loads(Path(small.val[0]).read_text()), Path(small.val[1])),
    }


def plain_objects(content: dict[str, Any], image_id: int) -> list[dict[str, Any]]:
    """Of an image, what other formats can hold: no crowds, no masks as RLE."""
    return [
        a
        for a in content["annotations"]
        if a["image_id"] == image_id and not a.get("iscrowd") and isinstance(a.get("segmentation", []), list)
    ]


# ---- the shapes and figures as other tools would have written them


def write_yolo(small: SmallSet, root: Path, keypoints: bool = False) -> None:
    """As Roboflow does: train/ and valid/ with images/ and labels/, and ../ in data.yaml."""
    for split, folder in SPLITS:
        content, images = sets_of(small)[split]
        numbers = {c["id"]: n for n, c in enumerate(content["categories"])}
        for entry in content["images"]:
            width, height = entry["width"], entry["height"]
            target = root / folder / "images" / Path(entry["file_name"]).name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(images / entry["file_name"], target)
            lines = []
            for a in plain_objects(content, entry["id"]):
                if keypoints:
                    x, y, w, h = a["bbox"]
                    values = [(x + w / 2) / width, (y + h / 2) / height, w / width, h / height]
                    for px, py, v in zip(*[iter(a["keypoints"])] * 3):
                        values += [px / width, py / height, v]
                else:
                    values = [v / (width, height)[i % 2] for i, v in enumerate(a["segmentation"][0])]
                lines.append(" ".join(map(str, [numbers[a["category_id"]], *values])))
            label = root / folder / "labels" / f"{target.stem}.txt"
            label.parent.mkdir(parents=True, exist_ok=True)
            label.write_text("\n".join(lines))
    description: dict[str, Any] = {
        "train": "../train/images", "val": "../valid/images", "test": "../test/images",
        "names": [c["name"] for c in content["categories"]],
    }  # fmt: skip
    if keypoints:
        names = content["categories"][0]["keypoints"]
        description |= {"kpt_shape": [len(names), 3], "kpt_names": {0: names}}
    (root / "data.yaml").write_text(yaml.safe_dump(description))


def write_voc(small: SmallSet, root: Path) -> None:
    """As VOC's devkit: Annotations/, JPEGImages/, ImageSets/Main/."""
    for split, _ in SPLITS:
        content, images = sets_of(small)[split]
        names = {c["id"]: c["name"] for c in content["categories"]}
        stems = []
        for entry in content["images"]:
            stem = f"{split}_{Path(entry['file_name']).stem}"
            stems.append(stem)
            target = root / "JPEGImages" / f"{stem}{Path(entry['file_name']).suffix}"
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(images / entry["file_name"], target)
            objects = ""
            for a in plain_objects(content, entry["id"]):
                x, y, w, h = a["bbox"]
                objects += (
                    f"<object><name>{names[a['category_id']]}</name><bndbox><xmin>{x + 1}</xmin><ymin>{y + 1}"
                    f"</ymin><xmax>{x + w}</xmax><ymax>{y + h}</ymax></bndbox></object>"
                )
            label = root / "Annotations" / f"{stem}.xml"
            label.parent.mkdir(parents=True, exist_ok=True)
            label.write_text(
                f"<annotation><filename>C:\\data\\{target.name}</filename>{objects}</annotation>"
            )
        listed = root / "ImageSets" / "Main" / f"{split}.txt"
        listed.parent.mkdir(parents=True, exist_ok=True)
        listed.write_text("\n".join(stems))


def write_labelme(small: SmallSet, root: Path) -> None:
    """A JSON beside each image, in a folder per part; an object's polygons share a group_id."""
    for split, folder in SPLITS:
        content, images = sets_of(small)[split]
        names = {c["id"]: c["name"] for c in content["categories"]}
        for entry in content["images"]:
            target = root / folder / Path(entry["file_name"]).name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(images / entry["file_name"], target)
            shapes = [
                {"label": names[a["category_id"]], "shape_type": "polygon", "group_id": number,
                 "points": [list(point) for point in zip(polygon[0::2], polygon[1::2])]}
                for number, a in enumerate(plain_objects(content, entry["id"]))
                for polygon in a["segmentation"]
            ]  # fmt: skip
            target.with_suffix(".json").write_text(
                json.dumps(
                    {"version": "5.5.0", "imagePath": target.name, "imageData": None, "shapes": shapes}
                )
            )


WRITERS: dict[str, Callable[[SmallSet, Path], None]] = {
    "yolo": write_yolo,
    "voc": write_voc,
    "labelme": write_labelme,
}


@pytest.mark.parametrize("form", WRITERS)
def test_objects_keep_their_numbers(form: str, shapes: SmallSet, tmp_path: Path) -> None:
    WRITERS[form](shapes, tmp_path / "data")
    assert find_format(tmp_path / "data") == form
    conversion = convert_folder(tmp_path / "data", tmp_path / "out")
    assert set(conversion.files) == {"train", "val"}
    for split, (content, _) in sets_of(shapes).items():
        dataset = load_coco_dataset(
            (conversion.files[split], conversion.images), check_images="full", strict=True
        )
        assert len(dataset.records) == len(content["images"])
        found = {Path(r["file_name"]).stem.removeprefix(f"{split}_"): r for r in dataset.records}
        names = {c["id"]: c["name"] for c in content["categories"]}
        for entry in content["images"]:
            wanted = plain_objects(content, entry["id"])
            got = found[Path(entry["file_name"]).stem]["annotations"]
            assert [dataset.metadata.thing_classes[a["category_id"]] for a in got] == [
                names[a["category_id"]] for a in wanted
            ]
            for one, other in zip(wanted, got):
                if form == "voc":
                    np.testing.assert_allclose(other["bbox"], one["bbox"], atol=1e-6)
                else:
                    polygons = one["segmentation"] if form == "labelme" else one["segmentation"][:1]
                    for a, b in zip(polygons, other["segmentation"], strict=True):
                        np.testing.assert_allclose(b, a, atol=1e-6)
    again = convert_folder(tmp_path / "data", tmp_path / "again")
    assert again.files["train"].read_bytes() == conversion.files["train"].read_bytes()


def test_yolo_pose(figures: SmallSet, tmp_path: Path) -> None:
    write_yolo(figures, tmp_path / "data", keypoints=True)
    conversion = convert_folder(tmp_path / "data", tmp_path / "out")
    content, _ = sets_of(figures)["train"]
    dataset = load_coco_dataset((conversion.files["train"], conversion.images), strict=True)
    assert list(dataset.metadata.keypoint_names) == content["categories"][0]["keypoints"]
    assert dataset.metadata.keypoint_flip_map
    found = json.loads(conversion.files["train"].read_text())
    wanted = [a for e in content["images"] for a in plain_objects(content, e["id"])]
    assert len(found["annotations"]) == len(wanted)
    for one, other in zip(wanted, found["annotations"]):
        points = np.array(one["keypoints"], dtype=float).reshape(-1, 3)
        points[points[:, 2] == 0] = 0
        np.testing.assert_allclose(np.reshape(other["keypoints"], (-1, 3)), points, atol=1e-6)
        np.testing.assert_allclose(other["bbox"], one["bbox"], atol=1e-6)


def test_yolo_flip_idx_of_coco_gives_cocos_names(tmp_path: Path) -> None:
    picture(tmp_path / "images" / "a.jpg")
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "a.txt").write_text("0 0.5 0.5 0.4 0.4 " + "0.5 0.5 " * 16 + "0 0")
    flip = [0, 2, 1, 4, 3, 6, 5, 8, 7, 10, 9, 12, 11, 14, 13, 16, 15]
    (tmp_path / "data.yaml").write_text(
        yaml.safe_dump({"names": {0: "person"}, "train": "images", "kpt_shape": [17, 2], "flip_idx": flip})
    )
    content = json.loads(convert_folder(tmp_path, tmp_path / "out").files["all"].read_text())
    assert content["categories"][0]["keypoints"][5] == "left_shoulder"
    assert ["left_shoulder", "right_shoulder"] in content["categories"][0]["flip_pairs"]
    # Without a visibility, (0, 0) is a keypoint that isn't there.
    assert content["annotations"][0]["num_keypoints"] == 16


def yolo_line(tmp_path: Path, line: str, names: str = "cat\ndog") -> Any:
    picture(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text(f"1 0.5 0.5 0.2 0.5\n{line}\n")
    (tmp_path / "classes.txt").write_text(names)
    return convert_folder(tmp_path, tmp_path / "out")


def test_yolo_boxes_beside_their_images(tmp_path: Path) -> None:
    conversion = yolo_line(tmp_path, "0 0.25 0.25 0.5 0.5")
    content = json.loads(conversion.files["all"].read_text())
    assert [c["name"] for c in content["categories"]] == ["cat", "dog"]
    assert [(a["category_id"], a["bbox"]) for a in content["annotations"]] == [
        (2, [40, 20, 20, 40]),
        (1, [0, 0, 50, 40]),
    ]


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("0 10 20 30 40", "not normalised"),
        ("0 0.5 0.5 0.1", "wrong count"),
        ("0 0.5 0.5 0.1 0.1 0.9", "wrong count"),
        ("0 0.5 0.5 0 0.1", "box without area"),
        ("cat 0.5 0.5 0.1 0.1", "not a label"),
        ("0 nan 0.5 0.1 0.1", "not a label"),
        ("1 0.5 0.5 0.2 0.5", "repeated line"),
    ],
)
def test_a_line_that_is_no_label_is_told(line: str, kind: str, tmp_path: Path) -> None:
    report = yolo_line(tmp_path, line).reports["all"]
    assert report.counts == {(kind, "dropped"): 1}
    assert report.num_annotations == 1
    assert report.problems[0].image == "a.txt, line 2"


def test_a_class_number_without_a_name_stops(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"a\.txt, line 2: class 2, but .*classes\.txt names 2 classes"):
        yolo_line(tmp_path, "2 0.5 0.5 0.1 0.1")


def test_yolo_without_names_says_what_to_do(tmp_path: Path) -> None:
    picture(tmp_path / "images" / "a.png")
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "a.txt").write_text("0 0.5 0.5 0.1 0.1")
    with pytest.raises(DatasetError, match=r"add a classes\.txt .* or give --classes"):
        convert_folder(tmp_path, tmp_path / "out")
    assert convert_folder(tmp_path, tmp_path / "out", classes=["cell"]).reports["all"].num_annotations == 1


def test_images_without_labels_and_labels_without_images(tmp_path: Path) -> None:
    for name in ("a", "b"):
        picture(tmp_path / "images" / "train" / f"{name}.png")
    (tmp_path / "labels" / "train").mkdir(parents=True)
    (tmp_path / "labels" / "train" / "a.txt").write_text("0 0.5 0.5 0.1 0.1")
    (tmp_path / "labels" / "train" / "z.txt").write_text("0 0.5 0.5 0.1 0.1")
    (tmp_path / "data.yaml").write_text("names: [cell]\npath: /somebody/elses\ntrain: images/train\n")
    report = convert_folder(tmp_path, tmp_path / "out").reports["all"]
    assert report.counts == {("no label file", "kept"): 1, ("label without an image", "dropped"): 1}
    assert (report.num_images, report.num_without_objects) == (2, 1)


def voc(tmp_path: Path, box: str, more: str = "") -> Any:
    picture(tmp_path / "a.jpg")
    (tmp_path / "a.xml").write_text(
        f"<annotation><filename>a.jpg</filename><object><name>dog</name>{more}<bndbox>{box}</bndbox></object>"
        "</annotation>"
    )
    return convert_folder(tmp_path, tmp_path / "out")


def test_voc_boxes_begin_at_one(tmp_path: Path) -> None:
    """xmin 1, xmax 100 is the whole width of an image of 100 pixels, as Detectron2 reads it."""
    box = "<xmin>1</xmin><ymin>1</ymin><xmax>100</xmax><ymax>80</ymax>"
    content = json.loads(voc(tmp_path, box).files["all"].read_text())
    assert content["annotations"][0]["bbox"] == [0, 0, 100, 80]


def test_voc_boxes_that_begin_at_zero_are_told(tmp_path: Path) -> None:
    conversion = voc(tmp_path, "<xmin>0</xmin><ymin>5</ymin><xmax>50</xmax><ymax>15</ymax>")
    assert json.loads(conversion.files["all"].read_text())["annotations"][0]["bbox"] == [0, 5, 50, 10]
    assert "begin at 0" in conversion.notes[0]


def test_voc_polygons(tmp_path: Path) -> None:
    polygon = "<polygon><x1>10</x1><y1>10</y1><x2>30</x2><y2>10</y2><x3>30</x3><y3>30</y3></polygon>"
    conversion = voc(tmp_path, "<xmin>11</xmin><ymin>11</ymin><xmax>30</xmax><ymax>30</ymax>", polygon)
    annotation = json.loads(conversion.files["all"].read_text())["annotations"][0]
    assert annotation["segmentation"] == [[10, 10, 30, 10, 30, 30]]
    assert 150 < annotation["area"] < 250


def test_voc_object_masks(tmp_path: Path) -> None:
    picture(tmp_path / "JPEGImages" / "a.jpg")
    (tmp_path / "Annotations").mkdir()
    box = "<bndbox><xmin>11</xmin><ymin>6</ymin><xmax>30</xmax><ymax>25</ymax></bndbox>"
    (tmp_path / "Annotations" / "a.xml").write_text(
        f"<annotation><filename>a.jpg</filename><object><name>dog</name>{box}</object></annotation>"
    )
    mask = np.zeros((80, 100), dtype=np.uint8)
    mask[5:25, 10:30] = 1
    (tmp_path / "SegmentationObject").mkdir()
    Image.fromarray(mask).save(tmp_path / "SegmentationObject" / "a.png")
    annotation = json.loads(convert_folder(tmp_path, tmp_path / "out").files["all"].read_text())[
        "annotations"
    ][0]
    assert annotation["area"] == 400
    assert annotation["segmentation"]["size"] == [80, 100]


def test_broken_xml_and_missing_images_are_told(tmp_path: Path) -> None:
    voc(tmp_path, "<xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax>")
    (tmp_path / "b.xml").write_text("<annotation><object>")
    (tmp_path / "c.xml").write_text("<annotation><filename>gone.jpg</filename></annotation>")
    report = convert_folder(tmp_path, tmp_path / "out").reports["all"]
    assert report.counts == {("broken XML", "dropped"): 1, ("missing file", "dropped"): 1}
    refused = convert_folder(tmp_path, tmp_path / "strict", strict=True)
    assert refused.files == {}
    assert not (tmp_path / "strict").exists()


def labelme(tmp_path: Path, shapes: list[dict[str, Any]]) -> Any:
    picture(tmp_path / "a.jpg")
    (tmp_path / "a.json").write_text(json.dumps({"imagePath": "..\\photos\\a.jpg", "shapes": shapes}))
    return convert_folder(tmp_path, tmp_path / "out")


def test_labelme_rectangles_circles_masks_and_keypoints(tmp_path: Path) -> None:
    png = io.BytesIO()
    Image.fromarray(np.full((10, 20), 255, dtype=np.uint8)).save(png, "PNG")
    conversion = labelme(
        tmp_path,
        [
            {"label": "box", "shape_type": "rectangle", "points": [[30, 40], [10, 20]]},
            {"label": "disc", "shape_type": "circle", "points": [[50, 40], [60, 40]]},
            {"label": "blob", "shape_type": "mask", "points": [[5, 6], [25, 16]],
             "mask": base64.b64encode(png.getvalue()).decode()},
            {"label": "fish", "shape_type": "rectangle", "points": [[60, 10], [90, 30]], "group_id": 7},
            {"label": "tail", "shape_type": "point", "points": [[62, 20]], "group_id": 7},
            {"label": "eye", "shape_type": "point", "points": [[88, 18]], "group_id": 7},
            {"label": "lost", "shape_type": "point", "points": [[1, 1]]},
            {"label": "road", "shape_type": "linestrip", "points": [[1, 1], [5, 5], [9, 5]]},
        ],
    )  # fmt: skip
    content = json.loads(conversion.files["all"].read_text())
    names = {c["id"]: c["name"] for c in content["categories"]}
    by_name = {names[a["category_id"]]: a for a in content["annotations"]}
    assert set(by_name) == {"box", "disc", "blob", "fish"}
    assert by_name["box"]["bbox"] == [10, 20, 20, 20]
    np.testing.assert_allclose(by_name["disc"]["bbox"], [40, 30, 20, 20], atol=0.1)
    assert by_name["blob"]["bbox"] == [5, 6, 20, 10]
    assert by_name["blob"]["area"] == 200
    fish = next(c for c in content["categories"] if c["name"] == "fish")
    assert fish["keypoints"] == ["tail", "eye"]
    assert by_name["fish"]["keypoints"] == [62, 20, 2, 88, 18, 2]
    assert conversion.reports["all"].counts == {
        ("a point of no object", "dropped"): 1,
        ("a linestrip", "dropped"): 1,
    }


def test_what_is_no_dataset_is_said_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(DatasetError, match="not recognised as a dataset in one of the formats YOLO"):
        convert_folder(tmp_path, tmp_path / "out")
    with pytest.raises(DatasetError, match="does not exist"):
        convert_folder(tmp_path / "nowhere", tmp_path / "out")


# ---- a folder in place of an annotation file


def test_a_folder_as_roboflow_exports_coco(shapes: SmallSet, tmp_path: Path) -> None:
    for split, folder in SPLITS:
        content, images = sets_of(shapes)[split]
        shutil.copytree(images, tmp_path / folder)
        (tmp_path / folder / "_annotations.coco.json").write_text(json.dumps(content))
    sets = find_sets(str(tmp_path), tmp_path / "unused").sets
    assert sets == {
        "train": (tmp_path / "train" / "_annotations.coco.json", tmp_path / "train"),
        "val": (tmp_path / "valid" / "_annotations.coco.json", tmp_path / "valid"),
    }
    assert not (tmp_path / "unused").exists()


def test_a_folder_as_coco_lays_it_out(shapes: SmallSet, tmp_path: Path) -> None:
    (tmp_path / "annotations").mkdir()
    for split in ("train", "val"):
        content, images = sets_of(shapes)[split]
        shutil.copytree(images, tmp_path / "images" / f"{split}2017")
        (tmp_path / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))
    sets = find_sets(str(tmp_path), tmp_path / "unused").sets
    assert sets["val"] == (
        tmp_path / "annotations" / "instances_val2017.json",
        tmp_path / "images" / "val2017",
    )
    shutil.copy(sets["val"][0], tmp_path / "annotations" / "instances_validation.json")
    with pytest.raises(DatasetError, match="two annotation files for val"):
        find_sets(str(tmp_path), tmp_path / "unused")


def test_the_tool_writes_files_that_train(
    shapes: SmallSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_yolo(shapes, tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    done = called(convert_dataset.main, "data", "--output", "out")
    assert done.returncode == 0, done.stderr
    assert "--val-json out/val.json" in done.stdout
    assert load_coco_dataset((tmp_path / "out" / "train.json", tmp_path / "data")).report.num_annotations > 0


def test_a_yaml_file_of_something_else_is_passed_over(tmp_path: Path) -> None:
    voc(tmp_path, "<xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax>")
    (tmp_path / "environment.yml").write_text("{% set x = 1 %}\nname: {{ x }")
    assert find_format(tmp_path) == "voc"


def test_a_devkit_with_a_folder_for_each_year(shapes: SmallSet, tmp_path: Path) -> None:
    write_voc(shapes, tmp_path / "VOCdevkit" / "VOC2012")
    assert set(convert_folder(tmp_path / "VOCdevkit", tmp_path / "out").files) == {"train", "val"}


def test_darknets_layout_as_cvat_exports_it(tmp_path: Path) -> None:
    picture(tmp_path / "obj_train_data" / "a.png")
    (tmp_path / "obj_train_data" / "a.txt").write_text("1 0.5 0.5 0.2 0.5")
    (tmp_path / "obj.names").write_text("cat\ndog\n")
    (tmp_path / "obj.data").write_text("classes = 2\ntrain = data/train.txt\nnames = data/obj.names\n")
    (tmp_path / "train.txt").write_text("data/obj_train_data/a.png\n")
    content = json.loads(convert_folder(tmp_path, tmp_path / "out").files["all"].read_text())
    assert [a["bbox"] for a in content["annotations"]] == [[40, 20, 20, 40]]


def test_lists_of_images_make_the_parts(tmp_path: Path) -> None:
    for name in "abc":
        picture(tmp_path / "images" / f"{name}.png")
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "a.txt").write_text("0 0.5 0.5 0.2 0.5")
    (tmp_path / "train.txt").write_text("./images/a.png\n./images/b.png\n")
    (tmp_path / "val.txt").write_text("./images/c.png\n")
    (tmp_path / "data.yaml").write_text("path: .\nnames: [cell]\ntrain: train.txt\nval: val.txt\n")
    reports = convert_folder(tmp_path, tmp_path / "out").reports
    assert {split: report.num_images for split, report in reports.items()} == {"train": 2, "val": 1}


def test_the_image_folder_is_found_though_the_first_images_are_gone(shapes: SmallSet, tmp_path: Path) -> None:
    content, images = sets_of(shapes)["val"]
    shutil.copytree(images, tmp_path / "images")
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "instances_default.json").write_text(json.dumps(content))
    (tmp_path / "images" / content["images"][0]["file_name"]).unlink()
    assert find_sets(str(tmp_path), tmp_path / "unused").sets["all"][1] == tmp_path / "images"


def test_the_image_folder_is_found_whatever_it_is_called(shapes: SmallSet, tmp_path: Path) -> None:
    content, images = sets_of(shapes)["val"]
    shutil.copytree(images, tmp_path / "examples" / "photos")
    (tmp_path / "trainval.json").write_text(json.dumps(content))
    assert find_sets(str(tmp_path), tmp_path / "unused").sets["all"][1] == tmp_path / "examples" / "photos"
