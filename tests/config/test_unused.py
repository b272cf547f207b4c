"""Keys that a user sets in vain are named."""

from __future__ import annotations

from pathlib import Path

import pytest

from zenith_det.config import load_config, zenith_unused_keys


def unused(*opts: str) -> list[str]:
    loaded = load_config(None, list(opts))
    found = zenith_unused_keys(loaded.sources, loaded.cfg)
    assert all(source == "command line" for _, source in found)
    return [key for key, _ in found]


STEPS = (
    "SOLVER.STEPS",
    "(1, 2)",
    "SOLVER.GAMMA",
    "0.5",
    "SOLVER.NUM_DECAYS",
    "2",
    "SOLVER.BASE_LR_END",
    "0.0001",
)
OPTIMIZERS = (
    "SOLVER.MOMENTUM", "0.8", "SOLVER.ADAMW.EPS", "0.1",
    "SOLVER.ZENITH.WINDOW", "10", "SOLVER.ZENITH.MIN_RATIO", "0.1", "SOLVER.ZENITH.RECORD_AFTER", "2",
    "SOLVER.ZENITH.NORM_SOURCE", "momentum",
    # These two count under any.
    "SOLVER.MAX_NONFINITE_STEPS", "7", "SOLVER.AUTO_LR", "True",
)  # fmt: skip
RATIO = ["ZENITH.MIN_RATIO", "ZENITH.NORM_SOURCE", "ZENITH.RECORD_AFTER", "ZENITH.WINDOW"]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("WarmupZenithLR", ["BASE_LR_END", "GAMMA", "NUM_DECAYS", "STEPS"]),
        ("WarmupConstantLR", ["BASE_LR_END", "GAMMA", "NUM_DECAYS", "STEPS"]),
        ("WarmupPlateauLR", ["BASE_LR_END", "NUM_DECAYS", "STEPS"]),
        ("WarmupMultiStepLR", ["BASE_LR_END", "NUM_DECAYS"]),
        ("WarmupCosineLR", ["GAMMA", "NUM_DECAYS", "STEPS"]),
        ("WarmupStepWithFixedGammaLR", ["BASE_LR_END", "STEPS"]),
        ("SomebodysOwnLR", []),
    ],
)
def test_keys_of_other_schedules(schedule: str, expected: list[str]) -> None:
    found = unused("SOLVER.LR_SCHEDULER_NAME", schedule, "SOLVER.WARMUP_ITERS", "3", *STEPS)
    assert found == [f"SOLVER.{key}" for key in expected]


@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [
        ("ZENITH", ["ADAMW.EPS"]),
        ("ZENITHAdamW", ["MOMENTUM"]),
        ("SGD", ["ADAMW.EPS", *RATIO]),
        ("AdamW", ["MOMENTUM", *RATIO]),
        ("ScheduleFreeSGD", ["ADAMW.EPS", *RATIO]),
        ("SomebodysOwn", []),
    ],
)
def test_keys_of_other_optimizers(optimizer: str, expected: list[str]) -> None:
    assert unused("SOLVER.OPTIMIZER", optimizer, *OPTIMIZERS) == [f"SOLVER.{key}" for key in expected]


@pytest.mark.parametrize("optimizer", ["ZENITH", "AdamW", "Prodigy"])
def test_a_runs_own_config_names_only_what_it_was_given(optimizer: str, tmp_path: Path) -> None:
    """It sets every key, so all of them have a source when the run is resumed from it."""
    path = str(tmp_path / "config.yaml")
    opts = [
        "SOLVER.OPTIMIZER",
        optimizer,
        "SOLVER.LR_SCHEDULER_NAME",
        "WarmupZenithLR",
        "SOLVER.GAMMA",
        "0.5",
    ]
    Path(path).write_text(load_config(None, opts).cfg.dump())
    loaded = load_config(path)
    assert zenith_unused_keys(loaded.sources, loaded.cfg) == [("SOLVER.GAMMA", path)]


def test_an_lr_range_test_turned_off_again_was_used() -> None:
    loaded = load_config(None, ["SOLVER.OPTIMIZER", "AdamW", "SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR"])
    loaded.override("SOLVER.AUTO_LR", True, "--auto-lr")
    loaded.override("SOLVER.BASE_LR", 0.01, "the LR range test")
    loaded.override("SOLVER.AUTO_LR", False, "the LR range test")
    assert zenith_unused_keys(loaded.sources, loaded.cfg) == []


def test_clipping_that_is_off() -> None:
    value = ("SOLVER.CLIP_GRADIENTS.CLIP_VALUE", "3.0", "SOLVER.CLIP_GRADIENTS.NORM_TYPE", "1.0")
    on = ("SOLVER.CLIP_GRADIENTS.ENABLED", "True")
    assert unused(*value) == ["SOLVER.CLIP_GRADIENTS.CLIP_VALUE", "SOLVER.CLIP_GRADIENTS.NORM_TYPE"]
    assert unused(*on, *value) == ["SOLVER.CLIP_GRADIENTS.NORM_TYPE"]
    assert unused(*on, *value, "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "norm") == []
