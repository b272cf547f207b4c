"""What annotation tools write, each in its own way: it is read as it was meant, and told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from zenith_det.data import (
    CocoDataset,
    annotation_cache,
    coco_ground_truth,
    examine_coco_dataset,
    load_coco_dataset,
)
from zenith_det.errors import DatasetError
from zenith_det.evaluation import evaluate_coco

from .builders import HEIGHT, SQUARE, WIDTH, content, write

Change = Callable[[dict[str, Any]], Any]


def clean(folder: Path) -> CocoDataset:
    return load_coco_dataset(write(folder, content(), "clean.json"))


def in_each(key: str, **values: Any) -> Change:
    """Set values in each entry of a list, each made from the entry's own where it is a function."""

    def change(data: dict[str, Any]) -> None:
        for entry in data[key]:
            entry |= {k: v(entry) if callable(v) else v for k, v in values.items()}

    return change


def without(key: str, name: str) -> Change:
    return lambda data: [entry.pop(name) for entry in data[key]]


def several(*changes: Change) -> Change:
    return lambda data: [change(data) for change in changes]


POINTS = [[5, 5], [15, 5], [15, 15], [5, 15]]
RUNS = [5 * HEIGHT + 5]
for _ in range(9):
    RUNS += [10, HEIGHT - 10]
RUNS += [10, WIDTH * HEIGHT - 14 * HEIGHT - 15]

# The change, and the only kind that may be told of it: everything else is as if nothing had been changed.
SAME_OBJECTS: list[tuple[Change, str]] = [
    (in_each("annotations", bbox=["5", "5.0", " 10.0000", "1e1"]), "number as text"),
    (in_each("annotations", bbox="[5, 5, 10, 10]"), "box in another form"),
    (in_each("annotations", bbox=[[5, 5, 10, 10]]), "box in another form"),
    (in_each("annotations", bbox={"x": 5, "y": 5, "width": 10, "height": 10}), "box in another form"),
    (in_each("annotations", bbox={"xmin": 5, "ymin": "5", "xmax": 15, "ymax": 15}), "box in another form"),
    (in_each("annotations", bbox=["?", 5, 10, 10]), "no usable box"),
    (in_each("annotations", bbox=[5, 5, 0, 10]), "no usable box"),
    (in_each("annotations", iscrowd="0"), "number as text"),
    (in_each("annotations", iscrowd=False), ""),
    (in_each("annotations", iscrowd=None), ""),
    (in_each("annotations", area="100"), "number as text"),
    (in_each("annotations", id=lambda a: str(a["id"])), "number as text"),
    (in_each("annotations", id=lambda a: f"3c2f-{a['id']}"), "no annotation id"),
    (in_each("annotations", id=None), "no annotation id"),
    (in_each("annotations", image_id=lambda a: str(a["image_id"])), "number as text"),
    (in_each("annotations", image_id=lambda a: float(a["image_id"])), ""),
    (in_each("annotations", category_id="1"), "number as text"),
    (in_each("annotations", category_id=1.0), ""),
    (in_each("annotations", category_id="square"), "category by its name"),
    (in_each("annotations", ignore=0), ""),
    (in_each("annotations", ignore=False, attributes={"occluded": False}), ""),
    (in_each("annotations", segmentation=list(SQUARE)), "flat polygon"),
    (in_each("annotations", segmentation=[POINTS]), "polygon in another form"),
    (in_each("annotations", segmentation=POINTS), "polygon in another form"),
    (in_each("annotations", segmentation=[[list(SQUARE)]]), "polygon in another form"),
    (in_each("annotations", segmentation=[[{"x": x, "y": y} for x, y in POINTS]]), "polygon in another form"),
    (in_each("annotations", segmentation=[[str(v) for v in SQUARE]]), "polygon in another form"),
    (in_each("images", id=lambda i: str(i["id"])), "number as text"),
    (in_each("images", height=str(HEIGHT), width=f"{WIDTH}.0"), "number as text"),
    (in_each("images", height=0, width=0), "no image size"),
    (in_each("images", height=None), "no image size"),
    (without("images", "width"), "no image size"),
    (in_each("categories", id="1"), "number as text"),
    (in_each("categories", id=1.0), ""),
    (in_each("categories", name=" square "), "spaces around a category's name"),
    (lambda data: data["categories"].extend(data["categories"] * 2), "repeated category"),
    (lambda data: data["categories"].append({"id": 0, "name": "square"}), "unused twin of a category"),
    (lambda data: data["categories"].append({"id": 7, "name": "square"}), "unused twin of a category"),
    (lambda data: data["images"].append(dict(data["images"][0])), "duplicate image"),
]  # fmt: skip


def plain(value: Any) -> Any:
    """Records with every number as a float, to compare."""
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    if isinstance(value, list):
        return [plain(part) for part in value]
    return float(value) if isinstance(value, int) else value


def perfect_ap(dataset: CocoDataset, annotations: list[dict[str, Any]]) -> float:
    """Box AP of detections that are these annotations."""
    found = [{k: a[k] for k in ("image_id", "category_id", "bbox")} | {"score": 0.9} for a in annotations]
    return evaluate_coco(coco_ground_truth(dataset), found, ["bbox"])["bbox"]["AP"]


@pytest.mark.parametrize(("change", "kind"), SAME_OBJECTS, ids=range(len(SAME_OBJECTS)))
def test_the_same_objects_are_read(change: Change, kind: str, tmp_path: Path) -> None:
    data = content()
    change(data)
    source = write(tmp_path, data)
    dataset = load_coco_dataset(source, strict="duplicate" not in kind)
    assert plain(dataset.records) == plain(clean(tmp_path).records)
    assert dataset.metadata.thing_classes == ("square",)
    assert {told for told, _ in dataset.report.counts} == ({kind} if kind else set())
    assert not kind or kind in dataset.report.summary()
    assert perfect_ap(dataset, content()["annotations"]) == pytest.approx(100)


@pytest.mark.parametrize(
    ("mask", "told"),
    [
        ({"size": [str(HEIGHT), WIDTH], "counts": RUNS}, True),
        ({"size": [HEIGHT, WIDTH], "counts": [float(run) for run in RUNS]}, True),
        ({"size": [HEIGHT, WIDTH], "counts": [str(run) for run in RUNS]}, True),
        ({"counts": RUNS}, True),
        ([{"size": [HEIGHT, WIDTH], "counts": RUNS}], True),
        ({"size": [HEIGHT, WIDTH], "counts": RUNS}, False),
    ],
)
def test_run_length_masks_in_other_forms(mask: Any, told: bool, tmp_path: Path) -> None:
    data = content(1)
    data["annotations"][0] |= {"segmentation": mask, "iscrowd": 0, "area": None}
    dataset = load_coco_dataset(write(tmp_path, data), strict=True)
    (item,) = dataset.records[0]["annotations"]
    assert item["segmentation"]["size"] == [HEIGHT, WIDTH]
    assert item["area"] == 100
    assert {kind for kind, _ in dataset.report.counts} == {"no area", *(["RLE in another form"] * told)}


def test_image_ids_that_are_no_numbers_are_numbered(tmp_path: Path) -> None:
    data = content()
    in_each("images", id=lambda i: f"img-{i['id']}")(data)
    in_each("annotations", image_id=lambda a: f"img-{a['image_id']} ")(data)
    dataset = load_coco_dataset(write(tmp_path, data), strict=True)
    assert [r["image_id"] for r in dataset.records] == [1, 2, 3]
    assert plain(dataset.records) == plain(clean(tmp_path).records)
    assert dataset.report.counts == {("image id that is no number", "filled"): 3}


def test_two_used_categories_of_one_name_are_one(tmp_path: Path) -> None:
    data = content()
    data["categories"] = [{"id": n, "name": "square", "supercategory": "none"} for n in (1, 2, 3)]
    data["annotations"][1]["category_id"] = 3
    dataset = load_coco_dataset(write(tmp_path, data), strict=True)
    assert dataset.metadata.thing_dataset_id_to_contiguous_id == {1: 0}
    assert plain(dataset.records) == plain(clean(tmp_path).records)
    (problem,) = dataset.report.problems
    assert problem.reason == (
        "the categories 1 (2 annotations), 2 (0 annotations), 3 (1 annotations) are named 'square': read as one"
    )
    data["categories"][2]["supercategory"] = "tiles"
    data["categories"][0]["supercategory"] = "signs"
    with pytest.raises(
        DatasetError, match=r"all named 'square', under the supercategories 'signs' and 'tiles'"
    ):
        load_coco_dataset(write(tmp_path, data))


def test_one_id_for_two_categories_stops(tmp_path: Path) -> None:
    data = content()
    data["categories"].append({"id": "1", "name": "circle"})
    with pytest.raises(DatasetError, match=r"the id 1: 'square' and 'circle'.*give each its own id"):
        load_coco_dataset(write(tmp_path, data))


@pytest.mark.parametrize("area", [0, -3, 0.01, "0", "none", float("nan"), True, []])
def test_an_area_that_is_none_is_worked_out(area: Any, tmp_path: Path) -> None:
    data = content()
    data["annotations"][0] |= {"area": area}
    data["annotations"][1] |= {"area": area, "segmentation": [], "bbox": [5, 5, 10, 20]}
    dataset = load_coco_dataset(write(tmp_path, data), strict=True)
    assert [r["annotations"][0]["area"] for r in dataset.records] == [100, 200, 100]
    assert dataset.report.counts == {("no usable area", "filled"): 2}


def test_a_small_area_of_a_small_object_stays(tmp_path: Path) -> None:
    data = content(1)
    data["annotations"][0] |= {"area": 0.5, "bbox": [5, 5, 1, 2], "segmentation": []}
    assert load_coco_dataset(write(tmp_path, data)).records[0]["annotations"][0]["area"] == 0.5


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ({"iscrowd": 1, "ignore": 1}, False),
        ({"iscrowd": 0, "ignore": 1}, True),
        ({"iscrowd": "0", "ignore": "true"}, True),
        ({"iscrowd": True}, False),
        ({"iscrowd": "1"}, False),
    ],
)
def test_a_region_to_ignore_is_a_crowd(flags: dict[str, Any], told: bool, tmp_path: Path) -> None:
    data = content(1)
    data["annotations"].append({**data["annotations"][0], "id": 2, "bbox": [20, 5, 15, 20], **flags})
    dataset = load_coco_dataset(write(tmp_path, data), strict=True)
    assert [a["iscrowd"] for a in dataset.records[0]["annotations"]] == [0, 1]
    assert (("ignore flag", "kept") in dataset.report.counts) == told
    truth = coco_ground_truth(dataset)
    # Two detections within the region, scored above the object's, count for nothing.
    found = [
        {"image_id": 1, "category_id": 1, "bbox": box, "score": score}
        for box, score in (([22, 7, 5, 5], 0.9), ([25, 12, 6, 6], 0.8), ([5, 5, 10, 10], 0.5))
    ]
    assert evaluate_coco(truth, found, ["bbox"])["bbox"]["AP"] == pytest.approx(100)


def test_objects_keep_their_boxes_without_usable_masks(tmp_path: Path) -> None:
    data = content()
    data["annotations"][0]["segmentation"] = [[5, 5, 10, 10]]
    data["annotations"][1]["segmentation"] = {"size": [HEIGHT + 1, WIDTH], "counts": RUNS}
    dataset = load_coco_dataset(write(tmp_path, data))
    assert perfect_ap(dataset, content()["annotations"]) == pytest.approx(100)
    assert dataset.report.counts == {("broken polygon", "dropped"): 1, ("broken RLE", "dropped"): 1}


def test_nothing_left_is_never_usable(tmp_path: Path) -> None:
    data = content()
    in_each("annotations", bbox=["a", "b", "c", "d"], segmentation=[])(data)
    with pytest.raises(
        DatasetError, match="no annotation left 1; the first: none of 3 can be used: broken box 3"
    ):
        load_coco_dataset(write(tmp_path, data))


def test_corners_in_place_of_sides_are_read_as_such(tmp_path: Path) -> None:
    data = content(1)
    template = {**data["annotations"][0], "area": None}
    boxes = [[5 + i, 5, 25 + i, 25] for i in range(12)]
    data["annotations"] = [
        {**template, "id": i, "bbox": box, "segmentation": []} for i, box in enumerate(boxes)
    ]
    dataset = load_coco_dataset(write(tmp_path, data))
    assert [a["bbox"] for a in dataset.records[0]["annotations"]] == [[5 + i, 5, 20, 20] for i in range(12)]
    assert {a["area"] for a in dataset.records[0]["annotations"]} == {400}
    assert "fits as (x1, y1, x2, y2): read as that" in dataset.report.suspicions()[0]
    # One box that is none of these corners: nothing is certain.
    data["annotations"].append({**template, "id": 20, "bbox": [5, 5, 4, 4], "segmentation": []})
    dataset = load_coco_dataset(write(tmp_path, data))
    assert dataset.records[0]["annotations"][0]["bbox"] == [5, 5, 25, 25]


def person(number: int, names: list[str], **more: Any) -> dict[str, Any]:
    return {"id": number, "name": f"class {number}", "keypoints": names, **more}


def test_different_keypoints_leave_the_boxes(tmp_path: Path) -> None:
    data = content()
    data["categories"] = [person(1, ["head", "foot"]), person(2, ["tip", "mid", "tail"])]
    dataset = load_coco_dataset(write(tmp_path, data), strict=True)
    assert plain(dataset.records[0]) == plain(clean(tmp_path).records[0])
    fault = dataset.metadata.keypoint_fault
    assert "category 'class 1' has 2 keypoints and category 'class 2' has 3" in fault
    assert 'keep "keypoints" in the categories of one of the lists' in fault


def test_keypoints_without_names_are_told(tmp_path: Path) -> None:
    data = content()
    in_each("annotations", keypoints=[7, 8, 2, 9, 9, 1])(data)
    dataset = load_coco_dataset(write(tmp_path, data))
    assert dataset.metadata.keypoint_fault == (
        '3 annotations have keypoints (6 numbers: 2 keypoints), and no category has "keypoints", the list of their '
        "names: add it to the category"
    )
    assert "keypoints that can't be trained" in dataset.report.summary()


@pytest.mark.parametrize("points", [[[7, 8, 2], [9, 9, 1]], ["7", "8", "2", "9.0", 9, 1]])
def test_keypoints_in_other_forms(points: Any, tmp_path: Path) -> None:
    data = content(1)
    data["categories"] = [person(1, ["head", "foot"])]
    data["annotations"][0]["keypoints"] = points
    dataset = load_coco_dataset(write(tmp_path, data), strict=True)
    assert dataset.records[0]["annotations"][0]["keypoints"] == [7.5, 8.5, 2, 9.5, 9.5, 1]
    assert dataset.report.counts == {("keypoints in another form", "filled"): 1}


def test_keypoints_all_invisible_are_told(tmp_path: Path) -> None:
    data = content(1)
    data["categories"] = [person(1, ["head", "foot"])]
    data["annotations"][0]["keypoints"] = [7, 8, 0, 9, 9, 0]
    assert load_coco_dataset(write(tmp_path, data)).report.counts == {("keypoints all unlabelled", "kept"): 1}


# ---- where images are


def moved(folder: Path, where: str) -> None:
    for path in sorted((folder / "images").glob("?.png")):
        target = folder / "images" / where.format(path.stem)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)


FOUND = [
    ("cam b\\{}.png", "cam b/{}.png"),
    ("C:\\data\\{}.png", "{}.png"),
    ("..\\..\\label-studio\\data\\media\\upload\\1\\79296a5{0}-{0}.png", "{0}.png"),
    ("images/{}.png", "{}.png"),
    ("{}.png", "train/{}.png"),
    ("{}.png", "a/{0}/{0}.png"),
    ("{}.PNG", "{}.png"),
    ("{}.png", "{}.Png"),
    ("export/{}.png", "{}.png"),
    ("{}.jpg", "{}.png"),
    ("{}", "{}.png"),
    ("./{}.png", "{}.png"),
    ("/data/upload/1/79296a5{0}-my_file_{0}.png", "my file {0}.png"),
    ("/data/local-files/?d=images/{}.png", "{}.png"),
    ("/data/local-files/?d=x%20y/{}.png", "x y/{}.png"),
    ("https://storage.example.com/bucket/{}.png?sig=ab%2Fc", "{}.png"),
    ("s3://bucket/set/{}.png", "{}.png"),
    ("{0}_png.rf.0123456789abcdef0123456789abcde{0}.jpg", "{0}.png"),
    ("{0}.png", "{0}_png.rf.0123456789abcdef0123456789abcde{0}.png"),
    ("{0}.png", "0123456{0}-{0}.png"),
    ("my%20{}.png", "my {}.png"),
]


@pytest.mark.parametrize("check", ["header", "none"])
@pytest.mark.parametrize(("listed", "lies"), FOUND)
def test_images_are_found_under_other_names(listed: str, lies: str, check: Any, tmp_path: Path) -> None:
    data = content()
    in_each("images", file_name=lambda i: listed.format(i["id"]))(data)
    source = write(tmp_path, data)
    moved(tmp_path, lies)
    dataset = load_coco_dataset(source, strict=True, check_images=check)
    paths = [Path(record["file_name"]).relative_to(source[1]).as_posix() for record in dataset.records]
    assert paths == [lies.format(n) for n in (1, 2, 3)]
    same = Path(source[1], listed.format(1)).resolve() == Path(dataset.records[0]["file_name"]).resolve()
    told = {} if same else {("image found by another name", "filled"): 3}
    assert dataset.report.counts == told


NOT_FOUND = [
    # The folder that has all of them, or the folders that have.
    (
        "{}.png",
        "../other/{}.png",
        "all of them are there below ROOT/other: give that as the image folder",
    ),
    ("b/{}.png", "../b/{}.png", "all of them are there below ROOT: give that as the image folder"),
    ("{}.png", "masks/{}.png", "all of them are there below ROOT/images/masks: give that"),
    # Not one file for each name.
    ("{0}.jpg", "x{0}.png", ""),
]


@pytest.mark.parametrize(("listed", "lies", "hint"), NOT_FOUND)
def test_where_images_are_that_are_not_taken(listed: str, lies: str, hint: str, tmp_path: Path) -> None:
    data = content()
    in_each("images", file_name=lambda i: listed.format(i["id"]))(data)
    source = write(tmp_path, data)
    moved(tmp_path, lies)
    with pytest.raises(DatasetError, match="3 of 3 images are missing"):
        load_coco_dataset(source)
    told = examine_coco_dataset(source).report.hint
    assert told.startswith(hint.replace("ROOT", str(tmp_path))) if hint else told == ""


def test_two_folders_with_the_same_names_are_both_named(tmp_path: Path) -> None:
    source = write(tmp_path, content())
    for split in ("train", "val"):
        for n in (1, 2, 3):
            target = tmp_path / f"images/{split}/{n}.png"
            target.parent.mkdir(exist_ok=True)
            target.write_bytes((tmp_path / f"images/{n}.png").read_bytes())
    for n in (1, 2, 3):
        (tmp_path / f"images/{n}.png").unlink()
    hint = examine_coco_dataset(source).report.hint
    assert hint.endswith(
        f"below {tmp_path}/images/train and {tmp_path}/images/val: give the right one as the image folder"
    )


def test_one_of_many_is_not_taken_from_another_folder(tmp_path: Path) -> None:
    """A few missing images that another folder has by the same names are other images."""
    data = content()
    source = write(tmp_path, data)
    moved(tmp_path, "{}.png")
    (tmp_path / "images/val").mkdir()
    (tmp_path / "images/2.png").rename(tmp_path / "images/val/2.png")
    with pytest.raises(DatasetError, match="1 of 3 images is missing"):
        load_coco_dataset(source)
    hint = examine_coco_dataset(source).report.hint
    assert hint == "'2.png' may be 'val/2.png': name it so in file_name"
    # By capital letters alone it is the same image.
    (tmp_path / "images/val/2.png").rename(tmp_path / "images/2.PNG")
    assert len(load_coco_dataset(source).records) == 3


def test_an_image_of_another_name_is_looked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache doesn't hold on to a file once the annotation file's own name is there."""
    monkeypatch.setenv(annotation_cache.FOLDER_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(annotation_cache, "SMALLEST", 0)
    data = content()
    in_each("images", file_name=lambda i: f"{i['id']}.PNG")(data)
    source = write(tmp_path, data)
    first = load_coco_dataset(source, cache=True)
    assert load_coco_dataset(source, cache=True) == first
    assert (tmp_path / "cache").exists()
    (tmp_path / "images/2.PNG").write_bytes((tmp_path / "images/2.png").read_bytes())
    again = load_coco_dataset(source, cache=True)
    assert [Path(r["file_name"]).name for r in again.records] == ["1.png", "2.PNG", "3.png"]


RLE = {"size": [HEIGHT, WIDTH], "counts": RUNS}


@pytest.mark.parametrize(
    "change",
    [
        in_each("images", height=12, width=12),
        in_each("images", height=12, width=WIDTH),
        in_each("images", height=HEIGHT, width=12),
        several(in_each("images", height=12, width=12), in_each("annotations", bbox=["5", 5, 10, 10])),
        several(in_each("images", height=12, width=12), without("annotations", "bbox")),
        several(in_each("images", height=WIDTH, width=HEIGHT), in_each("annotations", segmentation=RLE)),
        several(in_each("images", height=9, width=9), lambda data: data["annotations"].pop()),
    ],
)
@pytest.mark.parametrize("check", ["header", "none"])
def test_wrong_sizes_whose_objects_fit_the_pictures(change: Change, check: Any, tmp_path: Path) -> None:
    data = content()
    change(data)
    dataset = load_coco_dataset(write(tmp_path, data), check_images=check)
    assert [(r["height"], r["width"]) for r in dataset.records] == [(HEIGHT, WIDTH)] * 3
    assert dataset.report.counts["wrong image size", "filled"] == 3
    assert not dataset.report.count("dropped")
    boxes = [plain(a["bbox"]) for r in dataset.records for a in r["annotations"]]
    assert boxes == [[5.0, 5.0, 10.0, 10.0]] * len(data["annotations"])


@pytest.mark.parametrize(
    "change",
    [
        in_each("images", height=2 * HEIGHT, width=2 * WIDTH),  # fits both: was the set made larger?
        several(
            in_each("images", height=2 * HEIGHT, width=2 * WIDTH),
            in_each("annotations", bbox=[50, 40, 10, 10]),
        ),
        several(in_each("images", height=12, width=12), in_each("annotations", bbox=[50, 40, 10, 10])),
        several(
            in_each("images", height=12, width=12),
            lambda data: data["annotations"].append(data["annotations"][0] | {"bbox": [50, 40, 10, 10]}),
        ),
    ],
)
def test_wrong_sizes_that_objects_may_have_been_drawn_in_stop(change: Change, tmp_path: Path) -> None:
    data = content()
    change(data)
    with pytest.raises(DatasetError, match=f"wrong image size 3.*is {WIDTH}x{HEIGHT}, the annotation"):
        load_coco_dataset(write(tmp_path, data))
