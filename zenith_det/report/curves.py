"""``curves.png``: what a run did, from its ``metrics.json``, without a server.

Colours are Okabe and Ito's (https://jfly.uni-koeln.de/color/), which people with colour-vision deficiencies
tell apart.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, MaxNLocator

from zenith_det.errors import UserError
from zenith_det.files import write_whole
from zenith_det.report.fonts import fitting_fonts
from zenith_det.training.checkpoints import averaging
from zenith_det.training.course import validation_loss
from zenith_det.training.course.metrics_file import Series, by_test_set, read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CURVES_FILE = "curves.png"
COMPARE_FILE = "curves_compare.png"

BLACK, GREY = "#222222", "#8a8a8a"
BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"
CYCLE = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY)
DASHES: tuple[Any, ...] = ("-", (0, (4, 1.5)), (0, (1.2, 1.2)))

AP_LINES = (
    ("bbox", "box AP", BLUE, "o"),
    ("segm", "mask AP", VERMILION, "s"),
    ("keypoints", "keypoint AP", GREEN, "^"),
)

_STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9a9a9a",
    "axes.linewidth": 0.8,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlecolor": BLACK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.7,
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "legend.handlelength": 1.6,
    "lines.solid_capstyle": "round",
}
#: More evaluations than this are a line without a mark at each.
_MAX_MARKERS = 40
_WIDTH, _ROW_HEIGHT, _DPI = 12.0, 3.3, 130

Metrics = Mapping[str, Series]
Panel = tuple[str, Callable[["Axes"], None]]


def plot_curves(output_dir: str | os.PathLike[str], path: str | os.PathLike[str] | None = None) -> Path:
    """Draw a run's losses, AP, effective LR, LR ratio and gradient norm over its iterations.

    A panel without data is left out. Raw values are faint, the lines are smoothed over about 4 % of the run.

    Args:
        output_dir: the run's folder with ``metrics.json``.
        path: the picture; default ``OUTPUT_DIR/curves.png``.

    Returns:
        the picture's path.

    Raises:
        UserError: no metrics to draw, or the picture cannot be written.
    """
    folder = Path(output_dir)
    metrics = read_metrics(folder)
    panels: list[Panel] = []
    if "total_loss" in metrics:
        panels.append(("Total loss", lambda axes: draw_total_loss(axes, metrics)))
    if components := loss_components(metrics):
        panels.append(("Loss components", lambda axes: draw_components(axes, metrics, components)))
    for name, scalars in with_ap(metrics).items():
        panels.append((of_test_set("Average precision", name), partial(draw_ap, metrics=scalars)))
    if "lr" in metrics:
        panels.append(("Effective learning rate", lambda axes: draw_lr(axes, metrics["lr"])))
    if "zenith/ratio" in metrics:
        panels.append(
            ("LR ratio: window mean / zenith", lambda axes: draw_ratio(axes, metrics["zenith/ratio"]))
        )
    if "zenith/grad_norm" in metrics or "zenith/window_mean" in metrics:
        panels.append(("Gradient norm", lambda axes: draw_norm(axes, metrics)))
    target = Path(path) if path is not None else folder / CURVES_FILE
    return _render(panels, folder.resolve().name, target, empty=f"{folder}: metrics.json has nothing to draw")


def plot_curves_compare(
    output_dirs: Sequence[str | os.PathLike[str]], path: str | os.PathLike[str] | None = None
) -> Path:
    """Draw several runs over one another, one colour each; their AP is that of averaged weights where there is one.

    Args:
        output_dirs: the runs' folders.
        path: the picture; default ``curves_compare.png`` in the working directory.

    Returns:
        the picture's path.

    Raises:
        UserError: fewer than two runs, no metrics to draw in one, or the picture cannot be written.
    """
    folders = [Path(folder) for folder in output_dirs]
    if len(folders) < 2:
        raise UserError(f"a comparison needs two runs or more, got {len(folders)}")
    runs = dict(zip(_short_names(folders), [read_metrics(folder) for folder in folders], strict=True))
    wanted = [("total_loss", "Total loss", True)]
    for name in dict.fromkeys(name for metrics in runs.values() for name in with_ap(metrics)):
        prefix = f"{name}/" if name else ""
        wanted += [
            (f"{prefix}{task}/AP", of_test_set(label[0].upper() + label[1:], name), False)
            for task, label, *_ in AP_LINES
        ]
    wanted += [
        ("lr", "Effective learning rate", False),
        ("zenith/ratio", "LR ratio: window mean / zenith", False),
        ("zenith/window_mean", "Gradient norm, window mean", False),
    ]
    panels: list[Panel] = []
    for key, title, noisy in wanted:
        if any(key in metrics for metrics in runs.values()):

            def draw(axes: Axes, key: str = key, noisy: bool = noisy) -> None:
                _draw_overlay(axes, key, runs, noisy)

            panels.append((title, draw))
    target = Path(path) if path is not None else Path(COMPARE_FILE)
    return _render(panels, " vs ".join(runs), target, empty="the runs have nothing to compare")


def smooth(values: npt.NDArray[np.float64], window: int) -> npt.NDArray[np.float64]:
    """Average with a centred, triangular window; near the ends, of what there is (no lag, no invented
    values)."""
    half = max(0, min(window, len(values)) // 2)
    if half == 0:
        return values
    kernel = np.concatenate([np.arange(1, half + 2), np.arange(half, 0, -1)]).astype(np.float64)
    pad = np.pad(values, half)
    weight = np.pad(np.ones(len(values)), half)
    return np.convolve(pad, kernel, "valid") / np.convolve(weight, kernel, "valid")


def _smoothed(series: Series) -> npt.NDArray[np.float64]:
    return smooth(series.values, max(3, round(len(series) * 0.08)))


def loss_components(metrics: Metrics) -> list[str]:
    components = [key for key in metrics if key.startswith("loss_")]
    # The largest first, so that the legend has the order of the lines.
    return sorted(components, key=lambda key: -float(np.median(metrics[key].values)))


def _draw_noisy(
    axes: Axes, series: Series, color: str, label: str, width: float = 1.8, dashes: Any = "-"
) -> None:
    if len(series) == 1:
        axes.plot(series.iterations, series.values, "o", color=color, label=label, markersize=4)
        return
    if len(series) > 8:
        axes.plot(series.iterations, series.values, color=color, alpha=0.22, linewidth=0.8)
    axes.plot(
        series.iterations, _smoothed(series), color=color, label=label, linewidth=width, linestyle=dashes
    )


def _limit_spikes(axes: Axes, noisy: Sequence[Series], exact: Sequence[Series] = ()) -> None:
    """From 0 to what the curves need: a spike of a few iterations must not press the rest flat.

    Args:
        axes: where the curves are.
        noisy: may be cut where they are highest, 3 % of the time.
        exact: must be visible whole.
    """
    top = max((float(series.values.max()) * 1.06 for series in exact), default=0.0)
    for series in noisy:
        settled = series.values[len(series) // 25 :]
        top = max(top, float(np.quantile(settled, 0.97)) * 1.12)
    if top > 0:
        axes.set_ylim(0, top)


def draw_total_loss(axes: Axes, metrics: Metrics) -> None:
    series = metrics["total_loss"]
    _draw_noisy(axes, series, BLACK, "total")
    found = {
        name: scalars.get(f"{validation_loss.PREFIX}total_loss")
        for name, scalars in by_test_set(metrics).items()
    }
    held_out = {name: losses for name, losses in found.items() if losses is not None}
    for index, (name, losses) in enumerate(held_out.items(), start=1):
        color, dashes = line_style(index)
        axes.plot(
            losses.iterations, losses.values, color=color, linestyle=dashes, marker="o", markersize=4, linewidth=1.6,
            label=of_test_set("validation", name),
        )  # fmt: skip
    if held_out:
        axes.legend(loc="upper right")
    _limit_spikes(axes, [series, *held_out.values()])


def draw_components(axes: Axes, metrics: Metrics, keys: Sequence[str]) -> None:
    for index, key in enumerate(keys):
        label = key.removeprefix("loss_").replace("_", " ")
        color, dashes = line_style(index)
        _draw_noisy(axes, metrics[key], color, label, 1.6, dashes)
    _limit_spikes(axes, [metrics[key] for key in keys])
    axes.set_ylim(0, axes.get_ylim()[1] * 1.25)  # room for the legend above the curves
    axes.legend(loc="upper right", ncols=min(3, len(keys)))


def line_style(index: int) -> tuple[str, Any]:
    """Colour and dashes of the n-th line: the colours first, then the same dashed."""
    return CYCLE[index % len(CYCLE)], DASHES[index // len(CYCLE) % len(DASHES)]


def with_ap(metrics: Metrics) -> dict[str, dict[str, Series]]:
    """The test sets that there is an AP of, as :func:`by_test_set` gives them."""
    return {
        name: scalars
        for name, scalars in by_test_set(metrics).items()
        if any(f"{task}/AP" in scalars for task, *_ in AP_LINES)
    }


def of_test_set(title: str, name: str) -> str:
    """A title with the name of the test set, which a run with one set doesn't have."""
    return f"{title}: {name}" if name else title


def draw_ap(axes: Axes, metrics: Metrics) -> None:
    """AP over iterations; that of averaged weights, where there is one, beside the trained weights' own.

    Args:
        axes: where to draw.
        metrics: of one test set, its name taken off.
    """
    top = 0.0
    legend: dict[str, tuple[Any, str | None]] = {}
    for task, label, color, marker in AP_LINES:
        series = metrics.get(f"{task}/AP")
        if series is None:
            continue
        main, weights = _to_use(metrics, f"{task}/AP", series)
        half = metrics.get(f"{task}/AP50")
        axes.plot(
            main.iterations,
            main.values,
            color=color,
            marker=marker if len(main) <= _MAX_MARKERS else None,
            markersize=4.5,
            linewidth=1.8,
            label=f"{label}{weights} {main.values[-1]:.1f}" + _best(main),
        )
        beside, style, what = (
            (series, DASHES[1], "dashed: trained weights") if weights else (half, DASHES[2], "dotted: AP50")
        )
        if beside is not None:
            mark = None
            if len(beside) == 1:
                style, mark, what = "none", "x", what.replace("dashed", "cross").replace("dotted", "cross")
            axes.plot(
                beside.iterations, beside.values, color=color, linewidth=1.1, linestyle=style, alpha=0.8,
                marker=mark, markersize=5,
            )  # fmt: skip
            legend[what] = (style, mark)
        shown = [one for one in (main, beside) if one is not None]
        top = max([top, *(float(one.values.max()) for one in shown)])
    for what, (style, mark) in legend.items():
        axes.plot([], [], color=GREY, linewidth=1.1, linestyle=style, marker=mark, markersize=5, label=what)
    axes.set_ylim(0, min(100.0, top * 1.12) if top > 0 else 1.0)
    axes.set_ylabel("%")
    axes.legend(loc="lower right")


def _to_use(metrics: Metrics, key: str, trained: Series) -> tuple[Series, str]:
    """An AP of the averaged weights where there is one, and what to add to its label; else the trained ones' own."""
    averaged = metrics.get(averaging.PREFIX + key)
    return (trained, "") if averaged is None else (averaged, ", averaged")


def _best(series: Series) -> str:
    """Where the best AP was, unless it is the last."""
    best = int(series.values.argmax())
    if best == len(series) - 1:
        return ""
    return f" (best {series.values[best]:.1f} at {_short_number(float(series.iterations[best]))})"


def _lone(series: Series) -> str | None:
    """The marker of a curve: none, but for one of a single point, which a line would not show."""
    return "o" if len(series) == 1 else None


def draw_lr(axes: Axes, series: Series) -> None:
    axes.plot(series.iterations, series.values, color=BLUE, linewidth=1.8, marker=_lone(series), markersize=4)
    axes.fill_between(series.iterations, series.values, color=BLUE, alpha=0.08, linewidth=0)
    axes.set_ylim(0, float(series.values.max()) * 1.1 or 1.0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def draw_ratio(axes: Axes, series: Series) -> None:
    axes.axhline(1, color=GREY, linewidth=0.9, linestyle=DASHES[1])
    axes.plot(
        series.iterations, series.values, color=GREEN, linewidth=1.8, marker=_lone(series), markersize=4
    )
    axes.fill_between(series.iterations, series.values, color=GREEN, alpha=0.08, linewidth=0)
    axes.set_ylim(0, 1.06)
    last = float(series.values[-1])
    # Away from the curve: below it, or above where it is low.
    axes.text(
        0.98, 0.05 if last > 0.4 else 0.85, f"{last:.2f} at the end", transform=axes.transAxes, ha="right", color=GREEN,
        weight="bold",
    )  # fmt: skip


def draw_norm(axes: Axes, metrics: Metrics) -> None:
    exact = []
    norm = metrics.get("zenith/grad_norm")
    if norm is not None:
        axes.plot(
            norm.iterations, norm.values, color=GREY, alpha=0.45, linewidth=0.8, label="each step",
            marker=_lone(norm), markersize=4,
        )  # fmt: skip
    mean = metrics.get("zenith/window_mean")
    if mean is not None:
        axes.plot(
            mean.iterations, mean.values, color=BLUE, linewidth=1.8, label="window mean",
            marker=_lone(mean), markersize=4,
        )  # fmt: skip
        exact.append(mean)
    zenith = metrics.get("zenith/zenith")
    if zenith is not None:
        there = zenith.values > 0  # 0 until the window is full
        axes.plot(
            zenith.iterations[there],
            zenith.values[there],
            color=VERMILION,
            linewidth=1.6,
            linestyle=DASHES[1],
            label="zenith",
            marker="o" if there.sum() == 1 else None,
            markersize=6,
            fillstyle="none",
        )
        exact.append(zenith)
    _limit_spikes(axes, [] if norm is None else [norm], exact)
    axes.set_ylim(0, axes.get_ylim()[1] * 1.3)  # room for the legend above the zenith
    skipped = metrics.get("zenith/skipped_steps")
    if skipped is not None and skipped.values[-1] > 0:
        axes.plot([], [], " ", label=f"{skipped.values[-1]:.0f} steps skipped: not finite")
    axes.legend(loc="upper right", ncols=2, frameon=True, framealpha=0.85, edgecolor="none")


def _draw_overlay(axes: Axes, key: str, runs: Mapping[str, Metrics], noisy: bool) -> None:
    drawn = []
    for index, (name, metrics) in enumerate(runs.items()):
        series = metrics.get(key)
        if series is None:
            continue
        color, dashes = line_style(index)
        is_ap, weights = key.endswith("/AP"), ""
        if is_ap:
            series, weights = _to_use(metrics, key, series)
        if noisy:
            _draw_noisy(axes, series, color, name, 1.8, dashes)
        else:
            marker = "o" if is_ap and len(series) <= _MAX_MARKERS else _lone(series)
            label = f"{name}{weights}  {series.values[-1]:.1f}" if is_ap else name
            axes.plot(
                series.iterations,
                series.values,
                color=color,
                label=label,
                linestyle=dashes,
                marker=marker,
                markersize=4,
            )
        drawn.append(series)
    if key == "zenith/ratio":
        axes.set_ylim(0, 1.06)
    elif key == "lr" or key.endswith("/AP"):
        axes.set_ylim(0, max(float(series.values.max()) for series in drawn) * 1.12 or 1.0)
    else:
        _limit_spikes(axes, drawn)
    if key == "lr":
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.legend(loc="lower right" if key.endswith("/AP") else "upper right" if noisy else "best")


def _render(panels: Sequence[Panel], heading: str, path: Path, *, empty: str) -> Path:
    """Two panels a row; the first takes a row of its own when their number is odd."""
    if not panels:
        raise UserError(empty)
    wide_first = len(panels) % 2 == 1
    rows = math.ceil((len(panels) + wide_first) / 2)
    with matplotlib.rc_context(_STYLE):
        layout = ConstrainedLayoutEngine(w_pad=0.09, h_pad=0.09, wspace=0.02, hspace=0.02)
        figure = Figure(
            figsize=(_WIDTH, _ROW_HEIGHT * rows + 0.5), dpi=_DPI, layout=layout, facecolor="white"
        )
        FigureCanvasAgg(figure)
        grid = figure.add_gridspec(rows, 2)
        last = 0.0
        drawn: list[Axes] = []
        for index, (title, draw) in enumerate(panels):
            slot = index + (wide_first and index > 0)
            cell = grid[0, :] if wide_first and index == 0 else grid[slot // 2, slot % 2]
            axes = figure.add_subplot(cell)
            axes.set_title(title, pad=8)
            draw(axes)
            last = max(last, axes.dataLim.x1)
            drawn.append(axes)
            axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 5, 10]))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short_number(value)))
            axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
            if slot // 2 == rows - 1:
                axes.set_xlabel("iteration")
        for axes in drawn:
            axes.set_xlim(-0.01 * (last or 1), 1.02 * (last or 1))
        figure.suptitle(heading, x=0.01, ha="left", fontsize=13, weight="bold", color=BLACK)
        kind = path.suffix[1:].lower() or "png"
        if kind not in figure.canvas.get_supported_filetypes():
            raise UserError(f"{path}: curves are not drawn as {path.suffix}; give .png, .svg or .pdf")
        with fitting_fonts(figure):
            return write_whole(path, lambda file: figure.savefig(file, format=kind))


def _short_number(value: float) -> str:
    """1500 -> "1.5k", so that tick labels of long runs don't collide."""
    if abs(value) >= 1000:
        return f"{value / 1000:.4g}k"
    return f"{value:g}"


def _short_names(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell the runs apart."""
    parts = [folder.resolve().parts for folder in folders]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise UserError(f"the same run is named twice: {folders[0]}")
