"""The raw gradient norm under a loop that clips between ``backward()`` and ``step()`` and can't be changed."""

from __future__ import annotations

import functools
import weakref
from typing import Any

import torch
from torch import Tensor

from .zenith import ZENITH
from .zenith_adamw import ZENITHAdamW
from .zenith_ratio import ZenithRatio, zenith_of

__all__ = ["RawNorm", "measure_after_backward"]


def measure_after_backward(optimizer: torch.optim.Optimizer, scaler: Any = None) -> RawNorm:
    """Let ``optimizer`` measure its gradient norm as each ``backward()`` ends, before anything can clip it.

    For loops of a library (Hugging Face's ``Trainer``, accelerate, Lightning, detrex) that clip between
    ``backward()`` and ``step()``: once, after the optimizer was made. ``step()`` then takes the norm that the last
    ``backward()`` left, and doesn't measure it again. A loop of your own calls ``optimizer.record_norm()`` before it
    clips instead.

    Args:
        optimizer: a ZENITH, or one with ``ZenithRatio`` over it; a wrapper of Lightning, Fabric or accelerate too.
        scaler: the loop's ``GradScaler``, ``None`` without one. While it is enabled the norm is measured where the
            loop calls ``scaler.unscale_(optimizer)``, as it has to before it clips.

    Returns:
        A handle; its ``remove()`` ends this.

    Raises:
        TypeError: the optimizer doesn't measure norms.
    """
    zenith = zenith_of(optimizer)
    if zenith is None:
        raise TypeError(
            f"{type(optimizer).__name__} measures no gradient norm: put a ZenithRatio over it first"
        )
    return RawNorm(zenith, scaler)


class RawNorm:
    """What :func:`measure_after_backward` returns."""

    def __init__(self, zenith: ZENITH | ZENITHAdamW | ZenithRatio, scaler: Any) -> None:
        optimizer = zenith.optimizer if isinstance(zenith, ZenithRatio) else zenith
        self._zenith = weakref.ref(zenith)  # its parameters must not keep it alive
        self._scaler = scaler
        self._asked = False
        self._handles = [
            parameter.register_post_accumulate_grad_hook(self._on_gradient)
            for group in optimizer.param_groups
            for parameter in group["params"]
        ]
        self._unscale = None
        if scaler is not None:
            self._unscale = scaler.unscale_
            scaler.unscale_ = self._measuring(scaler.unscale_)

    def remove(self) -> None:
        """Let ``step()`` measure the norm again."""
        for handle in self._handles:
            handle.remove()
        if self._unscale is not None:
            self._scaler.unscale_ = self._unscale
            self._unscale = None

    def _on_gradient(self, _parameter: Tensor) -> None:
        # The first gradient of a backward pass asks to be told of its end; of those that come first the end is theirs.
        if not self._asked:
            self._asked = True
            _at_the_end(lambda: _at_the_end(self._measure))  # after DDP, which asks with its last gradient

    def _measure(self) -> None:
        self._asked = False
        if self._scaler is None or not self._scaler.is_enabled():
            self._record_norm()

    def _record_norm(self) -> None:
        zenith = self._zenith()
        if zenith is not None:
            zenith.record_norm()

    def _measuring(self, unscale: Any) -> Any:
        @functools.wraps(unscale)
        def unscale_(optimizer: Any, *args: Any, **kwargs: Any) -> Any:
            result = unscale(optimizer, *args, **kwargs)
            if zenith_of(optimizer) is self._zenith():
                self._record_norm()
            return result

        return unscale_


def _at_the_end(callback: Any) -> None:
    torch.autograd.Variable._execution_engine.queue_callback(callback)
