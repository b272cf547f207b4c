"""The sets that a configuration names, checked and filtered."""

from __future__ import annotations

import logging
from dataclasses import replace

from zenith_det.config import CfgNode
from zenith_det.data import CocoDataset, filter_empty, filter_few_keypoints
from zenith_det.engines.data_description import DataDescription
from zenith_det.engines.training_set import check_labels, dataset_sources, load_sets
from zenith_det.errors import ConfigError, DatasetError

logger = logging.getLogger(__name__)


def load_training_set(cfg: CfgNode, description: DataDescription | None = None) -> CocoDataset:
    """The training set, sets named together merged by class name, without the images left out by default.

    Args:
        cfg: the configuration.
        description: is given each set as read.

    Raises:
        ConfigError: no set is named, or no object is labelled for a head of the model.
        DatasetError: a set can't be used, or no image with objects is left.
    """
    sources = dataset_sources(cfg, "TRAIN")
    if not sources:
        raise ConfigError("DATASETS.TRAIN is empty: name a dataset, or give --train-json and --train-images")
    parts = load_sets(cfg, "TRAIN", sources, description=description)
    check_labels(cfg, {part.metadata.json_file: part.records for part in parts})
    merged = replace(parts[0], records=[record for part in parts for record in part.records])
    records = merged.records
    # Each by its own key, as in Detectron2's get_detection_dataset_dicts.
    if cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS:
        records = filter_empty(records)
        if left_out := len(merged.records) - len(records):
            logger.info(
                "%d images without objects left out of training "
                "(DATALOADER.FILTER_EMPTY_ANNOTATIONS False keeps them)",
                left_out,
            )
    what = "objects"
    if cfg.MODEL.KEYPOINT_ON:
        before, minimum = len(records), cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE
        records = filter_few_keypoints(records, minimum)
        what = f"{minimum} labelled keypoints or more"
        if left_out := before - len(records):
            logger.info(
                "%d images without %s left out of training "
                "(MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE 0 keeps them)",
                left_out,
                what,
            )
    if not records:
        raise DatasetError(
            f"{merged.metadata.name}: no image with {what} is left to train on "
            f"({len(merged.records)} images in {merged.metadata.json_file})"
        )
    return replace(merged, records=records)
