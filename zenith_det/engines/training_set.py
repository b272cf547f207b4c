"""Reading the sets that a configuration names, and what they lack for the run, told before it starts."""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from zenith_det.config import files_of, name_of_files
from zenith_det.data import CocoDataset, DatasetMetadata, load_coco_dataset
from zenith_det.engines.data_description import DataDescription
from zenith_det.errors import ConfigError, DatasetError, MissingDatasetError, listed
from zenith_det.training.processes.distributed import first_on_each_machine, get_local_rank

logger = logging.getLogger(__name__)


def dataset_sources(cfg: Any, kind: str) -> list[Any]:
    """The (name | (json, images)) of ``DATASETS.TRAIN`` (``kind="TRAIN"``) or ``DATASETS.TEST`` (``"TEST"``)."""
    files = files_of(cfg, kind)
    return [files] if files else list(cfg.DATASETS[kind])


def load_sets(
    cfg: Any,
    kind: str,
    sources: Sequence[Any],
    classes: Sequence[str] | None = None,
    description: DataDescription | None = None,
) -> list[CocoDataset]:
    """Read and check COCO-format sets, each one's categories matched by name to ``classes``.

    Args:
        cfg: ``DATASETS`` counts; ``INPUT.VALUE_RANGE`` becomes that of the training set.
        kind: ``"TRAIN"`` or ``"TEST"``: sets to evaluate on may have more classes.
        sources: of that kind, see :func:`dataset_sources`.
        classes: default: the first set's.
        description: is given each set as read.

    Raises:
        DatasetError: see :func:`zenith_det.data.load_coco_dataset`.
    """
    sets: list[CocoDataset] = []
    for source in sources:
        with first_on_each_machine(cfg.DATASETS.CACHE, get_local_rank()):
            dataset = load_coco_dataset(
                source,
                name=source if isinstance(source, str) else name_of_files(cfg, kind),
                strict=cfg.DATASETS.STRICT,
                # Opening every image takes its time: one process of each machine does it for all, unless it may
                # leave out images.
                check_images="header" if get_local_rank() == 0 or cfg.DATASETS.MAX_BAD_IMAGES else "none",
                classes=classes,
                other_classes="refuse" if kind == "TRAIN" else "keep",
                max_bad_images=cfg.DATASETS.MAX_BAD_IMAGES,
                crowds=cfg.DATASETS.CROWDS,
                value_range=cfg.INPUT.VALUE_RANGE,
                cache=cfg.DATASETS.CACHE,
            )
        if kind == "TRAIN" and dataset.records and "value_range" in dataset.records[0]:
            # For what is evaluated, and for whoever uses the model.
            cfg.INPUT.VALUE_RANGE = tuple(dataset.records[0]["value_range"])
        refuse_unusable_keypoints(cfg, dataset.metadata)
        if description is not None:
            description.add(dataset, training=kind == "TRAIN")
        classes = classes or dataset.metadata.thing_classes
        sets.append(dataset)
    return sets


def check_labels(cfg: Any, sets: Mapping[str, Collection[Mapping[str, Any]]]) -> None:
    """Refuse a head that no object of the training sets has a label for: it would train for nothing.

    Where some objects have no mask, the log says how many.

    Sets without any object, or without a declaration of keypoints, are left to other checks.

    Args:
        cfg: ``MODEL.MASK_ON`` and ``MODEL.KEYPOINT_ON`` count.
        sets: annotation file -> records.

    Raises:
        ConfigError: no object has a mask, or none a labelled keypoint.
    """

    def objects() -> Iterator[Mapping[str, Any]]:
        for records in sets.values():
            for record in records:
                yield from (a for a in record["annotations"] if not a["iscrowd"])

    files = ", ".join(sets)
    if cfg.MODEL.MASK_ON:
        masks = Counter(bool(each.get("segmentation")) for each in objects())
        if masks[False] and not masks[True]:
            raise ConfigError(f"MODEL.MASK_ON is True, but no object of {files} has a mask")
        if masks[False]:
            logger.info(
                "%d of %d objects have no mask: they are learned by their boxes alone",
                masks[False],
                masks.total(),
            )
    if cfg.MODEL.KEYPOINT_ON:
        lists = [any(each["keypoints"][2::3]) for each in objects() if "keypoints" in each]
        if lists and not any(lists):
            raise ConfigError(f"MODEL.KEYPOINT_ON is True, but no object of {files} has a labelled keypoint")


@contextlib.contextmanager
def reading_test_sets(cfg: Any) -> Iterator[None]:
    """Around the reading of ``DATASETS.TEST``, of a run that trains on one's own files.

    Such a run may never have asked for the sets that its config file evaluates on.

    Raises:
        DatasetError: a set is not there; the line says how to evaluate on other files, or not at all.
    """
    try:
        yield
    except MissingDatasetError as error:
        if not cfg.DATASETS.TRAIN_JSON or cfg.DATASETS.VAL_JSON:
            raise
        raise DatasetError(
            f"{error}; DATASETS.TEST names it: give --val-json and --val-images, --val-share 0.2, or "
            'DATASETS.TEST "()" to train without evaluation'
        ) from None


def refuse_unusable_keypoints(cfg: Any, metadata: DatasetMetadata) -> None:
    """Stop a keypoint model on a set whose keypoints can't be used; boxes and masks train on it.

    Raises:
        ConfigError: ``MODEL.KEYPOINT_ON`` is true; the line says what is wrong with the keypoints.
    """
    if cfg.MODEL.KEYPOINT_ON and metadata.keypoint_fault:
        raise ConfigError(
            f"MODEL.KEYPOINT_ON is True, but the keypoints of {metadata.json_file} can't be trained: "
            f"{metadata.keypoint_fault}"
        )


def warn_of_sides_in_mirrored_images(cfg: Any, metadata: DatasetMetadata) -> None:
    """Warn where images are mirrored, and a mirror makes of a keypoint or an object what another name stands for.

    Args:
        cfg: ``MODEL.KEYPOINT_ON`` and ``INPUT.RANDOM_FLIP`` count.
        metadata: of the training set.
    """
    if cfg.INPUT.RANDOM_FLIP != "horizontal":
        return
    if metadata.sided_classes:
        logger.warning(
            "%s: classes that say left or right: %s; half of the images are mirrored, and their objects would be "
            "trained under the wrong side's name: set INPUT.RANDOM_FLIP none",
            metadata.name,
            listed(metadata.sided_classes),
        )
    if cfg.MODEL.KEYPOINT_ON and metadata.lacks_flip_pairs and not metadata.unpaired_sides:
        logger.warning(
            "%s: no left and right in the names of its %d keypoints: in the half of the images that are mirrored, "
            "left points would be trained as right ones; give the category flip_pairs (pairs of names, [] if a "
            "mirror swaps none), or set INPUT.RANDOM_FLIP none",
            metadata.name,
            metadata.num_keypoints,
        )
    elif cfg.MODEL.KEYPOINT_ON and metadata.unpaired_sides:
        logger.warning(
            "%s: keypoints of a side that have no partner on the other: %s; in the half of the images that are "
            "mirrored they would be trained under the wrong side's name: give the category flip_pairs (pairs of "
            "names), or set INPUT.RANDOM_FLIP none",
            metadata.name,
            listed(metadata.unpaired_sides),
        )
