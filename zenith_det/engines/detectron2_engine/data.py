"""Checked COCO-format datasets in Detectron2's catalogs and loaders."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from detectron2.data import (
    DatasetCatalog,
    DatasetMapper,
    MetadataCatalog,
    build_detection_train_loader,
    detection_utils,
    get_detection_dataset_dicts,
)
from detectron2.data import transforms as T
from detectron2.data.samplers import RandomSubsetTrainingSampler, RepeatFactorTrainingSampler
from detectron2.structures import BitMasks, Boxes, Instances, Keypoints, PolygonMasks

from zenith_det.config import LoadedConfig, follow_dataset, name_of_files
from zenith_det.data import (
    CocoDataset,
    DatasetMetadata,
    DatasetReport,
    SerializedList,
    dataset_names,
    dataset_source,
    read_image,
)
from zenith_det.data.pixel_formats import check_format
from zenith_det.engines.augmentation import Augmentations, Labels
from zenith_det.engines.batches import TestDataset, one_by_one
from zenith_det.engines.data_description import DataDescription
from zenith_det.engines.detectron2_engine.foreign_data import (
    check_foreign_dataset,
    check_model_for_coco_format,
)
from zenith_det.engines.detectron2_engine.models import HAS_MASK
from zenith_det.engines.engine import Record, Sample, TrainingSet
from zenith_det.engines.training_set import check_labels, dataset_sources, load_sets
from zenith_det.errors import ConfigError, DatasetError
from zenith_det.training.course.seeding import seeded
from zenith_det.training.processes.loader_wait import WatchedBatches, until_stopped
from zenith_det.training.processes.stopping import stop_code

logger = logging.getLogger(__name__)

# Of the skeleton's lines in Detectron2's pictures.
BONE_COLOR = (255, 195, 77)


@dataclass(frozen=True)
class _Checked:
    """A checked set at rest: the records are unpickled when somebody asks for them."""

    metadata: DatasetMetadata
    records: SerializedList
    report: DatasetReport


_checked: dict[str, _Checked] = {}


def register_checked_dataset(name: str, dataset: CocoDataset) -> None:
    """Make a checked dataset Detectron2's dataset of that name, in place of one registered before.

    Its records and metadata are what Detectron2's own ``load_coco_json`` gives, less what the check dropped.
    Under a built-in name it takes the built-in's place, so that both engines train on the same objects.

    Args:
        name: for ``DATASETS.TRAIN`` and ``DATASETS.TEST``.
        dataset: from :func:`zenith_det.data.load_coco_dataset`.
    """
    source = dataset.metadata
    _checked[name] = _Checked(source, SerializedList(dataset.records), dataset.report)
    if name in DatasetCatalog.list():
        DatasetCatalog.remove(name)
    DatasetCatalog.register(name, lambda: list(_checked[name].records))
    colors = MetadataCatalog.get(name).get("thing_colors")
    MetadataCatalog.remove(name)
    metadata = MetadataCatalog.get(name)
    metadata.set(
        json_file=source.json_file,
        image_root=source.image_root,
        evaluator_type="coco",
        thing_classes=list(source.thing_classes),
        thing_dataset_id_to_contiguous_id=dict(source.thing_dataset_id_to_contiguous_id),
    )
    if colors is not None and len(colors) == source.num_classes:
        metadata.set(thing_colors=colors)
    if source.keypoint_names:
        names = source.keypoint_names
        metadata.set(
            keypoint_names=list(names),
            keypoint_flip_map=list(source.keypoint_flip_map),
            keypoint_connection_rules=[
                (names[a], names[b], BONE_COLOR) for a, b in source.keypoint_connections
            ],
        )


def checked_dataset(name: str) -> CocoDataset | None:
    """The checked dataset that stands behind one of Detectron2's names; ``None`` for any other."""
    found = _checked.get(name)
    return CocoDataset(found.metadata, list(found.records), found.report) if found else None


def register_training_sets(
    loaded: LoadedConfig, description: DataDescription | None = None
) -> DatasetMetadata | None:
    """Check and register what a configuration trains on, and fit the model's heads to it.

    ``DATASETS.TRAIN_JSON``, where given, replaces the names in ``TRAIN``. Names of COCO-format sets that this
    toolkit knows are checked; others (LVIS, Cityscapes, one's own) are left to Detectron2. ``NUM_CLASSES`` and
    ``NUM_KEYPOINTS`` follow the first set.

    Args:
        loaded: its ``cfg`` is changed in place.
        description: is given each checked set as read.

    Returns:
        The metadata of the first set; ``None`` where Detectron2 alone knows the datasets.

    Raises:
        DatasetError: a set cannot be used; see :func:`zenith_det.data.load_coco_dataset`.
        ConfigError: a key contradicts the dataset: both numbers are named; or no object is labelled for a head.
    """
    cfg = loaded.cfg
    first = register_sets(loaded, "TRAIN", None, description)
    if first is not None:
        follow_dataset(loaded, first.name, first.num_classes, first.num_keypoints, first.keypoint_oks_sigmas)
    ours = [_checked[name] for name in cfg.DATASETS.TRAIN if name in _checked]
    for one in ours:
        _fit_masks(loaded, one.metadata.name, one.records)
    if len(ours) == len(cfg.DATASETS.TRAIN):
        check_labels(cfg, {one.metadata.json_file: one.records for one in ours})
    return first


def register_sets(
    loaded: LoadedConfig, kind: str, classes: Sequence[str] | None, description: DataDescription | None = None
) -> DatasetMetadata | None:
    """The same for ``DATASETS.TRAIN`` or ``TEST`` (``kind``), with the model as it is.

    Args:
        classes: the model's where they are known: each set's categories are then matched to them by name.
    """
    sources = dataset_sources(loaded.cfg, kind)
    if not sources and kind == "TRAIN":
        raise ConfigError("DATASETS.TRAIN is empty: name a dataset, or give --train-json and --train-images")
    first: DatasetMetadata | None = None
    for name, source in dict(zip(loaded.cfg.DATASETS[kind], sources)).items():
        if source == name and name not in dataset_names():
            if name not in DatasetCatalog.list():
                dataset_source(name)  # raises, and names the nearest
            if name not in _checked:
                check_foreign_dataset(loaded, name, kind)
            continue
        own_files = source != name
        label = name_of_files(loaded.cfg, kind) if own_files else name
        check_model_for_coco_format(loaded, label, own_files=own_files)
        (dataset,) = load_sets(loaded.cfg, kind, [source], classes, description)
        register_checked_dataset(name, dataset)
        first = first or dataset.metadata
        classes = classes or dataset.metadata.thing_classes
    return first


def _fit_masks(loaded: LoadedConfig, name: str, records: Iterable[Mapping[str, Any]]) -> None:
    """Choose the mask format that a training set's masks can be trained in."""
    if not loaded.cfg.MODEL.MASK_ON:
        return
    objects = [a for record in records for a in record["annotations"] if not a["iscrowd"]]
    runs = sum(isinstance(a.get("segmentation"), dict) for a in objects)
    if not runs or loaded.cfg.INPUT.MASK_FORMAT == "bitmask":
        return
    if "INPUT.MASK_FORMAT" in loaded.sources:
        raise ConfigError(
            f"{loaded.sources['INPUT.MASK_FORMAT']}: INPUT.MASK_FORMAT is 'polygon', but {runs} objects of "
            f"{name} have RLE masks: take 'bitmask'"
        )
    logger.info("%d objects have RLE masks: INPUT.MASK_FORMAT is set to 'bitmask'", runs)
    loaded.override("INPUT.MASK_FORMAT", "bitmask", source=f"RLE masks in {name}")


class AtLeastAPixel(T.Augmentation):
    """A resize whose shorter side is a pixel where Detectron2's would be none, as for an image of 1000x2.

    Args:
        resize: gives the size.
    """

    def __init__(self, resize: T.Augmentation) -> None:
        super().__init__()
        self.resize = resize

    def get_transform(self, image: np.ndarray) -> T.Transform:
        """The resize of one image ``(H, W, 3)``."""
        chosen = self.resize.get_transform(image)
        if not isinstance(chosen, T.ResizeTransform) or min(chosen.new_h, chosen.new_w) > 0:
            return chosen
        return T.ResizeTransform(
            chosen.h, chosen.w, max(chosen.new_h, 1), max(chosen.new_w, 1), chosen.interp
        )


class CocoMapper(DatasetMapper):
    """Detectron2's mapper that reads images as this toolkit does.

    The same pixels for all images that Detectron2 reads well; 16-bit grey images are not clipped to white,
    and an image that cannot be used is named in one line. Detectron2 wants a mask of each object: one without has its
    box in place of it, and ``gt_has_mask`` says so, by which :func:`.models.skip_missing_masks` keeps it from mask
    heads.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_format(self.image_format)
        augmentations: Sequence[T.Augmentation] = self.augmentations.augs  # type: ignore[has-type]
        self.augmentations = T.AugmentationList(
            [AtLeastAPixel(a) if isinstance(a, T.ResizeShortestEdge) else a for a in augmentations]
        )

    def __call__(self, dataset_dict: Mapping[str, Any]) -> dict[str, Any]:
        """A record as the model takes it: ``image`` (see :func:`as_tensor`), ``instances`` when training.

        Raises:
            DatasetError: the image cannot be read, or has not the size that the record says.
        """
        record: dict[str, Any] = copy.deepcopy(dict(dataset_dict))
        image = read_image(record["file_name"], self.image_format, record.get("value_range"))
        if image.shape[:2] != (record["height"], record["width"]):
            raise DatasetError(
                f"{record['file_name']} is {image.shape[1]}x{image.shape[0]}, the annotation file says "
                f"{record['width']}x{record['height']}"
            )
        augmented = T.AugInput(image)
        transforms = self.augmentations(augmented)
        shape = augmented.image.shape[:2]
        record["image"] = as_tensor(augmented.image)
        if self.proposal_topk is not None:
            detection_utils.transform_proposals(record, shape, transforms, proposal_topk=self.proposal_topk)
        if not self.is_train:
            record.pop("annotations", None)
            return record
        if self.use_keypoint:
            # Detectron2 makes one array of all objects' keypoints: an object without any has them unlabelled.
            unlabelled = [0.0] * (3 * len(self.keypoint_hflip_indices))
            for annotation in record["annotations"]:
                annotation.setdefault("keypoints", unlabelled)
        objects = record["annotations"]
        without = [a for a in objects if not a.get("segmentation")] if self.use_instance_mask else []
        if not without:
            self._transform_annotations(record, transforms, shape)
            return record
        parts = []
        for has_mask, some in ((True, [a for a in objects if a.get("segmentation")]), (False, without)):
            if some:
                record["annotations"] = [
                    a if has_mask else a | {"segmentation": _as_polygon(a["bbox"])} for a in some
                ]
                self._transform_annotations(record, transforms, shape)
                instances = record["instances"]
                instances.set(HAS_MASK, torch.full((len(instances),), has_mask))
                parts.append(instances)
        record["instances"] = Instances.cat(parts)
        return record


def as_tensor(pixels: np.ndarray) -> torch.Tensor:
    """Pixels ``(H, W, C)`` as a model's input; YUV in float32, as Detectron2's models fail at its reader's float64."""
    tensor = torch.as_tensor(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
    return tensor.float() if tensor.is_floating_point() else tensor


def _as_polygon(box: Sequence[float]) -> list[list[float]]:
    x, y, width, height = box
    return [[x, y, x + width, y, x + width, y + height, x, y + height]]


class AugmentingMapper:
    """A mapper of training samples, followed by ``INPUT.AUGMENTATIONS``.

    Args:
        mapper: one of Detectron2's.
        cfg: the configuration.
    """

    def __init__(self, mapper: DatasetMapper, cfg: Any) -> None:
        self.mapper = mapper
        flip_indices = mapper.keypoint_hflip_indices if mapper.use_keypoint else ()
        self.augmentations = Augmentations(cfg.INPUT.AUGMENTATIONS, cfg.INPUT.FORMAT, flip_indices)
        if cfg.MODEL.LOAD_PROPOSALS and self.augmentations.moves:
            raise ConfigError("INPUT.AUGMENTATIONS moves objects, which MODEL.LOAD_PROPOSALS doesn't follow")

    def __call__(self, dataset_dict: Mapping[str, Any]) -> dict[str, Any]:
        """The sample; what it draws at random comes from numpy's and torch's generators."""
        sample: dict[str, Any] = self.mapper(dataset_dict)
        if self.augmentations.moves and "sem_seg" in sample:
            raise ConfigError("INPUT.AUGMENTATIONS moves objects, which semantic segmentation doesn't follow")
        objects = sample.get("instances")
        sample["image"], moved = self.augmentations(sample["image"], lambda: _labels(objects))
        if moved is not None and objects is not None:
            sample["instances"] = _moved(objects, moved, tuple(sample["image"].shape[1:]))
        return sample


def _labels(objects: Instances | None) -> Labels:
    """What augmentations move."""
    if objects is None:
        return Labels(torch.zeros(0, 4))
    if not isinstance(objects.gt_boxes, Boxes):
        raise ConfigError("INPUT.AUGMENTATIONS moves objects, which rotated boxes don't follow")
    masks = known = None
    if objects.has("gt_masks"):
        given = objects.gt_masks
        if isinstance(given, PolygonMasks):
            given = BitMasks.from_polygon_masks(given, *objects.image_size)
        masks = given.tensor
        known = objects.get(HAS_MASK) if objects.has(HAS_MASK) else torch.ones(len(masks), dtype=torch.bool)
    keypoints = objects.gt_keypoints.tensor if objects.has("gt_keypoints") else None
    return Labels(objects.gt_boxes.tensor, masks, known, keypoints)


def _moved(objects: Instances, moved: Labels, size: tuple[int, ...]) -> Instances:
    after = Instances(size)
    after.gt_boxes = Boxes(moved.boxes)
    for name, value in objects[moved.kept].get_fields().items():
        if name == "gt_masks":
            value = BitMasks(moved.masks)
        elif name == "gt_keypoints":
            value = Keypoints(moved.keypoints)
        if name != "gt_boxes":
            after.set(name, value)
    return after


def mapper_for(
    cfg: Any, names: Sequence[str], is_train: bool
) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """:class:`CocoMapper` where all of ``names`` are checked sets, else Detectron2's own mapper."""
    kind = CocoMapper if all(name in _checked for name in names) else DatasetMapper
    mapper = kind(cfg, is_train)
    if kind is DatasetMapper and cfg.INPUT.FORMAT == "YUV-BT.601":
        return InFloat32(mapper)
    return AugmentingMapper(mapper, cfg) if is_train and cfg.INPUT.AUGMENTATIONS else mapper


class InFloat32:
    """A mapper whose images, of floats, are in float32; see :func:`as_tensor`."""

    def __init__(self, mapper: DatasetMapper) -> None:
        self._mapper = mapper

    def __call__(self, dataset_dict: Mapping[str, Any]) -> dict[str, Any]:
        sample: dict[str, Any] = self._mapper(dataset_dict)
        return sample | {"image": sample["image"].float()}


class SeededMapper:
    """One of Detectron2's mappers, whatever it draws a function of the generator."""

    def __init__(self, mapper: Callable[[Record], Sample]) -> None:
        self._mapper = mapper

    def __call__(self, record: Record, rng: np.random.Generator) -> Sample:
        with seeded(int(rng.integers(2**63))):
            return self._mapper(record)


def training_set_of(cfg: Any, metadata: DatasetMetadata | None) -> TrainingSet:
    """What Detectron2 reads and leaves of ``DATASETS.TRAIN``, and how its sampler would take it.

    Args:
        cfg: Detectron2's configuration.
        metadata: of the sets, where this toolkit knows them.

    Raises:
        DatasetError: no image is left.
    """
    try:
        # The mapper is not used: without one it would make one of Detectron2's.
        parts = build_detection_train_loader.from_config(cfg, mapper=lambda record: record)
    except AssertionError as error:  # for a set without images or one that it left all of out
        keypoints = cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE if cfg.MODEL.KEYPOINT_ON else 0
        what = f"objects with {keypoints} keypoints or more" if keypoints else "objects"
        raise DatasetError(
            f"{', '.join(cfg.DATASETS.TRAIN)}: no image with {what} is left to train on ({error})"
        ) from error
    records, sampler = parts["dataset"], parts["sampler"]
    repeats, subset = None, 0
    if isinstance(sampler, RepeatFactorTrainingSampler):
        repeats = (sampler._int_part + sampler._frac_part).numpy()
    elif isinstance(sampler, RandomSubsetTrainingSampler):
        subset = sampler._size_subset
    kept = SerializedList(records) if isinstance(records, list) else records
    return TrainingSet(tuple(cfg.DATASETS.TRAIN), kept, metadata, repeats, subset)


class _Stoppable:
    """A loader that ends early when the run has to; its evaluator then gives no figures."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        for batch in until_stopped(WatchedBatches(self._loader)):
            yield batch
            if stop_code():
                return


def build_test_loader(cfg: Any, name: str) -> Any:
    """The first ``TEST.MAX_IMAGES`` images (0: all) of one of Detectron2's sets, a batch each."""
    proposals = None
    if cfg.MODEL.LOAD_PROPOSALS:
        proposals = [cfg.DATASETS.PROPOSAL_FILES_TEST[list(cfg.DATASETS.TEST).index(name)]]
    records = get_detection_dataset_dicts([name], filter_empty=False, proposal_files=proposals)
    images = TestDataset(
        records[: cfg.TEST.MAX_IMAGES or len(records)], mapper_for(cfg, [name], is_train=False)
    )
    return _Stoppable(one_by_one(cfg, images, range(len(images))))
