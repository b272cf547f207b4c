"""Checkpoints in a project's own trainer, by whatever checkpointer it has: which are kept, and which saved beside."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from detectron2.engine import HookBase, hooks
from detectron2.utils import comm

from zenith_det.training.checkpoints.checkpoint import Checkpointer


@contextlib.contextmanager
def beside(checkpointer: Any, *, weights_only: bool = False) -> Iterator[None]:
    """Inside, ``checkpointer.save`` leaves ``last_checkpoint`` as it is.

    Args:
        checkpointer: fvcore's ``Checkpointer``, or one derived from it.
        weights_only: the model is all that is saved, without optimizer and hooks.
    """
    kept = checkpointer.checkpointables
    checkpointer.tag_last_checkpoint = lambda name: None
    if weights_only:
        checkpointer.checkpointables = {}
    try:
        yield
    finally:
        checkpointer.checkpointables = kept
        del checkpointer.tag_last_checkpoint


class KeepNewest(HookBase):
    """``CHECKPOINT.KEEP``: remove older periodic checkpoints. Register it after what saves them.

    Args:
        keep: how many.
        guard: the hook whose good checkpoint stays, to go back to.
    """

    def __init__(self, keep: int, guard: Any) -> None:
        self._keep = keep
        self._guard = guard

    def after_step(self) -> None:
        saves = any(
            (self.trainer.iter + 1) % hook.period == 0
            for hook in self.trainer._hooks
            if isinstance(hook, hooks.PeriodicCheckpointer)
        )
        if saves and comm.is_main_process():
            self._guard.note_saved()
            checkpointer = self.trainer.checkpointer
            Checkpointer(checkpointer.save_dir, keep=self._keep).remove_old(
                Path(checkpointer.get_checkpoint_file()), {self._guard.guard.last_good}
            )
