"""Make one HTML page of a run: its curves, AP, errors as pictures, and what happened on the way.

%(prog)s output/mask_rcnn_zenith      # output/mask_rcnn_zenith/report.html
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from zenith_det import cli
from zenith_det.report.run_report import HTML_FILE, write_run_report


def argument_parser() -> argparse.ArgumentParser:
    parser = cli.parser("report", __doc__)
    parser.add_argument(
        "output_dir", type=Path, metavar="OUTPUT_DIR", help="folder of a run, finished or not"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE.html", help=f"where to write (default: OUTPUT_DIR/{HTML_FILE})"
    )
    parser.add_argument(
        "--score",
        type=score,
        metavar="P",
        help="lowest score that counts as found (default: the one with the highest F1)",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Read what the run left, write the page."""
    args = argument_parser().parse_args(argv)
    logging.disable(
        logging.WARNING
    )  # of reading the data again: the run's own log has it, and so has the page
    print(write_run_report(args.output_dir, args.out, threshold=args.score))
    return 0


def score(text: str) -> float:
    """A number from 0 to 1."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{value} is not between 0 and 1")
    return value
