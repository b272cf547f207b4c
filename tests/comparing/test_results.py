"""What is concluded from runs whose figures are known, read from files as runs leave them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from zenith_det.comparing.arms import Arm
from zenith_det.comparing.plan import Run
from zenith_det.comparing.results import Comparison, collect
from zenith_det.comparing.runner import Result
from zenith_det.comparing.verdict import verdict_lines

ZENITH, STEP, COSINE = Arm("zenith", "ZENITH"), Arm("sgd_step", "SGD step"), Arm("sgd_cosine", "SGD cosine")
AVERAGED = Arm("zenith_average", "ZENITH averaged", averaged=True)


def a_run(
    root: Path,
    arm: Arm,
    seed: int,
    aps: Sequence[float],
    *,
    lr: float = 0.1,
    pace: float = 0.5,
    ok: bool = True,
) -> Run:
    """A run of 100 iterations with an AP after each 100 / len(aps) of them."""
    folder = root / arm.name / f"{lr}" / f"{seed}"
    optimizer = "ZENITH" if "zenith" in arm.name else "SGD"
    run = Run(arm, lr, seed, folder, {}, "f", 100, optimizer)
    Result("ok" if ok else "failed", "f", [], seconds=99.0, reason="" if ok else "disk full").save(folder)
    period = 100 // len(aps)
    lines = [
        {"iteration": i, "total_loss": 1.0, "time": pace, "cpu_time": 0.9 * pace} for i in range(9, 100, 10)
    ]
    lines += [
        {"iteration": (n + 1) * period - 1, "bbox/AP": ap, "averaged/bbox/AP": ap + 5}
        for n, ap in enumerate(aps)
    ]
    (folder / "metrics.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def compared(runs: list[Run], reference: Arm = STEP) -> Comparison:
    arms = list({run.arm.name: run.arm for run in runs}.values())
    return collect(runs, arms, reference)


def test_differences_are_paired_and_times_are_those_of_steps(tmp_path: Path) -> None:
    runs = [a_run(tmp_path, STEP, seed, [20.0, 40.0 + seed]) for seed in range(3)]
    runs += [a_run(tmp_path, ZENITH, seed, [41.0 + seed, 42.0 + seed], pace=1.0) for seed in range(3)]
    found = compared(runs)
    difference = found.difference(ZENITH, "bbox")
    assert difference is not None
    assert (difference.mean, difference.std, difference.n) == (2.0, 0.0, 3)
    # The reference ends at 41: 95 % are 38.95, which it reaches between iterations 49 and 99.
    assert found.target("bbox") == pytest.approx(38.95)
    reference, own = found.reaching(STEP, "bbox"), found.reaching(ZENITH, "bbox")
    assert reference is not None
    assert own is not None
    expected = [49 + 50 * 18.95 / (20 + seed) for seed in range(3)]
    assert reference.iterations.mean == pytest.approx(sum(expected) / 3)
    assert reference.seconds.mean == pytest.approx(0.5 * sum(expected) / 3)
    assert reference.cpu_seconds is not None
    assert reference.cpu_seconds.mean == pytest.approx(0.45 * sum(expected) / 3)
    assert own.iterations.mean == 49  # at its first evaluation
    assert own.seconds.mean == pytest.approx(49.0)
    assert found.best(ZENITH).outcomes[0].seconds_per_iteration == 1.0


def test_the_verdict_says_no_more_than_the_interval(tmp_path: Path) -> None:
    runs = [a_run(tmp_path, STEP, seed, [20.0, 40.0 + seed]) for seed in range(3)]
    runs += [a_run(tmp_path, COSINE, seed, [30.0, 41.0 + (seed - 1) * 4]) for seed in range(3)]
    runs += [a_run(tmp_path, ZENITH, seed, [41.0 + seed, 43.0 + seed]) for seed in range(3)]
    headline, against = verdict_lines(compared(runs))
    assert headline == (
        "ZENITH has the highest box AP, 44.0 (mean of 3 seeds); by the 95 % confidence interval it cannot be told "
        "apart from SGD cosine, and is ahead of SGD step."
    )
    # Both baselines have 41 on average; the first of them is meant.
    assert against.startswith(
        "ZENITH against the best baseline, SGD step, by box AP: +3.0 points (95 % confidence"
    )
    assert "n = 3), ahead; to 95 % of that baseline's final AP it takes 0." in against


def test_zenith_behind_is_said_plainly(tmp_path: Path) -> None:
    runs = [a_run(tmp_path, STEP, seed, [20.0, 50.0 + seed]) for seed in range(3)]
    runs += [a_run(tmp_path, ZENITH, seed, [20.0, 40.0 + seed]) for seed in range(3)]
    headline, against = verdict_lines(compared(runs))
    assert headline.startswith("SGD step has the highest box AP, 51.0")
    assert "−10.0 points" in against
    assert "behind; it never reaches 95 % of that baseline's final AP" in against


def test_one_seed_is_a_hint(tmp_path: Path) -> None:
    runs = [a_run(tmp_path, STEP, 0, [40.0]), a_run(tmp_path, ZENITH, 0, [60.0])]
    headline, against = verdict_lines(compared(runs))
    assert "a hint, not a result" in headline
    assert "+20.0 points, of one seed" in against


def test_an_averaged_arm_counts_its_averaged_weights(tmp_path: Path) -> None:
    found = compared([a_run(tmp_path, STEP, 0, [40.0]), a_run(tmp_path, AVERAGED, 0, [40.0])])
    assert found.best(AVERAGED).finals("bbox") == {0: 45.0}
    assert found.best(STEP).finals("bbox") == {0: 40.0}


def test_the_best_learning_rate_is_one_that_does_not_fail(tmp_path: Path) -> None:
    runs = [a_run(tmp_path, STEP, seed, [40.0], lr=0.1) for seed in (0, 1)]
    runs += [a_run(tmp_path, STEP, seed, [41.0], lr=0.2) for seed in (0, 1)]
    runs += [a_run(tmp_path, STEP, seed, [60.0], lr=0.4, ok=seed == 0) for seed in (0, 1)]
    found = compared(runs)
    assert found.best(STEP).lr == 0.2
    assert [group.lr for group in found.groups_of(STEP)] == [0.1, 0.2, 0.4]
    assert "1 of 6 runs have no result" in verdict_lines(found)[-1]


def test_nothing_yet(tmp_path: Path) -> None:
    run = Run(STEP, 0.1, 0, tmp_path / "none", {}, "f", 100, "SGD")
    assert verdict_lines(compared([run])) == ["No run has come to its end yet: there is nothing to conclude."]


def test_what_another_config_gave_is_left_out_and_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    runs = [a_run(tmp_path, STEP, 0, [40.0]), a_run(tmp_path, ZENITH, 0, [90.0])]
    found = compared([runs[0], replace(runs[1], fingerprint="another")])
    assert found.best(ZENITH).final("bbox") is None
    assert "zenith lr 0.1 seed 0: what is in" in caplog.text
    assert "is of another config: left out" in caplog.text
