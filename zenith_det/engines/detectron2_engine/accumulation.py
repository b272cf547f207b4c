"""``SOLVER.GRADIENT_ACCUMULATION``: one optimizer step from a batch taken in parts."""

from __future__ import annotations

import contextlib
import time
from typing import Any

import torch
from detectron2.engine import SimpleTrainer
from detectron2.utils import comm
from torch import Tensor, nn

from zenith_det.errors import ConfigError


def check_accumulation(cfg: Any, trainer: Any) -> None:
    """Refuse a ``SOLVER.GRADIENT_ACCUMULATION`` that ``trainer`` (the inner one) cannot honour.

    Raises:
        ConfigError: batches that don't divide, or a trainer with a step of its own.
    """
    parts, batch, processes = (
        cfg.SOLVER.GRADIENT_ACCUMULATION,
        cfg.SOLVER.IMS_PER_BATCH,
        comm.get_world_size(),
    )
    if parts == 1:
        return
    if batch % (parts * processes):
        raise ConfigError(
            f"SOLVER.GRADIENT_ACCUMULATION is {parts}: SOLVER.IMS_PER_BATCH {batch} on {processes} processes "
            f"does not divide into so many equal parts"
        )
    if not isinstance(trainer, SimpleTrainer):
        raise ConfigError(
            f"SOLVER.GRADIENT_ACCUMULATION is {parts}: {type(trainer).__name__} has a step of its own: take 1"
        )


def accumulated_step(trainer: SimpleTrainer, parts: int) -> None:
    """One iteration of Detectron2's ``SimpleTrainer`` or ``AMPTrainer``, its batch taken in ``parts``.

    The gradient is the mean of the parts' gradients, so that equal parts give the gradient of the whole batch
    (as far as each image's loss does not depend on the others: not with BatchNorm in training). The optimizer
    sees one gradient, and ZENITH records one norm.
    """
    model, optimizer = trainer.model, trainer.optimizer
    scaler = getattr(trainer, "grad_scaler", None)
    distributed = isinstance(model, nn.parallel.DistributedDataParallel)
    start = time.perf_counter()
    batch = next(trainer._data_loader_iter)
    data_time = time.perf_counter() - start
    size = len(batch) // parts

    optimizer.zero_grad()
    totals: dict[str, Tensor] = {}
    for number in range(parts):
        part = batch[number * size : (number + 1) * size]
        with contextlib.ExitStack() as stack:
            if distributed and number < parts - 1:
                stack.enter_context(model.no_sync())  # gradients cross the processes once a step
            with contextlib.ExitStack() as precision:
                if scaler is not None:
                    precision.enter_context(torch.autocast("cuda", dtype=trainer.precision))
                losses = model(part)
                if isinstance(losses, Tensor):
                    losses = {"total_loss": losses}
                total = sum(losses.values()) / parts
            (total if scaler is None else scaler.scale(total)).backward()
        for name, loss in losses.items():
            share = loss.detach() / parts
            totals[name] = totals[name] + share if name in totals else share
    trainer.after_backward()
    trainer._write_metrics(totals, data_time)
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
        scaler.update()
