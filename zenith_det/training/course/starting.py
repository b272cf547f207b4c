"""Where a run starts: at the beginning, or at a checkpoint of its own."""

from __future__ import annotations

import logging
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zenith_det.errors import CheckpointError
from zenith_det.training.checkpoints.checkpoint import Checkpointer
from zenith_det.training.checkpoints.reading import load_checkpoint
from zenith_det.training.course.run_record import run_name
from zenith_det.training.processes.distributed import broadcast_object, is_main_process, restart_count

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """A checkpoint to go on from.

    Attributes:
        path: the file.
        state: what it holds.
    """

    path: Path
    state: dict[str, Any]

    @property
    def iteration(self) -> int:
        """The next one."""
        return int(self.state["iteration"]) + 1

    @staticmethod
    def load(path: Path) -> Start:
        """Read it.

        Raises:
            CheckpointError: it can't be read, or is not one of a run.
        """
        state = _as_written_now(load_checkpoint(path))
        if "iteration" not in state or "optimizer" not in state:
            raise CheckpointError(
                f"{path}: weights without an optimizer, not a checkpoint of a run: give it as MODEL.WEIGHTS "
                "instead"
            )
        return Start(path, state)


def find_start(checkpointer: Checkpointer, *, resume: bool) -> tuple[str, Start | None]:
    """The run's name (see :func:`run_name`) and the checkpoint that it goes on from, on all ranks alike.

    A group of processes that torchrun has restarted goes on from its own run's newest checkpoint, whether
    ``--resume`` was given or not.

    Args:
        checkpointer: of the output directory.
        resume: ``--resume`` was given.

    Raises:
        CheckpointError: there are checkpoints, but none can be used.
    """
    restarted = restart_count() > 0
    found: tuple[str, Path | None] = ("", None)
    if is_main_process():
        run_id, anew = run_name(checkpointer.output_dir)
        found = (run_id, None if anew else checkpointer.last(None if resume else run_id))
    run_id, path = broadcast_object(found)
    if path is None:
        if resume or restarted:
            logger.info(
                "no checkpoint in %s to resume from: starting at iteration 0", checkpointer.output_dir
            )
        return run_id, None
    start = Start.load(path)
    logger.info("resuming from %s", path)
    return str(start.state.get("run_id", run_id)), start


def choose_seed(configured: int) -> int:
    """``SEED``, or where it is negative another one each time, the same on all ranks."""
    seed: int = configured if configured >= 0 else broadcast_object(secrets.randbits(31))
    return seed


def _as_written_now(state: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint in the layout of Detectron2's trainer, as runs on Detectron2 once had their own loop, in today's.

    The images were in another order then: they go on after as many in the present one.
    """
    try:
        trainer = state["trainer"]
        inner, hooks = trainer["_trainer"], trainer["hooks"]
        found = {"optimizer": inner["optimizer"], "scheduler": hooks["LRScheduler"]}
    except (KeyError, TypeError):
        return state
    if "grad_scaler" in inner:
        found["scaler"] = inner["grad_scaler"]
    order = hooks.get("DataOrder", {})
    if "images_seen" in order:
        found["images_seen"] = order["images_seen"]
    rest = {key: value for key, value in state.items() if key != "trainer"}
    return {"seed": order.get("seed", 0)} | rest | found
