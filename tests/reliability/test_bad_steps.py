"""Losses and gradients that are not finite: skipped on every rank alike, counted, and explained."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.reliability import runs
from zenith_det.config import get_cfg
from zenith_det.errors import UserError
from zenith_det.optim import ZENITH, ZENITHAdamW
from zenith_det.training.failures import bad_steps
from zenith_det.training.failures.bad_steps import explain
from zenith_det.training.failures.step_guard import StepGuard

ITERATIONS = 130
KINDS = ("gradient", "gradient", "loss", "forward")


def poison(count: int, seed: int) -> dict[int, str]:
    """So many iterations, chosen at random, with what goes wrong in each."""
    rng = random.Random(seed)
    return {at: rng.choice(KINDS) for at in sorted(rng.sample(range(3, ITERATIONS - 3), count))}


def final_loss(output: Path) -> float:
    lines = [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]
    return float([line["total_loss"] for line in lines if "total_loss" in line][-1])


def check(output: Path, poisoned: dict[int, str], rank: int | None, batch_size: int) -> list[dict[str, Any]]:
    """Nothing non-finite was learned, and each poisoned step is in the file, with its images."""
    for path in output.glob("model_*.pth"):
        state = torch.load(path, weights_only=True)
        assert all(tensor.isfinite().all() for tensor in state["model"].values()), path
    found = [event for event in runs.events(output) if event["event"] == "skipped step"]
    assert [event["iteration"] for event in found] == list(poisoned)
    for event in found:
        images = [image for part in event["ranks"] for image in part["images"]]
        assert len(images) == batch_size
        assert all(Path(path).is_file() and isinstance(number, int) for number, path in images)
        assert event["lr"] > 0
        kind = poisoned[event["iteration"]]
        if kind == "gradient":
            assert event["bad_parameters"]
            assert event["loss_parts"] == []
        else:
            assert event["loss_parts"]
            bad = [
                part["rank"]
                for part in event["ranks"]
                if not all(isinstance(value, float) for value in part["losses"].values())
            ]
            assert bad == [0] if rank is None else bad == [rank]
    return found


@pytest.mark.parametrize("engine", runs.ENGINES)
def test_50_poisoned_steps_leave_the_result_within_noise(engine: str, data: Path, tmp_path: Path) -> None:
    runs.need(engine)
    poisoned = poison(50, seed=1)
    common = {
        "SOLVER__MAX_ITER": ITERATIONS, "SOLVER__IMS_PER_BATCH": 2, "SOLVER__CHECKPOINT_PERIOD": 50,
        "TEST__EVAL_PERIOD": 0, "CHECKPOINT__KEEP": 0,
    }  # fmt: skip
    code, printed = runs.run(runs.arguments(engine, data, tmp_path / "clean", **common))
    assert code == 0, printed
    code, printed = runs.run(
        runs.arguments(engine, data, tmp_path / "poisoned", **common), {"poison": poisoned}
    )
    assert code == 0, printed
    check(tmp_path / "poisoned", poisoned, None, 2)
    assert runs.events(tmp_path / "clean") == []
    state = torch.load(tmp_path / "poisoned" / "model_final.pth", weights_only=True)
    assert state["guard"] == {"streak": 0, "skipped": 50}
    # Two fifths of the steps fewer: worse by no more than that, far from where training began (about 3).
    clean, other = final_loss(tmp_path / "clean"), final_loss(tmp_path / "poisoned")
    print(f"{engine}: final loss {clean:.3f} clean, {other:.3f} poisoned")
    assert other < 1.25 * clean + 0.1


@pytest.mark.parametrize("engine", runs.ENGINES)
def test_a_poisoned_rank_of_two_makes_both_skip(engine: str, data: Path, tmp_path: Path) -> None:
    runs.need(engine)
    poisoned = {at: kind for at, kind in poison(50, seed=2).items() if at < 40}
    words = runs.arguments(
        engine, data, tmp_path, SOLVER__MAX_ITER=45, SOLVER__IMS_PER_BATCH=4,
        SOLVER__CHECKPOINT_PERIOD=30, TEST__EVAL_PERIOD=0,
    )  # fmt: skip
    code, printed = runs.run(words, {"rank": 1, "poison": poisoned}, processes=2)
    assert code == 0, printed
    check(tmp_path, poisoned, 1, 4)


class Cube(torch.nn.Module):
    """Loss and gradient are what the batch says."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(1)
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = samples[0]["image"]
        return {
            "loss_a": (self.norm(batch) * self.weight).square().mean(),
            "loss_b": (batch * self.weight).mean(),
        }


def train(make: Any, batches: list[torch.Tensor], tmp_path: Path, limit: int = 5) -> tuple[Cube, StepGuard]:
    torch.manual_seed(0)
    model = Cube()
    cfg = get_cfg()
    cfg.SOLVER.MAX_NONFINITE_STEPS, cfg.OUTPUT_DIR = limit, str(tmp_path)
    guard = StepGuard(cfg, model, make(model.parameters()))
    guard.attach()
    for iteration, batch in enumerate(batches):
        guard.begin(iteration)
        losses = model([{"image": batch, "image_id": iteration, "file_name": f"{iteration}.jpg"}])
        guard.optimizer.zero_grad()
        sum(losses.values(), torch.zeros(())).backward()
        guard.optimizer.step()
    guard.inspect()
    guard.detach()
    return model, guard


OPTIMIZERS = {
    "ZENITH": lambda p: ZENITH(p, lr=0.01, momentum=0.9),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
    "ZENITHAdamW": lambda p: ZENITHAdamW(p, lr=0.01),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_run_with_bad_batches_is_the_run_without_them(name: str, tmp_path: Path) -> None:
    """Weights, momentum and BatchNorm's running statistics, whatever the optimizer."""
    torch.manual_seed(1)
    good = [torch.randn(8, 1) for _ in range(20)]
    bad = torch.full((8, 1), float("nan"))
    mixed = [*good[:7], bad, bad * 0 + float("inf"), *good[7:15], bad, *good[15:]]
    clean, _ = train(OPTIMIZERS[name], good, tmp_path / "clean")
    (tmp_path / "mixed").mkdir()
    poisoned, guard = train(OPTIMIZERS[name], mixed, tmp_path / "mixed")
    assert guard.skipped == 3
    assert guard.streak == 0
    before, after = clean.state_dict(), poisoned.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert [event["in_a_row"] for event in runs.events(tmp_path / "mixed")] == [1, 2, 1]
    first = runs.events(tmp_path / "mixed")[0]
    assert first["ranks"][0]["images"] == [[7, "7.jpg"]]
    assert first["loss_parts"] == ["loss_a", "loss_b"]
    assert sorted(first["bad_parameters"]) == ["norm.bias", "norm.weight", "weight"]
    assert len(first["steps_before"]) == 7


def test_too_many_in_a_row_are_a_verdict_with_names(tmp_path: Path) -> None:
    bad = [torch.full((8, 1), float("nan"))] * 3
    _, guard = train(OPTIMIZERS["SGD"], bad, tmp_path, limit=3)
    assert guard.verdict() == (
        "the loss or the gradient was not finite in 3 steps in a row; first parameters with non-finite "
        "gradients: weight, norm.weight, norm.bias"
    )


def test_a_loss_that_is_not_finite_reaches_every_gradient(tmp_path: Path) -> None:
    """Also those that it does not touch itself: ranks whose loss is finite learn of it by them."""

    class Two(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = torch.nn.Parameter(torch.ones(2))
            self.second = torch.nn.Parameter(torch.ones(2))

        def forward(self, shift: float) -> dict[str, torch.Tensor]:
            return {"loss_a": self.first.sum() + shift, "loss_b": self.second.sum() * 3}

    model, cfg = Two(), get_cfg()
    cfg.OUTPUT_DIR = str(tmp_path)
    guard = StepGuard(cfg, model, torch.optim.SGD(model.parameters(), lr=0.1))
    guard.attach()
    for shift, expected in ((float("inf"), float("nan")), (1.0, 3.0)):
        model.zero_grad()
        sum(model(shift).values(), torch.zeros(())).backward()
        torch.testing.assert_close(model.second.grad, torch.full((2,), expected), equal_nan=True)


class Scaler:
    def get_scale(self) -> float:
        return 1024.0


def test_what_the_evidence_points_to() -> None:
    calm = [1.0, 1.1, 0.9, 1.0, 1.05, 0.95, 1.0]
    assert explain(["loss_mask"], calm, calm).startswith("points to the data")
    assert explain([], calm, [*calm, 3.0, 20.0]).startswith("points to the learning rate: losses or gradient")
    assert "the loss scale is 1024 now" in explain([], calm, calm, Scaler())
    assert explain([], calm, calm).startswith("points to an overflow in the backward pass")
    assert explain(["loss_mask"], [*calm, 40.0], calm, Scaler()).startswith("points to the learning rate")


def test_a_report_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    blocked = tmp_path / "gone"
    with pytest.raises(UserError, match=r"bad_steps.jsonl: cannot be written"):
        bad_steps.note_event(blocked, "rolled back")
