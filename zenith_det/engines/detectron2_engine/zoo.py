"""ZENITH under any config: of one's own, or of Detectron2's model zoo."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from zenith_det.config import LoadedConfig, load_config
from zenith_det.config.node import COMMAND_LINE

#: What a step schedule needs and ZENITH does not.
SCHEDULE_KEYS = ("SOLVER.STEPS", "SOLVER.GAMMA", "SOLVER.NUM_DECAYS", "SOLVER.BASE_LR_END")


def load_config_file(name: str, opts: Sequence[Any] = (), *, zenith: bool = False) -> LoadedConfig:
    """Load a config file by path or name, as :func:`zenith_det.config.load_config` does, and put ZENITH under it.

    Args:
        name: "" for the defaults alone.
        opts: ``["SOLVER.MAX_ITER", "1000", …]``.
        zenith: put ZENITH under it: see :func:`put_zenith_under`.

    Raises:
        ConfigError: a file, key or value that cannot be used.
    """
    loaded = load_config(name or None, opts)
    if zenith:
        put_zenith_under(loaded)
    return loaded


def put_zenith_under(loaded: LoadedConfig) -> None:
    """Train this configuration with ZENITH: warm-up, then the LR that the gradient norms give.

    Sets the optimizer and the LR schedule and drops the keys of a schedule that would otherwise multiply
    with ZENITH (``STEPS``, ``GAMMA`` …). Everything else stays: BASE_LR, momentum, weight decay, warm-up,
    MAX_ITER. A schedule named on the command line stays too: it was asked for.
    """
    source = "--zenith"
    if loaded.sources.get("SOLVER.OPTIMIZER") != COMMAND_LINE:
        loaded.override("SOLVER.OPTIMIZER", "ZENITH", source=source)
    if loaded.sources.get("SOLVER.LR_SCHEDULER_NAME") == COMMAND_LINE:
        return
    loaded.override("SOLVER.LR_SCHEDULER_NAME", "WarmupZenithLR", source=source)
    typed = loaded.sources.get("SOLVER.STEPS")
    loaded.override("SOLVER.STEPS", (), source=typed or source)
    for key in SCHEDULE_KEYS:
        # A file's schedule is gone; one typed on the command line is still to be reported as unused.
        if loaded.sources.get(key) != COMMAND_LINE:
            loaded.sources.pop(key, None)
