#!/usr/bin/env python
"""``zenith-det find-lr``, from a checkout; its code is in zenith_det/commands/find_lr.py."""

from zenith_det import cli
from zenith_det.commands.find_lr import main

if __name__ == "__main__":
    cli.run(main)
