#!/usr/bin/env python
"""``zenith-det gradient-noise``, from a checkout; its code is in zenith_det/commands/gradient_noise.py."""

from zenith_det import cli
from zenith_det.commands.gradient_noise import main

if __name__ == "__main__":
    cli.run(main)
