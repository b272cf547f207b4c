#!/usr/bin/env python
"""Runs that begin badly: ZENITH as it is, with ``record_after``, and with a zenith that fades (``half_life``).

python examples/classification/bad_starts.py            # two to three minutes of CPU time

1. torch's own check of its optimizers: Rosenbrock's function from a steep point; each step gets one half of the
   gradient.
2. A small network on scikit-learn's digits, 1500 steps of 32 images, clipped to a norm of 1, from four beginnings: with
   a warm-up over 100 steps ("good"); without; without and with four times the LR; and good, but with a gradient 1000
   times too large in step 150 ("poisoned").
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from zenith_det import ZENITH

STEPS, BATCH, WARMUP, LR, WINDOW = 1500, 32, 100, 0.1, 25
TRAIN = 897  # of 1797 digits; the others are for the test
STARTS = ("good", "no warm-up", "4 x LR", "poisoned")


def kinds(window: int, warmup: int) -> dict[str, dict[str, Any]]:
    """What is compared, as options of ZENITH."""
    return {
        "constant LR": {"min_ratio": 1.0},
        "ZENITH": {},
        f"record_after {warmup}": {"record_after": warmup},
        f"half_life {4 * window}": {"half_life": 4 * window},
        f"half_life {10 * window}": {"half_life": 10 * window},
    }


def rosenbrock(steps: int, options: dict[str, Any]) -> tuple[float, float]:
    """The distance from the solution (1, 1), and the last ratio."""
    point = nn.Parameter(torch.tensor([1.5, 1.5], dtype=torch.float64))
    optimizer = ZENITH([point], lr=4.8e-3, window=100, **options)
    for step in range(steps):
        x, y = point.tolist()
        halves = ([-400 * x * (y - x * x) - 2 * (1 - x), 0.0], [0.0, 200 * (y - x * x)])
        point.grad = torch.tensor(halves[step % 2], dtype=torch.float64)
        optimizer.step()
    return float((point.detach() - 1).norm()), optimizer.zenith_state()["ratio"]


def digits(
    images: Tensor, labels: Tensor, start: str, seed: int, options: dict[str, Any]
) -> tuple[float, float]:
    """The accuracy on the test images, in percent, and the last ratio."""
    torch.manual_seed(seed)
    order = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    lr = 4 * LR if start == "4 x LR" else LR
    optimizer = ZENITH(model.parameters(), lr, momentum=0.9, window=WINDOW, max_norm=1.0, **options)
    for step in range(STEPS):
        chosen = torch.randint(0, TRAIN, (BATCH,), generator=order)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[chosen]), labels[chosen]).backward()
        if start in ("good", "poisoned"):
            optimizer.param_groups[0]["lr"] = lr * min(1.0, (step + 1) / WARMUP)
        if start == "poisoned" and step == 150:
            for parameter in model.parameters():
                assert parameter.grad is not None
                parameter.grad *= 1000
        optimizer.step()
    with torch.no_grad():
        right = (model(images[TRAIN:]).argmax(1) == labels[TRAIN:]).double().mean()
    return 100 * float(right), optimizer.zenith_state()["ratio"]


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3, help="of the digits (default 3)")
    seeds = range(parser.parse_args().seeds)
    for steps in (2000, 20_000):
        for name, options in kinds(100, 100).items():
            distance, ratio = rosenbrock(steps, options)
            print(
                f"Rosenbrock, {steps} steps, {name}: {distance:.4f} from the solution, last ratio {ratio:.3f}"
            )
    data, target = load_digits(return_X_y=True)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(7))
    images, labels = torch.tensor(data / 16, dtype=torch.float32)[order], torch.tensor(target)[order]
    for start in STARTS:
        for name, options in kinds(WINDOW, WARMUP).items():
            found = [digits(images, labels, start, seed, options) for seed in seeds]
            accuracies = [accuracy for accuracy, _ in found]
            spread = f" ± {statistics.stdev(accuracies):.2f}" if len(accuracies) > 1 else ""
            ratio = statistics.mean(ratio for _, ratio in found)
            print(
                f"digits, {start}, {name}: {statistics.mean(accuracies):.2f}{spread} %, last ratio {ratio:.3f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
