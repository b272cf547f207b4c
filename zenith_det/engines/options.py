"""What an engine is told beside the configuration."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RunOptions:
    """What the command line says beside the configuration.

    Attributes:
        resume: go on from the newest checkpoint in ``OUTPUT_DIR``, if there is one.
        eval_only: evaluate ``MODEL.WEIGHTS`` and stop.
        epochs: length of the run in passes over the data; overrides ``SOLVER.MAX_ITER``.
        deadline: ``time.time()`` at which training must have been saved and ended; ``None``: no limit.
    """

    resume: bool = False
    eval_only: bool = False
    epochs: float | None = None
    deadline: float | None = None
