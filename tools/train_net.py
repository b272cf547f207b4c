#!/usr/bin/env python
"""``zenith-det train``, from a checkout; its code is in zenith_det/commands/train.py."""

from zenith_det import cli
from zenith_det.commands.train import main

if __name__ == "__main__":
    cli.run(main)
