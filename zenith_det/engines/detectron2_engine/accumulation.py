"""``SOLVER.GRADIENT_ACCUMULATION`` in a trainer of Detectron2's."""

from __future__ import annotations

import time
from typing import Any

import torch
from detectron2.engine import SimpleTrainer

from zenith_det.engines.accumulating import backward_in_parts, check_batch
from zenith_det.engines.detectron2_engine.overrides import own_step
from zenith_det.errors import ConfigError


def check_accumulation(cfg: Any, trainer: Any) -> None:
    """Refuse a ``SOLVER.GRADIENT_ACCUMULATION`` that ``trainer`` (the outer one) cannot honour.

    Raises:
        ConfigError: batches that don't divide, or a trainer with a step of its own.
    """
    if cfg.SOLVER.GRADIENT_ACCUMULATION == 1:
        return
    check_batch(cfg)
    inner = trainer._trainer
    owner = own_step(trainer) or (None if isinstance(inner, SimpleTrainer) else type(inner))
    if owner is not None:
        raise ConfigError(
            f"SOLVER.GRADIENT_ACCUMULATION is {cfg.SOLVER.GRADIENT_ACCUMULATION}: {owner.__name__} has a step of its "
            "own: take 1"
        )


def accumulated_step(trainer: SimpleTrainer, parts: int) -> None:
    """One iteration of Detectron2's ``SimpleTrainer`` or ``AMPTrainer``, its batch taken in ``parts``.

    The optimizer sees one gradient, and ZENITH records one norm: see
    :func:`~zenith_det.engines.accumulating.backward_in_parts`.

    Args:
        trainer: the inner one; its ``iter`` is set.
    """
    model, optimizer = trainer.model, trainer.optimizer
    scaler = getattr(trainer, "grad_scaler", None)
    device = next((parameter.device.type for parameter in model.parameters()), "cpu")
    precision = None if scaler is None else trainer.precision
    start = time.perf_counter()
    batch = next(trainer._data_loader_iter)
    data_time = time.perf_counter() - start
    losses = backward_in_parts(
        model,
        batch,
        parts,
        autocast=lambda: torch.autocast(device, precision, enabled=scaler is not None),
        scaled=lambda total: total if scaler is None else scaler.scale(total),
        before_backward=optimizer.zero_grad,
    )
    trainer.after_backward()
    trainer._write_metrics(losses, data_time)
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
        scaler.update()
