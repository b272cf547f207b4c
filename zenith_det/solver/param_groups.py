"""Parameter groups by Detectron2's rules: norm layers have their own weight decay, biases an LR."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from zenith_det.errors import ConfigError

# Detectron2's list (``detectron2/solver/build.py``). A FrozenBN has no parameters, only buffers.
_NORM_LAYERS = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    nn.GroupNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
    nn.LayerNorm,
    nn.LocalResponseNorm,
)


def get_param_groups(
    cfg: Any,
    model: nn.Module,
    *,
    lr_factor_func: Callable[[str], float] | None = None,
    overrides: Mapping[str, Mapping[str, float]] | None = None,
) -> list[dict[str, Any]]:
    """Return the model's trainable parameters in the groups that Detectron2 would train them in.

    Args:
        cfg: ``SOLVER``'s ``BASE_LR``, ``WEIGHT_DECAY_NORM``, ``BIAS_LR_FACTOR`` and ``WEIGHT_DECAY_BIAS`` are
            read. A group without ``"weight_decay"`` takes the optimizer's, which is ``WEIGHT_DECAY``.
        lr_factor_func: the LR factor of a parameter, by its full name (layer-wise decay).
        overrides: values for all parameters whose own name (``"bias"``, ``"weight"``) is the key; they come
            last.

    Returns:
        Groups for any ``torch.optim.Optimizer``, as few as there are different settings, each with
        ``"params"``, their full names under ``"param_names"`` and its settings.

    Raises:
        ConfigError: no parameter is trainable.
        ValueError: ``overrides`` has ``"bias"`` and the config sets biases apart too.
    """
    solver = cfg.SOLVER
    by_name = {name: dict(settings) for name, settings in (overrides or {}).items()}
    bias: dict[str, float] = {}
    if solver.BIAS_LR_FACTOR != 1.0:
        bias["lr"] = solver.BASE_LR * solver.BIAS_LR_FACTOR
    if solver.WEIGHT_DECAY_BIAS is not None:
        bias["weight_decay"] = solver.WEIGHT_DECAY_BIAS
    if bias and "bias" in by_name:
        raise ValueError("overrides has 'bias', and so have SOLVER.BIAS_LR_FACTOR or WEIGHT_DECAY_BIAS")
    if bias:
        by_name["bias"] = bias

    groups: dict[tuple[tuple[str, float], ...], dict[str, Any]] = {}
    seen: set[nn.Parameter] = set()
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or parameter in seen:
                continue
            seen.add(parameter)
            full_name = f"{module_name}.{name}" if module_name else name
            settings: dict[str, float] = {"lr": solver.BASE_LR}
            if isinstance(module, _NORM_LAYERS) and solver.WEIGHT_DECAY_NORM is not None:
                settings["weight_decay"] = solver.WEIGHT_DECAY_NORM
            if lr_factor_func is not None:
                settings["lr"] *= lr_factor_func(full_name)
            settings.update(by_name.get(name, {}))
            group = groups.setdefault(tuple(settings.items()), {"params": [], "param_names": [], **settings})
            group["params"].append(parameter)
            group["param_names"].append(full_name)
    if not groups:
        raise ConfigError(
            "the model has no trainable parameter: lower MODEL.BACKBONE.FREEZE_AT, or unfreeze some"
        )
    return list(groups.values())


def parameters_of(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Return every parameter of every group."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
