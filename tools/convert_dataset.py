#!/usr/bin/env python
"""``zenith-det convert-dataset``, from a checkout; its code is in zenith_det/commands/convert_dataset.py."""

from zenith_det import cli
from zenith_det.commands.convert_dataset import main

if __name__ == "__main__":
    cli.run(main)
