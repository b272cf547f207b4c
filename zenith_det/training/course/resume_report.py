"""What became of each configuration key that differs between a checkpoint and the run that resumes it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from zenith_det.config.keys import leaves, plain
from zenith_det.config.optimizer_names import ZENITH_OPTIMIZERS
from zenith_det.training.course.resuming import scaled_lr, shares_state

logger = logging.getLogger(__name__)

#: The key of the training set's :func:`~zenith_det.training.processes.agreement.fingerprint` in a checkpoint.
TRAINING_SET = "the training set"


def config_facts(cfg: Any) -> dict[str, Any]:
    """Every key with its value, as a checkpoint keeps them: ``{"SOLVER.BASE_LR": 0.02, …}``."""
    return dict(leaves(cfg))


def outcome(
    key: str, saved: Mapping[str, Any], present: Mapping[str, Any], *, seed: int, iteration: int
) -> str:
    """``"applied"``, with what follows from it, or ``"can't be applied, because …"``.

    Args:
        key: one that has changed.
        saved: the checkpoint's configuration.
        present: the one that counts now.
        seed: the run's.
        iteration: where it goes on.
    """
    old, new = saved[key], present[key]
    if key.startswith("MODEL.WEIGHTS"):
        return "can't be applied, because a resumed run has its weights from the checkpoint"
    if key == "SEED":
        return f"can't be applied, because the order of the images goes on from the run's seed, {seed}"
    if key == "SOLVER.MAX_ITER":
        return (
            f"applied; {new - iteration} iterations to go"
            if new > iteration
            else "applied; nothing left to train"
        )
    if key == "SOLVER.IMS_PER_BATCH":
        scaled = scaled_lr(saved["SOLVER.BASE_LR"], old, new, present["SOLVER.OPTIMIZER"])
        text = (
            f"applied; the order of the images goes on. BASE_LR is {present['SOLVER.BASE_LR']:g}: the old one, "
            f"scaled with the batch, would be {scaled:g}"
        )
        if present["SOLVER.OPTIMIZER"] in ZENITH_OPTIMIZERS:
            spans = [config["SOLVER.ZENITH.WINDOW"] * size for config, size in ((present, new), (saved, old))]
            history = "is kept" if present["SOLVER.ZENITH.KEEP_HISTORY"] else "starts again"
            text += f". ZENITH's history {history}; its window spans {spans[0]} images now, {spans[1]} before"
        return text
    if key == "SOLVER.ZENITH.WINDOW":
        return f"applied; the newest {min(old, new)} norms are kept"
    if key == "SOLVER.OPTIMIZER":
        kept = shares_state(old, new)
        return "applied; momentum is kept" if kept else "applied; the optimizer's state starts again"
    if key.startswith("SOLVER.WARMUP") and iteration >= saved.get("SOLVER.WARMUP_ITERS", 0):
        return "applied; the earlier warm-up is over"
    if key.startswith("DATASETS.") and "TRAIN" in key:
        return "applied; with other images, their order starts again"
    return "applied"


def log_changes(
    saved: Mapping[str, Any] | None,
    cfg: Any,
    *,
    seed: int,
    iteration: int,
    processes: tuple[int, int],
    training_set: tuple[str | None, str] = (None, ""),
) -> None:
    """Log a table with a line per changed key; nothing when nothing has changed.

    Args:
        saved: the checkpoint's configuration; ``None``: it has none.
        cfg: the present one.
        processes: how many there were, and are.
        training_set: its fingerprint then, ``None`` where the checkpoint doesn't tell, and now.
    """
    before, now = training_set
    if before is not None and before != now:
        logger.warning(
            "the training set has changed since the checkpoint (%s; now %s): other images come from here on, and the "
            "run ends otherwise than one that was not stopped",
            before, now,
        )  # fmt: skip
    if saved is None:
        logger.info("the checkpoint doesn't hold its configuration: changed keys can't be told")
        return
    present = config_facts(cfg)
    # Keys that only one of them has count not.
    changed = [key for key in present if key in saved and plain(saved[key]) != plain(present[key])]
    rows = []
    for key in changed:
        became = outcome(key, saved, present, seed=seed, iteration=iteration)
        rows.append((key, _show(saved[key]), _show(present[key]), became))
    were, are = processes
    if were != are:
        became = f"applied; the batch stays {cfg.SOLVER.IMS_PER_BATCH} images, so LR and window stay; "
        became += "random choices differ"
        rows.append(("number of processes", str(were), str(are), became))
    if not rows:
        return
    head = ("key", "checkpoint", "now", "")
    wide = [max(len(row[i]) for row in [head, *rows]) for i in range(3)]
    lines = ["  ".join([*map(str.ljust, row, wide), row[3]]).rstrip() for row in [head, *rows]]
    logger.info("changed since the checkpoint:\n%s", "\n".join(lines))


def _show(value: Any, most: int = 40) -> str:
    text = repr(value)
    return text if len(text) <= most else text[: most - 1] + "…"
