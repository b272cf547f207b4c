"""What a run's curves say about it, in sentences with the iteration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from zenith_det.config.optimizer_names import ZENITH_OPTIMIZERS
from zenith_det.training.course.metrics_file import Series, by_test_set

#: A ratio that stays above this has not lowered the LR.
HARDLY_LOWERED = 0.9
#: A zenith that grows by this factor between two lines of the log, or within a window, has jumped.
JUMP = 1.4
#: A ratio below this leaves no learning rate to speak of.
NOTHING_LEFT = 0.02
#: A share of the time of an iteration that is worth a line.
WAITING = 0.3

Metrics = Mapping[str, Series]


def diagnose(metrics: Metrics, *, window: int | None = None, max_iter: int | None = None) -> list[str]:
    """Sentences about a run; empty where its curves look as they should.

    Args:
        metrics: as :func:`~zenith_det.report.read_metrics` gives them.
        window: W, in iterations; ``None`` where ZENITH was not used or it isn't known.
        max_iter: the run's length; ``None`` where it isn't known.
    """
    lines: list[str] = []
    if "zenith/ratio" in metrics:
        lines += _ratio(metrics, window or 100)
    lines += _loss(metrics)
    lines += _peaks(metrics)
    lines += _waiting(metrics)
    ends = [int(s.iterations[-1]) + 1 for name, s in metrics.items() if name == "total_loss"]
    if max_iter is not None and ends and ends[0] < max_iter:
        lines.append(
            f"The run ends after iteration {ends[0] - 1}, of {max_iter}: it was interrupted; --resume goes on."
        )
    return lines


def _ratio(metrics: Metrics, window: int) -> list[str]:
    ratio = metrics["zenith/ratio"]
    last = int(ratio.iterations[-1])
    lines = []
    jump = outlier(metrics, window)
    if jump is not None:
        lines.append(jump)
    if last >= 3 * window and float(ratio.values.min()) >= HARDLY_LOWERED:
        lowest = int(ratio.values.argmin())
        lines.append(
            f"The ratio never fell below {HARDLY_LOWERED}: its lowest is {ratio.values[lowest]:.2f} at iteration "
            f"{ratio.iterations[lowest]}, so ZENITH has hardly lowered the LR. The gradient norm is as large as it "
            "was: either the run is still in its steep part, or mini-batch noise is most of the norm. Train longer, "
            "take larger batches, or evaluate averaged weights."
        )
    # The window may have been filled with zeros, or the run be a toy: from the first full window on.
    low = np.flatnonzero((ratio.values < NOTHING_LEFT) & (ratio.iterations >= window))
    if len(low):
        lines.append(
            f"The ratio is below {NOTHING_LEFT} from iteration {ratio.iterations[low[0]]} on at times: there the run "
            "hardly learns; SOLVER.ZENITH.MIN_RATIO sets a floor."
        )
    skipped = metrics.get("zenith/skipped_steps")
    if skipped is not None and skipped.values[-1] > 0:
        first = int(skipped.iterations[np.flatnonzero(skipped.values > 0)[0]])
        lines.append(
            f"{skipped.values[-1]:.0f} steps were skipped because a loss or gradient was not finite, the first by "
            f"iteration {first}; bad_steps.jsonl tells more."
        )
    return lines


def outlier(metrics: Metrics, window: int) -> str | None:
    """The line about a zenith that a single norm, or a few, have set; ``None`` where none has.

    One norm lifts the mean of the window for W iterations, then leaves it: the mean rises at once, and is back
    where it was W iterations later, while the zenith stays.
    """
    mean, zenith, ratio = (metrics.get(f"zenith/{name}") for name in ("window_mean", "zenith", "ratio"))
    if mean is None or zenith is None or ratio is None:
        return None
    full = np.flatnonzero(zenith.values > 0)
    if not len(full):
        return None
    top = float(zenith.values[-1])
    # Where it reached what it is now, near enough: later ripples don't matter.
    at = int(zenith.iterations[np.flatnonzero(zenith.values >= 0.95 * top)[0]])
    after = _at(mean, at + round(1.3 * window))
    if after is None or after > top / JUMP:
        return None  # the norm was as large for longer than one outlier lasts, or it has only just happened
    first = int(zenith.iterations[full[0]])
    here = (ratio.iterations >= at + round(1.3 * window)) & (ratio.iterations <= at + 3 * window)
    settled = float(np.median(ratio.values[here])) if here.any() else float(ratio.values[-1])
    if at <= first:
        before = None
    else:
        before = _at(mean, max(at - window, int(mean.iterations[0])))
    if before is None or at <= first:
        # The first window: norms fall fast at the start of every training, so only a collapse counts.
        if after > top / 3:
            return None
        return (
            f"The ratio collapsed by iteration {at + round(1.3 * window)}: the zenith, {top:.3g}, was set by the very "
            f"first norms, and the window's mean was {after:.3g} once they had left it. The LR has been near "
            f"{settled:.2f} of what was asked for since; SOLVER.ZENITH.RECORD_AFTER leaves the first norms out. A "
            "model that the first steps have ruined looks the same, with an AP near 0: then lower SOLVER.BASE_LR."
        )
    if top < JUMP * before:
        return None
    size = before + window * (top - before)
    return (
        f"The ratio collapsed at iteration {at} because one outlier set the zenith: it rose from {before:.3g} to "
        f"{top:.3g} within a window, and the window's mean was back at {after:.3g} after {round(1.3 * window)} "
        f"iterations. A single norm of about {size:.3g} does that. The LR was near {settled:.2f} of what was asked for "
        "afterwards. Look at the images of that iteration, lengthen the warm-up, take a larger SOLVER.ZENITH.WINDOW, "
        "or let the zenith fade with SOLVER.ZENITH.HALF_LIFE; clipping does not hide an outlier from ZENITH."
    )


def _at(series: Series, iteration: int) -> float | None:
    """The value at the first line from an iteration on."""
    later = np.flatnonzero(series.iterations >= iteration)
    return float(series.values[later[0]]) if len(later) else None


def _loss(metrics: Metrics) -> list[str]:
    lines = []
    loss = metrics.get("total_loss")
    if loss is not None and len(loss) >= 10:
        size = max(3, len(loss) // 10)
        means = np.convolve(loss.values, np.ones(size) / size, "valid")
        low = int(means.argmin())
        if means[-1] > 1.5 * means[low] and means[low] > 0:
            lines.append(
                f"The training loss rose again: {means[low]:.3g} around iteration {loss.iterations[low + size // 2]}, "
                f"{means[-1]:.3g} at the end."
            )
    for name, scalars in by_test_set(metrics).items():
        held_out = scalars.get("validation/total_loss")
        if held_out is None or len(held_out) < 3:
            continue
        low = int(held_out.values.argmin())
        if held_out.values[-1] > 1.05 * held_out.values[low]:
            where = f" on {name}" if name else ""
            lines.append(
                f"The validation loss{where} was lowest at iteration {held_out.iterations[low]}, "
                f"{held_out.values[low]:.3g}, and is {held_out.values[-1]:.3g} at the end: the model over-fits."
            )
    return lines


def _peaks(metrics: Metrics) -> list[str]:
    lines = []
    for name, series in metrics.items():
        if not name.endswith("/AP") or len(series) < 3:
            continue
        best = int(series.values.argmax())
        if series.values[best] - series.values[-1] > 1.0:
            lines.append(
                f"{_title(name)} was highest at iteration {series.iterations[best]}, {series.values[best]:.1f}, and is "
                f"{series.values[-1]:.1f} at the end; CHECKPOINT.BEST keeps the best model."
            )
    return lines


def _title(name: str) -> str:
    """``"averaged/bbox/AP"`` as people say it."""
    titles = {"bbox": "box AP", "segm": "mask AP", "keypoints": "keypoint AP"}
    *before, task, _ = name.split("/")
    return " ".join([titles.get(task, task), *[f"({part})" for part in before]])


def _waiting(metrics: Metrics) -> list[str]:
    waiting, whole = metrics.get("data_time"), metrics.get("time")
    if waiting is None or whole is None:
        return []
    share = float(np.median(waiting.values)) / max(float(np.median(whole.values)), 1e-9)
    if share < WAITING:
        return []
    return [f"{share:.0%} of an iteration waits for images: more DATALOADER.NUM_WORKERS may help."]


def sentences(lines: Sequence[str]) -> list[str]:
    """The lines, or one that says there is nothing to say."""
    return list(lines) or ["Nothing in the curves looks out of the ordinary."]


def config_window(cfg: Any) -> int | None:
    """W of a run's configuration, ``None`` for other optimizers."""
    return int(cfg.SOLVER.ZENITH.WINDOW) if cfg.SOLVER.OPTIMIZER in ZENITH_OPTIMIZERS else None
