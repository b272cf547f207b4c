"""Compare optimizers × regularizers × seeds, each with its own η₀ from the same budget.

    python examples/classification/compare.py --output output/digits --width 0.125 --window 25 \
        --models resnet18 vgg11_bn --regularizers none decay

For every network and regularizer, each optimizer's η₀ is chosen by the validation images among the same number
of candidates, with the first ``--search-seeds`` seeds; then the other seeds run with it. Test images are used
for the table alone. Runs that ``runs.jsonl`` has already are not run again: start the command anew to go on.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import images
import networks
import numpy as np
import train
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from train import OPTIMIZERS, Options

from zenith_det import cli
from zenith_det.errors import ConfigError, TrainingDivergedError, UserError
from zenith_det.report.curves import CYCLE

RUNS_FILE = "runs.jsonl"
REGULARIZERS: dict[str, dict[str, float]] = {
    "none": {},
    "decay": {"weight_decay": 5e-4},
    "smoothing": {"label_smoothing": 0.1},
    "dropout": {"dropout": 0.2},
    "all": {"weight_decay": 5e-4, "label_smoothing": 0.1, "dropout": 0.2},
}
#: Where things are kept or computed: a run is the same run without them.
_NOT_IDENTITY = ("data_dir", "download", "device", "workers", "noise_every", "noise_batch_sizes")

#: Of the best final validation accuracy of any optimizer: how soon is each there?
TARGET_SHARE = 0.95

Run = dict[str, Any]


class Runs:
    """The finished runs, in a file with a JSON object a line: the settings, and what came out.

    Args:
        path: the file; made if it isn't there. Half a line at its end, of a process that was killed while it
            wrote, is cut off.

    Raises:
        UserError: it can't be read or written, or isn't such a file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[str, Run] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            content = path.read_bytes() if path.exists() else b""
            whole = content[: content.rfind(b"\n") + 1]
            if whole != content:
                path.write_bytes(whole)
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}") from error
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                row = json.loads(line)
                self.found[_key(row["options"])] = row
            except (ValueError, TypeError, KeyError) as error:
                raise UserError(
                    f"{path}, line {number}: not a finished run; remove the line or name another --output"
                ) from error

    def do(self, options: Options, splits: images.Splits) -> Run:
        """The run with these options: from the file, else trained now and put there."""
        identity = {k: v for k, v in dataclasses.asdict(options).items() if k not in _NOT_IDENTITY}
        name = f"{options.model} {_regularizer(options)} {options.optimizer} η₀ {options.lr:g} seed {options.seed}"
        found = self.found.get(_key(identity))
        if found is not None:
            print(f"{name}: there already", flush=True)
            return found
        try:
            row: Run = {"options": identity, **train.train(options, splits, tell=lambda line: None)}
            print(
                f"{name}: validation {_last(row):.2%}, test {row['test_accuracy']:.2%}, {row['seconds']:.1f} s",
                flush=True,
            )
        except TrainingDivergedError as error:  # a row as well: a learning rate that is too large
            row = {"options": identity, "diverged": str(error)}
            print(f"{name}: {error}", flush=True)
        try:
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise UserError(f"{self.path}: {error.strerror}") from error
        self.found[_key(identity)] = row
        return row


def best_lr(runs: Sequence[Run]) -> float | None:
    """The η₀ with the highest mean validation accuracy, then the lowest loss; None if all diverged."""
    scores = []
    for lr in sorted({run["options"]["lr"] for run in runs}):
        same = [run for run in runs if run["options"]["lr"] == lr]
        if any("diverged" in run for run in same):
            continue
        accuracy = statistics.fmean(_last(run) for run in same)
        loss = statistics.fmean(run["epochs"][-1]["validation_loss"] for run in same)
        scores.append((accuracy, -loss, lr))
    return max(scores)[2] if scores else None


def compare(
    args: argparse.Namespace, splits: images.Splits, runs: Runs
) -> Iterator[list[tuple[Run, list[Run]]]]:
    """Runs the grid.

    Yields:
        For each network and regularizer, a row of the table and its runs for each optimizer.
    """
    # In the table's order, so that a grid that is stopped early has whole parts.
    for model in args.models:
        for regularizer in args.regularizers:
            rows = []
            for optimizer in args.optimizers:
                settings = {**train.common(args), **REGULARIZERS[regularizer]}
                settings |= {"model": model, "optimizer": optimizer}
                lrs = [float(f"{OPTIMIZERS[optimizer] * factor:.3g}") for factor in args.lr_factors]
                tried = [
                    runs.do(Options(**settings, lr=lr, seed=seed), splits)
                    for lr in lrs
                    for seed in args.seeds[: args.search_seeds]
                ]
                lr = best_lr(tried)
                final = (
                    []
                    if lr is None
                    else [runs.do(Options(**settings, lr=lr, seed=seed), splits) for seed in args.seeds]
                )
                rows.append((_row(model, regularizer, optimizer, lr, lrs, final), final))
            target = TARGET_SHARE * max((row["validation accuracy"] or 0.0) for row, _ in rows)
            for row, final in rows:
                row["steps to target"] = _steps_to(target / 100, final)
            yield rows


def _steps_to(target: float, runs: Sequence[Run]) -> float | None:
    """The mean of the steps after which the validation accuracy was first there; None where it never was.

    It is known at the end of each epoch.
    """
    firsts = [
        next(
            (epoch["step"] for epoch in run.get("epochs", []) if epoch["validation_accuracy"] >= target), None
        )
        for run in runs
    ]
    reached = [step for step in firsts if step is not None]
    return statistics.fmean(reached) if reached and len(reached) == len(firsts) else None


def _row(
    model: str, regularizer: str, optimizer: str, lr: float | None, lrs: Sequence[float], runs: Sequence[Run]
) -> Run:
    row: Run = {"network": model, "regularization": regularizer, "optimizer": optimizer, "η₀": lr}
    row["of"] = "" if lr is None or len(lrs) < 2 else {min(lrs): "least", max(lrs): "most"}.get(lr, "")
    good = [run for run in runs if "diverged" not in run]
    row["diverged"] = len(runs) - len(good) if lr is not None else "all"
    columns = {
        "validation accuracy": [100 * _last(run) for run in good],
        "test accuracy": [100 * run["test_accuracy"] for run in good],
        "test loss": [run["test_loss"] for run in good],
        "last ratio": [run["epochs"][-1]["ratio"] for run in good],
        "CPU s": [run["cpu_seconds"] for run in good],
    }
    for name, values in columns.items():
        row[name] = statistics.fmean(values) if values else None
        row[f"{name} std"] = statistics.stdev(values) if len(values) > 1 else None
    return row


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table for people: mean ± standard deviation over the seeds.

    "Steps to target" is how soon the validation accuracy was at 95 % of the best optimizer's final one, "last
    ratio" the last learning rate by η₀.
    """
    head = ["network", "regularization", "optimizer", "η₀", "test accuracy %", "test loss"]
    head += ["steps to target", "last ratio"]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for row in rows:
        lr = "all diverged" if row["η₀"] is None else f"{row['η₀']:g}"
        if row["of"]:
            lr += f" ({row['of']} tried)"
        if row["diverged"] not in (0, "all"):
            lr += f", {row['diverged']} diverged"
        cells = [row["network"], row["regularization"], row["optimizer"], lr]
        cells += [_spread(row, "test accuracy", 2), _spread(row, "test loss", 3)]
        cells += ["–" if row["steps to target"] is None else f"{row['steps to target']:.0f}"]
        cells += [_spread(row, "last ratio", 3)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _spread(row: Mapping[str, Any], name: str, digits: int) -> str:
    if row[name] is None:
        return "–"
    text = f"{row[name]:.{digits}f}"
    return text if row[f"{name} std"] is None else f"{text} ± {row[f'{name} std']:.{digits}f}"


def plot(rows: Sequence[tuple[Run, Sequence[Run]]], path: Path) -> None:
    """Validation accuracy, learning rate, ratio and gradient norm over the steps: mean and range over the
    seeds."""
    figure = Figure(figsize=(11, 7), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    panels = {
        "validation_accuracy": "validation accuracy",
        "lr": "learning rate",
        "ratio": "learning rate / η₀",
        "mean_grad_norm": "gradient norm, mean of the epoch",
    }
    for axes, (name, title) in zip(figure.subplots(2, 2).flat, panels.items()):
        for color, (row, runs) in zip(CYCLE, rows):
            good = [run for run in runs if "diverged" not in run]
            if not good:
                continue
            steps = [epoch["step"] for epoch in good[0]["epochs"]]
            values = np.array([[epoch[name] for epoch in run["epochs"]] for run in good])
            axes.plot(steps, values.mean(axis=0), color=color, label=f"{row['optimizer']}, η₀ {row['η₀']:g}")
            axes.fill_between(
                steps, values.min(axis=0), values.max(axis=0), color=color, alpha=0.12, linewidth=0
            )
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_xlabel("step")
        axes.grid(color="#e6e6e6")
        if name == "lr":
            axes.set_yscale("log")
            axes.set_ylim(bottom=max(axes.get_ylim()[0], 1e-5))  # a cosine ends at 0
        if name == "validation_accuracy" and axes.lines:
            axes.set_ylim(bottom=max(axes.get_ylim()[0], 0.8), top=1.0)
            axes.legend(fontsize=8, loc="lower right")
    row = rows[0][0]
    figure.suptitle(f"{row['network']}, regularization: {row['regularization']}", fontsize=12)
    figure.savefig(path)


def write(output: Path, rows: Sequence[Run]) -> None:
    """``table.md`` and ``table.csv``."""
    if not rows:
        return
    (output / "table.md").write_text(markdown(rows) + "\n", encoding="utf-8")
    with (output / "table.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _key(identity: Mapping[str, Any]) -> str:
    return json.dumps(identity, sort_keys=True)


def _last(run: Run) -> float:
    accuracy: float = run["epochs"][-1]["validation_accuracy"]
    return accuracy


def _regularizer(options: Options) -> str:
    for name, values in REGULARIZERS.items():
        wanted = {"weight_decay": 0.0, "label_smoothing": 0.0, "dropout": 0.0, **values}
        if all(getattr(options, key) == value for key, value in wanted.items()):
            return name
    return "other"


def main(argv: list[str] | None = None) -> int:
    """The grid, the table, the curves."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    train.add_data_arguments(parser)
    add = parser.add_argument
    add(
        "--output",
        type=Path,
        required=True,
        metavar="DIR",
        help="runs.jsonl, table.md, table.csv, curves-*.png",
    )
    add("--models", nargs="+", default=["resnet18"], metavar="NAME", help="of torchvision.models")
    add("--optimizers", nargs="+", default=list(OPTIMIZERS), choices=list(OPTIMIZERS), metavar="NAME")
    add("--regularizers", nargs="+", default=["none"], choices=list(REGULARIZERS), metavar="NAME")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N")
    add("--search-seeds", type=int, default=1, metavar="N", help="η₀ is chosen with the first N seeds")
    add("--lr-factors", nargs="+", type=float, default=[1 / 3, 1.0, 3.0], metavar="F",
        help="the candidates for η₀, times each optimizer's usual one")  # fmt: skip
    args = parser.parse_args(argv)
    if args.search_seeds < 1:
        raise ConfigError(f"--search-seeds {args.search_seeds}: must be at least 1")

    splits = images.load(args.data, args.data_dir, args.download, args.size, args.limit)
    for model in args.models:  # a wrong name is told now and not in an hour
        networks.build(model, splits.classes, splits.size, args.width)
    runs = Runs(args.output / RUNS_FILE)
    rows: list[Run] = []
    for part in compare(args, splits, runs):
        rows += [row for row, _ in part]
        try:
            write(args.output, rows)
            plot(part, args.output / f"curves-{part[0][0]['network']}-{part[0][0]['regularization']}.png")
        except OSError as error:
            raise UserError(f"{args.output}: {error.strerror}") from error
    print()
    print(markdown(rows))
    print(f"\n{args.output}: {RUNS_FILE}, table.md, table.csv, curves-*.png")
    return 0


if __name__ == "__main__":
    cli.run(main)
