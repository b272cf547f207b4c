"""What a checkpoint of this toolkit says beside its tensors: its engine, its configuration, its classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from zenith_det.data import DatasetMetadata
from zenith_det.training.checkpoints.reading import read_facts


def remembered_facts(weights: str) -> dict[str, Any]:
    """All of it; nothing of another file, or of an address.

    Raises:
        CheckpointError: a checkpoint that can't be read.
    """
    path = Path(weights)
    return read_facts(path) if path.suffix == ".pth" and path.is_file() else {}


def remembered_classes(weights: str) -> DatasetMetadata | None:
    """What it says of its training set; ``None`` for any other weights. Raises as :func:`remembered_facts`."""
    return DatasetMetadata.from_dict(remembered_facts(weights).get("dataset"))
