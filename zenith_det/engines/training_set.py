"""What a training set lacks for what it is to train, told before the training starts."""

from __future__ import annotations

import logging
from typing import Any

from zenith_det.data import DatasetMetadata

logger = logging.getLogger(__name__)


def warn_of_missing_flip_pairs(cfg: Any, metadata: DatasetMetadata) -> None:
    """Warn where images are mirrored and the keypoints' names tell no sides that would change places.

    Args:
        cfg: ``MODEL.KEYPOINT_ON`` and ``INPUT.RANDOM_FLIP`` count.
        metadata: of the training set.
    """
    if cfg.MODEL.KEYPOINT_ON and cfg.INPUT.RANDOM_FLIP == "horizontal" and metadata.lacks_flip_pairs:
        logger.warning(
            "%s: no left and right in the names of its %d keypoints: in the half of the images that are mirrored, "
            "left points would be trained as right ones; give the category flip_pairs (pairs of names, [] if a "
            "mirror swaps none), or set INPUT.RANDOM_FLIP none",
            metadata.name,
            metadata.num_keypoints,
        )
