"""How large is the noise part of the gradient norm, over training and batch size? A table and a figure.

    python examples/classification/noise_study.py --output output/noise --width 0.125 --window 25

Trains once per seed and, at the same weights, splits the squared norm for batches of each size (``noise.py``).
The sums are pooled over the seeds before the share is taken.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import images
import train
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from train import OPTIMIZERS, Options

from zenith_det import cli
from zenith_det.errors import UserError
from zenith_det.report.curves import CYCLE, GREY


def pooled(results: Sequence[dict[str, Any]]) -> dict[tuple[int, int], dict[str, float]]:
    """Signal and noise by (step, batch size), means over the runs; their share; with the least and the most
    that one run gave."""
    found: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for result in results:
        for probe in result["noise"]:
            found.setdefault((probe["step"], probe["batch_size"]), []).append(probe)
    rows = {}
    for key, probes in found.items():
        signal = sum(probe["signal"] for probe in probes) / len(probes)
        noise = sum(probe["noise"] for probe in probes) / len(probes)
        shares = [probe["share"] for probe in probes]
        share = noise / (signal + noise)
        rows[key] = {
            "signal": signal,
            "noise": noise,
            "share": share,
            "least": min(shares),
            "most": max(shares),
        }
    return rows


def markdown(rows: dict[tuple[int, int], dict[str, float]]) -> str:
    """A line a step: signal of the largest batches, then the norm² and its noise share by batch size."""
    sizes = sorted({size for _, size in rows})
    head = ["step"] + [f"B = {size}: E∣g∣², noise share" for size in sizes]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for step in sorted({step for step, _ in rows}):
        cells = [str(step)]
        for size in sizes:
            row = rows[step, size]
            spread = f"{100 * row['least']:.0f} to {100 * row['most']:.0f}"
            cells.append(f"{row['signal'] + row['noise']:.3g}, {100 * row['share']:.0f} % ({spread})")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(
    rows: dict[tuple[int, int], dict[str, float]], results: Sequence[dict[str, Any]], path: Path
) -> None:
    """The share, and the noise beside the signal, over the steps."""
    figure = Figure(figsize=(11, 3.6), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3)
    sizes = sorted({size for _, size in rows})
    for color, size in zip(CYCLE, sizes):
        steps = sorted(step for step, other in rows if other == size)
        here = [rows[step, size] for step in steps]
        left.plot(
            steps, [row["share"] for row in here], "o-", color=color, label=f"batch {size}", markersize=4
        )
        left.fill_between(
            steps, [r["least"] for r in here], [r["most"] for r in here], color=color, alpha=0.12, linewidth=0
        )
        middle.plot(
            steps, [row["noise"] for row in here], "o-", color=color, label=f"noise, {size}", markersize=4
        )
        if size == sizes[-1]:  # the least noisy estimate
            middle.plot(steps, [r["signal"] for r in here], "k--", label=f"signal, {size}")
    for result in results:
        epochs = result["epochs"]
        right.plot([e["step"] for e in epochs], [e["ratio"] for e in epochs], color=GREY)
    left.set_ylim(0, 1.1)
    left.set_title("noise share of the squared norm", loc="left", fontsize=10)
    middle.set_yscale("log")
    middle.set_title("squared norm: noise and signal", loc="left", fontsize=10)
    right.set_ylim(0, 1.05)
    right.set_title("learning rate / η₀, a line a seed", loc="left", fontsize=10)
    left.legend(fontsize=8)
    middle.legend(fontsize=8)
    for axes in (left, middle, right):
        axes.set_xlabel("step")
        axes.grid(color="#e6e6e6")
    figure.savefig(path)


def main(argv: list[str] | None = None) -> int:
    """Train, split, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    train.add_data_arguments(parser)
    add = parser.add_argument
    add("--output", type=Path, required=True, metavar="DIR", help="noise.json, noise.md, noise.png")
    add("--model", default="resnet18", metavar="NAME", help="of torchvision.models")
    add("--optimizer", default="zenith", choices=list(OPTIMIZERS), metavar="NAME")
    add("--lr", type=float, help="η₀; default the optimizer's usual one")
    add("--label-smoothing", type=float, default=0.0, metavar="E")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N")
    add("--noise-every", type=int, default=43, metavar="N", help="steps between the measurements")
    add("--noise-batch-sizes", type=int, nargs="+", default=[32, 128, 512], metavar="B")
    args = parser.parse_args(argv)
    splits = images.load(args.data, args.data_dir, args.download, args.size, args.limit)
    results = []
    for seed in args.seeds:
        print(f"seed {seed}", flush=True)
        results.append(train.train(Options(**train.common(args), seed=seed), splits))
    rows = pooled(results)
    try:
        args.output.mkdir(parents=True, exist_ok=True)
        (args.output / "noise.json").write_text(json.dumps(results))
        (args.output / "noise.md").write_text(markdown(rows) + "\n", encoding="utf-8")
        plot(rows, results, args.output / "noise.png")
    except OSError as error:
        raise UserError(f"{args.output}: {error.strerror}") from error
    print()
    print(markdown(rows))
    return 0


if __name__ == "__main__":
    cli.run(main)
