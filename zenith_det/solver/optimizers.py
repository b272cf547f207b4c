"""The optimizers that ``SOLVER.OPTIMIZER`` can name, and what a training loop asks any of them."""

from __future__ import annotations

import importlib
import math
from typing import Any

import torch
from torch import nn

from zenith_det.config.old_names import moved_value
from zenith_det.errors import ConfigError
from zenith_det.optim import ZENITH as ZenithOptimizer
from zenith_det.optim import ZENITHAdamW as ZenithAdamWOptimizer
from zenith_det.optim import accept_other_states, zenith_of
from zenith_det.solver.clipping import add_gradient_clipping, make_clipper
from zenith_det.solver.param_groups import get_param_groups
from zenith_det.solver.registry import OPTIMIZER_REGISTRY

# Entries carry the name that a config gives them, hence the capitals.


def build_optimizer(cfg: Any, model: nn.Module) -> torch.optim.Optimizer:
    """Return the optimizer that ``SOLVER.OPTIMIZER`` names, over the model's trainable parameters.

    Args:
        cfg: this toolkit's configuration, or Detectron2's after ``add_zenith_config``.

    Raises:
        ConfigError: an unknown name, a library that is missing, or values that the optimizer can't take.
    """
    optimizer: torch.optim.Optimizer = OPTIMIZER_REGISTRY.get(cfg.SOLVER.OPTIMIZER)(cfg, model)
    accept_other_states(optimizer)
    return optimizer


@OPTIMIZER_REGISTRY.register()
def ZENITH(cfg: Any, model: nn.Module) -> ZenithOptimizer:
    """SGD whose LR follows the gradient norm's history; ``SOLVER.ZENITH`` has its settings."""
    solver = cfg.SOLVER
    return _make_zenith(cfg, model, ZenithOptimizer, momentum=solver.MOMENTUM, nesterov=solver.NESTEROV)


@OPTIMIZER_REGISTRY.register()
def ZENITHAdamW(cfg: Any, model: nn.Module) -> ZenithAdamWOptimizer:
    """AdamW whose LR follows the gradient norm's history; ``SOLVER.ZENITH`` and ``SOLVER.ADAMW`` have its
    settings."""
    settings = cfg.SOLVER.ADAMW
    return _make_zenith(cfg, model, ZenithAdamWOptimizer, betas=tuple(settings.BETAS), eps=settings.EPS)


@OPTIMIZER_REGISTRY.register()
def SGD(cfg: Any, model: nn.Module) -> torch.optim.SGD:
    """``torch.optim.SGD`` with the arguments that Detectron2 gives it: the same steps, bit for bit."""
    solver = cfg.SOLVER
    optimizer = _make(
        cfg, model, torch.optim.SGD, momentum=solver.MOMENTUM, nesterov=solver.NESTEROV, foreach=True
    )
    return add_gradient_clipping(cfg, optimizer)


@OPTIMIZER_REGISTRY.register()
def AdamW(cfg: Any, model: nn.Module) -> torch.optim.AdamW:
    """``torch.optim.AdamW``; ``SOLVER.ADAMW`` has its settings."""
    settings = cfg.SOLVER.ADAMW
    optimizer = _make(cfg, model, torch.optim.AdamW, betas=tuple(settings.BETAS), eps=settings.EPS)
    return add_gradient_clipping(cfg, optimizer)


@OPTIMIZER_REGISTRY.register()
def ScheduleFreeSGD(cfg: Any, model: nn.Module) -> torch.optim.Optimizer:
    """Schedule-Free SGD (arXiv 2405.15682), in training mode; see :func:`eval_mode`.

    ``SOLVER.MOMENTUM`` is its interpolation factor. The warm-up is the LR schedule's, which Schedule-Free
    weighs its average by just as it would its own.
    """
    schedulefree = _library("schedulefree", "ScheduleFreeSGD")
    optimizer = _make(cfg, model, schedulefree.SGDScheduleFree, momentum=cfg.SOLVER.MOMENTUM)
    train_mode(optimizer)
    return add_gradient_clipping(cfg, optimizer)


@OPTIMIZER_REGISTRY.register()
def Prodigy(cfg: Any, model: nn.Module) -> torch.optim.Optimizer:
    """Prodigy (arXiv 2306.06101); ``SOLVER.PRODIGY`` has its settings and ``BASE_LR`` should be 1."""
    _refuse_several_lrs(cfg, "Prodigy")
    settings = cfg.SOLVER.PRODIGY
    optimizer = _make(
        cfg,
        model,
        _library("prodigyopt", "Prodigy").Prodigy,
        betas=tuple(settings.BETAS),
        d_coef=settings.D_COEF,
        safeguard_warmup=settings.SAFEGUARD_WARMUP,
        use_bias_correction=settings.USE_BIAS_CORRECTION,
    )
    return add_gradient_clipping(cfg, optimizer)


@OPTIMIZER_REGISTRY.register()
def DAdaptSGD(cfg: Any, model: nn.Module) -> torch.optim.Optimizer:
    """SGD with D-Adaptation (arXiv 2301.07733); ``BASE_LR`` should be 1."""
    _refuse_several_lrs(cfg, "DAdaptSGD")
    library = _library("pytorch_optimizer", "DAdaptSGD")
    return add_gradient_clipping(cfg, _make(cfg, model, library.DAdaptSGD, momentum=cfg.SOLVER.MOMENTUM))


def train_mode(optimizer: torch.optim.Optimizer) -> None:
    """Put the model's parameters where ``step()`` needs them: after evaluation, a checkpoint, or loading one.

    Only Schedule-Free has such modes; for every other optimizer this does nothing.
    """
    _switch(optimizer, "train")


def eval_mode(optimizer: torch.optim.Optimizer) -> None:
    """Put the model's parameters where they are worth evaluating and saving.

    Only Schedule-Free has such modes (its averaged weights); for every other optimizer this does nothing. A
    BatchNorm that trains keeps the statistics of the training weights.
    """
    _switch(optimizer, "eval")


def effective_lrs(optimizer: torch.optim.Optimizer) -> list[float]:
    """Return, for each group, the LR that updates are made with; for logs, as it may wait for the device.

    Under ZENITH that is the scheduled LR times the ratio; under Prodigy and D-Adaptation ``d * lr`` with their own
    factors (the estimate after the step, so the LR of the next one); under Schedule-Free with its warm-up; else the
    group's LR.
    """
    if (zenith := zenith_of(optimizer)) is not None:
        return zenith.effective_lrs()
    return [_group_lr(group) for group in optimizer.param_groups]


def _group_lr(group: dict[str, Any]) -> float:
    if "scheduled_lr" in group:
        # Schedule-Free, set at each step. Before the first it is 0, as its warm-up starts.
        return float(group["scheduled_lr"])
    lr = float(group["lr"])
    if "d" not in group:
        return lr
    lr *= float(group["d"])
    if "g0_norm" in group:  # D-Adapted SGD divides by the first gradient's norm
        first_norm = float(group["g0_norm"])
        return lr / first_norm if first_norm > 0 else lr
    if group.get("use_bias_correction"):
        # Prodigy, at the step just taken (it has already counted it).
        step = max(int(group.get("k", 0)), 1)
        beta1, beta2 = group["betas"]
        lr *= math.sqrt(1 - beta2**step) / (1 - beta1**step)
    return lr


def _make_zenith(cfg: Any, model: nn.Module, optimizer_class: Any, **settings: Any) -> Any:
    clip, zenith = cfg.SOLVER.CLIP_GRADIENTS, cfg.SOLVER.ZENITH
    full_model = clip.CLIP_TYPE == "full_model" and clip.NORM_TYPE == 2.0
    clipper = make_clipper(cfg)
    optimizer = _make(
        cfg,
        model,
        optimizer_class,
        window=zenith.WINDOW,
        min_ratio=zenith.MIN_RATIO,
        record_after=zenith.RECORD_AFTER,
        half_life=zenith.HALF_LIFE,
        norm_source=zenith.NORM_SOURCE,
        max_nonfinite_steps=moved_value(cfg, "SOLVER.MAX_NONFINITE_STEPS"),
        # Either way ZENITH records the norm first, so that clipping doesn't change the LR.
        max_norm=clip.CLIP_VALUE if clipper and full_model else None,
        clip=None if full_model else clipper,
        **settings,
    )
    # No loop over it clips itself: GradScaler may leave gradients scaled, and doesn't make the host wait.
    optimizer._step_supports_amp_scaling = True
    return optimizer


def _make(cfg: Any, model: nn.Module, optimizer_class: Any, **settings: Any) -> Any:
    groups = get_param_groups(cfg, model)
    try:
        return optimizer_class(
            groups, lr=cfg.SOLVER.BASE_LR, weight_decay=cfg.SOLVER.WEIGHT_DECAY, **settings
        )
    except ValueError as error:
        raise ConfigError(
            f"SOLVER.OPTIMIZER {cfg.SOLVER.OPTIMIZER} can't take its settings: {error}"
        ) from None


def _library(name: str, optimizer: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"SOLVER.OPTIMIZER {optimizer} needs {name} ({error}): pip install {name}"
        ) from None


def _refuse_several_lrs(cfg: Any, optimizer: str) -> None:
    # Both estimate one step size for all groups and can't scale it for the biases.
    if cfg.SOLVER.BIAS_LR_FACTOR != 1.0:
        raise ConfigError(
            f"SOLVER.BIAS_LR_FACTOR is {cfg.SOLVER.BIAS_LR_FACTOR}: {optimizer} takes one LR only, so 1.0"
        )


def _switch(optimizer: torch.optim.Optimizer, mode: str) -> None:
    switch = getattr(optimizer, mode, None)
    if callable(switch):
        switch()
