"""The two registries that ``SOLVER.OPTIMIZER`` and ``SOLVER.LR_SCHEDULER_NAME`` are looked up in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fvcore.common.registry import Registry

from zenith_det.config.keys import did_you_mean
from zenith_det.errors import ConfigError


class SolverRegistry(Registry):
    """fvcore's registry, whose ``get`` tells a misspelt name in one line."""

    def __init__(self, key: str) -> None:
        """``key``: the configuration key whose value is looked up here."""
        super().__init__(key)
        self._key = key

    def get(self, name: str) -> Callable[..., Any]:
        """Return the entry of that name.

        Raises:
            ConfigError: there is none; the message lists the names that there are.
        """
        if name not in self:
            names = sorted(known for known, _ in self)
            hint = did_you_mean(name, names)
            raise ConfigError(f"{self._key} {name!r} is not one of {', '.join(names)}{hint}")
        return super().get(name)


OPTIMIZER_REGISTRY = SolverRegistry("SOLVER.OPTIMIZER")
OPTIMIZER_REGISTRY.__doc__ = """
Optimizers, by the name that ``SOLVER.OPTIMIZER`` holds.

An entry is called with ``(cfg, model)`` and returns a ``torch.optim.Optimizer`` over the model's trainable
parameters, in the groups of :func:`~zenith_det.solver.get_param_groups` unless it has a reason for others,
ready for its first training step. It honours ``SOLVER.CLIP_GRADIENTS``, which
:func:`~zenith_det.solver.add_gradient_clipping` does for any optimizer. Its ``group["lr"]`` belongs to the LR
schedule: it reads it and never writes it. ::

    @OPTIMIZER_REGISTRY.register()
    def RMSprop(cfg, model):
        optimizer = torch.optim.RMSprop(get_param_groups(cfg, model), lr=cfg.SOLVER.BASE_LR)
        return add_gradient_clipping(cfg, optimizer)
"""

LR_SCHEDULER_REGISTRY = SolverRegistry("SOLVER.LR_SCHEDULER_NAME")
LR_SCHEDULER_REGISTRY.__doc__ = """
LR schedules, by the name that ``SOLVER.LR_SCHEDULER_NAME`` holds.

An entry is called with ``(cfg, optimizer)`` and returns a ``torch.optim.lr_scheduler.LRScheduler``
(Detectron2 saves the state of no other kind). The trainer calls its ``step()`` once after every iteration,
``SOLVER.MAX_ITER`` times in all, the last call included; ``load_state_dict`` must leave the groups' ``"lr"``
as that iteration's. A schedule that depends on evaluations has a method ``follow(scores)`` as
:class:`~zenith_det.solver.PlateauLR` does; this toolkit's trainers call it after each of them.
"""
