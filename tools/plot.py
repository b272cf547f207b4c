#!/usr/bin/env python
"""``zenith-det plot``, from a checkout; its code is in zenith_det/commands/plot.py."""

from zenith_det import cli
from zenith_det.commands.plot import main

if __name__ == "__main__":
    cli.run(main)
