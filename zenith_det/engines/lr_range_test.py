"""η₀ from an LR range test (Smith, arXiv 1506.01186): a short training in which the LR grows until the loss does."""

from __future__ import annotations

import contextlib
import gc
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from zenith_det import cli
from zenith_det.config import LoadedConfig
from zenith_det.config.optimizer_names import ADAMW_OPTIMIZERS
from zenith_det.errors import ConfigError, RunStopped, UserError
from zenith_det.files import write_whole
from zenith_det.training.course.resuming import scaled_lr
from zenith_det.training.course.starting import Start
from zenith_det.training.processes.distributed import get_world_size
from zenith_det.training.processes.stopping import WaitStopped, describe_stop, stop_code

logger = logging.getLogger(__name__)

#: The curve of a run's range test, in its output directory.
CURVE_FILE = "lr_range_test.png"
ITERATIONS = 180
#: From the first LR to the last, for SGD and for AdamW.
SGD_LRS, ADAMW_LRS = (1e-4, 10.0), (1e-5, 1.0)
#: It ends where the loss is so many times the highest of the first ones; no loss counts for more in the curve.
_DIVERGED = 4.0
#: It goes round so many batches: what differs between images is then the same in every mean over a cycle.
CYCLE = 12
#: The part of its fall that the loss climbs back where the LR is too high.
CLIMB = 0.5
#: For so many iterations: a detector that has been ruined may lose less again for a while.
LASTING = CYCLE // 2
#: η₀ for SGD, as a part of that LR.
SHARE = 1 / 8
#: η₀ for AdamW: so many steps of it go as far as the test had gone when the loss had had this part of its fall.
STEPS, FALL = 10, 0.8
# A fall that counts: so many times the noise of the smoothed curve, and such a part of the loss.
_NOISE, _LEAST_FALL = 4.0, 0.03
_NEVER = 10**8


MakeProbe = Callable[[LoadedConfig], Callable[[float], float]]


class NoLRFoundError(UserError):
    """The curve of a range test shows no LR to choose."""


@dataclass(frozen=True)
class RangeTest:
    """The losses of a range test.

    Attributes:
        lrs: of each iteration, rising by a constant factor.
        losses: of each iteration's batch, before its step; the last may be NaN.
        broke_off: it ended before its last LR, since the loss had exploded.
        adamw: the steps were AdamW's.
    """

    lrs: npt.NDArray[np.float64]
    losses: npt.NDArray[np.float64]
    broke_off: bool
    adamw: bool = False


def set_base_lr(
    loaded: LoadedConfig, start: Start | None, output_dir: Path, make_probe: MakeProbe
) -> bytes | None:
    """Do what ``SOLVER.AUTO_LR`` asks for: put η₀ in its place.

    A new run tests. Where no LR is found the curve goes into ``OUTPUT_DIR`` at once. A resumed run keeps its own
    η₀; where ``SOLVER.IMS_PER_BATCH`` has changed, see :func:`~zenith_det.training.course.resuming.scaled_lr`.

    Args:
        loaded: with the device resolved; ``SOLVER.BASE_LR`` is set, ``AUTO_LR`` turned off.
        start: what the run goes on from.
        make_probe: see :func:`measure`.

    Returns:
        The curve as PNG, for :data:`CURVE_FILE` in ``OUTPUT_DIR`` once the run has begun; ``None`` without a test.

    Raises:
        ConfigError: in a run of several processes.
        NoLRFoundError: see :func:`choose`.
        RunStopped: see :func:`measure`.
    """
    solver = loaded.cfg.SOLVER
    curve: bytes | None = None
    if not solver.AUTO_LR:
        return curve
    saved = start.state.get("config", {}) if start else {}
    if "SOLVER.BASE_LR" in saved:
        before = int(saved.get("SOLVER.IMS_PER_BATCH", solver.IMS_PER_BATCH))
        lr = scaled_lr(float(saved["SOLVER.BASE_LR"]), before, solver.IMS_PER_BATCH, solver.OPTIMIZER)
        scaled = (
            ""
            if before == solver.IMS_PER_BATCH
            else f", for {solver.IMS_PER_BATCH} images a batch, was {before}"
        )
        logger.info("SOLVER.AUTO_LR: the run goes on with its eta0 = %g%s", lr, scaled)
    elif get_world_size() > 1:
        raise ConfigError(
            f"SOLVER.AUTO_LR tests in one process: run {cli.command('find-lr')} with this config on one device "
            f"(with SOLVER.GRADIENT_ACCUMULATION {get_world_size()} it takes the batch in parts), then give "
            "SOLVER.BASE_LR"
        )
    else:
        logger.info(
            "SOLVER.AUTO_LR: LR range test, up to %d iterations from %g to %g",
            ITERATIONS,
            *lrs_of(loaded),
        )
        test = measure(loaded, make_probe)
        choice, curve = draw(test, output_dir / CURVE_FILE)
        _heed_stop()
        lr = choice.lr
        logger.info("SOLVER.AUTO_LR: eta0 = %g (curve: %s)", lr, output_dir / CURVE_FILE)
    loaded.override("SOLVER.BASE_LR", lr, "the LR range test")
    loaded.override("SOLVER.AUTO_LR", False, "the LR range test")
    return curve


def _heed_stop() -> None:
    if why := stop_code(waiting=True):
        raise RunStopped(f"in the LR range test: {describe_stop(why)}; nothing has begun: start it again")


def lrs_of(loaded: LoadedConfig) -> tuple[float, float]:
    """The first and the last LR of a test of ``loaded``'s optimizer."""
    return ADAMW_LRS if _is_adamw(loaded) else SGD_LRS


def _is_adamw(loaded: LoadedConfig) -> bool:
    return loaded.cfg.SOLVER.OPTIMIZER in ADAMW_OPTIMIZERS


def lr_setter(optimizer: torch.optim.Optimizer, base_lr: float) -> Callable[[float], None]:
    """A function that sets the LR of all groups, in the proportions that they have at ``base_lr``."""
    factors = [float(group["initial_lr"]) / base_lr for group in optimizer.param_groups]

    def set_lr(lr: float) -> None:
        for group, factor in zip(optimizer.param_groups, factors):
            group["lr"] = lr * factor

    return set_lr


def draw(test: RangeTest, path: Path) -> tuple[Choice, bytes]:
    """:func:`choose`, and the curve as PNG; where there is nothing to choose, the curve is written to ``path``.

    Raises:
        NoLRFoundError: see :func:`choose`.
        UserError: the picture cannot be written.
    """
    from zenith_det.report.lr_curve import lr_curve  # it imports matplotlib; few runs need it

    try:
        choice = choose(test)
    except NoLRFoundError as error:
        write_whole(path, lr_curve(test.lrs, test.losses).png)
        raise NoLRFoundError(f"{error} (curve: {path})") from None
    return choice, lr_curve(test.lrs, test.losses, choice.smooth, chosen=choice.lr, edge=choice.edge).png


def measure(
    loaded: LoadedConfig,
    make_probe: MakeProbe,
    *,
    lrs: tuple[float, float] | None = None,
    iterations: int = ITERATIONS,
) -> RangeTest:
    """Train a copy of the run that ``loaded`` describes while its LR grows.

    Everything is made anew from the configuration and its seed, and thrown away: the run itself starts as if
    there had been no test. Nothing is written. The LR schedule and ZENITH's ratio play no part.

    Args:
        loaded: with the device resolved; left as it is.
        make_probe: makes a function that takes an LR, does one iteration and returns the loss: see
            :func:`~zenith_det.engines.probe.lr_probe`.
        lrs: the first LR and the last; by default :data:`SGD_LRS` or :data:`ADAMW_LRS`.

    Raises:
        UserError: what a run of ``loaded`` would raise.
        RunStopped: the run was asked to end.
    """
    steps = np.geomspace(*(lrs or lrs_of(loaded)), iterations)
    losses: list[float] = []
    copy = replace(loaded, cfg=loaded.cfg.clone(), sources=dict(loaded.sources))
    copy.cfg.defrost()
    for key, value in {
        "DATASETS.TEST": (),
        "DATASETS.VAL_JSON": "",
        "DATASETS.VAL_IMAGES": "",
        "TEST.EVAL_PERIOD": 0,
        "TEST.EARLY_STOPPING": "",
        "LOGGERS": (),  # a service would show the test as a run
        "SOLVER.MAX_ITER": _NEVER,
        "SOLVER.CHECKPOINT_PERIOD": _NEVER,
        "SOLVER.AVERAGE.KIND": "",
        "SOLVER.ZENITH.MIN_RATIO": 1.0,
        "SOLVER.ZENITH.UNTIL_SETTLED": False,
    }.items():
        copy.override(key, value, "the LR range test")
    with _quiet(), contextlib.suppress(WaitStopped):
        probe = make_probe(copy)
        for lr in steps:
            if stop_code():
                break
            losses.append(probe(float(lr)))
            if not math.isfinite(losses[-1]) or losses[-1] > _DIVERGED * float(np.nanmax(losses[:10])):
                break
        del probe
    gc.collect()
    _heed_stop()
    tried = steps[: len(losses)].astype(np.float64)
    return RangeTest(tried, np.array(losses), len(losses) < iterations, _is_adamw(loaded))


@dataclass(frozen=True)
class Choice:
    """What a range test's curve says.

    Attributes:
        lr: η₀, rounded to two digits.
        edge: the LR from which it stays above by :data:`CLIMB` of its fall.
        smooth: the smoothed losses.
        reason: why that LR, for the user.
    """

    lr: float
    edge: float
    smooth: npt.NDArray[np.float64]
    reason: str


def choose(test: RangeTest) -> Choice:
    """η₀: for SGD an eighth of the LR from which training loses what it has won, for AdamW by where the fall ends.

    :data:`CLIMB`, :data:`SHARE` and :data:`FALL` were set by sweeps of η₀ beside recorded curves
    (docs/results/lr_range_test.md). A climb of half of the fall is asked for, as a smaller one need not mean that
    the LR is too high: once a detector tells objects from background, boxes and masks add to its loss (0.4 of the
    fall, in one seed of eight).

    Under AdamW that happens in nearly every test, and where the loss has climbed by half differs by a factor of
    17 between seeds. But its steps have the size of the LR whatever the gradient's, so that the sum of the LRs
    is how far the weights have gone: the fall ends after the same distance whatever the number of iterations.

    Steeper rules (the steepest descent, a tenth of the lowest point) take what a detector's loss does in its
    first hundred iterations, where classification alone is learnt, for what the LR does. And the first climb
    counts, not the lowest point of all: a model that a high LR has ruined says "background" to everything, at
    a loss that a good one has only after many more iterations.

    Raises:
        NoLRFoundError: the loss doesn't fall, or doesn't climb again, or is too noisy to tell.
    """
    losses = test.losses
    if len(losses) < 3 * CYCLE or not np.isfinite(losses[: 2 * CYCLE]).all():
        raise NoLRFoundError(
            f"the LR range test ended after {len(losses)} iterations, at LR {test.lrs[-1]:.2g}: the loss is "
            f"{losses[-1]:.4g}: start at a lower LR, or look at the data and the model first"
        )
    start = float(np.mean(losses[:CYCLE]))
    smooth = _over_cycles(losses, _DIVERGED * start)
    noise = _noise_of(losses)
    low = np.minimum.accumulate(smooth)
    fell = start - low >= max(_NOISE * noise, _LEAST_FALL * start)
    if not fell.any():
        raise NoLRFoundError(
            f"the LR range test shows no LR at which the loss falls: {start:.4g} at the start, "
            f"{low[-1]:.4g} at its low (noise {noise:.2g}); look at the data, or set SOLVER.BASE_LR"
        )
    climbed = fell & (smooth - low >= np.maximum(CLIMB * (start - low), _NOISE * noise))
    edges = [i for i in np.flatnonzero(climbed) if climbed[i : i + LASTING].all()]
    if edges:
        end = int(edges[0])
    elif test.broke_off:
        end = len(losses) - 1
    else:
        raise NoLRFoundError(
            f"the LR range test saw no LR too high: the loss hasn't climbed at {test.lrs[-1]:.2g}: test up to a "
            f"higher LR ({cli.command('find-lr')} --max-lr)"
        )
    edge = float(test.lrs[end])
    if test.adamw:
        fallen = int(np.argmax(start - smooth >= FALL * (start - low[end])))
        lr = float(test.lrs[: fallen + 1].sum()) / STEPS
        reason = (
            f"the loss has had {FALL:g} of its fall at {test.lrs[fallen]:.2g}, and climbs from {edge:.2g}"
        )
    else:
        lr = SHARE * edge
        reason = f"{SHARE:g} of {edge:.2g}, from which the loss climbs"
    return Choice(float(f"{lr:.2g}"), edge, smooth, reason)


def _over_cycles(losses: npt.NDArray[np.float64], most: float) -> npt.NDArray[np.float64]:
    """Means over the whole cycle around each iteration, or nearest to it: over the same batches everywhere.

    Args:
        most: what counts for a loss that is higher or not finite.
    """
    bounded = np.minimum(np.nan_to_num(losses, nan=most, posinf=most), most)
    first = np.clip(np.arange(len(losses)) - CYCLE // 2, 0, len(losses) - CYCLE)
    return np.array([bounded[i : i + CYCLE].mean() for i in first])


def _noise_of(losses: npt.NDArray[np.float64]) -> float:
    """The standard deviation of a cycle's mean, from how much losses of the same batch change between visits."""
    finite = losses[np.isfinite(losses)]
    jumps = np.abs(np.diff(finite[CYCLE:] - finite[:-CYCLE]))
    # By the median: at the end the losses explode. 1.4826 makes it a standard deviation; four losses are in each.
    return float(1.4826 * np.median(jumps) / np.sqrt(4 * CYCLE))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the lines that engines write about each model they make."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
