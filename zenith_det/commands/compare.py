"""Train one config with several optimizers and schedules, over several seeds, and compare them."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import torch

import zenith_det
from zenith_det import cli
from zenith_det.benchmarking.machine import describe_machine
from zenith_det.commands.data_folders import data_overrides
from zenith_det.comparing.arms import BUILT_IN, choose_arms, read_arms
from zenith_det.comparing.html_report import write_report
from zenith_det.comparing.plan import distinct, plan_runs
from zenith_det.comparing.results import collect, default_reference
from zenith_det.comparing.runner import Runner, parse_device
from zenith_det.comparing.summary import JSON_FILE, describe_final, save, text_table
from zenith_det.config import get_cfg
from zenith_det.config.keys import first_key
from zenith_det.engines.detectron2_engine.zoo import load_config_file
from zenith_det.engines.val_share import hold_out
from zenith_det.errors import ConfigError, RunStopped

EPILOG = """
examples:
  ZENITH and the usual schedules, three seeds each:
    %(prog)s --config-file quickstart/mask_rcnn_zenith.yaml \\
        --arms zenith sgd_step sgd_cosine --seeds 0 1 2
  each with its own best learning rate out of five:
    %(prog)s --config-file … --arms zenith sgd_step --lr-scales 0.25 0.5 1 2 4
  your own data, two GPUs:
    %(prog)s --config-file … --train-json t.json --train-images t --val-json v.json --val-images v \\
        --devices cuda:0 cuda:1

Give the same command again to continue after an interruption.
"""


def argument_parser() -> argparse.ArgumentParser:
    """What to compare, how often, and where to."""
    parser = cli.parser("compare", __doc__, EPILOG)
    parser.add_argument("--config-file", metavar="FILE", help=f"as for {cli.command('train')}")
    parser.add_argument(
        "--arms", nargs="+", default=["zenith", "sgd_step", "sgd_cosine"], metavar="ARM",
        help="what to compare (default: zenith sgd_step sgd_cosine); --list-arms shows all",
    )  # fmt: skip
    parser.add_argument("--arms-file", metavar="FILE", help="arms of your own, in YAML: docs/COMPARING.md")
    parser.add_argument("--list-arms", action="store_true", help="show the arms with their keys, and stop")
    parser.add_argument(
        "--seeds",
        nargs="+",
        type=int,
        default=[0, 1, 2],
        metavar="N",
        help="one run for each (default 0 1 2)",
    )
    parser.add_argument(
        "--reference", metavar="ARM", help="compare with this arm (default: the first that isn't ZENITH)"
    )
    parser.add_argument(
        "--lrs", nargs="+", default=[], metavar="ARM=LR,LR,…", help="learning rates to try for an arm"
    )
    parser.add_argument(
        "--lr-scales", nargs="+", type=positive_float, default=[1.0], metavar="X",
        help="for the other arms: try their own learning rate times each of these (default 1)",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, default=Path("output/compare"), metavar="DIR",
                        help="where runs and tables go (default output/compare)")  # fmt: skip
    parser.add_argument("--engine", choices=("auto", "detectron2", "torchvision"), default="auto")
    parser.add_argument("--evaluations", type=positive, default=8, metavar="N",
                        help="how often each run is evaluated, evenly spaced (default 8)")  # fmt: skip
    parser.add_argument(
        "--jobs", type=positive, metavar="N", help="how many runs at once (default: one per device)"
    )
    parser.add_argument("--threads", type=positive, metavar="N",
                        help="CPU threads of each run (default: the cores divided by --jobs)")  # fmt: skip
    parser.add_argument(
        "--devices", nargs="+", default=[], metavar="DEVICE",
        help="cpu, cuda:0, cuda:1 …: runs take these in turn (default: the config's)",
    )  # fmt: skip
    parser.add_argument("--num-gpus", type=int, help=f"processes of each run, as for {cli.command('train')}")
    cli.add_data_flags(parser)
    parser.add_argument("--retry-failed", action="store_true", help="start failed runs again")
    parser.add_argument(
        "--report-only", action="store_true", help="start no run: make the tables of what is there so far"
    )
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="config keys to override in all runs")
    return parser


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """As argparse does, but what follows ``--seeds 0 1 2`` may be the first KEY."""
    first = first_key(argv, get_cfg())
    args = argument_parser().parse_args(argv[:first])
    args.opts += argv[first:]
    return cli.flags_among_keys(argument_parser(), args)


def positive(text: str) -> int:
    """A whole number >= 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not 1 or more")
    return value


def positive_float(text: str) -> float:
    """A number > 0."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{value} is not above 0")
    return value


def parse_lrs(words: list[str]) -> dict[str, list[float]]:
    """``["zenith=0.02,0.04"]`` as ``{"zenith": [0.02, 0.04]}``.

    Raises:
        ConfigError: it is written otherwise.
    """
    found = {}
    for word in words:
        name, _, values = word.partition("=")
        try:
            found[name] = [positive_float(value) for value in values.split(",")]
        except (ValueError, argparse.ArgumentTypeError):
            raise ConfigError(f"--lrs {word}: give ARM=LR,LR,… with numbers above 0") from None
    return found


def list_arms(arms_file: str | None) -> None:
    """Print every arm with what it sets."""
    for arm in [*BUILT_IN, *(read_arms(arms_file) if arms_file else [])]:
        lr = f"SOLVER.BASE_LR {arm.lr:g}" if arm.lr is not None else f"SOLVER.BASE_LR x {arm.lr_factor:g}"
        steps = (
            f" SOLVER.STEPS at {', '.join(f'{s:.3g}' for s in arm.steps_at)} of MAX_ITER"
            if arm.steps_at
            else ""
        )
        keys = " ".join(f"{key} {value}" for key, value in arm.overrides.items())
        print(f"{arm.name} ({arm.label})\n    {keys} {lr}{steps}")


def main(argv: list[str] | None = None) -> int:
    """Plan, carry out, compare."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse_arguments(argv)
    if args.list_arms:
        list_arms(args.arms_file)
        return 0
    if not args.config_file:
        raise ConfigError("--config-file is missing: give one, such as mask_rcnn_zenith.yaml")
    if len(set(args.seeds)) < len(args.seeds):
        raise ConfigError(f"--seeds {' '.join(map(str, args.seeds))}: a seed is given twice")
    arms = choose_arms(args.arms, args.arms_file)
    if args.reference and args.reference not in args.arms:
        raise ConfigError(f"--reference {args.reference}: it is not among --arms")
    output = args.output.absolute()
    opts = list(args.opts)
    for key, value, _ in data_overrides(args, output):
        opts += [key, value]
    loaded = load_config_file(args.config_file, opts)
    if loaded.cfg.DATASETS.VAL_SHARE:  # once for all runs
        hold_out(loaded, output, resume=True, say=print)
        for key in ("VAL_SHARE", "TRAIN_JSON", "TRAIN_IMAGES", "VAL_JSON", "VAL_IMAGES"):
            opts += [f"DATASETS.{key}", str(loaded.cfg.DATASETS[key])]
    runs = plan_runs(
        load_config_file, args.config_file, arms, args.seeds, output,
        opts=opts, engine=args.engine, lrs=parse_lrs(args.lrs), lr_scales=args.lr_scales,
        evaluations=args.evaluations,
    )  # fmt: skip
    named = [arm for arm in arms if arm.name == args.reference]
    reference = named[0] if named else default_reference(runs)
    devices = [parse_device(device, torch.cuda.device_count()) for device in args.devices]
    jobs = args.jobs or max(1, len(devices))
    flags = ["--engine", args.engine]
    if args.num_gpus is not None:
        flags += ["--num-gpus", str(args.num_gpus)]
    runner = Runner(
        cli.process("train"), args.config_file, flags,
        jobs=jobs, threads=args.threads or max(1, (os.cpu_count() or 1) // jobs), devices=devices,
        retry_failed=args.retry_failed, describe=describe_final, say=lambda line: print(line, flush=True),
    )  # fmt: skip
    stopped: RunStopped | None = None
    if not args.report_only:
        print(
            f"{len(distinct(runs))} runs: {len(arms)} arms, {len(args.seeds)} seeds, {runs[0].max_iter} iterations each"
        )
        try:
            runner.carry_out(distinct(runs))
        except RunStopped as stop:
            stopped = stop
    comparison = collect(runs, arms, reference)
    facts = {
        "command": f"{cli.command('compare')} {shlex.join(argv)}",
        "config_file": args.config_file,
        "keys": opts,
        **made_with(output, new=not args.report_only),
    }
    print(text_table(comparison))
    print(
        "written:", *save(comparison, output, facts), write_report(comparison, output, facts)[0], sep="\n  "
    )
    if stopped:
        raise stopped
    return 0 if any(outcome.ok for outcome in comparison.outcomes) else 1


def made_with(output: Path, *, new: bool) -> dict[str, Any]:
    """Date and machine of the runs: of now, or where nothing was run, of the earlier ``compare.json``."""
    if not new:
        try:
            earlier = json.loads((output / JSON_FILE).read_text(encoding="utf-8"))
            return {"date": earlier["date"], "machine": earlier["machine"]}
        except (OSError, ValueError, KeyError, TypeError):
            return {}
    machine = describe_machine()
    for name in ("torchvision", "detectron2"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            machine[name] = importlib.metadata.version(name)
    machine["zenith_det"] = zenith_det.__version__
    return {"date": time.strftime("%Y-%m-%d %H:%M"), "machine": machine}
