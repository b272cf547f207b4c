#!/usr/bin/env python
"""``zenith-det convert-checkpoint``, from a checkout; its code is in zenith_det/commands/convert_checkpoint.py."""

from zenith_det import cli
from zenith_det.commands.convert_checkpoint import main

if __name__ == "__main__":
    cli.run(main)
