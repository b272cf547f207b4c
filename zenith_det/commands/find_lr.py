"""Find SOLVER.BASE_LR by an LR range test: a short training in which the LR grows until the loss does.

%(prog)s --config-file mask_rcnn_zenith.yaml --train-json train.json --train-images images
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path

from zenith_det import cli
from zenith_det.commands.data_folders import data_overrides
from zenith_det.config import validate_config
from zenith_det.engines import lr_range_test
from zenith_det.engines.detectron2_engine.zoo import load_config_file
from zenith_det.engines.device import apply_torch_settings, resolve_device
from zenith_det.engines.engine import load_engine
from zenith_det.engines.probe import lr_probe
from zenith_det.engines.selection import select_engine
from zenith_det.engines.val_share import hold_out
from zenith_det.errors import ConfigError
from zenith_det.files import write_whole


def argument_parser() -> argparse.ArgumentParser:
    parser = cli.parser("find-lr", __doc__)
    parser.add_argument("--config-file", required=True, metavar="FILE", help=f"as for {cli.command('train')}")
    parser.add_argument("--engine", choices=("auto", "detectron2", "torchvision"), default="auto")
    cli.add_data_flags(parser, val=False)
    sgd, adamw = lr_range_test.SGD_LRS, lr_range_test.ADAMW_LRS
    parser.add_argument(
        "--min-lr", type=float, metavar="LR",
        help=f"LR of the first iteration (default {sgd[0]:g}, under AdamW {adamw[0]:g})",
    )  # fmt: skip
    parser.add_argument(
        "--max-lr", type=float, metavar="LR",
        help=f"LR of the last iteration (default {sgd[1]:g}, under AdamW {adamw[1]:g})",
    )  # fmt: skip
    parser.add_argument(
        "--iterations", type=int, default=lr_range_test.ITERATIONS, metavar="N",
        help=f"length of the test; more give a smoother curve (default {lr_range_test.ITERATIONS})",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=Path, default=Path("output/find_lr"), metavar="DIR",
        help="folder for the curve, as PNG and JSON (default output/find_lr)",
    )  # fmt: skip
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="config keys to override")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Test, choose, draw."""
    args = cli.parse_arguments(argument_parser(), argv)
    least = 5 * lr_range_test.CYCLE
    if args.iterations < least:
        raise ConfigError(f"--iterations {args.iterations}: at least {least} are needed to see anything")
    loaded = load_config_file(args.config_file, args.opts)
    for key, value, flag in data_overrides(args, args.output):
        loaded.override(key, value, flag)
    validate_config(loaded.cfg, loaded.sources)
    hold_out(loaded, args.output, say=print)
    usual = lr_range_test.lrs_of(loaded)
    min_lr = usual[0] if args.min_lr is None else args.min_lr
    max_lr = usual[1] if args.max_lr is None else args.max_lr
    if not 0 < min_lr < max_lr < float("inf"):
        raise ConfigError(f"--min-lr {min_lr:g} --max-lr {max_lr:g}: the first must be the lower, above 0")
    resolve_device(loaded)
    apply_torch_settings(loaded.cfg)
    choice = select_engine(args.engine)
    print(f"engine: {choice.name} ({choice.reason})", flush=True)
    engine = load_engine(choice.name)
    test = lr_range_test.measure(
        loaded, partial(lr_probe, engine), lrs=(min_lr, max_lr), iterations=args.iterations
    )
    curve = args.output / lr_range_test.CURVE_FILE
    found, png = lr_range_test.draw(test, curve)
    write_whole(curve, png)
    record = {
        "lr": found.lr, "too_high": found.edge, "batch": loaded.cfg.SOLVER.IMS_PER_BATCH,
        "lrs": test.lrs.tolist(), "losses": [float(x) if x == x else None for x in test.losses],
    }  # fmt: skip
    write_whole(curve.with_suffix(".json"), json.dumps(record))
    print(
        f"SOLVER.BASE_LR {found.lr:g} for {loaded.cfg.SOLVER.IMS_PER_BATCH} images a batch: "
        f"{found.reason}; curve: {curve}"
    )
    return 0
