"""What a run's folder still knows of its data: the images it was evaluated on, and what it found there."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from zenith_det.config import files_of, load_config, name_of_files
from zenith_det.data import CocoDataset, coco_ground_truth, load_coco_dataset
from zenith_det.data.crowds import Crowds
from zenith_det.data.statistics import find_sets_again
from zenith_det.errors import UserError
from zenith_det.evaluation import (
    RESULTS_FILE,
    EvaluatedWeights,
    Judgement,
    RecommendedScore,
    judge,
    note_recommended,
    noted_recommended,
    noted_weights,
)
from zenith_det.training.checkpoints import averaging
from zenith_det.training.course.run_record import CONFIG_FILE


@dataclass(frozen=True)
class Evaluated:
    """The last evaluation of a run, or what an evaluation since has put in its place.

    Attributes:
        dataset: the set.
        records: those of its images that were evaluated on.
        by_image: detections in COCO's result format by image id, only of those images.
        averaged: the detections are those of the run's averaged weights.
        weights: what the detections are of; ``None`` where that was not written down.
        folder: that the detections are in.
    """

    dataset: CocoDataset
    records: list[dict[str, Any]]
    by_image: Mapping[int, list[dict[str, Any]]]
    averaged: bool = False
    weights: EvaluatedWeights | None = None
    folder: Path = Path()

    @property
    def ground_truth(self) -> dict[str, Any]:
        """The set as the content of a COCO file."""
        return coco_ground_truth(self.dataset)

    @property
    def results(self) -> list[dict[str, Any]]:
        """All detections."""
        return [result for results in self.by_image.values() for result in results]

    def judge(self) -> Judgement:
        """What the detections' scores are worth."""
        return judge(self.ground_truth, self.results, image_ids=set(self.by_image))

    @property
    def of(self) -> str:
        """``"averaged weights, iteration 89999"``, as far as it is known."""
        return str(self.weights or ("averaged weights" if self.averaged else "trained weights"))

    def name_of(self, record: Mapping[str, Any]) -> str:
        """An image's path below the set's folder: a base name may be that of several."""
        root = self.dataset.metadata.image_root
        return os.path.relpath(record["file_name"], root) if root else str(record["file_name"])


def run_config(folder: Path) -> Any:
    """A run's ``config.yaml``.

    Raises:
        UserError: it isn't there or can't be read.
    """
    return load_config(str(folder / CONFIG_FILE)).cfg


def read_evaluated(folder: Path, *, averaged: bool | None = False) -> Evaluated:
    """The set that a run was last evaluated on, the first of several, and its detections.

    Args:
        folder: the run's OUTPUT_DIR.
        averaged: the detections of its averaged weights, in place of those of the last; ``None``: where
            the run has them.

    Raises:
        UserError: the config, the set or the detections are no longer there, or can't be read; or the
            detections are on another set.
    """
    cfg = run_config(folder)
    find_sets_again(folder)
    source, name = _test_set(folder, cfg)
    path, averaged = _detections_of(folder, cfg, name, averaged)
    results = read_detections(path)
    dataset = _load(
        source, name, cfg.DATASETS.MAX_BAD_IMAGES, cfg.DATASETS.CROWDS, tuple(cfg.INPUT.VALUE_RANGE)
    )
    weights = noted_weights(path.parent)
    # Without the training set's file to tell it from, a set has its own file's name.
    if weights is not None and weights.dataset not in (name, Path(dataset.metadata.json_file).stem):
        raise UserError(
            f"{path}: the detections are on {weights.dataset}, not on the run's {dataset.metadata.name}: evaluate "
            "on that again"
        )
    records = dataset.records[: cfg.TEST.MAX_IMAGES or len(dataset.records)]
    by_image: dict[int, list[dict[str, Any]]] = {record["image_id"]: [] for record in records}
    known = dataset.metadata.thing_dataset_id_to_contiguous_id
    for result in results:
        if result["image_id"] in by_image and result["category_id"] in known:
            by_image[result["image_id"]].append(result)
    return Evaluated(dataset, records, by_image, averaged, weights, path.parent)


def recommended_score(folder: Path) -> RecommendedScore | None:
    """The score that a run's last evaluation recommends to keep detections from, of averaged weights where there are.

    It is the one of the highest F1; see :attr:`~zenith_det.evaluation.Judgement.recommended_score`. A run writes it
    down when it ends; for one that didn't, it is computed from the detections and the set, and then written down.

    Args:
        folder: the run's OUTPUT_DIR.

    Returns:
        ``None`` where the detections find nothing.

    Raises:
        UserError: the config isn't there, or neither the note nor all that it is computed from.
    """
    cfg = run_config(folder)
    path, _ = _detections_of(folder, cfg, _test_set(folder, cfg)[1], None)
    if noted := noted_recommended(path.parent):
        return noted
    evaluated = read_evaluated(folder, averaged=None)
    return note_recommended(evaluated.folder, evaluated.judge())


def _test_set(folder: Path, cfg: Any) -> tuple[Any, str]:
    """Where the first set that a run is evaluated on comes from, and its name."""
    source = files_of(cfg, "TEST")
    if source is not None:
        return source, name_of_files(cfg, "TEST")
    if not cfg.DATASETS.TEST:
        raise UserError(f"{folder}: its config names no set to evaluate on")
    return cfg.DATASETS.TEST[0], cfg.DATASETS.TEST[0]


def _detections_of(folder: Path, cfg: Any, name: str, averaged: bool | None) -> tuple[Path, bool]:
    """The file of a run's detections, and whether they are of averaged weights (asked for, or ``None``)."""
    several = name if not cfg.DATASETS.VAL_JSON and len(cfg.DATASETS.TEST) > 1 else ""
    if averaged is None:
        averaged = (
            bool(cfg.SOLVER.AVERAGE.KIND) and _results_file(folder / averaging.FOLDER, several).exists()
        )
    return _results_file(folder / averaging.FOLDER if averaged else folder, several), averaged


def _results_file(below: Path, name: str) -> Path:
    """The detections in a folder, on the set of that name where there are several, else ""."""
    path = below / name / "inference" / RESULTS_FILE
    # With several, the built-in engine's folder, or else Detectron2's.
    other = below / "inference" / Path(name).stem / RESULTS_FILE
    return other if other.exists() and not path.exists() else path


@lru_cache(maxsize=1)  # the runs of a comparison share theirs
def _load(
    source: Any, name: str, max_bad_images: int, crowds: Crowds, value_range: tuple[float, ...]
) -> CocoDataset:
    return load_coco_dataset(
        source, name=name, max_bad_images=max_bad_images, crowds=crowds, value_range=value_range
    )


def read_detections(path: Path) -> list[dict[str, Any]]:
    """Detections in COCO's result format.

    Raises:
        UserError: no such file, or something else in it.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: the detections can't be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON; is it cut off?") from error
    if not isinstance(content, list):
        raise UserError(f"{path}: a list of detections is expected")
    good = [entry for entry in content if _is_detection(entry)]
    if len(good) < len(content):
        raise UserError(f"{path}: {len(content) - len(good)} entries are no detections")
    return good


def _is_detection(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and {"image_id", "category_id", "bbox", "score"} <= entry.keys()
        and isinstance(entry["bbox"], list)
        and len(entry["bbox"]) == 4
        and all(isinstance(number, (int, float)) for number in [*entry["bbox"], entry["score"]])
    )
