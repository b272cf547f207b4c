"""A :class:`~zenith_det.training.failures.bad_steps.StepGuard` around a loop that somebody else has written."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from zenith_det.training.failures.bad_steps import ImageId, StepGuard, finite_or_nan


class LoopGuard:
    """Lets a loop that calls the model, ``backward()`` and ``optimizer.step()`` itself leave out bad steps.

    What it needs to know it learns from the calls of the model in training, of ``optimizer.step`` and of
    ``scaler.step``, in whatever order and however often the loop makes them. On finite losses and gradients training
    is what it was, bit for bit.

    Args:
        guard: of the same optimizer, without a scaler of its own.
        scaler: the loop's ``GradScaler``; ``None``: none.
        images_of: the images of a batch, as reports name them.
    """

    def __init__(self, guard: StepGuard, scaler: Any, images_of: Callable[[Any], Sequence[ImageId]]) -> None:
        self.guard = guard
        self._scaler = scaler
        self._images_of = images_of
        self._iteration = 0
        self._images: list[ImageId] = []
        self._losses: dict[str, Tensor] = {}
        self._begun = False
        self._called_step = False
        self._undo: list[Callable[[], Any]] = []

    def attach(self) -> None:
        """From here on; to be called by all ranks at the same point, before the first iteration."""
        guard, model = self.guard, self.guard.model
        # Closures, and not methods: a deep copy of the model keeps them, and must not copy all that is here.
        before = model.register_forward_pre_hook(
            lambda m, args: self._before_forward(args) if m is model else None
        )
        after = model.register_forward_hook(
            lambda m, _, output: self._after_forward(output) if m is model else None
        )
        self._undo += [before.remove, after.remove]
        self._replace(guard.optimizer, "step", self._guarded_step)
        if self._scaler is not None and self._scaler.is_enabled():
            self._replace(self._scaler, "step", self._watched_scaler_step)

    def detach(self) -> None:
        """Leave model, optimizer and scaler as they were."""
        while self._undo:
            self._undo.pop()()

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

    def begin(self, iteration: int) -> None:
        """A new iteration, counted from 0."""
        self._iteration = iteration
        self._images, self._losses = [], {}
        self._begun = False

    def left_out(self) -> None:
        """The loop itself has left out this iteration's step."""
        self.guard.begin_step(self._iteration, self._images, self._losses)
        self.guard.left_out()

    def _before_forward(self, args: tuple[Any, ...]) -> None:
        if not (self.guard.model.training and torch.is_grad_enabled()):
            return
        if not self._begun:
            self.guard.before_forward()
        if args:
            self._images.extend(self._images_of(args[0]))

    def _after_forward(self, output: Any) -> Any:
        if not (self.guard.model.training and torch.is_grad_enabled()):
            return None
        if not self._begun:
            # The forward pass has waited for the device, and the gradients are there yet: see StepGuard.
            self._begun = True
            self.guard.inspect()
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
        factor = finite_or_nan(total)
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
            self.guard.begin_step(self._iteration, self._images, self._losses)
            return self.guard.take(functools.partial(step, **kwargs))

        return guarded

    def _watched_scaler_step(self, step: Callable[..., Any]) -> Callable[..., Any]:
        def watched(optimizer: Any, *args: Any, **kwargs: Any) -> Any:
            if optimizer is not self.guard.optimizer:
                return step(optimizer, *args, **kwargs)
            self._called_step = False
            result = step(optimizer, *args, **kwargs)
            if not self._called_step:
                self.left_out()
            return result

        return watched
