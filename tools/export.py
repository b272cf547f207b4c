#!/usr/bin/env python
"""``zenith-det export``, from a checkout; its code is in zenith_det/commands/export.py."""

from zenith_det import cli
from zenith_det.commands.export import main

if __name__ == "__main__":
    cli.run(main)
