"""A whole run of the built-in engine, in one process of however many: data, model, training, evaluation."""

from __future__ import annotations

import gc
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zenith_det.config import CfgNode, LoadedConfig, follow_dataset, settle_files
from zenith_det.data import (
    CocoDataset,
    DatasetMetadata,
    SerializedList,
)
from zenith_det.data.statistics import find_sets_again
from zenith_det.engines.checkpoint_classes import remembered_classes
from zenith_det.engines.data_description import DataDescription
from zenith_det.engines.device import resolve_device, use_deterministic_algorithms
from zenith_det.engines.lr_range_test import set_base_lr
from zenith_det.engines.model_format import compile_backbone
from zenith_det.engines.options import RunOptions
from zenith_det.engines.run_pictures import draw_run
from zenith_det.engines.torchvision_engine import inference
from zenith_det.engines.torchvision_engine.datasets import dataset_sources, load_test_sets, load_training_set
from zenith_det.engines.torchvision_engine.input_pipeline import TrainingMapper
from zenith_det.engines.torchvision_engine.loaders import build_train_loader
from zenith_det.engines.torchvision_engine.rcnn import build_model
from zenith_det.engines.torchvision_engine.stepping import lr_probe
from zenith_det.engines.torchvision_engine.support import check_supported
from zenith_det.engines.torchvision_engine.trainer import Progress, Trainer, unwrap
from zenith_det.engines.torchvision_engine.weights import load_weights
from zenith_det.engines.training_set import reading_test_sets, warn_of_missing_flip_pairs
from zenith_det.engines.val_share import hold_out
from zenith_det.errors import CheckpointError, ConfigError
from zenith_det.evaluation import EvaluatedWeights, check_expected
from zenith_det.solver import build_lr_scheduler, build_optimizer
from zenith_det.training import averaging
from zenith_det.training.agreement import check_same_on_all_ranks, fingerprint, versions
from zenith_det.training.averaging import WeightAverage
from zenith_det.training.bad_steps import guard_forward
from zenith_det.training.best_checkpoint import BestCheckpoint
from zenith_det.training.checkpoint import Checkpointer
from zenith_det.training.ddp import data_parallel, settle_buckets
from zenith_det.training.distributed import (
    broadcast_object,
    get_local_rank,
    get_rank,
    get_world_size,
    is_main_process,
    process_line,
)
from zenith_det.training.earlier_run import EarlierRun
from zenith_det.training.evaluations import Evaluations
from zenith_det.training.events import JsonWriter, TensorBoardWriter, Writer
from zenith_det.training.loggers import build_loggers
from zenith_det.training.logging_setup import setup_logging
from zenith_det.training.progress import ConsoleWriter
from zenith_det.training.recovery import Diverged, Recovery, roll_back
from zenith_det.training.resume_report import config_facts, log_changes
from zenith_det.training.resuming import (
    batches_done,
    configured_groups,
    forget_history,
    reapply,
    shares_state,
)
from zenith_det.training.run_record import evaluated, log_start, prepare_output_dir, write_config
from zenith_det.training.seeding import seed_all
from zenith_det.training.starting import Start, choose_seed, find_start
from zenith_det.training.stopping import StopRequest
from zenith_det.training.worker_signals import starting_workers

logger = logging.getLogger(__name__)


def run(loaded: LoadedConfig, options: RunOptions) -> dict[str, float]:
    """Train and evaluate, or evaluate alone, as ``loaded`` says.

    Called in each process of a run, with or without a process group.

    Returns:
        Scalars of the last evaluation (``bbox/AP``, percent); empty on all ranks but the main one.

    Raises:
        UserError: anything the user can mend, in one line.
    """
    cfg = loaded.cfg
    settle_files(loaded)
    resolve_device(loaded)
    check_supported(loaded)
    output_dir = prepare_output_dir(cfg.OUTPUT_DIR)
    setup_logging(output_dir, get_rank())
    find_sets_again(output_dir)
    hold_out(loaded, output_dir, resume=options.resume or options.eval_only)
    if get_world_size() > 1:
        logger.info(process_line())
    apply_torch_settings(cfg)
    if options.eval_only:
        return evaluate_only(loaded, output_dir)
    with EarlierRun(output_dir) as earlier:
        return train(loaded, options, output_dir, earlier)


def apply_torch_settings(cfg: CfgNode) -> None:
    """``CUDNN_BENCHMARK`` and ``FLOAT32_PRECISION``, with Detectron2's meanings, and ``DETERMINISTIC``."""
    torch.backends.cudnn.benchmark = cfg.CUDNN_BENCHMARK
    use_deterministic_algorithms(cfg)
    if cfg.FLOAT32_PRECISION:
        torch.set_float32_matmul_precision(cfg.FLOAT32_PRECISION)
        torch.backends.cudnn.allow_tf32 = cfg.FLOAT32_PRECISION != "highest"


# ---- training


def train(
    loaded: LoadedConfig, options: RunOptions, output_dir: Path, earlier: EarlierRun
) -> dict[str, float]:
    """Train to the end, evaluating and saving on the way; then draw the curves and predictions.

    Raises:
        RunStopped: a signal or the deadline ended it before; everything is saved.
        TrainingDivergedError: it went wrong, and going back did not help.
        UnexpectedResultsError: the last evaluation is not what ``TEST.EXPECTED_RESULTS`` says.
    """
    cfg = loaded.cfg
    description = DataDescription(cfg)
    training_set = load_training_set(cfg, description)
    metadata = training_set.metadata
    follow_dataset(
        loaded, metadata.name, metadata.num_classes, metadata.num_keypoints, metadata.keypoint_oks_sigmas
    )
    warn_of_missing_flip_pairs(cfg, metadata)
    with reading_test_sets(cfg):
        test_sets = load_test_sets(cfg, metadata.thing_classes, description)
    description.tell(output_dir)
    if options.epochs is not None:
        iterations = math.ceil(options.epochs * len(training_set.records) / cfg.SOLVER.IMS_PER_BATCH)
        loaded.override("SOLVER.MAX_ITER", iterations, "--epochs")
    check_batch(cfg)
    if cfg.MODEL.RESNETS.NORM == "SyncBN" and (get_world_size() == 1 or cfg.MODEL.DEVICE == "cpu"):
        raise ConfigError("MODEL.RESNETS.NORM is 'SyncBN', which needs several GPUs: use 'BN' on one device")
    checkpointer = Checkpointer(output_dir, keep=cfg.CHECKPOINT.KEEP or None)
    run_id, start = find_start(checkpointer, resume=options.resume)
    set_base_lr(loaded, start, output_dir, lr_probe)
    seed = int(start.state["seed"]) if start else choose_seed(cfg.SEED)
    recovery = Recovery.of(cfg, start.state.get("recovery") if start else None)
    run_facts = {
        "dataset": metadata.to_dict(),
        "engine": "torchvision",
        "batch_size": cfg.SOLVER.IMS_PER_BATCH,
        "processes": get_world_size(),
        "run_id": run_id,
        "config": config_facts(cfg),
    }
    check_same_on_all_ranks(
        {
            key: value
            for key, value in run_facts["config"].items()
            if key not in ("MODEL.DEVICE", "OUTPUT_DIR")
        }
        | versions()
        | {
            "the training set": fingerprint(training_set.records) if get_world_size() > 1 else "",
            "the first iteration": start.iteration if start else 0,
        }
    )
    if is_main_process():
        log_start(
            cfg,
            loaded.sources,
            num_images=len(training_set.records),
            start_iter=start.iteration if start else 0,
            num_processes=get_world_size(),
        )
    if start:
        log_changes(
            start.state.get("config"),
            cfg,
            seed=seed,
            iteration=start.iteration,
            processes=(start.state.get("processes", get_world_size()), get_world_size()),
        )
    data = RunData(SerializedList(training_set.records), metadata, test_sets)
    with StopRequest(options.deadline, main=is_main_process()) as stop:

        def begin() -> None:
            earlier.give_way(anew=start is None, weights=cfg.MODEL.WEIGHTS)
            if is_main_process():
                write_config(output_dir, cfg)

        while True:
            progress = start_progress(cfg, start, seed, run_facts | {"recovery": recovery.to_dict()})
            try:
                scalars = train_from(start, recovery.scaled(cfg), data, progress, checkpointer, stop, begin)
                break
            except Diverged as divergence:
                path, recovery = roll_back(divergence, recovery, cfg, checkpointer, run_id)
            start = Start.load(path) if path else None
            gc.collect()  # the model and the loader's processes of the abandoned attempt
    if is_main_process():
        evaluated_on = test_sets[0] if data.results is not None else None
        draw_run(output_dir, evaluated_on, data.results or [], cfg.TEST.MAX_IMAGES)
        check_expected(cfg.TEST.EXPECTED_RESULTS, scalars)
    return scalars


@dataclass
class RunData:
    """What every attempt of a run works on.

    Attributes:
        records: to train on.
        metadata: of the training set.
        test_sets: to evaluate on.
        results: of the last evaluation (of averaged weights, where there are any), on the first test set, in
            COCO's format; main process only. ``None`` before one.
    """

    records: SerializedList
    metadata: DatasetMetadata
    test_sets: list[CocoDataset]
    results: list[dict[str, Any]] | None = None


def train_from(
    start: Start | None,
    cfg: CfgNode,
    data: RunData,
    progress: Progress,
    checkpointer: Checkpointer,
    stop: StopRequest,
    begin: Callable[[], None],
) -> dict[str, float]:
    """Train from a checkpoint, or from the beginning, to the end.

    Args:
        begin: called when nothing of the user's can be wrong any more, and nothing has been written.

    Returns:
        Scalars of the last evaluation.

    Raises:
        Diverged, RunStopped: see :meth:`Trainer.train`.
    """
    output_dir = checkpointer.output_dir
    seed_all(progress.seed)
    model: nn.Module = build_model(cfg)
    weights = None if start else load_weights(cfg, model)
    compile_backbone(cfg, model)
    average = WeightAverage.of(cfg, model)
    optimizer = build_optimizer(cfg, model)
    scheduler = build_lr_scheduler(cfg, optimizer)
    guard_forward(model)
    if get_world_size() > 1:
        model = data_parallel(model, None if cfg.MODEL.DEVICE == "cpu" else get_local_rank())
        settle_buckets(model)
    loader = build_train_loader(
        cfg,
        data.records,
        TrainingMapper(cfg, data.metadata),
        seed=progress.seed,
        start=batches_done(progress.images_seen, cfg.SOLVER.IMS_PER_BATCH),
        rank=get_rank(),
        world_size=get_world_size(),
    )
    counts = None if weights is None else (len(weights.matched), weights.total)

    def evaluate(should_stop: Callable[[], int], averaged: bool) -> dict[str, float]:
        scalars: dict[str, float] = {}
        parent = output_dir / averaging.FOLDER if averaged else output_dir
        if averaged and data.test_sets:
            logger.info("with averaged weights (SOLVER.AVERAGE.KIND %s):", cfg.SOLVER.AVERAGE.KIND)
        for number, dataset in enumerate(data.test_sets):
            folder = parent if len(data.test_sets) == 1 else parent / dataset.metadata.name
            of = EvaluatedWeights(dataset.metadata.name, averaged, progress.iteration - 1)
            values, results = inference.evaluate(
                cfg, unwrap(model), dataset, data.metadata.thing_classes, folder, counts, should_stop, of
            )
            prefix = "" if len(data.test_sets) == 1 else f"{dataset.metadata.name}/"
            if cfg.TEST.VALIDATION_LOSS:
                values |= inference.validation_loss(cfg, unwrap(model), dataset, progress.seed, should_stop)
            scalars |= {prefix + k: v for k, v in values.items()}
            if number == 0:
                data.results = results
        return scalars

    main = is_main_process()
    evaluate_first = start is not None and (
        # A run that had ended already evaluates nothing by itself, and there would be nothing to compare.
        len(cfg.TEST.EXPECTED_RESULTS) > 0
        or broadcast_object(main and not evaluated(output_dir, progress.iteration))
    )
    with starting_workers():
        batches = iter(loader)
    trainer = Trainer(
        cfg,
        model,
        optimizer,
        scheduler,
        batches,
        progress,
        checkpointer,
        BestCheckpoint(
            checkpointer,
            cfg.CHECKPOINT.BEST if main else "",
            resumed=start is not None or progress.facts["recovery"]["rollbacks"] > 0,
        ),
        build_writers(cfg, output_dir, progress, len(data.records)) if main else [],
        evaluate,
        average,
        Evaluations(cfg, output_dir, progress.iteration) if main else None,
    )
    if start is not None:
        resume(trainer, start)
    begin()
    return trainer.train(stop, evaluate_first=evaluate_first and trainer.evaluation_due())


def check_batch(cfg: CfgNode) -> None:
    """Refuse a batch that doesn't divide among processes and accumulated parts."""
    ways = get_world_size() * cfg.SOLVER.GRADIENT_ACCUMULATION
    if cfg.SOLVER.IMS_PER_BATCH % ways:
        raise ConfigError(
            f"SOLVER.IMS_PER_BATCH is {cfg.SOLVER.IMS_PER_BATCH}, which doesn't divide by {ways} "
            f"({get_world_size()} processes x SOLVER.GRADIENT_ACCUMULATION {cfg.SOLVER.GRADIENT_ACCUMULATION})"
        )


def start_progress(cfg: CfgNode, start: Start | None, seed: int, facts: dict[str, Any]) -> Progress:
    """Where an attempt starts. In another batch size the images seen count, to a whole batch."""
    if start is None:
        return Progress(0, seed, 0, facts)
    batch = cfg.SOLVER.IMS_PER_BATCH
    seen = start.state.get("images_seen", start.iteration * start.state.get("batch_size", batch))
    return Progress(start.iteration, seed, batches_done(int(seen), batch) * batch, facts)


def resume(trainer: Trainer, start: Start) -> None:
    """Put a checkpoint's state into a trainer built from the present configuration, which wins.

    Raises:
        CheckpointError: it is of another model or optimizer.
    """
    configured = configured_groups(trainer.optimizer)
    before = start.state.get("config", {}).get("SOLVER.OPTIMIZER", trainer.cfg.SOLVER.OPTIMIZER)
    now = trainer.cfg.SOLVER.OPTIMIZER
    try:
        trainer.load(start.state, str(start.path), optimizer=shares_state(before, now))
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}; to start a new run from what fits: another OUTPUT_DIR, and this file as MODEL.WEIGHTS"
        ) from error
    except (RuntimeError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{start.path} is of another optimizer or parameter groups ({reason[:300]}): use another "
            "OUTPUT_DIR, or give it as MODEL.WEIGHTS to load its weights"
        ) from error
    reapply(trainer.optimizer, configured)
    batch = start.state.get("batch_size", trainer.cfg.SOLVER.IMS_PER_BATCH)
    keep = trainer.cfg.SOLVER.ZENITH.KEEP_HISTORY
    forget_history(trainer.optimizer, batch, trainer.cfg.SOLVER.IMS_PER_BATCH, keep=keep)


def build_writers(cfg: CfgNode, output_dir: Path, progress: Progress, num_images: int) -> list[Writer]:
    """Progress on the console, ``metrics.json`` and TensorBoard events, and what ``LOGGERS`` names."""
    return [
        ConsoleWriter(
            cfg.SOLVER.MAX_ITER,
            start_iter=progress.iteration,
            iters_per_epoch=num_images / cfg.SOLVER.IMS_PER_BATCH,
            batch_size=cfg.SOLVER.IMS_PER_BATCH,
        ),
        JsonWriter(output_dir / "metrics.json", start_iter=progress.iteration),
        TensorBoardWriter(output_dir, start_iter=progress.iteration),
        *build_loggers(cfg, output_dir),
    ]


# ---- evaluation and pictures


def evaluate_only(loaded: LoadedConfig, output_dir: Path) -> dict[str, float]:
    """Evaluate ``MODEL.WEIGHTS`` on the test sets.

    Raises:
        ConfigError: no weights or no test set.
        UnexpectedResultsError: the evaluation is not what ``TEST.EXPECTED_RESULTS`` says.
    """
    cfg = loaded.cfg
    if not cfg.MODEL.WEIGHTS:
        raise ConfigError(
            f"--eval-only needs MODEL.WEIGHTS: add MODEL.WEIGHTS OUTPUT_DIR/{averaging.result_file(cfg)}"
        )
    if not dataset_sources(cfg, "TEST"):
        raise ConfigError("DATASETS.TEST is empty: name a dataset, or give --val-json and --val-images")
    remembered = remembered_classes(cfg.MODEL.WEIGHTS)
    test_sets = load_test_sets(cfg, remembered.thing_classes if remembered else None)
    metadata = remembered or test_sets[0].metadata
    follow_dataset(
        loaded,
        metadata.name,
        metadata.num_classes,
        metadata.num_keypoints,
        test_sets[0].metadata.keypoint_oks_sigmas,
    )
    model = build_model(cfg)
    weights = load_weights(cfg, model, require_all=True)
    model.eval()
    scalars: dict[str, float] = {}
    all_results = []
    for dataset in test_sets:
        folder = output_dir if len(test_sets) == 1 else output_dir / dataset.metadata.name
        counts = (len(weights.matched), weights.total) if weights else None
        of = EvaluatedWeights(
            dataset.metadata.name, averaging.is_averaged(cfg.MODEL.WEIGHTS), file=cfg.MODEL.WEIGHTS
        )
        values, results = inference.evaluate(
            cfg, model, dataset, metadata.thing_classes, folder, counts, of=of
        )
        prefix = "" if len(test_sets) == 1 else f"{dataset.metadata.name}/"
        scalars |= {prefix + k: v for k, v in values.items()}
        all_results.append(results)
    if is_main_process():
        draw_run(output_dir, test_sets[0], all_results[0], cfg.TEST.MAX_IMAGES)
        check_expected(cfg.TEST.EXPECTED_RESULTS, scalars)
    return scalars
