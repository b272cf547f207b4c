"""ZENITH under Detectron2's trainer: LR, logs, clipping, scaling, and SGD left as Detectron2 has it."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("detectron2.engine", reason="needs the real Detectron2: see docs/DETECTRON2.md")

from detectron2.config import get_cfg
from detectron2.data.datasets import register_coco_instances
from detectron2.engine import DefaultTrainer, SimpleTrainer, hooks
from detectron2.solver.build import maybe_add_gradient_clipping
from torch import nn

from tests.engines.detectron2_engine.d2_helpers import (
    KnownTrainer,
    forget,
    known_batches,
    known_cfg,
    known_norms,
    log_lines,
    metrics,
    rcnn_cfg,
    register_synthetic,
    synthetic_set,
    trace_of,
    zenith_ratios,
)
from zenith_det.engines import model_format
from zenith_det.engines.detectron2_engine import ZenithMetrics, ZenithTrainer, ZenithTrainerMixin
from zenith_det.engines.detectron2_engine.exact_resume import TrainLoader
from zenith_det.engines.trainer import LOG_PERIOD
from zenith_det.errors import ConfigError
from zenith_det.optim import ZENITH
from zenith_det.solver import LR_SCHEDULER_REGISTRY, OPTIMIZER_REGISTRY
from zenith_det.training.course.seeding import seed_all, seed_step

pytestmark = pytest.mark.detectron2


def scheduled(cfg: Any, iteration: int) -> float:
    """WarmupZenithLR, written out."""
    solver = cfg.SOLVER
    if iteration >= solver.WARMUP_ITERS:
        return solver.BASE_LR
    done = iteration / solver.WARMUP_ITERS
    return solver.BASE_LR * (solver.WARMUP_FACTOR * (1 - done) + done)


# ---- the LR


def test_updates_use_the_lr_of_the_definition(tmp_path: Path) -> None:
    cfg = known_cfg(tmp_path)
    trace = trace_of(KnownTrainer(cfg))
    ratios = zenith_ratios(known_norms(40), window=5)
    expected = [scheduled(cfg, i) * ratio for i, ratio in enumerate(ratios)]
    assert trace.lrs == pytest.approx(expected, rel=1e-6)
    assert trace.lrs[-1] < 0.3 * cfg.SOLVER.BASE_LR
    # The weights moved by exactly so much.
    batches = known_batches()
    for before, after, lr in zip(trace.weights, trace.weights[1:], trace.lrs[1:]):
        if len(trace.weights) == 40 and lr == trace.lrs[1]:
            next(batches)
        gradient = torch.stack(next(batches)).mean(0)
        torch.testing.assert_close(before - after, lr * gradient, rtol=1e-3, atol=1e-5)


def test_logged_lr_is_the_one_used_everywhere(tmp_path: Path) -> None:
    trainer = KnownTrainer(known_cfg(tmp_path))
    trace = trace_of(trainer)
    lines = [line for line in metrics(tmp_path) if "lr" in line]
    assert [line["iteration"] for line in lines] == [19, 39]
    norms = known_norms(40)
    for line in lines:
        at = line["iteration"]
        assert line["lr"] == pytest.approx(trace.lrs[at], rel=1e-9)
        assert line["lr"] == pytest.approx(0.01 * line["zenith/ratio"], rel=1e-6)
        assert line["zenith/grad_norm"] == pytest.approx(norms[at], rel=1e-5)
        assert line["zenith/window_mean"] == pytest.approx(sum(norms[at - 4 : at + 1]) / 5, rel=1e-5)
        assert line["zenith/zenith"] == pytest.approx(line["zenith/window_mean"] / line["zenith/ratio"])
        assert line["zenith/skipped_steps"] == 0
    events = _tensorboard(tmp_path)
    assert events["lr"][39] == pytest.approx(lines[-1]["lr"], rel=1e-6)
    assert events["zenith/ratio"][19] == pytest.approx(lines[0]["zenith/ratio"], rel=1e-6)


def test_console_shows_the_lr_used_and_the_ratio(tmp_path: Path) -> None:
    with log_lines("detectron2", "zenith_det") as lines:
        KnownTrainer(known_cfg(tmp_path, MAX_ITER=20)).train()
    written = metrics(tmp_path)[0]
    printed = [line for line in lines if "iter: 19" in line]
    assert any(f"lr: {written['lr']:.5g}" in line and "total_loss" in line for line in printed)
    assert any(f"zenith/ratio: {written['zenith/ratio']:.4g}" in line for line in printed)


def _tensorboard(folder: Path) -> dict[str, dict[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return {tag: {e.step: e.value for e in accumulator.Scalars(tag)} for tag in accumulator.Tags()["scalars"]}


def test_state_is_read_only_when_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    trainer = KnownTrainer(known_cfg(tmp_path, MAX_ITER=50))
    original = ZENITH.zenith_state
    monkeypatch.setattr(
        ZENITH, "zenith_state", lambda optimizer: read.append(trainer.iter) or original(optimizer)
    )
    trainer.train()
    assert read == [19, 39, 49]


def test_metrics_follow_the_writers_period(tmp_path: Path) -> None:
    class Often(KnownTrainer):
        def build_hooks(self) -> list[Any]:
            built = super().build_hooks()
            built[-1]._period = 7
            return built

    Often(known_cfg(tmp_path, MAX_ITER=15)).train()
    assert [line["iteration"] for line in metrics(tmp_path) if "zenith/ratio" in line] == [6, 13, 14]


def test_metrics_hook_in_a_plain_loop_of_hooks(tmp_path: Path) -> None:
    """A project without DefaultTrainer: Detectron2's SimpleTrainer and the hook alone."""
    from detectron2.utils.events import JSONWriter

    from tests.engines.detectron2_engine.d2_helpers import KnownGradient

    model = KnownGradient(None)
    optimizer = ZENITH(model.parameters(), lr=0.01, window=5)
    trainer = SimpleTrainer(model, known_batches(), optimizer)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=0.5, total_iters=3)
    writer = hooks.PeriodicWriter([JSONWriter(str(tmp_path / "metrics.json"))], period=10)
    trainer.register_hooks([hooks.LRScheduler(scheduler=scheduler), ZenithMetrics(), writer])
    trainer.train(0, 10)
    ratio = zenith_ratios(known_norms(10), window=5)[-1]
    assert metrics(tmp_path)[-1]["lr"] == pytest.approx(0.01 * ratio, rel=1e-6)
    with pytest.raises(ValueError, match="period is 0"):
        ZenithMetrics(period=0)


# ---- the mix-in


def test_missing_keys_are_told(tmp_path: Path) -> None:
    cfg = get_cfg()
    cfg.MODEL.META_ARCHITECTURE = "KnownGradient"
    with pytest.raises(ConfigError, match="add_zenith_config"):
        KnownTrainer(cfg)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("OPTIMIZER", "ZENIT", "'ZENIT' is not one of .*did you mean ZENITH"),
        ("LR_SCHEDULER_NAME", "WarmupZenith", "did you mean WarmupZenithLR"),
    ],
)
def test_unknown_names_are_told_with_the_nearest(tmp_path: Path, key: str, value: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        KnownTrainer(known_cfg(tmp_path, **{key: value}))


def test_a_projects_own_optimizer_and_schedule_come_from_the_registries(tmp_path: Path) -> None:
    @OPTIMIZER_REGISTRY.register()
    def Rprop(cfg: Any, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.Rprop(model.parameters(), lr=cfg.SOLVER.BASE_LR)

    @LR_SCHEDULER_REGISTRY.register()
    def Halves(cfg: Any, optimizer: torch.optim.Optimizer) -> Any:
        return torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)

    try:
        cfg = known_cfg(tmp_path, OPTIMIZER="Rprop", LR_SCHEDULER_NAME="Halves", MAX_ITER=4)
        trainer = KnownTrainer(cfg)
        assert isinstance(trainer.optimizer, torch.optim.Rprop)
        trainer.train()
        assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(0.0025)
    finally:
        OPTIMIZER_REGISTRY._obj_map.pop("Rprop")
        LR_SCHEDULER_REGISTRY._obj_map.pop("Halves")


def test_a_base_class_keeps_its_own_sgd_and_schedule(tmp_path: Path) -> None:
    class Project(DefaultTrainer):
        built: list[str] = []

        @classmethod
        def build_optimizer(cls, cfg: Any, model: nn.Module) -> torch.optim.Optimizer:
            cls.built.append("optimizer")
            return super().build_optimizer(cfg, model)

        @classmethod
        def build_lr_scheduler(cls, cfg: Any, optimizer: torch.optim.Optimizer) -> Any:
            cls.built.append(cfg.SOLVER.LR_SCHEDULER_NAME)
            return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)

    class Trainer(ZenithTrainerMixin, Project):
        build_train_loader = KnownTrainer.build_train_loader

    Trainer(known_cfg(tmp_path, OPTIMIZER="SGD", LR_SCHEDULER_NAME="OfTheProject"))
    assert Project.built == ["optimizer", "OfTheProject"]


def test_zenith_under_a_decaying_schedule_warns_and_multiplies(tmp_path: Path) -> None:
    cfg = known_cfg(tmp_path, LR_SCHEDULER_NAME="WarmupMultiStepLR", STEPS=(20,), GAMMA=0.1, MAX_ITER=30)
    with log_lines("zenith_det") as lines:
        trainer = KnownTrainer(cfg)
    assert sum("multiply" in line for line in lines) == 1
    trace = trace_of(trainer)
    ratio = zenith_ratios(known_norms(30), window=5)[29]
    assert trace.lrs[29] == pytest.approx(0.01 * 0.1 * ratio, rel=1e-6)


@pytest.mark.parametrize(
    "name", ["WarmupZenithLR", "WarmupMultiStepLR", "WarmupCosineLR", "WarmupStepWithFixedGammaLR"]
)
def test_every_schedule_survives_its_last_iteration(tmp_path: Path, name: str) -> None:
    """The final checkpoint is written after the schedule has been stepped once more."""
    KnownTrainer(known_cfg(tmp_path, LR_SCHEDULER_NAME=name, STEPS=(5,), MAX_ITER=8)).train()
    assert (tmp_path / "model_final.pth").exists()


def test_lr_does_not_depend_on_max_iter(tmp_path: Path) -> None:
    short = trace_of(KnownTrainer(known_cfg(tmp_path / "a", MAX_ITER=15)))
    long = trace_of(KnownTrainer(known_cfg(tmp_path / "b", MAX_ITER=33)))
    assert long.lrs[:15] == short.lrs


# ---- clipping


CLIP_KINDS = [("value", 0.5), ("norm", 0.7), ("full_model", 1.0)]


@pytest.mark.parametrize(("kind", "limit"), CLIP_KINDS)
def test_clipping_changes_the_updates_and_not_the_lr(tmp_path: Path, kind: str, limit: float) -> None:
    free = trace_of(KnownTrainer(known_cfg(tmp_path / "free")))
    cfg = known_cfg(tmp_path / "clipped")
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = kind
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = limit
    clipped = trace_of(KnownTrainer(cfg))
    assert clipped.lrs == pytest.approx(free.lrs, rel=1e-6)
    assert not torch.allclose(clipped.weights[-1], free.weights[-1])
    step = (clipped.weights[10] - clipped.weights[11]) / clipped.lrs[11]
    if kind == "value":
        assert step.abs().max() <= limit * 1.001
    elif kind == "norm":
        assert max(half.norm() for half in step.split(6)) <= limit * 1.001
    else:
        assert step.norm() <= limit * 1.001


def full_model_clipping(optimizer_class: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """As in many projects: a subclass that clips, then steps."""

    class FullModelGradientClippingOptimizer(optimizer_class):  # type: ignore[misc, valid-type]
        def step(self, closure: Any = None) -> None:
            parameters = itertools.chain(*[group["params"] for group in self.param_groups])
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            super().step(closure=closure)

    return FullModelGradientClippingOptimizer


class ClipsInASubclass(KnownTrainer):
    @classmethod
    def build_optimizer(cls, cfg: Any, model: nn.Module) -> torch.optim.Optimizer:
        return full_model_clipping(ZENITH)(model.parameters(), lr=cfg.SOLVER.BASE_LR, window=5)


class ClipsInDetectron2sClass(KnownTrainer):
    @classmethod
    def build_optimizer(cls, cfg: Any, model: nn.Module) -> torch.optim.Optimizer:
        cfg = cfg.clone()
        cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
        return maybe_add_gradient_clipping(cfg, ZENITH(model.parameters(), lr=cfg.SOLVER.BASE_LR, window=5))


class ClipsInItsLoop(KnownTrainer):
    def run_step(self) -> None:
        losses = self.model(next(self._trainer._data_loader_iter))
        self.optimizer.zero_grad()
        losses["loss"].backward()
        self.optimizer.record_norm()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()


@pytest.mark.parametrize("trainer_class", [ClipsInASubclass, ClipsInDetectron2sClass, ClipsInItsLoop])
def test_a_trainers_own_clipping_leaves_the_lr_alone(tmp_path: Path, trainer_class: type) -> None:
    ZENITH([nn.Parameter(torch.zeros(1))], lr=0.1)  # a plain one was made before: torch hooks its class
    free = trace_of(KnownTrainer(known_cfg(tmp_path / "free")))
    clipped = trace_of(trainer_class(known_cfg(tmp_path / "clipped")))
    assert clipped.lrs == pytest.approx(free.lrs, rel=1e-6)
    assert not torch.allclose(clipped.weights[-1], free.weights[-1])


# ---- several GPUs, accumulation, precision


def test_reference_world_size_rescales_our_keys(tmp_path: Path) -> None:
    cfg = known_cfg(tmp_path, IMS_PER_BATCH=8, REFERENCE_WORLD_SIZE=4, MAX_ITER=10, WARMUP_ITERS=4)
    cfg.SOLVER.ZENITH.WINDOW = 100
    cfg.SOLVER.ZENITH.RECORD_AFTER = 20
    cfg.SOLVER.ZENITH.HALF_LIFE = 400
    cfg.freeze()
    scaled = KnownTrainer.auto_scale_workers(cfg, 8)
    assert (scaled.SOLVER.IMS_PER_BATCH, scaled.SOLVER.MAX_ITER, scaled.SOLVER.WARMUP_ITERS) == (16, 5, 2)
    assert (scaled.SOLVER.ZENITH.WINDOW, scaled.SOLVER.ZENITH.RECORD_AFTER) == (50, 10)
    assert scaled.SOLVER.ZENITH.HALF_LIFE == 200
    assert scaled.is_frozen()
    assert KnownTrainer.auto_scale_workers(cfg, 4) is cfg
    trainer = KnownTrainer(cfg)  # one process
    assert trainer.cfg.SOLVER.IMS_PER_BATCH == 2
    assert trainer.cfg.SOLVER.ZENITH.WINDOW == 400
    assert trainer.optimizer._history.window == 400
    assert trainer.max_iter == 40
    cfg = known_cfg(tmp_path, REFERENCE_WORLD_SIZE=1)
    cfg.SOLVER.ZENITH.WINDOW = 3
    assert KnownTrainer.auto_scale_workers(cfg, 16).SOLVER.ZENITH.WINDOW == 1


def test_gradient_accumulation_is_the_whole_batch(tmp_path: Path) -> None:
    whole = trace_of(KnownTrainer(known_cfg(tmp_path / "whole", IMS_PER_BATCH=4)))
    parts = trace_of(KnownTrainer(known_cfg(tmp_path / "parts", IMS_PER_BATCH=4, GRADIENT_ACCUMULATION=2)))
    assert parts.lrs == pytest.approx(whole.lrs, rel=1e-6)
    torch.testing.assert_close(parts.weights[-1], whole.weights[-1])
    losses = [
        [line["total_loss"] for line in metrics(tmp_path / run) if "total_loss" in line]
        for run in ("whole", "parts")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    with pytest.raises(ConfigError, match=r"divide by 3 .*GRADIENT_ACCUMULATION 3"):
        KnownTrainer(known_cfg(tmp_path, IMS_PER_BATCH=4, GRADIENT_ACCUMULATION=3))


def test_amp_scaler_on_the_cpu_leaves_the_lr_alone(tmp_path: Path) -> None:
    """Detectron2's AMPTrainer wants CUDA; the scaler's part in it works anywhere."""

    class Scales(KnownTrainer):
        def run_step(self) -> None:
            if not hasattr(self, "scaler"):
                self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
            losses = self.model(next(self._trainer._data_loader_iter))
            self.optimizer.zero_grad()
            self.scaler.scale(losses["loss"]).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()

    free = trace_of(KnownTrainer(known_cfg(tmp_path / "free")))
    scaled = trace_of(Scales(known_cfg(tmp_path / "scaled")))
    assert scaled.lrs == pytest.approx(free.lrs, rel=1e-5)
    torch.testing.assert_close(scaled.weights[-1], free.weights[-1], rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: Detectron2's AMPTrainer wants CUDA")
@pytest.mark.parametrize("amp", [False, True])
def test_cuda_trains_like_the_cpu_and_no_step_waits(tmp_path: Path, amp: bool) -> None:
    class OnTheDevice(KnownTrainer):
        @classmethod
        def build_train_loader(cls, cfg: Any) -> Any:
            return ([sample.cuda() for sample in batch] for batch in known_batches(cfg.SOLVER.IMS_PER_BATCH))

    cpu = trace_of(KnownTrainer(known_cfg(tmp_path / "cpu")))
    cfg = known_cfg(tmp_path / "cuda")
    cfg.MODEL.DEVICE = "cuda"
    cfg.SOLVER.AMP.ENABLED = amp
    trainer = OnTheDevice(cfg)
    if amp:
        # The scale that it begins with overflows, and the history would begin later by the steps it skips.
        scaler = trainer._trainer.grad_scaler
        scaler.load_state_dict(scaler.state_dict() | {"scale": 1.0})
    step, steps = trainer.optimizer.step, itertools.count()

    def watched(*args: Any, **kwargs: Any) -> Any:
        # The first one makes the state, and the writers' steps are read; the others raise where they would wait.
        may_wait = next(steps) == 0 or (trainer.iter + 1) % LOG_PERIOD == 0
        torch.cuda.set_sync_debug_mode("default" if may_wait else "error")
        try:
            return step(*args, **kwargs)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    trainer.optimizer.step = watched
    cuda = trace_of(trainer)
    assert next(steps) > 5
    assert cuda.lrs == pytest.approx(cpu.lrs, rel=1e-2 if amp else 1e-5)
    torch.testing.assert_close(
        cuda.weights[-1].cpu(), cpu.weights[-1], rtol=1e-2 if amp else 1e-4, atol=1e-2 if amp else 1e-5
    )


@pytest.mark.parametrize("parts", [1, 2])
def test_bfloat16_trains_on_the_cpu(tmp_path: Path, parts: int) -> None:
    """Detectron2's own AMP step wants CUDA."""
    exact = trace_of(KnownTrainer(known_cfg(tmp_path / "32")))
    cfg = known_cfg(tmp_path / "16", GRADIENT_ACCUMULATION=parts)
    cfg.SOLVER.AMP.ENABLED, cfg.SOLVER.AMP.DTYPE = True, "bfloat16"
    trainer = KnownTrainer(cfg)
    assert not trainer._trainer.grad_scaler.is_enabled()
    rounded = trace_of(trainer)
    assert rounded.lrs == pytest.approx(exact.lrs, rel=1e-2)
    assert rounded.lrs != exact.lrs
    torch.testing.assert_close(rounded.weights[-1], exact.weights[-1], rtol=1e-2, atol=1e-2)


def test_float16_on_the_cpu_is_refused(tmp_path: Path) -> None:
    cfg = known_cfg(tmp_path)
    cfg.SOLVER.AMP.ENABLED = True
    with pytest.raises(ConfigError, match="float16 needs a GPU: take bfloat16 on the CPU"):
        KnownTrainer(cfg)


def test_channels_last_and_a_compiled_backbone_train_alike(
    tmp_path: Path, synthetic: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_format, "BACKEND", "eager")
    runs = {}
    for key in ("", "MODEL.CHANNELS_LAST", "MODEL.COMPILE_BACKBONE"):
        cfg = rcnn_cfg(tmp_path / (key or "plain"), "checked_by_us", SOLVER__MAX_ITER=2)
        if key:
            cfg.merge_from_list([key, True])
        trainer = ZenithTrainer(cfg)
        stem = trainer.model.backbone.bottom_up.stem.conv1.weight
        assert stem.is_contiguous(memory_format=torch.channels_last) == (key == "MODEL.CHANNELS_LAST")
        trainer.train()
        runs[key] = torch.load(tmp_path / (key or "plain") / "model_final.pth", weights_only=True)["model"]
    plain = runs.pop("")
    for weights in runs.values():
        assert list(weights) == list(plain)
        for name, value in plain.items():
            torch.testing.assert_close(weights[name], value, rtol=1e-3, atol=1e-4)


# ---- for people who have no trainer of their own


def test_zenith_trainer_does_what_the_keys_ask_for(tmp_path: Path, synthetic: Any) -> None:
    """Averaged and best weights, old checkpoints removed, test-time augmentation, each evaluation at once."""
    cfg = rcnn_cfg(
        tmp_path, "checked_by_us", "checked_by_us", SOLVER__MAX_ITER=4, SOLVER__CHECKPOINT_PERIOD=1,
        SOLVER__AVERAGE__KIND="ema", CHECKPOINT__KEEP=1, CHECKPOINT__BEST="averaged box AP",
        TEST__EVAL_PERIOD=2, TEST__MAX_IMAGES=2, TEST__AUG__ENABLED=True, TEST__AUG__MIN_SIZES=(48,),
    )  # fmt: skip
    assert "AP" in ZenithTrainer(cfg).train()["bbox"]
    there = {path.name for path in tmp_path.glob("*.pth")}
    assert there == {"model_0000003.pth", "model_best.pth", "model_final.pth", "model_final_averaged.pth"}
    for folder in (tmp_path, tmp_path / "averaged", tmp_path / "inference_TTA"):
        assert list(folder.rglob("coco_instances_results.json")), folder
    evaluated = {
        name: [line["iteration"] for line in metrics(tmp_path) if name in line]
        for name in ("bbox/AP", "averaged/bbox/AP", "bbox_TTA/AP")
    }
    # Detectron2's loop counts one further before the last one.
    assert evaluated["bbox/AP"] == evaluated["averaged/bbox/AP"] == [1, 4]
    assert len(evaluated["bbox_TTA/AP"]) == 1
    assert torch.load(tmp_path / "model_best.pth", weights_only=True)["best"]["metric"] == "averaged box AP"


# ---- SGD stays Detectron2's


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> Any:
    files = synthetic_set(tmp_path_factory.mktemp("set"))
    register_synthetic("checked_by_us", files["train"])
    register_coco_instances(
        "as_detectron2_reads_it", {}, str(files["train"].json_file), str(files["train"].image_root)
    )
    yield files
    forget("checked_by_us")
    forget("as_detectron2_reads_it")


def trained(trainer_class: type, cfg: Any) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    from detectron2.utils.env import seed_all_rng

    seed_all_rng(5)
    trainer = trainer_class(cfg)
    trainer.train()
    losses = [
        {name: value for name, value in line.items() if "loss" in name or name == "lr"}
        for line in metrics(Path(cfg.OUTPUT_DIR))
    ]
    return trainer.model.state_dict(), losses


class Mixed(ZenithTrainerMixin, DefaultTrainer):
    """The mix-in alone: a project that has its own everything."""


class SeededDefaultTrainer(DefaultTrainer):
    """Detectron2's trainer with the random numbers of :class:`ZenithTrainer`, and nothing else of it."""

    def __init__(self, cfg: Any) -> None:
        seed_all(cfg.SEED)
        super().__init__(cfg)

    def run_step(self) -> None:
        seed_step(self.cfg.SEED, self.iter)
        super().run_step()

    @classmethod
    def build_train_loader(cls, cfg: Any) -> Any:
        loader = TrainLoader(cfg)
        loader.seed = cfg.SEED
        return iter(loader)  # made now: making it draws a random number


@pytest.mark.parametrize(
    ("detectron2s", "with_ours"), [(DefaultTrainer, Mixed), (SeededDefaultTrainer, ZenithTrainer)]
)
def test_sgd_is_detectron2s_own_bit_for_bit(
    tmp_path: Path, synthetic: Any, detectron2s: Any, with_ours: Any
) -> None:
    from detectron2.data import MetadataCatalog
    from detectron2.data.datasets import load_coco_json

    files = synthetic["train"]
    load_coco_json(
        str(files.json_file), str(files.image_root), "as_detectron2_reads_it"
    )  # fills its metadata
    assert MetadataCatalog.get("as_detectron2_reads_it").thing_classes
    keys = {
        "SOLVER__OPTIMIZER": "SGD",
        "SOLVER__LR_SCHEDULER_NAME": "WarmupMultiStepLR",
        "SOLVER__STEPS": (12,),
        "SOLVER__MAX_ITER": 20,
        "SOLVER__CLIP_GRADIENTS__ENABLED": True,
        "MODEL__MASK_ON": True,
    }
    theirs = trained(detectron2s, rcnn_cfg(tmp_path / "theirs", "as_detectron2_reads_it", **keys))
    ours = trained(with_ours, rcnn_cfg(tmp_path / "ours", "checked_by_us", **keys))
    assert theirs[1] == ours[1]
    assert theirs[0].keys() == ours[0].keys()
    assert all(torch.equal(theirs[0][name], ours[0][name]) for name in theirs[0])
