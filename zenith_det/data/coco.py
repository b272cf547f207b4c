"""COCO-format annotation files: read, checked, and handed on as Detectron2's standard records.

One pass reads and checks. What can be left out without harm (a box without area, a mask whose runs don't add
up) is dropped and counted; what is merely missing ("info", "area", "iscrowd") is filled in; what would train
or evaluate something else than the user meant (an image that isn't there, a category that isn't declared)
stops. The rule for what is dropped is the same whoever asks, so that all engines see the same objects.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from zenith_det import cli
from zenith_det.data import annotation_cache
from zenith_det.data.annotation_entries import AnnotationReader
from zenith_det.data.annotation_file import parse, read_bytes
from zenith_det.data.catalog import ROOT_VARIABLE, dataset_source, datasets_root, is_builtin
from zenith_det.data.categories import OtherClasses, annotations_by_class, clean_categories, metadata_from
from zenith_det.data.crowds import Crowds
from zenith_det.data.dataset import CocoDataset
from zenith_det.data.formats import name_of_folder
from zenith_det.data.garbage_collection import garbage_collection_off
from zenith_det.data.image_entries import read_images
from zenith_det.data.image_files import ImageCheck
from zenith_det.data.images import max_pixels
from zenith_det.data.problems import NO_KEYPOINTS, Action, DatasetReport
from zenith_det.data.remembered import remember, remembered
from zenith_det.errors import DatasetError, MissingDatasetError

logger = logging.getLogger(__name__)

Source = str | tuple[str | os.PathLike[str], str | os.PathLike[str]]


def _resolve(source: Source, name: str | None) -> tuple[str, str, str]:
    """(name, annotation file, image folder), the paths absolute."""
    if isinstance(source, str):
        json_file, image_root = dataset_source(source)
        name = name or source
    else:
        json_file, image_root = (os.fspath(part) for part in source)
        name = name or Path(json_file).stem
    json_file, image_root = (os.path.abspath(os.path.expanduser(part)) for part in (json_file, image_root))
    hint = ""
    if isinstance(source, str) and is_builtin(source):
        hint = f" ({ROOT_VARIABLE} is {datasets_root()!r}; datasets/README.md shows the layout)"
    if os.path.isdir(json_file):
        raise DatasetError(f"dataset {name}: {json_file} is no annotation file: {name_of_folder(json_file)}")
    if os.path.exists(json_file) and not os.path.isfile(json_file):
        raise DatasetError(f"dataset {name}: annotation file {json_file} is a device or a pipe, not a file")
    if not os.path.isfile(json_file):
        raise MissingDatasetError(f"dataset {name}: annotation file {json_file} does not exist{hint}")
    if os.path.isfile(image_root):
        raise DatasetError(
            f"dataset {name}: {image_root} is a file: give the folder that the images' file_name begin in"
        )
    if not os.path.isdir(image_root):
        raise MissingDatasetError(f"dataset {name}: image folder {image_root} does not exist{hint}")
    return name, json_file, image_root


def examine_coco_dataset(
    source: Source,
    *,
    name: str | None = None,
    check_images: ImageCheck = "header",
    classes: Sequence[str] | None = None,
    other_classes: OtherClasses = "refuse",
    max_bad_images: int = 0,
    crowds: Crowds = "auto",
    value_range: Sequence[float] | None = None,
) -> CocoDataset:
    """As :func:`load_coco_dataset`, but also return a dataset that can't be used; its report says why.

    Raises:
        DatasetError: the annotation file can't be understood at all.
    """
    return _examine(
        source, name, check_images, classes, other_classes, max_bad_images, crowds, value_range, cache=False
    )


def _examine(
    source: Source,
    name: str | None,
    check_images: ImageCheck,
    classes: Sequence[str] | None,
    other_classes: OtherClasses,
    max_bad_images: int,
    crowds: Crowds,
    value_range: Sequence[float] | None,
    *,
    cache: bool,
) -> CocoDataset:
    name, json_file, image_root = _resolve(source, name)
    black_to_white = (float(value_range[0]), float(value_range[1])) if value_range else None
    circumstances = (image_root, max_pixels(), crowds)
    if cache:
        digest = annotation_cache.digest_of_file(json_file)
        if digest is not None:
            entry = annotation_cache.Entry(digest, *circumstances)
            dataset = remembered(
                entry, name, json_file, image_root, classes, other_classes, check_images, black_to_white
            )
            if dataset is not None:
                return dataset
    data = read_bytes(json_file)
    cache = cache and len(data) >= annotation_cache.SMALLEST
    # Of the very bytes that are parsed: the file may have changed just now.
    digest = annotation_cache.digest_of(data) if cache else b""
    content = parse(data, json_file)
    del data
    report = DatasetReport(name)
    categories, aliases = clean_categories(content, json_file, report)
    metadata = metadata_from(
        categories, name, json_file, image_root, classes, other_classes,
        lambda: annotations_by_class(content, categories, aliases), report,
    )  # fmt: skip
    report.num_classes = metadata.num_classes
    entries = content.get("annotations", [])
    with garbage_collection_off():
        images = read_images(
            content["images"], entries, metadata, report, check_images, max_bad_images, black_to_white
        )
        reader = AnnotationReader(
            images.records, images.left_out, metadata, report,
            aliases=aliases, numbered=images.numbered, crowds=crowds,
        )  # fmt: skip
        reader.read(entries)
    if fault := reader.keypoint_fault():
        metadata = replace(metadata, keypoint_fault=fault)
        report.add(NO_KEYPOINTS, "kept", fault)
    records = images.records
    report.num_images = len(records)
    report.num_annotations = sum(len(record["annotations"]) for record in records.values())
    without = [r for r in records.values() if all(a["iscrowd"] for a in r["annotations"])]
    report.num_without_objects = len(without)
    if not records and not report.count("stops"):
        report.add(
            "no images", "stops", "no image is listed" if not content["images"] else "no image is left"
        )
    elif entries and not report.num_annotations and not report.count("stops"):
        first = next((f"; the first: {p}" for p in report.problems if p.action == "dropped"), "")
        report.add(
            "no annotation left",
            "stops",
            f"none of {len(entries)} can be used: {report.kinds('dropped')}{first}",
        )
    dataset = CocoDataset(metadata, list(records.values()), report)
    # With an image left out, its annotations are, too: the outcome is not the annotation file's alone.
    if cache and len(records) == len(content["images"]) and not report.count("stops"):
        remember(annotation_cache.Entry(digest, *circumstances), dataset, categories, images)
    return dataset


def load_coco_dataset(
    source: Source,
    *,
    strict: bool = False,
    check_images: ImageCheck = "header",
    classes: Sequence[str] | None = None,
    other_classes: OtherClasses = "refuse",
    max_bad_images: int = 0,
    crowds: Crowds = "auto",
    value_range: Sequence[float] | None = None,
    name: str | None = None,
    cache: bool = False,
) -> CocoDataset:
    """Read and check a COCO-format dataset.

    Args:
        source: a dataset's name (see :mod:`zenith_det.data.catalog`) or (annotation file, image folder).
        strict: refuse the dataset when anything had to be dropped, or its boxes are suspicious as a whole.
        check_images: ``header`` opens each image and compares its size; ``full`` decodes it as well;
            ``none`` opens only those whose size isn't declared.
        classes: class names of the training set, for any other set: categories are then matched by name and
            ``category_id`` indexes ``classes``. The set may lack some.
        other_classes: what to do with objects of classes that are not among ``classes``: ``refuse`` the set, or
            ``keep`` them, their classes after those of ``classes``. A set with none of ``classes`` is always refused.
            Categories without objects are left out.
        max_bad_images: up to this many missing or unusable images are dropped; one more stops.
        crowds: what ``iscrowd`` 1 means: ``regions`` of many objects, neither trained nor counted in AP, as in COCO;
            ``objects``; or ``auto``: objects where the set, or a class with many, has nothing else and the masks are
            in one piece, as CVAT writes what a brush has painted.
        value_range: the values that are black and white in images of more than 8 bits; without, one that suits the set,
            if it needs one. It is in the records, for :func:`zenith_det.data.read_image`.
        name: for the metadata and messages; default: the source's name or the file's stem.
        cache: reuse what was read from a file of the same content, and keep what is read for the next
            time; see :mod:`zenith_det.data.annotation_cache`. Images are checked each time.

    Raises:
        DatasetError: the set can't be used, or is refused as ``strict`` says.
    """
    dataset = _examine(
        source, name, check_images, classes, other_classes, max_bad_images, crowds, value_range, cache=cache
    )
    report = dataset.report
    refused: tuple[Action, ...] = ("stops", "dropped") if strict else ("stops",)
    for action in refused:
        if report.count(action):
            reason = "can't be used" if action == "stops" else "is refused by the strict check"
            raise DatasetError(
                f"{dataset.metadata.json_file} {reason}: {report.refusal(action, dataset.metadata.image_root)} "
                f"({cli.command('check-dataset')} lists them all)"
            )
    suspicions = report.suspicions()
    if strict and suspicions:
        raise DatasetError(f"{dataset.metadata.json_file} is refused by the strict check: {suspicions[0]}")
    logger.info(report.summary())
    for remark in report.remarks():
        logger.info("%s: %s", report.name, remark)
    for suspicion in suspicions:
        logger.warning("%s: %s", report.name, suspicion)
    if report.count("dropped"):
        logger.warning("Dropped from %s:\n%s", report.name, report.table())
    return dataset
