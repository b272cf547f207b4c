"""What is said of a run, on curves that ZENITH itself makes of norms that are known."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from zenith_det.optim import ZENITH
from zenith_det.report.diagnosis import diagnose
from zenith_det.training.course.metrics_file import read_metrics
from zenith_det.training.logs.zenith_metrics import optimizer_scalars

WINDOW = 50


def logged(tmp_path: Path, norm: Callable[[int], float], iterations: int = 1000) -> list[str]:
    """The diagnosis of a run whose gradient has these norms, logged every 20 iterations as both engines do."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = ZENITH([parameter], lr=0.1, window=WINDOW)
    lines = []
    for iteration in range(iterations):
        parameter.grad = torch.tensor([norm(iteration)], dtype=torch.float32)
        optimizer.step()
        if (iteration + 1) % 20 == 0:
            lines.append(
                json.dumps({"iteration": iteration, "total_loss": 1.0, **optimizer_scalars(optimizer)})
            )
    (tmp_path / "metrics.json").write_text("\n".join(lines) + "\n")
    return diagnose(read_metrics(tmp_path), window=WINDOW, max_iter=iterations)


def noise(iteration: int) -> float:
    return float(np.random.default_rng(iteration).normal(0, 0.1))


def test_over_fitting_is_told_for_each_test_set(tmp_path: Path) -> None:
    losses = ((99, 2.0, 2.0), (199, 1.0, 1.5), (299, 1.5, 1.0))
    lines = [
        {"iteration": i, "street/validation/total_loss": street, "woods/validation/total_loss": woods}
        for i, street, woods in losses
    ]
    (tmp_path / "metrics.json").write_text("\n".join(map(json.dumps, lines)))
    (line,) = diagnose(read_metrics(tmp_path))
    assert line.startswith(
        "The validation loss on street was lowest at iteration 199, 1, and is 1.5 at the end"
    )


def test_an_ordinary_run_gets_no_remark(tmp_path: Path) -> None:
    assert logged(tmp_path, lambda i: 4 * np.exp(-i / 400) + 1 + noise(i)) == []


def test_one_outlier_is_found_with_its_iteration_and_size(tmp_path: Path) -> None:
    (line,) = logged(tmp_path, lambda i: 150.0 if i == 503 else 2 + noise(i))
    # Logged at 519 first, 16 iterations later.
    assert "collapsed at iteration 519 because one outlier set the zenith" in line
    size = float(line.split("single norm of about ")[1].split()[0])
    assert size == pytest.approx(150, rel=0.1)


def test_a_norm_that_stays_high_is_no_outlier(tmp_path: Path) -> None:
    told = logged(tmp_path, lambda i: (4 - i / 200 if i < 500 else 6) + noise(i))
    assert told == []


def test_first_norms_that_set_the_zenith(tmp_path: Path) -> None:
    (line,) = logged(tmp_path, lambda i: 300.0 if i < 3 else 2 + noise(i))
    assert "set by the very first norms" in line
    assert "SOLVER.ZENITH.RECORD_AFTER" in line


def test_a_ratio_that_never_falls(tmp_path: Path) -> None:
    (line,) = logged(tmp_path, lambda i: 2 + 0.0005 * i + noise(i))
    assert line.startswith("The ratio never fell below 0.9")
    assert logged(tmp_path, lambda i: 2 + noise(i), iterations=120) == []  # too short to tell


def test_skipped_steps_are_counted(tmp_path: Path) -> None:
    lines = logged(tmp_path, lambda i: float("nan") if i in (300, 301) else 4 * np.exp(-i / 400) + 1)
    assert lines == [
        "2 steps were skipped because a loss or gradient was not finite, the first by iteration 319; "
        "bad_steps.jsonl tells more."
    ]


def test_what_else_is_said(tmp_path: Path) -> None:
    records = []
    for i in range(20):
        records.append(
            {"iteration": i * 20 + 19, "total_loss": 1.0 if i < 12 else 3.0, "time": 1.0, "data_time": 0.4}
        )
        if i % 5 == 4:
            ap = {4: 10.0, 9: 30.0, 14: 20.0, 19: 12.0}[i]
            held_out = {4: 2.0, 9: 1.0, 14: 1.5, 19: 2.0}[i]
            records.append(
                {"iteration": i * 20 + 19, "averaged/bbox/AP": ap, "validation/total_loss": held_out}
            )
    (tmp_path / "metrics.json").write_text("\n".join(map(json.dumps, records)) + "\n")
    told = "\n".join(diagnose(read_metrics(tmp_path), max_iter=1000))
    assert "The training loss rose again: 1 around iteration" in told
    assert (
        "The validation loss was lowest at iteration 199, 1, and is 2 at the end: the model over-fits" in told
    )
    assert "box AP (averaged) was highest at iteration 199, 30.0, and is 12.0 at the end" in told
    assert "40% of an iteration waits for images" in told
    assert "The run ends after iteration 399, of 1000: it was interrupted" in told
