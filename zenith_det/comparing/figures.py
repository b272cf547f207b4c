"""What a comparison looks like: AP curves, signals, differences, sensitivity to η₀."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from zenith_det.comparing.results import AP_TITLES, Comparison, Group
from zenith_det.comparing.statistics import t_975
from zenith_det.report.curves import line_style, smooth
from zenith_det.report.figures import INK, Picture, draw, svg_dashes
from zenith_det.training.course.metrics_file import Series

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Below so many seeds a confidence band is wider than the picture: the seeds themselves are drawn.
MIN_BAND = 3

FloatArray = npt.NDArray[np.float64]


def figures(comparison: Comparison) -> dict[str, list[Picture]]:
    """All pictures of a comparison, by what they are about; empty lists where there is nothing to draw."""
    several = any(len(comparison.groups_of(arm)) > 1 for arm in comparison.arms)
    tasks = comparison.tasks
    return {
        "iterations": [_ap_curves(comparison, task, by_time=False) for task in tasks],
        "time": [
            _ap_curves(comparison, task, by_time=True)
            for task in tasks
            if any("time" in o.metrics for o in comparison.outcomes)
        ],
        "differences": [p for task in tasks if (p := _differences(comparison, task))],
        "signals": [p for p in [_signals(comparison)] if p],
        "loss": [p for p in [_losses(comparison)] if p],
        "sensitivity": [_sensitivity(comparison, task) for task in tasks] if several else [],
    }


def style_of(comparison: Comparison, group: Group) -> int:
    """The arm's number among colours and dashes."""
    return [arm.name for arm in comparison.arms].index(group.arm.name)


def over_seeds(
    group: Group, pick: Callable[[Mapping[str, Series]], Series | None]
) -> tuple[npt.NDArray[np.int64], FloatArray]:
    """A scalar of the seeds at the iterations that all of them have.

    Runs that came to their end count; where there is none, those that have begun.

    Returns:
        iterations (N,), values (seeds, N); empty where there is nothing.
    """
    outcomes = [o for o in group.outcomes if o.ok] or list(group.outcomes)
    found = [series for o in outcomes if (series := pick(o.metrics)) is not None]
    if not found:
        return np.zeros(0, np.int64), np.zeros((0, 0))
    common = found[0].iterations
    for series in found[1:]:
        common = np.intersect1d(common, series.iterations)
    values = [series.values[np.isin(series.iterations, common)] for series in found]
    return common, np.array(values).reshape(len(found), len(common))


def ap_over_seeds(group: Group, task: str) -> tuple[npt.NDArray[np.int64], FloatArray]:
    """As :func:`over_seeds`, the arm's own AP."""
    by_metrics = {id(o.metrics): o for o in group.outcomes}
    return over_seeds(group, lambda metrics: by_metrics[id(metrics)].ap(task))


def _ap_curves(comparison: Comparison, task: str, *, by_time: bool) -> Picture:
    unit, unit_name = _time_unit(comparison) if by_time else (1.0, "")
    top = 0.0

    def paint(figure: Figure) -> None:
        nonlocal top
        axes = figure.add_subplot()
        axes.set_title(AP_TITLES[task])
        for arm in comparison.arms:
            group = comparison.best(arm)
            iterations, values = ap_over_seeds(group, task)
            if not len(iterations):
                continue
            xs: FloatArray = iterations.astype(np.float64)
            if by_time:
                outcomes = [o for o in group.outcomes if o.ok] or list(group.outcomes)
                times = np.array([o.training_seconds(iterations) for o in outcomes if o.metrics])
                xs = times.mean(axis=0) / unit
            _band(axes, xs, values, style_of(comparison, group))
            top = max(top, float(values.max()))
        target = comparison.target(task)
        if target is not None:
            axes.axhline(target, color=INK, linewidth=0.8, linestyle=(0, (1, 2)))
            axes.annotate(
                f"95 % of {comparison.reference.label}'s final", (0.01, target), (0, 3),
                xycoords=("axes fraction", "data"), textcoords="offset points", fontsize=8,
            )  # fmt: skip
        axes.set_ylim(0, min(100.0, top * 1.1) or 1.0)
        axes.set_xlim(left=0)
        axes.set_ylabel("AP, %")
        axes.set_xlabel(f"training time, {unit_name}" if by_time else "iteration")

    across = "training time" if by_time else "iterations"
    finals = []
    for arm in comparison.arms:
        final = comparison.best(arm).final(task)
        if final is not None:
            finals.append(f"{arm.label} ends at {final.mean:.1f}")
    alt = f"{AP_TITLES[task]} over {across}, a line for each arm: {'; '.join(finals) or 'no run has ended yet'}."
    return draw(f"ap_{task}_{'time' if by_time else 'iterations'}", alt, paint)


def _band(axes: Axes, xs: FloatArray, values: FloatArray, index: int) -> None:
    """The mean over seeds, with what is known of its uncertainty."""
    color, dashes = line_style(index)
    mean = values.mean(axis=0)
    if len(values) >= MIN_BAND:
        half = t_975(len(values) - 1) * values.std(axis=0, ddof=1) / np.sqrt(len(values))
        axes.fill_between(xs, mean - half, mean + half, color=color, alpha=0.16, linewidth=0)
    elif len(values) > 1:
        for one in values:
            axes.plot(xs, one, color=color, linewidth=0.7, alpha=0.5)
    marker = "o" if len(xs) <= 20 else None
    axes.plot(xs, mean, color=color, linestyle=dashes, linewidth=1.9, marker=marker, markersize=3)


def _time_unit(comparison: Comparison) -> tuple[float, str]:
    longest = 0.0
    for outcome in comparison.outcomes:
        series = outcome.metrics.get("time")
        if series is not None:
            longest = max(longest, float(outcome.training_seconds(series.iterations[-1])))
    return (
        (3600.0, "hours") if longest > 3 * 3600 else (60.0, "minutes") if longest > 180 else (1.0, "seconds")
    )


def _differences(comparison: Comparison, task: str) -> Picture | None:
    rows = []
    for arm in comparison.arms:
        value = comparison.difference(arm, task)
        if arm != comparison.reference and value is not None:
            rows.append((arm, value))
    if not rows:
        return None

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        axes.set_title(AP_TITLES[task])
        axes.axvline(0, color=INK, linewidth=1)
        limit = max(1.0, *(abs(value.mean) for _, value in rows)) * 1.2
        widest = [value.half_width + abs(value.mean) for _, value in rows if value.n >= MIN_BAND]
        limit = max([limit, *(width * 1.08 for width in widest)])
        for n, (arm, value) in enumerate(rows):
            color, _ = line_style(style_of(comparison, comparison.best(arm)))
            if value.n > 1:
                axes.plot([value.low, value.high], [n, n], color=color, linewidth=2.2, clip_on=True)
            axes.plot([value.mean], [n], "o", color=color, markersize=6)
        axes.set_yticks(range(len(rows)), [arm.label for arm, _ in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlim(-limit, limit)
        # The figure's, not the axes': beside the arms' names these may be too narrow for it.
        figure.supxlabel(
            f"difference from {comparison.reference.label}, percentage points",
            fontsize=axes.xaxis.label.get_fontsize(),
        )
        axes.grid(axis="y", visible=False)

    told = [
        f"{arm.label} {value.mean:+.1f}"
        + (f" ({value.low:+.1f} to {value.high:+.1f})" if value.n > 1 else "")
        for arm, value in rows
    ]
    alt = (
        f"Differences in final {AP_TITLES[task]} from {comparison.reference.label}, with 95 % confidence intervals: "
        f"{'; '.join(told)}."
    )
    return draw(f"difference_{task}", alt, paint, height=0.9 + 0.3 * len(rows))


def _signals(comparison: Comparison) -> Picture | None:
    wanted = [
        ("lr", "effective LR", 0),
        ("zenith/ratio", "LR ratio: window mean / zenith", 0),
        ("zenith/grad_norm", "gradient norm", 5),
        ("zenith/window_mean", "gradient norm, mean of the window", 0),
    ]
    groups = [comparison.best(arm) for arm in comparison.arms]
    there = [w for w in wanted if any(len(over_seeds(g, _picker(w[0]))[0]) for g in groups)]
    if not there:
        return None

    def paint(figure: Figure) -> None:
        columns = figure.subplots(len(there), 1, sharex=True, squeeze=False)
        for axes, (key, title, smoothing) in zip(columns[:, 0], there):
            axes.set_title(title)
            means = _draw_means(axes, comparison, groups, key, (smoothing, 25) if smoothing else None)
            highs = [float(mean.max()) for mean in means]
            if key == "lr" and highs and 0 < min(highs) < max(highs) / 8:
                axes.set_yscale("log")  # AdamW's beside SGD's
                axes.set_ylim(min(highs) / 1000, max(highs) * 2)
            else:
                axes.set_ylim(0, 1.06 if key == "zenith/ratio" else max(highs, default=1.0) * 1.1 or 1.0)
            axes.set_xlim(left=0)
        columns[-1, 0].set_xlabel("iteration")

    ends = []
    for group in groups:
        iterations, values = over_seeds(group, _picker("zenith/ratio"))
        if len(iterations):
            ends.append(f"{group.arm.label} ends at ratio {values[:, -1].mean():.2f}")
    alt = (
        f"{', '.join(title for _, title, _ in there)} over iterations, a line for each arm. {'; '.join(ends)}"
    )
    return draw("signals", alt.strip(), paint, width=5.6, height=1.6 * len(there) + 0.4)


def _losses(comparison: Comparison) -> Picture | None:
    keys = [("total_loss", "training loss"), ("validation/total_loss", "validation loss")]
    groups = [comparison.best(arm) for arm in comparison.arms]
    there = [k for k in keys if any(len(over_seeds(g, _picker(k[0]))[0]) for g in groups)]
    if not there:
        return None

    def paint(figure: Figure) -> None:
        columns = figure.subplots(len(there), 1, sharex=True, squeeze=False)
        for axes, (key, title) in zip(columns[:, 0], there):
            axes.set_title(title)
            means = _draw_means(axes, comparison, groups, key, (3, 15) if key == "total_loss" else None)
            tops = [float(np.quantile(mean, 0.97)) for mean in means]
            axes.set_ylim(0, max(tops) * 1.15 or 1.0)
            axes.set_xlim(left=0)
        columns[-1, 0].set_xlabel("iteration")

    ends = []
    for group in groups:
        iterations, values = over_seeds(group, _picker("total_loss"))
        if len(iterations):
            last = values[:, -max(1, len(iterations) // 20) :].mean()
            ends.append(f"{group.arm.label} ends at {last:.2f}")
    alt = f"{' and '.join(title for _, title in there)} over iterations: {'; '.join(ends)}."
    return draw("loss", alt, paint, width=5.6, height=2.2 * len(there) + 0.4)


def _draw_means(
    axes: Axes, comparison: Comparison, groups: Sequence[Group], key: str, smoothing: tuple[int, int] | None
) -> list[FloatArray]:
    """Draw the mean over seeds of a scalar, a line for each group that has it; the lines' values.

    Args:
        smoothing: over at least so many values, and over such a part of all: ``(3, 15)`` is a fifteenth.
    """
    means = []
    for group in groups:
        iterations, values = over_seeds(group, _picker(key))
        if not len(iterations):
            continue
        color, dashes = line_style(style_of(comparison, group))
        mean = values.mean(axis=0)
        if smoothing is not None:
            least, part = smoothing
            mean = smooth(mean, max(least, len(mean) // part))
        axes.plot(iterations, mean, color=color, linestyle=dashes, linewidth=1.6)
        means.append(mean)
    return means


def _picker(key: str) -> Callable[[Mapping[str, Series]], Series | None]:
    return lambda metrics: metrics.get(key)


def _sensitivity(comparison: Comparison, task: str) -> Picture:
    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        axes.set_title(f"final {AP_TITLES[task]} over the learning rate")
        top = 0.0
        rates: set[float] = set()
        for arm in comparison.arms:
            points = [(g.lr, final) for g in comparison.groups_of(arm) if (final := g.final(task))]
            if not points or arm.finds_lr:
                continue
            color, dashes = line_style(style_of(comparison, comparison.best(arm)))
            lrs, means = [lr for lr, _ in points], [final.mean for _, final in points]
            stds = [0.0 if np.isnan(final.std) else final.std for _, final in points]
            axes.errorbar(
                lrs, means, yerr=stds, color=color, linestyle=dashes, linewidth=1.7, marker="o",
                markersize=4, elinewidth=1, capsize=2,
            )  # fmt: skip
            top = max([top, *means])
            rates |= set(lrs)
        axes.set_xscale("log")
        axes.set_ylim(0, min(100.0, top * 1.15) or 1.0)
        axes.set_xlabel("η₀ (SOLVER.BASE_LR)")
        axes.set_ylabel("AP, %")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.tick_params(axis="x", labelrotation=45)
        axes.yaxis.set_major_locator(MaxNLocator(6))

    told = []
    for arm in comparison.arms:
        groups = [g for g in comparison.groups_of(arm) if g.final(task)]
        if groups:
            told.append(f"{arm.label} best at {arm.lr_text(comparison.best(arm).lr)}")
    alt = f"Final {AP_TITLES[task]} of each arm at each learning rate tried: {'; '.join(told)}."
    return draw(f"sensitivity_{task}", alt, paint)


def legend_entries(comparison: Comparison) -> Sequence[tuple[str, str, str]]:
    """(label, colour, SVG dashes) of the arms."""
    return [(arm.label, line_style(n)[0], svg_dashes(n)) for n, arm in enumerate(comparison.arms)]
