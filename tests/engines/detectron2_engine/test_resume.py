"""Checkpoints: everything is in them, they load safely, and a resumed run is the uninterrupted one."""

from __future__ import annotations

import functools
import itertools
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("detectron2.engine", reason="needs the real Detectron2: see docs/DETECTRON2.md")

from detectron2.engine import hooks
from detectron2.utils.env import seed_all_rng

from tests.engines.detectron2_engine.d2_helpers import (
    KnownTrainer,
    forget,
    known_batches,
    known_cfg,
    log_lines,
    metrics,
    rcnn_cfg,
    record_images,
    register_synthetic,
    same,
    synthetic_set,
    trace_of,
)
from zenith_det.data import load_coco_dataset
from zenith_det.engines.batches import TrainingDataset
from zenith_det.engines.detectron2_engine import SafeCheckpointer, ZenithTrainer, register_checked_dataset
from zenith_det.errors import CheckpointError, RunStopped, UserError

pytestmark = pytest.mark.detectron2


class Resumable(KnownTrainer):
    """The known batches, from wherever the run goes on."""

    def resume_or_load(self, resume: bool = True) -> None:
        super().resume_or_load(resume)
        for _ in range(self.start_iter):
            next(self._trainer._data_loader_iter)


def halves(tmp_path: Path, **later: Any) -> tuple[Any, Any, Any]:
    """Train 30 in one go, and 12 then 18 in a fresh trainer; the traces of all three."""
    whole = trace_of(Resumable(known_cfg(tmp_path / "whole", MAX_ITER=30, MOMENTUM=0.9)))
    first = trace_of(Resumable(known_cfg(tmp_path / "halves", MAX_ITER=12, MOMENTUM=0.9)))
    trainer = Resumable(known_cfg(tmp_path / "halves", **{"MAX_ITER": 30, "MOMENTUM": 0.9, **later}))
    trainer.resume_or_load(resume=True)
    assert trainer.start_iter == 12
    return whole, first, trace_of(trainer)


def test_a_finished_run_made_longer_is_the_long_run(tmp_path: Path) -> None:
    whole, first, second = halves(tmp_path)
    assert first.lrs + second.lrs == whole.lrs
    assert all(torch.equal(a, b) for a, b in zip(first.weights + second.weights, whole.weights))


def test_another_base_lr_counts_from_the_resumed_iteration_on(tmp_path: Path) -> None:
    whole, _, second = halves(tmp_path, BASE_LR=0.02)
    assert second.lrs == pytest.approx([2 * lr for lr in whole.lrs[12:]], rel=1e-6)


def test_another_batch_size_starts_the_history_anew(tmp_path: Path) -> None:
    with log_lines("zenith_det") as lines:
        _, _, second = halves(tmp_path, IMS_PER_BATCH=4)
    assert second.lrs[:4] == pytest.approx([0.01] * 4)  # the window of 5 is not full
    assert sum("2 images a batch before, 4 now" in line for line in lines) == 1


def test_metrics_of_a_resumed_run_have_one_axis(tmp_path: Path) -> None:
    halves(tmp_path)
    lines = [line["iteration"] for line in metrics(tmp_path / "halves")]
    assert lines == [11, 19, 29]


def test_schedule_free_saves_and_evaluates_its_average(tmp_path: Path) -> None:
    pytest.importorskip("schedulefree", reason="needs the optional package schedulefree")
    evaluated: list[torch.Tensor] = []

    class Evaluates(KnownTrainer):
        @classmethod
        def test(cls, cfg: Any, model: Any, evaluators: Any = None) -> dict[str, Any]:
            evaluated.append(model.first.weight.detach().clone())
            return {}

    cfg = known_cfg(tmp_path, OPTIMIZER="ScheduleFreeSGD", LR_SCHEDULER_NAME="WarmupConstantLR", MAX_ITER=10)
    cfg.SOLVER.MOMENTUM = 0.9
    trainer = Evaluates(cfg)
    trainer.train()
    saved = torch.load(tmp_path / "model_final.pth", weights_only=True)["model"]["first.weight"]
    assert torch.equal(saved, evaluated[-1])
    assert not torch.equal(saved, trainer.model.first.weight)
    assert trainer.optimizer.param_groups[0]["train_mode"]
    cfg.SOLVER.MAX_ITER = 12
    again = Evaluates(cfg)
    again.resume_or_load(resume=True)
    again.train()  # Schedule-Free refuses to step in its evaluation mode


# ---- a real model


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> Any:
    files = synthetic_set(tmp_path_factory.mktemp("set"), train=11)
    register_synthetic("resume_train", files["train"])
    yield files
    forget("resume_train")


# Images of several sizes, flips, sampled anchors and proposals: whatever is random, is.
RANDOM = {"INPUT__MIN_SIZE_TRAIN": (48, 64, 80), "MODEL__MASK_ON": True}


def run(folder: Path, iterations: int, **keys: Any) -> tuple[Any, list[list[int]]]:
    """Train from the checkpoint in ``folder``, if any; the trainer and the image ids of each batch."""
    seed_all_rng(None)  # a fresh process
    cfg = rcnn_cfg(folder, "resume_train", SOLVER__MAX_ITER=iterations, **{**RANDOM, **keys})
    trainer = ZenithTrainer(cfg)
    trainer.resume_or_load(resume=True)
    seen = record_images(trainer)
    trainer.train()
    return trainer, seen


def last_checkpoint(folder: Path) -> dict[str, Any]:
    state = torch.load(folder / "model_final.pth", weights_only=True)
    # Where and by how many workers the file was written is no part of what they wrote.
    del state["trainer"]["hooks"]["ResumeExactly"]["config"]
    return state


@pytest.fixture(scope="module")
def whole_runs(tmp_path_factory: pytest.TempPathFactory, synthetic: Any) -> Any:
    """6 iterations in one go, by number of workers and whether batches are grouped by orientation."""

    @functools.cache
    def whole(workers: int, grouped: bool) -> tuple[dict[str, Any], list[list[int]]]:
        folder = tmp_path_factory.mktemp("whole")
        _, seen = run(folder, 6, DATALOADER__NUM_WORKERS=workers, DATALOADER__ASPECT_RATIO_GROUPING=grouped)
        return last_checkpoint(folder), seen

    return whole


@pytest.mark.parametrize(
    ("before", "after", "grouped"),
    [(0, 0, True), (0, 0, False), (2, 2, False), (2, 0, True), (0, 2, True)],
)
def test_a_resumed_rcnn_is_bit_equal(
    tmp_path: Path, whole_runs: Any, before: int, after: int, grouped: bool
) -> None:
    """Images, augmentation, sampled anchors and proposals, momentum, history, whatever the workers."""
    expected, seen = whole_runs(before, grouped)
    keys = {"DATALOADER__ASPECT_RATIO_GROUPING": grouped}
    _, first = run(tmp_path, 3, **keys, DATALOADER__NUM_WORKERS=before)
    with log_lines("zenith_det") as lines:
        _, rest = run(tmp_path, 6, **keys, DATALOADER__NUM_WORKERS=after)
    assert first + rest == seen
    saved = last_checkpoint(tmp_path)
    assert same(saved, expected)
    told = rf"DATALOADER.NUM_WORKERS +{before} +{after} +applied"
    assert sum(bool(re.search(told, line)) for line in lines) == (before != after)

    assert saved["iteration"] == 5
    assert set(saved["trainer"]["hooks"]) == {"LRScheduler", "ZenithMetrics", "GuardSteps", "ResumeExactly"}
    assert set(saved["trainer"]["_trainer"]) == {"iteration", "optimizer"}
    assert "zenith" in saved["trainer"]["_trainer"]["optimizer"]["param_groups"][0]
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"


@pytest.mark.parametrize("while_evaluating", [False, True])
def test_a_run_that_a_signal_stopped_goes_on_bit_equal(
    tmp_path: Path, whole_runs: Any, while_evaluating: bool
) -> None:
    class Interrupted(ZenithTrainer):
        def run_step(self) -> None:
            super().run_step()
            if self.iter == 2 and not while_evaluating:
                os.kill(os.getpid(), signal.SIGUSR1)

        @classmethod
        def test(cls, cfg: Any, model: Any, evaluators: Any = None) -> Any:
            os.kill(os.getpid(), signal.SIGUSR1)
            return super().test(cfg, model, evaluators)

    expected, seen = whole_runs(0, True)
    more = {"TEST__EVAL_PERIOD": 3} if while_evaluating else {}
    cfg = rcnn_cfg(tmp_path, "resume_train", "resume_train", SOLVER__MAX_ITER=6, **{**RANDOM, **more})
    trainer = Interrupted(cfg)
    first = record_images(trainer)
    with (
        log_lines("detectron2") as lines,
        pytest.raises(RunStopped, match="iteration 2: it received SIGUSR1"),
    ):
        trainer.train()
    assert not any("Exception during training" in line for line in lines)
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000002.pth"
    assert not (tmp_path / "inference" / "coco_instances_results.json").exists()
    _, rest = run(tmp_path, 6)
    assert first + rest == seen
    assert same(last_checkpoint(tmp_path), expected)


@pytest.mark.parametrize("hangs", [False, True])
def test_a_run_whose_loader_gives_no_batch_is_saved_and_goes_on_bit_equal(
    tmp_path: Path, whole_runs: Any, hangs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker is killed, or reads for ever until a signal comes."""

    class Waits(ZenithTrainer):
        def _next_batch(self) -> Exception | None:
            if self._done == 3 and hangs:
                threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGUSR1)).start()
            elif self._done == 3:
                worker = multiprocessing.active_children()[0]
                worker.kill()
                worker.join()
            return super()._next_batch()

    read, numbers = TrainingDataset.__getitem__, itertools.count()

    def reads(self: Any, key: Any) -> Any:
        if hangs and next(numbers) == 6:
            time.sleep(1000)
        return read(self, key)

    expected, _ = whole_runs(2, True)
    with monkeypatch.context() as patch:
        patch.setattr(TrainingDataset, "__getitem__", reads)
        keys = RANDOM | {"SOLVER__MAX_ITER": 6, "DATALOADER__NUM_WORKERS": 1}
        trainer = Waits(rcnn_cfg(tmp_path, "resume_train", **keys))
        why = "it received SIGUSR1" if hangs else "a loader worker .* was ended by SIGKILL.*"
        saved = (
            rf"after iteration 2: {why}; everything is saved in .*: go on with resume_or_load\(resume=True\)"
        )
        with log_lines("detectron2") as lines, pytest.raises(RunStopped if hangs else UserError, match=saved):
            trainer.train()
    assert not any("Exception during training" in line for line in lines)
    run(tmp_path, 6)
    assert same(last_checkpoint(tmp_path), expected)


def test_the_workers_make_no_difference_to_training(whole_runs: Any) -> None:
    (without, seen), (with_two, seen_with_two) = whole_runs(0, False), whole_runs(2, False)
    assert seen == seen_with_two
    assert same(without["model"], with_two["model"])


def test_precise_batch_norm_resumes_bit_equal(tmp_path: Path, synthetic: Any) -> None:
    """Detectron2's hook has a loader of its own."""
    keys = {
        "MODEL__RESNETS__NORM": "BN",
        "TEST__PRECISE_BN__ENABLED": True,
        "TEST__PRECISE_BN__NUM_ITER": 2,
        "TEST__EVAL_PERIOD": 2,
    }
    run(tmp_path / "whole", 4, **keys)
    run(tmp_path / "halves", 2, **keys)
    run(tmp_path / "halves", 4, **keys)
    assert same(last_checkpoint(tmp_path / "halves"), last_checkpoint(tmp_path / "whole"))


def test_a_seed_drawn_at_random_is_the_runs(tmp_path: Path, synthetic: Any) -> None:
    first, _ = run(tmp_path / "halves", 3, SEED=-1)
    other, _ = run(tmp_path / "other", 1, SEED=-1)
    assert first.seed != other.seed
    second, _ = run(tmp_path / "halves", 6, SEED=-1)
    assert second.seed == first.seed
    # Weights at the start, order, augmentation and sampling are those of a run that is told this seed.
    run(tmp_path / "told", 6, SEED=first.seed)
    assert same(last_checkpoint(tmp_path / "told"), last_checkpoint(tmp_path / "halves"))
    with log_lines("zenith_det") as lines:
        run(tmp_path / "told", 7, SEED=4)
    told = (
        rf"SEED +-?\d+ +4 +can't be applied, because the order .* goes on from the run's seed, {first.seed}"
    )
    assert sum(bool(re.search(told, line)) for line in lines) == 1


def test_another_batch_size_goes_on_with_the_images(tmp_path: Path, whole_runs: Any) -> None:
    keys = {"DATALOADER__ASPECT_RATIO_GROUPING": False}
    order = [image for batch in whole_runs(0, False)[1] for image in batch]
    run(tmp_path, 3, **keys)
    with log_lines("zenith_det") as lines:
        run(tmp_path, 3 + 1, **keys, SOLVER__IMS_PER_BATCH=4)
    told = r"SOLVER.IMS_PER_BATCH +2 +4 +applied; the order of the images goes on"
    assert sum(bool(re.search(told, line)) for line in lines) == 1
    shutil.copytree(tmp_path, tmp_path / "again")
    _, whole = run(tmp_path, 3 + 4, **keys, SOLVER__IMS_PER_BATCH=4)
    # The first 4 images were one batch of 4; of the next, 2 were seen.
    assert [image for batch in whole for image in batch][:4] == order[8:12]
    run(tmp_path / "again", 3 + 2, **keys, SOLVER__IMS_PER_BATCH=4)
    _, rest = run(tmp_path / "again", 3 + 4, **keys, SOLVER__IMS_PER_BATCH=4)
    assert rest == whole[1:]
    assert same(last_checkpoint(tmp_path / "again"), last_checkpoint(tmp_path))


def test_another_dataset_is_gone_on_with_exactly(tmp_path: Path, synthetic: Any) -> None:
    run(tmp_path, 3)
    records = load_coco_dataset((str(synthetic["train"].json_file), str(synthetic["train"].image_root)))
    try:
        register_checked_dataset("resume_train", replace(records, records=records.records[:-2]))
        run(tmp_path, 6)
        shutil.copytree(tmp_path, tmp_path / "again")
        _, whole = run(tmp_path, 10)
        run(tmp_path / "again", 8)
        _, rest = run(tmp_path / "again", 10)
    finally:
        register_synthetic("resume_train", synthetic["train"])
    assert len({image for batch in whole for image in batch}) > 4
    assert rest == whole[2:]
    assert same(last_checkpoint(tmp_path / "again"), last_checkpoint(tmp_path))


def test_a_projects_own_loader_under_our_trainer_keeps_the_seed(tmp_path: Path) -> None:
    class Own(ZenithTrainer):
        @classmethod
        def build_train_loader(cls, cfg: Any) -> Any:
            return known_batches(cfg.SOLVER.IMS_PER_BATCH)

    cfg = known_cfg(tmp_path, MAX_ITER=2)
    cfg.SEED = -1
    first = Own(cfg)
    first.train()
    second = Own(cfg)
    assert second.seed != first.seed
    second.resume_or_load(resume=True)
    assert second.seed == first.seed


# ---- safety


class Malicious:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch ran_code",)


@pytest.mark.parametrize("name", ["weights.pkl", "weights.pth"])
def test_a_malicious_file_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    if name.endswith("pkl"):
        Path(name).write_bytes(pickle.dumps({"model": {"a": Malicious()}, "__author__": "x"}))
    else:
        torch.save({"model": {"a": Malicious()}}, name)
    trainer = KnownTrainer(known_cfg(tmp_path / "out"))
    checkpointer = SafeCheckpointer(trainer.model, str(tmp_path / "out"))
    with pytest.raises(CheckpointError, match=r"refused.*system"):
        checkpointer.load(name)
    assert not Path("ran_code").exists()


def test_model_zoo_pickles_load(tmp_path: Path) -> None:
    trainer = KnownTrainer(known_cfg(tmp_path))
    arrays = {
        name: np.full(tensor.shape, 2.0, np.float32) for name, tensor in trainer.model.state_dict().items()
    }
    (tmp_path / "zoo.pkl").write_bytes(pickle.dumps({"model": arrays, "__author__": "Detectron2 Model Zoo"}))
    SafeCheckpointer(trainer.model).load(str(tmp_path / "zoo.pkl"))
    assert float(trainer.model.first.weight.detach().mean()) == 2.0


def test_weights_of_another_model_are_told(tmp_path: Path) -> None:
    trainer = KnownTrainer(known_cfg(tmp_path))
    torch.save({"model": {"backbone.weight": torch.zeros(1)}}, tmp_path / "other.pth")
    with pytest.raises(
        CheckpointError,
        match=r"another model: 0 of its 1 tensors are in this model of 2; it has backbone.weight",
    ):
        SafeCheckpointer(trainer.model).load(str(tmp_path / "other.pth"))
    own = trainer.model.state_dict()
    torch.save({"model": {**own, "first.weight": torch.zeros(1, 3)}}, tmp_path / "shape.pth")
    with pytest.raises(CheckpointError, match=r"first.weight \[1, 3\] in the file, \[1, 6\] in the model"):
        SafeCheckpointer(trainer.model, allow_mismatch=False).load(str(tmp_path / "shape.pth"))
    SafeCheckpointer(trainer.model).load(str(tmp_path / "shape.pth"))  # Detectron2's way: a warning
    torch.save({"model": {"first.weight": own["first.weight"]}}, tmp_path / "half.pth")
    with pytest.raises(CheckpointError, match="1 of the model's 2 tensors are not in it"):
        SafeCheckpointer(trainer.model, require_all=True).load(str(tmp_path / "half.pth"))
    with pytest.raises(CheckpointError, match="does not exist"):
        SafeCheckpointer(trainer.model).load(str(tmp_path / "nowhere.pth"))


def test_a_torn_checkpoint_is_passed_over(tmp_path: Path) -> None:
    trainer = KnownTrainer(known_cfg(tmp_path))
    checkpointer = SafeCheckpointer(trainer.model, str(tmp_path))
    checkpointer.save("model_0000004")
    checkpointer.save("model_0000009")
    whole = (tmp_path / "model_0000009.pth").read_bytes()
    (tmp_path / "model_0000009.pth").write_bytes(whole[: len(whole) // 2])
    fresh = SafeCheckpointer(trainer.model, str(tmp_path))
    fresh.resume_or_load("", resume=True)
    assert fresh.has_checkpoint()
    assert fresh.get_checkpoint_file().endswith("model_0000004.pth")


def test_best_checkpoint_is_detectron2s_hook_with_ours(tmp_path: Path) -> None:
    """Hooks that save by the trainer's checkpointer go on working, and numpy scalars don't spoil a file."""

    class Best(KnownTrainer):
        def build_hooks(self) -> list[Any]:
            self.checkpointer = SafeCheckpointer(self.model, self.cfg.OUTPUT_DIR)
            built = super().build_hooks()
            return [*built[:-1], hooks.BestCheckpointer(5, self.checkpointer, "bbox/AP"), built[-1]]

        @classmethod
        def test(cls, cfg: Any, model: Any, evaluators: Any = None) -> dict[str, Any]:
            return {"bbox": {"AP": np.float64(12.5)}}

    cfg = known_cfg(tmp_path, MAX_ITER=10)
    cfg.TEST.EVAL_PERIOD = 5
    Best(cfg).train()
    saved = torch.load(tmp_path / "model_best.pth", weights_only=True)
    assert saved["iteration"] == 4
    assert next(known_batches())  # the data are what they were
