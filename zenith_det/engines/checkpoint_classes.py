"""The classes that a checkpoint was trained on."""

from __future__ import annotations

from pathlib import Path

from zenith_det import cli
from zenith_det.config import LoadedConfig, follow_dataset
from zenith_det.data import DatasetMetadata
from zenith_det.errors import CheckpointError, ConfigError
from zenith_det.training.checkpoints.averaging import result_file
from zenith_det.training.checkpoints.reading import load_checkpoint


def remembered_classes(weights: str) -> DatasetMetadata | None:
    """What a checkpoint of this toolkit remembers of its training set; ``None`` for any other weights."""
    path = Path(weights)
    if path.suffix != ".pth" or not path.is_file():
        return None
    return DatasetMetadata.from_dict(load_checkpoint(path).get("dataset"))


def classes_to_predict(loaded: LoadedConfig) -> DatasetMetadata:
    """The classes that ``MODEL.WEIGHTS`` predicts; the configuration's numbers are set to them.

    Raises:
        ConfigError: no weights.
        CheckpointError: weights that don't say which classes they are for.
    """
    weights = loaded.cfg.MODEL.WEIGHTS
    if not weights:
        raise ConfigError(
            f"MODEL.WEIGHTS is empty: add MODEL.WEIGHTS OUTPUT_DIR/{result_file(loaded.cfg)} at the end"
        )
    metadata = remembered_classes(weights)
    if metadata is None:
        raise CheckpointError(
            f"{weights}: doesn't say which classes it was trained on; give a checkpoint that "
            f"{cli.command('train')} or {cli.command('convert-checkpoint')} wrote"
        )
    follow_dataset(loaded, metadata.name, metadata.num_classes, metadata.num_keypoints)
    return metadata
