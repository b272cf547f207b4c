"""An arm and its averaged self are trained once."""

from __future__ import annotations

from pathlib import Path

from zenith_det.comparing.arms import choose_arms
from zenith_det.comparing.plan import Run, distinct, plan_runs
from zenith_det.config import load_config

CONFIG = "configs/quickstart/mask_rcnn_zenith.yaml"


def planned(*names: str) -> dict[str, Run]:
    runs = plan_runs(load_config, CONFIG, choose_arms(names), [0], Path("/nowhere"))
    assert [run.arm.name for run in runs] == list(names)
    return {run.arm.name: run for run in runs}


def test_an_arm_reads_the_runs_of_its_averaged_self() -> None:
    runs = planned("zenith", "sgd_cosine", "zenith_tail_average", "sgd_constant_average", "sgd_constant")
    assert runs["zenith"].folder == runs["zenith_tail_average"].folder
    assert runs["zenith"].keys["SOLVER.AVERAGE.KIND"] == "tail"
    assert runs["sgd_constant"].folder == runs["sgd_constant_average"].folder
    assert len(distinct(list(runs.values()))) == 3


def test_two_kinds_of_average_are_two_runs() -> None:
    runs = planned("zenith_average", "zenith_tail_average")
    assert len(distinct(list(runs.values()))) == 2
    assert runs["zenith_tail_average"].keys["SOLVER.AVERAGE.KIND"] == "tail"


def test_what_differs_in_more_than_averaging_is_trained_itself() -> None:
    runs = planned("zenith", "zenith_window_25", "sgd_constant_average", "sgd_cosine")
    assert len(distinct(list(runs.values()))) == 4
    assert runs["sgd_cosine"].keys["SOLVER.AVERAGE.KIND"] == ""  # the config's own says "tail"
