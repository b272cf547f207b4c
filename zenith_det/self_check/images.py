"""A few pictures with boxes and masks, made without OpenCV, which a machine may lack."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

COUNT, SIDE = 8, 96
CLASSES = ("box", "bar")


def make_set(folder: Path) -> tuple[Path, Path]:
    """Write :data:`COUNT` pictures of coloured rectangles; returns the annotation file and the images' folder."""
    rng = np.random.default_rng(0)
    content: dict[str, list[dict[str, Any]]] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": i, "name": name} for i, name in enumerate(CLASSES, start=1)],
    }
    images = folder / "images"
    images.mkdir(parents=True)
    for image_id in range(1, COUNT + 1):
        pixels = rng.integers(0, 60, (SIDE, SIDE, 3), dtype=np.uint8)
        for corner in ((4, 6), (52, 8), (20, 54)):
            x, y = (int(c + rng.integers(0, 6)) for c in corner)
            width, height = int(rng.integers(14, 34)), int(rng.integers(14, 34))
            pixels[y : y + height, x : x + width] = rng.integers(120, 255, 3)
            content["annotations"].append(
                {
                    "id": len(content["annotations"]) + 1,
                    "image_id": image_id,
                    "category_id": 1 + (width > height),
                    "bbox": [x, y, width, height],
                    "area": width * height,
                    "iscrowd": 0,
                    "segmentation": [[x, y, x + width, y, x + width, y + height, x, y + height]],
                }
            )
        name = f"{image_id:02}.png"
        Image.fromarray(pixels).save(images / name)
        content["images"].append({"id": image_id, "file_name": name, "width": SIDE, "height": SIDE})
    path = folder / "instances.json"
    path.write_text(json.dumps(content))
    return path, images
