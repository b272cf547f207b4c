#!/usr/bin/env python
"""``zenith-det benchmark``, from a checkout; its code is in zenith_det/commands/benchmark.py."""

from zenith_det import cli
from zenith_det.commands.benchmark import main

if __name__ == "__main__":
    cli.run(main)
