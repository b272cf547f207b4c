"""A COCO annotation file as it stands: JSON of the right form, nothing of its content checked."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import orjson

from zenith_det.data.formats import name_of_json, name_of_text
from zenith_det.data.garbage_collection import garbage_collection_off
from zenith_det.errors import DatasetError, one_line


def read_bytes(json_file: str) -> bytes:
    try:
        kind = os.stat(json_file).st_mode
        if not stat.S_ISREG(kind) and not stat.S_ISDIR(kind):
            # It may have no end, or wait for somebody to write.
            raise DatasetError(f"annotation file {json_file} is a device or a pipe, not a file")
        return Path(json_file).read_bytes()
    except FileNotFoundError:
        raise DatasetError(f"annotation file {json_file} does not exist") from None
    except (OSError, ValueError) as error:
        raise DatasetError(f"annotation file {json_file} can't be read: {one_line(str(error))}") from None
    except MemoryError:
        raise DatasetError(f"{json_file}: does not fit into memory") from None


def parse(data: bytes, json_file: str) -> dict[str, Any]:
    try:
        with garbage_collection_off():
            content = _from_json(data, json_file)
    except MemoryError:
        raise DatasetError(f"{json_file}: does not fit into memory") from None
    is_coco = isinstance(content, dict) and {"images", "categories"} <= content.keys()
    if not is_coco and (known := name_of_json(content)):
        raise DatasetError(f"{json_file}: not a COCO annotation file: {known}")
    if not isinstance(content, dict):
        raise DatasetError(
            f"{json_file}: not a COCO annotation file: a JSON object with images, annotations and categories "
            f"is needed, this is a {json_type(content)}"
        )
    for key in ("images", "categories", "annotations"):
        # Test sets (image_info_test2017.json) have no annotations.
        if not isinstance(content.get(key, [] if key == "annotations" else None), list):
            found = f"a {json_type(content[key])}" if key in content else "missing"
            raise DatasetError(
                f'{json_file}: not a COCO annotation file: "{key}" must be a list and is {found}'
            )
    return content


def _from_json(data: bytes, json_file: str) -> Any:
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError:
        pass  # Python's own takes three times as long. It also reads NaN, and knows the line of a mistake.
    if known := name_of_text(data, json_file):
        raise DatasetError(f"{json_file}: not a COCO annotation file: {known}")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DatasetError(f"{json_file}: not a JSON text file (byte {error.start} is not UTF-8)") from None
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        end = " (where the file ends: is it cut off?)" if error.pos >= len(text.rstrip()) - 1 else ""
        raise DatasetError(
            f"{json_file}: not valid JSON at line {error.lineno}, column {error.colno}, "
            f"character {error.pos} of {len(text)}{end}: {error.msg}"
        ) from None
    except RecursionError:
        raise DatasetError(f"{json_file}: not an annotation file: its JSON is nested too deep") from None
    except ValueError as error:  # a whole number of thousands of digits
        raise DatasetError(f"{json_file}: not an annotation file: {one_line(str(error))}") from None


def json_type(value: object) -> str:
    names = {dict: "object", list: "list", str: "text", bool: "true/false", type(None): "null"}
    return names.get(type(value), "number")
