"""``SOLVER.GRADIENT_ACCUMULATION``: one optimizer step from a batch taken in parts."""

from __future__ import annotations

import contextlib
import math
import time
from typing import Any

import torch
from detectron2.engine import SimpleTrainer
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from zenith_det.engines.detectron2_engine.overrides import own_step
from zenith_det.errors import ConfigError
from zenith_det.training.failures.bad_steps import ImageId, StepGuard, count_only_finite
from zenith_det.training.processes.distributed import all_gather_objects


def check_accumulation(cfg: Any, trainer: Any) -> None:
    """Refuse a ``SOLVER.GRADIENT_ACCUMULATION`` that ``trainer`` (the outer one) cannot honour.

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
    inner = trainer._trainer
    owner = own_step(trainer) or (None if isinstance(inner, SimpleTrainer) else type(inner))
    if owner is not None:
        raise ConfigError(
            f"SOLVER.GRADIENT_ACCUMULATION is {parts}: {owner.__name__} has a step of its own: take 1"
        )


def accumulated_step(trainer: SimpleTrainer, parts: int, guard: StepGuard | None = None) -> float | None:
    """One iteration of Detectron2's ``SimpleTrainer`` or ``AMPTrainer``, its batch taken in ``parts``.

    The gradient is the mean of the parts' gradients, so that equal parts give the gradient of the whole batch
    (as far as each image's loss does not depend on the others: not with BatchNorm in training). The optimizer
    sees one gradient, and ZENITH records one norm.

    Args:
        trainer: the inner one; its ``iter`` is set.
        parts: 1: the whole batch at once.
        guard: takes the optimizer's step. Then a loss that isn't finite ends nothing: its step is skipped, on
            all processes alike. Without one, Detectron2 raises ``FloatingPointError``, on the first process.

    Returns:
        With a ``guard``, the total loss as logged: the mean over the processes.
    """
    model, optimizer = trainer.model, trainer.optimizer
    scaler = getattr(trainer, "grad_scaler", None)
    distributed = isinstance(model, nn.parallel.DistributedDataParallel)
    start = time.perf_counter()
    batch = next(trainer._data_loader_iter)
    data_time = time.perf_counter() - start
    size = len(batch) // parts

    if guard is None:
        optimizer.zero_grad()
    else:
        guard.before_forward()
    totals: dict[str, Tensor] = {}
    for number in range(parts):
        part = batch[number * size : (number + 1) * size]
        with contextlib.ExitStack() as stack:
            if distributed and number < parts - 1:
                stack.enter_context(model.no_sync())  # gradients cross the processes once a step
            with contextlib.ExitStack() as precision:
                if scaler is not None:
                    precision.enter_context(torch.autocast(_device_type(model), dtype=trainer.precision))
                losses = model(part)
                if isinstance(losses, Tensor):
                    losses = {"total_loss": losses}
                total = sum(losses.values()) / parts
            if guard is not None:
                total = count_only_finite(total)
                if number == 0:
                    # After the forward pass, which has waited for the device: see StepGuard.inspect.
                    guard.inspect()
                    optimizer.zero_grad()
            (total if scaler is None else scaler.scale(total)).backward()
        for name, loss in losses.items():
            share = loss.detach() / parts
            totals[name] = totals[name] + share if name in totals else share
    trainer.after_backward()
    if guard is not None:
        guard.step(trainer.iter, [image_of(sample) for sample in batch], totals)
        return _put_losses(totals, data_time)
    trainer._write_metrics(totals, data_time)
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
        scaler.update()
    return None


def _device_type(model: nn.Module) -> str:
    return next((parameter.device.type for parameter in model.parameters()), "cpu")


def image_of(sample: Any) -> ImageId:
    if not isinstance(sample, dict):  # a project's own kind of batch
        return -1, type(sample).__name__
    return sample.get("image_id", -1), str(sample.get("file_name", ""))


def _put_losses(losses: dict[str, Tensor], data_time: float) -> float:
    """Put what Detectron2's ``SimpleTrainer`` puts into the storage, if it is finite."""
    values = torch.stack(list(losses.values())).float().cpu().tolist()
    ranks = all_gather_objects({**dict(zip(losses, values)), "data_time": data_time})
    slowest = max(rank.pop("data_time") for rank in ranks)
    means: dict[str, float] = {}
    for rank in ranks:
        for name, value in rank.items():
            means[name] = means.get(name, 0.0) + value / len(ranks)
    total = sum(means.values())
    if comm.is_main_process():
        storage = get_event_storage()
        storage.put_scalars(data_time=slowest)
        if math.isfinite(total):  # a bad step's are in its report, and would hide the others in a median
            storage.put_scalars(total_loss=total)
            if len(means) > 1:
                storage.put_scalars(**means)
    return total
