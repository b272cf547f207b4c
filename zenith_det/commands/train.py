"""Train or evaluate Faster, Mask or Keypoint R-CNN with ZENITH, on Detectron2 or on the built-in engine."""

from __future__ import annotations

import argparse
import os

import psutil

from zenith_det import cli
from zenith_det.commands.data_folders import data_overrides
from zenith_det.config import validate_config
from zenith_det.engines.detectron2_engine.zoo import load_config_file
from zenith_det.engines.options import RunOptions
from zenith_det.engines.selection import EngineChoice, select_engine
from zenith_det.errors import ConfigError
from zenith_det.training.processes.distributed import restart_count
from zenith_det.training.processes.launching import launch
from zenith_det.training.processes.stopping import parse_duration

EPILOG = """
examples:
  one GPU (or the CPU, where there is none):
    %(prog)s --config-file mask_rcnn_zenith.yaml
  your own COCO-format data:
    %(prog)s --config-file mask_rcnn_zenith.yaml --epochs 12 \\
        --train-json train.json --train-images images --val-json val.json --val-images images
  eight GPUs:
    %(prog)s --config-file mask_rcnn_zenith.yaml --num-gpus 8
  evaluate, or continue after an interruption:
    %(prog)s --config-file output/config.yaml --eval-only MODEL.WEIGHTS output/model_final.pth
    %(prog)s --config-file output/config.yaml --resume

exit codes: 0 done, 1 the results are not those of TEST.EXPECTED_RESULTS, 2 an error (one line says what to correct),
3 training diverged for good, 75 stopped on request and saved (continue with --resume)
"""


def argument_parser() -> argparse.ArgumentParser:
    """Detectron2's flags with their meanings, and ours."""
    parser = cli.parser("train", __doc__, EPILOG)
    parser.add_argument(
        "--config-file",
        default="",
        metavar="FILE",
        help="a YAML config: a path, or the name of one that comes with zenith_det or Detectron2's model zoo",
    )
    parser.add_argument(
        "--engine",
        choices=("auto", "detectron2", "torchvision"),
        default="auto",
        help="auto: Detectron2 if it is installed, else the built-in engine on torchvision",
    )
    parser.add_argument(
        "--resume", action="store_true", help="continue from the newest checkpoint in OUTPUT_DIR"
    )
    parser.add_argument("--eval-only", action="store_true", help="evaluate MODEL.WEIGHTS and stop")
    parser.add_argument(
        "--zenith",
        action="store_true",
        help="train any config with ZENITH, without its step schedule (STEPS, GAMMA)",
    )
    parser.add_argument(
        "--epochs", type=float, metavar="N", help="passes over the data; sets SOLVER.MAX_ITER"
    )
    parser.add_argument(
        "--auto-lr",
        action="store_true",
        help="find SOLVER.BASE_LR by an LR range test before the run (one process); see docs/LEARNING_RATE.md",
    )
    parser.add_argument(
        "--until-settled",
        action="store_true",
        help="end when ZENITH's ratio and the AP have settled, at SOLVER.MAX_ITER (--epochs) at the latest",
    )
    parser.add_argument(
        "--max-time",
        metavar="TIME",
        help="save and end within this time (3h30m, 90m, 3:30:00), with exit code 75; --resume continues",
    )
    cli.add_data_flags(parser)
    cli.add_max_bad_images(parser)
    cli.add_crowds(parser)
    parser.add_argument(
        "--strict",
        action="store_true",
        help="refuse a dataset if annotations would be dropped or its boxes look suspicious",
    )
    parser.add_argument("--num-gpus", type=int, default=1, help="processes on this machine (0: the CPU)")
    parser.add_argument("--num-machines", type=int, default=1, help="machines in all")
    parser.add_argument("--machine-rank", type=int, default=0, help="this machine, from 0")
    parser.add_argument(
        "--dist-url",
        default="auto",
        metavar="URL",
        help="where the machines meet: tcp://HOST:PORT of machine 0; auto on one machine",
    )
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="config keys to override")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Parse the command line, choose the engine, run."""
    args = cli.parse_arguments(argument_parser(), argv)
    if not args.config_file and not args.opts:
        raise ConfigError("--config-file is missing: give one, such as mask_rcnn_zenith.yaml")
    if args.epochs is not None and not 0 < args.epochs < float("inf"):
        argument_parser().error(f"--epochs is {args.epochs}: give a number above 0")
    deadline = None if args.max_time is None else command_start() + parse_duration(args.max_time)
    choice = select_engine(args.engine)
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"engine: {choice.name} ({choice.reason})", flush=True)
    return run_engine(choice, args, deadline)


def command_start() -> float:
    """``time.time()`` at which the command began; torchrun's own, where it has restarted this process."""
    process = psutil.Process()
    return float((process.parent() or process if restart_count() else process).create_time())


def run_engine(choice: EngineChoice, args: argparse.Namespace, deadline: float | None = None) -> int:
    """Load the configuration and hand it to the engine chosen, in as many processes as asked for."""
    loaded = load_config_file(args.config_file, args.opts, zenith=args.zenith)
    for key, value, flag in data_overrides(args, loaded.cfg.OUTPUT_DIR):
        loaded.override(key, value, flag)
    if args.strict:
        loaded.override("DATASETS.STRICT", True, "--strict")
    if args.max_bad_images is not None:
        loaded.override("DATASETS.MAX_BAD_IMAGES", args.max_bad_images, "--max-bad-images")
    if args.crowds:
        loaded.override("DATASETS.CROWDS", args.crowds, "--crowds")
    if args.num_gpus == 0:
        loaded.override("MODEL.DEVICE", "cpu", "--num-gpus 0")
    if args.auto_lr:
        loaded.override("SOLVER.AUTO_LR", True, "--auto-lr")
    if args.until_settled:
        loaded.override("SOLVER.ZENITH.UNTIL_SETTLED", True, "--until-settled")
    validate_config(loaded.cfg, loaded.sources)
    from zenith_det.engines.run import run  # with torch and more: not for a mistake in a key

    options = RunOptions(args.resume, args.eval_only, args.epochs, deadline)
    launch(
        run,
        max(args.num_gpus, 1),
        args.num_machines,
        args.machine_rank,
        args.dist_url,
        (choice.name, loaded, options),
        device=loaded.cfg.MODEL.DEVICE if loaded.cfg.MODEL.DEVICE != "cuda" else "auto",
    )
    return 0
