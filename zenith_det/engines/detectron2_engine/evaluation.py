"""COCO evaluation of Detectron2's models by the toolkit's own metrics."""

from __future__ import annotations

import itertools
import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from detectron2.data import MetadataCatalog
from detectron2.evaluation import (
    CityscapesInstanceEvaluator,
    CityscapesSemSegEvaluator,
    COCOEvaluator,
    COCOPanopticEvaluator,
    DatasetEvaluator,
    DatasetEvaluators,
    LVISEvaluator,
    PascalVOCDetectionEvaluator,
    SemSegEvaluator,
)
from detectron2.utils import comm

from zenith_det.data import CocoDataset
from zenith_det.engines.detectron2_engine.data import checked_dataset
from zenith_det.engines.engine import Detections
from zenith_det.engines.evaluating import category_ids, results_of, score_results, tasks_of
from zenith_det.errors import ConfigError
from zenith_det.training.processes.distributed import agree_on_maximum
from zenith_det.training.processes.stopping import EvaluationStopped, stop_code

#: For each kind of dataset, as in Detectron2's ``tools/train_net.py``.
_EVALUATORS: dict[str | None, tuple[type, ...]] = {
    "sem_seg": (SemSegEvaluator,),
    "coco": (COCOEvaluator,),
    "coco_panoptic_seg": (SemSegEvaluator, COCOEvaluator, COCOPanopticEvaluator),
    "cityscapes_instance": (CityscapesInstanceEvaluator,),
    "cityscapes_sem_seg": (CityscapesSemSegEvaluator,),
    "pascal_voc": (PascalVOCDetectionEvaluator,),
    "lvis": (LVISEvaluator,),
}
_WITHOUT_FOLDER = (CityscapesInstanceEvaluator, CityscapesSemSegEvaluator, PascalVOCDetectionEvaluator)


def compiled_coco_eval() -> type:
    """Detectron2's COCOeval with the matching in C++, to be timed beside ours."""
    from detectron2.evaluation.fast_eval_api import COCOeval_opt

    return COCOeval_opt  # type: ignore[no-any-return]


class CocoEvaluator(DatasetEvaluator):
    """Box, mask and keypoint AP on a checked dataset; the same code as behind the built-in engine.

    Writes ``coco_instances_results.json`` and returns what Detectron2's ``COCOEvaluator`` returns:
    task -> metric -> percent.

    Args:
        dataset: the checked set; annotations that the check dropped don't count.
        tasks: of "bbox", "segm", "keypoints".
        output_dir: for the result file; ``None`` writes none.
        oks_sigmas: per keypoint; default: the dataset's.
        score_threshold: the one the model applied, for explanations.
        run: OUTPUT_DIR of the run that evaluates several times, see :func:`zenith_det.evaluation.log_explanations`.
    """

    def __init__(
        self,
        dataset: CocoDataset,
        tasks: Sequence[str],
        output_dir: str | None = None,
        *,
        oks_sigmas: Sequence[float] | None = None,
        score_threshold: float | None = None,
        run: str = "",
    ) -> None:
        self._dataset = dataset
        self._tasks = tuple(tasks)
        self._output_dir = output_dir
        self._oks_sigmas = oks_sigmas
        self._score_threshold = score_threshold
        self._run = run
        self._category_ids = category_ids(dataset)
        self.reset()

    def reset(self) -> None:
        """Forget all detections."""
        self._results: list[dict[str, Any]] = []
        self._images: list[int] = []

    def process(self, inputs: Sequence[Mapping[str, Any]], outputs: Sequence[Mapping[str, Any]]) -> None:
        """Keep a batch of detections.

        Args:
            inputs: with ``image_id``.
            outputs: with ``instances``: Detectron2's ``Instances`` at the original image's size.
        """
        for given, output in zip(inputs, outputs):
            self._images.append(given["image_id"])
            self._results += results_of(given["image_id"], detections(output), self._category_ids)

    def evaluate(self) -> OrderedDict[str, dict[str, float]]:
        """The metrics, on the first process; empty on the others."""
        comm.synchronize()
        gathered = comm.gather((self._results, self._images), dst=0)
        if not comm.is_main_process():
            return OrderedDict()
        results, images = (list(itertools.chain.from_iterable(parts)) for parts in zip(*gathered))
        # The "copypaste:" lines are left to Detectron2's trainer, which prints them for any evaluator.
        return score_results(
            self._dataset,
            results,
            self._tasks,
            images,
            Path(self._output_dir) if self._output_dir else None,
            oks_sigmas=self._oks_sigmas,
            score_threshold=self._score_threshold,
            run=self._run,
            copypaste=False,
        )


def build_evaluator(cfg: Any, dataset_name: str, output_dir: str | None = None) -> DatasetEvaluator:
    """The evaluator for one of Detectron2's datasets.

    COCO-format sets that this toolkit registered are evaluated by :class:`CocoEvaluator`; the others by
    Detectron2's evaluator for their ``evaluator_type``, as in its ``tools/train_net.py``.

    Args:
        cfg: Detectron2's configuration.
        dataset_name: as in ``DATASETS.TEST``.
        output_dir: default: :func:`results_dir`.

    Raises:
        ConfigError: no evaluator for this kind of dataset.
    """
    output_dir = output_dir or results_dir(cfg, dataset_name)
    dataset = checked_dataset(dataset_name)
    if dataset is not None and cfg.MODEL.META_ARCHITECTURE != "ProposalNetwork":
        return CocoEvaluator(
            dataset,
            tasks_of(cfg),
            output_dir,
            oks_sigmas=tuple(cfg.TEST.KEYPOINT_OKS_SIGMAS) or None,
            score_threshold=cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST,
            run=cfg.OUTPUT_DIR,
        )
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type", "coco" if dataset else None)
    if kind not in _EVALUATORS:
        raise ConfigError(
            f"DATASETS.TEST: {dataset_name}: no evaluator for datasets of type {kind!r}: override "
            "build_evaluator"
        )
    evaluators = [
        one(dataset_name) if one in _WITHOUT_FOLDER else one(dataset_name, output_dir=output_dir)
        for one in _EVALUATORS[kind]
    ]
    return evaluators[0] if len(evaluators) == 1 else DatasetEvaluators(evaluators)


def detections(output: Mapping[str, Any]) -> Detections:
    """What a model of Detectron2's found in one image, on the host.

    Raises:
        ConfigError: it is a model that finds no objects.
    """
    if "instances" not in output:
        raise ConfigError(f"the model finds no objects: its output is {', '.join(output)}")
    found = output["instances"].to("cpu")
    there = {
        "boxes": found.pred_boxes.tensor.numpy(),
        "scores": found.scores.numpy(),
        "classes": found.pred_classes.numpy(),
    }
    for name in ("masks", "keypoints"):
        if found.has(f"pred_{name}"):
            there[name] = found.get(f"pred_{name}").numpy()
    return there


def results_dir(cfg: Any, dataset_name: str) -> str:
    """``OUTPUT_DIR/inference``, with a folder for each set below it where there are several."""
    folder = os.path.join(cfg.OUTPUT_DIR, "inference")
    # The name of a set given by its file is a path.
    return os.path.join(folder, Path(dataset_name).stem) if len(cfg.DATASETS.TEST) > 1 else folder


def unless_stopped(evaluator: DatasetEvaluator) -> DatasetEvaluator:
    """The evaluator, which raises ``EvaluationStopped`` on all processes where any was told to end the run."""
    evaluate = evaluator.evaluate

    def wrapped() -> Any:
        if any(agree_on_maximum([stop_code()])):
            raise EvaluationStopped
        return evaluate()

    evaluator.evaluate = wrapped
    return evaluator
