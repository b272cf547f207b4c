"""COCO-format data, engine-free: reading, checking and generating."""

from zenith_det.data.catalog import dataset_names, dataset_source, register_coco_dataset
from zenith_det.data.coco import examine_coco_dataset, load_coco_dataset
from zenith_det.data.dataset import CocoDataset, coco_ground_truth
from zenith_det.data.filters import filter_empty, filter_few_keypoints, known_classes
from zenith_det.data.images import ImageError, read_image
from zenith_det.data.metadata import DatasetMetadata
from zenith_det.data.problems import DatasetReport, Problem
from zenith_det.data.serialized import SerializedList

__all__ = [
    "CocoDataset",
    "DatasetMetadata",
    "DatasetReport",
    "ImageError",
    "Problem",
    "SerializedList",
    "coco_ground_truth",
    "dataset_names",
    "dataset_source",
    "examine_coco_dataset",
    "filter_empty",
    "filter_few_keypoints",
    "known_classes",
    "load_coco_dataset",
    "read_image",
    "register_coco_dataset",
]
