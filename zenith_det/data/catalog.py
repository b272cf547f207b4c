"""Dataset names: Detectron2's built-in COCO names, and those that a user registers."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

from zenith_det.errors import DatasetError

#: Where the built-in sets lie: Detectron2's variable, with Detectron2's default.
ROOT_VARIABLE = "DETECTRON2_DATASETS"
DEFAULT_ROOT = "datasets"


def _coco_splits() -> dict[str, tuple[str, str]]:
    """Built-in name -> (annotation file, image folder), below the root."""
    splits = {}
    for prefix, kind in (("coco", "instances"), ("keypoints_coco", "person_keypoints")):
        for year, split, images in (
            ("2014", "train", "train2014"),
            ("2014", "val", "val2014"),
            ("2014", "minival", "val2014"),
            ("2014", "valminusminival", "val2014"),
            ("2017", "train", "train2017"),
            ("2017", "val", "val2017"),
        ):
            json_file = f"coco/annotations/{kind}_{split}{year}.json"
            splits[f"{prefix}_{year}_{split}"] = (json_file, f"coco/{images}")
        splits[f"{prefix}_2017_val_100"] = (f"coco/annotations/{kind}_val2017_100.json", "coco/val2017")
    splits["coco_2017_test"] = ("coco/annotations/image_info_test2017.json", "coco/test2017")
    splits["coco_2017_test-dev"] = ("coco/annotations/image_info_test-dev2017.json", "coco/test2017")
    return splits


#: The sets that ``datasets/make_shapes.py`` makes, with its default folders.
_GENERATED = {
    f"{folder}_{split}": (f"{folder}/annotations/{kind}_{split}.json", f"{folder}/{split}")
    for folder, kind in (("shapes", "instances"), ("figures", "person_keypoints"))
    for split in ("train", "val")
}
# What its other built-in names begin with (detectron2/data/datasets/builtin.py).
_OF_DETECTRON2 = (
    "voc_",
    "lvis_",
    "cityscapes_",
    "ade20k_",
    "coco_2017_train_panoptic",
    "coco_2017_val_panoptic",
)
_BUILTIN = _coco_splits() | _GENERATED
_registered: dict[str, tuple[str, str]] = {}
_found_before: dict[str, tuple[str, str]] = {}


def datasets_root() -> str:
    """The folder of the built-in sets: ``$DETECTRON2_DATASETS``, else ``datasets``."""
    return os.path.expanduser(os.environ.get(ROOT_VARIABLE) or DEFAULT_ROOT)


def dataset_names() -> list[str]:
    """Every known name, registered ones last."""
    return [*_BUILTIN, *_registered]


def is_builtin(name: str) -> bool:
    return name in _BUILTIN


def dataset_source(name: str) -> tuple[str, str]:
    """The annotation file and the image folder of a built-in or registered dataset.

    The files need not exist; ``$DETECTRON2_DATASETS`` is read at each call.

    Raises:
        DatasetError: no dataset has this name, or one that Detectron2 alone reads.
    """
    if name in _registered:
        return _registered[name]
    if name in _BUILTIN:
        json_file, image_root = _BUILTIN[name]
        root = datasets_root()
        if name in _GENERATED and not os.path.exists(os.path.join(root, json_file)):
            root = DEFAULT_ROOT  # where make_shapes.py writes, wherever COCO lies
        source = os.path.join(root, json_file), os.path.join(root, image_root)
        return source if os.path.exists(source[0]) else _found_before.get(name, source)
    if name.startswith(_OF_DETECTRON2):
        raise DatasetError(
            f"dataset {name!r} is one of Detectron2's, which its engine reads (--engine detectron2): here give "
            "--train-json and --train-images, or the name of a COCO set"
        )
    near = difflib.get_close_matches(name, dataset_names(), n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(dataset_names())}"
    raise DatasetError(f"dataset {name!r} is unknown: {hint} (register_coco_dataset adds one)")


def was_found(name: str, json_file: str, image_root: str) -> None:
    """Where a built-in set was when a run started: it is looked for there, too, from another folder say."""
    if name in _BUILTIN and os.path.isfile(json_file):
        _found_before[name] = (json_file, image_root)


def register_coco_dataset(name: str, json_file: str | Path, image_root: str | Path) -> None:
    """Give a COCO-format set a name, for ``DATASETS.TRAIN`` and ``DATASETS.TEST``.

    Registering the same name again with the same files does nothing.

    Raises:
        DatasetError: the name already stands for other files.
    """
    source = (str(json_file), str(image_root))
    if name in _BUILTIN or _registered.get(name, source) != source:
        raise DatasetError(
            f"dataset {name!r} is already registered for {dataset_source(name)[0]}: choose another name"
        )
    _registered[name] = source
