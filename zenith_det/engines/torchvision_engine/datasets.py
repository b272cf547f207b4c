"""The sets that a configuration names, checked and filtered."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from zenith_det.config import CfgNode, files_of, name_of_files
from zenith_det.data import CocoDataset, filter_empty, filter_few_keypoints, load_coco_dataset
from zenith_det.engines.data_description import DataDescription
from zenith_det.engines.training_set import check_labels, refuse_unusable_keypoints
from zenith_det.errors import ConfigError, DatasetError
from zenith_det.training.distributed import first_on_each_machine, get_local_rank

logger = logging.getLogger(__name__)


def dataset_sources(cfg: CfgNode, kind: str) -> list[Any]:
    """The (name | (json, images)) of ``DATASETS.TRAIN`` (``kind="TRAIN"``) or ``DATASETS.TEST`` (``"TEST"``)."""
    files = files_of(cfg, kind)
    return [files] if files else list(cfg.DATASETS[kind])


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
    first = _load(cfg, "TRAIN", sources[0], None, description)
    classes = first.metadata.thing_classes
    parts = [first, *(_load(cfg, "TRAIN", source, classes, description) for source in sources[1:])]
    check_labels(cfg, {part.metadata.json_file: part.records for part in parts})
    merged = replace(first, records=[record for part in parts for record in part.records])
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


def load_test_sets(
    cfg: CfgNode, classes: Sequence[str] | None, description: DataDescription | None = None
) -> list[CocoDataset]:
    """The sets to evaluate on, their categories matched by name to ``classes``; each given to ``description``."""
    return [_load(cfg, "TEST", source, classes, description) for source in dataset_sources(cfg, "TEST")]


def _load(
    cfg: CfgNode, kind: str, source: Any, classes: Sequence[str] | None, description: DataDescription | None
) -> CocoDataset:
    with first_on_each_machine(cfg.DATASETS.CACHE, get_local_rank()):
        dataset = load_coco_dataset(
            source,
            name=source if isinstance(source, str) else name_of_files(cfg, kind),
            strict=cfg.DATASETS.STRICT,
            classes=classes,
            other_classes="refuse" if kind == "TRAIN" else "keep",
            max_bad_images=cfg.DATASETS.MAX_BAD_IMAGES,
            cache=cfg.DATASETS.CACHE,
        )
    refuse_unusable_keypoints(cfg, dataset.metadata)
    if description is not None:
        description.add(dataset, training=kind == "TRAIN")
    return dataset
