"""What an earlier run left in the folder of a new one: a mistake changes nothing of it, a run replaces none of it."""

from __future__ import annotations

import logging
import os
import shutil
from itertools import count
from pathlib import Path

from zenith_det.data.statistics import STATISTICS_FILE
from zenith_det.errors import UserError
from zenith_det.training.checkpoints import averaging
from zenith_det.training.checkpoints.checkpoint import LAST_FILE, SUFFIX
from zenith_det.training.course.run_record import CONFIG_FILE, PENDING_ID_FILE, RUN_ID_FILE
from zenith_det.training.logs.loggers import ID_FILES
from zenith_det.training.processes.distributed import is_main_process

logger = logging.getLogger(__name__)

FOLDER = "earlier_run_{}"
#: Of the folder's name while files are on their way into it.
_MOVING = ".moving"
_MODELS = f"model_*{SUFFIX}"
#: What says that a run has begun here.
_EVIDENCE = (_MODELS, RUN_ID_FILE, "metrics.json")
#: All that is of one run. ``log.txt`` goes on: it is the folder's diary.
_OF_A_RUN = (
    *_EVIDENCE, LAST_FILE, CONFIG_FILE, STATISTICS_FILE, "metrics.superseded.json", "bad_steps.jsonl",
    "events.out.tfevents.*", *ID_FILES, averaging.FOLDER, "inference", "inference_TTA", "curves.png",
    "predictions.png", "train_batch.png", "lr_range_test.png", "report.html",
)  # fmt: skip


def undo_unfinished_move(output_dir: Path) -> None:
    """Put back what a process that was killed had begun to move aside; by the main process, before anything is read.

    Raises:
        UserError: it can't be moved.
    """
    if not is_main_process():
        return
    for aside in output_dir.glob(FOLDER.format("*") + _MOVING):
        try:
            for path in list(aside.iterdir()):
                os.replace(path, output_dir / path.name)
            aside.rmdir()
        except OSError as error:
            raise UserError(
                f"{aside} holds an earlier run of {output_dir}, which can't be moved back: {error.strerror or error}"
            ) from error
        logger.info("%s: what had begun to be moved aside is back", output_dir)


def give_way(output_dir: Path, weights: str = "") -> None:
    """The run begins to train: if it is a new one, what an earlier one left is moved to a folder beside.

    The main process alone acts. Killed on the way, it has moved nothing: see :func:`undo_unfinished_move`. Of no
    effect in a run that goes on, nor when called again.

    Args:
        output_dir: of the run; a new one, if :func:`~zenith_det.training.course.run_record.announce_run` said so.
        weights: a file that may be needed where it is; it is copied.

    Raises:
        UserError: they can't be moved.
    """
    pending = output_dir / PENDING_ID_FILE
    if not is_main_process() or not pending.exists():
        return
    try:
        if any(_found(output_dir, _EVIDENCE)):
            _move_aside(output_dir, weights)
        os.replace(pending, output_dir / RUN_ID_FILE)
    except OSError as error:
        raise UserError(
            f"{output_dir} holds an earlier run, which can't be moved aside: {error.strerror or error}; choose another "
            "OUTPUT_DIR"
        ) from error


def _move_aside(output_dir: Path, weights: str) -> None:
    models = len(_found(output_dir, (_MODELS,)))
    aside = next(path for n in count(1) if not (path := output_dir / FOLDER.format(n)).exists())
    moving = aside.with_name(aside.name + _MOVING)
    moving.mkdir()
    for path in _found(output_dir, _OF_A_RUN):
        if weights and os.path.realpath(weights) == os.path.realpath(path):
            shutil.copy2(path, moving)
        else:
            os.replace(path, moving / path.name)
    os.replace(moving, aside)
    if models:
        logger.warning(
            "%s held an earlier run, which --resume would have gone on with: its %d checkpoints are in %s now",
            output_dir, models, aside,
        )  # fmt: skip
    else:
        logger.warning(
            "%s held what an earlier run had left, without a checkpoint: it is in %s now", output_dir, aside
        )


def _found(output_dir: Path, patterns: tuple[str, ...]) -> list[Path]:
    return sorted({path for pattern in patterns for path in output_dir.glob(pattern)})
