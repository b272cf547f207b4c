"""Measure how much of the gradient norm is noise of the batch, along a run. Noise keeps ZENITH's ratio up.

%(prog)s --config-file output/config.yaml output/model_*.pth --batch-sizes 2 8
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

from zenith_det import cli
from zenith_det.commands.data_folders import data_overrides
from zenith_det.config import validate_config
from zenith_det.engines.detectron2_engine.zoo import load_config_file
from zenith_det.engines.device import resolve_device
from zenith_det.engines.engine import load_engine
from zenith_det.engines.val_share import hold_out
from zenith_det.errors import ConfigError


def argument_parser() -> argparse.ArgumentParser:
    parser = cli.parser("gradient-noise", __doc__)
    parser.add_argument("--config-file", required=True, metavar="FILE", help="the config.yaml of the run")
    parser.add_argument(
        "checkpoints",
        nargs="*",
        metavar="CHECKPOINT",
        help="checkpoints of the run; without any: the weights it starts from",
    )
    parser.add_argument(
        "--batch-sizes", type=int, nargs="+", metavar="B", help="images a batch (default: the config's)"
    )
    parser.add_argument(
        "--batches", type=int, default=64, metavar="N", help="batches of each size (default 64)"
    )
    cli.add_data_flags(parser, val=False)
    parser.add_argument(
        "--output", type=Path, metavar="FILE.json", help="also write the figures to this file"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """A line for each checkpoint and batch size."""
    from zenith_det.engines import gradient_noise

    args = argument_parser().parse_args(argv)
    least = 2 * gradient_noise.PARTS
    if args.batches < least or args.batches % gradient_noise.PARTS:
        raise ConfigError(
            f"--batches {args.batches}: a multiple of {gradient_noise.PARTS}, {least} or more, is needed"
        )
    sizes = args.batch_sizes or [int(load_config_file(args.config_file, []).cfg.SOLVER.IMS_PER_BATCH)]
    if min(sizes) < 1:
        raise ConfigError(f"--batch-sizes {min(sizes)}: at least 1 is needed")
    datasets = data_overrides(args, args.output.parent if args.output else "output")
    rows = []
    print(
        f"{'checkpoint':24} {'batch':>5}  {'E|g|^2':>9}  {'signal':>9}  noise share (of quarters)", flush=True
    )
    for checkpoint in sorted(args.checkpoints, key=_iteration) or [""]:
        for size in sizes:
            words = ["SOLVER.IMS_PER_BATCH", str(size), "SOLVER.AVERAGE.KIND", "", "SEED", "0"]
            words += ["MODEL.WEIGHTS", checkpoint] if checkpoint else []
            loaded = load_config_file(args.config_file, words)
            for key, value, flag in datasets:
                loaded.override(key, value, flag)
            validate_config(loaded.cfg, loaded.sources)
            hold_out(loaded, args.output.parent if args.output else "output", say=print)
            resolve_device(loaded)
            found = gradient_noise.measure(load_engine("torchvision"), loaded, args.batches)
            low, high = found.spread
            name = Path(checkpoint).name or "before training"
            print(
                f"{name:24} {size:5}  {found.square:9.4g}  {found.signal:9.4g}  "
                f"{100 * found.share:.0f} % ({100 * low:.0f} to {100 * high:.0f})",
                flush=True,
            )
            rows.append({"checkpoint": checkpoint, "batch": size, "square": found.square, "signal": found.signal,
                         "share": found.share, "least": low, "most": high})  # fmt: skip
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(rows, indent=1))
    return 0


def _iteration(checkpoint: str) -> tuple[int, str]:
    """Checkpoints in the order of training; the final one last."""
    found = re.search(r"model_(\d+)", Path(checkpoint).name)
    return (int(found[1]) if found else 10**9, checkpoint)
