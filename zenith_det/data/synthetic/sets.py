"""Images and annotation files of a set, in a folder."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from zenith_det import opencv as cv2
from zenith_det.data.metadata import COCO_KEYPOINT_NAMES, COCO_SKELETON
from zenith_det.data.synthetic.annotations import annotate
from zenith_det.data.synthetic.scene import layout, render
from zenith_det.data.synthetic.sprites import SHAPE_NAMES, ByteArray
from zenith_det.errors import DatasetError

TASKS = ("instances", "keypoints")
#: Changes whenever the same settings give other bytes, so that a set made by an older version is made again.
VERSION = 5
MIN_SIZE, MAX_SIZE = 48, 4096
SETTINGS_FILE = "generator.json"


@dataclass(frozen=True)
class SplitFiles:
    """Where one split was written, and what is in it."""

    json_file: Path
    image_root: Path
    num_images: int
    num_annotations: int


def _image_size(rng: np.random.Generator, size: int) -> tuple[int, int]:
    """(height, width): the longer side is ``size``; square, landscape or portrait."""
    short = size * 3 // 4
    return [(size, size), (short, size), (size, short)][int(rng.choice(3, p=[0.4, 0.35, 0.25]))]


def draw_image(
    task: str, size: int, seed: int, split: int, index: int
) -> tuple[ByteArray, list[dict[str, Any]]]:
    """Draw one image of the set and describe it.

    Args:
        task: ``instances`` or ``keypoints``.
        size: the longer side in pixels.
        seed, split, index: name the image; the same three give the same image.

    Returns:
        The image, uint8 (H, W, 3) BGR, and its annotations: COCO dicts without ``id`` and ``image_id``.
    """
    rng = np.random.default_rng([seed, split, index, TASKS.index(task)])
    height, width = _image_size(rng, size)
    sprites = layout(rng, task, height, width)
    return render(rng, sprites, height, width), annotate(rng, sprites, task, height, width)


def categories(task: str) -> list[dict[str, Any]]:
    """The ``categories`` of the annotation files."""
    if task == "keypoints":
        skeleton = [list(bone) for bone in COCO_SKELETON]
        return [
            {
                "id": 1,
                "name": "person",
                "supercategory": "person",
                "keypoints": list(COCO_KEYPOINT_NAMES),
                "skeleton": skeleton,
            }
        ]
    return [
        {"id": index + 1, "name": name, "supercategory": "shape"} for index, name in enumerate(SHAPE_NAMES)
    ]


def split_files(output: str | os.PathLike[str], split: str, task: str) -> tuple[Path, Path]:
    """(annotation file, image folder) of a split in a generated set's folder."""
    stem = "instances" if task == "instances" else "person_keypoints"
    return Path(output) / "annotations" / f"{stem}_{split}.json", Path(output) / split


def _write_split(
    output: Path, split: str, number: int, count: int, size: int, seed: int, task: str
) -> SplitFiles:
    json_file, image_root = split_files(output, split, task)
    json_file.parent.mkdir(parents=True, exist_ok=True)
    image_root.mkdir(parents=True, exist_ok=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in range(count):
        picture, described = draw_image(task, size, seed, number, index)
        image_id = index + 1
        file_name = f"{image_id:06d}.png"
        # Level 1: these noisy images hardly get smaller at higher ones, only slower.
        if not cv2.imwrite(str(image_root / file_name), picture, [cv2.IMWRITE_PNG_COMPRESSION, 1]):
            raise DatasetError(
                f"{image_root / file_name}: can't be written; is the disk full or the folder protected?"
            )
        height, width = picture.shape[:2]
        images.append(
            {"id": image_id, "file_name": file_name, "width": width, "height": height, "license": 1}
        )
        for annotation in described:
            annotations.append({"id": len(annotations) + 1, "image_id": image_id, **annotation})
    content = {
        "info": {"description": f"zenith_det synthetic {task}, {split}", "version": str(VERSION)},
        "licenses": [
            {"id": 1, "name": "CC0-1.0", "url": "https://creativecommons.org/publicdomain/zero/1.0/"}
        ],
        "images": images,
        "annotations": annotations,
        "categories": categories(task),
    }
    json_file.write_text(json.dumps(content, separators=(",", ":")), encoding="utf-8")
    return SplitFiles(json_file, image_root, len(images), len(annotations))


def generate(
    output: str | os.PathLike[str],
    *,
    train: int = 1000,
    val: int = 200,
    size: int = 160,
    seed: int = 0,
    task: str = "instances",
) -> dict[str, SplitFiles]:
    """Write a synthetic set: ``annotations/*.json``, ``train/*.png`` and ``val/*.png`` under ``output``.

    A folder that already holds a set made with these settings is left as it is.

    Args:
        output: the folder; made when missing.
        train, val: number of images in each split; 0 leaves the split out.
        size: longer side of the images in pixels, 48 to 4096.
        seed: any non-negative integer; the same settings and seed give the same bytes.
        task: ``instances`` (boxes and masks of six shapes) or ``keypoints`` (figures, COCO's 17 keypoints).

    Returns:
        Per split, its files and counts.

    Raises:
        DatasetError: settings out of range, or ``output`` holds something that this generator didn't write.
    """
    if task not in TASKS:
        raise DatasetError(f"task {task!r} is unknown: choose from {', '.join(TASKS)}")
    if not MIN_SIZE <= size <= MAX_SIZE:
        raise DatasetError(f"size {size} is out of range: choose {MIN_SIZE} to {MAX_SIZE} pixels")
    if train < 0 or val < 0 or train + val == 0:
        raise DatasetError(f"train {train} and val {val}: numbers of images must not be negative, nor both 0")
    if seed < 0:
        raise DatasetError(f"seed {seed} is negative: choose 0 or more")
    output = Path(output)
    settings = {"version": VERSION, "task": task, "train": train, "val": val, "size": size, "seed": seed}
    record = output / SETTINGS_FILE
    try:
        previous = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else None
        if previous is not None and previous.get("settings") == settings:
            splits = previous["splits"]
            return {
                name: SplitFiles(*split_files(output, name, task), counts["images"], counts["annotations"])
                for name, counts in splits.items()
            }
        if previous is None and output.is_dir() and any(output.iterdir()):
            raise DatasetError(
                f"{output} is not empty and wasn't written by this generator: empty it or choose another"
            )
        output.mkdir(parents=True, exist_ok=True)
        # While files are being replaced the record must match neither the old set nor the new one.
        record.write_text(json.dumps({"settings": None}), encoding="utf-8")
        written = {}
        for number, (split, count) in enumerate((("train", train), ("val", val))):
            _, image_root = split_files(output, split, task)
            for stale in image_root.glob("[0-9]*.png"):
                stale.unlink()
            if count:
                written[split] = _write_split(output, split, number, count, size, seed, task)
        counted = {k: {"images": v.num_images, "annotations": v.num_annotations} for k, v in written.items()}
        record.write_text(json.dumps({"settings": settings, "splits": counted}), encoding="utf-8")
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise DatasetError(f"{output}: the synthetic set can't be written: {error}") from error
    return written
