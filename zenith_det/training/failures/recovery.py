"""Going back to the last good checkpoint with a smaller learning rate, when training has diverged."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from zenith_det.errors import TrainingDivergedError
from zenith_det.training.checkpoints.checkpoint import Checkpointer
from zenith_det.training.failures.bad_steps import FILE_NAME, note_event
from zenith_det.training.processes.distributed import broadcast_object, is_main_process

logger = logging.getLogger(__name__)

ADVICE = "lower SOLVER.BASE_LR, lengthen SOLVER.WARMUP_ITERS, or set SOLVER.CLIP_GRADIENTS.ENABLED True"


class Diverged(Exception):
    """Training can't go on from where it is; raised on all ranks at the same iteration.

    Args:
        iteration: the last one done.
        reason: one line.
        lr: the last update's learning rate.
    """

    def __init__(self, iteration: int, reason: str, lr: float) -> None:
        super().__init__(reason)
        self.iteration, self.reason, self.lr = iteration, reason, lr


@dataclass(frozen=True)
class Recovery:
    """What earlier divergences have led to; kept in each checkpoint.

    Attributes:
        rollbacks: how often the run went back.
        lr_scale: what ``SOLVER.BASE_LR`` is multiplied by since.
        base_lr: the ``SOLVER.BASE_LR`` that it was found too large for. Another one in a resumed run is
            somebody's decision, and starts again.
    """

    rollbacks: int = 0
    lr_scale: float = 1.0
    base_lr: float = 0.0

    @staticmethod
    def of(cfg: Any, saved: Mapping[str, Any] | None = None) -> Recovery:
        """For a new run of ``cfg``, or one that goes on from what a checkpoint has saved."""
        base_lr = float(cfg.SOLVER.BASE_LR)
        if saved and saved["rollbacks"]:
            if saved["base_lr"] == base_lr:
                return Recovery(**saved)
            logger.info(
                "SOLVER.BASE_LR is %g now, was %g: it counts as it is, without the factor %g of earlier roll-backs",
                base_lr, saved["base_lr"], saved["lr_scale"],
            )  # fmt: skip
        return Recovery(base_lr=base_lr)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return asdict(self)

    def scaled(self, cfg: Any) -> Any:
        """A copy of ``cfg`` (frozen if it is) with the learning rates that count now; ``cfg`` itself if unchanged."""
        if self.lr_scale == 1.0:
            return cfg
        frozen = cfg.is_frozen()
        copy = cfg.clone()
        copy.defrost()
        copy.SOLVER.BASE_LR = cfg.SOLVER.BASE_LR * self.lr_scale
        copy.SOLVER.BASE_LR_END = cfg.SOLVER.BASE_LR_END * self.lr_scale
        if frozen:
            copy.freeze()
        return copy


def roll_back(
    divergence: Diverged,
    recovery: Recovery,
    cfg: Any,
    checkpointer: Checkpointer,
    newest_good: Callable[[], Path | None],
) -> tuple[Path | None, Recovery]:
    """Where a diverged run goes on, and with which learning rate; all ranks call it together.

    The log and ``bad_steps.jsonl`` tell of it.

    Args:
        cfg: ``RECOVERY.MAX_ROLLBACKS`` and ``RECOVERY.LR_FACTOR`` count.
        checkpointer: of the run.
        newest_good: gives the newest checkpoint that was saved while training went well; ``None``: there is none.

    Returns:
        The checkpoint to go on from (``None``: from the very beginning), and the new state.

    Raises:
        TrainingDivergedError: no more going back; the line says what was tried and what to do.
    """
    limit, factor = int(cfg.RECOVERY.MAX_ROLLBACKS), float(cfg.RECOVERY.LR_FACTOR)
    where = f"iteration {divergence.iteration} (LR {divergence.lr:.4g})"
    if recovery.rollbacks >= limit:
        tried = (
            f"after {recovery.rollbacks} roll-backs with the LR down to {recovery.lr_scale:g} x SOLVER.BASE_LR"
            if recovery.rollbacks
            else "and RECOVERY.MAX_ROLLBACKS is 0"
        )
        raise TrainingDivergedError(
            f"training diverged at {where}: {divergence.reason}; {tried}: {ADVICE}; "
            f"see {checkpointer.output_dir / FILE_NAME}"
        )
    path: Path | None = broadcast_object(newest_good() if is_main_process() else None)
    if is_main_process():
        checkpointer.mark_last(path)
    changed = Recovery(recovery.rollbacks + 1, recovery.lr_scale * factor, recovery.base_lr)
    logger.warning(
        "training diverged at %s: %s; rolled back to %s with the LR at %g x SOLVER.BASE_LR (roll-back %d of %d)",
        where, divergence.reason, path.name if path else "the beginning", changed.lr_scale,
        changed.rollbacks, limit,
    )  # fmt: skip
    note_event(
        checkpointer.output_dir,
        "rolled back",
        iteration=divergence.iteration,
        reason=divergence.reason,
        to=str(path) if path else None,
        lr_scale=changed.lr_scale,
    )
    return path, changed
