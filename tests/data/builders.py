"""Small datasets on disk, for tests that break one thing in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 40, 30
SQUARE = [5.0, 5.0, 15.0, 5.0, 15.0, 15.0, 5.0, 15.0]


def picture(height: int = HEIGHT, width: int = WIDTH) -> Image.Image:
    """A picture whose four corners differ, so that any turn or mirror shows."""
    rows, columns = np.mgrid[0:height, 0:width]
    pixels = np.stack([columns * 255 // width, rows * 255 // height, np.full_like(rows, 90)], axis=2)
    return Image.fromarray(pixels.astype(np.uint8))


def content(images: int = 3) -> dict[str, Any]:
    """A clean annotation file: ``images`` images with one object each."""
    return {
        "info": {},
        "licenses": [],
        "images": [
            {"id": i, "file_name": f"{i}.png", "height": HEIGHT, "width": WIDTH} for i in range(1, images + 1)
        ],
        "annotations": [
            {
                "id": i,
                "image_id": i,
                "category_id": 1,
                "bbox": [5, 5, 10, 10],
                "area": 100,
                "iscrowd": 0,
                "segmentation": [list(SQUARE)],
            }
            for i in range(1, images + 1)
        ],
        "categories": [{"id": 1, "name": "square"}],
    }


def write(folder: Path, data: Any, name: str = "set.json") -> tuple[str, str]:
    """Write an annotation file and, where they aren't there yet, plain images 1.png to 3.png."""
    image_root = folder / "images"
    image_root.mkdir(parents=True, exist_ok=True)
    for number in (1, 2, 3):
        path = image_root / f"{number}.png"
        if not path.exists():
            picture().save(path)
    json_file = folder / name
    json_file.write_text(data if isinstance(data, str) else json.dumps(data))
    return str(json_file), str(image_root)
