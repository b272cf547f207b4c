"""Measure speed and memory side by side: a table here, JSON and a plot in a folder.

%(prog)s optimizer                 # ZENITH's step beside other optimizers'
%(prog)s eval --images 1000        # our COCO evaluation beside pycocotools
%(prog)s iteration                 # a training iteration, ZENITH beside SGD
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from zenith_det import cli
from zenith_det.config.metric_names import TASKS
from zenith_det.errors import UserError

if TYPE_CHECKING:  # torch takes seconds, which a wrong flag need not wait for
    import torch

    from zenith_det.benchmarking.reporting import Comparison

CONFIGS = [f"{task}_rcnn_zenith.yaml" for task in ("faster", "mask", "keypoint")]
QUICKSTART = "quickstart/mask_rcnn_small.yaml"


def main(argv: list[str] | None = None) -> int:
    """Measure, show, save."""
    args = argument_parser().parse_args(argv)
    from zenith_det.benchmarking.reporting import Report

    logging.disable(logging.INFO)  # of the engines, which describe every model they make
    if args.threads:
        import torch

        torch.set_num_threads(args.threads)
    comparisons: list[Comparison] = args.measure(args)
    settings = {k: v for k, v in vars(args).items() if k not in ("measure", "output", "command")}
    report = Report(args.command, settings, comparisons)
    report.show()
    print("written:", *report.save(Path(args.output)))
    wrong = [c.title for c in comparisons if c.facts.get("agrees") is False]
    for title in wrong:
        print(f"error: {title}: results differ", file=sys.stderr)
    return 1 if wrong else 0


def optimizer(args: argparse.Namespace) -> list[Comparison]:
    from zenith_det.benchmarking.optimizers import compare_optimizers

    device = device_of(args)
    return [
        compare_optimizers(config, args.opts, rounds=args.rounds, warmup=args.warmup, device=device)
        for config in args.config_file or CONFIGS
    ]


def evaluation(args: argparse.Namespace) -> list[Comparison]:
    from zenith_det.benchmarking.evaluation import compare_evaluations

    return compare_evaluations(
        args.images, args.detections, args.tasks, rounds=args.rounds, warmup=args.warmup
    )


def iteration(args: argparse.Namespace) -> list[Comparison]:
    from zenith_det.benchmarking.loops import compare_iterations

    settings = {"batch_size": args.batch_size, "size": args.size, "device": device_of(args)}
    return [
        compare_iterations(config, args.opts, rounds=args.rounds, warmup=args.warmup, **settings)
        for config in args.config_file or [CONFIGS[1]]
    ]


def training(args: argparse.Namespace) -> list[Comparison]:
    from zenith_det.benchmarking.loops import TRAINING_KINDS, compare_training

    device = device_of(args)
    unknown = [kind for kind in args.kinds or [] if kind not in TRAINING_KINDS]
    if unknown:
        raise UserError(f"--kinds {unknown[0]!r}: it must be one of {', '.join(map(repr, TRAINING_KINDS))}")
    # float16 needs a GPU, and compiling takes minutes.
    usual = [k for k in TRAINING_KINDS if "compiled" not in k and (device.type == "cuda" or "fp16" not in k)]
    kinds = args.kinds or usual
    settings = {"batch_sizes": args.batch_sizes, "kinds": kinds, "size": args.size, "device": device}
    comparisons = []
    for config in args.config_file or [CONFIGS[1]]:
        comparisons += compare_training(config, args.opts, rounds=args.rounds, warmup=args.warmup, **settings)
    return comparisons


def data(args: argparse.Namespace) -> list[Comparison]:
    from zenith_det.benchmarking.loading import compare_loading

    settings = {"batch_size": args.batch_size, "size": args.size, "device": device_of(args)}
    return [
        compare_loading(
            config, args.opts, workers=args.workers, rounds=args.rounds, warmup=args.warmup, **settings
        )
        for config in args.config_file or [CONFIGS[1]]
    ]


def imports(args: argparse.Namespace) -> list[Comparison]:
    from zenith_det.benchmarking.startup import compare_imports

    return [compare_imports(rounds=args.rounds, warmup=args.warmup)]


def scale(args: argparse.Namespace) -> list[Comparison]:
    from zenith_det.benchmarking.scaling import (
        scale_images,
        scale_parameters,
        scale_processes,
        scale_window,
    )

    counts, device = {"rounds": args.rounds, "warmup": args.warmup}, device_of(args)
    return [
        *scale_parameters(args.parameters, device=device, **counts),
        *scale_window(args.windows, device=device, **counts),
        *scale_images(args.images, **counts),
        *scale_processes(
            args.processes,
            QUICKSTART,
            images=max(args.images),
            **counts,
        ),
    ]


def device_of(args: argparse.Namespace) -> torch.device:
    """The device asked for, or CUDA where it is."""
    import torch

    there = torch.cuda.is_available()
    if args.device == "cuda" and not there:
        raise UserError("--device cuda: PyTorch sees no CUDA device, use cpu")
    return torch.device(args.device if args.device != "auto" else "cuda" if there else "cpu")


def positive(text: str) -> int:
    """A whole number >= 1 of a command line."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not 1 or more")
    return value


def argument_parser() -> argparse.ArgumentParser:
    """One subcommand per subject, with the flags of all of them on each."""
    parser = cli.parser("benchmark", __doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, measure: object, rounds: int, warmup: int, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(measure=measure)
        command.add_argument(
            "--rounds", type=positive, default=rounds, help=f"runs of each case (default {rounds})"
        )
        command.add_argument(
            "--warmup", type=int, default=warmup, help=f"runs before that don't count (default {warmup})"
        )
        command.add_argument("--threads", type=positive, help="torch's threads (default: torch's choice)")
        command.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
        command.add_argument("--output", default="output/benchmark", metavar="DIR", help="where files go")
        return command

    command = add("optimizer", optimizer, 30, 3, "step time and state memory of optimizers")
    add_config(command, "all of R50-FPN Faster, Mask and Keypoint R-CNN")

    command = add("eval", evaluation, 3, 0, "our COCO evaluation beside pycocotools and Detectron2's")
    command.add_argument("--images", type=positive, default=5000, help="(default 5000)")
    command.add_argument("--detections", type=positive, default=100, help="in each image (default 100)")
    command.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))

    command = add(
        "iteration", iteration, 10, 2, "a whole training iteration, ZENITH beside SGD, both engines"
    )
    command.add_argument("--batch-size", type=positive, default=2, help="(default 2)")
    add_size(command)
    add_config(command, "Mask R-CNN")

    command = add(
        "train", training, 10, 2, "images/s and peak memory of both engines, by precision and memory format"
    )
    command.add_argument(
        "--kinds",
        nargs="+",
        metavar="KIND",
        help="such as fp32 'fp32 channels_last' bf16 'bf16 channels_last' fp16 'fp16 channels_last' 'fp32 compiled' "
        "(default: all but the compiled ones; fp16 on CUDA alone)",
    )
    command.add_argument("--batch-sizes", type=positive, nargs="+", default=[1, 2, 4], help="(default 1 2 4)")
    add_size(command)
    add_config(command, "Mask R-CNN")

    command = add(
        "data", data, 20, 4, "images/s of the built-in engine's loader, and how long training waits for it"
    )
    command.add_argument("--batch-size", type=positive, default=2, help="(default 2)")
    command.add_argument(
        "--workers", type=int, nargs="+", default=[0, 1, 2], help="processes (default 0 1 2)"
    )
    add_size(command)
    add_config(command, "Mask R-CNN")

    add("import", imports, 10, 1, "import zenith_det beside import torch")

    command = add("scale", scale, 5, 1, "how times grow with parameters, W, images and processes")
    millions = [10**6, 4 * 10**6, 16 * 10**6, 64 * 10**6]
    command.add_argument("--parameters", type=positive, nargs="+", default=millions)
    command.add_argument("--windows", type=positive, nargs="+", default=[10, 100, 1000, 10_000, 100_000])
    command.add_argument("--images", type=positive, nargs="+", default=[100, 400, 1600])
    command.add_argument("--processes", type=positive, nargs="+", default=[1, 2])
    return parser


def add_size(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--size", type=positive, default=256, help="shorter side of the images in pixels (default 256)"
    )


def add_config(command: argparse.ArgumentParser, default: str) -> None:
    command.add_argument(
        "--config-file", action="append", metavar="FILE", help=f"may be given again (default: {default})"
    )
    command.add_argument(
        "opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="config keys to override"
    )
