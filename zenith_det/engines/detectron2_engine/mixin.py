"""ZENITH under a Detectron2 trainer that a project has already: the mix-in put before it."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from detectron2.engine import AMPTrainer, defaults
from detectron2.engine.train_loop import HookBase
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from torch import nn

from zenith_det.config.validation import validate_added_keys
from zenith_det.engines.detectron2_engine.accumulation import accumulated_step, check_accumulation
from zenith_det.engines.detectron2_engine.config import auto_scale_workers
from zenith_det.engines.detectron2_engine.endings import RunEnds
from zenith_det.engines.detectron2_engine.models import compute_as_configured
from zenith_det.engines.detectron2_engine.own_builders import (
    build_projects_optimizer,
    check_bases,
    has_own,
    is_our_schedule,
    leave_as_it_is,
    put_zenith_over_the_rest,
    require_zenith_keys,
    show_log_lines,
    wrap_builders,
)
from zenith_det.engines.detectron2_engine.own_trainer import ZenithHooks, tell_at_the_start
from zenith_det.engines.device import amp_dtype, make_grad_scaler, use_deterministic_algorithms
from zenith_det.engines.model_format import compile_backbone, use_channels_last
from zenith_det.errors import ConfigError
from zenith_det.optim import accept_other_states
from zenith_det.solver import build_lr_scheduler, build_optimizer, tell_of_decay
from zenith_det.training.processes.ddp import unwrap

logger = logging.getLogger(__name__)

# Detectron2's schedules that are its own to build under SGD. WarmupStepWithFixedGammaLR is not among them:
# Detectron2's raises at the last iteration, before the final checkpoint is written.
THEIRS_UNDER_SGD = ("WarmupMultiStepLR", "WarmupCosineLR")


class ZenithTrainerMixin:
    """Put before a Detectron2 trainer, it trains with what ``SOLVER.OPTIMIZER`` names::

        class Trainer(ZenithTrainerMixin, DefaultTrainer):
            ...

        cfg = get_cfg()
        add_zenith_config(cfg)

    It overrides

    * ``build_model``: under ``MODEL.CHANNELS_LAST`` alone,
    * ``build_optimizer``: from :data:`zenith_det.solver.OPTIMIZER_REGISTRY`; "SGD" is Detectron2's own,
    * ``build_lr_scheduler``: from :data:`~zenith_det.solver.LR_SCHEDULER_REGISTRY`; under "SGD",
      Detectron2's schedules are Detectron2's own,
    * ``register_hooks``: adds :class:`ZenithMetrics`, so that ``lr`` in the logs is the one used, and the hooks of
      :class:`ZenithHooks`: bad steps are left out and reported, a lost run goes back, and what ``SOLVER.AVERAGE``,
      ``TEST.EARLY_STOPPING``, ``CHECKPOINT`` and their like ask for is done; a warning names what can't be,
    * ``auto_scale_workers``: rescales this toolkit's iteration keys as well.

    Everything else is the base class's. With ``SOLVER.OPTIMIZER: SGD`` and Detectron2's schedule, training is
    the base class's training, bit for bit.

    **A project's own** ``build_optimizer``, in the class itself or in any of its bases, is called as it is, and
    :class:`~zenith_det.optim.ZenithRatio` goes over the optimizer that it makes, whatever ``SOLVER.OPTIMIZER`` says
    (it is the project's key then): class, groups, LRs and clipping stay the project's.
    ``SOLVER.ZENITH.OVER_OWN_OPTIMIZER: False`` leaves such an optimizer without ZENITH. A project's own
    ``build_lr_scheduler`` is called for every name that isn't this toolkit's.

    A trainer that clips gradients in ``optimizer.step`` keeps doing so; ZENITH measures the norm before. One
    that clips them between ``backward()`` and ``step()`` calls ``optimizer.record_norm()`` before it clips.

    Raises:
        ConfigError: ``cfg`` lacks the keys of :func:`zenith_det.config.add_zenith_config`, a key cannot be
            honoured, or the mix-in stands after the trainer among a class's bases.
    """

    _zenith_hooks: ZenithHooks | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        check_bases(cls, ZenithTrainerMixin)
        wrap_builders(cls, ZenithTrainerMixin)

    def __init__(self, cfg: Any, *args: Any, **kwargs: Any) -> None:
        require_zenith_keys(cfg)
        show_log_lines(cfg)
        # DefaultTrainer calls its own auto_scale_workers by name, past an override; after this it has
        # nothing left to do.
        cfg = self.auto_scale_workers(_on_a_device(cfg), comm.get_world_size())
        amp = cfg.SOLVER.AMP
        if amp.ENABLED and amp.DTYPE == "float16" and cfg.MODEL.DEVICE == "cpu":
            raise ConfigError(
                "SOLVER.AMP.ENABLED is True, and SOLVER.AMP.DTYPE float16 needs a GPU: take bfloat16 on the CPU"
            )
        with _ddp_on_the_models_device(), warnings.catch_warnings():
            # Detectron2's AMPTrainer makes a loss scaler by a deprecated name; it is replaced afterwards.
            warnings.filterwarnings("ignore", r".*torch\.cuda\.amp\.GradScaler")
            super().__init__(cfg, *args, **kwargs)  # type: ignore[call-arg]

    def register_hooks(self, hooks: list[HookBase | None]) -> None:
        """The base class's, and this mix-in's hooks where they belong among them.

        By then a project has all its parts, whatever its ``build_hooks`` is and however it makes them.
        """
        super().register_hooks(hooks)  # type: ignore[misc]
        if self._zenith_hooks is None and hasattr(self, "cfg") and hasattr(self, "_trainer"):
            self._finish_parts()
            self._zenith_hooks = ZenithHooks(self)
        if self._zenith_hooks is not None:
            self._zenith_hooks.place(self)

    def _finish_parts(self) -> None:
        """What the configuration asks of model and inner trainer."""
        cfg, inner = self.cfg, self._trainer  # type: ignore[attr-defined]
        model = unwrap(inner.model)
        validate_added_keys(cfg)
        check_accumulation(cfg, self)
        if isinstance(inner, AMPTrainer):
            inner.precision, inner.grad_scaler = amp_dtype(cfg), make_grad_scaler(cfg)
        use_channels_last(cfg, model)  # a project's own build_model may not have asked for it
        compile_backbone(cfg, model)
        if cfg.DETERMINISTIC:
            use_deterministic_algorithms(cfg)

    def before_train(self) -> None:
        """The base class's; before it ZENITH goes over an optimizer that the trainer has made past
        ``build_optimizer``, and the log says what there is to say once."""
        put_zenith_over_the_rest(self)
        tell_at_the_start(self)
        super().before_train()  # type: ignore[misc]

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """The base class's, which a hook may end early.

        Raises:
            TrainingDivergedError: ``RECOVERY.MAX_ROLLBACKS`` did not help.
        """
        try:
            return super().train(*args, **kwargs)  # type: ignore[misc]
        except RunEnds as end:
            if end.error is not None:
                raise end.error from None
        results = getattr(self, "_last_eval_results", None)
        if self.cfg.TEST.EXPECTED_RESULTS and comm.is_main_process():  # type: ignore[attr-defined]
            verify_results(self.cfg, results)  # type: ignore[attr-defined]
        return results

    @classmethod
    def build_model(cls, cfg: Any) -> nn.Module:
        """The base class's model; see :func:`compute_as_configured`."""
        model: nn.Module = super().build_model(_on_a_device(cfg))  # type: ignore[misc]
        compute_as_configured(cfg, model)
        return model

    @classmethod
    def build_optimizer(cls, cfg: Any, model: nn.Module) -> torch.optim.Optimizer:
        """A project's own optimizer under ZENITH's ratio; else the one that ``SOLVER.OPTIMIZER`` names, gradient
        clipping included.

        Raises:
            ConfigError: see :func:`zenith_det.solver.build_optimizer` and
                :func:`~zenith_det.engines.detectron2_engine.own_builders.put_zenith_over`.
        """
        require_zenith_keys(cfg)
        if has_own(cls, ZenithTrainerMixin, "build_optimizer"):
            projects: torch.optim.Optimizer = build_projects_optimizer(
                cfg,
                cls,
                lambda: super(ZenithTrainerMixin, cls).build_optimizer(cfg, model),  # type: ignore[misc]
            )
            accept_other_states(projects)
            return projects
        clip = cfg.SOLVER.CLIP_GRADIENTS
        # Detectron2 itself has no clipping of the whole model's norm.
        if cfg.SOLVER.OPTIMIZER == "SGD" and not (clip.ENABLED and clip.CLIP_TYPE == "full_model"):
            optimizer: torch.optim.Optimizer = super().build_optimizer(cfg, model)  # type: ignore[misc]
            accept_other_states(optimizer)
        else:
            optimizer = build_optimizer(cfg, model)
        leave_as_it_is(optimizer)
        return optimizer

    @classmethod
    def build_lr_scheduler(
        cls, cfg: Any, optimizer: torch.optim.Optimizer
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """The schedule that ``SOLVER.LR_SCHEDULER_NAME`` names.

        Names that aren't this toolkit's go to a project's own method, if there is one.

        Raises:
            ConfigError: see :func:`zenith_det.solver.build_lr_scheduler`.
        """
        require_zenith_keys(cfg)
        name = cfg.SOLVER.LR_SCHEDULER_NAME
        own = has_own(cls, ZenithTrainerMixin, "build_lr_scheduler")
        under_sgd = cfg.SOLVER.OPTIMIZER == "SGD" and name in THEIRS_UNDER_SGD
        if not is_our_schedule(cfg) and (own or under_sgd):
            scheduler: torch.optim.lr_scheduler.LRScheduler = super().build_lr_scheduler(  # type: ignore[misc]
                cfg, optimizer
            )
            tell_of_decay(cfg, scheduler, optimizer)
            return scheduler
        return build_lr_scheduler(cfg, optimizer)

    def run_step(self) -> None:
        """The base class's step; its batch in parts under ``SOLVER.GRADIENT_ACCUMULATION``."""
        parts = self.cfg.SOLVER.GRADIENT_ACCUMULATION  # type: ignore[attr-defined]
        # Detectron2's own AMP step wants CUDA; bfloat16 on the CPU takes the other one.
        amp_on_cpu = self.cfg.SOLVER.AMP.ENABLED and self.cfg.MODEL.DEVICE == "cpu"  # type: ignore[attr-defined]
        if parts == 1 and not amp_on_cpu:
            super().run_step()  # type: ignore[misc]
            return
        self._trainer.iter = self.iter  # type: ignore[attr-defined]
        accumulated_step(self._trainer, parts)  # type: ignore[attr-defined]

    @staticmethod
    def auto_scale_workers(cfg: Any, num_workers: int) -> Any:
        """See :func:`zenith_det.engines.detectron2_engine.config.auto_scale_workers`."""
        return auto_scale_workers(cfg, num_workers)


def _on_a_device(cfg: Any) -> Any:
    """``cfg``, or a copy where ``MODEL.DEVICE`` is "auto", which Detectron2 does not know."""
    if cfg.MODEL.DEVICE != "auto":
        return cfg
    copy = cfg.clone()
    copy.defrost()
    copy.MODEL.DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
    if cfg.is_frozen():
        copy.freeze()
    return copy


@contextlib.contextmanager
def _ddp_on_the_models_device() -> Iterator[None]:
    """Let Detectron2's trainer wrap a model on the CPU for several processes.

    ``create_ddp_model`` pins DDP to the GPU of the process's rank, which DDP refuses for such a model, and
    ``DefaultTrainer`` leaves no way to pass other arguments.
    """
    original = defaults.create_ddp_model

    def create(model: nn.Module, **kwargs: Any) -> nn.Module:
        if all(parameter.device.type == "cpu" for parameter in model.parameters()):
            kwargs.setdefault("device_ids", None)
        wrapped: nn.Module = original(model, **kwargs)
        return wrapped

    defaults.create_ddp_model = create
    try:
        yield
    finally:
        defaults.create_ddp_model = original
