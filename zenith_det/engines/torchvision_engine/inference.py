"""A trained model on a dataset: predictions, COCO metrics, and why an AP is what it is."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zenith_det.config import CfgNode
from zenith_det.data import CocoDataset, coco_ground_truth, known_classes
from zenith_det.engines.torchvision_engine.input_pipeline import TrainingMapper
from zenith_det.engines.torchvision_engine.loaders import build_loss_loader, build_test_loader
from zenith_det.evaluation import (
    RESULTS_FILE,
    EvaluatedWeights,
    detections_to_results,
    evaluate_coco,
    explain_results,
    finite_scalars,
    forget_weights,
    log_results,
    note_weights,
    write_explanations,
    write_results,
)
from zenith_det.training.distributed import (
    agree_on_maximum,
    all_gather_objects,
    get_rank,
    get_world_size,
    is_main_process,
)
from zenith_det.training.progress import EvaluationProgress
from zenith_det.training.stopping import EvaluationStopped
from zenith_det.training.validation_loss import validation_losses, without_augmentation
from zenith_det.training.worker_signals import starting_workers

logger = logging.getLogger(__name__)


def tasks_of(cfg: CfgNode) -> tuple[str, ...]:
    """The COCO tasks that the configured model answers."""
    tasks = ["bbox"]
    if cfg.MODEL.MASK_ON:
        tasks.append("segm")
    if cfg.MODEL.KEYPOINT_ON:
        tasks.append("keypoints")
    return tuple(tasks)


@torch.no_grad()
def predict(
    cfg: CfgNode,
    model: nn.Module,
    dataset: CocoDataset,
    class_to_category: Sequence[int],
    should_stop: Callable[[], int] = lambda: 0,
) -> list[dict[str, Any]]:
    """Detections on every image of ``dataset`` in COCO's result format, gathered on all ranks.

    Args:
        cfg: the configuration.
        model: in evaluation mode.
        dataset: its records are read; ``TEST.MAX_IMAGES`` limits them.
        class_to_category: the set's original category id of each of the model's classes.
        should_stop: asked after each image; anything but 0 breaks off.

    Raises:
        EvaluationStopped: any rank was told to stop; raised on all.
    """
    records = dataset.records[: cfg.TEST.MAX_IMAGES or len(dataset.records)]
    loader = build_test_loader(cfg, records, rank=get_rank(), world_size=get_world_size())
    # As Detectron2 does: evaluation is in float32, whatever SOLVER.AMP says.
    autocast = torch.autocast(cfg.MODEL.DEVICE.split(":")[0], enabled=False)
    results: list[dict[str, Any]] = []
    total = len(range(get_rank(), len(records), get_world_size())) if is_main_process() else 0
    with starting_workers():
        batches = iter(loader)
    with EvaluationProgress(total, dataset.metadata.name) as progress, autocast:
        for batch in batches:
            for sample, found in zip(batch, model(batch)):
                found = {k: v.cpu().numpy() for k, v in found.items()}
                results += detections_to_results(
                    sample["image_id"],
                    found["boxes"],
                    found["scores"],
                    found["classes"],
                    class_to_category,
                    masks=found.get("masks"),
                    keypoints=found.get("keypoints"),
                )
            progress.update(len(batch))
            if should_stop():
                break
    if any(agree_on_maximum([should_stop()])):
        raise EvaluationStopped
    if get_world_size() > 1:
        results = [r for part in all_gather_objects(results) for r in part]
        results.sort(key=lambda r: r["image_id"])
    return results


def validation_loss(
    cfg: CfgNode,
    model: nn.Module,
    dataset: CocoDataset,
    seed: int,
    should_stop: Callable[[], int] = lambda: 0,
) -> dict[str, float]:
    """The training losses on ``dataset`` at the test size, without augmentation, one image at a time.

    See :func:`zenith_det.training.validation_loss.validation_losses`.

    Raises:
        EvaluationStopped: any rank was told to stop; raised on all.
    """
    still = without_augmentation(cfg)
    records = dataset.records[: cfg.TEST.MAX_IMAGES or len(dataset.records)]
    records = known_classes(records, cfg.MODEL.ROI_HEADS.NUM_CLASSES)
    loader = build_loss_loader(
        still, records, TrainingMapper(still, dataset.metadata), rank=get_rank(), world_size=get_world_size()
    )
    with starting_workers():
        batches = iter(loader)
    losses = validation_losses(model, batches, seed=seed, should_stop=should_stop)
    if any(agree_on_maximum([should_stop()])):
        raise EvaluationStopped
    return losses


def evaluate(
    cfg: CfgNode,
    model: nn.Module,
    dataset: CocoDataset,
    class_names: Sequence[str],
    output_dir: Path,
    weights: tuple[int, int] | None = None,
    should_stop: Callable[[], int] = lambda: 0,
    of: EvaluatedWeights | None = None,
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Predict, write ``inference/coco_instances_results.json``, compute and print the COCO metrics.

    ``inference/evaluated.json`` says which weights these detections are of.

    Args:
        class_names: the model's classes; the dataset's categories were matched to them by name.
        output_dir: of the run.
        weights: (loaded, all) parameters, for explaining an AP of 0.
        should_stop: see :func:`predict`, also for what it raises.
        of: which weights the model has, to be noted beside the detections.

    Returns:
        Scalars such as ``bbox/AP`` (percent; an AP without ground truth is left out), and the results. On
        ranks other than the main one both are empty.
    """
    metadata = dataset.metadata
    back = {index: original for original, index in metadata.thing_dataset_id_to_contiguous_id.items()}
    # A class that this set lacks can still be predicted: an id that no category has makes it a detection
    # without ground truth, which COCO leaves out of the mean.
    absent = -1
    class_to_category = [back.get(i, absent) for i in range(len(class_names))]
    found = predict(cfg, model, dataset, class_to_category, should_stop)
    results = [r for r in found if r["category_id"] != absent]
    if not is_main_process():
        return {}, []
    truth = coco_ground_truth(dataset)
    folder = output_dir / "inference"
    forget_weights(folder)
    write_results(results, folder / RESULTS_FILE)
    if of is not None:
        note_weights(folder, of)
    used = dataset.records[: cfg.TEST.MAX_IMAGES or len(dataset.records)]
    image_ids = {r["image_id"] for r in used}
    scores = evaluate_coco(
        truth,
        results,
        tasks_of(cfg),
        class_names=[name for i, name in enumerate(metadata.thing_classes) if i in back],
        oks_sigmas=list(cfg.TEST.KEYPOINT_OKS_SIGMAS) or None,
        image_ids=image_ids,
    )
    explanations = explain_results(
        scores,
        truth,
        results,
        score_threshold=cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST,
        weights=weights,
        image_ids=image_ids,
    )
    write_explanations(folder, explanations)
    log_results(scores, explanations, run=cfg.OUTPUT_DIR)
    return finite_scalars(scores), results
