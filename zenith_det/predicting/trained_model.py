"""A trained model, from whatever names it: its configuration, weights, classes, and the engine to run it on."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zenith_det import cli
from zenith_det.config import LoadedConfig, follow_dataset, get_cfg, load_config
from zenith_det.config.keys import leaves
from zenith_det.config.node import pairs
from zenith_det.config.validation import validate_config
from zenith_det.data import DatasetMetadata
from zenith_det.engines.selection import probe_detectron2, select_engine
from zenith_det.errors import CheckpointError, ConfigError
from zenith_det.training.checkpoints import averaging
from zenith_det.training.checkpoints.checkpoint import LAST_FILE
from zenith_det.training.course.remembered import remembered_facts
from zenith_det.training.course.run_record import CONFIG_FILE

logger = logging.getLogger(__name__)

WEIGHTS_SUFFIXES = (".pth", ".pkl")
# What of a checkpoint's configuration says what the model is and does; the rest is about training it.
_OF_THE_MODEL = ("MODEL.", "INPUT.", "TEST.")


@dataclass(frozen=True)
class TrainedModel:
    """What it takes to use a model.

    Attributes:
        loaded: the configuration, ``MODEL.WEIGHTS`` included; its numbers of classes and keypoints are the model's.
        metadata: classes and keypoints.
        engine: "detectron2" or "torchvision".
    """

    loaded: LoadedConfig
    metadata: DatasetMetadata
    engine: str


def find_trained_model(
    source: str | os.PathLike[str],
    weights: str | os.PathLike[str] | None = None,
    *,
    engine: str = "auto",
    device: str = "auto",
    class_names: Sequence[str] | None = None,
    opts: Sequence[Any] = (),
) -> TrainedModel:
    """The model that a run's folder, a config or a checkpoint names.

    Args:
        source: a run's folder: averaged weights go before the trained ones, those of a run that hasn't ended are of its
            newest checkpoint. Or a config, with ``weights`` or those of a run beside it. Or a checkpoint of this
            toolkit alone, which holds its configuration.
        weights: in place of those found.
        engine: "auto": the one that trained the weights, where it can be used here.
        device: as ``MODEL.DEVICE``, whatever the run was trained on.
        class_names: for weights that don't say which classes they are for.
        opts: ``["KEY", value, …]``, over all else.

    Raises:
        ConfigError: no such folder or config, no weights, or a configuration that contradicts the weights.
        CheckpointError: weights that can't be read, or don't say which classes they are for.
    """
    path = Path(source)
    found: Path | None
    if path.suffix in WEIGHTS_SUFFIXES and not path.is_dir():
        loaded, found = _config_of_checkpoint(path), path
    elif path.is_dir():
        found = weights_of_run(path) if weights is None else None
        config = path / CONFIG_FILE
        loaded = (
            load_config(str(config))
            if config.is_file()
            else _config_of_checkpoint(found or Path(weights or ""))
        )
    else:
        loaded = load_config(os.fspath(source))
        # The result of the run that the config is of, not what the run started from.
        found = weights_of_run(path.parent, required=False) if path.is_file() else None
    if weights is not None:
        loaded.override("MODEL.WEIGHTS", os.fspath(weights), "weights")
    elif found is not None:
        loaded.override("MODEL.WEIGHTS", str(found), str(source))
    loaded.override("MODEL.DEVICE", device, "device")
    # Half the bits are for training; evaluation and this are in float32.
    loaded.override("SOLVER.AMP.ENABLED", False, "prediction")
    for key, value in pairs(opts):
        loaded.override(key, value)
    validate_config(loaded.cfg, loaded.sources)
    if not loaded.cfg.MODEL.WEIGHTS:
        raise ConfigError(
            f"MODEL.WEIGHTS is empty: add MODEL.WEIGHTS OUTPUT_DIR/{averaging.result_file(loaded.cfg)} at the end"
        )
    facts = remembered_facts(loaded.cfg.MODEL.WEIGHTS)
    metadata = _classes(loaded, facts, class_names)
    chosen = _engine(engine, facts)
    if chosen == "torchvision" and loaded.cfg.MODEL.RESNETS.NORM == "SyncBN":
        loaded.override("MODEL.RESNETS.NORM", "BN", "prediction")  # the same outside training
    return TrainedModel(loaded, metadata, chosen)


def weights_of_run(folder: Path, *, required: bool = True) -> Path | None:
    """The weights to use of a run.

    Args:
        folder: ``OUTPUT_DIR``.
        required: its newest checkpoint will do where it hasn't ended.

    Raises:
        ConfigError: there are none.
    """
    for name in (averaging.AVERAGED_FILE, averaging.TRAINED_FILE):
        if (folder / name).exists():
            return folder / name
    if not required:
        return None
    # Only read: the run may be going on, and damaged files are its own to set aside.
    marker = folder / LAST_FILE
    name = Path(marker.read_text(encoding="utf-8", errors="replace").strip()).name if marker.is_file() else ""
    if not name or not (folder / name).is_file():
        raise ConfigError(f"{folder}: no model_final.pth there: give the OUTPUT_DIR of a run, or its weights")
    logger.warning("%s holds no %s, the run hasn't ended: taking %s", folder, averaging.TRAINED_FILE, name)
    return folder / name


def _config_of_checkpoint(path: Path) -> LoadedConfig:
    """The configuration that a checkpoint was trained with, what of it is the model's.

    Raises:
        CheckpointError: it holds none.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    saved = remembered_facts(str(path)).get("config")
    if not isinstance(saved, dict):
        beside = path.parent / CONFIG_FILE
        if beside.is_file():
            return load_config(str(beside))
        raise CheckpointError(f"{path}: doesn't say which configuration it was trained with: give that, too")
    loaded = LoadedConfig(get_cfg(), config_file=str(path))
    known = dict(leaves(loaded.cfg))
    for key, value in saved.items():
        # One of a project's own, or of another version of this toolkit: where the model needs it, loading fails.
        if key in known and key.startswith(_OF_THE_MODEL):
            loaded.override(key, value, str(path))
    return loaded


def _classes(
    loaded: LoadedConfig, facts: dict[str, Any], class_names: Sequence[str] | None
) -> DatasetMetadata:
    weights = loaded.cfg.MODEL.WEIGHTS
    metadata = DatasetMetadata.from_dict(facts.get("dataset"))
    if metadata is None and class_names is not None:
        keypoints = loaded.cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS if loaded.cfg.MODEL.KEYPOINT_ON else 0
        metadata = DatasetMetadata.from_dict(
            {
                "name": weights,
                "thing_classes": list(class_names),
                "keypoint_names": [f"keypoint {number}" for number in range(keypoints)],
            }
        )
    if metadata is None:
        raise CheckpointError(
            f"{weights}: doesn't say which classes it was trained on; give a checkpoint that "
            f"{cli.command('train')} or {cli.command('convert-checkpoint')} wrote, or the names "
            "(class_names=[…], --class-names)"
        )
    if class_names is not None and tuple(class_names) != metadata.thing_classes:
        raise ConfigError(
            f"class_names differ from the classes that {weights} says it was trained on: leave them out"
        )
    follow_dataset(loaded, metadata.name, metadata.num_classes, metadata.num_keypoints)
    return metadata


def _engine(asked: str, facts: dict[str, Any]) -> str:
    if asked != "auto":
        return select_engine(asked).name
    # The built-in engine reads the weights of either.
    if facts.get("engine") == "detectron2":
        if (status := probe_detectron2()).usable:
            return "detectron2"
        logger.info("trained with Detectron2, run on the built-in engine: %s", status.problem)
    return select_engine("torchvision").name
