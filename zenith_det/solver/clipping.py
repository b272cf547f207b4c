"""Gradient clipping as ``SOLVER.CLIP_GRADIENTS`` asks for it, in front of any optimizer's step."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

from zenith_det.errors import ConfigError
from zenith_det.solver.param_groups import parameters_of

Clipper = Callable[[Iterable[torch.Tensor]], None]
OptimizerT = TypeVar("OptimizerT", bound=torch.optim.Optimizer)


def make_clipper(cfg: Any) -> Clipper | None:
    """Return a function that clips the gradients of the parameters it is given, or ``None``: clipping is off.

    ``CLIP_TYPE`` "value" bounds each element, "norm" the norm of each parameter's gradient (both as in
    Detectron2), "full_model" the norm over all of them. ``NORM_TYPE`` is the p of the norm.

    Raises:
        ConfigError: another ``CLIP_TYPE``.
    """
    clip = cfg.SOLVER.CLIP_GRADIENTS
    if not clip.ENABLED:
        return None
    limit, norm_type = float(clip.CLIP_VALUE), float(clip.NORM_TYPE)

    def by_value(parameters: Iterable[torch.Tensor]) -> None:
        with_gradient = [parameter for parameter in parameters if parameter.grad is not None]
        if with_gradient:  # torch raises on none
            clip_grad_value_(with_gradient, limit)

    def by_norm(parameters: Iterable[torch.Tensor]) -> None:
        for parameter in parameters:
            clip_grad_norm_(parameter, limit, norm_type)

    def full_model(parameters: Iterable[torch.Tensor]) -> None:
        clip_grad_norm_(list(parameters), limit, norm_type)

    clippers: dict[str, Clipper] = {"value": by_value, "norm": by_norm, "full_model": full_model}
    if clip.CLIP_TYPE not in clippers:
        names = ", ".join(clippers)
        raise ConfigError(f"SOLVER.CLIP_GRADIENTS.CLIP_TYPE {clip.CLIP_TYPE!r} is not one of {names}")
    return clippers[clip.CLIP_TYPE]


def add_gradient_clipping(cfg: Any, optimizer: OptimizerT) -> OptimizerT:
    """Clip before each step of ``optimizer``, if ``SOLVER.CLIP_GRADIENTS.ENABLED``; return the same object.

    The optimizer keeps its class, its state and what its ``step`` returns. With a closure, the gradients that
    the closure leaves are the ones that are clipped. An optimizer that measures the gradient norm, as ZENITH
    does, measures it before.
    """
    clipper = make_clipper(cfg)
    if clipper is None:
        return optimizer

    def clip() -> None:
        if callable(record := getattr(optimizer, "record_norm", None)):
            record()
        clipper(parameters_of(optimizer))

    def clip_before_step(
        optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        closure = kwargs.get("closure") or (args[1] if len(args) > 1 else None)  # args[0] is the optimizer
        if closure is None:
            clip()
            return None

        def clipping_closure() -> Any:
            loss = closure()
            with torch.no_grad():
                clip()
            return loss

        return args[:1], {**kwargs, "closure": clipping_closure}

    optimizer.register_step_pre_hook(clip_before_step)
    return optimizer
