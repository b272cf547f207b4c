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
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import zenith_det
from zenith_det import cli
from zenith_det.benchmarking.machine import describe_machine
from zenith_det.commands.data_folders import data_overrides
from zenith_det.comparing.arms import BUILT_IN, Arm, choose_arms, read_arms
from zenith_det.comparing.html_report import write_report
from zenith_det.comparing.plan import distinct, plan_runs
from zenith_det.comparing.results import Comparison, collect, default_reference
from zenith_det.comparing.runner import Runner, parse_device
from zenith_det.comparing.summary import JSON_FILE, describe_final, save, text_table
from zenith_det.config import LoadedConfig
from zenith_det.engines.detectron2_engine.zoo import load_config_file
from zenith_det.engines.val_share import hold_out
from zenith_det.errors import ConfigError, RunStopped

#: Where the runs that choose learning rates are, below the output folder.
TUNING = "tuning"

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
  learning rates chosen on a fifth of the training images, not on those reported:
    %(prog)s --config-file … --train-json t.json --train-images t --val-json v.json --val-images v \\
        --lr-scales 0.5 1 2 --tune-share 0.2

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
    parser.add_argument(
        "--tune-share", type=part, default=0.0, metavar="SHARE",
        help="choose each arm's learning rate on this share of the training set, which the tries don't train on, "
        "with the first seed; then train on the whole set and report the validation set",
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


def part(text: str) -> float:
    """A share: a number between 0 and 1."""
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not between 0 and 1")
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
    args = cli.parse_arguments(argument_parser(), argv)
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
    if loaded.cfg.DATASETS.VAL_SHARE:
        opts += split_keys(loaded, output)
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
    study = Study(args, argv, arms, runner)
    tries: dict[str, Any] = {"lrs": parse_lrs(args.lrs), "lr_scales": args.lr_scales}
    chosen_on = ""
    if args.tune_share:
        chosen_on, tries["lrs"] = tune(study, opts, tries, output)
        tries["lr_scales"] = [1.0]
    comparison = study.carry_out(args.seeds, output, opts, chosen_on, evaluations=args.evaluations, **tries)
    return 0 if any(outcome.ok for outcome in comparison.outcomes) else 1


@dataclass(frozen=True)
class Study:
    """What the runs that choose the learning rates and those that are reported share.

    Attributes:
        args: of the command line.
        argv: the same, as words.
        arms: all.
        runner: carries out runs.
    """

    args: argparse.Namespace
    argv: Sequence[str]
    arms: Sequence[Arm]
    runner: Runner

    def carry_out(
        self, seeds: Sequence[int], output: Path, opts: list[str], chosen_on: str = "",
        only: Collection[str] | None = None, **tries: Any,
    ) -> Comparison:  # fmt: skip
        """Plan and carry out runs, and write what they gave.

        Args:
            only: names of the arms; default: all.
            tries: of :func:`plan_runs`.

        Raises:
            RunStopped: a signal came; what is there was written.
        """
        arms = [arm for arm in self.arms if only is None or arm.name in only]
        args = self.args
        runs = plan_runs(
            load_config_file, args.config_file, arms, seeds, output, opts=opts, engine=args.engine, **tries
        )
        named = [arm for arm in arms if arm.name == args.reference]
        reference = named[0] if named else default_reference(runs)
        stopped: RunStopped | None = None
        if not args.report_only:
            print(
                f"{len(distinct(runs))} runs: {len(arms)} arms, {len(seeds)} seeds, {runs[0].max_iter} iterations each"
            )
            try:
                self.runner.carry_out(distinct(runs))
            except RunStopped as stop:
                stopped = stop
        comparison = collect(runs, arms, reference, chosen_on)
        facts = {
            "command": f"{cli.command('compare')} {shlex.join(self.argv)}",
            "config_file": args.config_file,
            "keys": opts,
            **made_with(output, new=not args.report_only),
        }
        print(text_table(comparison))
        written = [*save(comparison, output, facts), write_report(comparison, output, facts)[0]]
        print("written:", *written, sep="\n  ", flush=True)
        if stopped:
            raise stopped
        return comparison


def tune(
    study: Study, opts: list[str], tries: Mapping[str, Any], output: Path
) -> tuple[str, dict[str, list[float]]]:
    """Choose every arm's learning rate on a part of the training set, with the first seed.

    Returns:
        A sentence about it, and by arm its learning rate.

    Raises:
        ConfigError: the training set can't be split, or there is nothing to choose.
        RunStopped: see :meth:`Study.carry_out`.
    """
    share = study.args.tune_share
    # Whatever is wrong with the runs to report is told now, not after the tries.
    plan_runs(
        load_config_file, study.args.config_file, study.arms, study.args.seeds, output, opts=opts, **tries
    )
    several = {
        arm.name
        for arm in study.arms
        if not arm.finds_lr and len(tries["lrs"].get(arm.name, tries["lr_scales"])) > 1
    }
    if not several:
        raise ConfigError(
            f"--tune-share {share:g}: every arm has one learning rate: give more with --lrs or --lr-scales"
        )
    without_val = ["DATASETS.VAL_JSON", "", "DATASETS.VAL_IMAGES", ""]
    held = load_config_file(study.args.config_file, [*opts, *without_val, "DATASETS.VAL_SHARE", f"{share:g}"])
    folder = output / TUNING
    found = study.carry_out(
        study.args.seeds[:1], folder, [*opts, *split_keys(held, folder)], only=several, evaluations=1,
        **dict(tries) | {"lrs": {name: lrs for name, lrs in tries["lrs"].items() if name in several}},
    )  # fmt: skip
    chosen = {arm.name: [found.best(arm).lr] for arm in found.arms}
    sentence = (
        f"chosen with seed {study.args.seeds[0]} on {share:.0%} of the training images, which those runs did not "
        f"train on ({TUNING}/compare.html); the arms reported train on all of them."
    )
    return sentence, {**tries["lrs"], **chosen}


def split_keys(loaded: LoadedConfig, folder: Path) -> list[str]:
    """Hold out ``DATASETS.VAL_SHARE`` once for all runs; the KEY VALUE pairs by which each takes the same two sets."""
    hold_out(loaded, folder, resume=True, say=print)
    keys = ("VAL_SHARE", "TRAIN_JSON", "TRAIN_IMAGES", "VAL_JSON", "VAL_IMAGES")
    return [word for key in keys for word in (f"DATASETS.{key}", str(loaded.cfg.DATASETS[key]))]


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
