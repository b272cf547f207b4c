"""Draw a run's curves from its metrics.json, or several runs over one another.

%(prog)s output                      # output/curves.png
%(prog)s runs/zenith runs/step       # curves_compare.png

The AP is that of the averaged weights where a run has them; its label says so.
"""

from __future__ import annotations

import argparse

from zenith_det import cli
from zenith_det.report.curves import COMPARE_FILE, CURVES_FILE, plot_curves, plot_curves_compare


def argument_parser() -> argparse.ArgumentParser:
    parser = cli.parser("plot", __doc__)
    parser.add_argument(
        "output_dirs", metavar="OUTPUT_DIR", nargs="+", help="folder of a run, with metrics.json"
    )
    parser.add_argument(
        "--out",
        metavar="FILE.png",
        help=f"where to write (default: OUTPUT_DIR/{CURVES_FILE}, or {COMPARE_FILE} for several runs)",
    )
    return parser


def main(argv: list[str] | None = None) -> None:
    """Draw, and print where."""
    args = argument_parser().parse_args(argv)
    if len(args.output_dirs) > 1:
        print(plot_curves_compare(args.output_dirs, args.out))
        return
    print(plot_curves(args.output_dirs[0], args.out))
