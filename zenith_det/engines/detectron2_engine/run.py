"""A whole run on Detectron2, in one process of however many: data, model, training, evaluation."""

from __future__ import annotations

import argparse
import gc
import json
import logging
import math
import os
import re
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode as Detectron2CfgNode
from detectron2.data import DatasetCatalog, get_detection_dataset_dicts
from detectron2.engine import default_setup
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils import comm

from zenith_det.config import LoadedConfig, settle_files
from zenith_det.data.statistics import find_sets_again
from zenith_det.engines.checkpoint_classes import remembered_classes
from zenith_det.engines.data_description import DataDescription
from zenith_det.engines.detectron2_engine.checkpoint import SafeCheckpointer
from zenith_det.engines.detectron2_engine.config import to_detectron2
from zenith_det.engines.detectron2_engine.data import checked_dataset, register_datasets
from zenith_det.engines.detectron2_engine.evaluation import note_evaluated, results_dir
from zenith_det.engines.detectron2_engine.foreign_data import reading_foreign_datasets
from zenith_det.engines.detectron2_engine.stepping import lr_probe
from zenith_det.engines.detectron2_engine.trainer import ZenithTrainer
from zenith_det.engines.device import resolve_device, use_deterministic_algorithms
from zenith_det.engines.lr_range_test import set_base_lr
from zenith_det.engines.options import RunOptions
from zenith_det.engines.run_pictures import draw_run
from zenith_det.engines.training_set import warn_of_missing_flip_pairs
from zenith_det.engines.val_share import hold_out
from zenith_det.errors import ConfigError, DatasetError
from zenith_det.evaluation import RESULTS_FILE, check_expected
from zenith_det.training import averaging
from zenith_det.training.agreement import check_same_on_all_ranks, fingerprint, versions
from zenith_det.training.checkpoint import Checkpointer
from zenith_det.training.distributed import broadcast_object
from zenith_det.training.earlier_run import EarlierRun
from zenith_det.training.logging_setup import pass_over_lost_output, setup_logging
from zenith_det.training.recovery import Diverged, Recovery, roll_back
from zenith_det.training.resume_report import config_facts, log_changes
from zenith_det.training.run_record import evaluated, log_start, prepare_output_dir
from zenith_det.training.starting import Start, choose_seed, find_start
from zenith_det.training.stopping import StopRequest

logger = logging.getLogger(__name__)

__all__ = ["RunOptions", "run"]


def run(loaded: LoadedConfig, options: RunOptions) -> dict[str, float]:
    """Train and evaluate, or evaluate alone, as ``loaded`` says.

    Called in each process of a run, with or without a process group: of Detectron2's ``launch``, of
    ``torchrun``, of :func:`zenith_det.training.distributed.launch`.

    Returns:
        Scalars of the last evaluation (``bbox/AP``, percent), without those that have no ground truth; empty
        on all ranks but the main one.

    Raises:
        UserError: anything the user can mend, in one line.
    """
    join_machine()
    settle_files(loaded)
    resolve_device(loaded)
    output_dir = prepare_output_dir(loaded.cfg.OUTPUT_DIR)
    setup_logging(output_dir, comm.get_rank())
    find_sets_again(output_dir)
    hold_out(loaded, output_dir, resume=options.resume or options.eval_only)
    with EarlierRun(output_dir) as earlier:
        results = evaluate(loaded, options) if options.eval_only else train(loaded, options, earlier)
    flat = flatten_results_dict(results)
    return {name: float(value) for name, value in flat.items() if math.isfinite(float(value))}


def train(loaded: LoadedConfig, options: RunOptions, earlier: EarlierRun) -> Mapping[str, Any]:
    """Train to the end, evaluating and saving on the way; then draw the curves.

    Raises:
        RunStopped: a signal or the deadline ended it before; everything is saved.
        TrainingDivergedError: it went wrong, and going back did not help.
    """
    _refuse_torchvision_name(loaded.cfg.MODEL.WEIGHTS)
    description = DataDescription(loaded.cfg)
    metadata = register_datasets(loaded, training=True, description=description)
    description.tell(Path(loaded.cfg.OUTPUT_DIR))
    if metadata is not None:
        warn_of_missing_flip_pairs(loaded.cfg, metadata)
    num_images = _count_images(loaded)
    if options.epochs is not None:
        iterations = math.ceil(options.epochs * num_images / loaded.cfg.SOLVER.IMS_PER_BATCH)
        loaded.override("SOLVER.MAX_ITER", iterations, "--epochs")
    if loaded.cfg.SOLVER.IMS_PER_BATCH % comm.get_world_size():
        raise ConfigError(
            f"SOLVER.IMS_PER_BATCH is {loaded.cfg.SOLVER.IMS_PER_BATCH}, which doesn't divide by "
            f"{comm.get_world_size()} processes"
        )
    output_dir = Path(loaded.cfg.OUTPUT_DIR)
    checkpointer = Checkpointer(output_dir)
    run_id, start = find_start(checkpointer, resume=options.resume, tensors=False)
    set_base_lr(loaded, start, output_dir, lr_probe)
    cfg = set_up(loaded, options)
    seed = int(start.state["seed"]) if start and "seed" in start.state else choose_seed(cfg.SEED)
    recovery = Recovery.of(cfg, start.state.get("recovery") if start else None)
    facts: dict[str, Any] = {
        "engine": "detectron2",
        "batch_size": cfg.SOLVER.IMS_PER_BATCH,
        "processes": comm.get_world_size(),
        "run_id": run_id,
        "config": config_facts(loaded.cfg),
    }
    if metadata is not None:
        # Enough to use the model without its training set.
        facts["dataset"] = metadata.to_dict()
    check_same_on_all_ranks(
        {key: value for key, value in facts["config"].items() if key not in ("MODEL.DEVICE", "OUTPUT_DIR")}
        | versions()
        | {
            "the training set": _fingerprint(loaded) if comm.get_world_size() > 1 else "",
            "the first iteration": start.iteration if start else 0,
        }
    )
    log_start(
        cfg,
        loaded.sources,
        num_images=num_images,
        start_iter=start.iteration if start else 0,
        num_processes=comm.get_world_size(),
    )
    if start:
        log_changes(
            start.state.get("config"),
            loaded.cfg,
            seed=seed,
            iteration=start.iteration,
            processes=(start.state.get("processes", comm.get_world_size()), comm.get_world_size()),
        )
    with StopRequest(options.deadline, main=comm.is_main_process()) as stop:
        while True:
            try:
                attempt_facts = facts | {"recovery": recovery.to_dict()}
                attempt_cfg = recovery.scaled(_seeded(cfg, seed))
                results = train_from(start, attempt_cfg, attempt_facts, stop, earlier)
                break
            except Diverged as divergence:
                path, recovery = roll_back(divergence, recovery, cfg, checkpointer, run_id)
            start = Start.load(path, tensors=False) if path else None
            gc.collect()  # the model and the loader's processes of the abandoned attempt
    _draw(cfg, averaged=bool(cfg.SOLVER.AVERAGE.KIND))
    return results


def train_from(
    start: Start | None, cfg: Any, facts: dict[str, Any], stop: StopRequest, earlier: EarlierRun
) -> Mapping[str, Any]:
    """Train from a checkpoint, or from the beginning, to the end.

    Raises:
        Diverged, RunStopped: see :meth:`ZenithTrainer.train`.
    """
    trainer = ZenithTrainer(cfg)
    trainer.checkpointer.facts = facts
    trainer.checkpointer.take(start.path if start else None)
    trainer.resume_or_load(resume=start is not None)
    missed = False
    if start is not None and cfg.TEST.EVAL_PERIOD > 0 and start.iteration < cfg.SOLVER.MAX_ITER:
        due = start.iteration % cfg.TEST.EVAL_PERIOD == 0
        missed = broadcast_object(
            due and comm.is_main_process() and not evaluated(cfg.OUTPUT_DIR, start.iteration)
        )
    earlier.give_way(anew=start is None, weights=cfg.MODEL.WEIGHTS)
    results: Mapping[str, Any] = trainer.train(stop, evaluate_first=missed) or {}
    return results


def _seeded(cfg: Any, seed: int) -> Any:
    """A copy with the run's own seed: each attempt begins with the same weights."""
    copy = cfg.clone()
    copy.defrost()
    copy.SEED = seed
    copy.freeze()
    return copy


def _fingerprint(loaded: LoadedConfig) -> str:
    return fingerprint(record for name in loaded.cfg.DATASETS.TRAIN for record in DatasetCatalog.get(name))


def evaluate(loaded: LoadedConfig, options: RunOptions) -> Mapping[str, Any]:
    """Evaluate ``MODEL.WEIGHTS`` (with ``--resume``: the newest checkpoint of ``OUTPUT_DIR``).

    Raises:
        ConfigError: no weights, or nothing to evaluate on.
        UnexpectedResultsError: the evaluation is not what ``TEST.EXPECTED_RESULTS`` says.
    """
    weights = loaded.cfg.MODEL.WEIGHTS
    _refuse_torchvision_name(weights)
    if not weights and not options.resume:
        raise ConfigError(
            f"--eval-only needs MODEL.WEIGHTS: add MODEL.WEIGHTS OUTPUT_DIR/{averaging.result_file(loaded.cfg)}"
        )
    remembered = remembered_classes(weights)
    register_datasets(loaded, training=False, classes=remembered.thing_classes if remembered else None)
    cfg = set_up(loaded, options)
    model = ZenithTrainer.build_model(cfg)
    checkpointer = SafeCheckpointer(model, cfg.OUTPUT_DIR, require_all=True)
    checkpointer.resume_or_load(weights, resume=options.resume)
    results = OrderedDict(ZenithTrainer.test(cfg, model))
    loaded_from = checkpointer.source
    note_evaluated(cfg, averaged=averaging.is_averaged(loaded_from), file=loaded_from)
    if cfg.TEST.AUG.ENABLED:
        results.update(ZenithTrainer.test_with_tta(cfg, model))
    _draw(cfg, averaged=False)  # whatever weights: --eval-only writes to the run's own folder
    if comm.is_main_process():
        check_expected(cfg.TEST.EXPECTED_RESULTS, flatten_results_dict(results))
    return results


def join_machine() -> None:
    """Tell Detectron2 which processes share a machine, where its own ``launch`` did not start them."""
    if comm.get_world_size() == 1:
        return
    try:
        comm.get_local_rank()
    except AssertionError:
        comm.create_local_process_group(int(os.environ.get("LOCAL_WORLD_SIZE", comm.get_world_size())))


def set_up(loaded: LoadedConfig, options: RunOptions) -> Detectron2CfgNode:
    """Detectron2's ``default_setup``: its loggers, ``config.yaml``, seeds, cuDNN. Returns its config."""
    cfg = to_detectron2(loaded)
    # Without config_file: a name in the model zoo is no file that could be shown.
    default_setup(cfg, argparse.Namespace(eval_only=options.eval_only, resume=options.resume))
    for library in ("detectron2", "fvcore"):
        pass_over_lost_output(library)
    use_deterministic_algorithms(cfg)
    return cfg


def _refuse_torchvision_name(weights: str) -> None:
    if re.fullmatch(r"\w+_Weights\.\w+", weights):
        raise ConfigError(
            f"MODEL.WEIGHTS {weights} is torchvision's name, which the built-in engine takes "
            "(--engine torchvision); here take detectron2://ImageNetPretrained/torchvision/R-50.pkl or a file"
        )


def _draw(cfg: Any, *, averaged: bool) -> None:
    """The curves, and the predictions on the first test set; ``averaged``: of the averaged weights."""
    if not comm.is_main_process():
        return
    names = cfg.DATASETS.TEST
    results = Path(results_dir(cfg, names[0], averaged=averaged), RESULTS_FILE) if names else None
    found = results is not None and results.exists()
    draw_run(
        Path(cfg.OUTPUT_DIR),
        checked_dataset(names[0]) if found else None,
        json.loads(results.read_text()) if results and found else [],
        cfg.TEST.MAX_IMAGES,
    )


def _count_images(loaded: LoadedConfig) -> int:
    """Images that are trained on.

    Raises:
        DatasetError: none is left.
    """
    cfg = loaded.cfg
    keypoints = cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE if cfg.MODEL.KEYPOINT_ON else 0
    try:
        with reading_foreign_datasets(loaded):
            return len(
                get_detection_dataset_dicts(
                    cfg.DATASETS.TRAIN,
                    filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
                    min_keypoints=keypoints,
                )
            )
    except AssertionError as error:  # Detectron2's, for a set without images or one that it left all of out
        what = f"objects with {keypoints} keypoints or more" if keypoints else "objects"
        raise DatasetError(
            f"{', '.join(cfg.DATASETS.TRAIN)}: no image with {what} is left to train on ({error})"
        ) from error
