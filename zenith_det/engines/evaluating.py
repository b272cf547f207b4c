"""A trained model on test sets: predictions, COCO metrics, and why an AP is what it is."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zenith_det.config import CfgNode
from zenith_det.config.metric_names import TTA, with_tta
from zenith_det.data import CocoDataset, DatasetMetadata, coco_ground_truth, known_classes
from zenith_det.engines.batches import TestDataset, TrainingDataset, one_by_one
from zenith_det.engines.engine import Detections, Engine, TestSet
from zenith_det.evaluation import (
    RESULTS_FILE,
    EvaluatedWeights,
    detections_to_results,
    evaluate_coco,
    explain_results,
    finite_scalars,
    forget_weights,
    judge,
    log_results,
    note_recommended,
    note_weights,
    write_explanations,
    write_results,
)
from zenith_det.evaluation.recommended import DEFAULT_SCORE
from zenith_det.training.checkpoints import averaging
from zenith_det.training.course.validation_loss import validation_losses, without_augmentation
from zenith_det.training.failures.out_of_memory import telling_of_memory
from zenith_det.training.logs.events import EventStorage
from zenith_det.training.logs.progress import EvaluationProgress
from zenith_det.training.processes.agreement import agreeing
from zenith_det.training.processes.distributed import (
    all_gather_objects,
    get_rank,
    get_world_size,
    is_main_process,
)
from zenith_det.training.processes.loader_wait import WatchedBatches, until_stopped

logger = logging.getLogger(__name__)

#: The category id of a class that a test set lacks.
ABSENT = -1


def tasks_of(cfg: Any) -> tuple[str, ...]:
    """The COCO tasks that the configured model answers."""
    tasks = ["bbox"]
    if cfg.MODEL.MASK_ON:
        tasks.append("segm")
    if cfg.MODEL.KEYPOINT_ON:
        tasks.append("keypoints")
    return tuple(tasks)


def category_ids(dataset: CocoDataset) -> list[int]:
    """The set's own category id of each of the model's classes.

    A class that this set lacks can still be predicted: :data:`ABSENT` makes it a detection without ground truth,
    which COCO leaves out of the mean.
    """
    own = dataset.metadata.contiguous_id_to_thing_dataset_id
    return [own.get(i, ABSENT) for i in range(len(dataset.metadata.thing_classes))]


@torch.no_grad()
def predict(
    engine: Engine,
    cfg: CfgNode,
    model: nn.Module,
    test_set: TestSet,
    should_stop: Callable[[], int] = lambda: 0,
) -> list[dict[str, Any]]:
    """Detections on every image of a checked set in COCO's result format, gathered on all ranks.

    Args:
        model: in evaluation mode.
        test_set: ``TEST.MAX_IMAGES`` limits its images.
        should_stop: asked after each image; anything but 0 breaks off.

    Raises:
        EvaluationStopped: any rank was told to stop; raised on all.
        AgreedError: any rank can't go on (an image that can't be read, a loader worker that died); raised on all.
    """
    assert test_set.dataset is not None
    records = test_set.records(cfg.TEST.MAX_IMAGES)
    own = category_ids(test_set.dataset)
    # As Detectron2 does: evaluation is in float32, whatever SOLVER.AMP says.
    autocast = torch.autocast(cfg.MODEL.DEVICE.split(":")[0], enabled=False)
    results: list[dict[str, Any]] = []
    device = torch.device(cfg.MODEL.DEVICE)
    total = len(range(get_rank(), len(records), get_world_size())) if is_main_process() else 0
    samples = TestDataset(records, engine.test_mapper(cfg, [test_set.name]))
    batches = WatchedBatches(one_by_one(cfg, samples, range(len(records))))
    with EvaluationProgress(total, test_set.label) as progress, autocast, agreeing(should_stop):
        for batch in until_stopped(batches):
            with telling_of_memory("evaluation", batch, device, training=False):
                outputs = [engine.detections(output) for output in model(batch)]
            for sample, found in zip(batch, outputs):
                results += results_of(sample["image_id"], found, own)
            progress.update(len(batch))
            if should_stop():
                break
    if get_world_size() > 1:
        results = [r for part in all_gather_objects(results) for r in part]
        results.sort(key=lambda r: r["image_id"])
    return results


def results_of(image_id: int, found: Detections, own: Sequence[int]) -> list[dict[str, Any]]:
    """The detections in one image, in COCO's result format, less those of a class that the set lacks.

    Args:
        own: see :func:`category_ids`.
    """
    results = detections_to_results(image_id, category_ids=own, **found)
    return [result for result in results if result["category_id"] != ABSENT]


def score_results(
    dataset: CocoDataset,
    results: Sequence[Mapping[str, Any]],
    tasks: Sequence[str],
    image_ids: Collection[int],
    folder: Path | None,
    *,
    oks_sigmas: Sequence[float] | None,
    score_threshold: float | None,
    weights: tuple[int, int] | None = None,
    of: EvaluatedWeights | None = None,
    run: str = "",
    copypaste: bool = True,
) -> OrderedDict[str, dict[str, float]]:
    """Compute and log the COCO metrics of detections, and what explains an AP of 0.

    Args:
        results: on ``image_ids``, in COCO's result format.
        folder: for ``coco_instances_results.json`` and what explains it; ``None``: nothing is written.
        oks_sigmas: default: the set's own.
        score_threshold: the one the model applied.
        weights: (loaded, all) tensors of the model.
        of: which weights the model has, for ``evaluated.json`` beside the detections.
        run, copypaste: see :func:`~zenith_det.evaluation.log_results`.

    Returns:
        task -> metric -> percent.
    """
    if folder is not None:
        forget_weights(folder)
        write_results(results, folder / RESULTS_FILE)
        if of is not None:
            note_weights(folder, of)
    truth = coco_ground_truth(dataset)
    names = zip(dataset.metadata.thing_classes, category_ids(dataset))
    scores = evaluate_coco(
        truth,
        results,
        tasks,
        class_names=[name for name, own in names if own != ABSENT],
        oks_sigmas=oks_sigmas or dataset.metadata.keypoint_oks_sigmas or None,
        image_ids=image_ids,
    )
    explanations = explain_results(
        scores, truth, results, score_threshold=score_threshold, weights=weights, image_ids=image_ids
    )
    if folder is not None:
        write_explanations(folder, explanations)
    log_results(scores, explanations, run, copypaste=copypaste)
    return scores


def evaluate(
    engine: Engine,
    cfg: CfgNode,
    model: nn.Module,
    test_set: TestSet,
    folder: Path,
    weights: tuple[int, int] | None = None,
    should_stop: Callable[[], int] = lambda: 0,
    of: EvaluatedWeights | None = None,
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """:func:`predict`, then :func:`score_results`.

    Args:
        folder, weights, of: see :func:`score_results`.
        should_stop: see :func:`predict`, also for what it raises.

    Returns:
        Scalars such as ``bbox/AP`` (percent; an AP without ground truth is left out), and the results. On
        ranks other than the main one both are empty.
    """
    results = predict(engine, cfg, model, test_set, should_stop)
    if not is_main_process():
        return {}, []
    assert test_set.dataset is not None
    scores = score_results(
        test_set.dataset,
        results,
        tasks_of(cfg),
        {record["image_id"] for record in test_set.records(cfg.TEST.MAX_IMAGES)},
        folder,
        oks_sigmas=list(cfg.TEST.KEYPOINT_OKS_SIGMAS) or None,
        score_threshold=cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST,
        weights=weights,
        of=of,
        run=cfg.OUTPUT_DIR,
    )
    return finite_scalars(scores), results


def validation_loss(
    engine: Engine,
    cfg: CfgNode,
    model: nn.Module,
    test_set: TestSet,
    seed: int,
    should_stop: Callable[[], int] = lambda: 0,
) -> dict[str, float]:
    """The training losses on a test set at the test size, without augmentation, one image at a time.

    See :func:`zenith_det.training.course.validation_loss.validation_losses`.

    Raises:
        EvaluationStopped: any rank was told to stop; raised on all.
    """
    still = without_augmentation(cfg)
    records = test_set.records(cfg.TEST.MAX_IMAGES)
    if test_set.dataset is not None:
        records = known_classes(records, cfg.MODEL.ROI_HEADS.NUM_CLASSES)
    samples = TrainingDataset(records, engine.training_mapper(still, [test_set.name], test_set.metadata))
    batches = WatchedBatches(one_by_one(cfg, samples, [(index, index) for index in range(len(records))]))
    with engine.recording(EventStorage()):  # what the model logs by itself is not training's
        return validation_losses(model, until_stopped(batches), seed=seed, should_stop=should_stop)


class Evaluator:
    """Evaluates the models of a run on its test sets.

    Args:
        test_sets: of the run.
        output_dir: of the run.
        metadata: of what the model was trained on; ``None``: not known.

    Attributes:
        results: of the last evaluation (of averaged weights, where there are any), on the first test set, in
            COCO's format; of the main process. ``None`` before one, and for a set that only the engine knows.
    """

    def __init__(
        self,
        engine: Engine,
        test_sets: Sequence[TestSet],
        output_dir: Path,
        metadata: DatasetMetadata | None = None,
    ) -> None:
        self.engine = engine
        self.metadata = metadata
        self.test_sets = test_sets
        self.output_dir = output_dir
        self.results: list[dict[str, Any]] | None = None
        self._folder = output_dir

    def __call__(
        self,
        cfg: CfgNode,
        model: nn.Module,
        *,
        averaged: bool = False,
        iteration: int | None = None,
        file: str = "",
        seed: int | None = None,
        weights: tuple[int, int] | None = None,
        should_stop: Callable[[], int] = lambda: 0,
    ) -> dict[str, float]:
        """Scalars of all test sets; with several, each set's begin with its name.

        Args:
            model: in evaluation mode, not wrapped by DDP.
            averaged, iteration, file: which weights it has, see :class:`EvaluatedWeights`.
            seed: of the run, for ``TEST.VALIDATION_LOSS``; ``None``: without it.
            weights: see :func:`evaluate`.

        Raises:
            EvaluationStopped: any rank was told to stop; raised on all.
        """
        scalars: dict[str, float] = {}
        for number, one in enumerate(self.test_sets):
            folder = self._folder_of(one, averaged and not file, "inference")
            of = EvaluatedWeights(one.label, averaged, iteration, file)
            found, results = self._evaluate(cfg, model, one, folder, weights, should_stop, of)
            if cfg.TEST.VALIDATION_LOSS and seed is not None:
                found = found | validation_loss(self.engine, cfg, model, one, seed, should_stop)
            scalars |= self._named(one, found)
            if number == 0:
                self.results, self._folder = results, folder
        return scalars

    def with_tta(
        self,
        cfg: CfgNode,
        model: nn.Module,
        *,
        averaged: bool = False,
        should_stop: Callable[[], int] = lambda: 0,
    ) -> dict[str, float]:
        """Scalars (``bbox_TTA/AP``) of all test sets under ``TEST.AUG``; the files go into ``inference_TTA``.

        Args:
            model: in evaluation mode, not wrapped by DDP.
            averaged: it has a run's averaged weights.

        Raises:
            EvaluationStopped: any rank was told to stop; raised on all.
        """
        scalars: dict[str, float] = {}
        for one in self.test_sets:
            logger.info("with test-time augmentation (TEST.AUG):")
            augmented = self.engine.augmented(cfg, model, self.metadata or one.metadata)
            folder = self._folder_of(one, averaged, "inference" + TTA)
            found, _ = self._evaluate(cfg, augmented, one, folder, should_stop=should_stop)
            scalars |= self._named(one, {with_tta(key): value for key, value in found.items()})
        return scalars

    def _evaluate(
        self, cfg: CfgNode, model: nn.Module, one: TestSet, folder: Path, *args: Any, **kwargs: Any
    ) -> tuple[dict[str, float], list[dict[str, Any]] | None]:
        if one.dataset is None:
            return self.engine.evaluate_other(cfg, model, one, folder), None
        return evaluate(self.engine, cfg, model, one, folder, *args, **kwargs)

    def _folder_of(self, one: TestSet, averaged: bool, name: str) -> Path:
        # Weights of a file are evaluated in the run's own folder, averaged ones, too.
        parent = self.output_dir / averaging.FOLDER if averaged else self.output_dir
        return parent / name / one.label if len(self.test_sets) > 1 else parent / name

    def _named(self, one: TestSet, found: dict[str, float]) -> dict[str, float]:
        return (
            {f"{one.label}/{key}": value for key, value in found.items()}
            if len(self.test_sets) > 1
            else found
        )

    def recommend(self, cfg: CfgNode) -> float:
        """Tell, write down and return from which score on the last detections are worth keeping."""
        dataset = self.test_sets[0].dataset if self.results is not None else None
        if dataset is None or self.results is None:
            return DEFAULT_SCORE
        ids = {record["image_id"] for record in self.test_sets[0].records(cfg.TEST.MAX_IMAGES)}
        judgement = judge(coco_ground_truth(dataset), self.results, image_ids=ids)
        best = note_recommended(self._folder, judgement)
        if best is None:
            return DEFAULT_SCORE
        logger.info(
            "scores: F1 is highest, %.3f in the mean of the classes, for detections from %.3g on",
            best.f1,
            best.score,
        )
        return best.score
