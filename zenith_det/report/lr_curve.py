"""The picture of an LR range test."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from zenith_det.report.curves import BLUE, GREEN, GREY, VERMILION
from zenith_det.report.figures import Picture, draw

Values = npt.NDArray[np.float64]


def lr_curve(
    lrs: Values,
    losses: Values,
    smooth: Values | None = None,
    *,
    chosen: float | None = None,
    edge: float | None = None,
) -> Picture:
    """Draw the losses of a range test over the LR.

    Args:
        lrs, losses: of each iteration; losses that aren't finite are left out.
        smooth: the smoothed losses.
        chosen: η₀.
        edge: the LR from which the loss climbs.
    """

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        finite = np.isfinite(losses)
        axes.plot(lrs[finite], losses[finite], color=GREY, linewidth=0.8, alpha=0.6, label="each batch")
        shown = losses[finite]
        if smooth is not None:
            axes.plot(lrs, smooth, color=BLUE, linewidth=2, label="smoothed")
            shown = smooth[np.isfinite(smooth)]
        if len(shown):
            low, high = float(shown.min()), float(np.quantile(shown, 0.98))
            axes.set_ylim(low - 0.25 * (high - low), high + 0.45 * (high - low) + 1e-9)
        if edge is not None:
            axes.axvline(
                edge, color=VERMILION, linewidth=1.2, linestyle=(0, (4, 1.5)), label=f"too high: {edge:.2g}"
            )
        if chosen is not None:
            axes.axvline(chosen, color=GREEN, linewidth=2, label=f"chosen: {chosen:g}")
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_xlabel("learning rate")
        axes.set_ylabel("total loss")
        axes.set_title("LR range test")
        axes.legend(loc="upper left")

    alt = "Total loss over the learning rate" + (f"; chosen: {chosen:g}" if chosen is not None else "")
    return draw("lr_range_test", alt, paint, width=7.0, height=4.0)
