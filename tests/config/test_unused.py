"""Keys that a user sets in vain are named."""

from __future__ import annotations

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
OPTIMIZERS = ("SOLVER.MOMENTUM", "0.8", "SOLVER.ZENITH.WINDOW", "10", "SOLVER.ADAMW.EPS", "0.1")


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
        ("SGD", ["ADAMW.EPS", "ZENITH.WINDOW"]),
        ("AdamW", ["MOMENTUM", "ZENITH.WINDOW"]),
        ("ScheduleFreeSGD", ["ADAMW.EPS", "ZENITH.WINDOW"]),
        ("SomebodysOwn", []),
    ],
)
def test_keys_of_other_optimizers(optimizer: str, expected: list[str]) -> None:
    assert unused("SOLVER.OPTIMIZER", optimizer, *OPTIMIZERS) == [f"SOLVER.{key}" for key in expected]


def test_clipping_that_is_off() -> None:
    value = ("SOLVER.CLIP_GRADIENTS.CLIP_VALUE", "3.0", "SOLVER.CLIP_GRADIENTS.NORM_TYPE", "1.0")
    on = ("SOLVER.CLIP_GRADIENTS.ENABLED", "True")
    assert unused(*value) == ["SOLVER.CLIP_GRADIENTS.CLIP_VALUE", "SOLVER.CLIP_GRADIENTS.NORM_TYPE"]
    assert unused(*on, *value) == ["SOLVER.CLIP_GRADIENTS.NORM_TYPE"]
    assert unused(*on, *value, "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "norm") == []
