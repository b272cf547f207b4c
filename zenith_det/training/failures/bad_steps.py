"""What is told of steps whose loss or gradient is not finite: a line in the log, and the evidence in a file."""

from __future__ import annotations

import itertools
import json
import logging
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from zenith_det import cli
from zenith_det.files import append_whole
from zenith_det.training.logs.zenith_metrics import effective_lr
from zenith_det.training.processes.distributed import all_gather_objects, is_main_process

logger = logging.getLogger(__name__)

FILE_NAME = "bad_steps.jsonl"
#: A norm this many times the ordinary one, in the last steps, speaks for a learning rate that is too high.
RISING = 5.0
NAMED_PARAMETERS = 5

ImageId = tuple[int, str]  # image id, path


@dataclass
class Step:
    """What is remembered of a step; tensors are on the device and read only for a report.

    Attributes:
        iteration: counted from 0.
        images: of this rank's batch.
        losses: the parts of the loss, detached.
        norm: of the gradient.
    """

    iteration: int
    images: Sequence[ImageId]
    losses: Mapping[str, Tensor]
    norm: Tensor | None = None

    def total_loss(self) -> float:
        """The sum of the parts."""
        return sum(float(loss) for loss in self.losses.values())

    def grad_norm(self) -> float:
        """NaN: it is not known."""
        return math.nan if self.norm is None else float(self.norm)


def report(
    output_dir: Path,
    steps: Sequence[Step],
    model: nn.Module,
    optimizer: Optimizer,
    scaler: Any,
    in_a_row: int,
    last_good: Path | None,
) -> None:
    """Tell of a bad step, in the log and in :data:`FILE_NAME`; all ranks call it together.

    Args:
        steps: the bad one, and those before it, oldest first.
        scaler: the enabled ``GradScaler``; ``None`` without mixed precision.
        last_good: the newest good checkpoint.

    Raises:
        UserError: the file cannot be written.
    """
    *before, bad = steps
    own = {
        "losses": {name: float(loss) for name, loss in bad.losses.items()},
        "images": [list(image) for image in bad.images],
    }
    ranks = all_gather_objects(own)
    earlier = [
        {"iteration": step.iteration, "total_loss": step.total_loss(), "grad_norm": step.grad_norm()}
        for step in before
    ]
    parts = sorted(
        {name for rank in ranks for name, loss in rank["losses"].items() if not math.isfinite(loss)}
    )
    evidence = explain(parts, [e["total_loss"] for e in earlier], [e["grad_norm"] for e in earlier], scaler)
    if not is_main_process():
        return
    note_event(
        output_dir,
        "skipped step",
        iteration=bad.iteration,
        in_a_row=in_a_row,
        loss_parts=parts,
        evidence=evidence,
        lr=effective_lr(optimizer),
        grad_norm=bad.grad_norm(),
        bad_parameters=bad_parameters(model),
        ranks=[{"rank": i, **rank} for i, rank in enumerate(ranks)],
        steps_before=earlier,
        good_checkpoint=str(last_good) if last_good else None,
    )
    what = " and ".join(parts) + " not finite" if parts else "the gradient is not finite"
    ids = [str(image[0]) for rank in ranks for image in rank["images"]]
    logger.warning(
        "iteration %d: step skipped (%d in a row): %s; images %s; %s; details in %s",
        bad.iteration, in_a_row, what, ", ".join(ids), evidence, output_dir / FILE_NAME,
    )  # fmt: skip


def bad_parameters(model: nn.Module) -> list[str]:
    """The first parameters whose gradient is not finite."""
    names = (
        name.removeprefix("module.")
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and not parameter.grad.isfinite().all()
    )
    return list(itertools.islice(names, NAMED_PARAMETERS))


def note_event(output_dir: Path, event: str, **facts: Any) -> None:
    """Append an event of the run to :data:`FILE_NAME`, a JSON object a line; the main process alone does.

    Raises:
        UserError: it cannot be written.
    """
    if not is_main_process():
        return
    append_whole(
        output_dir / FILE_NAME, json.dumps(_without_nan({"event": event, **facts}), allow_nan=False) + "\n"
    )


def explain(
    bad_parts: Sequence[str], losses: Sequence[float], norms: Sequence[float], scaler: Any = None
) -> str:
    """What the evidence around a bad step points to: the learning rate, the data, or an AMP overflow.

    Args:
        bad_parts: names of the losses that were not finite.
        losses, norms: of the steps before, oldest first; NaN where there is none.
        scaler: the enabled ``GradScaler``; ``None`` without mixed precision.
    """
    rise = max(_rise(losses), _rise(norms))
    if rise >= RISING:
        return (
            f"points to the learning rate: losses or gradient norms had grown {rise:.3g}-fold within the last "
            "steps"
        )
    if scaler is not None and not bad_parts:
        return (
            f"points to an AMP overflow: the losses are finite; the loss scale is {scaler.get_scale():g} now; "
            "a few of these are normal"
        )
    if bad_parts:
        return (
            "points to the data: losses and gradient norms were ordinary until this batch; look at its images "
            f"and annotations ({cli.command('check-dataset')} --full)"
        )
    return "points to an overflow in the backward pass: losses were finite and ordinary; look at this batch's images"


def _rise(values: Sequence[float]) -> float:
    """How many times larger the last three values are than those before them; 1 where there are too few."""
    finite = [value for value in values if math.isfinite(value)]
    if len(finite) < 6:
        return 1.0
    usual = statistics.median(finite[:-3])
    return max(finite[-3:]) / usual if usual > 0 else 1.0


def _without_nan(value: Any) -> Any:
    """JSON has neither NaN nor infinity: they become text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return value
