"""A project's own trainer under the mix-in: what the added keys ask for is done by hooks, and what can't be is told."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("detectron2.engine", reason="needs the real Detectron2: see docs/DETECTRON2.md")

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.engine import DefaultTrainer, SimpleTrainer, hooks
from detectron2.utils import comm
from torch import Tensor, nn

from tests.engines.detectron2_engine.d2_helpers import (
    KnownGradient,
    KnownTrainer,
    known_batches,
    known_cfg,
    known_norms,
    log_lines,
    metrics,
    same,
    trace_of,
    zenith_ratios,
)
from zenith_det.config.defaults import ZENITH_DEFAULTS
from zenith_det.config.keys import leaves
from zenith_det.engines.detectron2_engine import ZenithMetrics
from zenith_det.engines.detectron2_engine.own_trainer import NEVER
from zenith_det.errors import ConfigError, TrainingDivergedError
from zenith_det.optim import ZENITH
from zenith_det.training.checkpoints.averaging import WeightAverage
from zenith_det.training.processes.launching import launch

pytestmark = pytest.mark.detectron2


def cfg_of(output: Path, **keys: Any) -> Any:
    """:func:`known_cfg` with keys by their whole names, ``__`` for the dots."""
    cfg = known_cfg(output)
    for key, value in keys.items():
        *sections, name = key.split("__")
        node = cfg
        for section in sections:
            node = node[section]
        node[name] = value
    return cfg


class Scored(KnownTrainer):
    """Evaluations whose AP is that of a list, one after the other; of averaged weights half of it."""

    aps: tuple[float, ...] = ()
    seen: list[tuple[str, list[float]]]

    def __init__(self, cfg: Any) -> None:
        type(self).seen = []
        super().__init__(cfg)

    @classmethod
    def test(cls, cfg: Any, model: nn.Module, evaluators: Any = None) -> dict[str, Any]:
        weights = model.first.weight.flatten().tolist()
        cls.seen.append((cfg.OUTPUT_DIR, weights))
        number = sum(folder == cfg.OUTPUT_DIR for folder, _ in cls.seen) - 1
        return {"bbox": {"AP": cls.aps[min(number, len(cls.aps) - 1)] if cls.aps else 1.0}}


def weights_of(file: Path) -> dict[str, Tensor]:
    model: dict[str, Tensor] = torch.load(file, weights_only=True)["model"]
    return model


# ---- averaged weights


def test_averaged_weights_are_evaluated_saved_and_resumed(tmp_path: Path) -> None:
    keys = {"SOLVER__AVERAGE__KIND": "tail", "TEST__EVAL_PERIOD": 10, "SOLVER__CHECKPOINT_PERIOD": 10}
    trainer = Scored(cfg_of(tmp_path / "whole", **keys))
    reference = WeightAverage(copy.deepcopy(trainer.model), "tail")

    class Follow(hooks.HookBase):
        def after_step(self) -> None:
            reference.model.load_state_dict(self.trainer.model.state_dict())
            reference.update()

    trainer.register_hooks([Follow()])
    trainer.train()
    whole = tmp_path / "whole"
    averaged = weights_of(whole / "model_final_averaged.pth")
    with reference.applied():
        assert same(averaged, reference.model.state_dict())
    assert not same(averaged, weights_of(whole / "model_final.pth"))
    assert (whole / "last_checkpoint").read_text() == "model_final.pth"
    # Both were evaluated each time, the averaged ones into a folder of their own.
    assert [Path(folder).name for folder, _ in Scored.seen] == ["averaged", "whole"] * 4
    assert Scored.seen[-2][1] == averaged["first.weight"].flatten().tolist()
    assert [line["averaged/bbox/AP"] for line in metrics(whole) if "averaged/bbox/AP" in line] == [1.0] * 4

    resumed = cfg_of(tmp_path / "parts", **keys)
    first = Scored(resumed)
    first.max_iter = 20
    first.train()
    second = Scored(resumed)
    second._trainer._data_loader_iter_obj = iter(known_batches_from(20))
    second.resume_or_load(resume=True)
    assert second.start_iter == 20
    second.train()
    assert same(weights_of(tmp_path / "parts" / "model_final_averaged.pth"), averaged)


def known_batches_from(start: int) -> Iterator[list[Tensor]]:
    batches = known_batches()
    for _ in range(start):
        next(batches)
    return batches


def test_an_average_that_begins_in_a_resumed_run_is_told(tmp_path: Path) -> None:
    plain = Scored(cfg_of(tmp_path))
    plain.max_iter = 10
    plain.train()
    trainer = Scored(cfg_of(tmp_path, SOLVER__AVERAGE__KIND="ema"))
    trainer.resume_or_load(resume=True)
    with log_lines("zenith_det") as lines:
        trainer.train()
    assert any("holds no averaged weights" in line for line in lines)
    assert (tmp_path / "model_final_averaged.pth").exists()


def test_at_their_defaults_the_keys_leave_no_file_and_no_evaluation(tmp_path: Path) -> None:
    class Plain(DefaultTrainer):
        build_train_loader = KnownTrainer.__dict__["build_train_loader"]
        test = Scored.__dict__["test"]
        seen: list[Any] = []
        aps = ()

    keys = {"TEST__EVAL_PERIOD": 10, "SOLVER__CHECKPOINT_PERIOD": 15, "SOLVER__OPTIMIZER": "SGD"}
    keys["SOLVER__LR_SCHEDULER_NAME"] = "WarmupMultiStepLR"
    theirs = Plain(cfg_of(tmp_path / "theirs", **keys))
    theirs.train()
    with log_lines("zenith_det") as lines:
        ours = Scored(cfg_of(tmp_path / "ours", **keys))
        ours.train()
    assert same(theirs.model.state_dict(), ours.model.state_dict())
    assert len(Scored.seen) == len(Plain.seen)
    names = [
        {path.name.split(".tfevents")[0] for path in (tmp_path / run).iterdir()} for run in ("theirs", "ours")
    ]
    assert names[1] - {"log.txt"} == names[0] - {"log.txt"}
    assert not any("without effect" in line for line in lines)


# ---- ending, and the best


def test_early_stopping_ends_the_run_as_at_its_end(tmp_path: Path) -> None:
    class Falls(Scored):
        aps = (3.0, 5.0, 4.0, 2.0, 9.0)

    keys = {
        "TEST__EVAL_PERIOD": 5,
        "TEST__EARLY_STOPPING": "box AP",
        "TEST__PATIENCE": 2,
        "CHECKPOINT__BEST": "box AP",
    }
    trainer = Falls(cfg_of(tmp_path, **keys))
    with log_lines("zenith_det", "detectron2") as lines:
        results = trainer.train()
    assert trainer.iter == 19
    assert any(
        "the run ends after iteration 19: box AP has not been better than 5.000" in line for line in lines
    )
    assert not any("Exception" in line for line in lines)
    assert results == {"bbox": {"AP": 2.0}}
    assert len(Falls.seen) == 4  # the end is no further evaluation
    final = torch.load(tmp_path / "model_final.pth", weights_only=True)
    assert final["iteration"] == 19
    best = torch.load(tmp_path / "model_best.pth", weights_only=True)
    assert (best["iteration"], best["best"]["value"]) == (9, 5.0)
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"
    assert [line["bbox/AP"] for line in metrics(tmp_path) if "bbox/AP" in line] == [3.0, 5.0, 4.0, 2.0]
    # Asked to go on, it comes to the same decision without training.
    again = Falls(cfg_of(tmp_path, **keys))
    again.resume_or_load(resume=True)
    again.train()
    assert Falls.seen == []
    # With more patience it goes on.
    patient = Falls(cfg_of(tmp_path, **{**keys, "TEST__PATIENCE": 4}))
    patient.resume_or_load(resume=True)
    patient.train()
    assert patient.iter > 19


def test_an_own_train_ends_the_process_quietly(tmp_path: Path) -> None:
    class Own(Scored):
        aps = (3.0, 1.0)

        def train(self) -> None:
            DefaultTrainer.train(self)

    keys = {"TEST__EVAL_PERIOD": 5, "TEST__EARLY_STOPPING": "box AP", "TEST__PATIENCE": 1}
    with pytest.raises(SystemExit) as end:
        Own(cfg_of(tmp_path, **keys)).train()
    assert end.value.code == 0
    assert (tmp_path / "model_final.pth").exists()


def test_the_schedule_that_follows_evaluations_does(tmp_path: Path) -> None:
    class Flat(Scored):
        aps = (3.0,)

    keys = {
        "SOLVER__LR_SCHEDULER_NAME": "WarmupPlateauLR",
        "SOLVER__PLATEAU_PATIENCE": 1,
        "TEST__EVAL_PERIOD": 5,
    }
    trainer = Flat(cfg_of(tmp_path, **keys))
    trainer.train()
    assert trainer.optimizer.param_groups[0]["lr"] < 0.01


def test_keep_removes_older_checkpoints(tmp_path: Path) -> None:
    KnownTrainer(cfg_of(tmp_path, SOLVER__CHECKPOINT_PERIOD=5, CHECKPOINT__KEEP=2)).train()
    names = sorted(path.name for path in tmp_path.glob("*.pth"))
    assert names == ["model_0000034.pth", "model_0000039.pth", "model_final.pth"]


# ---- bad steps


def bad_batches(bad: Any, value: float = math.nan, images: int = 2) -> Iterator[list[Tensor]]:
    for number, batch in enumerate(known_batches(images)):
        yield [sample * value for sample in batch] if bad(number) else batch


class SometimesUnderItsOwnScaler(KnownTrainer):
    """A scaler leaves out steps by itself, and the optimizer isn't called."""

    @classmethod
    def build_train_loader(cls, cfg: Any) -> Any:
        return bad_batches(lambda number: number in (7, 8, 20))

    def run_step(self) -> None:
        if not hasattr(self, "scaler"):
            self.scaler = self._trainer.grad_scaler
        losses = self.model(next(self._trainer._data_loader_iter))
        self.optimizer.zero_grad()
        self.scaler.scale(losses["loss"]).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()


@pytest.mark.parametrize("optimizer", ["ZENITH", "SGD"])
def test_steps_that_a_scaler_leaves_out_are_reported(tmp_path: Path, optimizer: str) -> None:
    trainer = SometimesUnderItsOwnScaler(cfg_of(tmp_path, SOLVER__OPTIMIZER=optimizer))
    trainer._trainer.grad_scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    trainer.train()
    events = [json.loads(line) for line in (tmp_path / "bad_steps.jsonl").read_text().splitlines()]
    assert [event["iteration"] for event in events] == [7, 8, 20]
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())


class Sometimes(KnownTrainer):
    """Gradients that are not finite in some iterations, under a loss that isn't either."""

    bad: Any = staticmethod(lambda number: number in (7, 8, 20))

    @classmethod
    def build_train_loader(cls, cfg: Any) -> Any:
        return bad_batches(cls.bad)


class SometimesInItsOwnLoop(Sometimes):
    """A step of its own, which looks at the loss as older projects do."""

    def run_step(self) -> None:
        losses = self.model(next(self._trainer._data_loader_iter))
        if not torch.isfinite(losses["loss"]):
            raise FloatingPointError("Loss became infinite or NaN")
        self.optimizer.zero_grad()
        losses["loss"].backward()
        self.optimizer.step()


class SometimesWithoutLooking(Sometimes):
    def run_step(self) -> None:
        losses = self.model(next(self._trainer._data_loader_iter))
        self.optimizer.zero_grad()
        losses["loss"].backward()
        self.optimizer.step()


@pytest.mark.parametrize("optimizer", ["ZENITH", "SGD"])
@pytest.mark.parametrize("trainer_class", [Sometimes, SometimesInItsOwnLoop, SometimesWithoutLooking])
def test_bad_steps_are_left_out_and_reported(tmp_path: Path, trainer_class: Any, optimizer: str) -> None:
    cfg = cfg_of(tmp_path, SOLVER__OPTIMIZER=optimizer)
    with log_lines("zenith_det", "detectron2") as lines:
        trainer = trainer_class(cfg)
        trainer.train()
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())
    events = [json.loads(line) for line in (tmp_path / "bad_steps.jsonl").read_text().splitlines()]
    assert [event["iteration"] for event in events] == [7, 8, 20]
    assert [event["in_a_row"] for event in events] == [1, 2, 1]
    assert all(event["loss_parts"] == ["loss"] for event in events)
    assert sum("step skipped" in line for line in lines) == 3
    assert not any("Exception" in line for line in lines)
    # The others are what they are without the bad ones.
    if trainer_class is not Sometimes:
        return
    good = [batch for n, batch in zip(range(40), known_batches()) if not Sometimes.bad(n)]

    class Good(KnownTrainer):
        @classmethod
        def build_train_loader(cls, cfg: Any) -> Any:
            return iter(good)

    if optimizer == "ZENITH":
        plain = Good(cfg_of(tmp_path / "good", SOLVER__MAX_ITER=37))
        plain.train()
        assert plain.optimizer.zenith_state()["zenith"] == trainer.optimizer.zenith_state()["zenith"]


def test_a_loss_without_gradient_of_its_own_is_left_out_too(tmp_path: Path) -> None:
    """An infinite part that the weights have nothing to do with: gradients are finite, the loss is not."""

    class Infinite(KnownTrainer):
        @classmethod
        def build_model(cls, cfg: Any) -> nn.Module:
            model: nn.Module = super().build_model(cfg)
            forward, calls = model.forward, []

            def adding(batch: Any) -> Any:
                calls.append(batch)
                losses = forward(batch)
                return {"loss": losses["loss"] + (math.inf if len(calls) == 6 else 0.0)}

            model.forward = adding
            return model

    trainer = Infinite(cfg_of(tmp_path))
    trace = trace_of(trainer)
    assert torch.equal(trace.weights[5], trace.weights[4])
    assert trainer.optimizer.zenith_state()["skipped_steps"] == 1


class Lost(KnownTrainer):
    """Everything is NaN from some iteration on, as long as the LR is what it was."""

    @classmethod
    def build_train_loader(cls, cfg: Any) -> Any:
        return known_batches(cfg.SOLVER.IMS_PER_BATCH)

    def run_step(self) -> None:
        lost = self.iter >= 22 and self.optimizer.param_groups[0]["initial_lr"] > 0.006
        losses = self.model(next(self._trainer._data_loader_iter))
        self.optimizer.zero_grad()
        (losses["loss"] * (math.nan if lost else 1.0)).backward()
        self.optimizer.step()


@pytest.mark.parametrize("schedule", ["WarmupZenithLR", "WarmupCosineLR"])
@pytest.mark.parametrize("optimizer", ["ZENITH", "SGD"])
def test_a_lost_run_goes_back_and_on_with_a_smaller_lr(tmp_path: Path, optimizer: str, schedule: str) -> None:
    keys = {
        "SOLVER__OPTIMIZER": optimizer,
        "SOLVER__LR_SCHEDULER_NAME": schedule,
        "SOLVER__CHECKPOINT_PERIOD": 10,
        "SOLVER__MAX_NONFINITE_STEPS": 4,
        "SOLVER__AVERAGE__KIND": "ema",
    }
    trainer = Lost(cfg_of(tmp_path, **keys))
    before: dict[int, list[float]] = {}

    class LRs(hooks.HookBase):
        def before_step(self) -> None:
            before[self.trainer.iter] = [group["lr"] for group in self.trainer.optimizer.param_groups]

    trainer.register_hooks([LRs()])
    with log_lines("zenith_det") as lines:
        trainer.train()
    assert any("rolled back to model_0000019.pth with the LR at 0.5 x" in line for line in lines)
    events = [json.loads(line) for line in (tmp_path / "bad_steps.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events] == ["skipped step"] * 4 + ["rolled back"]
    assert sorted(before) == list(range(40))  # the iterations go on
    plain = KnownTrainer(cfg_of(tmp_path / "plain", **{**keys, "SOLVER__AVERAGE__KIND": ""}))
    expected: dict[int, list[float]] = {}
    for iteration in range(40):
        expected[iteration] = [group["lr"] for group in plain.optimizer.param_groups]
        plain.optimizer.step()
        plain.scheduler.step()
    for iteration in range(40):
        factor = 0.5 if iteration > 25 else 1.0
        assert before[iteration] == pytest.approx([factor * lr for lr in expected[iteration]])
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())

    # Resumed, the factor stays.
    resumed = Lost(cfg_of(tmp_path, **{**keys, "SOLVER__MAX_ITER": 44}))
    resumed.resume_or_load(resume=True)
    assert resumed.start_iter == 40
    resumed.train()
    assert {group["initial_lr"] for group in resumed.optimizer.param_groups} == {0.005}


def test_a_run_lost_before_its_first_checkpoint_begins_anew_and_ends_when_that_does_not_help(
    tmp_path: Path,
) -> None:
    class Hopeless(KnownTrainer):
        @classmethod
        def build_train_loader(cls, cfg: Any) -> Any:
            return bad_batches(lambda number: number >= 3)

    keys = {"SOLVER__MAX_NONFINITE_STEPS": 3, "RECOVERY__MAX_ROLLBACKS": 2}
    trainer = Hopeless(cfg_of(tmp_path, **keys))
    with (
        log_lines("zenith_det", "detectron2") as lines,
        pytest.raises(TrainingDivergedError, match="2 roll-backs"),
    ):
        trainer.train()
    assert sum("rolled back to the beginning" in line for line in lines) == 2
    assert not any("Exception" in line for line in lines)
    fresh = KnownGradient(None)
    assert same(trainer.model.state_dict(), fresh.state_dict())


def test_most_steps_skipped_is_told_and_ends_by_the_rule(tmp_path: Path) -> None:
    """40 of 45, with a good one now and then: no run of bad ones is long enough to end it, and all are told."""

    class Mostly(Sometimes):
        bad = staticmethod(lambda number: number % 9 != 0)

    with log_lines("zenith_det") as lines:
        Mostly(cfg_of(tmp_path, SOLVER__MAX_ITER=45)).train()
    assert sum("step skipped" in line for line in lines) == 40
    with pytest.raises(TrainingDivergedError):
        Mostly(
            cfg_of(
                tmp_path / "b",
                SOLVER__MAX_ITER=45,
                SOLVER__MAX_NONFINITE_STEPS=8,
                RECOVERY__MAX_ROLLBACKS=0,
            )
        ).train()


def test_a_loss_below_zero_is_not_taken_for_a_lost_run(tmp_path: Path) -> None:
    """As likelihoods give: its median can be any multiple of its lowest."""
    with log_lines("zenith_det") as lines:
        KnownTrainer(cfg_of(tmp_path, SOLVER__MAX_ITER=300, RECOVERY__DIVERGENCE_FACTOR=1.1)).train()
    assert not any("diverged" in line for line in lines)


# ---- clipping in a loop of one's own


class ClipsInItsLoop(KnownTrainer):
    def run_step(self) -> None:
        losses = self.model(next(self._trainer._data_loader_iter))
        self.optimizer.zero_grad()
        losses["loss"].backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 0.1)
        self.optimizer.step()


class ClipsInItsInnerTrainer(KnownTrainer):
    """As detrex: the inner trainer's step is its own."""

    class Inner(SimpleTrainer):
        def after_backward(self) -> None:
            nn.utils.clip_grad_norm_(self.model.parameters(), 0.1)

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        inner = self._trainer
        self._trainer = self.Inner(inner.model, inner.data_loader, inner.optimizer)


class ClipsUnderItsOwnScaler(KnownTrainer):
    """Mixed precision as projects wrote it before Detectron2 had it."""

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        self.loss_scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=6)

    def run_step(self) -> None:
        losses = self.model(next(self._trainer._data_loader_iter))
        self.optimizer.zero_grad()
        self.loss_scaler.scale(losses["loss"]).backward()
        self.loss_scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.model.parameters(), 0.1)
        self.loss_scaler.step(self.optimizer)
        self.loss_scaler.update()


class ClipsItsOwnOptimizersGradients(ClipsInItsLoop):
    @classmethod
    def build_optimizer(cls, cfg: Any, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD([{"params": [p]} for p in model.parameters()], lr=cfg.SOLVER.BASE_LR)


@pytest.mark.parametrize(
    "trainer_class",
    [ClipsInItsLoop, ClipsInItsInnerTrainer, ClipsUnderItsOwnScaler, ClipsItsOwnOptimizersGradients],
)
def test_a_loop_that_clips_before_the_step_leaves_the_lr_alone(tmp_path: Path, trainer_class: Any) -> None:
    with log_lines("zenith_det") as lines:
        clipped = trace_of(trainer_class(cfg_of(tmp_path)))
    ratios = zenith_ratios(known_norms(40), window=5)
    assert clipped.lrs[10:] == pytest.approx([0.01 * ratio for ratio in ratios[10:]], rel=1e-5)
    assert (clipped.weights[10] - clipped.weights[11]).norm() == pytest.approx(
        0.1 * clipped.lrs[11], rel=1e-3
    )
    assert not any("clipped" in line for line in lines)


def test_a_lazy_configs_trainer_that_clips_needs_the_metrics_hook_alone() -> None:
    """As detrex's, which a LazyConfig script makes itself: no mix-in."""

    class Clips(SimpleTrainer):
        def run_step(self) -> None:
            losses = self.model(next(self._data_loader_iter))
            self.optimizer.zero_grad()
            losses["loss"].backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 0.1)
            self.optimizer.step()

    model = KnownGradient(None)
    optimizer = ZENITH(model.parameters(), lr=0.01, window=5)
    trainer = Clips(model, known_batches(), optimizer)
    trainer.register_hooks([ZenithMetrics()])
    trainer.train(0, 40)
    assert optimizer.zenith_state()["ratio"] == pytest.approx(
        zenith_ratios(known_norms(40), window=5)[-1], rel=1e-5
    )


def test_a_project_that_steps_every_other_iteration_is_guarded(tmp_path: Path) -> None:
    class Accumulates(Sometimes):
        def run_step(self) -> None:
            losses = self.model(next(self._trainer._data_loader_iter))
            losses["loss"].backward()
            if self.iter % 2:
                self.optimizer.step()
                self.optimizer.zero_grad()

    trainer = Accumulates(cfg_of(tmp_path))
    trainer.train()
    events = [json.loads(line) for line in (tmp_path / "bad_steps.jsonl").read_text().splitlines()]
    assert [event["iteration"] for event in events] == [7, 9, 21]
    assert trainer.optimizer.zenith_state()["recorded_steps"] == 17


# ---- several processes


class LostTogether(Scored):
    """Bad on the second process alone, in its loss; lost from iteration 22 on, until the LR is lowered."""

    aps = (3.0, 5.0, 4.0)

    def run_step(self) -> None:
        batch = next(self._trainer._data_loader_iter)
        lost = self.iter >= 22 and self.optimizer.param_groups[0]["initial_lr"] > 0.006
        if torch.distributed.get_rank() == 1 and (self.iter in (7, 8) or lost):
            batch = [sample * math.nan for sample in batch]
        losses = self.model(batch)
        self.optimizer.zero_grad()
        losses["loss"].backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 0.1)
        self.optimizer.step()
        self._trainer._write_metrics(losses, 0.0)

    @classmethod
    def build_train_loader(cls, cfg: Any) -> Any:
        return known_batches(2, seed=torch.distributed.get_rank())

    @classmethod
    def test(cls, cfg: Any, model: nn.Module, evaluators: Any = None) -> dict[str, Any]:
        results = super().test(cfg, model.module, evaluators)
        return results if torch.distributed.get_rank() == 0 else {}


def in_two_processes(folder: str) -> None:
    comm.create_local_process_group(2)
    keys = {
        "SOLVER__IMS_PER_BATCH": 4,
        "SOLVER__MAX_ITER": 60,
        "SOLVER__CHECKPOINT_PERIOD": 10,
        "SOLVER__MAX_NONFINITE_STEPS": 3,
        "SOLVER__AVERAGE__KIND": "ema",
        "TEST__EVAL_PERIOD": 15,
        "TEST__EARLY_STOPPING": "box AP",
        "TEST__PATIENCE": 1,
    }
    trainer = LostTogether(cfg_of(Path(folder), **keys))
    trainer.train()
    found = {
        "weights": trainer.model.module.state_dict(),
        "average": trainer._zenith_hooks.average.state_dict()["tensors"],
        "norm": trainer.optimizer.zenith_state()["grad_norm"],
        "ended": trainer.iter,
    }
    torch.save(found, Path(folder, f"{torch.distributed.get_rank()}.pt"))


def test_two_processes_leave_out_go_back_and_end_together(tmp_path: Path) -> None:
    launch(in_two_processes, 2, args=(str(tmp_path),), device="cpu")
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert same(first, second)
    assert first["ended"] == 44
    assert first["norm"] > 0.11  # not the clipped one
    assert same(weights_of(tmp_path / "model_final.pth"), first["weights"])
    assert (tmp_path / "model_final_averaged.pth").exists()
    events = [json.loads(line) for line in (tmp_path / "bad_steps.jsonl").read_text().splitlines()]
    assert [event["iteration"] for event in events] == [7, 8, 22, 23, 24, 24]
    assert events[-1]["to"].endswith("model_0000019.pth")


# ---- hooks and parts of a project's own


class OwnHooks(KnownTrainer):
    def build_hooks(self) -> list[Any]:
        return [
            hooks.IterationTimer(),
            hooks.LRScheduler(),
            hooks.PeriodicCheckpointer(self.checkpointer, 20),
            hooks.PeriodicWriter(self.build_writers(), period=20),
        ]


class OwnParts(OwnHooks):
    """Past ``DefaultTrainer.__init__``, and with it the mix-in's."""

    def __init__(self, cfg: Any) -> None:
        from detectron2.engine import TrainerBase

        TrainerBase.__init__(self)
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        self._trainer = SimpleTrainer(model, self.build_train_loader(cfg), optimizer)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = DetectionCheckpointer(model, cfg.OUTPUT_DIR, trainer=self)
        self.start_iter, self.max_iter, self.cfg = 0, cfg.SOLVER.MAX_ITER, cfg
        self.register_hooks(self.build_hooks())


class OwnMetrics(OwnHooks):
    """As the documentation has it for loops without the mix-in."""

    def build_hooks(self) -> list[Any]:
        built = super().build_hooks()
        built.insert(2, ZenithMetrics())
        return built


@pytest.mark.parametrize("trainer_class", [OwnHooks, OwnParts, OwnMetrics])
def test_a_list_of_own_hooks_logs_the_lr_used(tmp_path: Path, trainer_class: Any) -> None:
    cfg = cfg_of(tmp_path, SOLVER__AVERAGE__KIND="ema", TEST__EARLY_STOPPING="box AP", TEST__EVAL_PERIOD=20)
    with log_lines("zenith_det") as lines:
        trainer = trainer_class(cfg)
        trainer.train()
    assert sum(isinstance(hook, ZenithMetrics) for hook in trainer._hooks) == 1
    line = metrics(tmp_path)[-1]
    ratio = zenith_ratios(known_norms(40), window=5)[-1]
    assert line["zenith/ratio"] == pytest.approx(ratio, rel=1e-5)
    assert line["lr"] == pytest.approx(0.01 * ratio, rel=1e-5)
    assert (tmp_path / "model_final_averaged.pth").exists()
    told = next(line for line in lines if line.startswith(f"without effect in {trainer_class.__name__}"))
    assert "TEST.EARLY_STOPPING (the trainer has no EvalHook)" in told
    assert "SOLVER.AVERAGE (saved and not evaluated" in told


# ---- what is said at the start


def test_keys_without_effect_are_named_once(tmp_path: Path) -> None:
    keys = {
        "TEST__MAX_IMAGES": 2,
        "SOLVER__AUTO_LR": True,
        "DATASETS__TRAIN_JSON": "a.json",
        "TEST__VALIDATION_LOSS": True,
    }
    with log_lines("zenith_det") as lines:
        Scored(cfg_of(tmp_path, SOLVER__MAX_ITER=2, **keys)).train()
    told = [line for line in lines if "without effect" in line]
    assert len(told) == 1
    for name in ("TEST.MAX_IMAGES", "SOLVER.AUTO_LR", "DATASETS.TRAIN_JSON"):
        assert name in told[0]
    assert "TEST.VALIDATION_LOSS (KnownTrainer has its own build_train_loader)" in told[0]


def test_the_list_of_keys_without_effect_is_of_our_keys() -> None:
    assert set(NEVER) <= {key for key, _ in leaves(ZENITH_DEFAULTS)}


def test_short_runs_are_told(tmp_path: Path) -> None:
    cfg = cfg_of(tmp_path, SOLVER__MAX_ITER=30, SOLVER__WARMUP_ITERS=1000, SOLVER__ZENITH__WINDOW=100)
    with log_lines("zenith_det") as lines:
        KnownTrainer(cfg).train()
    assert any("don't leave the warm-up of SOLVER.WARMUP_ITERS 1000" in line for line in lines)
    assert any("ZENITH's ratio is 1 in all of the run's 30 iterations" in line for line in lines)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("SOLVER__AVERAGE__KIND", "emaa", "did you mean ema"),
        ("TEST__EARLY_STOPPING", "box AP", "set TEST.EVAL_PERIOD"),
        ("CHECKPOINT__BEST", "averaged box AP", "no weights are averaged"),
        ("RECOVERY__LR_FACTOR", 2.0, r"must be in \(0, 1\)"),
        ("LOGGERS", ("wandbs",), "may hold 'wandb'"),
    ],
)
def test_values_that_no_run_can_have_are_refused(tmp_path: Path, key: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        KnownTrainer(cfg_of(tmp_path, **{key: value}))


def test_the_device_can_be_chosen_by_itself(tmp_path: Path) -> None:
    trainer = KnownTrainer(cfg_of(tmp_path, MODEL__DEVICE="auto"))
    assert ("cuda" if torch.cuda.is_available() else "cpu") == trainer.cfg.MODEL.DEVICE


def test_accumulation_under_a_step_of_ones_own_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="ClipsInItsLoop has a step of its own"):
        ClipsInItsLoop(cfg_of(tmp_path, SOLVER__GRADIENT_ACCUMULATION=2))


def test_the_model_can_be_copied_while_it_is_watched(tmp_path: Path) -> None:
    """As a mean teacher is."""

    class Teaches(hooks.HookBase):
        def after_step(self) -> None:
            if self.trainer.iter == 3:
                self.teacher = copy.deepcopy(self.trainer.model)
                (self.teacher([torch.ones(12)])["loss"] * 3).backward()
                assert self.trainer.model.first.weight.grad is not self.teacher.first.weight.grad

    free = trace_of(KnownTrainer(cfg_of(tmp_path / "a")))
    trainer = KnownTrainer(cfg_of(tmp_path / "b"))
    teaches = Teaches()
    trainer.register_hooks([teaches])
    taught = trace_of(trainer)
    assert taught.lrs == free.lrs
    assert not torch.equal(teaches.teacher.first.weight, trainer.model.first.weight)
    # Afterwards model and optimizer are as they were.
    assert not trainer.model._forward_hooks
    assert "forward" not in vars(trainer.model)
    assert "guarded" not in trainer.optimizer.step.__code__.co_qualname
