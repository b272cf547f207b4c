"""A whole run, in one process of however many and on either engine: data, model, training, evaluation, pictures."""

from __future__ import annotations

import gc
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from zenith_det.config import CfgNode, LoadedConfig, follow_dataset, settle_files
from zenith_det.data.statistics import find_sets_again
from zenith_det.engines.accumulating import check_batch
from zenith_det.engines.batches import train_batches
from zenith_det.engines.data_description import DataDescription
from zenith_det.engines.device import apply_torch_settings, resolve_device
from zenith_det.engines.engine import Batch, Engine, TrainingSet, load_engine
from zenith_det.engines.evaluating import Evaluator
from zenith_det.engines.lr_range_test import CURVE_FILE, set_base_lr
from zenith_det.engines.options import RunOptions
from zenith_det.engines.prefetch import Prefetcher
from zenith_det.engines.probe import lr_probe
from zenith_det.engines.run_pictures import draw_run, pictured
from zenith_det.engines.trainer import Progress, Trainer, build_parts
from zenith_det.engines.training_set import reading_test_sets, warn_of_sides_in_mirrored_images
from zenith_det.engines.val_share import hold_out
from zenith_det.errors import CheckpointError, ConfigError, UserError
from zenith_det.evaluation import check_expected
from zenith_det.files import write_whole
from zenith_det.training.checkpoints import averaging
from zenith_det.training.checkpoints.averaging import WeightAverage
from zenith_det.training.checkpoints.best_checkpoint import BestCheckpoint
from zenith_det.training.checkpoints.checkpoint import Checkpointer
from zenith_det.training.course.earlier_run import give_way, undo_unfinished_move
from zenith_det.training.course.evaluations import Evaluations
from zenith_det.training.course.output_lock import OutputLock
from zenith_det.training.course.remembered import remembered_classes
from zenith_det.training.course.resume_report import TRAINING_SET, config_facts, log_changes
from zenith_det.training.course.resuming import forget_history, loading_state, shares_state
from zenith_det.training.course.run_record import (
    announce_run,
    evaluated,
    forget_pending,
    log_start,
    prepare_output_dir,
    remove_left_overs,
    write_config,
)
from zenith_det.training.course.starting import Start, choose_seed, find_start
from zenith_det.training.failures.recovery import Diverged, Recovery, roll_back
from zenith_det.training.logs.events import JsonWriter, TensorBoardWriter, Writer
from zenith_det.training.logs.loggers import build_loggers, check_loggers
from zenith_det.training.logs.logging_setup import setup_logging
from zenith_det.training.logs.progress import ConsoleWriter
from zenith_det.training.processes.agreement import check_same_on_all_ranks, fingerprint, versions
from zenith_det.training.processes.ddp import data_parallel, settle_buckets, unwrap
from zenith_det.training.processes.distributed import (
    barrier,
    broadcast_object,
    get_local_rank,
    get_rank,
    get_world_size,
    is_main_process,
    process_line,
    restart_count,
    would_be_restarted,
)
from zenith_det.training.processes.stopping import StopRequest

logger = logging.getLogger(__name__)


def run(engine_name: str, loaded: LoadedConfig, options: RunOptions) -> dict[str, float]:
    """Train and evaluate, or evaluate alone, as ``loaded`` says.

    Called in each process of a run, with or without a process group.

    Args:
        engine_name: see :func:`~zenith_det.engines.engine.load_engine`.

    Returns:
        Scalars of the last evaluation (``bbox/AP``, percent; one without ground truth is left out); empty on all
        ranks but the main one.

    Raises:
        UserError: anything the user can mend, in one line.
    """
    engine = load_engine(engine_name)
    settle_files(loaded)
    resolve_device(loaded)
    engine.prepare(loaded)
    if not options.eval_only:
        check_augmentations(loaded)
    output_dir = prepare_output_dir(loaded.cfg.OUTPUT_DIR)
    with OutputLock(output_dir):
        setup_logging(output_dir, get_rank(), more=engine.loggers)
        undo_unfinished_move(output_dir)
        if is_main_process():
            if options.resume:
                forget_pending(output_dir)
            elif not options.eval_only and restart_count() == 0:
                announce_run(output_dir)
        try:
            barrier()
            find_sets_again(output_dir)
            hold_out(loaded, output_dir, resume=options.resume or options.eval_only)
            if get_world_size() > 1:
                logger.info(process_line())
            apply_torch_settings(loaded.cfg)
            if options.eval_only:
                return evaluate_only(engine, loaded, options, output_dir)
            return train(engine, loaded, options, output_dir)
        finally:
            # A process that torchrun starts in this one's place has to know that this run had not begun.
            if is_main_process() and not would_be_restarted():
                forget_pending(output_dir)


# ---- training


def train(engine: Engine, loaded: LoadedConfig, options: RunOptions, output_dir: Path) -> dict[str, float]:
    """Train to the end, evaluating and saving on the way; then draw the curves and predictions.

    Raises:
        RunStopped: a signal or the deadline ended it before; everything is saved.
        TrainingDivergedError: it went wrong, and going back did not help.
        UnexpectedResultsError: the last evaluation is not what ``TEST.EXPECTED_RESULTS`` says.
    """
    cfg = loaded.cfg
    description = DataDescription(cfg)
    training_set = engine.training_set(loaded, description)
    metadata = training_set.metadata
    if metadata is not None:
        warn_of_sides_in_mirrored_images(cfg, metadata)
    with reading_test_sets(cfg):
        test_sets = engine.test_sets(loaded, metadata.thing_classes if metadata else None)
    for one in test_sets:
        if one.dataset is not None:
            description.add(one.dataset, training=False)
    description.tell()
    if options.epochs is not None:
        iterations = math.ceil(options.epochs * len(training_set.records) / cfg.SOLVER.IMS_PER_BATCH)
        loaded.override("SOLVER.MAX_ITER", iterations, "--epochs")
    check_batch(cfg)
    checkpointer = Checkpointer(output_dir, keep=cfg.CHECKPOINT.KEEP or None)
    run_id, start = find_start(checkpointer, resume=options.resume)
    check_engine(engine, start)
    with StopRequest(options.deadline, main=is_main_process()):
        curve = set_base_lr(loaded, start, output_dir, lambda copy: lr_probe(engine, copy))
    seed = int(start.state["seed"]) if start else choose_seed(cfg.SEED)
    recovery = Recovery.of(cfg, start.state.get("recovery") if start else None)
    run_facts: dict[str, Any] = {
        "engine": engine.name,
        "batch_size": cfg.SOLVER.IMS_PER_BATCH,
        "processes": get_world_size(),
        "run_id": run_id,
        "config": config_facts(cfg),
        TRAINING_SET: fingerprint(training_set.records),
    }
    if metadata is not None:
        # Enough to use the model without its training set.
        run_facts["dataset"] = metadata.to_dict()
    check_same_on_all_ranks(
        {
            key: value
            for key, value in run_facts["config"].items()
            if key not in ("MODEL.DEVICE", "OUTPUT_DIR")
        }
        | versions()
        | {
            TRAINING_SET: run_facts[TRAINING_SET],
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
            training_set=(start.state.get(TRAINING_SET), run_facts[TRAINING_SET]),
        )
    evaluator = Evaluator(engine, test_sets, output_dir, metadata)
    with StopRequest(options.deadline, main=is_main_process()) as stop:

        def begin() -> None:
            give_way(output_dir, weights=cfg.MODEL.WEIGHTS)
            if is_main_process():
                remove_left_overs(output_dir)
                write_config(output_dir, cfg)
                description.keep(output_dir)
                if curve is not None:
                    write_whole(output_dir / CURVE_FILE, curve)

        while True:
            progress = start_progress(cfg, start, seed, run_facts | {"recovery": recovery.to_dict()})
            attempt = Attempt(
                engine, recovery.scaled(cfg), training_set, evaluator, progress, checkpointer, start
            )
            try:
                scalars = attempt.train(stop, begin)
                break
            except Diverged as divergence:
                path, recovery = roll_back(
                    divergence, recovery, cfg, checkpointer, lambda: checkpointer.newest_good(run_id)
                )
            del attempt
            start = Start.load(path) if path else None
            gc.collect()  # the model and the loader's processes of the abandoned attempt
    if is_main_process():
        draw(evaluator, cfg)
        check_expected(cfg.TEST.EXPECTED_RESULTS, scalars)
    return scalars


@dataclass
class Attempt:
    """Training from a checkpoint, or from the beginning, to the end: all of a run, unless it diverges.

    Attributes:
        cfg: with the learning rate that counts now.
        progress: where it starts.
        start: the checkpoint; ``None``: the beginning.
    """

    engine: Engine
    cfg: CfgNode
    data: TrainingSet
    evaluator: Evaluator
    progress: Progress
    checkpointer: Checkpointer
    start: Start | None

    def train(self, stop: StopRequest, begin: Callable[[], None]) -> dict[str, float]:
        """The scalars of the last evaluation.

        Args:
            begin: called when nothing of the user's can be wrong any more, and nothing has been written.

        Raises:
            Diverged, RunStopped: see :meth:`Trainer.train`.
        """
        trainer = self.make_trainer()
        if self.start is not None:
            resume(trainer, self.start)
        evaluate_first = self.start is not None and self._evaluation_missing() and trainer.evaluation_due()
        begin()
        if is_main_process():
            trainer.write_to(
                build_writers(self.cfg, self.checkpointer.output_dir, self.progress, len(self.data.records))
            )
        with self.engine.recording(trainer.storage):
            return trainer.train(stop, evaluate_first=evaluate_first)

    def make_trainer(self) -> Trainer:
        """The trainer of a model as it is before the first iteration."""
        cfg, engine, progress = self.cfg, self.engine, self.progress
        output_dir = self.checkpointer.output_dir
        if is_main_process():
            check_loggers(cfg)
        parts = build_parts(engine, cfg, progress.seed, load_weights=self.start is None)
        model = parts.model
        average = WeightAverage.of(cfg, model)
        if get_world_size() > 1:
            model = data_parallel(model, None if cfg.MODEL.DEVICE == "cpu" else get_local_rank())
            settle_buckets(model)
        main = is_main_process()
        batches = self.batches(progress.images_seen // cfg.SOLVER.IMS_PER_BATCH)
        if main and self.start is None and not progress.facts["recovery"]["rollbacks"]:
            batches = pictured(batches, engine, cfg, self.data.metadata, output_dir)

        def evaluate(should_stop: Callable[[], int], averaged: bool) -> dict[str, float]:
            if averaged and self.evaluator.test_sets:
                logger.info("with averaged weights (SOLVER.AVERAGE.KIND %s):", cfg.SOLVER.AVERAGE.KIND)
            return self.evaluator(
                cfg,
                unwrap(model),
                averaged=averaged,
                iteration=progress.iteration - 1,
                seed=progress.seed,
                weights=parts.weights,
                should_stop=should_stop,
            )

        def evaluate_with_tta(should_stop: Callable[[], int], averaged: bool) -> dict[str, float]:
            return self.evaluator.with_tta(cfg, unwrap(model), averaged=averaged, should_stop=should_stop)

        return Trainer(
            cfg,
            model,
            parts.optimizer,
            parts.scheduler,
            Prefetcher(batches, torch.device(cfg.MODEL.DEVICE)),
            progress,
            self.checkpointer,
            BestCheckpoint(
                self.checkpointer,
                cfg.CHECKPOINT.BEST if main else "",
                resumed=self.start is not None or progress.facts["recovery"]["rollbacks"] > 0,
            ),
            evaluate,
            average,
            Evaluations(cfg, output_dir, progress.iteration) if main else None,
            before_evaluation=lambda: engine.before_evaluation(cfg, model, lambda: self.batches(0)),
            at_the_end=evaluate_with_tta if cfg.TEST.AUG.ENABLED else None,
        )

    def batches(self, start: int) -> Iterator[Batch]:
        """This rank's training batches from number ``start`` on."""
        return train_batches(self.engine, self.cfg, self.data, seed=self.progress.seed, start=start)

    def _evaluation_missing(self) -> bool:
        # A run that had ended already evaluates nothing by itself, and there would be nothing to compare.
        wanted = len(self.cfg.TEST.EXPECTED_RESULTS) > 0
        done = is_main_process() and self._evaluated()
        return wanted or broadcast_object(is_main_process() and not done)

    def _evaluated(self) -> bool:
        folder, iteration = self.checkpointer.output_dir, self.progress.iteration
        with_tta = self.cfg.TEST.AUG.ENABLED and iteration >= self.cfg.SOLVER.MAX_ITER
        return evaluated(folder, iteration) and (not with_tta or evaluated(folder, iteration, tta=True))


def check_augmentations(loaded: LoadedConfig) -> None:
    """Refuse ``INPUT.AUGMENTATIONS`` that can't be used, before anything is read or written."""
    entries = loaded.cfg.INPUT.AUGMENTATIONS
    if not entries:
        return
    from zenith_det.engines.augmentation import KEY, Augmentations  # it imports torchvision

    try:
        Augmentations(entries, loaded.cfg.INPUT.FORMAT)
    except ConfigError as error:
        raise ConfigError(
            f"{loaded.sources[KEY]}: {error}" if KEY in loaded.sources else str(error)
        ) from error


def check_engine(engine: Engine, start: Start | None) -> None:
    """Refuse to go on with another engine's checkpoint: the same weights have other names there."""
    before = start.state.get("engine", engine.name) if start else engine.name
    if start and before != engine.name:
        raise CheckpointError(
            f"{start.path} is a checkpoint of the {before} engine: go on with --engine {before}, or convert it "
            "with tools/convert_checkpoint.py and give it as MODEL.WEIGHTS of a new run"
        )


def start_progress(cfg: CfgNode, start: Start | None, seed: int, facts: dict[str, Any]) -> Progress:
    """Where an attempt starts. In another batch size it goes on after the images seen, rounded
    down to whole batches: a few come twice rather than never."""
    if start is None:
        return Progress(0, seed, 0, facts)
    batch = cfg.SOLVER.IMS_PER_BATCH
    seen = start.state.get("images_seen", start.iteration * start.state.get("batch_size", batch))
    return Progress(start.iteration, seed, int(seen) // batch * batch, facts)


def resume(trainer: Trainer, start: Start) -> None:
    """Put a checkpoint's state into a trainer built from the present configuration, which wins.

    ``start`` is empty afterwards: a copy of the weights would take memory as long as the run lasts.

    Raises:
        CheckpointError: it is of another model or optimizer.
    """
    before = start.state.get("config", {}).get("SOLVER.OPTIMIZER", trainer.cfg.SOLVER.OPTIMIZER)
    now = trainer.cfg.SOLVER.OPTIMIZER
    with loading_state(trainer.optimizer, str(start.path)):
        trainer.load(start.state, str(start.path), optimizer=shares_state(before, now))
    batch = start.state.get("batch_size", trainer.cfg.SOLVER.IMS_PER_BATCH)
    keep = trainer.cfg.SOLVER.ZENITH.KEEP_HISTORY
    forget_history(trainer.optimizer, batch, trainer.cfg.SOLVER.IMS_PER_BATCH, keep=keep)
    start.state.clear()


def build_writers(cfg: CfgNode, output_dir: Path, progress: Progress, num_images: int) -> list[Writer]:
    """Progress on the console, TensorBoard events, what ``LOGGERS`` names, and ``metrics.json``."""
    return [
        ConsoleWriter(
            cfg.SOLVER.MAX_ITER,
            start_iter=progress.iteration,
            iters_per_epoch=num_images / cfg.SOLVER.IMS_PER_BATCH,
            batch_size=cfg.SOLVER.IMS_PER_BATCH,
        ),
        TensorBoardWriter(output_dir, start_iter=progress.iteration),
        *build_loggers(cfg, output_dir),
        # The last: an evaluation that it has is not done again when a run that was killed here is resumed.
        JsonWriter(output_dir / "metrics.json", start_iter=progress.iteration),
    ]


# ---- evaluation and pictures


def evaluate_only(
    engine: Engine, loaded: LoadedConfig, options: RunOptions, output_dir: Path
) -> dict[str, float]:
    """Evaluate ``MODEL.WEIGHTS`` (with ``--resume``: the newest checkpoint of ``OUTPUT_DIR``) on the test sets.

    Raises:
        ConfigError: no weights or no test set.
        UnexpectedResultsError: the evaluation is not what ``TEST.EXPECTED_RESULTS`` says.
    """
    cfg = loaded.cfg
    if options.resume:
        newest = broadcast_object(Checkpointer(output_dir).last() if is_main_process() else None)
        if newest is not None:
            loaded.override("MODEL.WEIGHTS", str(newest), "--resume")
    weights = cfg.MODEL.WEIGHTS
    if not weights:
        raise ConfigError(
            f"--eval-only needs MODEL.WEIGHTS: add MODEL.WEIGHTS OUTPUT_DIR/{averaging.result_file(cfg)}"
        )
    remembered = remembered_classes(weights)
    test_sets = engine.test_sets(loaded, remembered.thing_classes if remembered else None)
    if not test_sets:
        raise ConfigError("DATASETS.TEST is empty: name a dataset, or give --val-json and --val-images")
    first = test_sets[0].metadata
    if metadata := remembered or first:
        follow_dataset(
            loaded,
            metadata.name,
            metadata.num_classes,
            metadata.num_keypoints,
            first.keypoint_oks_sigmas if first else (),
        )
    model = engine.build_model(cfg)
    counts = engine.load_weights(cfg, model, require_all=True)
    model.eval()
    evaluator = Evaluator(engine, test_sets, output_dir, remembered)
    scalars = evaluator(cfg, model, averaged=averaging.is_averaged(weights), file=weights, weights=counts)
    if cfg.TEST.AUG.ENABLED:
        scalars |= evaluator.with_tta(cfg, model)
    if is_main_process():
        draw(evaluator, cfg)
        check_expected(cfg.TEST.EXPECTED_RESULTS, scalars)
    return scalars


def draw(evaluator: Evaluator, cfg: CfgNode) -> None:
    """The run's curves, its last evaluation's predictions, and the score to keep them from; the run is done without."""
    dataset = evaluator.test_sets[0].dataset if evaluator.results is not None else None
    score = evaluator.recommend(cfg)
    try:
        draw_run(evaluator.output_dir, dataset, evaluator.results or [], cfg.TEST.MAX_IMAGES, score)
    except UserError as error:
        logger.warning("not all pictures are drawn: %s", error)
