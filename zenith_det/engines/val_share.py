"""``DATASETS.VAL_SHARE``: a run without a validation set holds out a part of its training set."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from zenith_det.config import LoadedConfig, files_of, settle_files
from zenith_det.data import dataset_source
from zenith_det.data.splitting import earlier_parts, parts_of, split_file, told
from zenith_det.errors import ConfigError
from zenith_det.training.processes.distributed import first_on_each_machine, get_local_rank, get_world_size

logger = logging.getLogger(__name__)

#: Where the two parts are kept, below OUTPUT_DIR.
FOLDER = "dataset"


def hold_out(
    loaded: LoadedConfig,
    output_dir: str | Path,
    *,
    resume: bool = False,
    say: Callable[[str], None] = logger.info,
) -> None:
    """Split the training set as ``DATASETS.VAL_SHARE`` says, and have the file keys name the parts.

    Of the same file and share, the parts are always the same; a resumed run keeps those that it began with. All
    processes call it together. Of no effect where the key is 0.

    Args:
        loaded: changed in place.
        output_dir: of the run; the parts are written below.
        resume: the run goes on.
        say: told of a new split, in a line.

    Raises:
        ConfigError: there is a validation set already, or several or unknown training sets.
        DatasetError: the file can't be split.
    """
    cfg = loaded.cfg
    share = cfg.DATASETS.VAL_SHARE
    if not share:
        return
    source = loaded.sources.get("DATASETS.VAL_SHARE", "DATASETS.VAL_SHARE")
    files = files_of(cfg, "TRAIN")
    if files_of(cfg, "TEST"):
        raise ConfigError(
            f"{source} {share:g} holds out a part of the training set, and DATASETS.VAL_JSON "
            f"({cfg.DATASETS.VAL_JSON}) is a validation set already: give one of the two"
        )
    if files is None:
        if len(cfg.DATASETS.TRAIN) != 1:
            raise ConfigError(
                f"{source} {share:g} splits one training set: DATASETS.TRAIN names {len(cfg.DATASETS.TRAIN)}"
            )
        files = dataset_source(cfg.DATASETS.TRAIN[0])
    json_file, images = (str(Path(path).expanduser().absolute()) for path in files)
    folder = Path(output_dir).absolute() / FOLDER
    with first_on_each_machine(get_world_size() > 1, get_local_rank()):
        train_file, val_file = parts_of(json_file, share, folder)
        if not (train_file.exists() and val_file.exists()):
            before = earlier_parts(json_file, share, folder) if resume else None
            if before:
                train_file, val_file = before
                logger.warning(
                    "%s has changed since the run began, which keeps the parts of it as it was: %s and %s",
                    json_file, train_file, val_file.name,
                )  # fmt: skip
            else:
                say(told(split_file(json_file, share, train_file, val_file), share, json_file, folder))
    for key, value in (("TRAIN_JSON", train_file), ("VAL_JSON", val_file)):
        loaded.override(f"DATASETS.{key}", str(value), source)
    for key in ("TRAIN_IMAGES", "VAL_IMAGES"):
        loaded.override(f"DATASETS.{key}", images, source)
    cfg.DATASETS.VAL_SHARE = 0.0  # done: the run's config.yaml names the parts
    settle_files(loaded)
