"""A dataset given as a folder: its annotation files and images, converted where they are in another format."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from zenith_det.data.converting.convert import FORMATS, convert_folder, find_format
from zenith_det.data.converting.found import IMAGE_SUFFIXES, SPLITS, WHOLE, files_below, split_of
from zenith_det.errors import DatasetError

#: A file of the images and objects of COCO's other tasks.
_OTHER_TASKS = ("captions", "panoptic", "stuff", "image_info")
_BEGINNING = 2**16  # bytes of an annotation file that tell what it is
_TRIED = 20  # images of an annotation file that are looked for
_DEPTH = 3  # folders below the given one that are looked through for annotation files


@dataclass
class FolderSets:
    """The parts of a dataset.

    Attributes:
        sets: "train", "val", "test" or "all" -> annotation file and image folder.
        notes: lines for the user: what was found and converted.
    """

    sets: dict[str, tuple[Path, Path]]
    notes: list[str] = field(default_factory=list)


def is_folder_of_sets(path: str) -> bool:
    """Whether a value in place of an annotation file names a folder, or a folder's ``data.yaml``."""
    return os.path.isdir(path) or (path.endswith((".yaml", ".yml")) and os.path.isfile(path))


def find_sets(path: str, converted: Path) -> FolderSets:
    """The annotation files of a folder: COCO's, as Roboflow, CVAT and COCO itself lay them out, or converted ones.

    Args:
        path: the folder, or the ``data.yaml`` in it.
        converted: where converted annotation files are written to.

    Raises:
        DatasetError: nothing is found, or two files for the same part.
    """
    root = Path(path)
    root = root.parent if root.is_file() else root
    sets = _coco_sets(root)
    if sets:
        found = ", ".join(f"{split} {json_file.relative_to(root)}" for split, (json_file, _) in sets.items())
        return FolderSets(sets, [f"{root}: {found}"])
    form = find_format(root)
    if form is None:
        titles = ", ".join(f.title for f in FORMATS.values())
        raise DatasetError(
            f"{path} is a folder without a COCO annotation file, and not recognised as {titles}: give the "
            "annotation file itself"
        )
    conversion = convert_folder(root, converted, form)
    notes = [f"{root}: {FORMATS[form].title}, converted to {converted}", *conversion.notes]
    notes += [conversion.reports[split].summary() for split in conversion.files]
    return FolderSets({s: (file, conversion.images) for s, file in conversion.files.items()}, notes)


def _coco_sets(root: Path) -> dict[str, tuple[Path, Path]]:
    sets: dict[str, tuple[Path, Path]] = {}
    for json_file in sorted(f for depth in range(_DEPTH) for f in root.glob("*/" * depth + "*.json")):
        if json_file.name.startswith((".", *_OTHER_TASKS)) or not _looks_like_coco(json_file):
            continue
        split = _split(json_file, root)
        if split in sets:
            raise DatasetError(
                f"{root} has two annotation files for {split}, {sets[split][0].relative_to(root)} and "
                f"{json_file.relative_to(root)}: give the one you mean"
            )
        sets[split] = (json_file, _images_of(json_file, split, root))
    return {split: sets[split] for split in ("train", "val", "test", WHOLE) if split in sets}


def _looks_like_coco(path: Path) -> bool:
    with path.open("rb") as file:
        start = file.read(_BEGINNING)
    return start.lstrip().startswith(b"{") and bool(
        re.search(rb'"(images|annotations|categories)"\s*:\s*\[', start)
    )


def _split(json_file: Path, root: Path) -> str:
    """By the folder, else by a word of the file's name: instances_train2017.json."""
    split = split_of(json_file.relative_to(root).parts[:-1])
    words = re.split(r"[\W_]+", json_file.stem.lower())
    return split if split != WHOLE else next((SPLITS[word] for word in words if word in SPLITS), WHOLE)


def _images_of(json_file: Path, split: str, root: Path) -> Path:
    """The folder that most of an annotation file's first images are in."""
    with json_file.open("rb") as file:
        found = re.findall(rb'"file_name"\s*:\s*"([^"\\]+)"', file.read(_BEGINNING))
    names = [name.decode("utf-8", "replace") for name in found[:_TRIED]]
    parts = [folder for folder, of in SPLITS.items() if of == split]
    places = [json_file.parent, json_file.parent / "images", root, root / "images"]
    places += [
        base / part for part in parts for base in (root, root / "images", json_file.parent, root.parent)
    ]
    places += [root / part / "images" for part in parts]

    def hits(place: Path) -> int:
        return sum((place / name).is_file() for name in names)

    best = max(places, key=hits)
    if names and not hits(best):
        # Anywhere else below the folder, as long as one place has them.
        elsewhere = dict.fromkeys(image.parent for image in files_below(root, IMAGE_SUFFIXES))
        best = max((best, *elsewhere), key=hits)
    return best
