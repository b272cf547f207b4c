#!/usr/bin/env python
"""``zenith-det compare``, from a checkout; its code is in zenith_det/commands/compare.py."""

from zenith_det import cli
from zenith_det.commands.compare import main

if __name__ == "__main__":
    cli.run(main)
