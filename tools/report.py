#!/usr/bin/env python
"""``zenith-det report``, from a checkout; its code is in zenith_det/commands/report.py."""

from zenith_det import cli
from zenith_det.commands.report import main

if __name__ == "__main__":
    cli.run(main)
