"""What a run leaves and says about itself when it starts."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import secrets
import tempfile
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from zenith_det.config import zenith_unused_keys
from zenith_det.config.metric_names import is_evaluated
from zenith_det.config.optimizer_names import ZENITH_OPTIMIZERS
from zenith_det.errors import UserError
from zenith_det.files import LEFT_OVERS, write_whole
from zenith_det.training.checkpoints import averaging
from zenith_det.training.course.metrics_file import read_metrics

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.yaml"
#: For whoever opens it because Detectron2 doesn't know a key of ours.
CONFIG_HEADING = (
    "# In a Detectron2 script: zenith_det.add_zenith_config(cfg) before cfg.merge_from_file(this file)\n"
)
RUN_ID_FILE = "run_id"
_LEFT_OVER = re.compile(r"\..+\.\d+\.tmp")
#: The name of a new run that has not begun to train.
PENDING_ID_FILE = "run_id.pending"
# Their LR after the warm-up is BASE_LR; the others lower it within the run, the warm-up included.
_CONSTANT_SCHEDULES = ("WarmupZenithLR", "WarmupConstantLR", "WarmupPlateauLR")


def prepare_output_dir(output_dir: str | os.PathLike[str]) -> Path:
    """Make the directory of a run and see that files can be written there.

    Raises:
        UserError: it has no name, or cannot be made or written to.
    """
    if not os.fspath(output_dir).strip():
        raise UserError("OUTPUT_DIR is empty: give a folder for the run's files")
    path = Path(output_dir)
    try:
        path.mkdir(parents=True, exist_ok=True)
        # Permission bits don't tell on every file system, and nothing of a full disk: try.
        with tempfile.TemporaryFile(dir=path) as file:
            file.write(b"\0")
    except OSError as error:
        raise UserError(
            f"OUTPUT_DIR {path}: cannot be written: {error.strerror or error}; choose another OUTPUT_DIR"
        ) from error
    return path


def remove_left_overs(output_dir: Path) -> None:
    """Clear what a run that was killed has left of a file that it was writing; nobody else writes here."""
    of_evaluations = (output_dir / name for name in ("inference", averaging.FOLDER))
    pattern = LEFT_OVERS.format("*")
    for path in (*output_dir.glob(pattern), *chain.from_iterable(f.rglob(pattern) for f in of_evaluations)):
        if _LEFT_OVER.fullmatch(path.name):
            with contextlib.suppress(OSError):
                path.unlink()


def write_config(output_dir: str | os.PathLike[str], cfg: Any) -> Path:
    """Write the whole configuration (``cfg.dump()``) to ``config.yaml``, whole or not at all.

    Raises:
        UserError: it cannot be written.
    """
    return write_whole(Path(output_dir) / CONFIG_FILE, CONFIG_HEADING + cfg.dump())


def announce_run(output_dir: str | os.PathLike[str]) -> None:
    """A new run is to begin here: its name is in ``run_id.pending`` until it trains, and an earlier one's stays.

    Raises:
        UserError: it cannot be written.
    """
    write_whole(Path(output_dir) / PENDING_ID_FILE, secrets.token_hex(8))


def run_name(output_dir: str | os.PathLike[str]) -> tuple[str, bool]:
    """The name that this run's checkpoints carry, to tell them from those of earlier runs in the same place.

    Returns:
        The name of an announced run and true; else that in the file ``run_id``, made where it isn't, and false.

    Raises:
        UserError: it cannot be read or written.
    """
    for name, announced in ((PENDING_ID_FILE, True), (RUN_ID_FILE, False)):
        path = Path(output_dir) / name
        try:
            if path.exists():
                return path.read_text(encoding="utf-8", errors="replace").strip()[:64], announced
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    run_id = secrets.token_hex(8)
    write_whole(path, run_id)
    return run_id, False


def forget_pending(output_dir: str | os.PathLike[str]) -> None:
    """A run that was to begin here doesn't."""
    with contextlib.suppress(OSError):
        (Path(output_dir) / PENDING_ID_FILE).unlink()


def evaluated(output_dir: str | os.PathLike[str], done: int, *, tta: bool = False) -> bool:
    """Whether ``metrics.json`` has an evaluation of the model as it was after ``done`` iterations.

    Args:
        tta: one with test-time augmentation.
    """
    try:
        metrics = read_metrics(Path(output_dir))
    except UserError:
        return False
    return any(
        is_evaluated(name, tta=tta) and bool({done - 1, done} & set(series.iterations.tolist()))
        for name, series in metrics.items()
    )


def start_line(cfg: Any, *, num_images: int, start_iter: int = 0, num_processes: int = 1) -> str:
    """The line that says what is about to happen.

    Args:
        cfg: the configuration that the run trains with, scaled and resolved.
        num_images: that are trained on (after images without objects are left out).
        start_iter: where a resumed run goes on.
        num_processes: over all machines.

    Example: ``5000 images, batch 16, 90000 iterations = 288 epochs, ZENITH: eta0 = 0.02, window = 100,
    device cuda``.
    """
    solver = cfg.SOLVER
    batch, accumulation = solver.IMS_PER_BATCH, solver.GRADIENT_ACCUMULATION
    epochs = solver.MAX_ITER * batch / num_images if num_images else 0.0
    parts = [
        f"{num_images} images",
        f"batch {batch}"
        + (f" (over {num_processes} processes)" if num_processes > 1 else "")
        + (f" ({accumulation} x {batch / accumulation:g})" if accumulation > 1 else ""),
        f"{solver.MAX_ITER} iterations = {epochs:.4g} epochs",
        *([f"from iteration {start_iter}"] if start_iter else []),
        f"{solver.OPTIMIZER}: eta0 = {solver.BASE_LR:g}",
        *([f"window = {solver.ZENITH.WINDOW}"] if solver.OPTIMIZER in ZENITH_OPTIMIZERS else []),
        f"device {cfg.MODEL.DEVICE}",
    ]
    return ", ".join(parts)


def short_run_lines(cfg: Any, *, zenith: bool | None = None) -> list[str]:
    """What a run is too short for: a warm-up that it never leaves, a ratio of ZENITH that never changes.

    Args:
        cfg: the configuration that the run trains with, ``SOLVER.MAX_ITER`` final.
        zenith: the optimizer has ZENITH's ratio; ``None``: as ``SOLVER.OPTIMIZER`` says.
    """
    if zenith is None:
        zenith = cfg.SOLVER.OPTIMIZER in ZENITH_OPTIMIZERS
    solver = cfg.SOLVER
    length, warmup, name = solver.MAX_ITER, solver.WARMUP_ITERS, solver.LR_SCHEDULER_NAME
    lines = []
    if 0 < length <= warmup and name.startswith("Warmup"):
        reached = "never gets to SOLVER.BASE_LR"
        if name in _CONSTANT_SCHEDULES:
            rise = (length - 1) / warmup if solver.WARMUP_METHOD == "linear" else 0.0
            factor = solver.WARMUP_FACTOR + (1 - solver.WARMUP_FACTOR) * rise
            reached = f"ends at {factor:.3g} of SOLVER.BASE_LR"
        lines.append(
            f"the run's {length} iterations don't leave the warm-up of SOLVER.WARMUP_ITERS {warmup}, and the LR "
            f"{reached}: set SOLVER.WARMUP_ITERS to about {_part(length, 10)}, or train longer"
        )
    window, record_after = solver.ZENITH.WINDOW, solver.ZENITH.RECORD_AFTER
    # Where the window is full for the first time, its mean is the zenith: the ratio is 1 in that iteration, too.
    if zenith and 0 < length <= record_after + window:
        after = f" after SOLVER.ZENITH.RECORD_AFTER {record_after}" if record_after else ""
        lower = "SOLVER.ZENITH.RECORD_AFTER lower and " if record_after else ""
        lines.append(
            f"ZENITH's ratio is 1 in all of the run's {length} iterations, as it may fall only once "
            f"SOLVER.ZENITH.WINDOW {window} norms are recorded{after}: set {lower}SOLVER.ZENITH.WINDOW to "
            f"about {_part(length, 4)}, or train longer"
        )
    return lines


def _part(length: int, parts: int) -> int:
    return min(max(1, length // parts), max(1, length - 1))


def log_start(
    cfg: Any, sources: Mapping[str, str], *, num_images: int, start_iter: int, num_processes: int
) -> None:
    """Log :func:`start_line` for a run of ``cfg``, and warnings: keys set in vain, :func:`short_run_lines`, or that
    a resumed run is at its end already.

    Args:
        cfg: the configuration that the run trains with, scaled and resolved.
        sources: :attr:`LoadedConfig.sources <zenith_det.config.LoadedConfig>`.
        num_images: see :func:`start_line`, as for the others.
    """
    logger.info(start_line(cfg, num_images=num_images, start_iter=start_iter, num_processes=num_processes))
    solver = cfg.SOLVER
    if unused := zenith_unused_keys(sources, cfg):
        listed = ", ".join(f"{key} (from {source})" for key, source in unused)
        logger.warning("not used under %s with %s: %s", solver.OPTIMIZER, solver.LR_SCHEDULER_NAME, listed)
    if start_iter >= solver.MAX_ITER > 0:
        logger.warning(
            "the run has reached its end, SOLVER.MAX_ITER %d: nothing is left to train; to go on, --resume with more "
            "--epochs, or a higher SOLVER.MAX_ITER",
            solver.MAX_ITER,
        )
        return
    for line in short_run_lines(cfg):
        logger.warning(line)
