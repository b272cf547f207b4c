"""When a run ends by itself: early stopping, and ZENITH settled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from zenith_det.config import load_config
from zenith_det.training.course.evaluations import Evaluations
from zenith_det.training.logs.events import EventStorage, JsonWriter


def config(**keys: Any) -> Any:
    words = [word for key, value in keys.items() for word in (key.replace("__", "."), value)]
    return load_config("configs/quickstart/mask_rcnn_zenith.yaml", words).cfg


def early(metric: str, patience: int = 2) -> Any:
    return config(TEST__EARLY_STOPPING=metric, TEST__PATIENCE=patience, TEST__VALIDATION_LOSS=True,
                  SOLVER__AVERAGE__KIND="ema")  # fmt: skip


def first_end(rule: Evaluations, evaluations: list[dict[str, float]], period: int = 10) -> int | None:
    """After which evaluation (from 1) the rule ends the run."""
    for number, scalars in enumerate(evaluations, start=1):
        rule.add(number * period - 1, scalars)
        if rule.reason():
            return number
    return None


def test_it_ends_after_so_many_evaluations_without_a_new_best(tmp_path: Path) -> None:
    rule = Evaluations(early("mask AP"), tmp_path, 0)
    aps = [10.0, 20.0, 19.0, 21.0, 20.9, 21.0, 30.0]
    assert first_end(rule, [{"bbox/AP": 50.0 + i, "segm/AP": ap} for i, ap in enumerate(aps)]) == 6
    assert rule.reason() is not None
    assert "mask AP has not been better than 21.000 at iteration 39 in 2 evaluations" in str(rule.reason())


def test_a_loss_is_better_when_it_is_lower(tmp_path: Path) -> None:
    rule = Evaluations(early("validation loss"), tmp_path, 0)
    losses = [2.0, 1.5, 1.2, 1.3, 1.25, 1.0]
    assert first_end(rule, [{"bbox/AP": 1.0, "validation/total_loss": loss} for loss in losses]) == 5
    assert "better than 1.200" in str(rule.reason())


def test_averaged_weights_are_judged_by_their_own_ap(tmp_path: Path) -> None:
    rule = Evaluations(early("averaged box AP", patience=1), tmp_path, 0)
    evaluations = [{"bbox/AP": 5.0, "averaged/bbox/AP": 1.0}, {"bbox/AP": 4.0, "averaged/bbox/AP": 2.0}]
    assert first_end(rule, evaluations) is None


def test_off_by_default(tmp_path: Path) -> None:
    rule = Evaluations(config(), tmp_path, 0)
    assert first_end(rule, [{"bbox/AP": 10.0 - i} for i in range(9)]) is None


def write_metrics(folder: Path, aps: list[float], ratios: list[float], period: int = 10) -> None:
    """A run's file: a ratio after every 5 iterations, an AP after every ``period``."""
    with (folder / "metrics.json").open("w") as file:
        for i, ratio in enumerate(ratios):
            line = {"iteration": 5 * i + 4, "total_loss": 1.0, "zenith/ratio": ratio}
            file.write(json.dumps(line) + "\n")
            if (5 * i + 5) % period == 0:
                ap = aps[(5 * i + 5) // period - 1]
                file.write(json.dumps({"iteration": 5 * i + 4, "bbox/AP": ap, "segm/AP": ap}) + "\n")


SETTLED_APS = [10.0, 30.0, 50.0, 60.0, 60.1, 60.0, 59.9]


@pytest.mark.parametrize(
    ("aps", "ratios", "ends"),
    [
        (SETTLED_APS, [1.0, 0.8, 0.6, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.49, 0.5, 0.5, 0.5, 0.5], True),
        (SETTLED_APS, [1.0, 0.8, 0.6, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.45, 0.4, 0.4, 0.35, 0.3], False),
        ([10.0, 30.0, 50.0, 60.0, 60.1, 61.0, 62.0], [0.5] * 14, False),
    ],
    ids=["both settled", "the ratio still falls", "the AP still rises"],
)
def test_settled_means_ratio_and_ap(
    tmp_path: Path, aps: list[float], ratios: list[float], ends: bool
) -> None:
    write_metrics(tmp_path, aps, ratios)
    rule = Evaluations(config(SOLVER__ZENITH__UNTIL_SETTLED=True, TEST__PATIENCE=2), tmp_path, 70)
    assert (rule.reason() is not None) == ends
    if ends:
        assert "LR ratio was 0.500, 0.497 over the 2 before" in str(rule.reason())


def test_a_resumed_run_comes_to_the_same_decision(tmp_path: Path) -> None:
    """From the file of the run so far, without what was logged after its checkpoint."""
    aps = [10.0, 20.0, 19.0, 18.0, 30.0]
    write_metrics(tmp_path, aps, [0.5] * 10)
    cfg = early("box AP")
    assert Evaluations(cfg, tmp_path, 30).reason() is None
    resumed = Evaluations(cfg, tmp_path, 40)
    whole = Evaluations(cfg, tmp_path, 0)
    assert first_end(whole, [{"bbox/AP": ap} for ap in aps]) == 4
    assert resumed.reason() == whole.reason() is not None


def resumed_like_whole(cfg: Any, folder: Path, evaluations: list[dict[str, float]]) -> str | None:
    """Why a run ends that was resumed after the first of these ``evaluations``; the same as undisturbed."""
    storage = EventStorage()
    writer = JsonWriter(folder / "metrics.json")
    whole = Evaluations(cfg, folder, 0)
    for number, scalars in enumerate(evaluations, start=1):
        storage.iter = 10 * number - 1
        storage.put_scalars(smoothing=False, **scalars)
        writer.write(storage)
        whole.add(storage.iter, scalars)
    writer.close()
    resumed = Evaluations(cfg, folder, 10 * (len(evaluations) - 1))
    resumed.add(10 * len(evaluations) - 1, evaluations[-1])
    assert resumed.reason() == whole.reason()
    assert resumed.aps == whole.aps
    return whole.reason()


def test_a_resumed_run_judges_by_the_loss_of_the_trained_weights_too(tmp_path: Path) -> None:
    """``averaged/validation/…`` comes before ``validation/…`` in the file."""
    losses = [(1.5, 1.2), (1.4, 1.1), (1.3, 1.05), (1.25, 1.06)]
    evaluations = [
        {"bbox/AP": 1.0, "validation/total_loss": trained, "averaged/bbox/AP": 2.0,
         "averaged/validation/total_loss": averaged}
        for trained, averaged in losses
    ]  # fmt: skip
    assert resumed_like_whole(early("validation loss", patience=1), tmp_path, evaluations) is None


def test_a_resumed_run_judges_by_the_first_test_set_too(tmp_path: Path) -> None:
    """Whatever comes first in the file, which is sorted by name."""
    cfg = config(TEST__EARLY_STOPPING="box AP", TEST__PATIENCE=1, DATASETS__TEST=("val_b", "val_a"))
    evaluations = [{"val_b/bbox/AP": b, "val_a/bbox/AP": a} for b, a in [(1.0, 9.0), (2.0, 8.0), (3.0, 7.0)]]
    assert resumed_like_whole(cfg, tmp_path, evaluations) is None
