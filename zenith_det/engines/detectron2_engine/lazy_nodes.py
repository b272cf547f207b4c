"""ZENITH for Detectron2's LazyConfig."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from detectron2.config import LazyCall
from detectron2.solver.build import get_default_optimizer_params
from detectron2.utils.registry import _convert_target_to_string, locate
from fvcore.common.param_scheduler import ConstantParamScheduler, LinearParamScheduler, ParamScheduler

from zenith_det.optim import ZENITH, ZENITHAdamW, ZenithRatio


class WarmupThenConstant(ParamScheduler):
    """The multiplier of ``WarmupZenithLR``: up to 1 in ``warmup_iters`` iterations, then 1 to the end.

    Defined at progress 1 as well, where Detectron2 asks once more before it writes the final checkpoint.

    Args:
        max_iter: the length of the run, which turns progress into iterations; the LR does not depend on it.
        warmup_iters: iterations of warm-up; 0: none.
        warmup_factor: what it starts from.
        warmup_method: "linear" or "constant".

    Raises:
        ValueError: an argument out of its range.
    """

    def __init__(
        self,
        max_iter: int,
        warmup_iters: int = 1000,
        warmup_factor: float = 0.001,
        warmup_method: str = "linear",
    ) -> None:
        if max_iter < 1:
            raise ValueError(f"max_iter is {max_iter}: it must be 1 or more")
        if warmup_iters < 0:
            raise ValueError(f"warmup_iters is {warmup_iters}: it must be 0 or more")
        if warmup_method not in ("linear", "constant"):
            raise ValueError(f"warmup_method is {warmup_method!r}: it must be 'linear' or 'constant'")
        self._max_iter = max_iter
        self._warmup_iters = warmup_iters
        linear = warmup_method == "linear"
        self._warmup = (
            LinearParamScheduler(warmup_factor, 1.0) if linear else ConstantParamScheduler(warmup_factor)
        )

    def __call__(self, where: float) -> float:
        # Detectron2 divides the iteration by max_iter; the rounding undoes it exactly.
        iteration = round(where * self._max_iter)
        return self._warmup(iteration / self._warmup_iters) if iteration < self._warmup_iters else 1.0


def make_optimizer() -> Any:
    """A new ``optimizer`` node: ZENITH with the settings of this toolkit's detection configs."""
    return LazyCall(ZENITH)(
        params=_params(),
        lr=0.02,
        momentum=0.9,
        weight_decay=1e-4,
        window=100,
    )


def make_adamw() -> Any:
    """A new ``adamw`` node: ZENITHAdamW with the settings of Detectron2's own AdamW node."""
    return LazyCall(ZENITHAdamW)(params=_params(), lr=1e-4, betas=(0.9, 0.999), weight_decay=0.1, window=100)


def _params() -> Any:
    # params.model is set by the training script, as for Detectron2's own nodes. What works on a group's LR
    # (lr_factor_func of ViTDet and detrex, bias_lr_factor) starts from base_lr.
    return LazyCall(get_default_optimizer_params)(base_lr="${..lr}", weight_decay_norm=0.0)


def zenith_over(node: Any, **options: Any) -> Any:
    """A node that makes the optimizer of ``node``, of any class, with ZENITH's ratio over it.

    Args:
        node: an optimizer's node, of Detectron2, detrex or a project; it stays as it is.
        options: of :class:`~zenith_det.optim.ZenithRatio`: ``window``, ``min_ratio``, ...

    Returns:
        A node with the arguments of ``node``, so that ``params.model``, ``lr`` and the rest are set as before, and
        the options as ``zenith``.

    Raises:
        ValueError: ``node`` names no class to call, or makes a ZENITH already.
    """
    target = node.get("_target_") if isinstance(node, Mapping) else None
    if target is None:
        raise ValueError(f"zenith_over takes the node of an optimizer (LazyCall(...)(...)), got {node!r}")
    if not isinstance(target, str):
        target = _convert_target_to_string(target)
    if locate(target) in (ZENITH, ZENITHAdamW, with_ratio):
        raise ValueError(f"{target} has ZENITH's ratio already: leave out zenith_over")
    over = copy.deepcopy(node)
    over._target_ = f"{with_ratio.__module__}.{with_ratio.__qualname__}"
    over.optimizer_class = target
    over.zenith = {"window": 100, **options}
    return over


def with_ratio(*, optimizer_class: str, zenith: Mapping[str, Any], **arguments: Any) -> Any:
    """Makes an optimizer and puts :class:`~zenith_det.optim.ZenithRatio` over it."""
    optimizer = locate(optimizer_class)(**arguments)
    ZenithRatio(optimizer, **zenith)
    return optimizer


def make_lr_multiplier() -> Any:
    """A new ``lr_multiplier`` node: warm-up, then constant. It takes its length from ``train.max_iter``."""
    return LazyCall(WarmupThenConstant)(
        max_iter="${train.max_iter}", warmup_iters=1000, warmup_factor=0.001, warmup_method="linear"
    )
