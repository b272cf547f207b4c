"""The sets that a configuration names, checked and filtered."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from zenith_det.config import CfgNode
from zenith_det.data import CocoDataset, filter_empty, filter_few_keypoints
from zenith_det.engines.data_description import DataDescription
from zenith_det.engines.training_set import check_labels, dataset_sources, load_sets
from zenith_det.errors import ConfigError, DatasetError

#: Values of ``DATALOADER.SAMPLER_TRAIN``.
SAMPLERS = ("TrainingSampler", "RepeatFactorTrainingSampler")


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
    what = "objects"
    if cfg.MODEL.KEYPOINT_ON:
        minimum = cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE
        records = filter_few_keypoints(records, minimum)
        what = f"{minimum} labelled keypoints or more"
    if not records:
        raise DatasetError(
            f"{merged.metadata.name}: no image with {what} is left to train on "
            f"({len(merged.records)} images in {merged.metadata.json_file})"
        )
    return replace(merged, records=records)


def repeats(cfg: CfgNode, records: Sequence[Mapping[str, Any]]) -> np.ndarray | None:
    """How often each image comes in an epoch, on average; ``None``: once.

    Under ``RepeatFactorTrainingSampler`` an image comes as often as its rarest class asks for: a class in the share f
    of all images ``max(1, sqrt(t / f))`` times with t = ``DATALOADER.REPEAT_THRESHOLD``, and without the root where
    ``REPEAT_SQRT`` is False (Gupta et al., LVIS, arXiv 1908.03195, appendix B.2).
    """
    if cfg.DATALOADER.SAMPLER_TRAIN != "RepeatFactorTrainingSampler":
        return None
    classes = [{a["category_id"] for a in record["annotations"]} for record in records]
    images = Counter(label for there in classes for label in there)
    threshold, root = cfg.DATALOADER.REPEAT_THRESHOLD, cfg.DATALOADER.REPEAT_SQRT
    share = {label: threshold * len(classes) / count for label, count in images.items()}
    factor = {label: max(1.0, math.sqrt(x) if root else x) for label, x in share.items()}
    return np.array([max((factor[label] for label in there), default=1.0) for there in classes])
