"""Steps whose loss or gradient is not finite: skipped on all ranks alike, counted, and explained in a file."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import statistics
import types
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from zenith_det import cli
from zenith_det.config.old_names import moved_value
from zenith_det.files import append_whole
from zenith_det.optim import ZENITH, ZENITHAdamW, ZenithRatio, global_norm, zenith_of
from zenith_det.training.logs.zenith_metrics import effective_lr
from zenith_det.training.processes.distributed import all_gather_objects, is_main_process

logger = logging.getLogger(__name__)

FILE_NAME = "bad_steps.jsonl"
#: Steps before a bad one that its report shows.
REMEMBERED_STEPS = 20
#: A norm this many times the ordinary one, in the last steps, speaks for a learning rate that is too high.
RISING = 5.0
NAMED_PARAMETERS = 5

ImageId = tuple[int, str]  # image id, path


def count_only_finite(total: Tensor) -> Tensor:
    """``total``, or NaN in all that is derived from it where it is not finite.

    A loss that is not finite can have finite gradients on its own rank. This carries it into every gradient,
    and DDP's averaging into those of every rank, so that all skip the step, and no rank has to be asked.
    """
    return total * finite_or_nan(total)


def finite_or_nan(total: Tensor) -> Tensor:
    """1 where ``total`` is finite, else NaN: a factor that carries it into what it multiplies."""
    return torch.where(total.detach().isfinite(), 1.0, math.nan)


def bad_step_limit(cfg: Any) -> int:
    """``SOLVER.MAX_NONFINITE_STEPS``, or half of a run too short for it: such a run has not trained."""
    configured = int(moved_value(cfg, "SOLVER.MAX_NONFINITE_STEPS"))
    return min(configured, max(int(cfg.SOLVER.MAX_ITER) // 2, 2))


def guard_forward(
    module: nn.Module, outlived: Callable[[Exception], bool] = lambda error: False
) -> Callable[[], None]:
    """Let a forward pass that raises ``FloatingPointError`` count as a loss that is not finite.

    Detectron2's proposal generator raises one on the rank that it happens on, and the others would wait for
    that rank's gradients. Only in training.

    Args:
        module: a model that returns a dict of losses, not wrapped by DDP.
        outlived: whether another error counts as that, too; it is remembered by whoever says so.

    Returns:
        What ends it.
    """
    before = vars(module).get("forward")
    forward = getattr(module.forward, "__func__", None) or _without_self(module.forward)

    def guarded(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        try:
            return forward(self, *args, **kwargs)
        except FloatingPointError as error:
            if not self.training:
                raise
            logger.warning("the forward pass gave up: %s", " ".join(str(error).split()))
        except Exception as error:
            if not self.training or not outlived(error):
                raise
        # All parameters take part: DDP waits for each of their gradients.
        parts = [parameter.sum() * math.nan for parameter in self.parameters() if parameter.requires_grad]
        return {"loss_forward": torch.stack(parts).sum()}

    # A method of the module, so that a deep copy of it has its own.
    module.forward = types.MethodType(guarded, module)  # type: ignore[method-assign]

    def undo() -> None:
        del module.forward
        if before is not None:
            module.forward = before

    return undo


def _that_skips(optimizer: Optimizer) -> ZENITH | ZENITHAdamW | ZenithRatio | None:
    """What leaves out gradients that are not finite in ``step()``, and counts on the device how many in a row."""
    zenith = zenith_of(optimizer)
    return zenith if zenith is not None and getattr(zenith, "skips_nonfinite_steps", True) else None


def _without_self(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, *args, **kwargs: function(*args, **kwargs)


@dataclass
class _Step:
    """What is remembered of a step; tensors are on the device and read only for a report."""

    iteration: int
    images: Sequence[ImageId]
    losses: Mapping[str, Tensor]
    norm: Tensor | None = None

    def total_loss(self) -> float:
        return sum(float(loss) for loss in self.losses.values())

    def grad_norm(self) -> float:
        return math.nan if self.norm is None else float(self.norm)


class StepGuard:
    """Takes an optimizer's steps, except those on a gradient that is not finite.

    ZENITH skips such a step on the device, and the host learns of it later, without waiting: call
    :meth:`inspect` after the next forward pass, before the gradients are cleared, and before saving. For any
    other optimizer the host looks at the norm before it steps.

    Args:
        model: whose parameters are named in reports; maybe wrapped.
        optimizer: any.
        scaler: the ``GradScaler``, enabled or not; ``None``: none.
        output_dir: see the attribute.
        limit: ``SOLVER.MAX_NONFINITE_STEPS``.
        last_good: the file of the newest good checkpoint, for reports.

    Attributes:
        output_dir: where :data:`FILE_NAME` goes; ``None``: nothing is reported.
        streak: bad steps in a row up to now.
        skipped: bad steps of the run.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        scaler: Any,
        output_dir: Path,
        *,
        limit: int,
        last_good: Callable[[], str | None] = lambda: None,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.scaler = scaler if scaler is not None and scaler.is_enabled() else None
        self.streak = 0
        self.skipped = 0
        self.limit = limit
        self.output_dir: Path | None = output_dir
        self._last_good = last_good
        self._recent: deque[_Step] = deque(maxlen=REMEMBERED_STEPS + 1)
        self._flag = _LateFlag()
        self._running = [
            buffer
            for module in model.modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats
            for buffer in module.buffers(recurse=False)
        ]
        self._before = [torch.empty_like(buffer) for buffer in self._running]

    def before_forward(self) -> None:
        """Remember BatchNorm's running statistics: a skipped step leaves them as they were, too."""
        for before, buffer in zip(self._before, self._running):
            before.copy_(buffer)

    def step(self, iteration: int, images: Sequence[ImageId], losses: Mapping[str, Tensor]) -> None:
        """Step, unless the gradient is not finite.

        Args:
            iteration: counted from 0.
            images: of this rank's batch.
            losses: the parts of the loss, detached.
        """
        self.begin_step(iteration, images, losses)
        scaler = self.scaler
        if scaler is None:
            self.take(self.optimizer.step)
            return
        if _that_skips(self.optimizer) is None:
            scaler.unscale_(self.optimizer)
        self.take(lambda: scaler.step(self.optimizer))
        scaler.update()

    def begin_step(self, iteration: int, images: Sequence[ImageId], losses: Mapping[str, Tensor]) -> None:
        """Tell of a step that :meth:`take` is to take; as in :meth:`step`."""
        self._recent.append(_Step(iteration, images, losses))

    def take(self, step: Callable[[], Any]) -> Any:
        """Call ``step`` on gradients that are not scaled, or on those that the optimizer knows to be, unless they are
        not finite.

        Returns:
            What it returned; ``None`` where it was left out.
        """
        result, zenith = None, _that_skips(self.optimizer)
        if zenith is not None:
            # As many in a row as it allows raise: told by streak, on all ranks at the same iteration.
            with contextlib.suppress(FloatingPointError):
                result = step()
            self._recent[-1].norm = zenith.grad_norm
            self._flag.ask(zenith.consecutive_nonfinite)
            self._restore_statistics(zenith.consecutive_nonfinite > 0)
        else:
            norm = global_norm(
                p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None
            )
            self._recent[-1].norm = norm
            bad_now = not bool(norm.isfinite())
            if not bad_now:
                result = step()
            self._flag.tell(int(bad_now))
            if bad_now:
                self._restore_statistics()
        return result

    def left_out(self) -> None:
        """Tell of a step that somebody else, a ``GradScaler``, has left out."""
        self._recent[-1].norm = torch.tensor(math.inf)
        self._flag.tell(1)
        self._restore_statistics()

    def _restore_statistics(self, where: Tensor | None = None) -> None:
        """Undo what the forward pass did to BatchNorm's statistics; on the device, if ``where`` (0-dim) holds there."""
        for before, buffer in zip(self._before, self._running):
            buffer.copy_(before if where is None else torch.where(where, before, buffer))

    def inspect(self) -> None:
        """Learn whether the last step was skipped, and report it if it was; all ranks call it together.

        Raises:
            UserError: the report cannot be written.
        """
        answer = self._flag.take()
        if answer is None:
            return
        if answer == 0:
            self.streak = 0
            return
        self.streak += 1
        self.skipped += 1
        if self.output_dir is not None:
            self._report(self.output_dir)

    def verdict(self) -> str | None:
        """Why training can't go on: too many bad steps in a row; ``None`` while it can."""
        if self.streak < self.limit:
            return None
        names = ", ".join(self._bad_parameters()) or "none at hand"
        return (
            f"the loss or the gradient was not finite in {self.streak} steps in a row; first parameters with "
            f"non-finite gradients: {names}"
        )

    def state_dict(self) -> dict[str, int]:
        """Counters for a checkpoint."""
        return {"streak": self.streak, "skipped": self.skipped}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on from :meth:`state_dict`."""
        self.streak, self.skipped = state["streak"], state["skipped"]

    # The report.

    def _report(self, output_dir: Path) -> None:
        *before, bad = self._recent
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
        evidence = explain(
            parts, [e["total_loss"] for e in earlier], [e["grad_norm"] for e in earlier], self.scaler
        )
        if not is_main_process():
            return
        note_event(
            output_dir,
            "skipped step",
            iteration=bad.iteration,
            in_a_row=self.streak,
            loss_parts=parts,
            evidence=evidence,
            lr=effective_lr(self.optimizer),
            grad_norm=bad.grad_norm(),
            bad_parameters=self._bad_parameters(),
            ranks=[{"rank": i, **rank} for i, rank in enumerate(ranks)],
            steps_before=earlier,
            good_checkpoint=self._last_good(),
        )
        what = " and ".join(parts) + " not finite" if parts else "the gradient is not finite"
        ids = [str(image[0]) for rank in ranks for image in rank["images"]]
        logger.warning(
            "iteration %d: step skipped (%d in a row): %s; images %s; %s; details in %s",
            bad.iteration, self.streak, what, ", ".join(ids), evidence, output_dir / FILE_NAME,
        )  # fmt: skip

    def _bad_parameters(self) -> list[str]:
        names = []
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None and not parameter.grad.isfinite().all():
                names.append(name.removeprefix("module."))
                if len(names) == NAMED_PARAMETERS:
                    break
        return names


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


class _LateFlag:
    """A counter on the device, asked for early and read when it has arrived."""

    def __init__(self) -> None:
        self._value: Tensor | int | None = None
        self._arrived: torch.cuda.Event | None = None
        self._pinned: Tensor | None = None

    def ask(self, counter: Tensor) -> None:
        if counter.device.type != "cuda":
            self._value = int(counter)
            return
        if self._pinned is None:
            self._pinned = torch.zeros((), dtype=counter.dtype, pin_memory=True)
            self._arrived = torch.cuda.Event()
        assert self._arrived is not None
        self._pinned.copy_(counter, non_blocking=True)
        self._arrived.record()
        self._value = self._pinned

    def tell(self, value: int) -> None:
        self._value = value

    def read(self) -> int:
        """The value; waits for it if need be."""
        if isinstance(self._value, Tensor) and self._arrived is not None:
            self._arrived.synchronize()
        return 0 if self._value is None else int(self._value)

    def take(self) -> int | None:
        """As :meth:`read`, once; ``None`` when nothing was asked since."""
        if self._value is None:
            return None
        value = self.read()
        self._value = None
        return value
