"""What a project's trainer has of its own."""

from __future__ import annotations

from typing import Any

from torch.amp import GradScaler

_DETECTRON2 = "detectron2.engine."
_OURS = "zenith_det.engines.detectron2_engine."


def own(trainer: Any, method: str) -> type | None:
    """The project's class whose ``method`` runs in ``trainer``; ``None``: Detectron2's own does, or this toolkit's.

    Args:
        trainer: an object, or a ``weakref.proxy`` of one.
    """
    # Of a proxy, type() is the proxy's.
    for base in trainer.__class__.__mro__:
        if method in vars(base) and not base.__module__.startswith(_OURS):
            return None if base.__module__.startswith(_DETECTRON2) else base
    return None


def own_step(trainer: Any) -> type | None:
    """The class that makes the training step, if it is neither Detectron2's nor this toolkit's.

    Args:
        trainer: a ``DefaultTrainer``, or the ``SimpleTrainer`` that a script makes itself.
    """
    inner = getattr(trainer, "_trainer", None)
    for part in [trainer] if inner is None else [trainer, inner]:
        if (found := own(part, "run_step") or own(part, "after_backward")) is not None:
            return found
    # Between backward() and step(); DefaultTrainer calls those of the inner trainer alone.
    for hook in (trainer if inner is None else inner)._hooks:
        if (found := own(hook, "after_backward")) is not None:
            return found
    return None


def grad_scaler_of(trainer: Any) -> GradScaler | None:
    """The loss scaler of ``trainer``, or of its inner trainer, by whatever name; ``None``: neither has one."""
    inner = getattr(trainer, "_trainer", trainer)
    for value in [*inner.__dict__.values(), *trainer.__dict__.values()]:
        if isinstance(value, GradScaler):
            return value
    return None
