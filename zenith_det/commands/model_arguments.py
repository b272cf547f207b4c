"""The flags by which a command takes a trained model."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from zenith_det import cli
from zenith_det.errors import UserError


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Add RUN, ``--config-file``, ``--class-names`` and ``--opts``."""
    parser.add_argument("run", nargs="?", metavar="RUN", help="OUTPUT_DIR of a run, or a checkpoint of one")
    parser.add_argument("--config-file", metavar="FILE", help="in place of RUN: a config, with MODEL.WEIGHTS")
    parser.add_argument(
        "--class-names",
        nargs="+",
        metavar="NAME",
        help="for weights that don't say which classes they are for, in the order of their training",
    )
    parser.add_argument(
        "--opts",
        nargs="*",
        default=[],
        metavar="KEY VALUE",
        help="config keys to override; without --opts, too",
    )


def parse_model_arguments(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None = None
) -> argparse.Namespace:
    """Parse a command line, and see that it names one model.

    Args:
        parser: with :func:`add_model_flags`.
        argv: default: the process's own.

    Raises:
        UserError: neither a run nor a config, or both.
    """
    args = cli.parse_arguments(parser, argv)
    if (args.run is None) == (args.config_file is None):
        raise UserError(
            "give the model: the OUTPUT_DIR of a run or one of its checkpoints"
            if args.run is None
            else f"{args.run} and --config-file {args.config_file}: give one of them"
        )
    return args
