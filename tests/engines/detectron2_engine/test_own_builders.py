"""Projects with a build_optimizer or build_lr_scheduler of their own: ZENITH trains them, and changes nothing else."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("detectron2.engine", reason="needs the real Detectron2: see docs/DETECTRON2.md")

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.engine import DefaultTrainer, SimpleTrainer, TrainerBase
from detectron2.solver import get_default_optimizer_params
from detectron2.solver.build import maybe_add_gradient_clipping
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from tests.engines.detectron2_engine.d2_helpers import (
    known_batches,
    known_cfg,
    known_norms,
    log_lines,
    metrics,
    trace_of,
    zenith_ratios,
)
from tests.optim.literal_zenith import LiteralZenith
from zenith_det.engines.detectron2_engine import ZenithTrainer, ZenithTrainerMixin
from zenith_det.errors import ConfigError
from zenith_det.optim import ZENITH, ZENITHAdamW, ZenithRatio, zenith_of

pytestmark = pytest.mark.detectron2

ITERATIONS, WINDOW, FACTOR = 30, 5, 0.1
OVER = "ZENITH's LR ratio is over the project's own optimizer"


class Data:
    """The data of every trainer here."""

    @classmethod
    def build_train_loader(cls, cfg: Any) -> Iterator[Any]:
        return known_batches(cfg.SOLVER.IMS_PER_BATCH)


def own_groups(cfg: Any, model: nn.Module) -> list[dict[str, Any]]:
    """Mask2Former's kind: a tenth of the LR for the backbone, no weight decay for some."""
    groups = get_default_optimizer_params(
        model,
        base_lr=cfg.SOLVER.BASE_LR,
        lr_factor_func=lambda name: FACTOR if name.startswith("first") else 1.0,
    )
    groups[-1]["weight_decay"] = 0.0
    return groups


def clips_in_step(cfg: Any, kind: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """Mask2Former's full-model clipping, word for word in what it does."""

    class FullModelGradientClippingOptimizer(kind):  # type: ignore[misc, valid-type]
        def step(self, closure: Any = None) -> None:
            parameters = itertools.chain(*[group["params"] for group in self.param_groups])
            torch.nn.utils.clip_grad_norm_(parameters, cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE)
            super().step(closure=closure)

    return FullModelGradientClippingOptimizer


class OwnOptimizer:
    """As in nine of ten projects: a class method that asks the project's own SOLVER.OPTIMIZER."""

    @classmethod
    def build_optimizer(cls, cfg: Any, model: nn.Module) -> torch.optim.Optimizer:
        kinds: dict[str, Any] = {
            "SGD": lambda kind: kind(own_groups(cfg, model), cfg.SOLVER.BASE_LR, 0.9, weight_decay=0.01),
            "ADAMW": lambda kind: kind(own_groups(cfg, model), cfg.SOLVER.BASE_LR),
        }
        name = cfg.SOLVER.OPTIMIZER
        if name not in kinds:
            raise NotImplementedError(f"no optimizer type {name}")
        kind = torch.optim.SGD if name == "SGD" else torch.optim.AdamW
        if cfg.MODEL.META_ARCHITECTURE_CLIPS == "step":
            return kinds[name](clips_in_step(cfg, kind))  # type: ignore[no-any-return]
        built: torch.optim.Optimizer = kinds[name](kind)
        return maybe_add_gradient_clipping(cfg, built)  # type: ignore[arg-type, return-value]


class OwnSchedule:
    """Neither Detectron2's names nor ours."""

    @classmethod
    def build_lr_scheduler(cls, cfg: Any, optimizer: torch.optim.Optimizer) -> LambdaLR:
        if cfg.SOLVER.LR_SCHEDULER_NAME != "Own":
            raise ValueError(f"Unknown LR scheduler: {cfg.SOLVER.LR_SCHEDULER_NAME}")
        return LambdaLR(optimizer, own_multiplier)


def own_multiplier(iteration: int) -> float:
    return min(1.0, (iteration + 1) / 4)


class ClipsBetween:
    def run_step(self: Any) -> None:
        losses = self.model(next(self._trainer._data_loader_iter))
        self.optimizer.zero_grad()
        losses["loss"].backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE)
        self.optimizer.step()


def trainer_class(place: str, optimizer: bool, schedule: bool, clip: str) -> type:
    """
    Args:
        place: of the mix-in: "before" everything of the project's, "inside" (the class itself has the methods),
            "among" (a base before it has them) or "behind" Detectron2's trainer.
        optimizer, schedule: whether the project has its own.
        clip: "between" backward() and step(), or anything else.
    """
    parts = (OwnOptimizer,) * optimizer + (OwnSchedule,) * schedule
    data = (Data, ClipsBetween) if clip == "between" else (Data,)
    own = type("Own", (*parts, object) if parts else (), {})
    if place == "before":
        project = type("Project", (*parts, DefaultTrainer), {})
        return type("Trainer", (*data, ZenithTrainerMixin, project), {})
    if place == "inside":
        methods = {}
        for part in parts:
            methods |= {name: value for name, value in vars(part).items() if name.startswith("build_")}
        return type("Trainer", (*data, ZenithTrainerMixin, DefaultTrainer), methods)
    if place == "among":
        return type("Trainer", (own, *data, ZenithTrainerMixin, DefaultTrainer), {})
    return type("Trainer", (own, *data, DefaultTrainer, ZenithTrainerMixin), {})


def project_cfg(output: Path, update: str, optimizer: bool, schedule: bool, clip: str) -> Any:
    names = {True: {"SGD": "SGD", "AdamW": "ADAMW"}, False: {"SGD": "ZENITH", "AdamW": "ZENITHAdamW"}}
    cfg = known_cfg(
        output,
        MAX_ITER=ITERATIONS,
        OPTIMIZER=names[optimizer][update],
        LR_SCHEDULER_NAME="Own" if schedule else "WarmupZenithLR",
        WEIGHT_DECAY=0.01,
        MOMENTUM=0.9,
    )
    cfg.MODEL.META_ARCHITECTURE_CLIPS = clip
    cfg.SOLVER.ZENITH.WINDOW = WINDOW
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = 0.5
    if clip in ("CLIP_GRADIENTS", "step" if not optimizer else ""):
        cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
        cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = "full_model" if clip == "step" else "norm"
    return cfg


SHAPES = list(itertools.product([True, False], [True, False], ["none", "step", "between", "CLIP_GRADIENTS"]))


@pytest.mark.parametrize("update", ["SGD", "AdamW"])
@pytest.mark.parametrize(("optimizer", "schedule", "clip"), SHAPES)
@pytest.mark.parametrize("place", ["before", "inside", "among"])
def test_every_shape_of_project_trains_at_the_lr_of_the_definition(
    tmp_path: Path, place: str, optimizer: bool, schedule: bool, clip: str, update: str
) -> None:
    cfg = project_cfg(tmp_path, update, optimizer, schedule, clip)
    base = [cfg.SOLVER.BASE_LR * FACTOR, cfg.SOLVER.BASE_LR] if optimizer else [cfg.SOLVER.BASE_LR]
    decays = [0.01, 0.0] if optimizer else [0.01]
    with log_lines("zenith_det") as lines:
        trainer = trainer_class(place, optimizer, schedule, clip)(cfg)
        built = trainer.optimizer
        assert [group["initial_lr"] for group in built.param_groups] == pytest.approx(base)
        trace = trace_of(trainer)
    theirs = {"SGD": torch.optim.SGD, "AdamW": torch.optim.AdamW}[update]
    assert isinstance(built, theirs if optimizer else (ZENITH, ZENITHAdamW))
    told = [line for line in lines if OVER in line]
    assert len(told) == int(optimizer)
    assert not optimizer or f": {type(built).__name__}, with its 2 parameter groups" in told[0]
    assert not [line for line in lines if "multiply" in line]
    assert [group["weight_decay"] for group in built.param_groups] == decays

    # The definition, in Python's floats.
    literal = LiteralZenith([{"params": [[0.0]], "lr": lr} for lr in base], window=WINDOW)
    for iteration, norm in enumerate(known_norms(ITERATIONS)):
        multiplier = own_multiplier(iteration) if schedule else our_multiplier(cfg, iteration)
        for group, lr in zip(literal.groups, base):
            group["lr"] = lr * multiplier
        literal.step([[[0.0]] for _ in base], measured=norm)
        assert trace.all_lrs[iteration] == pytest.approx(literal.effective_lrs, rel=1e-6), iteration
    assert literal.ratio < 0.5
    last = metrics(tmp_path)[-1]
    assert last["lr"] == pytest.approx(trace.all_lrs[-1][0], rel=1e-6)
    assert last["zenith/ratio"] == pytest.approx(literal.ratio, rel=1e-6)


def our_multiplier(cfg: Any, iteration: int) -> float:
    """WarmupZenithLR, written out."""
    solver = cfg.SOLVER
    done = min(iteration / solver.WARMUP_ITERS, 1.0)
    return float(solver.WARMUP_FACTOR * (1 - done) + done)


@pytest.mark.parametrize(("optimizer", "schedule", "clip"), SHAPES)
def test_behind_the_trainer_it_is_refused_with_the_line_to_write(
    optimizer: bool, schedule: bool, clip: str
) -> None:
    with pytest.raises(
        ConfigError, match=r"^class Trainer: ZenithTrainerMixin comes after Detectron2's trainer"
    ) as got:
        trainer_class("behind", optimizer, schedule, clip)
    bases = "Own, Data, ClipsBetween, DefaultTrainer" if clip == "between" else "Own, Data, DefaultTrainer"
    assert str(got.value).endswith(f": write class Trainer(ZenithTrainerMixin, {bases})")


def test_behind_by_way_of_another_class() -> None:
    class Wanted(ZenithTrainerMixin):
        pass

    with pytest.raises(ConfigError, match=r"class Trainer: .*: put Wanted before the other bases"):
        type("Trainer", (DefaultTrainer, Wanted), {})


# ---- other ways to build


class InstanceMethods(Data, ZenithTrainerMixin, DefaultTrainer):
    def build_optimizer(self, cfg: Any, model: nn.Module) -> torch.optim.Optimizer:  # type: ignore[override]
        self.asked = True
        return torch.optim.AdamW(own_groups(cfg, model), cfg.SOLVER.BASE_LR)


class StaticMethods(Data, ZenithTrainerMixin, DefaultTrainer):
    @staticmethod
    def build_optimizer(cfg: Any, model: nn.Module) -> torch.optim.Optimizer:  # type: ignore[override]
        return torch.optim.AdamW(own_groups(cfg, model), cfg.SOLVER.BASE_LR)


class OnTopOfOurs(Data, ZenithTrainerMixin, DefaultTrainer):
    @classmethod
    def build_optimizer(cls, cfg: Any, model: nn.Module) -> torch.optim.Optimizer:
        cfg = cfg.clone()
        cfg.SOLVER.OPTIMIZER = "SGD"
        built = super().build_optimizer(cfg, model)
        assert zenith_of(built) is None
        return torch.optim.AdamW(built.param_groups, cfg.SOLVER.BASE_LR)


class OnTopOfAProjects(InstanceMethods):
    def build_optimizer(self, cfg: Any, model: nn.Module) -> torch.optim.Optimizer:  # type: ignore[override]
        first = super().build_optimizer(cfg, model)
        assert zenith_of(first) is not None
        return maybe_add_gradient_clipping(cfg, first)  # type: ignore[arg-type, return-value]


class PutOnLater(Data, ZenithTrainerMixin, DefaultTrainer):
    pass


PutOnLater.build_optimizer = StaticMethods.__dict__["build_optimizer"]._method  # type: ignore[method-assign]


class OwnInit(Data, ZenithTrainerMixin, DefaultTrainer):
    """Builds its parts past DefaultTrainer.__init__, and its optimizer past build_optimizer."""

    def __init__(self, cfg: Any) -> None:
        TrainerBase.__init__(self)
        model = self.build_model(cfg)
        optimizer = torch.optim.AdamW(own_groups(cfg, model), cfg.SOLVER.BASE_LR)
        self._trainer = SimpleTrainer(model, self.build_train_loader(cfg), optimizer)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = DetectionCheckpointer(model, cfg.OUTPUT_DIR, trainer=self)
        self.start_iter, self.max_iter, self.cfg = 0, cfg.SOLVER.MAX_ITER, cfg
        self.register_hooks(self.build_hooks())


class OnZenithTrainer(Data, ZenithTrainer):
    build_optimizer = OwnOptimizer.__dict__["build_optimizer"]


@pytest.mark.parametrize(
    "trainer",
    [InstanceMethods, StaticMethods, OnTopOfOurs, OnTopOfAProjects, PutOnLater, OwnInit, OnZenithTrainer],
)
def test_however_the_optimizer_is_built(tmp_path: Path, trainer: Any) -> None:
    cfg = project_cfg(tmp_path, "AdamW", True, False, "none")
    with log_lines("zenith_det") as lines:
        made = trainer(cfg)
        trace = trace_of(made)
    assert sum(OVER in line for line in lines) == 1
    assert isinstance(made.optimizer, torch.optim.AdamW)
    ratios = zenith_ratios(known_norms(ITERATIONS), WINDOW)
    group = made.optimizer.param_groups[0]["initial_lr"]
    expected = [group * our_multiplier(cfg, i) * ratio for i, ratio in enumerate(ratios)]
    assert trace.lrs == pytest.approx(expected, rel=1e-5)


class GoesPastOurInit(Data, ZenithTrainerMixin, DefaultTrainer):
    """As DiffusionDet's: the grandfather's __init__, then the father's lines."""

    __init__ = OwnInit.__init__
    build_optimizer = OwnOptimizer.__dict__["build_optimizer"]


@pytest.mark.parametrize("trainer", [OwnInit, GoesPastOurInit])
def test_the_line_is_seen_where_nobody_has_set_up_our_logger(tmp_path: Path, trainer: Any) -> None:
    logger = logging.getLogger("zenith_det")
    handlers, level, propagate = logger.handlers[:], logger.level, logger.propagate
    logger.handlers.clear()
    logger.setLevel(logging.WARNING)
    try:
        trainer(project_cfg(tmp_path, "AdamW", True, False, "none")).train()
    finally:
        logger.handlers[:] = handlers
        logger.setLevel(level)
        logger.propagate = propagate
    assert (tmp_path / "log.txt").read_text().count(OVER) == 1


@pytest.mark.parametrize("trainer", [OwnInit, OnZenithTrainer, InstanceMethods])
def test_a_projects_run_is_resumed_with_its_history(tmp_path: Path, trainer: Any) -> None:
    whole = trace_of(trainer(project_cfg(tmp_path / "whole", "AdamW", True, False, "none")))
    cfg = project_cfg(tmp_path / "parts", "AdamW", True, False, "none")
    cfg.SOLVER.MAX_ITER = 12
    trace_of(trainer(cfg))
    cfg.SOLVER.MAX_ITER = ITERATIONS
    resumed = trainer(cfg)
    resumed.resume_or_load(resume=True)
    for _ in range(12):  # these batches start anew
        next(resumed._trainer._data_loader_iter)
    assert trace_of(resumed).lrs == pytest.approx(whole.lrs[12:], rel=1e-6)


# ---- what SOLVER.OPTIMIZER and the keys mean


@pytest.mark.parametrize("place", ["before", "inside", "among"])
def test_the_key_leaves_a_projects_optimizer_without_zenith(tmp_path: Path, place: str) -> None:
    cfg = project_cfg(tmp_path, "AdamW", True, False, "none")
    cfg.SOLVER.ZENITH.OVER_OWN_OPTIMIZER = False
    with log_lines("zenith_det") as lines:
        trainer = trainer_class(place, True, False, "none")(cfg)
        trainer.train()
    assert zenith_of(trainer.optimizer) is None
    assert [line for line in lines if "OVER_OWN_OPTIMIZER is False: AdamW trains without ZENITH" in line]
    assert "zenith/ratio" not in metrics(tmp_path)[-1]


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_without_a_build_optimizer_the_name_is_ours_and_baselines_stay_without(
    tmp_path: Path, name: str
) -> None:
    cfg = known_cfg(tmp_path, MAX_ITER=3, OPTIMIZER=name)
    trainer = trainer_class("before", False, False, "none")(cfg)
    trainer.train()
    assert type(trainer.optimizer).__name__ == name
    assert zenith_of(trainer.optimizer) is None


@pytest.mark.parametrize("place", ["before", "inside", "among"])
@pytest.mark.parametrize("name", ["ZENITH", "ZENITHAdamW"])
def test_a_name_of_ours_that_the_project_does_not_know_is_told(tmp_path: Path, place: str, name: str) -> None:
    cfg = project_cfg(tmp_path, "AdamW", True, False, "none")
    cfg.SOLVER.OPTIMIZER = name
    with pytest.raises(ConfigError, match=f"SOLVER.OPTIMIZER {name} is not known to Trainer.build_optimizer"):
        trainer_class(place, True, False, "none")(cfg)


class OnlySGD(Data, ZenithTrainerMixin, DefaultTrainer):
    @classmethod
    def build_optimizer(cls, cfg: Any, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(own_groups(cfg, model), cfg.SOLVER.BASE_LR)


@pytest.mark.parametrize(("trainer", "told"), [(OnlySGD, 1), (StaticMethods, 0)])
def test_an_update_that_was_asked_for_and_is_not_made_is_told(
    tmp_path: Path, trainer: Any, told: int
) -> None:
    with log_lines("zenith_det") as lines:
        trainer(known_cfg(tmp_path, OPTIMIZER="ZENITHAdamW"))
    assert sum("SOLVER.OPTIMIZER ZENITHAdamW has no part in it" in line for line in lines) == told


def test_settings_reach_the_ratio_and_what_cannot_be_is_refused(tmp_path: Path) -> None:
    cfg = project_cfg(tmp_path, "SGD", True, False, "none")
    cfg.SOLVER.ZENITH.MIN_RATIO = 0.25
    cfg.SOLVER.ZENITH.RECORD_AFTER = 3
    cfg.SOLVER.ZENITH.HALF_LIFE = 400
    trainer = trainer_class("inside", True, False, "none")
    ratio = zenith_of(trainer(cfg).optimizer)
    assert isinstance(ratio, ZenithRatio)
    assert (ratio._history.window, ratio._history.min_ratio, ratio._history.record_after) == (WINDOW, 0.25, 3)
    assert ratio._history.half_life == 400
    cfg.SOLVER.ZENITH.NORM_SOURCE = "momentum"
    with pytest.raises(ConfigError, match="NORM_SOURCE is 'momentum': over the project's own SGD"):
        trainer(cfg)


def test_keys_that_were_not_added_are_missed_by_every_shape(tmp_path: Path) -> None:
    from detectron2.config import get_cfg

    cfg = get_cfg()
    cfg.SOLVER.OPTIMIZER = "SGD"  # the project's own key
    for place in ("before", "inside", "among"):
        with pytest.raises(ConfigError, match=r"call zenith_det\.config\.add_zenith_config"):
            trainer_class(place, True, False, "none").build_optimizer(cfg, nn.Linear(2, 2))


# ---- schedules


@pytest.mark.parametrize("place", ["before", "inside", "among"])
def test_a_projects_schedule_that_lowers_the_lr_is_told_once(tmp_path: Path, place: str) -> None:
    class Decays(OwnSchedule):
        @classmethod
        def build_lr_scheduler(cls, cfg: Any, optimizer: torch.optim.Optimizer) -> LambdaLR:
            return LambdaLR(optimizer, lambda iteration: 0.99**iteration)

    bases = {
        "before": (Data, ZenithTrainerMixin, type("Project", (Decays, DefaultTrainer), {})),
        "inside": (Data, ZenithTrainerMixin, DefaultTrainer),
        "among": (Decays, Data, ZenithTrainerMixin, DefaultTrainer),
    }[place]
    methods = {"build_lr_scheduler": vars(Decays)["build_lr_scheduler"]} if place == "inside" else {}
    with log_lines("zenith_det") as lines:
        trainer = type("Trainer", bases, methods)(project_cfg(tmp_path, "SGD", False, True, "none"))
        before = trainer.optimizer.param_groups[0]["lr"]
        trainer.train()
    assert (
        sum("SOLVER.LR_SCHEDULER_NAME Own (LambdaLR) lowers the LR over the run" in line for line in lines)
        == 1
    )
    assert before == 0.01


@pytest.mark.parametrize("name", ["WarmupZenithLR", "WarmupConstantLR"])
@pytest.mark.parametrize("place", ["before", "inside", "among"])
def test_our_schedules_never_reach_the_project(tmp_path: Path, place: str, name: str) -> None:
    cfg = project_cfg(tmp_path, "SGD", True, True, "none")
    cfg.SOLVER.LR_SCHEDULER_NAME = name
    assert type(trainer_class(place, True, True, "none")(cfg).scheduler).__name__ == "MultiplierLR"


@pytest.mark.parametrize("place", ["before", "inside", "among"])
def test_detectron2s_names_and_unknown_ones_are_the_projects(tmp_path: Path, place: str) -> None:
    cfg = project_cfg(tmp_path, "SGD", True, True, "none")
    for name in ("WarmupMultiStepLR", "WarmupPolyLR"):
        cfg.SOLVER.LR_SCHEDULER_NAME = name
        with pytest.raises(ValueError, match=f"Unknown LR scheduler: {name}"):  # the project's own words
            trainer_class(place, True, True, "none")(cfg)
