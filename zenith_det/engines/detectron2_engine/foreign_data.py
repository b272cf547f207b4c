"""Datasets that Detectron2 reads by itself (VOC, LVIS, Cityscapes, panoptic, one's own): can they be read here?"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator

from detectron2.data import MetadataCatalog

from zenith_det.config import LoadedConfig
from zenith_det.data.catalog import ROOT_VARIABLE, datasets_root
from zenith_det.errors import ConfigError, DatasetError

# What Detectron2's registering functions give as metadata, of files and folders.
_PATH_KEYS = (
    "json_file", "image_root", "dirname", "image_dir", "gt_dir", "panoptic_root", "panoptic_json", "sem_seg_root",
)  # fmt: skip
# Evaluator types of Detectron2 -> the module that reading or evaluating such a set imports, and how to get it.
_LIBRARIES = {
    "lvis": ("lvis", "lvis"),
    "cityscapes_instance": ("cityscapesscripts", "cityscapesscripts"),
    "cityscapes_sem_seg": ("cityscapesscripts", "cityscapesscripts"),
    "cityscapes_panoptic_seg": ("cityscapesscripts", "cityscapesscripts"),
    "coco_panoptic_seg": ("panopticapi", "git+https://github.com/cocodataset/panopticapi.git"),
}
_INSTEAD = {
    "TRAIN": "; or give --train-json and --train-images for a set of your own",
    "TEST": "; or give --val-json and --val-images for a set of your own, or "
    'DATASETS.TEST "()" to train without evaluation',
}
# Models that learn from labels which no COCO instance file holds.
_SEMANTIC_MODELS = ("PanopticFPN", "SemanticSegmentor")


def check_foreign_dataset(loaded: LoadedConfig, name: str, part: str) -> None:
    """Refuse a set of Detectron2's whose files, or whose library, aren't there: before anything is trained.

    Args:
        loaded: says where the name is from.
        name: registered in Detectron2's catalog.
        part: "TRAIN" or "TEST".

    Raises:
        DatasetError: which file or library, and what to do.
    """
    metadata = MetadataCatalog.get(name)
    where = _where(loaded, part)
    instead = _INSTEAD[part]
    if loaded.cfg.MODEL.META_ARCHITECTURE in _SEMANTIC_MODELS:
        instead = ""  # which no set of one's own trains, see below
    for key in _PATH_KEYS:
        path = metadata.get(key)
        if isinstance(path, (str, os.PathLike)) and not os.path.exists(path):
            raise DatasetError(
                f"dataset {name} ({where}): {path} isn't there; {ROOT_VARIABLE} is the folder of datasets (now "
                f"{datasets_root()}){instead}"
            )
    module, package = _LIBRARIES.get(metadata.get("evaluator_type"), ("", ""))
    if module and importlib.util.find_spec(module) is None:
        raise DatasetError(
            f"dataset {name} ({where}) needs the package {module}: pip install {package}{instead}"
        )


@contextlib.contextmanager
def reading_foreign_datasets(loaded: LoadedConfig) -> Iterator[None]:
    """Around Detectron2's own reading of ``DATASETS.TRAIN``.

    Raises:
        DatasetError: a file of a set, or a library, is missing.
    """
    try:
        yield
    except (OSError, ImportError) as error:
        names = ", ".join(loaded.cfg.DATASETS.TRAIN)
        raise DatasetError(f"{names} ({_where(loaded, 'TRAIN')}) can't be read: {error}") from error


def check_model_for_coco_format(loaded: LoadedConfig, name: str, *, own_files: bool) -> None:
    """Refuse a model that a set in COCO's instance format can't train.

    Args:
        loaded: says where the keys are from.
        name: of the set.
        own_files: the set is of files, not one of Detectron2's names.

    Raises:
        ConfigError: which key says so, and what to take instead.
    """
    model = loaded.cfg.MODEL
    if model.META_ARCHITECTURE in _SEMANTIC_MODELS:
        key = "MODEL.META_ARCHITECTURE"
        raise ConfigError(
            f"{key} is {model.META_ARCHITECTURE} ({loaded.sources.get(key, 'its default')}), which learns semantic "
            f"segmentation, and {name} has no labels for it: take a config of an R-CNN, such as "
            "mask_rcnn_zenith.yaml, or a dataset in Detectron2's panoptic or semantic format"
        )
    if model.LOAD_PROPOSALS and own_files:
        key = "MODEL.LOAD_PROPOSALS"
        raise ConfigError(
            f"{key} is True ({loaded.sources.get(key, 'its default')}): the proposals are files of Detectron2's "
            f"COCO sets, and {name} has none: give {key} False MODEL.PROPOSAL_GENERATOR.NAME RPN at the end, or "
            "another config"
        )


def _where(loaded: LoadedConfig, part: str) -> str:
    key = f"DATASETS.{part}"
    return f"{key}, {loaded.sources[key]}" if key in loaded.sources else key
