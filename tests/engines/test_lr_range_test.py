"""η₀ from an LR range test: what is read off a curve, and a run that nothing else of the test reaches."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.reliability import runs
from zenith_det.commands import find_lr
from zenith_det.config import LoadedConfig, load_config
from zenith_det.data.synthetic import generate, split_files
from zenith_det.engines.lr_range_test import (
    CYCLE,
    ITERATIONS,
    NoLRFoundError,
    RangeTest,
    choose,
    measure,
    set_base_lr,
)
from zenith_det.errors import ConfigError
from zenith_det.training.course.starting import Start

LRS = np.geomspace(1e-4, 10.0, ITERATIONS)


def curve(too_high: float = 0.08, noise: float = 0.05, seed: int = 0, explodes: bool = True) -> RangeTest:
    """A detector's: classification is learnt at once, then little, then it climbs, and explodes at last."""
    rng = np.random.default_rng(seed)
    losses = 2.2 + 1.2 * np.exp(-np.arange(ITERATIONS) / 15)
    losses = losses + np.where(too_high < LRS, 0.5 * np.log(LRS / too_high) + 0.4, 0.0)
    losses = losses + noise * rng.standard_normal(ITERATIONS)
    losses = losses + np.resize(0.4 * rng.standard_normal(CYCLE), ITERATIONS)  # some images are harder
    if explodes:
        end = int(np.searchsorted(LRS, 5 * too_high))
        losses[end] = math.nan
        return RangeTest(LRS[: end + 1], losses[: end + 1], True)
    return RangeTest(LRS, losses, False)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("too_high", [0.004, 0.03, 0.15])
@pytest.mark.parametrize("explodes", [True, False])
def test_below_what_is_too_high_and_not_far(too_high: float, seed: int, explodes: bool) -> None:
    chosen = choose(curve(too_high, seed=seed, explodes=explodes))
    assert too_high / 8 < chosen.lr < too_high / 4
    assert chosen.lr < chosen.edge


def test_that_images_differ_counts_for_nothing() -> None:
    plain = curve()
    offsets = np.resize(np.random.default_rng(1).uniform(-1.0, 1.0, CYCLE), len(plain.losses))
    harder = choose(RangeTest(plain.lrs, plain.losses + offsets - offsets[:CYCLE].mean(), True))
    assert harder.lr == pytest.approx(choose(plain).lr, rel=0.1)


def test_a_loss_that_rises_while_the_model_learns_is_not_too_high_an_lr() -> None:
    """As Mask R-CNN's with seed 2 (docs/LEARNING_RATE.md): from LR 0.003 to 0.014 by 0.4 of its fall, then down."""
    plain = curve()
    hill = 0.5 * np.exp(-(np.log(plain.lrs / 0.012) ** 2) / 0.5)
    climbing = (plain.lrs > 0.006) & (plain.lrs < 0.02)
    smooth = choose(RangeTest(plain.lrs, plain.losses + hill, True)).smooth
    climbed = (smooth[climbing].max() - smooth[plain.lrs < 0.006].min()) / (smooth[0] - smooth.min())
    assert 0.3 < climbed < 0.5
    learning = choose(RangeTest(plain.lrs, plain.losses + hill, True))
    assert learning.lr == pytest.approx(choose(plain).lr, rel=0.25)


def test_a_ruined_model_that_finds_nothing_is_no_low() -> None:
    plain = curve(explodes=False)
    losses = plain.losses.copy()
    at = int(np.searchsorted(LRS, 0.4))
    losses[at:] = 1.5  # below all that the test has seen
    losses[at - 3 : at] = [40.0, math.inf, 60.0]
    assert choose(RangeTest(LRS, losses, False)).lr == pytest.approx(choose(plain).lr, rel=0.1)


@pytest.mark.parametrize("seed", range(8))
def test_a_ruined_model_may_lose_less_again_for_a_while(seed: int) -> None:
    """As Mask R-CNN's on microscope images (docs/results/lr_range_test.md): down again after nine iterations."""
    plain = curve(explodes=False, seed=seed)
    at = int(np.searchsorted(LRS, choose(plain).edge)) + 9
    losses = plain.losses.copy()
    losses[at : at + 2 * CYCLE] -= 1.0
    smooth = choose(RangeTest(LRS, losses, False)).smooth
    assert smooth[at + CYCLE] < 0.5 * (smooth[0] + smooth.min())
    assert choose(RangeTest(LRS, losses, False)).lr == pytest.approx(choose(plain).lr, rel=0.3)


def adamw_curve(distance: float = 0.009, plateau: float = 0.4, iterations: int = ITERATIONS) -> RangeTest:
    """A detector's under AdamW: it falls over a distance of the weights, loses a part of it again, then explodes."""
    lrs = np.geomspace(1e-5, 1.0, iterations)
    gone = np.cumsum(lrs) / distance
    losses = 3.0 - 1.5 * np.minimum(gone, 1.25) / 1.25
    losses = losses + 1.5 * plateau * np.clip(np.log(np.maximum(gone, 1e-9) / 1.25), 0.0, 1.0)
    losses = losses + 0.02 * np.random.default_rng(0).standard_normal(iterations)
    losses = losses + np.resize(0.4 * np.random.default_rng(1).standard_normal(CYCLE), iterations)
    end = int(np.searchsorted(lrs, 0.1))
    losses[end] = math.nan
    return RangeTest(lrs[: end + 1], losses[: end + 1], True, adamw=True)


@pytest.mark.parametrize("plateau", [0.2, 0.45, 0.55, 0.8])
def test_under_adamw_what_boxes_and_masks_add_to_the_loss_decides_nothing(plateau: float) -> None:
    """It came to 0.4 or 0.6 of the fall there from seed to seed, and a rule by half of it to 17 times another LR."""
    assert choose(adamw_curve(plateau=plateau)).lr == pytest.approx(choose(adamw_curve()).lr, rel=0.1)


def test_under_adamw_the_length_of_the_test_decides_nothing() -> None:
    assert choose(adamw_curve(iterations=400)).lr == pytest.approx(choose(adamw_curve()).lr, rel=0.15)


def test_under_adamw_weights_that_have_a_longer_way_to_go_get_a_higher_lr() -> None:
    assert choose(adamw_curve(0.036)).lr == pytest.approx(4 * choose(adamw_curve(0.009)).lr, rel=0.15)


@pytest.mark.parametrize(("name", "rises_to"), [("zenith", 10.0), ("zenith_adamw", 1.0)])
def test_the_lrs_are_those_of_the_optimizer(name: str, rises_to: float) -> None:
    lrs: list[float] = []

    def probe(lr: float) -> float:
        lrs.append(lr)
        return 3.0

    test = measure(load_config(f"configs/quickstart/mask_rcnn_{name}.yaml"), lambda copy: probe)
    assert lrs[-1] == pytest.approx(rises_to)
    assert lrs == list(test.lrs)
    assert test.adamw == (name == "zenith_adamw")


@pytest.mark.parametrize(("name", "factor"), [("zenith", 4.0), ("zenith_adamw", 2.0)])
def test_a_resumed_run_with_another_batch_scales_its_lr(name: str, factor: float, tmp_path: Path) -> None:
    keys = ["SOLVER.AUTO_LR", "True", "SOLVER.IMS_PER_BATCH", "8"]
    loaded = load_config(f"configs/quickstart/mask_rcnn_{name}.yaml", keys)
    before = {"iteration": 99, "config": {"SOLVER.BASE_LR": 0.0007, "SOLVER.IMS_PER_BATCH": 2}}
    start = Start(tmp_path / "model_0000099.pth", before)

    def no_test(copy: LoadedConfig) -> Any:
        raise AssertionError("a resumed run is not tested again")

    set_base_lr(loaded, start, tmp_path, no_test)
    assert factor * 0.0007 == pytest.approx(loaded.cfg.SOLVER.BASE_LR)


def flat() -> RangeTest:
    return RangeTest(LRS, 3.0 + 0.15 * np.random.default_rng(0).standard_normal(ITERATIONS), False)


def still_falling() -> RangeTest:
    return RangeTest(LRS, 3.5 - 0.01 * np.arange(ITERATIONS), False)


def exploding_at_once() -> RangeTest:
    return RangeTest(LRS[:3], np.array([3.0, 400.0, math.nan]), True)


@pytest.mark.parametrize(
    ("test", "reason"),
    [
        (flat(), "shows no LR at which the loss falls"),
        (still_falling(), "saw no LR too high"),
        (exploding_at_once(), "ended after 3 iterations"),
    ],
    ids=["flat", "still falling", "exploding at once"],
)
def test_a_curve_that_shows_none_is_refused(test: RangeTest, reason: str) -> None:
    with pytest.raises(NoLRFoundError, match=reason):
        choose(test)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    generate(root, train=24, val=4, size=64, seed=5, task="instances")
    return root


@pytest.mark.parametrize("engine", runs.ENGINES)
def test_a_run_after_the_test_is_one_that_was_given_the_lr(engine: str, data: Path, tmp_path: Path) -> None:
    runs.need(engine)
    keys = {"SOLVER__MAX_ITER": 6, "TEST__EVAL_PERIOD": 0, "DATALOADER__NUM_WORKERS": 0,
            "SOLVER__AVERAGE__KIND": "''", "CHECKPOINT__BEST": "''"}  # fmt: skip
    code, printed = runs.run(runs.arguments(engine, data, tmp_path / "auto", "--auto-lr", **keys))
    assert code == 0, printed
    config = load_config(str(tmp_path / "auto" / "config.yaml")).cfg
    assert not config.SOLVER.AUTO_LR
    assert f"SOLVER.AUTO_LR: eta0 = {config.SOLVER.BASE_LR:g}" in printed
    assert config.SOLVER.BASE_LR != 0.02
    assert printed.count(": 24 images (") == 1  # what the check found is said once
    assert (tmp_path / "auto" / "lr_range_test.png").exists()
    keys["SOLVER__BASE_LR"] = config.SOLVER.BASE_LR
    code, printed = runs.run(runs.arguments(engine, data, tmp_path / "given", **keys))
    assert code == 0, printed
    runs.assert_same_result(tmp_path / "auto", tmp_path / "given")

    keys |= {"SOLVER__MAX_ITER": 8, "SOLVER__IMS_PER_BATCH": 4, "SOLVER__BASE_LR": 0.02}
    words = runs.arguments(engine, data, tmp_path / "auto", "--auto-lr", resume=True, **keys)
    code, printed = runs.run(words)
    assert code == 0, printed
    assert f"eta0 = {2 * config.SOLVER.BASE_LR:g}, for 4 images a batch, was 2" in printed


def test_the_tool_says_and_writes_what_it_found(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    json_file, images = map(str, split_files(data, "train", "instances"))
    words = runs.arguments("torchvision", data, tmp_path)
    keys: list[Any] = words[words.index("MODEL.DEVICE") :]
    find_lr.main(
        ["--config-file", "configs/quickstart/mask_rcnn_zenith.yaml", "--engine", "torchvision",
         "--train-json", json_file, "--train-images", images, "--output", str(tmp_path), *keys]
    )  # fmt: skip
    printed = capsys.readouterr().out
    record = json.loads((tmp_path / "lr_range_test.json").read_text())
    assert f"SOLVER.BASE_LR {record['lr']:g} for 2 images a batch" in printed
    assert len(record["lrs"]) == len(record["losses"]) <= ITERATIONS
    assert (tmp_path / "lr_range_test.png").stat().st_size > 5000

    with pytest.raises(ConfigError, match="the first must be the lower"):
        find_lr.main(["--config-file", "configs/quickstart/mask_rcnn_zenith.yaml", "--min-lr", "20"])
