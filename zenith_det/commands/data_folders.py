"""A folder in place of an annotation file on a command line."""

from __future__ import annotations

import argparse
from pathlib import Path

from zenith_det import cli
from zenith_det.data.converting.folders import find_sets, is_folder_of_sets
from zenith_det.data.converting.found import WHOLE
from zenith_det.errors import DatasetError

#: Where a command writes annotation files that it converted, in its output folder.
CONVERTED = "dataset"


def data_overrides(args: argparse.Namespace, output: str | Path) -> list[tuple[str, str, str]]:
    """The (key, value, flag) of the dataset flags, a folder replaced by the files that are in it.

    A folder given as ``--train-json`` holds the validation set, too, unless ``--val-json`` was given. A dataset
    in another format is converted, into a folder of ``output``. What was found is printed.

    Raises:
        DatasetError: a folder holds no dataset, or not the part that is asked for.
    """
    given = {key: (value, flag) for key, value, flag in cli.data_overrides(args)}
    for part, other in (("TRAIN", ("train", WHOLE)), ("VAL", ("val", "test", WHOLE))):
        key = f"DATASETS.{part}_JSON"
        value, flag = given.get(key, ("", ""))
        if not value or not is_folder_of_sets(value):
            continue
        found = find_sets(value, Path(output) / CONVERTED)
        for note in found.notes:
            print(note, flush=True)
        chosen = next((name for name in other if name in found.sets), None)
        if chosen is None:
            raise DatasetError(f"{flag} {value}: it has {', '.join(found.sets)} and no {other[0]}")
        wanted = {part: chosen}
        if part == "TRAIN" and "DATASETS.VAL_JSON" not in given:
            held_out = next((name for name in ("val", "test") if name in found.sets), None)
            wanted |= {"VAL": held_out} if held_out else {}
        for name, split in wanted.items():
            json_file, images = found.sets[split]
            given[f"DATASETS.{name}_JSON"] = (str(json_file), flag)
            given.setdefault(f"DATASETS.{name}_IMAGES", (str(images), flag))
    return [(key, value, flag) for key, (value, flag) in given.items()]
