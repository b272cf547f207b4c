"""Each thing that can be wrong with a dataset: found, named, and either harmless from then on or refused."""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from zenith_det.data import CocoDataset, coco_ground_truth, examine_coco_dataset, load_coco_dataset
from zenith_det.errors import DatasetError

from .builders import HEIGHT, SQUARE, WIDTH, content, picture, write

NAN, INF = float("nan"), float("inf")
Break = Callable[[dict[str, Any]], None]


def set_in(key: str, value: Any) -> Break:
    return lambda annotation: annotation.update({key: value})


BROKEN_ANNOTATIONS: list[tuple[Break, str, str]] = [
    (set_in("bbox", [5, 5, 0, 10]), "box without area", "width 0"),
    (set_in("bbox", [15, 5, -10, 10]), "inverted box", "width -10"),
    (set_in("bbox", [NAN, 5, 10, 10]), "broken box", "not finite"),
    (set_in("bbox", [5, 5, INF, 10]), "broken box", "not finite"),
    (set_in("bbox", [5, 5, 10]), "broken box", "not four numbers"),
    (set_in("bbox", "abcd"), "broken box", "not four numbers"),
    (set_in("bbox", {"x": 1}), "broken box", "not four numbers"),
    (set_in("bbox", [5, 5, 10**400, 10]), "broken box", "not four numbers"),
    (set_in("bbox", [50, 5, 10, 10]), "box outside the image", "outside the image of 40x30"),
    (set_in("bbox", [-20, 5, 10, 10]), "box outside the image", "outside"),
    (set_in("segmentation", [[1, 2, 3, 4]]), "broken polygon", "has 4 numbers"),
    (set_in("segmentation", [[1, 2, 3, 4, 5, 6, 7]]), "broken polygon", "in pairs"),
    (set_in("segmentation", [[1, 2, 3, NAN, 5, 6]]), "broken polygon", "not finite"),
    (set_in("segmentation", [[1, 2, 3, INF, -INF, 6]]), "broken polygon", "not finite"),
    (set_in("segmentation", [[1, 2, 3, 1e30, 5, 6]]), "broken polygon", "far outside"),
    (set_in("segmentation", [["a", "b", "c", "d", "e", "f"]]), "broken polygon", "not a list of numbers"),
    (set_in("segmentation", [None]), "broken polygon", "not a list of numbers"),
    (set_in("segmentation", "polygon"), "broken polygon", "is a text"),
    (set_in("segmentation", {"size": [WIDTH, HEIGHT], "counts": [1200]}), "broken RLE", "RLE size"),
    (set_in("segmentation", {"size": [HEIGHT, WIDTH], "counts": [1199]}), "broken RLE", "add up to 1199"),
    (set_in("segmentation", {"size": [HEIGHT, WIDTH], "counts": [-100, 1300]}), "broken RLE", "run below 0"),
    (set_in("segmentation", {"size": [HEIGHT, WIDTH], "counts": [2**70]}), "broken RLE", "not whole"),
    (set_in("segmentation", {"size": [HEIGHT, WIDTH], "counts": [[1200]]}), "broken RLE", "not whole"),
    (set_in("segmentation", {"size": [HEIGHT, WIDTH], "counts": "00"}), "broken RLE", "add up to 0"),
    (set_in("segmentation", {"size": [HEIGHT, WIDTH], "counts": "\u00e9"}), "broken RLE", "RLE has"),
    (set_in("segmentation", {"size": [HEIGHT, WIDTH], "counts": "oooooooooooo"}), "broken RLE", "no RLE has"),
    (set_in("segmentation", {"size": [HEIGHT, WIDTH], "counts": "o" * 9 + "0"}), "broken RLE", "longer than"),
    (set_in("segmentation", {"size": [HEIGHT, WIDTH]}), "broken RLE", "counts of type"),
    (set_in("segmentation", {"counts": "abc"}), "broken RLE", "no RLE has"),
    (set_in("image_id", 99), "unknown image id", "image_id 99"),
    (set_in("image_id", [2]), "unknown image id", "image_id"),
    (set_in("image_id", 2**63), "unknown image id", "image_id 9223372036854775808"),
    (set_in("iscrowd", 7), "broken iscrowd", "iscrowd is 7"),
]


@pytest.mark.parametrize(("breaking", "kind", "reason"), BROKEN_ANNOTATIONS)
def test_broken_annotation_is_dropped_and_told(
    breaking: Break, kind: str, reason: str, tmp_path: Path
) -> None:
    data = content()
    if "box" in kind:  # a good mask gives another
        data["annotations"][1]["segmentation"] = []
    breaking(data["annotations"][1])
    source = write(tmp_path, data)
    dataset = load_coco_dataset(source)
    # Without its mask an object still has its box; as background it would be held against every detection.
    stays = kind in ("broken polygon", "broken RLE")
    assert [len(record["annotations"]) for record in dataset.records] == [1, int(stays), 1]
    if stays:
        assert dataset.records[1]["annotations"][0]["bbox"] == [5, 5, 10, 10]
        assert "segmentation" not in dataset.records[1]["annotations"][0]
        assert "keeps its box" in dataset.report.problems[0].reason
    assert dataset.report.counts == {(kind, "dropped"): 1}
    problem = dataset.report.problems[0]
    assert reason in problem.reason
    if kind != "unknown image id":
        assert (problem.image, problem.image_id) == ("2.png", 2)
    assert problem.annotation_id == 2
    assert kind in dataset.report.summary()
    json.dumps(coco_ground_truth(dataset))
    with pytest.raises(DatasetError, match=kind):
        load_coco_dataset(source, strict=True)


def test_good_polygons_of_an_object_stay(tmp_path: Path) -> None:
    data = content()
    data["annotations"][0]["segmentation"] = [SQUARE, [1, 2], SQUARE]
    dataset = load_coco_dataset(write(tmp_path, data))
    assert dataset.records[0]["annotations"][0]["segmentation"] == [SQUARE, SQUARE]
    assert "polygon 2 of 3 has 2 numbers" in dataset.report.problems[0].reason


@pytest.mark.parametrize(
    "keypoints", [[1, 2], [1, 2, NAN, 0, 0, 0], [1, 2, 3, 4, 5, 2], ["a"] * 6, {"a": 1}, [1, 2, [2], 4, 5, 2]]
)
def test_broken_keypoints_leave_the_object(keypoints: Any, tmp_path: Path) -> None:
    data = content()
    data["categories"] = [{"id": 1, "name": "person", "keypoints": ["a", "b"]}]
    for annotation in data["annotations"]:
        annotation["keypoints"] = [7, 8, 2, 1, 1, 1]
    data["annotations"][1]["keypoints"] = keypoints
    dataset = load_coco_dataset(write(tmp_path, data))
    assert [record["annotations"][0]["keypoints"] for record in dataset.records] == [
        [7.5, 8.5, 2, 1.5, 1.5, 1],
        [0.5, 0.5, 0, 0.5, 0.5, 0],
        [7.5, 8.5, 2, 1.5, 1.5, 1],
    ]
    assert dataset.report.counts == {("broken keypoints", "dropped"): 1}
    assert dataset.report.problems[0].annotation_id == 2


def test_duplicate_ids(tmp_path: Path) -> None:
    data = content()
    same = copy.deepcopy(data["annotations"][0])
    other = {**copy.deepcopy(data["annotations"][0]), "bbox": [6, 6, 10, 10]}
    data["annotations"] += [same, other]
    data["images"].append(dict(data["images"][0]))
    dataset = load_coco_dataset(write(tmp_path, data))
    assert [(a["id"], a["bbox"][0]) for a in dataset.records[0]["annotations"]] == [(1, 5), (4, 6)]
    assert dataset.report.counts == {
        ("duplicate image", "dropped"): 1,
        ("duplicate annotation", "dropped"): 1,
        ("duplicate annotation id", "filled"): 1,
    }


def test_one_id_for_two_images(tmp_path: Path) -> None:
    data = content()
    data["images"][1]["id"] = 1
    with pytest.raises(DatasetError, match=r"two images have the id 1: 1\.png and 2\.png"):
        load_coco_dataset(write(tmp_path, data))


def test_undeclared_category_stops(tmp_path: Path) -> None:
    for category_id in (5, None, "one", True, 2**63):
        data = content()
        data["annotations"][2]["category_id"] = category_id
        with pytest.raises(
            DatasetError, match=r"unknown category id 1; the first: 3\.png, annotation 3: categ"
        ):
            load_coco_dataset(write(tmp_path, data))


def test_boxes_that_reach_out_are_kept_and_many_are_suspicious(tmp_path: Path) -> None:
    data = content()
    data["annotations"][0]["bbox"] = [30, 20, 10.9, 10.9]  # less than a pixel: rounding
    data["annotations"][1]["bbox"] = [30, 20, 30, 10]
    dataset = load_coco_dataset(write(tmp_path, data), strict=True)
    assert dataset.report.counts == {("box reaches out of the image", "kept"): 1}
    assert dataset.records[1]["annotations"][0]["bbox"] == [30, 20, 30, 10]

    corners = content(1)
    template = corners["annotations"][0]
    corners["annotations"] = [{**template, "id": i, "bbox": [20, 15, 30, 25]} for i in range(1, 13)]
    report = load_coco_dataset(write(tmp_path, corners)).report
    assert "(x1, y1, x2, y2)" in report.table()
    assert report.summary().endswith("1 class; suspicious boxes; kept: box reaches out of the image 12")

    relative = content(1)
    relative["annotations"] = [{**template, "id": i, "bbox": [0.2, 0.3, 0.1, 0.2]} for i in range(1, 13)]
    with pytest.raises(DatasetError, match=r"all 12 boxes lie between 0 and 1.*multiply x and width"):
        load_coco_dataset(write(tmp_path, relative))
    points = content(1)
    points["annotations"] = [
        {**template, "id": i, "bbox": [20, 15, 1, 1], "segmentation": []} for i in range(12)
    ]
    assert "no box is larger than a pixel" in load_coco_dataset(write(tmp_path, points)).report.table()


def test_suspicious_boxes_are_a_warning_before_training_and_refused_by_strict(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = content(1)
    template = data["annotations"][0]
    data["annotations"] = [{**template, "id": i, "bbox": [20, 15, 30, 25]} for i in range(1, 13)]
    source = write(tmp_path, data)
    told = "12 of 12 boxes reach out of their images: are they (x1, y1, x2, y2)?"
    load_coco_dataset(source)
    (line,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert line.startswith(f"set: {told}")
    with pytest.raises(DatasetError, match=rf"set\.json is refused by the strict check: {re.escape(told)}"):
        load_coco_dataset(source, strict=True)


def break_image(kind: str, folder: Path, entry: dict[str, Any]) -> None:
    path = folder / "images/2.png"
    if kind == "missing":
        entry["file_name"] = "gone.png"
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "truncated":
        picture(HEIGHT, WIDTH).save(path)
        path.write_bytes(path.read_bytes()[:-60])
    elif kind == "text":
        path.write_text("no picture")
    elif kind == "size":
        picture(HEIGHT, WIDTH + 1).save(path)
    elif kind == "swapped":
        entry["height"], entry["width"] = WIDTH, HEIGHT
    elif kind == "exif":
        exif = Image.Exif()
        exif[0x0112] = 6
        picture().save(folder / "images/2.jpg", exif=exif)
        entry["file_name"] = "2.jpg"
    elif kind == "parent":
        entry["file_name"] = "../secret.png"
    elif kind == "absolute":
        entry["file_name"] = "/etc/passwd"
    elif kind == "number":
        entry["file_name"] = 5
    elif kind == "huge":
        entry["height"] = entry["width"] = 100_000
    elif kind == "negative":
        entry["height"] = -30
    elif kind == "id":
        entry["id"] = 2**63


BAD_IMAGES = {
    "missing": ("missing file", "1 of 3 images is missing in "),
    "empty": ("unreadable image", "0 bytes"),
    "truncated": ("unreadable image", "can't be decoded"),
    "text": ("unreadable image", "not an image"),
    "size": ("wrong image size", "is 41x30, the annotation file says 40x30"),
    "swapped": ("wrong image size", "swapped"),
    "exif": ("wrong image size", "before the EXIF rotation"),
    "parent": ("path outside the image folder", "leads out of"),
    "absolute": ("path outside the image folder", "leads out of"),
    "number": ("no file name", "file_name is 5"),
    "huge": ("image too large", "100000x100000"),
    "negative": ("wrong image size", "height -30"),
    "id": ("bad image id", "9223372036854775808"),
}


@pytest.mark.parametrize("kind", BAD_IMAGES)
def test_bad_image_stops_or_is_left_out(kind: str, tmp_path: Path) -> None:
    data = content()
    source = write(tmp_path, data)
    picture().save(tmp_path / "secret.png")
    break_image(kind, tmp_path, data["images"][1])
    write(tmp_path, data)
    name, reason = BAD_IMAGES[kind]
    with pytest.raises(DatasetError) as caught:
        load_coco_dataset(source)
    assert "\n" not in str(caught.value)
    assert name in str(caught.value) or kind == "missing"
    assert "DATASETS.MAX_BAD_IMAGES 1 (--max-bad-images 1) does without them" in str(caught.value)
    assert reason in str(caught.value)
    dataset = load_coco_dataset(source, max_bad_images=1)
    assert [record["image_id"] for record in dataset.records] == [1, 3]
    assert dataset.report.counts[(name, "dropped")] == 1
    assert dataset.report.count("dropped") == 2  # the image and its annotation


def test_exif_rotated_image_declared_as_it_is_shown_is_right(tmp_path: Path) -> None:
    data = content(1)
    source = write(tmp_path, data)
    break_image("exif", tmp_path, data["images"][0])
    data["images"][0].update(height=WIDTH, width=HEIGHT)
    write(tmp_path, data)
    for check in ("header", "full"):
        assert load_coco_dataset(source, strict=True, check_images=check).records[0]["height"] == WIDTH  # type: ignore[arg-type]


def test_damage_inside_an_image_needs_the_full_check(tmp_path: Path) -> None:
    data = content(1)
    source = write(tmp_path, data)
    path = tmp_path / "images/1.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)).save(path)
    damaged = bytearray(path.read_bytes())
    damaged[200:260] = bytes(60)
    path.write_bytes(damaged)
    load_coco_dataset(source, check_images="header")
    with pytest.raises(DatasetError, match="can't be decoded"):
        load_coco_dataset(source, check_images="full")


def test_no_check_opens_no_image(tmp_path: Path) -> None:
    source = write(tmp_path, content())
    for path in (tmp_path / "images").iterdir():
        path.unlink()
    assert len(load_coco_dataset(source, check_images="none").records) == 3


def test_many_images_are_checked_in_order(tmp_path: Path) -> None:
    data = content(1)
    write(tmp_path, data)
    data["images"] = []
    for number in range(1, 101):
        os.link(tmp_path / "images/1.png", tmp_path / f"images/copy{number}.png")
        data["images"].append(
            {
                "id": number,
                "file_name": f"copy{number}.png",
                "height": HEIGHT,
                "width": WIDTH + (number == 70),
            }
        )
    source = write(tmp_path, data)
    dataset = load_coco_dataset(source, max_bad_images=1)
    assert [r["image_id"] for r in dataset.records] == [n for n in range(1, 101) if n != 70]
    assert dataset.report.problems[0].image == "copy70.png"


WHOLE = json.dumps(content())
BAD_FILES = [
    (WHOLE[: len(WHOLE) // 2], r"not valid JSON at line 1, column \d+, character \d+ of \d+"),
    ("", "it is empty"),
    ("\0" * 10_000, "not valid JSON at line 1, column 1"),
    ("[" * 100_000, "nested too deep|not valid JSON"),
    ('{"a":' * 100_000 + "1" + "}" * 100_000, "nested too deep"),
    (WHOLE.replace('"info": {}', '"info": ' + "[" * 999 + "]" * 999), None),
    ("[1, 2]", "this is a list"),
    ("3", "this is a number"),
    ("null", "this is a null"),
    ("{}", '"images" must be a list and is missing'),
    ('{"images": [], "categories": {}, "annotations": []}', '"categories" must be a list and is a object'),
    ('{"images": [], "categories": [], "annotations": []}', "categories. is empty"),
    ('{"images": [], "categories": [{"id": 1, "name": "a"}]}', "no image is listed"),
    ('{"images": [], "categories": [{"id": 1}]}', "a category needs"),
    ('{"images": [], "categories": [{"id": 9223372036854775808, "name": "a"}]}', "64 bits"),
    ('{"images": [], "categories": [{"id": "one", "name": "a"}]}', "whole number"),
    ('{"images": [], "categories": [{"id": 1, "name": "\\ud800"}]}', "has the name"),
    (
        '{"images": [], "categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]}',
        "categories have the id 1",
    ),
    ('{"images": [5], "categories": [{"id": 1, "name": "a"}]}', "an entry of images is 5|no image is left"),
    ('{"images": ' + "9" * 5000 + "}", "not an annotation file|must be a list"),
]


@pytest.mark.parametrize(("text", "message"), BAD_FILES, ids=range(len(BAD_FILES)))
def test_bad_annotation_file_is_one_line(text: str, message: str | None, tmp_path: Path) -> None:
    source = write(tmp_path, text)
    dataset, told = load_or_message(source)
    if message is None:  # whether a thousand levels are too deep is up to Python's version
        assert dataset is not None or "nested too deep" in told
        return
    assert re.search(message, told)
    assert "\n" not in told
    assert len(told) < 600
    assert source[0] in told


def test_binary_file(tmp_path: Path) -> None:
    source = write(tmp_path, "x")
    Path(source[0]).write_bytes(b"PK\x03\x04\xff\xfe")
    with pytest.raises(DatasetError, match="it is a zip archive"):
        load_coco_dataset(source)


def test_byte_order_mark(tmp_path: Path) -> None:
    source = write(tmp_path, content())
    Path(source[0]).write_bytes(b"\xef\xbb\xbf" + Path(source[0]).read_bytes())
    assert len(load_coco_dataset(source).records) == 3


def test_missing_file_and_folder(tmp_path: Path) -> None:
    json_file, image_root = write(tmp_path, content())
    with pytest.raises(DatasetError, match=r"annotation file \S+none.json does not exist"):
        load_coco_dataset((tmp_path / "none.json", image_root))
    with pytest.raises(DatasetError, match=r"image folder \S+none does not exist"):
        load_coco_dataset((json_file, tmp_path / "none"))


def test_text_from_the_file_can_not_drive_the_terminal(tmp_path: Path) -> None:
    data = content()
    data["images"][0]["file_name"] = "a\n\x1b[2Jerror: all is well" + "x" * 10_000
    with pytest.raises(DatasetError) as caught:
        load_coco_dataset(write(tmp_path, data))
    assert "\x1b" not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1500


def test_table_shows_each_kind_with_the_first_examples(tmp_path: Path) -> None:
    data = content(1)
    template = {**data["annotations"][0], "segmentation": []}
    data["annotations"] = [{**template, "id": i, "bbox": [5, 5, 0, 10]} for i in range(1, 9)]
    data["annotations"].append({**template, "id": 9, "area": None})
    report = examine_coco_dataset(write(tmp_path, data)).report
    lines = report.table(examples=2).splitlines()
    assert lines[2].split()[:6] == ["box", "without", "area", "dropped", "8", "1.png,"]
    assert "annotation 1: bbox [5.0, 5.0, 0.0, 10.0] has width 0" in lines[2]
    assert "annotation 2" in lines[3]
    assert lines[4].split()[:4] == ["no", "area", "filled", "1"]
    assert len(lines) == 5
    assert report.summary() == (
        "set: 1 image (0 without objects), 1 annotation, 1 class; dropped: box without area 8; "
        "filled: no area 1"
    )


def test_many_problems_are_counted_and_not_all_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zenith_det.data.problems.EXAMPLES_KEPT", 5)
    data = content(1)
    template = {**data["annotations"][0], "segmentation": []}
    data["annotations"] = [{**template, "id": i, "bbox": [5, 5, 0, 10]} for i in range(1, 101)]
    report = examine_coco_dataset(write(tmp_path, data)).report
    assert report.count("dropped") == 100
    assert len(report.problems) == 6  # and one says that no annotation is left


def load_or_message(source: tuple[str, str]) -> tuple[CocoDataset | None, str]:
    try:
        return load_coco_dataset(source, max_bad_images=3), ""
    except DatasetError as error:
        return None, str(error)


JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.one_of(st.integers(), st.floats(), st.text(max_size=2), st.none()), max_size=9),
    st.dictionaries(
        st.sampled_from(["size", "counts", "id"]), st.one_of(st.integers(), st.text(max_size=4)), max_size=3
    ),
    st.sampled_from(
        [2**63, -(2**63), 10**400, 1e308, [[1] * 6], [[[]]], {"size": [HEIGHT, WIDTH], "counts": "0"}]
    ),
)
PLACES = st.tuples(
    st.sampled_from(["images", "annotations", "categories"]),
    st.integers(0, 2),
    st.sampled_from(
        [
            "id",
            "image_id",
            "category_id",
            "bbox",
            "segmentation",
            "area",
            "iscrowd",
            "keypoints",
            "name",
            "height",
        ]
        + ["width", "file_name", "skeleton", "flip_pairs", "sigmas", "num_keypoints", ""]
    ),
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(st.tuples(PLACES, JUNK), min_size=1, max_size=4))
def test_junk_anywhere_is_refused_in_one_line_or_read(changes: list[Any], tmp_path: Path) -> None:
    data = content()
    data["categories"].append(
        {"id": 2, "name": "person", "keypoints": ["left_a", "right_a"], "skeleton": [[1, 2]]}
    )
    data["categories"].append({"id": 3, "name": "none"})
    data["annotations"][0]["keypoints"] = [1, 1, 2, 3, 3, 1]
    for (table, number, key), drawn in changes:
        junk = copy.deepcopy(drawn)  # one that is drawn twice would come to hold itself, which JSON can't
        if key and isinstance(data[table][number], dict):
            data[table][number][key] = junk
        else:
            data[table][number] = junk
    source = write(tmp_path, data)
    dataset, message = load_or_message(source)
    assert "\n" not in message
    if dataset is None:
        return
    truth = coco_ground_truth(dataset)
    json.dumps(truth)
    ids = [a["id"] for a in truth["annotations"]]
    assert len(set(ids)) == len(ids)
    for record in dataset.records:
        for item in record["annotations"]:
            assert np.isfinite(item["bbox"]).all()
            assert len(item.get("keypoints", ())) == 3 * dataset.metadata.num_keypoints
            assert 0 <= item["category_id"] < dataset.metadata.num_classes
