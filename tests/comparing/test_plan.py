"""Arms and the runs that they give."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT
from zenith_det.comparing.arms import BUILT_IN, choose_arms, read_arms
from zenith_det.comparing.plan import Run, plan_runs
from zenith_det.comparing.results import default_reference
from zenith_det.config import CfgNode, load_config
from zenith_det.errors import ConfigError
from zenith_det.solver import build_lr_scheduler, build_optimizer

CONFIG = str(ROOT / "configs" / "quickstart" / "mask_rcnn_zenith.yaml")
BASE_LR = load_config(CONFIG).cfg.SOLVER.BASE_LR


def plan(names: list[str], tmp_path: Path, arms_file: Path | None = None, **options: object) -> list[Run]:
    arms = choose_arms(names, arms_file)
    seeds = options.pop("seeds", (0, 1))
    return plan_runs(load_config, CONFIG, arms, seeds, tmp_path, **options)  # type: ignore[arg-type]


def test_seeds_are_outermost_so_that_half_a_comparison_is_balanced(tmp_path: Path) -> None:
    runs = plan(["zenith", "sgd_step"], tmp_path, lr_scales=(0.5, 1.0))
    assert [(run.seed, run.arm.name, run.lr) for run in runs] == [
        (seed, arm, lr) for seed in (0, 1) for arm in ("zenith", "sgd_step") for lr in (BASE_LR / 2, BASE_LR)
    ]
    assert len({run.folder for run in runs}) == 8


def test_steps_and_evaluations_follow_the_length(tmp_path: Path) -> None:
    (run,) = plan(["sgd_step"], tmp_path, seeds=(0,), opts=["SOLVER.MAX_ITER", "900"], evaluations=9)
    assert run.keys["SOLVER.STEPS"] == "(600, 800)"
    assert run.keys["TEST.EVAL_PERIOD"] == "100"
    (run,) = plan(["sgd_step"], tmp_path, seeds=(0,), opts=["TEST.EVAL_PERIOD", "7"])
    assert run.keys["TEST.EVAL_PERIOD"] == "7"


def test_learning_rates(tmp_path: Path) -> None:
    lrs = {"zenith": [0.1, 0.2]}
    runs = plan(["zenith", "schedule_free", "adamw_cosine"], tmp_path, seeds=(0,), lrs=lrs, lr_scales=(2.0,))
    # One's own list; ten times the config's, doubled; an absolute one, doubled.
    assert [(run.arm.name, run.lr) for run in runs] == [
        ("zenith", 0.1), ("zenith", 0.2), ("schedule_free", BASE_LR * 20), ("adamw_cosine", 0.001),
    ]  # fmt: skip


def test_arms_of_sgd_are_not_given_the_lr_of_adamw(tmp_path: Path) -> None:
    config = CONFIG.replace("_zenith", "_zenith_adamw")
    assert plan_runs(load_config, config, choose_arms(["zenith_adamw", "prodigy"]), (0,), tmp_path)
    message = r"SOLVER.OPTIMIZER is ZENITHAdamW, and arm sgd_cosine takes SOLVER.BASE_LR"
    with pytest.raises(ConfigError, match=message):
        plan_runs(load_config, config, choose_arms(["zenith_adamw", "sgd_cosine"]), (0,), tmp_path)


def test_every_built_in_arm_trains_with_what_it_says(tmp_path: Path) -> None:
    import torch

    for arm in BUILT_IN:
        if any(key.startswith("SOLVER.AVERAGE") for key in arm.overrides):
            continue  # the same with averaged weights
        (run,) = plan([arm.name], tmp_path, seeds=(0,))
        cfg = load_config(CONFIG, [word for pair in run.keys.items() for word in pair]).cfg
        optimizer = build_optimizer(cfg, torch.nn.Linear(2, 2))
        build_lr_scheduler(cfg, optimizer)
        assert type(optimizer).__name__.lower().startswith(("zenith", "sgd", "adamw", "prodigy", "dadapt"))


def solvers_of(study: str, tmp_path: Path) -> Iterator[CfgNode]:
    """``SOLVER`` of each arm of a study's file in docs/."""
    file = ROOT / "docs" / study
    for arm in read_arms(file):
        (run,) = plan([arm.name], tmp_path, file, seeds=(0,))
        yield load_config(CONFIG, [word for pair in run.keys.items() for word in pair]).cfg.SOLVER


def test_every_arm_of_the_settings_study_trains_with_its_own_settings(tmp_path: Path) -> None:
    settings = [solver.ZENITH for solver in solvers_of("zenith_settings.yaml", tmp_path)]
    seen = {(zenith.WINDOW, zenith.RECORD_AFTER, zenith.MIN_RATIO) for zenith in settings}
    assert seen == {(25, 0, 0.0), (100, 0, 0.0), (400, 0, 0.0), (100, 50, 0.0), (100, 0, 0.7)}


def test_every_arm_of_the_study_of_bad_starts_trains_with_its_own_settings(tmp_path: Path) -> None:
    settings = [solver.ZENITH for solver in solvers_of("bad_starts.yaml", tmp_path)]
    seen = [(zenith.WINDOW, zenith.MIN_RATIO, zenith.RECORD_AFTER, zenith.HALF_LIFE) for zenith in settings]
    assert seen == [(25, 1.0, 0, 0), (25, 0.0, 0, 0), (25, 0.0, 30, 0), (25, 0.0, 0, 100)]


def test_every_arm_of_the_averaging_study_averages_by_its_own_settings(tmp_path: Path) -> None:
    averages = [solver.AVERAGE for solver in solvers_of("tail_average.yaml", tmp_path)]
    seen = [(a.KIND, a.TAIL if a.KIND == "tail" else a.DECAY) for a in averages]
    assert seen == [*(("tail", tail) for tail in (0.03, 0.06, 0.1, 0.15, 0.25, 0.4)), ("ema", 0.99)]


def test_the_fingerprint_is_of_what_is_trained(tmp_path: Path) -> None:
    (first,) = plan(["zenith"], tmp_path, seeds=(0,))
    (elsewhere,) = plan(["zenith"], tmp_path / "other", seeds=(0,), opts=["MODEL.DEVICE", "cpu"])
    (longer,) = plan(["zenith"], tmp_path, seeds=(0,), opts=["SOLVER.MAX_ITER", "77"])
    assert first.fingerprint == elsewhere.fingerprint
    assert first.fingerprint != longer.fingerprint


def test_own_arms(tmp_path: Path) -> None:
    path = tmp_path / "arms.yaml"
    path.write_text(
        "large_window:\n  label: W = 400\n  overrides: {SOLVER.ZENITH.WINDOW: 400}\n  lr_factor: 2\n"
        "late_step:\n  overrides: {SOLVER.OPTIMIZER: SGD, SOLVER.LR_SCHEDULER_NAME: WarmupMultiStepLR}\n"
        "  steps_at: [0.9]\n"
    )
    runs = plan(["large_window", "late_step"], tmp_path, path, seeds=(0,))
    assert [run.lr for run in runs] == [2 * BASE_LR, BASE_LR]
    assert runs[0].optimizer == "ZENITH"  # the config's
    assert runs[1].keys["SOLVER.STEPS"] == f"({round(0.9 * runs[1].max_iter)},)"
    assert default_reference(runs).name == "late_step"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("- zenith", "names of arms are expected"),
        ("a: {labell: x}", "'labell' is unknown"),
        ("a: {lr: 0}", "lr is 0: a number above 0"),
        ("a: {lr: 1, lr_factor: 2}", "exclude one another"),
        ("a: {steps_at: [2]}", "steps_at"),
        ("a: {averaged: 3}", "averaged is 3"),
        ("../../up: {}", "a name has letters"),
        ("a: {overrides: [1]}", "config keys with values"),
        ("a: [", "not YAML"),
        ("a: !!python/object/apply:os.system ['true']", "not YAML"),
    ],
)
def test_mistakes_in_an_arms_file_are_one_line(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "arms.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=told) as error:
        read_arms(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("names", "options", "told"),
    [
        (["zenit"], {}, "did you mean 'zenith'"),
        (["zenith", "zenith"], {}, "given twice"),
        (["zenith"], {"opts": ["SEED", "3"]}, "--seeds"),
        (["zenith"], {"opts": ["SOLVER.OPTIMIZER", "SGD"]}, "arm zenith sets it itself"),
        (["zenith"], {"lrs": {"sgd_step": [1.0]}}, "no such arm among --arms"),
        (["zenith"], {"opts": ["SOLVER.MAX_ITR", "3"]}, "MAX_ITR"),
    ],
)
def test_mistakes_are_told_before_anything_runs(
    tmp_path: Path, names: list[str], options: dict[str, object], told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        plan(names, tmp_path, **options)
