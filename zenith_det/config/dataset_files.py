"""Sets given by their files: paths that hold from anywhere, and names that tell the sets apart."""

from __future__ import annotations

import os
from itertools import zip_longest
from pathlib import Path
from typing import Any

from zenith_det.config.loading import LoadedConfig
from zenith_det.errors import ConfigError

#: DATASETS key of names -> what the keys of files that replace it begin with.
_KINDS = {"TRAIN": "TRAIN", "TEST": "VAL"}


def settle_files(loaded: LoadedConfig) -> None:
    """Make the paths of files and ``OUTPUT_DIR`` absolute, and have ``DATASETS.TRAIN`` and ``TEST`` name what is used.

    So a run's ``config.yaml`` says what it was trained on, and works from any folder. Again is of no effect.

    Args:
        loaded: changed in place; the sources of keys stay.

    Raises:
        ConfigError: an annotation file without its image folder, or the other way round.
    """
    cfg = loaded.cfg
    for kind, prefix in _KINDS.items():
        files = files_of(cfg, kind)
        if files:
            json_file, images = map(absolute, files)
            cfg.DATASETS[f"{prefix}_JSON"], cfg.DATASETS[f"{prefix}_IMAGES"] = json_file, images
            name, training = json_file, (cfg.DATASETS.TRAIN_JSON, cfg.DATASETS.TRAIN_IMAGES)
            if json_file == training[0] and images != training[1]:
                name += f" ({images})"  # Detectron2 knows a set by its name, and this is another
            loaded.override(f"DATASETS.{kind}", (name,), f"DATASETS.{prefix}_JSON")
    if cfg.OUTPUT_DIR.strip():  # none at all is not the current folder
        cfg.OUTPUT_DIR = absolute(cfg.OUTPUT_DIR)
    # A name in a model zoo, a URL and "" are no files.
    if os.path.isfile(os.path.expanduser(cfg.MODEL.WEIGHTS)):
        cfg.MODEL.WEIGHTS = absolute(cfg.MODEL.WEIGHTS)


def absolute(path: str) -> str:
    """A path that holds from any folder."""
    return os.path.abspath(os.path.expanduser(path))


def files_of(cfg: Any, kind: str) -> tuple[str, str] | None:
    """The annotation file and the image folder that replace ``DATASETS.TRAIN`` or ``DATASETS.TEST``.

    Args:
        cfg: a configuration.
        kind: ``"TRAIN"`` or ``"TEST"``.

    Raises:
        ConfigError: one without the other.
    """
    prefix = _KINDS[kind]
    json_file, images = cfg.DATASETS[f"{prefix}_JSON"], cfg.DATASETS[f"{prefix}_IMAGES"]
    if bool(json_file) != bool(images):
        missing = f"--{prefix.lower()}-{'images' if json_file else 'json'}"
        raise ConfigError(
            f"DATASETS.{prefix}_JSON and DATASETS.{prefix}_IMAGES go together: give {missing} too"
        )
    return (json_file, images) if json_file else None


def name_of_files(cfg: Any, kind: str) -> str:
    """A name for the set of :func:`files_of`: the file's, or where both sets' files have the same, a folder's.

    Of a file that is given twice, that of the images. Exporters call each set's file alike
    (``train/_annotations.coco.json``, ``valid/_annotations.coco.json``).
    """
    both = [_KINDS[kind], _KINDS["TEST" if kind == "TRAIN" else "TRAIN"]]
    own, other = (cfg.DATASETS[f"{prefix}_JSON"] for prefix in both)
    stem = Path(own).stem
    if not other or Path(other).stem != stem:
        return stem
    own, other = map(absolute, (own, other))
    if own == other:  # of the same file, with other images
        own, other = (f"{absolute(cfg.DATASETS[f'{prefix}_IMAGES'])}/{Path(own).name}" for prefix in both)
    folders = zip_longest(Path(own).parts[-2::-1], Path(other).parts[-2::-1])
    return next((a for a, b in folders if a != b and a), stem)
