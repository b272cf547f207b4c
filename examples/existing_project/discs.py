"""The project's own dataset: discs and squares on noise, drawn on first use."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from PIL import Image, ImageDraw

CLASSES = ["disc", "square"]
SIZE = 96


def draw(folder: Path, count: int, seed: int) -> list[dict]:
    """Write ``count`` images and return them as Detectron2's dataset dicts."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    records = []
    for number in range(count):
        image = Image.fromarray(rng.integers(0, 100, (SIZE, SIZE, 3), dtype=np.uint8))
        pen = ImageDraw.Draw(image)
        annotations = []
        for corner in ((8, 8), (52, 52))[: rng.integers(1, 3)]:
            side, kind = int(rng.integers(18, 36)), int(rng.integers(2))
            box = [corner[0], corner[1], corner[0] + side, corner[1] + side]
            color = tuple(int(c) for c in rng.integers(150, 256, 3))
            (pen.ellipse if kind == 0 else pen.rectangle)(box, fill=color)
            annotations.append({"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "category_id": kind})
        path = folder / f"{number}.png"
        image.save(path)
        records.append(
            {
                "file_name": str(path),
                "image_id": number,
                "height": SIZE,
                "width": SIZE,
                "annotations": annotations,
            }
        )
    return records


def register(folder: str) -> None:
    """Register ``discs_train`` and ``discs_val`` with Detectron2."""
    for split, count, seed in (("train", 60, 0), ("val", 12, 1)):
        name = f"discs_{split}"
        DatasetCatalog.register(name, lambda s=split, c=count, r=seed: draw(Path(folder, s), c, r))
        MetadataCatalog.get(name).set(thing_classes=CLASSES, evaluator_type="coco")
