"""Which format a file or folder is that isn't COCO's, and what to do with it.

Known by what the tools that write them put in; nothing is read but the beginning of a file and what has been parsed
already.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from zenith_det.errors import listed

#: How much of a file is looked at.
_BEGINNING = 65536
_FILES_LISTED = 5
_NUMBER = rb"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_YOLO_LINE = re.compile(rb"\d+(?:[ \t]+" + _NUMBER + rb"){4,}[ \t]*\r?")
# First bytes of files that are no text.
_MAGIC = (
    (b"PK\x03\x04", "a zip archive", "unpack it, and give the annotation file in it"),
    (b"\x1f\x8b", "a gzip archive", "unpack it, and give the annotation file in it"),
    (b"7z\xbc\xaf", "a 7z archive", "unpack it, and give the annotation file in it"),
    (b"Rar!", "a rar archive", "unpack it, and give the annotation file in it"),
    (b"\xff\xd8\xff", "a JPEG image", "give the annotation file, not an image"),
    (b"\x89PNG", "a PNG image", "give the annotation file, not an image"),
    (b"SQLite format 3", "an SQLite database", "export the annotations as COCO JSON"),
)
_CONVERT = "give its folder as --train-json, or make COCO files of it by tools/convert_dataset.py"
_BY_HAND = "convert it to COCO JSON"
_EXPORT = "export the annotations again, as COCO JSON"
_IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")


def name_of_text(data: bytes, path: str) -> str:
    """The format of a file that is no JSON: ``"YOLO's labels of one image: …"``; "" where it isn't known.

    Args:
        data: its content.
        path: its name counts, too.
    """
    for magic, what, advice in _MAGIC:
        if data.startswith(magic):
            return f"it is {what}: {advice}"
    beginning = data[:_BEGINNING].removeprefix(b"\xef\xbb\xbf").lstrip()
    if not beginning:
        return "it is empty: export or copy it again"
    if beginning.startswith(b"<"):
        return _name_of_xml(beginning)
    if path.lower().endswith((".yaml", ".yml")):
        if re.search(rb"^(names|nc)\s*:", beginning, re.MULTILINE):
            return f"it is YOLO's list of classes and folders, the labels are in .txt files: {_CONVERT}"
        return "it is a YAML file: give the JSON file with the annotations"
    lines = [line for line in beginning.split(b"\n")[:50] if line.strip()]
    whole = lines if len(data) <= _BEGINNING or len(lines) == 1 else lines[:-1]
    if all(_YOLO_LINE.fullmatch(line.strip()) for line in whole):
        return f"it is YOLO's labels of one image (a class and numbers a line): {_CONVERT}"
    if b"region_shape_attributes" in lines[0]:
        return "it is VIA's CSV: in VIA take Annotation, Export Annotations (COCO format), or convert it to COCO JSON"
    if lines[0].count(b",") >= 3 and not beginning.startswith((b"{", b"[")):
        return f"it is a CSV table: {_BY_HAND}, or {_EXPORT}"
    if len(lines) > 1 and lines[0].lstrip().startswith(b"{") and lines[0].rstrip().endswith(b"}"):
        return f"it has a JSON object on each line, not one in all: {_EXPORT}"
    return ""


def _name_of_xml(beginning: bytes) -> str:
    if re.search(rb"<annotations[\s>]", beginning):
        return 'it is CVAT\'s own XML: in CVAT, export the task or project as "COCO 1.0"'
    if re.search(rb"<annotation[\s>]", beginning):
        return f"it is Pascal VOC's XML of one image: {_CONVERT}"
    if re.search(rb"<!doctype html|<html", beginning, re.IGNORECASE):
        return "it is a web page, perhaps that of a failed download: download the file again"
    return f"it is XML: {_EXPORT}"


def name_of_json(content: Any) -> str:
    """The format of JSON that isn't COCO's; "" where it isn't known."""
    if isinstance(content, list):
        return _name_of_list(content)
    if not isinstance(content, dict):
        return ""
    for known, what in _OBJECTS:
        if known(content):
            return what
    return ""


def _name_of_list(content: list[Any]) -> str:
    if not content:
        return (
            'it is an empty list, as of detections of nothing: give the file with "images" and "categories"'
        )
    first = content[0]
    if not isinstance(first, dict):
        return ""
    keys = first.keys()
    if {"image_id", "category_id"} <= keys:
        if "score" in keys:
            return (
                "it is a detections file (COCO's result format), what a model found: give the annotation file with "
                '"images" and "categories"'
            )
        return 'it is only the "annotations" of a COCO file: "images" and "categories" are missing, export it whole'
    if "data" in keys and keys & {"annotations", "predictions", "completions"}:
        return 'it is Label Studio\'s own JSON: export the project as "COCO", or "COCO with images"'
    if keys & {"lead_time", "annotator"} or "annotation_id" in keys:
        return 'it is Label Studio\'s JSON-MIN: export the project as "COCO", or "COCO with images"'
    if "image" in keys and "annotations" in keys:
        return f"it is CreateML's JSON: {_BY_HAND}, or {_EXPORT}"
    if "name" in keys and "labels" in keys:
        return f"it is BDD100K's (Scalabel's) JSON: {_BY_HAND}"
    if "Label" in keys or "data_row" in keys:
        return f"it is Labelbox's own JSON: {_BY_HAND}, or {_EXPORT}"
    return ""


def _has(*keys: str) -> Callable[[Mapping[str, Any]], bool]:
    return lambda content: all(key in content for key in keys)


def _is_via(content: Mapping[str, Any]) -> bool:
    if "_via_img_metadata" in content:
        return True
    first = next(iter(content.values()), None)
    return isinstance(first, dict) and "regions" in first and "filename" in first


_VIA = "it is VIA's own JSON: in VIA take Annotation, Export Annotations (COCO format)"
_OBJECTS: tuple[tuple[Callable[[Mapping[str, Any]], bool], str], ...] = (
    (_is_via, _VIA),
    (_has("project", "metadata", "attribute"), "it is VIA 3's own JSON: export the annotations as COCO"),
    (
        lambda content: "shapes" in content and ("imagePath" in content or "version" in content),
        f"it is labelme's JSON of one image: {_CONVERT}",
    ),
    (_has("items", "categories"), f"it is Datumaro's JSON: {_EXPORT}"),
    (
        lambda content: "objects" in content and "size" in content,
        f"it is Supervisely's JSON of one image: {_EXPORT}",
    ),
    (
        _has("imgHeight", "imgWidth", "objects"),
        "it is Cityscapes' JSON of one image: convert it to COCO JSON",
    ),
    (
        lambda content: content.get("type") == "FeatureCollection",
        "it is GeoJSON, in coordinates of the earth: convert it to COCO JSON, in pixels",
    ),
    (
        lambda content: _has("data", "annotations")(content) or _has("data", "predictions")(content),
        'it is one task of Label Studio\'s own JSON: export the project as "COCO"',
    ),
    (
        lambda content: isinstance(content.get("annotations"), list) and "images" not in content,
        'it is a part of a COCO file, without "images": export it whole',
    ),
)


def name_of_folder(folder: str) -> str:
    """What to give in place of a folder where a file is wanted, by what lies in it."""
    try:
        names = sorted(entry.name for entry in os.scandir(folder))
    except OSError as error:
        return f"it is a folder that can't be read: {error.strerror or error}"
    jsons = [name for name in names if name.lower().endswith(".json")]
    below = [name for name in names if (Path(folder) / name).is_dir()]
    if len(jsons) == 1:
        return f"it is a folder: give the file, {os.path.join(folder, jsons[0])}"
    stems = {Path(name).stem for name in names if name.lower().endswith(_IMAGES)}
    if len(jsons) > 1 and {Path(name).stem for name in jsons} & stems:
        return f"it is a folder with a .json file for each image, as labelme writes them: {_CONVERT}"
    if jsons:
        return f"it is a folder: give one of its files, {listed(jsons, _FILES_LISTED)}"
    if any(name.lower().endswith(".xml") for name in names):
        return f"it is a folder of XML files, Pascal VOC's format: {_CONVERT}"
    if any(name.lower().endswith(".txt") for name in names) or any(
        name.endswith((".yaml", ".yml")) for name in names
    ):
        return f"it is a folder of a YOLO set: {_CONVERT}"
    for name in below:
        inner = sorted(str(path) for path in (Path(folder) / name).glob("*.json"))
        if inner:
            return f"it is a folder: give a file, such as {listed(inner, _FILES_LISTED)}"
    if stems:
        return "it is a folder of images: give the JSON file with the annotations"
    return f"it is a folder{'' if names else ', and empty'}: give the JSON file with the annotations"
