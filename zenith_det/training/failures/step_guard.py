"""Steps whose loss or gradient is not finite: left out on all ranks alike, and counted, in whatever loop."""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import math
import types
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from zenith_det.config.old_names import moved_value
from zenith_det.optim import ZENITH, ZENITHAdamW, ZenithRatio, global_norm, zenith_of
from zenith_det.training.failures.bad_steps import ImageId, Step, bad_parameters, report
from zenith_det.training.failures.divergence import LossWatch

logger = logging.getLogger(__name__)

#: Steps before a bad one that its report shows.
REMEMBERED_STEPS = 20


class StepGuard:
    """Leaves out a loop's steps on a loss or a gradient that is not finite, and tells when the run is lost.

    What it needs to know it learns from the calls of the model in training, of ``optimizer.step`` and of
    ``scaler.step``, in whatever order and however often the loop makes them. On finite losses and gradients training
    is what it was, bit for bit. Of a loss that isn't finite NaN goes into every gradient, and by DDP's averaging into
    those of every rank, so that all leave out the step and none has to be asked.

    ZENITH skips such a step on the device, and the host learns of it later, without waiting: as the next forward pass
    ends, or by :meth:`inspect`. For any other optimizer the host looks at the norm before it steps.

    Args:
        cfg: ``SOLVER.MAX_NONFINITE_STEPS``, ``RECOVERY.DIVERGENCE_FACTOR`` and ``OUTPUT_DIR`` count.
        model: not wrapped by DDP; called with a batch it returns a loss or a dict of losses.
        optimizer: any.
        scaler: the loop's ``GradScaler``, enabled or not; ``None``: none.

    Attributes:
        output_dir: where bad steps are reported; ``None``: they are not.
        limit: so many bad steps in a row end it.
        streak: bad steps in a row up to now.
        skipped: bad steps of the run.
        watch: is given the losses.
        last_good: the newest checkpoint that was saved while training went well.
    """

    def __init__(self, cfg: Any, model: nn.Module, optimizer: Optimizer, scaler: Any = None) -> None:
        self.model = model
        self.optimizer = optimizer
        self._scaler = scaler if scaler is not None and scaler.is_enabled() else None
        self.output_dir: Path | None = Path(cfg.OUTPUT_DIR)
        # Half of a run that is too short for the limit: such a run has not trained.
        limit = int(moved_value(cfg, "SOLVER.MAX_NONFINITE_STEPS"))
        self.limit = min(limit, max(int(cfg.SOLVER.MAX_ITER) // 2, 2))
        self.streak = 0
        self.skipped = 0
        self.watch = LossWatch(cfg.RECOVERY.DIVERGENCE_FACTOR)
        self.last_good: Path | None = None
        self._recent: deque[Step] = deque(maxlen=REMEMBERED_STEPS + 1)
        self._flag = _LateFlag()
        self._running = [
            buffer
            for module in model.modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats
            for buffer in module.buffers(recurse=False)
        ]
        self._before = [torch.empty_like(buffer) for buffer in self._running]
        self._undo: list[Callable[[], Any]] = []
        self._called_step = False
        self._iteration = self._passes = 0
        self._images: list[ImageId] = []
        self._losses: dict[str, Tensor] = {}

    # ---- what the loop calls

    def attach(self, outlived: Callable[[Exception], bool] | None = None) -> None:
        """From here on; to be called by all ranks at the same point, before the first iteration.

        Args:
            outlived: whether an error of the forward pass counts as a loss that is not finite; whoever says so
                remembers it.
        """
        model = self.model
        self._undo.append(_tolerate_giving_up(model, outlived))
        # Closures, and not methods: a deep copy of the model keeps them, and must not copy all that is here.
        before = model.register_forward_pre_hook(
            lambda m, args: self._before_forward(args) if m is model else None
        )
        after = model.register_forward_hook(
            lambda m, _, output: self._after_forward(output) if m is model else None
        )
        self._undo += [before.remove, after.remove]
        self._replace(self.optimizer, "step", self._guarded_step)
        if self._scaler is not None:
            self._replace(self._scaler, "step", self._watched_scaler_step)

    def detach(self) -> None:
        """Leave model, optimizer and scaler as they were."""
        while self._undo:
            self._undo.pop()()

    def begin(self, iteration: int) -> None:
        """A new iteration, counted from 0."""
        self._iteration, self._passes = iteration, 0
        self._images, self._losses = [], {}

    def left_out(self) -> None:
        """The loop itself has left out this iteration's step."""
        self._remember().norm = torch.tensor(math.inf)
        self._flag.tell(1)
        self._restore_statistics()

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
            report(
                self.output_dir,
                self._recent,
                self.model,
                self.optimizer,
                self._scaler,
                self.streak,
                self.last_good,
            )

    def verdict(self) -> str | None:
        """Why training can't go on: too many bad steps in a row, or a loss that has diverged; ``None`` while it can."""
        if self.streak < self.limit:
            return self.watch.verdict()
        names = ", ".join(bad_parameters(self.model)) or "none at hand"
        return (
            f"the loss or the gradient was not finite in {self.streak} steps in a row; first parameters with "
            f"non-finite gradients: {names}"
        )

    @property
    def good(self) -> bool:
        """Whether the weights are worth coming back to."""
        return self.streak == 0 and self.watch.looks_good()

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint, where it is ``"good"`` that tells of its weights."""
        return {
            "guard": {"streak": self.streak, "skipped": self.skipped},
            "watch": self.watch.state_dict(),
            "good": self.good,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self.streak, self.skipped = state["guard"]["streak"], state["guard"]["skipped"]
        self.watch.load_state_dict(state["watch"])

    # ---- what calls of the loop's bring here

    def _replace(self, owner: Any, name: str, wrap: Callable[[Any], Any]) -> None:
        original = getattr(owner, name)
        own = name in vars(owner)
        replacement = functools.wraps(original)(wrap(original))
        setattr(owner, name, replacement)

        def undo() -> None:
            if vars(owner).get(name) is not replacement:
                return  # somebody has wrapped it since
            if own:
                setattr(owner, name, original)
            else:
                delattr(owner, name)

        self._undo.append(undo)

    def _before_forward(self, args: tuple[Any, ...]) -> None:
        if not (self.model.training and torch.is_grad_enabled()):
            return
        if not self._passes:  # a skipped step leaves BatchNorm's running statistics as they were, too
            for before, buffer in zip(self._before, self._running):
                before.copy_(buffer)
        if args:
            self._images.extend(_images_of(args[0]))

    def _after_forward(self, output: Any) -> Any:
        if not (self.model.training and torch.is_grad_enabled()):
            return None
        if not self._passes:
            # The forward pass has waited for the device, which now knows how the last step went, while the gradients
            # of that step are still there to be looked at.
            self.inspect()
        self._passes += 1
        named = output if isinstance(output, Mapping) else {"total_loss": output}
        losses = {
            name: loss
            for name, loss in named.items()
            if isinstance(loss, Tensor) and loss.requires_grad and loss.numel() == 1
        }
        if not losses:
            return None
        for name, loss in losses.items():
            self._losses[name] = self._losses[name] + loss.detach() if name in self._losses else loss.detach()
        total = torch.stack([loss.detach().float().reshape(()) for loss in losses.values()]).sum()
        factor = torch.where(total.isfinite(), 1.0, math.nan)
        finite = {name: loss * factor.to(loss.dtype) for name, loss in losses.items()}
        if not isinstance(output, Mapping):
            return finite["total_loss"]
        replaced: Any = copy.copy(output)
        replaced.update(finite)
        return replaced

    def _guarded_step(self, step: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(*args: Any, **kwargs: Any) -> Any:
            self._called_step = True
            if args or kwargs.get("closure") is not None:
                return step(*args, **kwargs)  # the gradients are yet to come
            return self.take(functools.partial(step, **kwargs))

        return guarded

    def _watched_scaler_step(self, step: Callable[..., Any]) -> Callable[..., Any]:
        def watched(optimizer: Any, *args: Any, **kwargs: Any) -> Any:
            if optimizer is not self.optimizer:
                return step(optimizer, *args, **kwargs)
            self._called_step = False
            result = step(optimizer, *args, **kwargs)
            if not self._called_step:
                self.left_out()
            return result

        return watched

    def take(self, step: Callable[[], Any]) -> Any:
        """Call ``step`` on gradients that are not scaled, or on those that the optimizer knows to be, unless they are
        not finite.

        Returns:
            What it returned; ``None`` where it was left out.
        """
        result, zenith, remembered = None, _that_skips(self.optimizer), self._remember()
        if zenith is not None:
            # As many in a row as it allows raise: told by streak, on all ranks at the same iteration.
            with contextlib.suppress(FloatingPointError):
                result = step()
            remembered.norm = zenith.grad_norm
            self._flag.ask(zenith.consecutive_nonfinite)
            self._restore_statistics(zenith.consecutive_nonfinite > 0)
            return result
        norm = global_norm(
            p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None
        )
        remembered.norm = norm
        bad = not bool(norm.isfinite())
        self._flag.tell(int(bad))
        if bad:
            self._restore_statistics()
        else:
            result = step()
        return result

    def _remember(self) -> Step:
        losses = self._losses
        if self._passes > 1:
            losses = {name: loss / self._passes for name, loss in losses.items()}
        self._recent.append(Step(self._iteration, self._images, losses))
        return self._recent[-1]

    def _restore_statistics(self, where: Tensor | None = None) -> None:
        """Undo what the forward pass did to BatchNorm's statistics; on the device, if ``where`` (0-dim) holds there."""
        for before, buffer in zip(self._before, self._running):
            buffer.copy_(before if where is None else torch.where(where, before, buffer))


def _that_skips(optimizer: Optimizer) -> ZENITH | ZENITHAdamW | ZenithRatio | None:
    """What leaves out gradients that are not finite in ``step()``, and counts on the device how many in a row."""
    zenith = zenith_of(optimizer)
    return zenith if zenith is not None and getattr(zenith, "skips_nonfinite_steps", True) else None


def _images_of(batch: Any) -> list[ImageId]:
    return [
        (sample.get("image_id", -1), str(sample.get("file_name", "")))
        if isinstance(sample, dict)
        else (-1, type(sample).__name__)  # a project's own kind of batch
        for sample in (batch if isinstance(batch, list | tuple) else [])
    ]


def _tolerate_giving_up(
    module: nn.Module, outlived: Callable[[Exception], bool] | None
) -> Callable[[], None]:
    """Let a forward pass that raises ``FloatingPointError`` count as a loss that is not finite; what ends it.

    Detectron2's proposal generator raises one on the rank that it happens on, and the others would wait for
    that rank's gradients. Only in training.
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
            if not self.training or outlived is None or not outlived(error):
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


def _without_self(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, *args, **kwargs: function(*args, **kwargs)


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
