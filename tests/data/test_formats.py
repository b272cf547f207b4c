"""Files that aren't COCO's are told by their names, with what to do."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from zenith_det.data import load_coco_dataset
from zenith_det.errors import DatasetError

from .builders import content, write

VIA_REGION = {"shape_attributes": {"name": "rect", "x": 1, "y": 1, "width": 2, "height": 2}}
JSONS: dict[str, Any] = {
    "detections file": [{"image_id": 1, "category_id": 1, "bbox": [1, 1, 2, 2], "score": 0.5}],
    '"images" and "categories" are missing': [
        {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 2, 2]}
    ],
    "it is an empty list": [],
    "Label Studio's own JSON": [
        {"id": 1, "data": {"image": "/data/upload/a.jpg"}, "annotations": [{"result": []}]}
    ],
    "Label Studio's JSON-MIN": [{"image": "a.jpg", "label": [], "annotation_id": 1, "lead_time": 2.5}],
    "CreateML's JSON": [{"image": "a.jpg", "annotations": [{"label": "a", "coordinates": {}}]}],
    "labelme's JSON of one image": {"version": "5.0.1", "flags": {}, "shapes": [], "imagePath": "a.jpg"},
    "VIA's own JSON": {"_via_settings": {}, "_via_img_metadata": {}, "_via_attributes": {}},
    "Annotation, Export Annotations": {
        "a.jpg123": {"filename": "a.jpg", "size": 123, "regions": [VIA_REGION]}
    },
    "Datumaro's JSON": {"info": {}, "categories": {}, "items": []},
    'a part of a COCO file, without "images"': {"annotations": [], "categories": []},
    "Supervisely's JSON": {"description": "", "size": {"height": 1, "width": 1}, "objects": []},
    "GeoJSON": {"type": "FeatureCollection", "features": []},
}
TEXTS: dict[str, str | bytes] = {
    "YOLO's labels of one image": "0 0.5 0.5 0.1 0.1\n12 0.25 0.5 0.125 1e-2\n",
    "a class and numbers a line": "1 0.1 0.2 0.3 0.4 0.5 0.6\r\n",
    "Pascal VOC's XML": '<?xml version="1.0"?>\n<annotation verified="yes"><folder>x</folder></annotation>',
    "CVAT's own XML": "<?xml version='1.0'?>\n<annotations><version>1.1</version></annotations>",
    "a web page": "<!DOCTYPE html><html><body>404</body></html>",
    "VIA's CSV": "filename,file_size,file_attributes,region_count,region_id,region_shape_attributes\na.jpg,1,{},0,0,{}",
    "a CSV table": "image,xmin,ymin,xmax,ymax,label\na.jpg,1,2,3,4,cat\n",
    "it is empty": " \n",
    "a zip archive": b"PK\x03\x04 rest",
    "a gzip archive": gzip.compress(b"{}"),
    "a JPEG image": b"\xff\xd8\xff\xe0 rest",
    "a JSON object on each line": '{"image": "a"}\n{"image": "b"}\n',
}


def refused(json_file: str, images: str) -> str:
    with pytest.raises(DatasetError) as caught:
        load_coco_dataset((json_file, images))
    message = str(caught.value)
    assert json_file in message
    assert len(message) < 600
    return message


@pytest.mark.parametrize("name", JSONS)
def test_json_of_other_tools(name: str, tmp_path: Path) -> None:
    assert name in refused(*write(tmp_path, JSONS[name]))


@pytest.mark.parametrize("name", TEXTS)
def test_other_files(name: str, tmp_path: Path) -> None:
    json_file, images = write(tmp_path, content())
    text = TEXTS[name]
    Path(json_file).write_bytes(text.encode() if isinstance(text, str) else text)
    assert name in refused(json_file, images)


def test_a_broken_coco_file_keeps_its_place(tmp_path: Path) -> None:
    whole = json.dumps(content(), indent=1)
    assert "is it cut off?" in refused(*write(tmp_path, whole[: len(whole) // 2]))


@pytest.mark.parametrize(
    ("files", "told"),
    [
        (["train.json"], "give the file, "),
        (["a.json", "b.json"], "give one of its files, a.json, b.json"),
        (["a.jpg", "a.json", "b.jpg", "b.json"], "as labelme writes them"),
        (["a.xml", "a.jpg"], "Pascal VOC"),
        (["data.yaml"], "YOLO"),
        (["annotations/x.json"], "give a file, such as "),
        (["a.jpg"], "a folder of images"),
        ([], "a folder, and empty"),
    ],
)
def test_a_folder_where_a_file_is_wanted(files: list[str], told: str, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    for name in files:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    assert told in refused(str(folder), str(tmp_path))


def test_a_file_where_the_image_folder_is_wanted(tmp_path: Path) -> None:
    json_file, _ = write(tmp_path, content())
    with pytest.raises(DatasetError, match=r"set\.json is a file: give the folder"):
        load_coco_dataset((json_file, json_file))
