"""Pictures of a run: its curves, and its predictions beside the ground truth."""

from zenith_det.report.curves import plot_curves, plot_curves_compare
from zenith_det.report.metrics_file import read_metrics
from zenith_det.report.pictures import Instances, SheetRow, draw_instances, prediction_sheet

__all__ = [
    "Instances",
    "SheetRow",
    "draw_instances",
    "plot_curves",
    "plot_curves_compare",
    "prediction_sheet",
    "read_metrics",
]
