#!/usr/bin/env python
"""``zenith-det demo``, from a checkout; its code is in zenith_det/commands/demo.py."""

from zenith_det import cli
from zenith_det.commands.demo import main

if __name__ == "__main__":
    cli.run(main)
