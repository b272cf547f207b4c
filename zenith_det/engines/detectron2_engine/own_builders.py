"""A project's own ``build_optimizer`` and ``build_lr_scheduler`` beside the mix-in: what they build gets ZENITH."""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Callable
from typing import Any

import torch
from detectron2.engine import DefaultTrainer, TrainerBase
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from torch.optim import Optimizer

from zenith_det.config.old_names import moved_value
from zenith_det.config.optimizer_names import ZENITH_OPTIMIZERS
from zenith_det.errors import ConfigError
from zenith_det.optim import ZenithRatio, zenith_of
from zenith_det.solver import tell_of_decay
from zenith_det.solver.lr_schedules import DETECTRON2_SCHEDULES
from zenith_det.solver.registry import LR_SCHEDULER_REGISTRY

logger = logging.getLogger(__name__)

Build = Callable[..., Any]

# Optimizers that were looked at: each is decided on once, and told of once.
_decided: weakref.WeakSet[Any] = weakref.WeakSet()


def require_zenith_keys(cfg: Any) -> None:
    """
    Raises:
        ConfigError: ``cfg`` lacks the keys of :func:`zenith_det.config.add_zenith_config`.
    """
    if "ZENITH" not in cfg.SOLVER or "OPTIMIZER" not in cfg.SOLVER:
        raise ConfigError(
            "SOLVER.ZENITH is missing: call zenith_det.config.add_zenith_config(cfg) after get_cfg()"
        )


def show_log_lines(cfg: Any) -> None:
    """Let this toolkit's lines be seen where nobody has seen to it."""
    if not logging.getLogger("zenith_det").isEnabledFor(logging.INFO):
        # Detectron2's default_setup gives handlers to its own and fvcore's loggers alone.
        setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="zenith_det")


def check_bases(trainer: type, mixin: type) -> None:
    """
    Raises:
        ConfigError: ``mixin`` comes after Detectron2's trainer, whose methods would win over it.
    """
    order = trainer.__mro__
    if TrainerBase not in order or order.index(TrainerBase) > order.index(mixin):
        return
    name, bases = trainer.__name__, [base.__name__ for base in trainer.__bases__ if base is not mixin]
    first = f"write class {name}({', '.join([mixin.__name__, *bases])})"
    if mixin not in trainer.__bases__:
        culprit = next(base for base in trainer.__bases__ if issubclass(base, mixin))
        first = f"put {culprit.__name__} before the other bases"
    raise ConfigError(
        f"class {name}: {mixin.__name__} comes after Detectron2's trainer, whose methods would win over it: {first}"
    )


def has_own(trainer: type, mixin: type, method: str) -> bool:
    """Whether a class behind ``mixin`` other than Detectron2's trainer defines ``method``."""
    behind = trainer.__mro__[trainer.__mro__.index(mixin) + 1 :]
    owner = next((base for base in behind if method in vars(base)), None)
    return owner is not None and owner is not DefaultTrainer


def wrap_builders(trainer: type, mixin: type) -> None:
    """Let ``mixin`` have its say on what a class before it in ``trainer``'s bases, or ``trainer`` itself, builds."""
    for name, around in (
        ("build_optimizer", _around_optimizer),
        ("build_lr_scheduler", _around_lr_scheduler),
    ):
        owner = next(base for base in trainer.__mro__ if name in vars(base))
        method = vars(owner)[name]
        if owner is mixin or isinstance(method, _Builder):
            continue
        if owner is not trainer:
            method = _Inherited(trainer, name)
        setattr(trainer, name, _Builder(method, functools.partial(around, getattr(mixin, name).__func__)))


class _Builder:
    """A method, of whatever kind it is, with ``around(trainer, method, args, kwargs)`` in its place."""

    def __init__(self, method: Any, around: Callable[..., Any]) -> None:
        self._method = method
        self._around = around

    def __get__(self, instance: Any, owner: type) -> Build:
        build: Build = self._method.__get__(instance, owner)

        @functools.wraps(build)
        def built(*args: Any, **kwargs: Any) -> Any:
            return self._around(owner, build, args, kwargs)

        return built


class _Inherited:
    """The method of that name that ``trainer`` inherits."""

    def __init__(self, trainer: type, name: str) -> None:
        self._trainer = trainer
        self._name = name

    def __get__(self, instance: Any, owner: type) -> Build:
        inherited: Build = getattr(super(self._trainer, owner if instance is None else instance), self._name)
        return inherited


def _around_optimizer(ours: Build, trainer: type, build: Build, args: Any, kwargs: Any) -> Any:
    cfg = _argument("cfg", args, kwargs)
    if cfg is None or "SOLVER" not in cfg:
        return build(*args, **kwargs)
    return build_projects_optimizer(cfg, trainer, functools.partial(build, *args, **kwargs))


def _around_lr_scheduler(ours: Build, trainer: type, build: Build, args: Any, kwargs: Any) -> Any:
    cfg, optimizer = _argument("cfg", args, kwargs), _argument("optimizer", args[1:], kwargs)
    if cfg is None or optimizer is None or "SOLVER" not in cfg:
        return build(*args, **kwargs)
    require_zenith_keys(cfg)
    if is_our_schedule(cfg):
        return ours(trainer, cfg, optimizer)
    scheduler = build(*args, **kwargs)
    tell_of_decay(cfg, scheduler, optimizer)
    return scheduler


def _argument(name: str, args: Any, kwargs: Any) -> Any:
    return kwargs.get(name, args[0] if args else None)


def is_our_schedule(cfg: Any) -> bool:
    """Whether ``SOLVER.LR_SCHEDULER_NAME`` is in this toolkit's registry and none of Detectron2's."""
    name = cfg.SOLVER.LR_SCHEDULER_NAME
    return name in LR_SCHEDULER_REGISTRY and name not in DETECTRON2_SCHEDULES


def build_projects_optimizer(cfg: Any, trainer: type, build: Callable[[], Any]) -> Any:
    """Build a project's own optimizer, and put ZENITH's ratio over it.

    Raises:
        ConfigError: see :func:`put_zenith_over`; or the project doesn't know the name in ``SOLVER.OPTIMIZER``, and it
            is one of ours.
    """
    require_zenith_keys(cfg)
    show_log_lines(cfg)  # an __init__ of the project's own may go past the mix-in's
    name = cfg.SOLVER.OPTIMIZER
    try:
        optimizer = build()
    except (NotImplementedError, ValueError, KeyError, AssertionError) as error:
        if name not in ZENITH_OPTIMIZERS or isinstance(error, ConfigError) or name not in str(error):
            raise
        raise ConfigError(
            f"SOLVER.OPTIMIZER {name} is not known to {trainer.__name__}.build_optimizer, the project's own "
            f"({' '.join(str(error).split())}): give a name that it knows; ZENITH's ratio goes over what it builds"
        ) from error
    put_zenith_over(cfg, trainer, optimizer)
    return optimizer


def put_zenith_over(cfg: Any, trainer: type, optimizer: Any) -> None:
    """Put ZENITH's ratio over a project's optimizer, as ``SOLVER.ZENITH`` says, and say so; nothing for a ZENITH.

    Raises:
        ConfigError: the optimizer has no LR to multiply, or ``SOLVER.ZENITH.NORM_SOURCE`` isn't "gradient".
    """
    if zenith_of(optimizer) is not None:
        return
    settings, kind = cfg.SOLVER.ZENITH, type(optimizer).__name__
    if not isinstance(optimizer, Optimizer):
        logger.warning(
            "%s.build_optimizer made a %s, which is no torch optimizer: it trains without ZENITH",
            trainer.__name__,
            kind,
        )
        return
    if not settings.OVER_OWN_OPTIMIZER:
        if optimizer not in _decided:
            logger.info(
                "SOLVER.ZENITH.OVER_OWN_OPTIMIZER is False: %s trains without ZENITH, as the project has it",
                kind,
            )
        leave_as_it_is(optimizer)
        return
    if settings.NORM_SOURCE != "gradient":
        raise ConfigError(
            f"SOLVER.ZENITH.NORM_SOURCE is {settings.NORM_SOURCE!r}: over the project's own {kind} it can only be "
            "'gradient'"
        )
    try:
        ZenithRatio(
            optimizer,
            window=settings.WINDOW,
            min_ratio=settings.MIN_RATIO,
            record_after=settings.RECORD_AFTER,
            half_life=settings.HALF_LIFE,
            max_nonfinite_steps=moved_value(cfg, "SOLVER.MAX_NONFINITE_STEPS"),
        )
    except TypeError as error:
        raise ConfigError(f"{error}: SOLVER.ZENITH.OVER_OWN_OPTIMIZER False trains without it") from error
    logger.info(
        "ZENITH's LR ratio is over the project's own optimizer: %s, with its %d parameter groups as they are "
        "(SOLVER.ZENITH.OVER_OWN_OPTIMIZER False trains without it)",
        kind,
        len(optimizer.param_groups),
    )
    if cfg.SOLVER.OPTIMIZER == "ZENITHAdamW" and not isinstance(
        optimizer, torch.optim.Adam | torch.optim.AdamW
    ):
        logger.warning(
            "SOLVER.OPTIMIZER ZENITHAdamW has no part in it: %s.build_optimizer is the project's own",
            trainer.__name__,
        )


def leave_as_it_is(optimizer: Optimizer) -> None:
    """Note that ``optimizer`` is without ZENITH because the configuration wants it so."""
    _decided.add(optimizer)


def put_zenith_over_the_rest(trainer: Any) -> None:
    """Put ZENITH over an optimizer that ``trainer`` has made past ``build_optimizer``, and tell of its schedule."""
    optimizer, scheduler = getattr(trainer, "optimizer", None), getattr(trainer, "scheduler", None)
    if optimizer is None:
        return
    show_log_lines(trainer.cfg)
    if optimizer not in _decided:
        put_zenith_over(trainer.cfg, type(trainer), optimizer)
    if scheduler is not None:
        tell_of_decay(trainer.cfg, scheduler, optimizer)
